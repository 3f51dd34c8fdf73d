"""An audit's runs from request to report, over real engines without Ray."""

import asyncio
import json
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from serve_app.audit.files import read_cells
from serve_app.audit.record import AuditStatus, folder, image_path
from serve_app.edit.paste import grow
from serve_app.edit.session import session_path
from serve_app.errors import BlobNotFound, GpuLost, OutOfMemory, ReplicaLost, VariantLoadFailed, VariantNotReady
from serve_app.models import Pixels
from serve_app.settings import WindowSettings

from .audit_rig import NAMES, AuditRig, scripted, until
from .pictures import kept
from .rig import SESSION, USER, Held, Scripted, jpeg, line_mask, photo, png


async def picture(rig: AuditRig, name: str) -> Pixels:
    data, _ = await rig.plain.get(image_path("run", name), max_bytes=10**8)
    return np.asarray(Image.open(BytesIO(data)))


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


async def test_a_cell_starts_when_an_engine_begins_with_it() -> None:
    rig = AuditRig(variants=scripted("a"))
    rig.scripted["a"][0].on_step = lambda step: rig.clock.advance(1)
    await rig.run()
    one, other = sorted((await rig.cells()).values(), key=lambda cell: str(cell.started_at))
    assert one.started_at is not None and one.finished_at is not None and other.started_at is not None
    assert other.started_at > one.started_at
    assert (one.finished_at - one.started_at).total_seconds() >= 4


async def test_outside_the_grown_mask_a_picture_is_the_photo() -> None:
    rig = AuditRig()
    rig.scripted["a"][0].fill = 255
    await rig.run()
    painted = await picture(rig, "a_gs2")
    original = np.asarray(Image.open(BytesIO(jpeg(photo()))))
    outside = kept(line_mask(), rig.settings.windows)
    assert np.array_equal(painted[outside], original[outside])
    assert (painted[line_mask() > 0] == 255).all()


@pytest.mark.slow
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


async def test_all_variants_are_cut_alike_by_the_prompt_tokens_of_the_reference() -> None:
    """With its own, which make small windows cheaper, the first would have more windows."""
    rig = AuditRig(variants={**scripted("a", max_prompt_tokens=64), **scripted("b")})
    await rig.put_session()
    mask = cv2.line(np.zeros((800, 960), np.uint8), (20, 10), (930, 740), 255, 5)
    for name, data in (("original.jpg", jpeg(photo(960, 800))), ("mask_auto.png", png(mask))):
        await rig.plain.put(session_path(USER, SESSION, name), data, content_type="image/png")
    windows = {}
    for reference in "ab":
        matrix = {"guidance_scales": (2.0,), "mask_grows": (0.0,)}
        audit = await rig.store.create(rig.request(reference=reference, matrix=matrix), reference)
        await rig.auditor.run(audit.id, audit.attempt)
        windows[reference] = {cell.windows for cell in (await read_cells(rig.plain, reference)).values()}
    (of_a,), (of_b,) = windows["a"], windows["b"]
    assert of_a > of_b > 1


async def test_each_cell_is_painted_and_measured_with_its_own_growth_of_the_mask() -> None:
    rig = AuditRig(variants=scripted("a"))
    rig.scripted["a"][0].fill = 255
    await rig.run(matrix={"guidance_scales": (2,), "mask_grows": (0, 0.05), "crops": ("auto", "resize")})
    cells = await rig.cells()
    assert {name: cell.cell.mask_grow for name, cell in cells.items()} == {
        "a_gs2_auto_grow0": 0,
        "a_gs2_resize_grow0": 0,
        "a_gs2_auto_grow0.05": 0.05,
        "a_gs2_resize_grow0.05": 0.05,
    }
    for name, cell in cells.items():
        white = (await picture(rig, name) == 255).all(axis=-1)
        # 5% of 96 px.
        assert (white >= (grow(line_mask(), 5 if cell.cell.mask_grow else 0) > 0)).all(), name
        assert white[kept(line_mask(), WindowSettings(mask_grow=cell.cell.mask_grow))].sum() == 0, name
        assert cell.compared is not None and cell.compared.outside_max == 0, name
    data, _ = await rig.plain.get(f"{folder('run')}/results.json", max_bytes=10**8)
    assert [cell["mask_grow"] for cell in json.loads(data)["cells"]] == [0, 0.05, 0, 0.05]


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


@pytest.mark.slow
@pytest.mark.parametrize("error", [ReplicaLost, GpuLost, VariantNotReady])
async def test_a_replica_that_is_lost_costs_no_cell(error: type[Exception]) -> None:
    rig = AuditRig()
    rig.replicas.errors["a_gs2"] = [error("gone")] * 3
    assert (await rig.run()).status == AuditStatus.SUCCEEDED
    assert rig.replicas.begun.count("a_gs2") == 4


@pytest.mark.slow
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
    await until(lambda: rig.replicas.slot("a").stopping_since is not None)
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
    assert [(one.viable, one.verdict) for one in audit.compile] == [(None, "not looked at: no compiler here")]
    assert audit.compile_viable is None
    assert audit.status == AuditStatus.SUCCEEDED
