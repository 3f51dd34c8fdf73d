"""What every job store and session mirror guarantees, and what SQLite adds."""

import asyncio
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from serve_app import adapters, jobs
from serve_app.adapters import sql
from serve_app.errors import Busy, SettingsError, StaleClaim, StoreUnavailable, UnknownJob
from serve_app.jobs import Cause, Change, Job, Progress, State
from serve_app.ports import JobStore, SessionMirror

from .backends import at, make_job

KEY = "u/s"


@pytest.fixture
def store(jobs_url: str) -> JobStore:
    return adapters.job_store(jobs_url)


@pytest.fixture
def mirror(jobs_url: str) -> SessionMirror:
    return adapters.session_mirror(jobs_url)


def put(*records: Job) -> Change:
    return lambda _job, _rivals: records


async def claimed(store: JobStore, job: Job, second: float = 10) -> Job:
    change = jobs.claim(job, now=at(second), lease_s=60, max_attempts=5)
    return await store.update(job.id, job.session_key, change)


async def test_what_was_stored_is_there(store: JobStore) -> None:
    job = make_job(
        seed=2**63 - 1,
        deadline=at(99.123456),
        artifacts={"edited": "users/ü"},
        error=jobs.JobError(code="x", message="y"),
        timings=jobs.Timings(gpu_ms=0.1),
    )
    assert await store.get(job.id) is None
    assert await store.update(job.id, KEY, put(job)) == job
    assert await store.get(job.id) == job


async def test_update_sees_the_record_and_the_unfinished_rivals_of_its_session(store: JobStore) -> None:
    running = [make_job(id, status=State.RUNNING) for id in ("a", "b")]
    queued = make_job("queued")
    others = [
        make_job("done", status=State.SUCCEEDED),
        make_job("elsewhere", status=State.RUNNING, session_id="s2"),
    ]
    await store.update("a", KEY, put(*running, queued, *others))
    seen: list[tuple[Job | None, Sequence[Job]]] = []

    def look(job: Job | None, rivals: Sequence[Job]) -> Sequence[Job]:
        seen.append((job, rivals))
        return ()

    assert await store.update("a", KEY, look) == running[0]
    assert seen[-1][0] == running[0] and sorted(job.id for job in seen[-1][1]) == ["b", "queued"]


async def test_jobs_without_a_session_have_no_rivals(store: JobStore) -> None:
    alone = [make_job(id, user_id="", session_id="", status=State.RUNNING) for id in ("a", "b")]
    await store.update("a", "", put(*alone))

    def no_rivals(job: Job | None, rivals: Sequence[Job]) -> Sequence[Job]:
        assert not rivals
        return ()

    await store.update("a", "", no_rivals)


async def test_what_a_change_raises_passes_through_and_nothing_is_stored(store: JobStore) -> None:
    job = make_job()
    await store.update(job.id, KEY, put(job))

    def fail(job: Job | None, _rivals: Sequence[Job]) -> Sequence[Job]:
        raise Busy("not now", retry_after_s=3)

    with pytest.raises(Busy, match="not now"):
        await store.update(job.id, KEY, fail)
    assert await store.get(job.id) == job


async def test_an_update_that_stores_nothing_of_an_unknown_job_is_refused(store: JobStore) -> None:
    with pytest.raises(UnknownJob, match="no job edit-1"):
        await store.update("edit-1", KEY, jobs.mark_dead_lettered)
    with pytest.raises(UnknownJob):
        await store.update("edit-1", KEY, jobs.cancel(now=at(0)))


async def test_every_record_of_a_change_is_stored(store: JobStore) -> None:
    first = await claimed(store, make_job("a"), 0)
    second = await claimed(store, make_job("b"), 100)
    assert second.status == State.RUNNING
    lost = await store.get("a")
    assert lost and lost.status == State.QUEUED and lost.fence > first.fence
    with pytest.raises(StaleClaim):
        await store.update("a", KEY, jobs.renew(jobs.claim_of(first), now=at(101), lease_s=60))


async def add_one(store: JobStore, times: int) -> None:
    def change(job: Job | None, _rivals: Sequence[Job]) -> Sequence[Job]:
        assert job is not None
        return (job.evolve(seed=job.seed + 1),)

    for _ in range(times):
        await store.update("edit-1", KEY, change)


async def test_concurrent_updates_lose_nothing(store: JobStore) -> None:
    await store.update("edit-1", KEY, put(make_job(seed=0)))

    def in_a_thread(_: int) -> None:
        async def several() -> None:
            await asyncio.gather(*(add_one(store, 2) for _ in range(5)))

        asyncio.run(several())

    with ThreadPoolExecutor(4) as pool:
        await asyncio.to_thread(lambda: list(pool.map(in_a_thread, range(4))))
    job = await store.get("edit-1")
    assert job and job.seed == 40


async def test_one_of_many_claims_wins(store: JobStore) -> None:
    async def try_claim(i: int) -> Job | None:
        try:
            return await claimed(store, make_job(f"edit-{i}"))
        except Busy:
            return None

    won = [job for job in await asyncio.gather(*(try_claim(i) for i in range(10))) if job]
    assert len(won) == 1
    assert list(await store.list(status=State.RUNNING)) == won


async def test_get_has_the_progress_of_the_present_claim(store: JobStore) -> None:
    job = await claimed(store, make_job())
    claim = jobs.claim_of(job)
    await store.report(claim, Progress(step=1, steps=28))
    await store.report(claim, Progress(step=2, steps=28))
    assert await store.get(job.id) == job.evolve(progress=Progress(step=2, steps=28))
    assert (await store.list())[0].progress == Progress(step=2, steps=28)

    again = await claimed(store, job, 100)
    assert (await store.get(job.id)) == again, "a new claim starts from nothing"
    await store.report(jobs.claim_of(again), Progress(step=1, steps=28))
    await store.report(claim, Progress(step=9, steps=28))
    assert await store.get(job.id) == again.evolve(progress=Progress(step=1, steps=28)), "an older claim is ignored"


async def test_progress_is_no_part_of_the_record_and_moves_no_claim(store: JobStore) -> None:
    job = await claimed(store, make_job())
    await store.report(jobs.claim_of(job), Progress(step=1, steps=28))
    assert await store.update(job.id, KEY, lambda stored, _rivals: (stored,) if stored == job else ()) == job


async def test_progress_of_a_job_that_is_gone_is_ignored(store: JobStore) -> None:
    job = await claimed(store, make_job())
    await store.report(jobs.claim_of(job), Progress(step=1, steps=2))
    await store.delete(job.id)
    await store.report(jobs.claim_of(job), Progress(step=2, steps=2))
    assert await store.get(job.id) is None
    assert (await claimed(store, make_job())).progress == Progress()


async def test_list_is_newest_first_and_filtered(store: JobStore) -> None:
    ages = {"c": 3.0, "a": 1.0, "b": 2.000001, "b2": 2.0}
    for id, second in ages.items():
        await store.update(id, KEY, put(make_job(id, created_at=at(second))))
    await store.update("d", "u/s2", put(make_job("d", created_at=at(0), session_id="s2", status=State.FAILED)))
    assert [job.id for job in await store.list()] == ["c", "b", "b2", "a", "d"]
    assert [job.id for job in await store.list(limit=2)] == ["c", "b"]
    assert [job.id for job in await store.list(status=State.FAILED)] == ["d"]
    assert [job.id for job in await store.list(session_key=KEY, status=State.QUEUED, limit=1)] == ["c"]
    assert list(await store.list(status=State.SUCCEEDED)) == []


async def test_delete(store: JobStore) -> None:
    await store.update("edit-1", KEY, put(make_job()))
    await store.delete("edit-1")
    await store.delete("edit-1")
    assert await store.get("edit-1") is None


async def test_stores_of_one_url_share_their_content(jobs_url: str, store: JobStore) -> None:
    await store.update("edit-1", KEY, put(make_job()))
    assert await adapters.job_store(jobs_url).get("edit-1") == make_job()


# Session documents


def running(id: str, fence: int, second: float | None) -> Job:
    return make_job(id, fence=fence, status=State.RUNNING, started_at=None if second is None else at(second))


async def test_documents_merge_field_by_field(mirror: SessionMirror) -> None:
    assert await mirror.read("u", "s") is None
    await mirror.write(running("a", 1, 10), {"processingStatus": "processing", "jobId": "a"})
    await mirror.write(running("a", 1, 10), {"processingProgress": 0.5, "processingError": None})
    assert await mirror.read("u", "s") == {
        "processingStatus": "processing",
        "jobId": "a",
        "processingProgress": 0.5,
        "processingError": None,
    }
    assert await mirror.read("u", "s2") is None
    assert await mirror.read("u2", "s") is None


WRITES: list[tuple[str, Job, Job, str]] = [
    ("an older claim of the same job", running("a", 2, 20), running("a", 1, 10), "first"),
    ("a newer claim of the same job", running("a", 1, 10), running("a", 2, 20), "second"),
    ("the same claim again", running("a", 1, 10), running("a", 1, 10), "second"),
    ("a cancellation, which raises the number", running("a", 2, 10), running("a", 1, 10), "first"),
    ("a job that was claimed before", running("b", 1, 20), running("a", 5, 10), "first"),
    ("a job that was claimed later", running("a", 5, 10), running("b", 1, 20), "second"),
    ("a later job that was never claimed", running("a", 1, -10), running("b", 0, None), "second"),
    ("an earlier job that was never claimed", running("a", 1, 10), running("b", 0, None), "first"),
]


@pytest.mark.parametrize(("first", "second", "wins"), [row[1:] for row in WRITES], ids=[row[0] for row in WRITES])
async def test_a_stale_worker_cannot_write(mirror: SessionMirror, first: Job, second: Job, wins: str) -> None:
    await mirror.write(first, {"by": "first"})
    await mirror.write(second, {"by": "second"})
    assert await mirror.read("u", "s") == {"by": wins}


async def test_a_job_that_was_never_claimed_does_not_shut_out_the_one_that_runs(mirror: SessionMirror) -> None:
    await mirror.write(running("a", 1, -10), {"by": "a"})
    await mirror.write(running("b", 1, None), {"by": "b"})
    await mirror.write(running("a", 1, -10), {"by": "a again"})
    assert await mirror.read("u", "s") == {"by": "a again"}
    await mirror.write(running("a-before", 1, -20), {"by": "a stale one"})
    assert await mirror.read("u", "s") == {"by": "a again"}


# SQLite


COUNT_UP = """
    import asyncio, sys
    from serve_app import adapters

    async def main():
        store = adapters.job_store(sys.argv[1])
        print("ready", flush=True)
        for _ in range(50):
            await store.update("edit-1", "u/s", lambda job, rivals: (job.evolve(seed=job.seed + 1),))

    asyncio.run(main())
"""


async def test_updates_from_several_processes_lose_nothing(
    tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    url = f"sqlite:{tmp_path}/new/jobs.db"
    store = adapters.job_store(url)
    await store.update("edit-1", KEY, put(make_job(seed=0)))
    for counter in [processes(COUNT_UP, url) for _ in range(2)]:
        assert await asyncio.to_thread(counter.wait) == 0
    job = await store.get("edit-1")
    assert job and job.seed == 100


def test_many_may_create_the_tables_at_once(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def create(_: int) -> None:
        start.wait()
        sql.Database(f"{tmp_path}/jobs.db").close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(8)))
    with sqlite3.connect(tmp_path / "jobs.db") as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(sql.SCHEMA,)]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_a_file_that_somebody_writes_to_can_be_opened_and_read(tmp_path: Path) -> None:
    file = tmp_path / "jobs.db"
    await sql.SqlJobStore(str(file)).update("a", KEY, put(make_job("a")))
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("begin immediate")
        assert await sql.SqlJobStore(str(file)).get("a") == make_job("a")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    sql.Database(f"{tmp_path}/jobs.db").close()
    with sqlite3.connect(tmp_path / "jobs.db") as connection:
        connection.execute("UPDATE schema_version SET version = ?", (sql.SCHEMA + 1,))
    with pytest.raises(SettingsError, match=f"schema {sql.SCHEMA + 1}.*knows {sql.SCHEMA}"):
        adapters.job_store(f"sqlite:{tmp_path}/jobs.db")


@pytest.mark.parametrize("content", [b"not a database, but long enough to be taken for one" * 20])
def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "jobs.db").write_bytes(content)
    with pytest.raises(StoreUnavailable, match="not a database"):
        adapters.job_store(f"sqlite:{tmp_path}/jobs.db")


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        adapters.job_store(f"sqlite:{tmp_path}/file/jobs.db")


async def test_a_locked_database_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "BUSY_TIMEOUT_S", 0.1)
    store = adapters.job_store(f"sqlite:{tmp_path}/jobs.db")
    other = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.update("edit-1", KEY, put(make_job()))
        assert await store.get("edit-1") is None, "reading needs no lock"
    finally:
        other.close()
    assert await store.update("edit-1", KEY, put(make_job())) == make_job()


async def test_an_update_that_is_cancelled_leaves_no_transaction_open(tmp_path: Path) -> None:
    store = adapters.job_store(f"sqlite:{tmp_path}/jobs.db")
    begun, go_on = threading.Event(), threading.Event()

    def slow(_job: Job | None, _rivals: Sequence[Job]) -> Sequence[Job]:
        begun.set()
        go_on.wait()
        return (make_job(seed=7),)

    update = asyncio.create_task(store.update("edit-1", KEY, slow))
    await asyncio.to_thread(begun.wait)
    update.cancel()
    with pytest.raises(asyncio.CancelledError):
        await update
    go_on.set()
    other: Any = adapters.job_store(f"sqlite:{tmp_path}/jobs.db")
    await other.update("edit-2", KEY, put(make_job("edit-2")))
    job = await store.get("edit-1")
    assert job is None or job.seed == 7


async def test_a_claim_is_fenced_out_across_stores(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path}/jobs.db"
    one, two = adapters.job_store(url), adapters.job_store(url)
    first = await claimed(one, make_job(), 0)
    second = await claimed(two, make_job(), 100)
    assert second.fence == first.fence + 1
    with pytest.raises(StaleClaim):
        await one.update("edit-1", KEY, jobs.finish(jobs.claim_of(first), Cause.SUCCEEDED, now=at(101)))
    done = await two.update("edit-1", KEY, jobs.finish(jobs.claim_of(second), Cause.SUCCEEDED, now=at(101)))
    assert done.status == State.SUCCEEDED
