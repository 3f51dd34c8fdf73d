"""What a measured cell comes to: medians, rates and costs, and None where a figure cannot be had."""

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from serve_app.audit import figures
from serve_app.audit.record import CellResult
from serve_app.edit.cost import forward_flops
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.weights.lock import Lock, LockedRepo
from serve_app.models import BUILT_IN, Box, EditRequest, Measured, Trial, Variant
from serve_app.parameters import AuditRequest, Cell, Matrix
from serve_app.settings import Settings

from .audit_rig import AuditRig
from .engine_fixtures import flux_fill

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ONE = Box(x0=0, y0=0, x1=1024, y1=1024)
TWO = (ONE, Box(x0=0, y0=0, x1=512, y1=512))
L4 = {"device": "NVIDIA L4", "compute_capability": "8.9", "replica": "r1", "node": "n1", "versions": {"torch": "2.13"}}


def trial(wall_s: float, **changes: Any) -> Trial:
    stages = {"prepare_s": 1.0, "denoise_s": wall_s - 2, "decode_s": 1.0}
    given = {"gpu_ms": wall_s * 1000, "stages": stages, "peak_bytes": 10, "reserved_bytes": 20, **changes}
    return Trial(wall_s=wall_s, **given)


def result(
    *trials: Trial,
    where: Any = L4,
    windows: Any = TWO,
    variant: str = "Q4_0",
    price: float | None = None,
    optimizations: Any = None,
) -> CellResult:
    settings = Settings(variants={variant: {"optimizations": optimizations or {}}}, price_per_hour=0.5)
    request = AuditRequest(user_id="u", session_id="s", matrix=Matrix(variants=(variant,)), price_per_hour=price)
    cell: Cell = request.matrix.cells()[0]
    canvas = np.zeros((1024, 1024, 3), np.uint8)
    measured = Measured(canvas=canvas, trials=trials, repeats=True, where=where, windows=windows)
    return figures.succeeded(
        "name",
        cell,
        measured,
        request=request,
        settings=settings,
        locked=Lock(),
        image_path="p",
        started_at=NOW,
        finished_at=NOW,
    )


def test_the_first_painting_is_in_no_median() -> None:
    found = result(trial(90), trial(30), trial(12), trial(22))
    assert (found.first_wall_s, found.wall_s, found.gpu_ms) == (90, 22, 22_000)


def test_rates_are_of_the_denoising_of_all_windows() -> None:
    found = result(trial(90), trial(30))
    flops = forward_flops(1024, 1024) + forward_flops(512, 512)
    assert found.step_tflop == pytest.approx(flops / 1e12)
    assert found.steps_per_s == pytest.approx(28 * 2 / 28)
    assert found.tflop_per_s == pytest.approx(flops / 1e12 * 28 / 28)


def test_with_a_step_cache_nobody_knows_what_was_computed() -> None:
    found = result(trial(90), trial(30), optimizations={"step_cache": {"kind": "taylor_seer"}})
    assert found.tflop_per_s is None
    assert found.steps_per_s == pytest.approx(28 * 2 / 28)


def test_a_figure_that_one_trial_lacks_is_none() -> None:
    found = result(trial(90), trial(30), trial(20, gpu_ms=None, peak_bytes=None, reserved_bytes=None, stages={}))
    assert (found.gpu_ms, found.steps_per_s, found.tflop_per_s) == (None, None, None)
    assert (found.peak_bytes, found.reserved_bytes) == (10, 20)


def test_where_there_is_no_gpu_none_is_invented() -> None:
    where = {"device": "CPU x86_64", "compute_capability": "N/A"}
    bare = {"gpu_ms": None, "peak_bytes": None, "reserved_bytes": None}
    found = result(trial(3, **bare), trial(3, **bare), where=where)
    assert (found.gpu, found.sm) == ("CPU", "N/A")
    assert (found.gpu_ms, found.peak_bytes, found.reserved_bytes) == (None, None, None)


def test_where_it_was_painted() -> None:
    found = result(trial(3), trial(3))
    assert (found.gpu, found.sm, found.replica, found.node) == ("NVIDIA L4", "8.9", "r1", "n1")
    assert found.versions == {"torch": "2.13"}


@pytest.mark.parametrize(("price", "cost"), [(None, 0.005), (1.0, 0.01), (0.0, 0.0)])
def test_the_requests_price_goes_before_the_settings(price: float | None, cost: float) -> None:
    assert result(trial(90), trial(36), price=price).cost == pytest.approx(cost)


def test_a_family_without_steps_or_transformer_has_no_rates() -> None:
    found = result(trial(90), trial(30), variant="telea")
    assert (found.step_tflop, found.steps_per_s, found.tflop_per_s) == (None, None, None)
    paused = Variant(family="pause")
    assert figures.step_tflop(paused, TWO) is None


@pytest.mark.slow
def test_the_tiny_checkpoints_are_counted_with_their_own_shape(tiny: TinyWeights, tiny_klein: TinyWeights) -> None:
    bases = {"tiny-Q8_0": tiny.base, "tiny-klein": tiny_klein.folder / "klein-base"}
    for name, base in bases.items():
        config = json.loads((base / "transformer" / "config.json").read_text())
        blocks = config["num_layers"] + config["num_single_layers"]
        width = config["attention_head_dim"] * config["num_attention_heads"]
        variant = BUILT_IN[name]
        assert figures.TINY_SHAPES[variant.family] == {"blocks": blocks, "width": width}
        of_family = {"block_weights": 13, "pictures": 3} if name == "tiny-klein" else {}
        flops = forward_flops(1024, 1024, blocks=blocks, width=width, text_tokens=64, **of_family)
        assert figures.step_tflop(variant, [ONE]) == pytest.approx(flops / 1e12)


def test_revisions_are_those_that_are_pinned() -> None:
    commits = {name: name * 40 for name in "abc"}
    locked = Lock(repos={"o/weights": LockedRepo(revision=commits["a"], files={})})
    variant = Variant(family="flux-fill", repo="o/weights", file="f", base="o/base", base_revision=commits["b"])
    assert figures.revisions(variant, locked) == {"o/weights": commits["a"], "o/base": commits["b"]}
    own = variant.model_copy(update={"revision": commits["c"], "base_revision": None})
    assert figures.revisions(own, locked) == {"o/weights": commits["c"]}
    assert figures.revisions(Variant(family="telea"), locked) == {}


class OnePrompt:
    def __init__(self, embeddings: bytes) -> None:
        self._embeddings = embeddings
        self.asked: list[tuple[str, str]] = []

    async def encode(self, variant: str, prompt: str) -> bytes | None:
        self.asked.append((variant, prompt))
        return self._embeddings


@pytest.mark.slow
async def test_an_audit_of_the_real_pipeline(tiny: TinyWeights, embeddings: bytes) -> None:
    names = ("tiny-Q4_0", "tiny-Q8_0")
    engines = {name: [flux_fill(tiny, name.removeprefix("tiny-"))] for name in names}
    for (engine,) in engines.values():
        engine.load()
    prompts = OnePrompt(embeddings)
    rig = AuditRig(
        variants={name: {} for name in names},
        engines=engines,
        prompts=prompts,
        more={"windows": {"buckets": ((128, 128),), "context_px": 8}},
    )
    audit = await rig.run(matrix={"guidance_scales": (30.0,), "steps": (2,)})
    assert audit.status == "succeeded", audit.cells
    cells = await rig.cells()
    one = cells["tiny-Q4_0_gs30"]
    assert one.repeats
    assert one.steps_per_s and one.tflop_per_s and one.step_tflop
    assert one.tflop_per_s / one.step_tflop == pytest.approx(one.steps_per_s / (one.windows or 0))
    assert one.compared and one.compared.ssim is not None and one.compared.ssim < 1
    assert len(prompts.asked) == 1
    name, request = rig.compiled[0]
    assert name in names
    assert isinstance(request, EditRequest)
    assert request.embeddings == embeddings
