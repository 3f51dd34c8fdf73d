"""An audit's cells over the replicas: at once, behind each other, and again."""

import asyncio
import threading
from typing import Any

import pytest

from serve_app.audit.fan_out import fan_out
from serve_app.audit.record import AuditStatus
from serve_app.audit.waves import Wave
from serve_app.engine.pause import Pause
from serve_app.models import Progress, Variant
from serve_app.settings import AuditSettings, VariantSettings

from .audit_rig import AuditRig, LocalReplicas, scripted, until
from .engine_fixtures import request
from .rig import Held, Scripted


def up(count: int, **audit: Any) -> AuditRig:
    """A variant whose replicas all run."""
    engines = {"a": [Scripted() for _ in range(count)]}
    rig = AuditRig(variants=scripted("a", max_replicas=count), engines=engines, audit=audit)
    rig.replicas.awake["a"] = None
    return rig


def cells(count: int) -> dict[str, Any]:
    return {"guidance_scales": tuple(float(number) for number in range(1, count + 1))}


@pytest.mark.slow
async def test_a_replica_that_is_taken_is_asked_again() -> None:
    rig = up(2)
    held = Held()
    for engine in rig.engines["a"]:
        assert isinstance(engine, Scripted)
        engine.on_paint = held
    running = asyncio.create_task(rig.run(matrix=cells(3)))
    await until(lambda: len(rig.replicas.asked) > 5)
    assert len(rig.replicas.begun) == 2
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


@pytest.mark.slow
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


@pytest.mark.slow
async def test_a_second_cell_waits_at_a_replica_while_there_is_one_for_each() -> None:
    few, many = up(3), up(3)
    await few.run(matrix=cells(5))
    assert {places for _, places in few.replicas.asked} == {1}
    await many.run(matrix=cells(9))
    assert {places for _, places in many.replicas.asked} == {1, 2}


async def test_a_second_cell_may_wait_at_a_replica_until_all_run() -> None:
    rig = up(3)
    del rig.replicas.awake["a"]
    await rig.run(matrix=cells(3))
    assert rig.replicas.asked[0][1] == 2


@pytest.mark.parametrize(("growing", "most"), [(frozenset("a"), 3), (frozenset(), 6)])
async def test_where_more_replicas_could_be_started_no_more_is_asked_for(growing: frozenset[str], most: int) -> None:
    replicas = LocalReplicas({"a": [Pause(Variant(family="pause", pause_s=0.01), None, VariantSettings())] * 3})
    replicas.awake["a"] = None
    wave = Wave(wanted={"a": 3}, growing=growing)
    in_hand: list[int] = []

    async def count(progress: Progress) -> None:
        in_hand.append(replicas.in_hand("a"))

    async with fan_out(replicas, wave, AuditSettings()) as fan:
        await asyncio.gather(*(fan.measure("a", request(job_id=f"run/{n}"), count, trials=1) for n in range(9)))
    assert max(in_hand) == most
    assert len(replicas.begun) == 9


@pytest.mark.slow
async def test_a_variant_of_which_no_replica_runs_is_given_up_and_no_other() -> None:
    """Also where one cell is asked for at a time."""
    rig = AuditRig(variants=scripted("a", "b"), audit={"replica_wait_s": 1.0, "max_in_flight": 1})
    measure, asked = rig.replicas.measure, []

    async def queued(variant: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(variant)
        return await (asyncio.Event().wait() if variant == "b" else measure(variant, *args, **kwargs))

    rig.replicas.measure = queued  # type: ignore[method-assign]  # Serve's queue
    audit = await rig.run(matrix=cells(3))
    assert audit.status == AuditStatus.INCOMPLETE
    errors = {name: cell.error and (cell.error.code, cell.error.message) for name, cell in audit.cells.items()}
    why = "no replica of b has run for 1 s: something else has the GPU, or none starts"
    assert errors == {name: None if name[0] == "a" else ("audit_impossible", why) for name in errors}
    assert "b" in asked


@pytest.mark.slow
async def test_a_cell_waits_longer_for_a_replica_that_runs() -> None:
    rig = up(1, replica_wait_s=0.05)
    held = Held()
    (engine,) = rig.engines["a"]
    assert isinstance(engine, Scripted)
    engine.on_paint = held
    running = asyncio.create_task(rig.run(matrix=cells(2)))
    await until(lambda: len(rig.replicas.asked) == 2)
    clock = asyncio.get_running_loop().time
    limit_s = clock() + 2 * rig.settings.audit.replica_wait_s
    await until(lambda: clock() > limit_s)
    held.let_go.set()
    assert (await running).status == AuditStatus.SUCCEEDED
