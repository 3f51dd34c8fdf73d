"""A SQL database, used from asyncio: its work runs in threads, each piece in a transaction of its own.

SQLite, `sqlite:FILE`, is for the processes of one machine. It has one writer at a time: a writing transaction begins
with BEGIN IMMEDIATE, so its reads already exclude every other process, and in the one thread that writes, so that the
threads of this process wait in a queue and not on the database's lock.

PostgreSQL, `postgresql://USER@HOST:PORT/DATABASE`, takes libpq's parameters in the query, such as `?sslmode=require`.
A password is no part of the URL: libpq reads PGPASSWORD, PGPASSFILE or ~/.pgpass. Writers exclude each other by row
locks and by `lock`, and a transaction that meets another one all the same (a deadlock, the same row inserted twice) is
run again. A connection that broke is replaced when it is next wanted. Each `Database` opens up to READERS + 4 of them.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from tenacity import (
    Retrying,
    retry,
    retry_if_exception,
    retry_if_exception_message,
    stop_after_attempt,
    stop_after_delay,
    wait_random,
)

from ...errors import FluxFillError, SettingsError, StoreUnavailable
from ..calls import Call, current_call
from ..unforeseen import unforeseen
from .sql_connections import watch
from .sql_tables import are_current, bring_up_to_date

T = TypeVar("T")

#: How long a statement on SQLite waits for another process's transaction, in seconds.
BUSY_TIMEOUT_S = 20.0
#: How long a caller waits for a server, in seconds, whatever the server or the network does.
CALL_TIMEOUT_S = 10.0
#: Threads that read.
READERS = 2
#: serialization_failure, deadlock_detected, unique_violation: another transaction came first.
_LOST_RACES = frozenset({"40001", "40P01", "23505"})
#: libpq's; the URL may set others. A peer that vanished is noticed by what it does not acknowledge.
_CONNECTION = {"connect_timeout": "4", "keepalives_idle": "10", "keepalives_interval": "5", "tcp_user_timeout": "5000"}
#: Of each transaction on PostgreSQL. The second frees what a client that hangs has locked.
LIMITS = "SET LOCAL statement_timeout = '8s'; SET LOCAL idle_in_transaction_session_timeout = '30s'"


#: Not `now()`, which is when the transaction began: before it waited.
_NOW = sa.text("SELECT clock_timestamp()")
_LOCK = sa.text(
    "WITH locked AS MATERIALIZED (SELECT pg_advisory_xact_lock(:number)) SELECT clock_timestamp() FROM locked"
)


def _has_lost_race(error: BaseException) -> bool:
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _LOST_RACES


_RACES = Retrying(
    retry=retry_if_exception(_has_lost_race), stop=stop_after_attempt(10), wait=wait_random(0.01, 0.1), reraise=True
)


class Database:
    """A database with our tables. A caller that stops waiting, cancelled or timed out, gives its transaction up: it is
    rolled back, unless its commit is under way already, which may succeed unheard.

    Both ways of running work raise StoreUnavailable; and SettingsError where a newer version of this service wrote the
    database.
    """

    def __init__(self, url: str) -> None:
        """A SQLite file is made, or brought up to date, at once; a server's tables are when it is first reached.

        Raises SettingsError for a URL that is none; where the driver is missing; and as the methods.
        """
        self._kind = _KINDS[url.partition(":")[0]]
        with _translated():
            self._engine = self._kind.engine(url)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="sql-reader")
        self._writers = ThreadPoolExecutor(self._kind.writers, thread_name_prefix="sql-writer")
        self._is_prepared = False
        if not self._kind.is_remote:
            self._prepare()

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work`. On PostgreSQL each of its statements sees what was stored when the statement began."""
        return await self._in_thread(self._readers, work, writes=False)

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work`, more than once where it meets other writers, and store what it wrote unless it raises."""
        return await self._in_thread(self._writers, work, writes=True)

    def close(self) -> None:
        self._readers.shutdown()
        self._writers.shutdown()
        self._engine.dispose()

    async def _in_thread(self, threads: Executor, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        def run() -> T:
            if not self._is_prepared:
                self._prepare()
            return self._transact(work, writes=writes)

        call = Call()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S if self._kind.is_remote else None):
                return await asyncio.get_running_loop().run_in_executor(threads, call.run, run)
        except TimeoutError as e:
            raise StoreUnavailable(f"the job store did not answer within {CALL_TIMEOUT_S:g} s") from e
        finally:
            call.abandon()

    def _transact(self, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        def attempt() -> T:
            with self._engine.execution_options(writes=writes).begin() as connection:
                result = work(connection)
                current_call().check()
                return result

        with _translated():
            return _RACES.copy()(attempt)

    # Turning on SQLite's write-ahead log does not wait for a lock, as other statements do.
    @retry(
        retry=retry_if_exception_message(match=".*locked"),
        stop=stop_after_delay(BUSY_TIMEOUT_S),
        wait=wait_random(0.01, 0.1),
        reraise=True,
    )
    def _prepare(self) -> None:
        # Tables that are there are only read, so that a file somebody is writing to can be opened.
        if not self._transact(are_current, writes=False):
            self._transact(_prepare_alone, writes=True)
        self._is_prepared = True


def lock(connection: sa.Connection, name: str) -> datetime | None:
    """Wait for the transactions that locked `name`, and keep others from it until this one ends. Returns the
    server's time then, None on SQLite, which has none of its own."""
    # On SQLite a writing transaction excludes all others anyway.
    if connection.dialect.name != "postgresql":
        return None
    number = int.from_bytes(blake2b(f"flux-fill-serve/{name}".encode(), digest_size=8).digest(), signed=True)
    return _utc(connection.scalar(_LOCK, {"number": number}))


def server_time(connection: sa.Connection) -> datetime | None:
    """None on SQLite."""
    return _utc(connection.scalar(_NOW)) if connection.dialect.name == "postgresql" else None


def _utc(moment: Any) -> datetime:
    assert isinstance(moment, datetime)
    return moment.astimezone(UTC)


def _prepare_alone(connection: sa.Connection) -> None:
    lock(connection, "tables")
    if not are_current(connection):
        bring_up_to_date(connection)


def _sqlite(url: str) -> sa.Engine:
    file = Path(url.removeprefix("sqlite:")).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(f"sqlite:///{file}", connect_args={"timeout": BUSY_TIMEOUT_S})
    sa.event.listen(engine, "connect", _on_connect)
    sa.event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: sqlite3.Connection, _record: Any) -> None:
    # The driver would begin transactions by itself, and too late: at the first write.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")


def _on_begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgresql(url: str) -> sa.Engine:
    try:
        given = sa.make_url(url).set(drivername="postgresql+psycopg")
        engine = sa.create_engine(
            given.set(query={**_CONNECTION, **given.query}),
            connect_args={"prepare_threshold": None},
            isolation_level="READ COMMITTED",
            pool_size=READERS + _KINDS["postgresql"].writers,
            max_overflow=0,
        )
    except (ArgumentError, ValueError) as e:
        raise SettingsError("job store: not a URL of the form postgresql://USER@HOST:PORT/DATABASE") from e
    except ImportError as e:
        raise SettingsError(f"job store: {e}: pip install 'flux-fill-serve[postgresql]'") from e
    watch(engine)
    # In each transaction, and nothing prepared, because poolers hand connections on.
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(LIMITS))
    return engine


class _Kind(NamedTuple):
    engine: Callable[[str], sa.Engine]
    #: Threads that write.
    writers: int
    #: Whether it is beyond this machine, and so may be away, or never answer.
    is_remote: bool


_KINDS = {"sqlite": _Kind(_sqlite, 1, False), "postgresql": _Kind(_postgresql, 4, True)}


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except FluxFillError:
        raise
    except (SQLAlchemyError, OSError) as e:
        reason = getattr(e, "orig", None) or e
        raise StoreUnavailable(f"the job store cannot be used: {reason}") from e
    except Exception as e:
        if current_call().is_callers(e):
            raise
        raise unforeseen(StoreUnavailable, "the job store", e) from e
