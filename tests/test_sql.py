"""What SQLite and PostgreSQL add to what every job store guarantees."""

import asyncio
import json
import sqlite3
import subprocess
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.adapters.stores import sql_database, sql_tables
from serve_app.adapters.stores.sql_database import lock
from serve_app.errors import SettingsError, StoreUnavailable
from serve_app.jobs.claims import Change, Quota, claim_of, requeue
from serve_app.jobs.ports import JobStore
from serve_app.jobs.record import Due, Job, State
from serve_app.models import Progress
from serve_app.settings import Settings

from .backends import at, make_job
from .job_servers import Gate, Opened, gate, plain
from .test_job_stores import KEY, Slow, add_one, claimed, overlapping, put

COUNT_UP = """
    import asyncio, sys
    from serve_app import adapters

    async def main():
        store = adapters.job_store(sys.argv[1])
        for _ in range(50):
            await store.update("edit-1", "u/s", lambda job, rivals, now: (job.evolve(seed=job.seed + 1),))

    asyncio.run(main())
"""


@pytest.mark.slow
async def test_updates_from_several_processes_lose_nothing(
    sql_url: str, opened: Opened, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    store = opened(adapters.job_store(sql_url))
    await store.update("edit-1", KEY, put(make_job(seed=0)))
    for counter in [processes(COUNT_UP, sql_url) for _ in range(2)]:
        assert await asyncio.to_thread(counter.wait) == 0
    job = await store.get("edit-1")
    assert job and job.seed == 100


@pytest.mark.emulator
async def test_jobs_cancellations_and_session_documents_share_one_pool(postgresql_url: str, opened: Opened) -> None:
    """As an ingress opens them."""
    name = f"ingress-{uuid.uuid4().hex}"
    settings = Settings(jobs=f"{postgresql_url}&application_name={name}", variants={"telea": {}})
    store = opened(adapters.job_store(settings.jobs))
    mirror = adapters.session_mirror(settings, store)

    async def use(number: int) -> None:
        job = await store.update(f"edit-{number}", f"u/s{number}", put(make_job(f"edit-{number}")))
        await mirror.write_session(job.evolve(session_id=f"s{number}"), {"jobId": job.id})
        await store.cancel_until(f"u/s{number}", at(1))

    await asyncio.gather(*map(use, range(40)))
    count = sa.text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
    engine = sa.create_engine(postgresql_url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        assert (
            1
            < connection.scalar(count, {"name": name})
            <= sql_database.READERS + sql_database._KINDS["postgresql"].writers
        )


@pytest.mark.slow
async def test_updates_that_lock_each_others_jobs_all_succeed(sql_url: str, opened: Opened) -> None:
    """No change of ours writes what it did not lock; where one does, the database sees a deadlock."""
    store = opened(adapters.job_store(sql_url))
    await store.update("a", KEY, put(make_job("a", seed=0), make_job("b", seed=0)))

    def both(*ids: str) -> Change:
        def change(job: Job | None, _rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
            assert job is not None
            return [make_job(id, seed=job.seed + 1) for id in ids]

        return change

    first, second = overlapping(both("a", "b"), both("b", "a"))
    await asyncio.gather(store.update("a", "", first), store.update("b", "", second))
    assert {job.seed for job in await store.list()} == {2}


@pytest.mark.slow
async def test_a_rival_that_another_update_writes_meanwhile_loses_nothing(sql_url: str, opened: Opened) -> None:
    """Updates that name no session do not wait for the session's."""
    store = opened(adapters.job_store(sql_url))
    await store.update("a", KEY, put(make_job("a"), make_job("b", seed=0)))

    def beside(_job: Job | None, rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
        return [rival.evolve(seed=rival.seed + 1) for rival in rivals]

    first, second = overlapping(beside, add_one)
    await asyncio.gather(store.update("a", KEY, first), store.update("b", "", second))
    job = await store.get("b")
    assert job and job.seed == 2


@pytest.mark.slow
async def test_updates_that_both_make_one_job_both_succeed(sql_url: str, opened: Opened) -> None:
    """The second to insert the row is run again."""
    store = opened(adapters.job_store(sql_url))
    await store.update("a", KEY, put(make_job("a"), make_job("b")))
    first, second = overlapping(put(make_job("new", seed=1)), put(make_job("new", seed=2)))
    await asyncio.gather(store.update("a", "", first), store.update("b", "", second))
    assert len(await store.list()) == 3


async def test_many_may_create_the_tables_at_once(sql_url: str, opened: Opened) -> None:
    start = threading.Barrier(8)

    def create(_: int) -> JobStore:
        start.wait()
        return opened(adapters.job_store(sql_url))

    with ThreadPoolExecutor(8) as pool:
        stores = list(await asyncio.to_thread(lambda: list(pool.map(create, range(8)))))
    await asyncio.gather(*(store.get("edit-1") for store in stores))
    assert await stores[0].update("edit-1", KEY, put(make_job())) == make_job()


# The tables of schema 1


SCHEMA_1 = """
    CREATE TABLE schema_version (version INTEGER NOT NULL, PRIMARY KEY (version));
    CREATE TABLE jobs (
        id VARCHAR(256) NOT NULL, type VARCHAR(16) NOT NULL, status VARCHAR(16) NOT NULL,
        session_key VARCHAR(512) NOT NULL, created_at FLOAT NOT NULL, fence INTEGER NOT NULL, record TEXT NOT NULL,
        PRIMARY KEY (id)
    );
    CREATE INDEX ix_jobs_created_at ON jobs (created_at);
    CREATE INDEX ix_jobs_session_key ON jobs (session_key);
    CREATE INDEX ix_jobs_status ON jobs (status);
    CREATE INDEX ix_jobs_type ON jobs (type);
    CREATE TABLE progress (
        job_id VARCHAR(256) NOT NULL, fence INTEGER NOT NULL, step INTEGER NOT NULL, steps INTEGER NOT NULL,
        updated_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP, PRIMARY KEY (job_id)
    );
    CREATE TABLE sessions (
        user_id VARCHAR(128) NOT NULL, session_id VARCHAR(128) NOT NULL, job_id VARCHAR(256) NOT NULL,
        fence INTEGER NOT NULL, document TEXT NOT NULL, PRIMARY KEY (user_id, session_id)
    );
    INSERT INTO schema_version VALUES (1);
    INSERT INTO progress (job_id, fence, step, steps) VALUES ('edit-1', 1, 3, 28);
    INSERT INTO sessions VALUES ('u', 's', 'edit-1', 1,
        '{"job_id": "edit-1", "fence": 1, "claimed_at": null, "fields": {"jobId": "edit-1"}}');
"""
#: What each schema after the first added, as the version that brought it wrote it.
LATER = {
    2: "ALTER TABLE jobs ADD COLUMN owes_at DOUBLE PRECISION; CREATE INDEX ix_jobs_owes_at ON jobs (owes_at)",
    3: """
        ALTER TABLE jobs ADD COLUMN owes_session_at DOUBLE PRECISION;
        ALTER TABLE jobs ADD COLUMN owes_completion_at DOUBLE PRECISION;
        ALTER TABLE jobs ADD COLUMN owes_webhook_at DOUBLE PRECISION;
        ALTER TABLE jobs ADD COLUMN owes_dispatch_at DOUBLE PRECISION;
        ALTER TABLE jobs ADD COLUMN receiver TEXT;
        CREATE INDEX ix_jobs_owes_session_at ON jobs (owes_session_at);
        CREATE INDEX ix_jobs_owes_completion_at ON jobs (owes_completion_at);
        CREATE INDEX ix_jobs_owes_dispatch_at ON jobs (owes_dispatch_at);
        CREATE INDEX ix_jobs_owes_webhook_at ON jobs (receiver, owes_webhook_at)
    """,
}
#: Fields that records of schema 1 do not have.
NEW = {"owed", "callback_url", "traceparent"}
LONG_AGO = at(-1_000_000_000)


def of_schema_1(url: str, *records: str) -> None:
    """Make the tables as the first version made them, with these records."""
    with plain(url) as connection:
        for statement in SCHEMA_1.split(";\n")[:-1]:
            connection.exec_driver_sql(statement)
        row = sa.text("INSERT INTO jobs VALUES (:id, 'inpaint', :status, 'u/s', :created_at, 1, :record)")
        for record in records:
            fields = json.loads(record)
            created_at = Job.model_validate_json(record).created_at.timestamp()
            connection.execute(row, {**fields, "created_at": created_at, "record": record})


def of_schema(version: int, url: str, *records: str) -> None:
    of_schema_1(url, *records)
    with plain(url) as connection:
        for since in range(2, version + 1):
            for statement in LATER[since].split(";"):
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(f"UPDATE schema_version SET version = {since}")


async def test_a_database_of_schema_1_keeps_its_jobs_and_learns_to_list_debts(sql_url: str, opened: Opened) -> None:
    job = make_job(fence=1, status=State.RUNNING, started_at=at(1))
    of_schema_1(sql_url, job.model_dump_json(exclude=NEW))
    store, mirror = opened(adapters.job_store(sql_url)), opened(adapters.job_store(sql_url))
    kept = await store.get(job.id)
    assert kept and kept.progress.step == 3 and kept.evolve(progress=job.progress) == job
    assert await mirror.read_session("u", "s") == {"jobId": "edit-1"}
    assert list(await store.list(owes_by=at(99))) == []
    await store.update(job.id, KEY, put(job.evolve(owed={"completion": Due(due_at=at(50))})))
    assert [owing.id for owing in await store.list(owes_by=at(50))] == ["edit-1"]
    await opened(adapters.job_store(sql_url)).cancel_until(KEY, at(1))


async def test_debts_in_records_of_schema_1_are_found(sql_url: str, opened: Opened) -> None:
    url, owed = "https://a.example/", {"session": Due(due_at=at(5)), "webhook": Due(due_at=at(6))}
    owing = make_job("a", status=State.FAILED, owed=owed, callback_url=url)
    of_schema_1(sql_url, owing.model_dump_json(), make_job("b").model_dump_json(exclude=NEW))
    store = opened(adapters.job_store(sql_url))
    for by, which in (
        (5, {}),
        (5, {"notification": "session"}),
        (6, {"notification": "webhook", "receiver": "a.example"}),
    ):
        assert [job.id for job in await store.list(owes_by=at(by), **which)] == ["a"]
    assert list(await store.list(owes_by=at(5), notification="webhook")) == []
    assert len(await store.list()) == 2


async def test_debts_of_schema_2_are_found(sql_url: str, opened: Opened) -> None:
    owing = make_job("a", status=State.FAILED, owed={"completion": Due(due_at=at(5))})
    of_schema(2, sql_url, owing.model_dump_json())
    store = opened(adapters.job_store(sql_url))
    assert [job.id for job in await store.list(owes_by=at(5), notification="completion")] == ["a"]


@pytest.mark.parametrize("version", range(1, sql_tables.SCHEMA))
async def test_jobs_of_older_schemas_are_ahead_of_new_ones(version: int, sql_url: str, opened: Opened) -> None:
    states = {"waits": State.QUEUED, "runs": State.RUNNING, "over": State.FAILED}
    older = [make_job(id, status=status, created_at=LONG_AGO) for id, status in states.items()]
    fields = NEW | {"owner", "events"}
    of_schema(version, sql_url, *(job.model_dump_json(exclude=fields) for job in older))
    store = opened(adapters.job_store(sql_url))
    new, _ = await store.create(make_job("new", owner="a"), Quota(unfinished=1, per_day=1))
    assert await store.ahead(new) == 1
    assert {job.id for job in await store.list(owner="")} == {"waits", "runs", "over"}
    assert [*await store.list(owner="a")] == [new]
    with plain(sql_url) as connection:
        indexes = sa.inspect(connection).get_indexes("jobs")
    assert {"ix_jobs_owner_created_at", "ix_jobs_owner_status"} <= {index["name"] for index in indexes}


async def test_a_version_of_schema_3_may_write_meanwhile(sql_url: str, opened: Opened) -> None:
    """It names none of the later columns."""
    store = opened(adapters.job_store(sql_url))
    posted, _ = await store.create(make_job("posted", owner="a"))
    record = make_job("message", created_at=LONG_AGO).model_dump_json(exclude={"owner", "events"})
    with plain(sql_url) as connection:
        connection.execute(
            sa.text(
                "INSERT INTO jobs (id, type, status, session_key, created_at, fence, record)"
                " VALUES ('message', 'inpaint', 'queued', 'u/s', 1, 0, :record)"
            ),
            {"record": record},
        )
        connection.exec_driver_sql("UPDATE jobs SET fence = 0 WHERE id = 'posted'")
    assert [job.id for job in await store.list(owner="")] == ["message"]
    assert [*await store.list(owner="a")] == [posted]
    running = await claimed(store, make_job("message"))
    await store.update("message", KEY, requeue(claim_of(running)))
    assert await store.ahead(posted) == 1, "a job is counted once this version has written it"


async def test_many_may_bring_the_tables_up_to_date_at_once(sql_url: str, opened: Opened) -> None:
    of_schema_1(sql_url, make_job().model_dump_json(exclude=NEW))
    await test_many_may_create_the_tables_at_once(sql_url, opened)
    assert await opened(adapters.job_store(sql_url)).get("edit-1") == make_job()


async def test_a_newer_schema_is_refused(sql_url: str, opened: Opened) -> None:
    with plain(sql_url) as connection:
        connection.exec_driver_sql("CREATE TABLE schema_version (version INTEGER)")
        connection.exec_driver_sql("INSERT INTO schema_version VALUES (99)")
    with pytest.raises(SettingsError, match=f"schema 99.*knows {sql_tables.SCHEMA}"):
        await opened(adapters.job_store(sql_url)).get("edit-1")


# SQLite


def test_a_file_is_made_in_a_folder_that_is_absent_and_writes_ahead(tmp_path: Path) -> None:
    sql_database.Database(f"sqlite:{tmp_path}/new/jobs.db").close()
    with closing(sqlite3.connect(tmp_path / "new/jobs.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_a_file_that_somebody_writes_to_can_be_opened_and_read(sqlite_url: str, opened: Opened) -> None:
    await opened(adapters.job_store(sqlite_url)).update("a", KEY, put(make_job("a")))
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:"), isolation_level=None)) as other:
        other.execute("begin immediate")
        assert await opened(adapters.job_store(sqlite_url)).get("a") == make_job("a")


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_bytes(b"not a database, but long enough to be taken for one" * 20)
    with pytest.raises(StoreUnavailable, match="not a database"):
        adapters.job_store(f"sqlite:{tmp_path}/jobs.db")


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        adapters.job_store(f"sqlite:{tmp_path}/file/jobs.db")


async def test_a_locked_file_is_unavailable(sqlite_url: str, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_database, "BUSY_TIMEOUT_S", 0.1)
    store = opened(adapters.job_store(sqlite_url))
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.update("edit-1", KEY, put(make_job()))
        assert await store.get("edit-1") is None, "reading needs no lock"
    assert await store.update("edit-1", KEY, put(make_job())) == make_job()


async def test_an_update_that_is_cancelled_is_not_stored_and_leaves_no_transaction_open(
    sql_url: str, opened: Opened
) -> None:
    store = opened(adapters.job_store(sql_url))
    slow = Slow()
    update = asyncio.create_task(store.update("edit-1", KEY, slow))
    await asyncio.to_thread(slow.begun.wait)
    update.cancel()
    with pytest.raises(asyncio.CancelledError):
        await update
    slow.go_on.set()
    await opened(adapters.job_store(sql_url)).update("edit-2", KEY, put(make_job("edit-2")))
    assert [job.id for job in await store.list()] == ["edit-2"]


# PostgreSQL


@asynccontextmanager
async def before(url: str) -> AsyncIterator[tuple[Gate, str]]:
    """A gate before the server, and the URL through it."""
    there = sa.make_url(url)
    assert there.port
    async with gate(there.port) as made:
        yield made, there.set(port=made.port).render_as_string()


@pytest.mark.parametrize("url", ["postgresql:somewhere", "postgresql://host:port/db"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="not a URL of the form postgresql://"):
        adapters.job_store(url)


async def test_a_server_that_is_not_there_is_unavailable_and_no_reason_not_to_start(opened: Opened) -> None:
    store = opened(adapters.job_store(f"postgresql://u@127.0.0.1:{free_port()}/db"))
    with pytest.raises(StoreUnavailable, match="refused"):
        await store.get("edit-1")


@pytest.mark.emulator
async def test_a_database_that_is_not_there_is_unavailable(postgresql_address: str, opened: Opened) -> None:
    store = opened(adapters.job_store(f"postgresql://postgres@{postgresql_address}/nothing"))
    with pytest.raises(StoreUnavailable, match='"nothing" does not exist'):
        await store.get("edit-1")


@pytest.mark.emulator
async def test_a_server_that_comes_back_is_used_again(postgresql_url: str, opened: Opened) -> None:
    async with before(postgresql_url) as (server, url):
        store = opened(adapters.job_store(url))
        job = await claimed(store, make_job())
        await server.close()
        for work in (store.get(job.id), claimed(store, make_job("edit-2", session_id="s2"))):
            with pytest.raises(StoreUnavailable, match=r"refused|closed"):
                await work
        await server.open()
        assert await store.get(job.id) == job


@pytest.mark.emulator
async def test_a_server_that_says_nothing_is_unavailable(
    postgresql_url: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with before(postgresql_url) as (server, url):
        store = opened(adapters.job_store(url))
        assert await store.get("edit-1") is None
        server.flows.clear()
        monkeypatch.setattr(sql_database, "CALL_TIMEOUT_S", 0.5)
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await store.update("edit-1", KEY, put(make_job()))
        server.flows.set()
        monkeypatch.undo()
        assert (await claimed(store, make_job("edit-2"))).attempt == 1


@pytest.mark.emulator
async def test_connections_that_fall_silent_are_replaced(
    postgresql_url: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with before(postgresql_url) as (server, url):
        store = opened(adapters.job_store(url))
        job = await claimed(store, make_job())
        reads = [store.get(job.id) for _ in range(2 * sql_database.READERS)]
        assert await asyncio.gather(*reads) == [job] * len(reads)
        server.silence()
        with monkeypatch.context() as short:
            short.setattr(sql_database, "CALL_TIMEOUT_S", 0.5)
            reads = [store.get(job.id) for _ in range(sql_database.READERS)]
            outcomes = await asyncio.gather(*reads, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * len(reads)
        assert await store.get(job.id) == job
        assert (await claimed(store, job, 100)).attempt == 2


@pytest.mark.emulator
async def test_an_update_that_took_too_long_is_not_stored(
    postgresql_url: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(adapters.job_store(postgresql_url))
    assert await store.get("edit-1") is None
    slow = Slow()
    with monkeypatch.context() as short:
        short.setattr(sql_database, "CALL_TIMEOUT_S", 0.5)
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await store.update("edit-1", KEY, slow)
    slow.go_on.set()
    assert await store.update("edit-2", KEY, put(make_job("edit-2"))) == make_job("edit-2")
    assert [job.id for job in await store.list()] == ["edit-2"]


@pytest.mark.emulator
async def test_a_lock_that_is_never_freed_is_unavailable(
    postgresql_url: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_database, "LIMITS", "SET LOCAL statement_timeout = '100ms'")
    store = opened(adapters.job_store(postgresql_url))
    await claimed(store, make_job())
    with psycopg.connect(postgresql_url) as other:
        other.execute("SELECT 1 FROM jobs FOR UPDATE")
        with pytest.raises(StoreUnavailable, match="statement timeout"):
            await claimed(store, make_job(), 100)
        job = await store.get("edit-1")
        assert job and job.attempt == 1, "reading needs no lock"
    assert (await claimed(store, make_job(), 100)).attempt == 2


@pytest.mark.emulator
async def test_a_statement_ends_before_its_caller_stops_waiting(postgresql_url: str, opened: Opened) -> None:
    """And a client that hangs frees what it has locked."""

    def limits_ms(connection: sa.Connection) -> dict[str, int]:
        rows = connection.exec_driver_sql("SELECT name, setting FROM pg_settings WHERE name LIKE %s", ("%timeout",))
        return {name: int(setting) for name, setting in rows}

    database = opened(sql_database.Database(postgresql_url))
    for work in (database.read, database.write):
        limits = await work(limits_ms)
        assert 0 < limits["statement_timeout"] < 1000 * sql_database.CALL_TIMEOUT_S
        assert 0 < limits["idle_in_transaction_session_timeout"] <= 60_000


@pytest.mark.emulator
async def test_several_write_at_once(postgresql_url: str, opened: Opened) -> None:
    store = opened(adapters.job_store(postgresql_url))
    both = threading.Barrier(2, timeout=30)

    jobs = [make_job("a"), make_job("b", session_id="s2")]

    def together(job: Job) -> Callable[..., Sequence[Job]]:
        def change(_job: Job | None, _rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
            both.wait()
            return (job,)

        return change

    await asyncio.gather(*(store.update(job.id, job.lock_key, together(job)) for job in jobs))
    assert len(await store.list()) == 2


FIRST_WRITES: dict[str, tuple[Callable[[str], Any], Callable[[Any], Awaitable[None]]]] = {
    "cancellations/u/s": (adapters.job_store, lambda store: store.cancel_until(KEY, at(1))),
    "sessions/u/s": (adapters.job_store, lambda mirror: mirror.write_session(make_job(), {"by": "it"})),
    "progress/edit-1": (
        adapters.job_store,
        lambda store: store.report(claim_of(make_job(fence=1)), Progress(step=1, steps=2)),
    ),
}


@pytest.mark.emulator
@pytest.mark.parametrize("name", FIRST_WRITES)
async def test_first_writes_wait_for_each_other(name: str, postgresql_url: str, opened: Opened) -> None:
    """A row that is not there yet cannot be locked: a transaction that holds the name's lock stands for another one."""
    await opened(adapters.job_store(postgresql_url)).update("edit-1", KEY, put(make_job()))
    make, write = FIRST_WRITES[name]
    store = opened(make(postgresql_url))
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with plain(postgresql_url) as other, psycopg.connect(postgresql_url, autocommit=True) as observer:
        lock(other, name)
        writing = asyncio.ensure_future(write(store))
        async with asyncio.timeout(5):
            while observer.execute(waiting).fetchone() == (0,):
                assert not writing.done(), "it waited for nobody"
                await asyncio.sleep(0.01)
    await writing
