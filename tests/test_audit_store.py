"""Runs of audits over job stores: who works on one, which is the app's only one, what survives damage."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app import adapters
from serve_app.adapters.memory import MemoryBlobStore
from serve_app.audit.files import RunFiles, read_cells, read_findings
from serve_app.audit.record import (
    Audit,
    AuditFault,
    AuditStatus,
    CellProgress,
    CellResult,
    Findings,
    cell_path,
    findings_path,
)
from serve_app.audit.store import JOB_DIED, LAUNCH_S, AuditStore
from serve_app.blobs import BlobStore
from serve_app.errors import (
    AuditExists,
    AuditRunning,
    Canceled,
    IllegalTransition,
    InputError,
    StaleClaim,
    StoreUnavailable,
    UnknownAudit,
)
from serve_app.jobs import claims, record
from serve_app.jobs.claims import Claim
from serve_app.jobs.ports import JobStore
from serve_app.parameters import AuditRequest, Matrix

from .audit_rig import job_store_at
from .backends import make_job
from .rig import BlobOutage, Clock, Outage

MATRIX = Matrix(variants=("telea",), guidance_scales=(2.0, 4.0))
REQUEST = AuditRequest(user_id="u", session_id="s", matrix=MATRIX)
IN_MEMORY = pytest.mark.parametrize("job_store", ["memory"], indirect=True)
LEASE_S = 60.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
def job_store(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[JobStore]:
    yield job_store_at(f"{request.param}:{tmp_path / 'jobs.db'}", clock)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return MemoryBlobStore(f"memory:{tmp_path}")


@pytest.fixture
def store(job_store: JobStore, blobs: BlobStore) -> AuditStore:
    return AuditStore(job_store, blobs)


async def begun(store: AuditStore, run_id: str = "run", **options: Any) -> Claim:
    audit = await store.create(REQUEST, run_id, **options)
    return claims.claim_of(await store.begin(audit.id, 1, lease_s=LEASE_S))


async def found(blobs: BlobStore, run_id: str = "run", **fields: Any) -> None:
    """Findings as the run's driver stores them."""

    async def confirm() -> None: ...

    await RunFiles(blobs, run_id, confirm).keep_findings(Findings(**fields))


async def damage(blobs: BlobStore, path: str) -> None:
    await blobs.put(path, b'{"id": "run"', content_type="application/json")


# -- the way of a run


async def test_a_run_from_its_creation_to_its_end(store: AuditStore, blobs: BlobStore, clock: Clock) -> None:
    audit = await store.create(REQUEST, "run")
    assert (audit.status, audit.attempt, audit.job_name) == (AuditStatus.QUEUED, 1, "fluxfill-audit-run")
    assert audit.cells == {"telea_gs2": CellProgress(), "telea_gs4": CellProgress()}
    assert (audit.request, audit.created_at) == (REQUEST, clock.now)
    clock.advance(10)
    claim = claims.claim_of(await store.begin("run", 1, lease_s=LEASE_S))
    await found(blobs, stage="painting", gpu="CPU")
    running = await store.get("run")
    assert (running.status, running.attempt, running.stage) == (AuditStatus.RUNNING, 1, "painting")
    assert running.started_at == clock.now
    ended = await store.finish(claim, AuditStatus.INCOMPLETE)
    assert (ended.status, ended.error, ended.stage, ended.gpu) == ("incomplete", None, "", "CPU")
    assert (ended.finished_at, ended.attempt) == (clock.now, 1)
    assert await store.get("run") == ended


async def test_ids_are_made_where_none_is_given(store: AuditStore) -> None:
    first, second = await store.create(REQUEST, several=True), await store.create(REQUEST, several=True)
    assert first.id != second.id
    assert first.id.startswith("audit-") and len(first.id) == len("audit-") + 8


async def test_a_run_that_fails_says_why(store: AuditStore) -> None:
    fault = AuditFault(code="missing_input", message="no photo")
    ended = await store.finish(await begun(store), AuditStatus.FAILED, fault)
    assert (ended.status, ended.error) == (AuditStatus.FAILED, fault)


async def test_an_audit_owes_nobody_anything(store: AuditStore, job_store: JobStore) -> None:
    await store.finish(await begun(store), AuditStatus.SUCCEEDED)
    job = await job_store.get("run")
    assert job is not None and (job.owed, job.owes_at) == ({}, None)


async def test_an_attempt_begins_once(store: AuditStore, job_store: JobStore, blobs: BlobStore) -> None:
    await begun(store)
    with pytest.raises(IllegalTransition, match="running, not queued"):
        await AuditStore(job_store, blobs).begin("run", 1, lease_s=LEASE_S)


async def test_what_is_over_is_not_written_any_more(store: AuditStore) -> None:
    claim = await begun(store)
    ended = await store.finish(claim, AuditStatus.SUCCEEDED)
    for write in (store.begin("run", 1, lease_s=LEASE_S), store.cancel("run")):
        with pytest.raises(IllegalTransition):
            await write
    assert await store.fail("run", 1, AuditFault(code="x", message="y")) == ended
    assert await store.fail_if_dead("run") == ended


async def test_a_cell_that_was_begun_waits_once_nobody_works_on_it(store: AuditStore, blobs: BlobStore) -> None:
    claim = await begun(store)
    cells = {"telea_gs2": CellProgress(status="running", step=1, steps=8), "telea_gs4": CellProgress(status="failed")}
    await found(blobs, cells=cells)
    assert (await store.get("run")).cells == cells
    ended = await store.finish(claim, AuditStatus.INCOMPLETE)
    assert ended.cells == {"telea_gs2": CellProgress(), "telea_gs4": CellProgress(status="failed")}


# -- answers that are lost


@IN_MEMORY
async def test_a_driver_whose_beginning_and_end_were_not_answered_has_begun_and_ended(
    job_store: JobStore, blobs: BlobStore, clock: Clock
) -> None:
    deaf = Outage(job_store, StoreUnavailable)
    store = AuditStore(deaf, blobs)

    async def lost() -> None:
        raise StoreUnavailable("no answer")

    await store.create(REQUEST, "run")
    deaf.after["update"] = lost
    with pytest.raises(StoreUnavailable):
        await store.begin("run", 1, lease_s=LEASE_S)
    job = await store.begin("run", 1, lease_s=LEASE_S)
    assert job.fence == 1
    then = clock.now
    deaf.after["update"] = lost
    with pytest.raises(StoreUnavailable):
        await store.finish(claims.claim_of(job), AuditStatus.SUCCEEDED)
    clock.advance(1)
    assert (await store.finish(claims.claim_of(job), AuditStatus.SUCCEEDED)).finished_at == then


@IN_MEMORY
async def test_a_run_whose_making_was_not_answered_is_made_once(job_store: JobStore, blobs: BlobStore) -> None:
    deaf = Outage(job_store, StoreUnavailable)
    store = AuditStore(deaf, blobs)

    async def lost() -> None:
        raise StoreUnavailable("no answer")

    deaf.after["update"] = lost
    made = await store.create(REQUEST, "run")
    assert (made.status, made.attempt) == (AuditStatus.QUEUED, 1)
    await store.fail("run", 1, AuditFault(code="x", message="y"))
    deaf.after["update"] = lost
    again = await store.resume("run")
    assert (again.status, again.attempt) == (AuditStatus.QUEUED, 2)
    assert not deaf.after


@IN_MEMORY
async def test_a_blob_store_that_is_away_leaves_no_run_without_its_job_and_no_job_unstopped(
    job_store: JobStore, blobs: BlobStore
) -> None:
    away = BlobOutage(blobs, StoreUnavailable)
    away.only = {"get"}
    away.is_down = True
    store = AuditStore(job_store, away)
    made = await store.create(REQUEST, "run")
    assert (await store.cancel("run")).status == AuditStatus.CANCELED
    failed = await job_store.update("run", "", lambda job, *_: (job.evolve(status=record.State.FAILED),) if job else ())
    assert made.attempt == 1
    with pytest.raises(StoreUnavailable):
        await store.resume("run")
    assert await job_store.get("run") == failed


# -- one run at a time


async def test_a_second_run_is_refused_while_one_is_alive(store: AuditStore) -> None:
    await begun(store, "first")
    with pytest.raises(AuditRunning, match="first is running") as refused:
        await store.create(REQUEST, "second")
    assert refused.value.details["run_id"] == "first"
    with pytest.raises(UnknownAudit):
        await store.get("second")
    await store.create(REQUEST, "third", several=True)


async def test_of_many_that_are_made_at_once_one_is(store: AuditStore) -> None:
    made = await asyncio.gather(*(store.create(REQUEST, f"run-{i}") for i in range(8)), return_exceptions=True)
    won = [one for one in made if isinstance(one, Audit)]
    assert len(won) == 1
    assert all(isinstance(one, AuditRunning) for one in made if one not in won)
    assert [audit.id for audit in await store.list()] == [won[0].id]


async def test_of_many_that_take_the_same_id_one_gets_it(store: AuditStore) -> None:
    made = await asyncio.gather(*(store.create(REQUEST, "run", several=True) for _ in range(8)), return_exceptions=True)
    assert sorted(type(one).__name__ for one in made) == ["Audit", *["AuditExists"] * 7]


async def test_an_id_that_is_taken_is_refused(store: AuditStore) -> None:
    await store.finish(await begun(store), AuditStatus.SUCCEEDED)
    with pytest.raises(AuditExists, match="resume it, or take another id"):
        await store.create(REQUEST, "run")


async def test_an_id_whose_record_is_gone_and_whose_blobs_are_not_is_refused(
    store: AuditStore, blobs: BlobStore, job_store: JobStore
) -> None:
    await RunFiles(blobs, "run", Confirmed()).keep_cell(cell_result())
    with pytest.raises(AuditExists, match="audit/run/ holds the blobs of another run"):
        await store.create(REQUEST, "run")
    assert await job_store.get("run") is None


async def test_a_run_that_is_over_is_in_nobodys_way(store: AuditStore) -> None:
    await store.finish(await begun(store, "first"), AuditStatus.SUCCEEDED)
    await store.create(REQUEST, "second")


@pytest.mark.parametrize(("has_begun", "silent_s"), [(True, LEASE_S), (False, LAUNCH_S)])
async def test_a_dead_run_is_out_of_the_way_and_its_driver_writes_nothing_more(
    store: AuditStore, clock: Clock, has_begun: bool, silent_s: float
) -> None:
    claim = await begun(store, "dead") if has_begun else None
    if claim is None:
        await store.create(REQUEST, "dead")
    clock.advance(silent_s - 1)
    with pytest.raises(AuditRunning):
        await store.create(REQUEST, "next")
    clock.advance(1)
    await store.create(REQUEST, "next")
    dead = await store.get("dead")
    assert dead.status == AuditStatus.FAILED
    assert dead.error is not None and dead.error.code == JOB_DIED
    if claim:
        with pytest.raises(StaleClaim):
            await store.finish(claim, AuditStatus.SUCCEEDED)
    else:
        with pytest.raises(IllegalTransition, match="dead is failed"):
            await store.begin("dead", 1, lease_s=LEASE_S)


async def test_a_run_that_says_just_in_time_that_it_lives_keeps_the_app(
    store: AuditStore, job_store: JobStore, clock: Clock
) -> None:
    claim = await begun(store, "slow")
    clock.advance(LEASE_S)
    await job_store.update("slow", claim.lock_key, claims.renew(claim, lease_s=LEASE_S))
    with pytest.raises(AuditRunning, match="slow is running"):
        await store.create(REQUEST, "next")


async def test_an_edit_of_the_same_session_is_in_nobodys_way(store: AuditStore, job_store: JobStore) -> None:
    edit = make_job("edit")
    await job_store.update("edit", edit.lock_key, claims.claim(edit, lease_s=LEASE_S, max_attempts=5))
    await begun(store)
    assert (await job_store.update("edit", edit.lock_key, lambda *_: ())).status == record.State.RUNNING


async def test_an_edits_job_is_no_run(store: AuditStore, job_store: JobStore) -> None:
    edit = make_job("edit")
    await job_store.update("edit", edit.lock_key, lambda *_: (edit,))
    with pytest.raises(AuditExists):
        await store.create(REQUEST, "edit")
    for use in (store.get("edit"), store.resume("edit"), store.cancel("edit"), store.fail_if_dead("edit")):
        with pytest.raises(UnknownAudit):
            await use
    assert await store.list() == []
    assert await job_store.get("edit") == edit


# -- resuming


async def test_a_resumed_run_keeps_what_succeeded(store: AuditStore, blobs: BlobStore, clock: Clock) -> None:
    await begun(store)
    done = {"telea_gs2": CellProgress(status="succeeded"), "telea_gs4": CellProgress(status="failed")}
    await found(blobs, cells=done, stage="painting", started_at=clock.now)
    then = clock.now
    clock.advance(LEASE_S)
    again = await store.resume("run")
    assert (again.status, again.attempt, again.stage) == ("queued", 2, "")
    assert (again.job_name, again.started_at, again.error) == ("fluxfill-audit-run.2", then, None)
    assert again.cells == {"telea_gs2": CellProgress(status="succeeded"), "telea_gs4": CellProgress()}


@pytest.mark.parametrize("end", ["succeeded", "incomplete", "failed", "canceled", "never launched", "canceled early"])
async def test_each_attempt_has_a_number_of_its_own(store: AuditStore, clock: Clock, end: str) -> None:
    if end == "never launched":
        await store.create(REQUEST, "run")
        await store.fail("run", 1, AuditFault(code="jobs_unavailable", message="no Ray"))
    elif end == "canceled early":
        await store.create(REQUEST, "run")
        await store.cancel("run")
    elif end == "canceled":
        await begun(store)
        await store.cancel("run")
    else:
        await store.finish(await begun(store), AuditStatus(end))
    assert (await store.get("run")).attempt == 1
    assert (await store.resume("run")).attempt == 2
    assert (await store.begin("run", 2, lease_s=LEASE_S)).attempt == 2
    assert (await store.get("run")).attempt == 2


async def test_a_run_with_a_live_driver_is_not_resumed(store: AuditStore) -> None:
    await begun(store)
    with pytest.raises(AuditRunning, match="run is running"):
        await store.resume("run")


async def test_of_two_who_resume_at_once_one_does(store: AuditStore) -> None:
    await store.finish(await begun(store), AuditStatus.INCOMPLETE)
    made = await asyncio.gather(store.resume("run"), store.resume("run"), return_exceptions=True)
    assert sorted(type(one).__name__ for one in made) == ["Audit", "AuditRunning"]
    assert (await store.get("run")).attempt == 2


async def test_an_older_attempt_writes_nothing_any_more(store: AuditStore, clock: Clock) -> None:
    claim = await begun(store)
    clock.advance(LEASE_S)
    resumed = await store.resume("run")
    for write in (
        store.begin("run", 1, lease_s=LEASE_S),
        store.cancel("run", 1),
        store.check_canceled("run", 1),
    ):
        with pytest.raises(StaleClaim, match="attempt 2, and this is 1"):
            await write
    with pytest.raises(StaleClaim):
        await store.finish(claim, AuditStatus.SUCCEEDED)
    assert await store.fail("run", 1, AuditFault(code="x", message="y")) == resumed
    await store.begin("run", 2, lease_s=LEASE_S)
    with pytest.raises(StaleClaim):
        await store.finish(claim, AuditStatus.SUCCEEDED)


async def test_a_resume_that_another_run_refuses_changes_nothing(store: AuditStore) -> None:
    ended = await store.finish(await begun(store, "old"), AuditStatus.INCOMPLETE)
    await begun(store, "new")
    with pytest.raises(AuditRunning, match="new is running"):
        await store.resume("old")
    assert await store.get("old") == ended


# -- canceling


async def test_a_canceled_run_is_over_and_its_driver_may_still_report(store: AuditStore) -> None:
    claim = await begun(store)
    assert (await store.cancel("run")).status == AuditStatus.CANCELED
    with pytest.raises(Canceled):
        await store.finish(claim, AuditStatus.SUCCEEDED)
    await store.check_canceled("run", 1)
    assert (await store.cancel("run", 1)).status == AuditStatus.CANCELED
    with pytest.raises(IllegalTransition):
        await store.cancel("run")
    await store.resume("run")
    with pytest.raises(StaleClaim):
        await store.check_canceled("run", 1)


async def test_a_run_that_was_canceled_before_its_driver_came_never_begins(store: AuditStore) -> None:
    await store.create(REQUEST, "run")
    assert (await store.cancel("run")).status == AuditStatus.CANCELED
    with pytest.raises(IllegalTransition, match="run is canceled, not queued"):
        await store.begin("run", 1, lease_s=LEASE_S)


# -- the dead


async def test_only_a_silent_run_is_buried(store: AuditStore, clock: Clock) -> None:
    await begun(store)
    assert (await store.fail_if_dead("run")).status == AuditStatus.RUNNING
    clock.advance(LEASE_S)
    failed = await store.fail_if_dead("run")
    assert failed.status == AuditStatus.FAILED
    assert failed.error is not None and failed.error.code == JOB_DIED
    assert "was not heard of after 2026-01-01 00:01:00 UTC" in failed.error.message
    assert await store.fail_if_dead("run") == failed


# -- listing


async def test_the_newest_run_is_listed_first(store: AuditStore, job_store: JobStore, clock: Clock) -> None:
    for name in ("b", "c", "a"):
        await store.create(REQUEST, name, several=True)
        clock.advance(1)
    await job_store.update("edit", "", lambda *_: (make_job("edit", created_at=clock.now),))
    assert [audit.id for audit in await store.list()] == ["a", "c", "b"]
    assert [audit.id for audit in await store.list(limit=2)] == ["a", "c"]


async def test_damaged_findings_hide_no_run(
    store: AuditStore, blobs: BlobStore, caplog: pytest.LogCaptureFixture
) -> None:
    await begun(store)
    await damage(blobs, findings_path("run"))
    with caplog.at_level(logging.WARNING):
        assert [audit.id for audit in await store.list()] == ["run"]
    assert "Left audit/run/run.json out" in caplog.text
    assert (await store.get("run")).cells == {"telea_gs2": CellProgress(), "telea_gs4": CellProgress()}


# -- who may not


HOSTILE = ["", ".", "..", "../x", "a/b", "a\\b", "a\n", "run\n", "a\x00", "é", "x" * 65, "%2e%2e", "a.b"]


@IN_MEMORY
@pytest.mark.parametrize("run_id", HOSTILE, ids=ascii)
async def test_ids_that_could_escape_are_refused(store: AuditStore, run_id: str) -> None:
    with pytest.raises(InputError, match="run_id: 1 to 64 letters"):
        await store.create(REQUEST, run_id)
    for use in (
        store.get(run_id),
        store.resume(run_id),
        store.begin(run_id, 1, lease_s=LEASE_S),
        store.fail(run_id, 1, AuditFault(code="x", message="y")),
        store.cancel(run_id),
        store.fail_if_dead(run_id),
    ):
        with pytest.raises(UnknownAudit, match="there is no such run"):
            await use
    assert await store.list() == []


async def test_runs_that_never_were(store: AuditStore, blobs: BlobStore) -> None:
    for use in (
        store.get("x"),
        store.resume("x"),
        store.begin("x", 1, lease_s=LEASE_S),
        store.cancel("x"),
        store.fail_if_dead("x"),
    ):
        with pytest.raises(UnknownAudit, match="there is no run x"):
            await use
    assert await read_cells(blobs, "x") == {}
    assert await read_findings(blobs, "x") == Findings()


@IN_MEMORY
async def test_a_store_that_is_down_is_said_to_be(job_store: JobStore, blobs: BlobStore) -> None:
    down = Outage(job_store, StoreUnavailable)
    down.is_down = True
    store = AuditStore(down, blobs)
    for use in (
        store.create(REQUEST, "x"),
        store.get("x"),
        store.resume("x"),
        store.cancel("x"),
        store.fail_if_dead("x"),
    ):
        with pytest.raises(StoreUnavailable):
            await use


# -- files


def cell_result(name: str = "telea_gs2", **fields: Any) -> CellResult:
    return CellResult(name=name, cell=MATRIX.cells()[0], status="succeeded", **fields)


class Confirmed:
    """What a driver's lease says."""

    def __init__(self) -> None:
        self.holds = True

    async def __call__(self) -> None:
        if not self.holds:
            raise StaleClaim("the claim is over")


async def test_cells_findings_and_pictures_are_kept_and_written_over(blobs_url: str) -> None:
    blobs, confirm = adapters.blob_store(blobs_url), Confirmed()
    files, other = RunFiles(blobs, "run", confirm), RunFiles(blobs, "other", confirm)
    await files.keep_cell(cell_result(wall_s=1.0))
    await files.keep_cell(cell_result("telea_gs4"))
    await other.keep_cell(cell_result("alien"))
    await files.keep_cell(cell_result(wall_s=2.0))
    cells = await read_cells(blobs, "run")
    assert {name: cell.wall_s for name, cell in cells.items()} == {"telea_gs2": 2.0, "telea_gs4": None}
    await files.keep_findings(Findings(stage="first"))
    await files.keep_findings(Findings(stage="second", gpu="CPU"))
    assert await read_findings(blobs, "run") == Findings(stage="second", gpu="CPU")
    path = await files.keep_image("telea_gs2", b"png")
    assert path == "audit/run/telea_gs2.png"
    data, info = await blobs.get(path, max_bytes=10)
    assert (data, info.content_type) == (b"png", "image/png")


async def test_a_claim_that_is_over_keeps_nothing(blobs: BlobStore) -> None:
    confirm = Confirmed()
    files = RunFiles(blobs, "run", confirm)
    confirm.holds = False
    for write in (files.keep_cell(cell_result()), files.keep_image("a", b"png"), files.keep_findings(Findings())):
        with pytest.raises(StaleClaim):
            await write
    assert [info.path async for info in blobs.list("audit/run")] == []


async def test_a_damaged_cell_is_as_if_it_were_not_there(blobs: BlobStore) -> None:
    await RunFiles(blobs, "run", Confirmed()).keep_cell(cell_result())
    await damage(blobs, cell_path("run", "telea_gs4"))
    assert list(await read_cells(blobs, "run")) == ["telea_gs2"]
