"""What survives a cancel, an outage, and a kill at any moment."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.audit.record import Audit, AuditStatus, CompileVerdict, cell_path, findings_path, folder, image_path
from serve_app.edit.session import session_path
from serve_app.errors import IllegalTransition, OutOfMemory, StaleClaim, StoreUnavailable
from serve_app.jobs.lease import Pace
from serve_app.jobs.record import State

from .audit_rig import NAMES, QUICK, AuditRig, scripted, until
from .rig import SESSION, USER, Held, Scripted, jpeg, photo

# -- cancel


async def held_in(rig: AuditRig, name: str) -> tuple[asyncio.Task[Any], Held]:
    """A run whose variant `name` is being painted."""
    held = Held()
    rig.scripted[name][0].on_step = lambda step: held()
    running = asyncio.create_task(rig.run())
    await asyncio.to_thread(held.entered.wait)
    return running, held


@pytest.mark.slow
@pytest.mark.parametrize("way", ["signal", "store"])
async def test_a_canceled_run_stops_what_it_paints_and_keeps_what_is_painted(way: str) -> None:
    rig = AuditRig()
    running, held = await held_in(rig, "b")
    await until(lambda: {"a_gs2", "a_gs4"} <= set(_stored(rig)))
    if way == "signal":
        rig.auditor.cancel()
    else:
        await rig.store.cancel("run")
    await until(lambda: rig.replicas.slot("b").stopping_since is not None)
    held.let_go.set()
    audit = await running
    assert audit.status == AuditStatus.CANCELED
    assert {name: cell.status for name, cell in audit.cells.items()} == {
        "a_gs2": "succeeded", "a_gs4": "succeeded", "b_gs2": "waiting", "b_gs4": "waiting",
    }  # fmt: skip
    assert rig.scripted["b"][0].painted == 1
    assert f"{folder('run')}/REPORT.md" in await rig.paths()
    assert audit.recommended is None

    again = rig.beside()
    assert (await again.resume()).status == AuditStatus.SUCCEEDED
    assert sorted(again.replicas.begun) == ["b_gs2", "b_gs4"]


async def canceled_at_b(rig: AuditRig, **fields: Any) -> Audit:
    """A run whose variant a is painted, and b never is."""
    held = Held()
    rig.scripted["b"][0].on_step = lambda step: held()
    running = asyncio.create_task(rig.run(**fields))
    await until(lambda: {"a_gs2", "a_gs4"} <= set(_stored(rig)))
    rig.auditor.cancel()
    await until(lambda: rig.replicas.slot("b").stopping_since is not None)
    held.let_go.set()
    return await running


async def results_of(rig: AuditRig) -> Any:
    return json.loads((await rig.plain.get(f"{folder('run')}/results.json", max_bytes=10**8))[0])


async def test_a_canceled_run_is_judged_by_what_is_there_and_nothing_is_compiled() -> None:
    rig = AuditRig()
    assert (await canceled_at_b(rig)).status == AuditStatus.CANCELED
    assert rig.compiled == []
    report = await results_of(rig)
    assert (report["status"], report["recommended"]["variant"]) == ("canceled", "a")
    assert {cell["name"]: cell["outside_max"] for cell in report["cells"]} == {"a_gs2": 0, "a_gs4": 0}
    cells = await rig.cells()
    assert all(cells[name].compared is not None for name in ("a_gs2", "a_gs4"))


async def test_a_canceled_run_is_over_and_has_its_report_before_it_is_judged() -> None:
    rig = AuditRig()
    seen: list[tuple[State, bool]] = []

    def look(method: str, path: str) -> None:
        blobs = rig.plain._content.blobs
        if method == "put" and cell_path("run", "a_gs2") == path and path in blobs:
            seen.append((rig.stored_job().status, f"{folder('run')}/report.html" in blobs))

    rig.blobs.before = look
    await canceled_at_b(rig)
    assert seen == [(State.CANCELED, True)]


async def test_a_canceled_run_that_cannot_be_judged_in_time_says_so() -> None:
    rig = AuditRig(pace=replace(QUICK, judge_s=0.0))
    await canceled_at_b(rig)
    assert (await results_of(rig))["recommended"] is None
    data, _ = await rig.plain.get(f"{folder('run')}/REPORT.md", max_bytes=10**8)
    assert "None: the run was canceled, and its pictures were not all compared." in data.decode()


@pytest.mark.slow
async def test_a_canceled_resume_forgets_what_was_recommended_before() -> None:
    rig = AuditRig(pace=replace(QUICK, judge_s=0.0))
    rig.replicas.errors["b_gs4"] = [OutOfMemory("full")]
    assert (await rig.run()).recommended is not None
    held = Held()
    rig.scripted["b"][0].on_step = lambda step: held()
    running = asyncio.create_task(rig.resume())
    await asyncio.to_thread(held.entered.wait)
    rig.auditor.cancel()
    await until(lambda: rig.replicas.slot("b").stopping_since is not None)
    held.let_go.set()
    assert (await running).recommended is None


def _stored(rig: AuditRig) -> list[str]:
    found = rig.plain._content.blobs
    return [name for name in NAMES if cell_path("run", name) in found]


async def test_a_run_that_was_canceled_before_its_job_began_paints_nothing() -> None:
    rig = AuditRig()
    await rig.put_session()
    await rig.queued()
    await rig.store.cancel("run")
    with pytest.raises(IllegalTransition):
        await rig.auditor.run("run", 1)
    assert rig.replicas.begun == []


async def test_a_run_that_another_attempt_has_taken_over_is_left_alone() -> None:
    rig = AuditRig()
    running, held = await held_in(rig, "b")
    rig.clock.advance(3600)
    await rig.store.resume("run")
    rig.scripted["b"][0].on_step = lambda step: None
    held.let_go.set()
    with pytest.raises(StaleClaim):
        await running
    assert (await rig.store.get("run")).status == AuditStatus.QUEUED


async def test_a_run_that_was_taken_over_is_given_no_cell_of_the_older_attempt() -> None:
    # The painted cell comes before the next look at the job, and the next write of the findings.
    rig = AuditRig(pace=replace(QUICK, lease=Pace(cancel_poll_s=10, progress_s=10), write_s=10))
    running, held = await held_in(rig, "b")
    await until(lambda: {"a_gs2", "a_gs4"} <= set(_stored(rig)))
    rig.clock.advance(3600)
    await rig.store.resume("run")
    held.let_go.set()
    with pytest.raises(StaleClaim):
        await running
    assert set(await rig.cells()) == {"a_gs2", "a_gs4"}


async def test_a_signal_before_the_job_begins_cancels_the_run() -> None:
    rig = AuditRig()
    rig.auditor.cancel()
    audit = await rig.run()
    assert audit.status == AuditStatus.CANCELED
    assert rig.replicas.begun == []


# -- the record


async def test_the_record_says_how_far_a_cell_is() -> None:
    rig = AuditRig(variants=scripted("a"))
    held = Held()
    rig.scripted["a"][0].on_step = lambda step: held() if step == 3 else None
    running = asyncio.create_task(rig.run(matrix={"guidance_scales": (2.0,)}))
    await asyncio.to_thread(held.entered.wait)
    while (cell := (await rig.store.get("run")).cells["a_gs2"]).step < 2:
        await asyncio.sleep(0.005)
    assert (cell.status, cell.step, cell.steps) == ("running", 2, 8)
    held.let_go.set()
    assert (await running).status == AuditStatus.SUCCEEDED


async def test_an_error_that_nobody_foresaw_fails_the_run_and_is_raised() -> None:
    class Broken:
        async def encode(self, variant: str, prompt: str) -> bytes | None:
            raise ZeroDivisionError("by zero")

    rig = AuditRig(prompts=Broken())
    with pytest.raises(ZeroDivisionError):
        await rig.run()
    audit = await rig.store.get("run")
    assert audit.status == AuditStatus.FAILED
    assert audit.error is not None
    assert audit.error.message == "ZeroDivisionError: by zero"


@pytest.mark.parametrize(("method", "code"), [("get", "store_unavailable"), ("put", "missing_input")])
async def test_a_run_whose_findings_cannot_be_had_or_written_is_over_and_says_why(method: str, code: str) -> None:
    rig = AuditRig(pace=replace(QUICK, outage_s=0.05))
    audit = await rig.queued()

    def away(called: str, path: str) -> None:
        if called == method and path == findings_path("run"):
            raise StoreUnavailable(f"no {called}")

    rig.blobs.before = away
    with suppress(StoreUnavailable):
        await rig.auditor.run(audit.id, audit.attempt)
    ended = await rig.store.get("run")
    assert ended.status == AuditStatus.FAILED and ended.error is not None
    assert ended.error.code == code


# -- outages and kills


@pytest.fixture(params=["memory", "sqlite"])
def rig_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., AuditRig]:
    """Rigs over a job store of the kind, each in one of its own."""

    def made(**fields: Any) -> AuditRig:
        rig = AuditRig(**fields)
        if request.param == "memory":
            return rig
        return replace(rig, jobs_url=f"sqlite:{tmp_path / rig.name}.db")

    return made


class Down:
    """A store that is down for the next so many calls whose path starts with the prefix."""

    def __init__(self, prefix: str, calls: int, method: str = "put") -> None:
        self.prefix, self.calls, self.method = prefix, calls, method

    def __call__(self, method: str, path: str) -> None:
        if method == self.method and path.startswith(self.prefix) and self.calls:
            self.calls -= 1
            raise StoreUnavailable("switched off")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["a_gs2.png", "cells/a_gs2.json", "run.json", "REPORT.md"])
async def test_a_store_that_is_down_for_a_moment_costs_nothing(file: str) -> None:
    # On a busy machine a report alone takes longer than the quick pace waits for a store.
    rig = AuditRig(pace=replace(QUICK, outage_s=30.0))
    rig.blobs.before = Down(f"audit/run/{file}", 1)
    assert (await rig.run()).status == AuditStatus.SUCCEEDED


@pytest.mark.slow
@pytest.mark.parametrize("method", ["get", "update"])
async def test_a_job_store_that_is_down_for_a_moment_costs_nothing(
    rig_of: Callable[..., AuditRig], method: str
) -> None:
    rig = rig_of()
    rig.blobs.before = once_painted(lambda: setattr(rig.jobs, "before", Down("run", 3, method)))
    audit = await rig.run()
    assert (audit.status, audit.result_count, audit.attempt) == (AuditStatus.SUCCEEDED, 4, 1)


def once_painted(do: Callable[[], None]) -> Callable[[str, str], None]:
    """For `WatchedBlobs.before`: `do` is called when the first cell is stored."""
    todo = [do]

    def before(method: str, path: str) -> None:
        if method == "put" and "/cells/" in path and todo:
            todo.pop()()

    return before


@pytest.mark.slow
async def test_a_job_store_that_is_down_for_longer_than_a_lease_costs_no_finished_cell(
    rig_of: Callable[..., AuditRig],
) -> None:
    rig = rig_of(work={"lease_s": 0.5, "renew_s": 0.1})
    rig.blobs.before = once_painted(lambda: setattr(rig.jobs, "before", Down("run", 10**6, "update")))
    with pytest.raises(StoreUnavailable):
        await rig.run()
    kept = {name: cell for name, cell in (await rig.cells()).items() if cell.status == "succeeded"}
    assert 0 < len(kept) < 4
    again = rig.beside()
    audit = await again.resume()
    assert (audit.status, audit.attempt) == (AuditStatus.SUCCEEDED, 2)
    assert sorted([*kept, *again.replicas.begun]) == NAMES


@pytest.mark.slow
async def test_a_cell_that_cannot_be_stored_fails() -> None:
    rig = AuditRig()
    rig.blobs.before = Down("audit/run/a_gs2.png", 1000)
    audit = await rig.run()
    assert audit.status == AuditStatus.INCOMPLETE
    error = audit.cells["a_gs2"].error
    assert error is not None
    assert error.code == "store_unavailable"


class Killed(BaseException):
    """What a process that is gone does not catch."""


class KilledAt:
    """The process is killed at its nth call of a store: nothing is stored from then on. Looking whether the run was
    canceled goes on all the time, and is not counted."""

    def __init__(self, number: int) -> None:
        self.left = number

    def job(self, method: str, _job_id: str) -> None:
        self._count(method != "get")

    def blob(self, _method: str, _path: str) -> None:
        self._count(True)

    def _count(self, counts: bool) -> None:
        self.left -= counts
        if self.left < 0:
            raise Killed


@pytest.mark.slow
async def test_killed_anywhere_a_resume_completes_the_rest_and_paints_no_stored_cell_again(
    rig_of: Callable[..., AuditRig],
) -> None:
    number, kills = 0, 0
    while True:
        rig = rig_of(pace=replace(QUICK, write_s=0.2))
        killed = KilledAt(number)
        rig.blobs.before, rig.jobs.before = killed.blob, killed.job
        try:
            audit = await rig.run(matrix={"guidance_scales": (2.0,)})
            break
        except BaseExceptionGroup as e:
            assert e.subgroup(Killed) is not None
        except Killed:
            pass
        kills += 1
        stored = await rig.cells()
        again = rig.beside()
        audit = await again.resume()
        assert audit.status == AuditStatus.SUCCEEDED, f"killed at call {number}"
        assert not set(stored) & set(again.replicas.begun)
        assert sorted([*stored, *again.replicas.begun]) == ["a_gs2", "b_gs2"]
        number += 1
    assert audit.status == AuditStatus.SUCCEEDED
    assert kills > 20


@pytest.mark.slow
async def test_a_resume_paints_what_failed_again() -> None:
    rig = AuditRig()
    rig.replicas.errors["a_gs4"] = [OutOfMemory("full")]
    await rig.run()
    again = rig.beside()
    audit = await again.resume()
    assert (audit.status, audit.attempt) == (AuditStatus.SUCCEEDED, 2)
    assert again.replicas.begun == ["a_gs4"]
    assert again.compiled == []


@pytest.mark.slow
async def test_a_resume_looks_at_torch_compile_again_where_it_was_not_measured() -> None:
    name = "tiny-Q4_0"
    rig = AuditRig(variants={name: {}}, engines={name: [Scripted()]})
    busy = CompileVerdict(variant=name, viable=None, verdict="not looked at: no GPU was free")
    measured = CompileVerdict(variant=name, viable=True, verdict="proceed", eager_s=2.0)
    looked: list[CompileVerdict] = []

    async def compile_(variant: str, request: Any) -> CompileVerdict:
        looked.append(measured if looked else busy)
        return looked[-1]

    rig.auditor._compiler = compile_
    assert (await rig.run()).compile == (busy,)
    assert (await rig.resume()).compile == (measured,)
    assert (await rig.resume()).compile == (measured,)
    assert looked == [busy, measured]


async def test_a_stored_cell_has_its_picture() -> None:
    rig = AuditRig()
    seen: list[tuple[str, bool]] = []

    def look(method: str, path: str) -> None:
        if method == "put" and "/cells/" in path:
            name = path.rpartition("/")[2].removesuffix(".json")
            seen.append((name, image_path("run", name) in rig.plain._content.blobs))

    rig.blobs.before = look
    await rig.run()
    assert {name for name, _ in seen} == set(NAMES)
    assert all(is_there for _, is_there in seen)


async def test_a_stored_cell_of_other_parameters_is_painted() -> None:
    rig = AuditRig()
    rig.replicas.errors["b_gs4"] = [OutOfMemory("none left")]
    await rig.run()
    cell = (await rig.cells())["a_gs2"]
    other = cell.model_copy(update={"cell": cell.cell.model_copy(update={"steps": 8})})
    await rig.plain.put(cell_path("run", "a_gs2"), other.model_dump_json().encode(), content_type="application/json")
    again = rig.beside()
    assert (await again.resume()).status == AuditStatus.SUCCEEDED
    assert sorted(again.replicas.begun) == ["a_gs2", "b_gs4"]


async def test_a_resume_on_another_photo_is_refused() -> None:
    rig = AuditRig()
    rig.replicas.errors["b_gs4"] = [OutOfMemory("none left")]
    assert (await rig.run()).status == AuditStatus.INCOMPLETE
    kept = await rig.cells()
    await rig.plain.put(
        session_path(USER, SESSION, "original.jpg"), jpeg(photo()[::-1].copy()), content_type="image/jpeg"
    )
    again = rig.beside()
    audit = await again.resume()
    assert audit.status == AuditStatus.FAILED
    assert audit.error is not None and "replaced" in audit.error.message
    assert (again.replicas.begun, await again.cells()) == ([], kept)
