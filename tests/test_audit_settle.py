"""Variants that share GPUs: one after the other, when the last one's are free."""

from typing import Any

from serve_app.audits import AuditStatus

from .audit_rig import AuditRig, scripted


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
