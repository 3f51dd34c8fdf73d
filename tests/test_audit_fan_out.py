"""An audit's cells over the replicas: at once, behind each other, and again."""

import asyncio
import threading
from typing import Any

import pytest

from serve_app.audits import AuditStatus

from .audit_rig import AuditRig, scripted, until
from .rig import Held, Scripted


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
