"""An audit's runs from request to report, over real engines without Ray."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve_app.audits import AuditStatus, cell_path, folder, image_path
from serve_app.errors import (
    BlobNotFound,
    GpuLost,
    IllegalTransition,
    OutOfMemory,
    ReplicaLost,
    StaleClaim,
    StoreUnavailable,
    VariantLoadFailed,
    VariantNotReady,
)
from serve_app.images import Pixels
from serve_app.paste import grow

from .audit_rig import QUICK, AuditRig, scripted
from .rig import Held, Scripted, jpeg, line_mask, photo, png

NAMES = ["a_gs2", "a_gs4", "b_gs2", "b_gs4"]


async def until(condition: Callable[[], bool]) -> None:
    """Returns when it is true; the test's own time limit ends it otherwise."""
    while not condition():
        await asyncio.sleep(0.005)


async def picture(rig: AuditRig, name: str) -> Pixels:
    data, _ = await rig.plain.get(image_path("run", name), max_bytes=10**8)
    return np.asarray(Image.open(BytesIO(data)))


# -- a run


async def test_a_run_paints_every_cell_and_writes_its_report() -> None:
    rig = AuditRig()
    audit = await rig.run()
    assert (audit.status, audit.result_count, audit.error) == (AuditStatus.SUCCEEDED, 4, None)
    assert sorted(await rig.cells()) == NAMES
    assert [f"{folder('run')}/{name}.png" in await rig.paths() for name in NAMES] == [True] * 4
    data, _ = await rig.plain.get(f"{folder('run')}/results.json", max_bytes=10**8)
    assert json.loads(data)["status"] == "succeeded"
    assert audit.recommended is not None
    assert [verdict.variant for verdict in audit.compile] == [audit.recommended.variant]


async def test_outside_the_mask_a_picture_is_the_photo() -> None:
    rig = AuditRig()
    rig.scripted["a"][0].fill = 255
    await rig.run()
    painted = await picture(rig, "a_gs2")
    original = np.asarray(Image.open(BytesIO(jpeg(photo()))))
    kept = grow(line_mask(), rig.settings.windows.feather_px) == 0
    assert np.array_equal(painted[kept], original[kept])
    assert (painted[line_mask() > 0] == 255).all()


async def test_each_cell_is_painted_with_its_own_values() -> None:
    rig = AuditRig(variants=scripted("a"))
    seen: list[tuple[str, float, int, int]] = []
    measure = rig.replicas.measure

    async def noted(variant: str, request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((request.job_id, request.guidance_scale, request.steps, request.seed))
        return await measure(variant, request, *args, **kwargs)

    rig.replicas.measure = noted  # type: ignore[method-assign]  # looked at, and passed on
    await rig.run(matrix={"guidance_scales": (2.5,), "steps": (3,), "seeds": (7, 8)})
    assert sorted(set(seen)) == [("run/a_gs2.5_seed7", 2.5, 3, 7), ("run/a_gs2.5_seed8", 2.5, 3, 8)]


async def test_a_result_has_the_first_painting_apart_and_medians_of_the_others() -> None:
    rig = AuditRig(variants=scripted("a"))
    await rig.run(runs=4, price_per_hour=3600.0)
    cell = (await rig.cells())["a_gs2"]
    walls = [trial.wall_s for trial in cell.trials]
    assert len(walls) == 4
    assert cell.first_wall_s == walls[0]
    assert cell.wall_s == cell.cost == sorted(walls[1:])[1]
    assert (cell.gpu, cell.sm, cell.gpu_ms, cell.peak_bytes) == ("CPU", "N/A", None, None)
    assert (cell.repeats, cell.windows, cell.image_path) == (True, 1, "audit/run/a_gs2.png")


async def test_pictures_are_compared_with_the_reference_variants() -> None:
    rig = AuditRig()
    rig.scripted["a"][0].fill = 255
    await rig.run(reference="b")
    cells = await rig.cells()
    compared = {name: cell.compared for name, cell in cells.items()}
    assert all(one is not None and one.outside_max == 0 for one in compared.values())
    assert compared["a_gs2"] and compared["a_gs2"].mae
    assert compared["b_gs2"] and compared["b_gs2"].mae is None


async def test_a_finished_cell_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    rig = AuditRig(variants=scripted("a"))
    rig.replicas.errors["a_gs4"] = [OutOfMemory("too large")]
    await rig.run()
    lines = sorted(line.partition(" ")[2] for line in capsys.readouterr().out.splitlines())
    assert lines[1] == "a_gs4 failed: out_of_memory: too large"
    assert lines[0].startswith("a_gs2 ")
    assert lines[0].endswith(" s)")


# -- what fails


async def test_one_failed_cell_is_reported_and_the_others_go_on() -> None:
    rig = AuditRig()
    rig.replicas.errors["a_gs4"] = [OutOfMemory("the device is full")]
    audit = await rig.run()
    failed = (await rig.cells())["a_gs4"]
    assert audit.status == AuditStatus.INCOMPLETE
    assert audit.result_count == 3
    assert failed.error == audit.cells["a_gs4"].error
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("out_of_memory", "the device is full")
    assert f"{folder('run')}/REPORT.md" in await rig.paths()


@pytest.mark.parametrize("error", [ReplicaLost, GpuLost, VariantNotReady])
async def test_a_replica_that_is_lost_costs_no_cell(error: type[Exception]) -> None:
    rig = AuditRig()
    rig.replicas.errors["a_gs2"] = [error("gone")] * 3
    assert (await rig.run()).status == AuditStatus.SUCCEEDED
    assert rig.replicas.begun.count("a_gs2") == 4


async def test_a_cell_whose_replicas_are_lost_again_and_again_fails() -> None:
    rig = AuditRig()
    rig.replicas.errors["a_gs2"] = [ReplicaLost("gone")] * 9
    assert (await rig.run()).status == AuditStatus.INCOMPLETE
    assert rig.replicas.begun.count("a_gs2") == 4


async def test_an_error_that_nobody_foresaw_is_the_cells_own() -> None:
    rig = AuditRig()
    rig.replicas.errors["b_gs2"] = [ZeroDivisionError("by zero")]
    await rig.run()
    error = (await rig.cells())["b_gs2"].error
    assert error is not None
    assert (error.code, error.message) == ("internal_error", "ZeroDivisionError: by zero")


async def test_a_cell_that_takes_too_long_is_stopped() -> None:
    rig = AuditRig(variants=scripted("a"), work={"inference_timeout_s": 0.05})
    held = Held()
    rig.scripted["a"][0].on_step = lambda step: held()
    running = asyncio.create_task(rig.run(matrix={"guidance_scales": (2.0,)}))
    await until(lambda: rig.replicas.seat("a").stopping_since is not None)
    held.let_go.set()
    error = (await running).cells["a_gs2"].error
    assert error is not None
    assert error.code == "inference_timeout"


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (png(np.zeros((80, 96), np.uint8)), "invalid_image"),
        (png(line_mask(30, 90)), "mask_mismatch"),
        (b"", "invalid_image"),
    ],
)
async def test_a_session_that_cannot_be_painted_fails_the_run(mask: bytes, code: str) -> None:
    rig = AuditRig()
    await rig.put_session()
    await rig.put_mask(mask)
    audit = await rig.queued()
    audit = await rig.auditor.run(audit.id, audit.attempt)
    assert audit.status == AuditStatus.FAILED
    assert audit.error is not None
    assert audit.error.code == code
    assert rig.replicas.begun == []


async def test_a_missing_session_fails_the_run() -> None:
    rig = AuditRig()
    audit = await rig.queued()
    audit = await rig.auditor.run(audit.id, audit.attempt)
    assert audit.error is not None
    assert audit.error.code == "missing_input"


async def test_a_variant_that_is_not_served_fails_the_run() -> None:
    rig = AuditRig()
    audit = await rig.run(matrix={"variants": ("a", "nobody")})
    assert audit.error is not None
    assert audit.error.code == "unknown_variant"
    assert rig.replicas.begun == []


class NoT5:
    """Prompts that cannot be encoded for one variant."""

    async def encode(self, variant: str, prompt: str) -> bytes | None:
        if variant == "tiny-Q4_0":
            raise VariantLoadFailed("T5 did not load")
        return None


async def test_a_prompt_that_cannot_be_encoded_fails_its_cells_alone() -> None:
    rig = AuditRig(
        variants={"a": scripted("a")["a"], "tiny-Q4_0": {}}, prompts=NoT5(), engines={"tiny-Q4_0": [Scripted()]}
    )
    audit = await rig.run(matrix={"guidance_scales": (2.0,)})
    assert audit.status == AuditStatus.INCOMPLETE
    assert {name: cell.status for name, cell in audit.cells.items()} == {
        "a_gs2": "succeeded",
        "tiny-Q4_0_gs2": "failed",
    }


async def test_a_picture_that_cannot_be_read_back_is_not_compared() -> None:
    rig = AuditRig()

    def lose(method: str, path: str) -> None:
        if (method, path) == ("get", image_path("run", "a_gs2")):
            raise BlobNotFound("lost")

    rig.blobs.before = lose
    audit = await rig.run(reference="b")
    cells = await rig.cells()
    assert cells["a_gs2"].compared is None
    assert cells["a_gs4"].compared is not None
    assert audit.result_count == 4


async def test_a_verdict_that_raises_says_so() -> None:
    rig = AuditRig()

    async def fails(name: str, request: Any) -> Any:
        raise VariantLoadFailed("no compiler here")

    rig.auditor._compiler = fails
    audit = await rig.run()
    assert [(one.viable, one.verdict) for one in audit.compile] == [(False, "not looked at: no compiler here")]
    assert audit.status == AuditStatus.SUCCEEDED


# -- replicas


async def test_a_replica_that_is_taken_is_asked_again() -> None:
    rig = AuditRig(variants=scripted("a"))
    rig.replicas.awake["a"] = None
    rig.scripted["a"][0].on_paint = held = Held()
    running = asyncio.create_task(rig.run(matrix={"guidance_scales": (1.0, 2.0, 4.0)}))
    await until(lambda: len(rig.replicas.asked) > 5)
    assert len(rig.replicas.begun) == 1
    held.let_go.set()
    assert (await running).status == AuditStatus.SUCCEEDED
    assert len(rig.replicas.begun) == 3


async def test_cells_are_fanned_out_over_a_variants_replicas() -> None:
    """Each waits in its painting until all paint."""
    together = threading.Barrier(3, timeout=20)
    engines = [Scripted() for _ in range(3)]

    def wait(step: int) -> None:
        if step == 1:
            together.wait()

    for engine in engines:
        engine.on_step = wait
    rig = AuditRig(variants=scripted("a", max_replicas=3), engines={"a": engines})
    audit = await rig.run(matrix={"guidance_scales": (1.0, 2.0, 4.0)})
    assert audit.status == AuditStatus.SUCCEEDED
    assert [engine.painted for engine in engines] == [2, 2, 2]


@pytest.mark.parametrize(("max_in_flight", "at_once"), [(1, 1), (2, 2), (None, 6)])
async def test_no_more_cells_ask_at_once_than_the_settings_allow(max_in_flight: int | None, at_once: int) -> None:
    rig = AuditRig(variants=scripted("a", "b", "c"), audit={"max_in_flight": max_in_flight})
    most = 0
    measure = rig.replicas.measure
    asking = 0

    async def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        try:
            return await measure(*args, **kwargs)
        finally:
            asking -= 1

    rig.replicas.measure = counted  # type: ignore[method-assign]  # looked at, and passed on
    await rig.run(matrix={"guidance_scales": (1.0, 2.0, 4.0, 8.0)})
    assert 0 < most <= at_once
    assert max_in_flight is None or most == at_once


async def test_a_second_cell_may_wait_at_a_replica_until_all_run() -> None:
    rig = AuditRig(variants=scripted("a"))
    await rig.run()
    assert rig.replicas.asked[0][1] == 2
    awake = AuditRig(variants=scripted("a"))
    awake.replicas.awake["a"] = None
    await awake.run()
    assert {places for _, places in awake.replicas.asked} == {1}


# -- GPUs that are shared


def shared(**audit: Any) -> AuditRig:
    """Three variants on one GPU."""
    rig = AuditRig(variants=scripted("a", "b", "c", num_gpus=1), audit=audit)
    rig.replicas.gpu_count = 1
    return rig


async def test_with_one_gpu_variants_are_painted_one_after_the_other() -> None:
    rig = shared()
    rig.replicas.linger = {"a": 3, "b": 2}
    rig.replicas.memory_bytes = (100 * 2**20, 8 * 2**30)
    audit = await rig.run()
    assert audit.status == AuditStatus.SUCCEEDED
    assert [name[0] for name in rig.replicas.begun] == ["a", "a", "b", "b", "c", "c"]
    assert rig.replicas.beside == [(name, frozenset({name})) for name in "aabbcc"]
    assert [(one.after, one.used_bytes, one.floor_bytes) for one in audit.memory] == [
        (after, 100 * 2**20, 100 * 2**20) for after in ("", "a", "b")
    ]


async def test_with_enough_gpus_they_are_painted_side_by_side() -> None:
    rig = shared(gpus=3)
    audit = await rig.run()
    assert audit.status == AuditStatus.SUCCEEDED
    assert audit.memory == ()


async def test_a_variant_that_does_not_go_fails_those_after_it_and_no_others() -> None:
    rig = shared(settle_s=0.05)
    rig.replicas.linger = {"a": None}
    audit = await rig.run()
    assert audit.status == AuditStatus.INCOMPLETE
    assert [name[0] for name in rig.replicas.begun] == ["a", "a"]
    errors = {name: cell.error and cell.error.code for name, cell in audit.cells.items()}
    assert errors == {name: None if name[0] == "a" else "audit_impossible" for name in errors}
    error = audit.cells["c_gs2"].error
    assert error is not None
    assert "after a" in error.message
    assert "a has 1 of its 0" in error.message


async def test_memory_that_does_not_become_free_fails_those_after_it_with_both_readings() -> None:
    rig = shared(settle_s=0.05)
    readings = iter([10 * 2**20])

    async def used() -> int | None:
        return next(readings, 9000 * 2**20)

    rig.replicas.memory_used_bytes = used  # type: ignore[method-assign]  # scripted
    audit = await rig.run()
    error = audit.cells["b_gs2"].error
    assert error is not None
    assert "9,000 MiB" in error.message
    assert "10 MiB" in error.message
    assert [(one.used_bytes, one.floor_bytes) for one in audit.memory] == [
        (10 * 2**20, 10 * 2**20),
        (9000 * 2**20, 10 * 2**20),
    ]
    assert audit.result_count == 2


async def test_where_no_gpu_can_become_free_nothing_is_painted() -> None:
    rig = AuditRig(variants=scripted("a", num_gpus=1) | scripted("held", num_gpus=1, min_replicas=1))
    rig.replicas.gpu_count = 1
    audit = await rig.run()
    assert audit.status == AuditStatus.FAILED
    assert audit.error is not None
    assert audit.error.code == "audit_impossible"
    assert "held keeps 1" in audit.error.message
    assert rig.replicas.asked == []
    assert await rig.paths() == ["audit/run/run.json"]


async def test_the_request_says_how_many_gpus_the_cluster_can_have() -> None:
    rig = shared(gpus=0)
    assert (await rig.run(gpus=3)).status == AuditStatus.SUCCEEDED


# -- cancel


async def held_in(rig: AuditRig, name: str) -> tuple[asyncio.Task[Any], Held]:
    """A run whose variant `name` is being painted."""
    held = Held()
    rig.scripted[name][0].on_step = lambda step: held()
    running = asyncio.create_task(rig.run())
    await asyncio.to_thread(held.entered.wait)
    return running, held


@pytest.mark.parametrize("way", ["signal", "store"])
async def test_a_canceled_run_stops_what_it_paints_and_keeps_what_is_painted(way: str) -> None:
    rig = AuditRig()
    running, held = await held_in(rig, "b")
    await until(lambda: {"a_gs2", "a_gs4"} <= set(_stored(rig)))
    if way == "signal":
        rig.auditor.cancel()
    else:
        await rig.store.cancel("run")
    held.let_go.set()
    audit = await running
    assert audit.status == AuditStatus.CANCELED
    assert {name: cell.status for name, cell in audit.cells.items()} == {
        "a_gs2": "succeeded", "a_gs4": "succeeded", "b_gs2": "waiting", "b_gs4": "waiting",
    }  # fmt: skip
    assert rig.scripted["b"][0].painted == 1
    assert f"{folder('run')}/REPORT.md" in await rig.paths()

    again = rig.beside()
    assert (await again.resume()).status == AuditStatus.SUCCEEDED
    assert sorted(again.replicas.begun) == ["b_gs2", "b_gs4"]


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


# -- outages and kills


class Down:
    """A store that is down for the next so many calls whose path starts with the prefix."""

    def __init__(self, prefix: str, calls: int, method: str = "put") -> None:
        self.prefix, self.calls, self.method = prefix, calls, method

    def __call__(self, method: str, path: str) -> None:
        if method == self.method and path.startswith(self.prefix) and self.calls:
            self.calls -= 1
            raise StoreUnavailable("switched off")


@pytest.mark.parametrize("file", ["a_gs2.png", "cells/a_gs2.json", "run.json", "REPORT.md"])
async def test_a_store_that_is_down_for_a_moment_costs_nothing(file: str) -> None:
    rig = AuditRig()
    rig.blobs.before = Down(f"audit/run/{file}", 1)
    assert (await rig.run()).status == AuditStatus.SUCCEEDED


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
    """The process is killed at its nth call of the store: nothing is stored from then on. Looking whether the run was
    canceled goes on all the time, and is not counted."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, method: str, path: str) -> None:
        self.left -= method != "head"
        if self.left < 0:
            raise Killed


async def test_killed_anywhere_a_resume_completes_the_rest_and_paints_no_stored_cell_again() -> None:
    number, kills = 0, 0
    while True:
        rig = AuditRig(pace=replace(QUICK, write_s=0.2))
        rig.blobs.before = KilledAt(number)
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


async def test_a_resume_paints_what_failed_again() -> None:
    rig = AuditRig()
    rig.replicas.errors["a_gs4"] = [OutOfMemory("full")]
    await rig.run()
    again = rig.beside()
    audit = await again.resume()
    assert (audit.status, audit.attempt) == (AuditStatus.SUCCEEDED, 2)
    assert again.replicas.begun == ["a_gs4"]
    assert again.compiled == []


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
