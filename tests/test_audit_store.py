"""Runs of audits over every blob store: who owns a record, which run is the app's only one, what survives damage."""

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from serve_app import adapters
from serve_app.adapters.memory import MemoryBlobStore
from serve_app.audit_store import ALIVE_S, JOB_DIED, LAUNCH_S, AuditStore
from serve_app.audits import (
    LOCK_PATH,
    Audit,
    AuditFault,
    AuditRequest,
    AuditStatus,
    CellProgress,
    CellResult,
    Matrix,
    cancel_path,
    cell_path,
    index_path,
    record_path,
)
from serve_app.errors import (
    AuditExists,
    AuditRunning,
    BlobConflict,
    BlobError,
    BlobNotFound,
    IllegalTransition,
    InputError,
    StaleClaim,
    StoreUnavailable,
    UnknownAudit,
)
from serve_app.ports import BlobInfo, BlobStore

from .rig import Clock, Outage

MATRIX = Matrix(variants=("telea",), guidance_scales=(2.0, 4.0))
REQUEST = AuditRequest(user_id="u", session_id="s", matrix=MATRIX)
LOCAL = pytest.mark.parametrize("blobs_url", ["files", "memory"], indirect=True)
IN_MEMORY = pytest.mark.parametrize("blobs_url", ["memory"], indirect=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def blobs(blobs_url: str) -> BlobStore:
    return adapters.blob_store(blobs_url)


@pytest.fixture
def store(blobs: BlobStore, clock: Clock) -> AuditStore:
    return AuditStore(blobs, clock)


def staged(text: str) -> Callable[[Audit], Audit]:
    return lambda audit: audit.model_copy(update={"stage": text})


async def begun(store: AuditStore, run_id: str = "run", **options: Any) -> Audit:
    return await store.begin((await store.create(REQUEST, run_id, **options)).id, 1)


async def damage(blobs: BlobStore, path: str) -> None:
    await blobs.put(path, b'{"id": "run"', content_type="application/json")


# -- the way of a run


async def test_a_run_from_its_creation_to_its_end(store: AuditStore, clock: Clock) -> None:
    audit = await store.create(REQUEST, "run")
    assert (audit.status, audit.attempt, audit.job_name) == (AuditStatus.QUEUED, 1, "fluxfill-audit-run")
    assert audit.cells == {"telea_gs2": CellProgress(), "telea_gs4": CellProgress()}
    clock.advance(10)
    assert (await store.begin("run", 1)).started_at == clock.now
    assert (await store.update("run", 1, staged("painting"))).stage == "painting"
    fault = AuditFault(code="painting_failed", message="two cells failed")
    ended = await store.finish("run", 1, AuditStatus.INCOMPLETE, fault)
    assert (ended.status, ended.error, ended.stage, ended.finished_at) == ("incomplete", fault, "", clock.now)
    assert await store.get("run") == ended


async def test_ids_are_made_where_none_is_given(store: AuditStore) -> None:
    first, second = await store.create(REQUEST, several=True), await store.create(REQUEST, several=True)
    assert first.id != second.id
    assert first.id.startswith("audit-") and len(first.id) == len("audit-") + 8


@LOCAL
async def test_each_write_keeps_a_run_alive(store: AuditStore, clock: Clock) -> None:
    assert (await store.create(REQUEST, "run")).is_alive(clock.now)
    clock.advance(LAUNCH_S - 1)
    await store.begin("run", 1)
    clock.advance(ALIVE_S - 1)
    await store.update("run", 1, staged("painting"))
    clock.advance(ALIVE_S - 1)
    assert (await store.get("run")).is_alive(clock.now)
    clock.advance(1)
    assert not (await store.get("run")).is_alive(clock.now)


@LOCAL
async def test_an_attempt_begins_once(store: AuditStore, blobs: BlobStore, clock: Clock) -> None:
    await begun(store)
    with pytest.raises(IllegalTransition, match="running, not queued"):
        await AuditStore(blobs, clock).begin("run", 1)


@LOCAL
async def test_what_is_over_is_not_written_any_more(store: AuditStore) -> None:
    await begun(store)
    await store.finish("run", 1, AuditStatus.SUCCEEDED)
    for write in (
        store.begin("run", 1),
        store.update("run", 1, staged("again")),
        store.finish("run", 1, AuditStatus.FAILED),
        store.cancel("run"),
    ):
        with pytest.raises(IllegalTransition):
            await write
    assert (await store.get("run")).status == AuditStatus.SUCCEEDED


@LOCAL
async def test_a_change_that_raises_stores_nothing(store: AuditStore) -> None:
    audit = await begun(store)

    def refuse(_: Audit) -> Audit:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await store.update("run", 1, refuse)
    assert await store.get("run") == audit


async def test_writers_at_once_lose_no_write(store: AuditStore) -> None:
    await begun(store)

    def counted(audit: Audit) -> Audit:
        return audit.model_copy(update={"stage": str(int(audit.stage or 0) + 1)})

    await asyncio.gather(*(store.update("run", 1, counted) for _ in range(6)))
    assert (await store.get("run")).stage == "6"


@IN_MEMORY
async def test_a_record_that_others_never_stop_writing_is_given_up(blobs: BlobStore, clock: Clock) -> None:
    store = AuditStore(blobs, clock)
    await begun(store)
    overtaken = Outage(blobs, StoreUnavailable)

    async def write_first() -> None:
        overtaken.before["put"] = write_first
        await store.update("run", 1, staged("theirs"))

    overtaken.before["put"] = write_first
    slow_store = AuditStore(overtaken, clock)
    with pytest.raises(BlobConflict, match="20 times by others"):
        await slow_store.update("run", 1, staged("mine"))
    assert (await store.get("run")).stage == "theirs"


# -- writes that were stored though their answer was lost


class Deaf:
    """A store over `blobs` whose next put is stored, and then raises."""

    def __init__(self, blobs: BlobStore, clock: Clock) -> None:
        self._blobs = Outage(blobs, StoreUnavailable)
        self.store = AuditStore(self._blobs, clock)

    def hears_no_answer(self, error: Exception) -> None:
        async def lost() -> None:
            raise error

        self._blobs.after["put"] = lost

    def hears_no_second_answer(self, error: Exception) -> None:
        async def heard() -> None:
            self.hears_no_answer(error)

        self._blobs.after["put"] = heard


@pytest.fixture
def deaf(blobs: BlobStore, clock: Clock) -> Deaf:
    return Deaf(blobs, clock)


#: What a backend's own second try comes to, and what it does without one.
LOST = pytest.mark.parametrize("lost", [BlobConflict("there is a newer one"), StoreUnavailable("no answer")], ids=repr)


@IN_MEMORY
@LOST
async def test_a_run_whose_creation_was_not_answered_is_created(deaf: Deaf, lost: Exception) -> None:
    deaf.hears_no_second_answer(lost)  # The first put is the index's.
    audit = await deaf.store.create(REQUEST, "run")
    assert await deaf.store.get("run") == audit
    with pytest.raises(AuditExists):
        await deaf.store.create(REQUEST, "run")


@IN_MEMORY
@LOST
async def test_the_job_whose_beginning_was_not_answered_has_begun(
    deaf: Deaf, blobs: BlobStore, clock: Clock, lost: Exception
) -> None:
    await deaf.store.create(REQUEST, "run")
    deaf.hears_no_answer(lost)
    with suppress(StoreUnavailable):
        await deaf.store.begin("run", 1)
    assert (await deaf.store.begin("run", 1)).status == AuditStatus.RUNNING
    with pytest.raises(IllegalTransition, match="running, not queued"):
        await AuditStore(blobs, clock).begin("run", 1)


@IN_MEMORY
@LOST
async def test_a_run_whose_end_was_not_answered_is_over(deaf: Deaf, clock: Clock, lost: Exception) -> None:
    await begun(deaf.store)
    fault, then = AuditFault(code="painting_failed", message="it failed"), clock.now
    deaf.hears_no_answer(lost)
    with suppress(StoreUnavailable):
        await deaf.store.finish("run", 1, AuditStatus.FAILED, fault)
    clock.advance(1)
    ended = await deaf.store.finish("run", 1, AuditStatus.FAILED, fault)
    assert (ended.status, ended.error, ended.finished_at) == (AuditStatus.FAILED, fault, then)
    with pytest.raises(IllegalTransition, match="run is failed"):
        await deaf.store.finish("run", 1, AuditStatus.FAILED)


@IN_MEMORY
async def test_a_resume_and_a_cancellation_that_are_tried_again_by_the_backend_are_done(deaf: Deaf) -> None:
    await begun(deaf.store)
    await deaf.store.finish("run", 1, AuditStatus.INCOMPLETE)
    deaf.hears_no_answer(BlobConflict("there is a newer one"))
    assert (await deaf.store.resume("run")).attempt == 2
    assert (await deaf.store.get("run")).attempt == 2
    await deaf.store.cancel("run")
    with pytest.raises(IllegalTransition, match="run is canceled"):
        await deaf.store.cancel("run")


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
    await begun(store)
    await store.finish("run", 1, AuditStatus.SUCCEEDED)
    with pytest.raises(AuditExists, match="resume it, or take another id"):
        await store.create(REQUEST, "run")


@LOCAL
async def test_a_run_that_is_over_is_in_nobodys_way(store: AuditStore) -> None:
    await begun(store, "first")
    await store.finish("first", 1, AuditStatus.SUCCEEDED)
    await store.create(REQUEST, "second")


async def test_a_dead_run_is_taken_over_and_its_job_told_so(store: AuditStore, clock: Clock) -> None:
    await begun(store, "dead")
    clock.advance(ALIVE_S)
    await store.create(REQUEST, "next")
    dead = await store.get("dead")
    assert dead.status == AuditStatus.FAILED
    assert dead.error is not None and dead.error.code == JOB_DIED
    with pytest.raises(IllegalTransition, match="dead is failed"):
        await store.update("dead", 1, staged("back again"))


@LOCAL
async def test_a_run_that_says_just_in_time_that_it_lives_keeps_the_app(blobs: BlobStore, clock: Clock) -> None:
    store = AuditStore(blobs, clock)
    await begun(store, "slow")
    clock.advance(ALIVE_S)
    watched = Outage(blobs, StoreUnavailable)

    async def write() -> None:
        await store.update("slow", 1, staged("alive"))

    async def write_before_next_put() -> None:
        watched.before["put"] = write

    # The first put is the new run's record; the next one would be the burial.
    watched.before["put"] = write_before_next_put
    other = AuditStore(watched, clock)
    with pytest.raises(AuditRunning, match="slow is running"):
        await other.create(REQUEST, "next")
    assert (await store.get("slow")).stage == "alive"


@LOCAL
@pytest.mark.parametrize("lock", [b"", b"{}", b'{"run_id": "../../etc"}', b'{"run_id": "never-was"}', b"\xff\xfe"])
async def test_a_lock_that_names_no_run_is_in_nobodys_way(store: AuditStore, blobs: BlobStore, lock: bytes) -> None:
    await blobs.put(LOCK_PATH, lock, content_type="application/json")
    await store.create(REQUEST, "run")
    with pytest.raises(AuditRunning):
        await store.create(REQUEST, "second")


@LOCAL
async def test_a_damaged_record_is_in_nobodys_way(store: AuditStore, blobs: BlobStore) -> None:
    await begun(store, "damaged")
    await damage(blobs, record_path("damaged"))
    await store.create(REQUEST, "run")


@IN_MEMORY
async def test_a_run_that_could_not_get_the_lock_leaves_nothing(blobs: BlobStore, clock: Clock) -> None:
    broken = Outage(blobs, StoreUnavailable)
    store = AuditStore(broken, clock)

    async def down() -> None:
        broken.is_down, broken.only = True, {"get"}

    broken.after["put"] = down
    with pytest.raises(StoreUnavailable):
        await store.create(REQUEST, "run")
    with pytest.raises(BlobNotFound):
        await blobs.head(record_path("run"))


# -- resuming


async def test_a_resumed_run_keeps_what_succeeded(store: AuditStore, clock: Clock) -> None:
    await begun(store)
    done = {"telea_gs2": CellProgress(status="succeeded"), "telea_gs4": CellProgress(status="running", step=3)}
    await store.update("run", 1, lambda audit: audit.model_copy(update={"cells": done, "stage": "painting"}))
    clock.advance(ALIVE_S)
    resumed = await store.resume("run")
    assert (resumed.status, resumed.attempt, resumed.job_name, resumed.stage) == (
        "queued",
        2,
        "fluxfill-audit-run.2",
        "",
    )
    assert resumed.cells == {"telea_gs2": CellProgress(status="succeeded"), "telea_gs4": CellProgress()}
    assert resumed.is_alive(clock.now)


@LOCAL
async def test_a_run_with_a_live_job_is_not_resumed(store: AuditStore, blobs: BlobStore) -> None:
    await begun(store)
    await store.cancel("run")
    with pytest.raises(AuditRunning, match="run is running"):
        await store.resume("run")
    assert await store.is_canceled("run"), "what was asked of the live job still stands"


@LOCAL
async def test_of_two_who_resume_at_once_one_does(store: AuditStore) -> None:
    await begun(store)
    await store.finish("run", 1, AuditStatus.INCOMPLETE)
    made = await asyncio.gather(store.resume("run"), store.resume("run"), return_exceptions=True)
    assert sorted(type(one).__name__ for one in made) == ["Audit", "AuditRunning"]
    assert (await store.get("run")).attempt == 2


async def test_an_older_attempt_writes_nothing_any_more(store: AuditStore, clock: Clock) -> None:
    await begun(store)
    clock.advance(ALIVE_S)
    await store.resume("run")
    for write in (
        store.begin("run", 1),
        store.update("run", 1, staged("old")),
        store.finish("run", 1, AuditStatus.SUCCEEDED),
    ):
        with pytest.raises(StaleClaim, match="attempt 2, and this is 1"):
            await write
    assert (await store.begin("run", 2)).status == AuditStatus.RUNNING


@LOCAL
async def test_a_resume_that_another_run_refuses_changes_nothing(store: AuditStore) -> None:
    await begun(store, "old")
    ended = await store.finish("old", 1, AuditStatus.INCOMPLETE)
    await begun(store, "new")
    with pytest.raises(AuditRunning, match="new is running"):
        await store.resume("old")
    # A job of the refused attempt may be under way: the attempt is used.
    assert await store.get("old") == ended.model_copy(update={"attempt": 2})


@LOCAL
async def test_a_resumed_run_forgets_that_it_was_canceled(store: AuditStore) -> None:
    await begun(store)
    await store.cancel("run")
    await store.finish("run", 1, AuditStatus.CANCELED)
    await store.resume("run")
    assert not await store.is_canceled("run")


# -- canceling


async def test_a_live_job_is_asked_to_stop(store: AuditStore) -> None:
    await begun(store)
    assert not await store.is_canceled("run")
    assert (await store.cancel("run")).status == AuditStatus.RUNNING
    assert await store.is_canceled("run")
    await store.cancel("run")


@LOCAL
async def test_without_a_live_job_a_run_is_canceled_at_once(store: AuditStore, clock: Clock) -> None:
    await store.create(REQUEST, "queued")
    assert (await store.cancel("queued")).status == AuditStatus.CANCELED
    with pytest.raises(IllegalTransition, match="canceled, not queued"):
        await store.begin("queued", 1)
    await begun(store, "dead")
    clock.advance(ALIVE_S)
    assert (await store.cancel("dead")).status == AuditStatus.CANCELED


@LOCAL
async def test_canceling_what_is_over_asks_nobody(store: AuditStore, blobs: BlobStore) -> None:
    await begun(store)
    await store.finish("run", 1, AuditStatus.SUCCEEDED)
    with pytest.raises(IllegalTransition):
        await store.cancel("run")
    with pytest.raises(BlobNotFound):
        await blobs.head(cancel_path("run"))


# -- burying


@LOCAL
async def test_only_a_silent_run_is_buried(store: AuditStore, clock: Clock) -> None:
    alive = await begun(store)
    assert await store.bury("run") == alive
    clock.advance(ALIVE_S)
    buried = await store.bury("run")
    assert (buried.status, buried.finished_at) == (AuditStatus.FAILED, clock.now)
    assert buried.error is not None and "not heard of" in buried.error.message
    clock.advance(1)
    assert await store.bury("run") == buried


# -- reading


async def test_the_newest_run_is_listed_first(store: AuditStore, blobs: BlobStore, clock: Clock) -> None:
    assert await store.list() == []
    for name in ("b", "c", "a"):
        await store.create(REQUEST, name, several=True)
        clock.advance(1)
    await blobs.put("audit/b/cells/run.json", b"{}", content_type="application/json")
    await blobs.put("audit/run.json", b"{}", content_type="application/json")
    assert [audit.id for audit in await store.list()] == ["a", "c", "b"]
    assert [audit.id for audit in await store.list(limit=2)] == ["a", "c"]


class Reads(MemoryBlobStore):
    """Notes what is read."""

    def __init__(self) -> None:
        super().__init__(f"memory:{uuid.uuid4().hex}")
        self.read: list[str] = []

    async def get(self, path: str, *, max_bytes: int) -> tuple[bytes, BlobInfo]:
        self.read.append(path)
        return await super().get(path, max_bytes=max_bytes)


async def test_listing_reads_no_run_that_is_not_listed(clock: Clock) -> None:
    reads = Reads()
    store = AuditStore(reads, clock)
    for name in ("a", "b", "c", "d"):
        await store.create(REQUEST, name, several=True)
        clock.advance(1)
    await damage(reads, record_path("c"))
    reads.read.clear()
    assert [audit.id for audit in await store.list(limit=2)] == ["d", "b"]
    assert sorted(reads.read) == [record_path(name) for name in ("b", "c", "d")]


async def test_a_run_is_listed_once_and_where_it_began(store: AuditStore, blobs: BlobStore, clock: Clock) -> None:
    await store.create(REQUEST, "a", several=True)
    clock.advance(1)
    await store.create(REQUEST, "b", several=True)
    clock.advance(1)
    with pytest.raises(AuditExists):
        await store.create(REQUEST, "a", several=True)
    assert len([info async for info in blobs.list("audit-index")]) == 2
    # What is left of one that a dead process did not get to create, or of one that was removed.
    for path in (index_path("a", clock()), index_path("gone", clock()), "audit-index/x"):
        await blobs.put(path, b"", content_type="text/plain")
    assert [audit.id for audit in await store.list()] == ["b", "a"]


@LOCAL
async def test_a_damaged_record_hides_no_other(
    store: AuditStore, blobs: BlobStore, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("sound", "damaged"):
        await store.create(REQUEST, name, several=True)
    await damage(blobs, record_path("damaged"))
    with caplog.at_level(logging.WARNING):
        assert [audit.id for audit in await store.list()] == ["sound"]
    assert "damaged" in caplog.text
    for use in (store.get("damaged"), store.begin("damaged", 1), store.cancel("damaged"), store.resume("damaged")):
        with pytest.raises(BlobError, match="cannot be read"):
            await use
    with pytest.raises(AuditExists):
        await store.create(REQUEST, "damaged")


HOSTILE = ["", ".", "..", "../x", "a/b", "a\\b", "a\n", "run\n", "a\x00", "é", "x" * 65, "%2e%2e", "a.b"]


@LOCAL
@pytest.mark.parametrize("run_id", HOSTILE, ids=ascii)
async def test_ids_that_could_escape_are_refused(store: AuditStore, run_id: str) -> None:
    with pytest.raises(InputError, match="run_id: 1 to 64 letters"):
        await store.create(REQUEST, run_id)
    for use in (
        store.get(run_id),
        store.resume(run_id),
        store.begin(run_id, 1),
        store.update(run_id, 1, staged("x")),
        store.finish(run_id, 1, AuditStatus.FAILED),
        store.cancel(run_id),
        store.bury(run_id),
    ):
        with pytest.raises(UnknownAudit, match="there is no such run"):
            await use
    assert await store.list() == []


@LOCAL
async def test_runs_that_never_were(store: AuditStore) -> None:
    for use in (store.get("x"), store.resume("x"), store.begin("x", 1), store.cancel("x"), store.bury("x")):
        with pytest.raises(UnknownAudit, match="there is no run x"):
            await use
    assert not await store.is_canceled("x")
    assert await store.cells("x") == {}


@IN_MEMORY
async def test_a_store_that_is_down_is_said_to_be(blobs: BlobStore, clock: Clock) -> None:
    down = Outage(blobs, StoreUnavailable)
    down.is_down = True
    store = AuditStore(down, clock)
    for use in (store.create(REQUEST, "x"), store.get("x"), store.resume("x"), store.cancel("x"), store.bury("x")):
        with pytest.raises(StoreUnavailable):
            await use


# -- cells


def cell_result(name: str = "telea_gs2", **fields: Any) -> CellResult:
    return CellResult(name=name, cell=MATRIX.cells()[0], status="succeeded", **fields)


async def test_cells_are_kept_and_written_over(store: AuditStore) -> None:
    await begun(store)
    await begun(store, "other", several=True)
    await store.keep_cell("run", 1, cell_result(wall_s=1.0))
    await store.keep_cell("run", 1, cell_result("telea_gs4"))
    await store.keep_cell("other", 1, cell_result("alien"))
    await store.keep_cell("run", 1, cell_result(wall_s=2.0))
    cells = await store.cells("run")
    assert {name: cell.wall_s for name, cell in cells.items()} == {"telea_gs2": 2.0, "telea_gs4": None}


@LOCAL
async def test_an_older_attempt_keeps_no_cell_and_no_picture(store: AuditStore, blobs: BlobStore, clock: Clock) -> None:
    await begun(store)
    clock.advance(ALIVE_S)
    await store.resume("run")
    for write in (store.keep_cell("run", 1, cell_result()), store.keep_image("run", 1, "telea_gs2", b"png")):
        with pytest.raises(StaleClaim, match="attempt 2, and this is 1"):
            await write
    assert [info.path async for info in blobs.list("audit/run")] == [record_path("run")]


@LOCAL
async def test_a_damaged_cell_is_as_if_it_were_not_there(store: AuditStore, blobs: BlobStore) -> None:
    await begun(store)
    await store.keep_cell("run", 1, cell_result())
    await damage(blobs, cell_path("run", "telea_gs4"))
    assert list(await store.cells("run")) == ["telea_gs2"]


@LOCAL
async def test_pictures_lie_in_the_runs_folder(store: AuditStore, blobs: BlobStore) -> None:
    await begun(store)
    path = await store.keep_image("run", 1, "telea_gs2", b"png")
    assert path == "audit/run/telea_gs2.png"
    data, info = await blobs.get(path, max_bytes=10)
    assert (data, info.content_type) == (b"png", "image/png")
