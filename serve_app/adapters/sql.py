"""Jobs and session documents in a SQL database: SQLite, for the processes of one machine.

A record is kept as JSON beside the columns that queries need. SQLite has one writer at a time: an update begins with
BEGIN IMMEDIATE, so its reads already exclude every other process, and a thread of its own, so that the threads of
this process wait in a queue and not on the database's lock. Rows are also selected FOR UPDATE, which SQLite ignores
and a server with row locks needs.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import retry, retry_if_exception_message, stop_after_delay, wait_random

from ..errors import SettingsError, StoreUnavailable, UnknownJob
from ..jobs import Change, Claim, Job, Progress, State
from .session_documents import SessionDocument, written

T = TypeVar("T")

#: Raised with every change to the tables.
SCHEMA = 1
#: How long a statement waits for another process's transaction, in seconds.
BUSY_TIMEOUT_S = 20.0

_METADATA = sa.MetaData()
_SCHEMA = sa.Table("schema_version", _METADATA, sa.Column("version", sa.Integer, primary_key=True))
_JOBS = sa.Table(
    "jobs",
    _METADATA,
    sa.Column("id", sa.String(256), primary_key=True),
    sa.Column("type", sa.String(16), nullable=False, index=True),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("session_key", sa.String(512), nullable=False, index=True),
    #: Seconds since 1970.
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("record", sa.Text, nullable=False),
)
_PROGRESS = sa.Table(
    "progress",
    _METADATA,
    sa.Column("job_id", sa.String(256), primary_key=True),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("updated_at", sa.DateTime, server_default=sa.func.now(), onupdate=sa.func.now()),
)
_SESSIONS = sa.Table(
    "sessions",
    _METADATA,
    sa.Column("user_id", sa.String(128), primary_key=True),
    sa.Column("session_id", sa.String(128), primary_key=True),
    sa.Column("job_id", sa.String(256), nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)


class Database:
    """A SQLite file with our tables. Its two kinds of work run in threads, each in a transaction of its own.

    A caller that is cancelled stops waiting; the transaction it started ends by itself.
    """

    def __init__(self, file: str) -> None:
        """Makes folder, file and tables where they are absent.

        Raises SettingsError where a newer version of this service wrote the file; StoreUnavailable.
        """
        with _translated():
            self._engine = _engine(Path(file).absolute())
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sql-writer")
        self._prepare()

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` on a consistent snapshot."""
        return await asyncio.to_thread(self._transact, work, writes=False)

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` alone, and store what it wrote unless it raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writer, lambda: self._transact(work, writes=True))

    def close(self) -> None:
        self._writer.shutdown()
        self._engine.dispose()

    def _transact(self, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        with _translated(), self._engine.execution_options(writes=writes).begin() as connection:
            return work(connection)

    # Turning on the write-ahead log does not wait for a lock, as other statements do.
    @retry(
        retry=retry_if_exception_message(match=".*locked"),
        stop=stop_after_delay(BUSY_TIMEOUT_S),
        wait=wait_random(0.01, 0.1),
        reraise=True,
    )
    def _prepare(self) -> None:
        # Tables that are there are only read, so that a file somebody is writing to can be opened.
        if not self._transact(_is_current, writes=False):
            self._transact(_create_tables, writes=True)


class SqlJobStore:
    def __init__(self, url: str) -> None:
        """See `Database`."""
        self._database = Database(url.removeprefix("sqlite:"))

    async def get(self, job_id: str) -> Job | None:
        return await self._database.read(lambda c: next(_jobs(c, _JOBS.c.id == job_id), None))

    async def update(self, job_id: str, session_key: str, change: Change) -> Job:
        return await self._database.write(lambda c: _update(c, job_id, session_key, change))

    async def report(self, claim: Claim, progress: Progress) -> None:
        await self._database.write(lambda c: _report(c, claim, progress))

    async def list(
        self, *, status: State | None = None, session_key: str | None = None, limit: int = 50
    ) -> Sequence[Job]:
        wanted = {_JOBS.c.status: status, _JOBS.c.session_key: session_key}
        conditions = [column == value for column, value in wanted.items() if value is not None]
        return await self._database.read(lambda c: tuple(_jobs(c, *conditions, limit=limit)))

    async def delete(self, job_id: str) -> None:
        def both(connection: sa.Connection) -> None:
            connection.execute(_JOBS.delete().where(_JOBS.c.id == job_id))
            connection.execute(_PROGRESS.delete().where(_PROGRESS.c.job_id == job_id))

        await self._database.write(both)

    def close(self) -> None:
        self._database.close()


class SqlSessionMirror:
    def __init__(self, url: str) -> None:
        """See `Database`."""
        self._database = Database(url.removeprefix("sqlite:"))

    async def write(self, job: Job, document: Mapping[str, Any]) -> None:
        await self._database.write(lambda c: _mirror(c, job, document))

    async def read(self, user_id: str, session_id: str) -> Mapping[str, Any] | None:
        stored = await self._database.read(lambda c: _session(c, user_id, session_id))
        return stored.fields if stored else None

    def close(self) -> None:
        self._database.close()


def _engine(file: Path) -> sa.Engine:
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


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PoolTimeout, OSError) as e:
        reason = getattr(e, "orig", None) or e
        raise StoreUnavailable(f"the job store cannot be used: {reason}") from e


def _is_current(connection: sa.Connection) -> bool:
    if not sa.inspect(connection).has_table(_SCHEMA.name):
        return False
    return connection.scalar(sa.select(_SCHEMA.c.version)) == SCHEMA


def _create_tables(connection: sa.Connection) -> None:
    _METADATA.create_all(connection)
    version = connection.scalar(sa.select(_SCHEMA.c.version))
    if version is None:
        connection.execute(_SCHEMA.insert().values(version=SCHEMA))
    elif version > SCHEMA:
        raise SettingsError(
            f"the job store has schema {version}, written by a newer version of this service; this one knows {SCHEMA}",
            schema=version,
        )


def _jobs(connection: sa.Connection, *where: sa.ColumnElement[bool], limit: int | None = None) -> Iterator[Job]:
    """Records, newest first, with the progress reported under their present fencing number."""
    is_current = sa.and_(_PROGRESS.c.job_id == _JOBS.c.id, _PROGRESS.c.fence == _JOBS.c.fence)
    query = (
        sa.select(_JOBS.c.record, _PROGRESS.c.step, _PROGRESS.c.steps)
        .select_from(_JOBS.outerjoin(_PROGRESS, is_current))
        .where(*where)
        .order_by(_JOBS.c.created_at.desc())
        .limit(limit)
    )
    for record, step, steps in connection.execute(query):
        job = Job.model_validate_json(record)
        yield job if step is None else job.evolve(progress=Progress(step=step, steps=steps))


def _update(connection: sa.Connection, job_id: str, session_key: str, change: Change) -> Job:
    for job in change(_record(connection, job_id), _rivals(connection, job_id, session_key)):
        columns = {
            "type": job.type,
            "status": job.status,
            "session_key": job.session_key,
            "created_at": job.created_at.timestamp(),
            "fence": job.fence,
            "record": job.model_dump_json(),
        }
        _put(connection, _JOBS, {"id": job.id}, columns)
    after = _record(connection, job_id)
    if after is None:
        raise UnknownJob(f"there is no job {job_id}")
    return after


def _record(connection: sa.Connection, job_id: str) -> Job | None:
    record = connection.scalar(sa.select(_JOBS.c.record).where(_JOBS.c.id == job_id).with_for_update())
    return Job.model_validate_json(record) if record else None


def _rivals(connection: sa.Connection, job_id: str, session_key: str) -> Sequence[Job]:
    if not session_key:
        return ()
    unfinished = [state for state in State if not state.is_final]
    where = (_JOBS.c.session_key == session_key, _JOBS.c.status.in_(unfinished), _JOBS.c.id != job_id)
    records = connection.scalars(sa.select(_JOBS.c.record).where(*where).with_for_update())
    return tuple(Job.model_validate_json(record) for record in records)


def _report(connection: sa.Connection, claim: Claim, progress: Progress) -> None:
    reported_fence = connection.scalar(sa.select(_PROGRESS.c.fence).where(_PROGRESS.c.job_id == claim.job_id))
    if _record(connection, claim.job_id) is not None and claim.fence >= (reported_fence or 0):
        _put(connection, _PROGRESS, {"job_id": claim.job_id}, {"fence": claim.fence, **progress.model_dump()})


def _session(connection: sa.Connection, user_id: str, session_id: str) -> SessionDocument | None:
    where = (_SESSIONS.c.user_id == user_id, _SESSIONS.c.session_id == session_id)
    document = connection.scalar(sa.select(_SESSIONS.c.document).where(*where).with_for_update())
    return SessionDocument.model_validate_json(document) if document else None


def _mirror(connection: sa.Connection, job: Job, document: Mapping[str, Any]) -> None:
    after = written(_session(connection, job.user_id, job.session_id), job, document)
    if after is not None:
        key = {"user_id": job.user_id, "session_id": job.session_id}
        columns = {"job_id": after.job_id, "fence": after.fence, "document": after.model_dump_json()}
        _put(connection, _SESSIONS, key, columns)


def _put(connection: sa.Connection, table: sa.Table, key: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    where = [table.c[name] == value for name, value in key.items()]
    if connection.execute(table.update().where(*where).values(**columns)).rowcount == 0:
        connection.execute(table.insert().values(**key, **columns))
