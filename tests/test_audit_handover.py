"""Variants that share GPUs: one after the other, when the last one's are free."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from serve_app.audit.record import AuditStatus
from serve_app.errors import ReplicaLost, UnknownAudit

from .audit_rig import AuditRig, scripted
from .rig import Prompts


def shared(**audit: Any) -> AuditRig:
    """Three variants on one GPU."""
    rig = AuditRig(variants=scripted("a", "b", "c", num_gpus=1), audit=audit)
    rig.replicas.gpu_count = 1
    return rig


@pytest.mark.slow
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


@pytest.mark.slow
async def test_a_variant_that_does_not_go_fails_those_after_it_and_no_others() -> None:
    rig = shared(replica_wait_s=0.3)
    rig.replicas.linger = {"a": None}
    audit = await rig.run()
    assert audit.status == AuditStatus.INCOMPLETE
    assert [name[0] for name in rig.replicas.begun] == ["a", "a"]
    errors = {name: cell.error and cell.error.code for name, cell in audit.cells.items()}
    assert errors == {name: None if name[0] == "a" else "audit_impossible" for name in errors}
    error = audit.cells["c_gs2"].error
    assert error is not None
    assert "after a" in error.message
    assert "a has 1, and keeps 0" in error.message


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


@pytest.mark.slow
async def test_the_request_says_how_many_gpus_the_cluster_can_have() -> None:
    rig = shared(gpus=0)
    assert (await rig.run(gpus=3)).status == AuditStatus.SUCCEEDED


MIB, GIB = 2**20, 2**30
READINGS = [
    ("the same", {"n/0": 10 * MIB, "n/1": 9 * GIB}, 9 * GIB + 10 * MIB),
    ("more than before", {"n/0": 9 * GIB, "n/1": 9 * GIB}, 18 * GIB),
    ("a device that is gone", {"n/0": 10 * MIB}, 10 * MIB),
    ("a device that came later", {"n/0": 10 * MIB, "n/1": 9 * GIB, "m/0": 20 * GIB}, 9 * GIB + 10 * MIB),
]


@pytest.mark.slow
@pytest.mark.parametrize(("later", "used"), [row[1:] for row in READINGS], ids=[row[0] for row in READINGS])
async def test_memory_is_noted_and_not_waited_for(later: Mapping[str, int], used: int) -> None:
    rig = shared(replica_wait_s=1.0)
    readings = iter([{"n/0": 10 * MIB, "n/1": 9 * GIB}] * 2)

    async def memory() -> Mapping[str, int]:
        return next(readings, later)

    rig.replicas.memory_used_bytes = memory  # type: ignore[method-assign]  # scripted
    audit = await rig.run(matrix={"variants": ("a", "b")})
    assert (audit.status, audit.result_count) == (AuditStatus.SUCCEEDED, 4)
    assert (audit.memory[1].used_bytes, audit.memory[1].floor_bytes) == (used, 9 * GIB + 10 * MIB)


def beside(**audit: Any) -> AuditRig:
    """Q4 is audited; Q8 shares its GPU, and is up for production."""
    rig = AuditRig(variants=scripted("Q4", "Q8", num_gpus=1), audit=audit)
    rig.replicas.gpu_count = 1
    rig.replicas.awake["Q8"] = None
    return rig


async def test_replicas_that_cannot_be_counted_fail_the_cells() -> None:
    rig = beside(replica_wait_s=0.1)

    async def counts() -> Any:
        raise ReplicaLost("the controller is gone")

    rig.replicas.counts = counts  # type: ignore[method-assign]  # an outage
    error = (await rig.run(matrix=ONE)).cells["Q4_gs2"].error
    assert error is not None
    assert "replicas that nobody can count" in error.message


ONE = {"variants": ("Q4",), "guidance_scales": (2.0,)}


async def test_a_gpu_that_production_has_is_waited_for_and_the_stage_says_so() -> None:
    rig = beside()
    running = asyncio.create_task(rig.run(matrix=ONE))
    async with asyncio.timeout(20):
        while (await stage(rig)) != "waiting for Q8 to give its GPU back":
            await asyncio.sleep(0.005)
    assert rig.replicas.asked == []
    rig.replicas.awake["Q8"] = 0
    assert (await running).status == AuditStatus.SUCCEEDED
    assert rig.replicas.beside == [("Q4", frozenset({"Q4"}))]


async def stage(rig: AuditRig) -> str:
    try:
        return (await rig.store.get("run")).stage
    except UnknownAudit:
        return ""


@pytest.mark.slow
async def test_a_gpu_that_production_never_gives_back_fails_the_cells_and_is_named() -> None:
    audit = await beside(replica_wait_s=0.3).run(matrix=ONE)
    error = audit.cells["Q4_gs2"].error
    assert error is not None
    assert (error.code, "Q8 has 1, and keeps 0" in error.message) == ("audit_impossible", True)


async def test_enough_gpus_beside_production_need_no_waiting() -> None:
    """Of two, production has one; it might take both."""
    rig = AuditRig(variants=scripted("Q4", num_gpus=1) | scripted("Q8", num_gpus=1, max_replicas=2), audit={"gpus": 2})
    rig.replicas.awake["Q8"] = None
    rig.replicas.memory_bytes = (MIB, 8 * GIB)
    assert (await rig.run(matrix=ONE)).status == AuditStatus.SUCCEEDED


async def test_a_variant_that_has_its_gpu_already_is_painted() -> None:
    """Its memory is its own."""
    rig = AuditRig(variants=scripted("Q4", "Q8", num_gpus=1), audit={"gpus": 1})
    rig.replicas.linger = {"Q4": None}
    rig.replicas.awake = {"Q4": None}
    rig.replicas.memory_bytes = (MIB, 8 * GIB)
    assert (await rig.run(matrix=ONE)).status == AuditStatus.SUCCEEDED


class Waking(Prompts):
    """A text encoder that takes memory of the GPU for good."""

    def __init__(self) -> None:
        super().__init__()
        self.rig: AuditRig | None = None

    async def encode(self, variant: str, prompt: str) -> bytes | None:
        assert self.rig
        self.rig.replicas.memory_bytes = (9 * GIB, 8 * GIB)
        return await super().encode(variant, prompt)


@pytest.mark.slow
async def test_the_floor_is_read_before_the_prompts_wake_a_text_encoder() -> None:
    prompts = Waking()
    rig = AuditRig(variants=scripted("Q4", "Q8", num_gpus=1), audit={"replica_wait_s": 0.3}, prompts=prompts)
    rig.replicas.gpu_count, rig.replicas.memory_bytes, prompts.rig = 1, (MIB, 8 * GIB), rig
    audit = await rig.run(matrix=ONE)
    (reading,) = audit.memory
    assert (reading.floor_bytes, reading.used_bytes) == (MIB, 9 * GIB)
