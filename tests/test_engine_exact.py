"""The exact optimizations change no bit: each is compared with diffusers' own pipeline, in one process, on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel

from serve_app.edit.paste import cut
from serve_app.edit.windows import Plan, plan
from serve_app.engine import Window
from serve_app.engine.device import Device
from serve_app.engine.flux import pipeline
from serve_app.engine.flux.modulation import Conditions, Modulation
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.painting import paint_canvas
from serve_app.engine.telea import inpaint
from serve_app.engine.weights.fetch import Weights
from serve_app.models import Box, Pixels, Progress, steps_run
from serve_app.parameters import CropStrategy
from serve_app.settings import WindowSettings

from .cpu import own_number_type
from .engine_fixtures import SIDE, flux_fill, photo, request, square_mask, window

QUANTS = (
    "Q8_0",
    pytest.param("Q4_0", marks=pytest.mark.slow),
    pytest.param("Q5_K_S", marks=pytest.mark.slow),
)
#: One process paints what all of them are compared with.
pytestmark = pytest.mark.xdist_group("exact")


def plain(tiny: TinyWeights, quant: str, dtype: torch.dtype) -> Callable[[Window], Pixels]:
    """diffusers' pipeline on the same files, called as its documentation does."""
    weights = Weights(tiny.transformer(f"flux1-fill-dev-{quant}.gguf"), tiny.base)
    pipe = pipeline.build(weights, Device(wants_gpu=False, dtype=dtype))

    def paint(given: Window) -> Pixels:
        height, width = given.mask.shape
        prompt = safetensors.torch.load(given.embeddings or b"")
        photo, hole = given.pixels.copy(), given.mask >= 128
        if given.strength < 1:
            photo[hole] = inpaint(given.pixels, given.mask)[hole]
        painted = pipe(
            image=photo.astype(np.float32) / 255,
            mask_image=hole.astype(np.float32),
            strength=given.strength,
            height=height,
            width=width,
            num_inference_steps=given.steps,
            guidance_scale=given.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(given.seed),
            output_type="np",
            **{name: tensor.to(dtype) for name, tensor in prompt.items()},
        ).images[0]
        return np.asarray(np.rint(painted * 255), np.uint8)

    return paint


@pytest.fixture(scope="module", params=QUANTS)
def quant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A CPU's, and a GPU's."""
    found: torch.dtype = getattr(torch, request.param)
    return found


@pytest.fixture(scope="module")
def another(embeddings: bytes) -> bytes:
    """Another prompt's embeddings."""
    return safetensors.torch.save({name: -tensor for name, tensor in safetensors.torch.load(embeddings).items()})


@dataclass(frozen=True, slots=True)
class WholeFrame:
    """A job with `crop_strategy: resize`."""

    plan: Plan
    frame: Pixels
    canvas: Pixels
    mask: Pixels


@pytest.fixture(scope="module")
def whole_frame() -> WholeFrame:
    frame, mask = photo(64, 64), np.zeros((64, 64), np.uint8)
    mask[5:58, 25:30] = 255
    settings = WindowSettings(buckets=((64, 64),), feather_px=2)
    planned = plan(mask, CropStrategy.RESIZE, settings)
    assert planned is not None
    return WholeFrame(planned, frame, *cut(frame, mask, planned, settings.feather_px))


@pytest.fixture(scope="module")
def cases(embeddings: bytes, another: bytes, whole_frame: WholeFrame) -> dict[str, Window]:
    """One, and others that differ from it in one thing each that the modulation depends on. Of the four steps of
    another strength three are left: the first of them is the second of the schedule."""
    small: dict[str, Any] = {"height": 64, "width": 64, "embeddings": embeddings, "steps": 2, "seed": 11}
    return {
        "one": window(**small),
        "another prompt": window(**small | {"embeddings": another}),
        "another size": window(**small | {"width": 96}),
        "another number of steps": window(**small | {"steps": 1}),
        "another guidance scale": window(**small | {"guidance_scale": 0.0}),
        "more steps": window(**small | {"steps": 4}),
        "another strength": window(**small | {"steps": 4, "strength": 0.7}),
        "a step at least": window(**small | {"steps": 4, "strength": 0.01}),
        "whole frame": window(
            64, 64, pixels=whole_frame.frame, mask=whole_frame.mask, embeddings=embeddings, steps=1, seed=3
        ),
    }


@pytest.fixture(scope="module")
def expected(tiny: TinyWeights, quant: str, dtype: torch.dtype, cases: dict[str, Window]) -> Callable[[str], Pixels]:
    """The plain pipeline's picture of a case, painted once."""
    torch.set_num_threads(2)
    paint = plain(tiny, quant, dtype)
    return cache(lambda case: paint(cases[case]))


OPTIMIZATIONS: dict[str, dict[str, bool]] = {
    "none": {"adaln_once": False, "one_encode": False},
    "adaln_once": {"one_encode": False},
    "one_encode": {"adaln_once": False},
    "unpack": {"adaln_once": False, "one_encode": False, "unpack": True},
    "the default": {},
    "all": {"unpack": True},
}


@pytest.mark.parametrize("optimizations", OPTIMIZATIONS)
def test_every_exact_lever_paints_the_plain_pipelines_bits(
    tiny: TinyWeights,
    quant: str,
    dtype: torch.dtype,
    expected: Callable[[str], Pixels],
    cases: dict[str, Window],
    optimizations: str,
) -> None:
    """One after the other on one engine, and the first again, from what was kept."""
    engine = flux_fill(tiny, quant, dtype=dtype, **OPTIMIZATIONS[optimizations])
    engine.load()
    for case in (*(case for case in cases if case != "whole frame"), "one"):
        assert np.array_equal(engine.paint(cases[case]), expected(case)), case


def test_the_vae_encodes_once_and_the_plain_pipeline_twice(tiny: TinyWeights, embeddings: bytes) -> None:
    counted = {}
    for one_encode in (True, False):
        engine = flux_fill(tiny, one_encode=one_encode)
        engine.load()
        vae = engine._pipeline.vae
        calls = 0
        encode = vae.encode

        def counting(*given: Any, encode: Callable[..., Any] = encode, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            return encode(*given, **named)

        vae.encode = counting
        engine.paint(window(64, 64, embeddings=embeddings, steps=1))
        counted[one_encode] = calls
    assert counted == {True: 1, False: 2}


def test_as_many_steps_run_as_of_the_pipeline() -> None:
    for steps in range(1, 101):
        scheduler = SimpleNamespace(timesteps=range(steps), order=1)
        for hundredths in range(1, 101):
            strength = hundredths / 100
            left, count = FluxFillPipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
            assert steps_run(steps, strength) == count == len(left) >= 1


def test_nothing_of_what_was_in_the_hole_is_painted_from(tiny: TinyWeights, embeddings: bytes) -> None:
    engine = flux_fill(tiny)
    engine.load()
    given: dict[str, Any] = {"embeddings": embeddings, "steps": 4, "strength": 0.5}
    leashed = photo(64, 64)
    leashed[square_mask(64, 64) > 0] = 255 - leashed[square_mask(64, 64) > 0]
    told: list[Progress] = []
    canvases = [
        paint_canvas(
            engine,
            request(canvas=pixels, mask=square_mask(64, 64), windows=[Box(x0=0, y0=0, x1=64, y1=64)], **given),
            told.append,
        ).images[0]
        for pixels in (photo(64, 64), leashed)
    ]
    assert np.array_equal(*canvases)
    assert [(one.step, one.steps) for one in told] == [(0, 2), (1, 2), (2, 2)] * 2


def wide(dtype: torch.dtype) -> FluxTransformer2DModel:
    """One block of each kind at FLUX.1's own width, where batched rows do differ.

    A matrix repeats 1024 rows, so that it is made quickly.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=384, out_channels=64, num_layers=1, num_single_layers=1, guidance_embeds=True
        )
    model = model.to_empty(device="cpu").to(dtype).eval()
    for parameter in model.parameters():
        rows = torch.randn(min(1024, len(parameter)), *parameter.shape[1:]) * 0.02
        parameter.data.view(-1, *rows.shape)[:] = rows
    return model


@pytest.mark.slow
@own_number_type
def test_at_flux_own_width_the_rows_are_the_plain_models_in_every_step(dtype: torch.dtype) -> None:
    """Where bfloat16 is emulated, its batched rows are bit-equal, and float32's are not."""
    model = wide(dtype)
    pooled, side = torch.randn(1, 768, dtype=dtype), SIDE // 16
    shared = {
        "hidden_states": torch.randn(1, side * side, 384, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 16, 4096, dtype=dtype),
        "pooled_projections": pooled,
        "img_ids": torch.zeros(side * side, 3, dtype=dtype),
        "txt_ids": torch.zeros(16, 3, dtype=dtype),
        "guidance": torch.full([1], 30.0),
        "return_dict": False,
    }
    timesteps = torch.linspace(1000, 300, 4)

    def steps() -> list[torch.Tensor]:
        return [model(timestep=t.expand(1).to(dtype) / 1000, **shared)[0] for t in timesteps]

    with torch.inference_mode():
        linears = [m.linear for m in model.modules() if type(m).__name__.startswith("AdaLayerNorm")]
        silenced = torch.nn.functional.silu(torch.randn(4, 3072, dtype=dtype))
        together = linears[0](silenced)
        assert not torch.equal(together, torch.cat([linears[0](row) for row in silenced.split(1)])), (
            "batched rows would be bit-equal here: this test shows nothing"
        )
        before = steps()
        modulation = Modulation(model, dtype)
        modulation.begin(Conditions(timesteps, 30.0, pooled))
        assert all(torch.equal(one, other) for one, other in zip(steps(), before, strict=True))


def test_the_modulations_weights_leave_the_model_and_are_unpacked_once(tiny: TinyWeights, embeddings: bytes) -> None:
    engine = flux_fill(tiny)
    engine.load()
    names = [name for name, _ in engine._pipeline.transformer.named_parameters()]
    assert names and not [name for name in names if "norm" in name and ".linear." in name]
    modulation = engine._modulation
    assert modulation is not None and modulation.host_bytes > 0
    places = [linear.weight.data_ptr() for linear in modulation._linears]
    engine.paint(window(64, 64, embeddings=embeddings))
    engine.paint(window(64, 64, embeddings=embeddings, guidance_scale=2.0))
    assert [linear.weight.data_ptr() for linear in modulation._linears] == places


def test_rows_are_computed_once_for_each_schedule_guidance_and_prompt(
    tiny: TinyWeights, embeddings: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[float] = []
    real = Modulation._computed

    def counting(self: Modulation, job: Conditions) -> Any:
        computed.append(job.guidance_scale)
        return real(self, job)

    monkeypatch.setattr(Modulation, "_computed", counting)
    engine = flux_fill(tiny)
    engine.load()
    for guidance_scale in (30.0, 30.0, 2.0, 30.0):
        engine.paint(window(64, 64, embeddings=embeddings, guidance_scale=guidance_scale))
    assert computed == [30.0, 2.0]


def test_what_is_kept_is_bounded(tiny: TinyWeights, embeddings: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.engine.flux.modulation._MAX_BYTES", 1)
    engine = flux_fill(tiny)
    engine.load()
    for guidance_scale in (30.0, 2.0):
        engine.paint(window(64, 64, embeddings=embeddings, guidance_scale=guidance_scale))
    assert engine._modulation is not None
    assert [key[1] for key in engine._modulation._kept] == [2.0]


@pytest.mark.parametrize("unpack", [False, True])
def test_a_window_forced_to_the_whole_frame_paints_the_plain_pipelines_bits(
    tiny: TinyWeights,
    quant: str,
    dtype: torch.dtype,
    expected: Callable[[str], Pixels],
    embeddings: bytes,
    whole_frame: WholeFrame,
    unpack: bool,
) -> None:
    """From the plan to the canvas that comes back, as a job goes, with `crop_strategy: resize`."""
    frame, mask, windows = whole_frame.frame, whole_frame.mask, whole_frame.plan.windows
    engine = flux_fill(tiny, quant, dtype=dtype, unpack=unpack)
    engine.load()
    asked = request(canvas=whole_frame.canvas, mask=mask, windows=windows, embeddings=embeddings, steps=1, seed=3)
    painted = paint_canvas(engine, asked, lambda progress: None).images[0]
    whole, is_painted = expected("whole frame"), mask > 0
    assert np.array_equal(painted[is_painted], whole[is_painted])
    assert np.array_equal(painted[~is_painted], frame[~is_painted])
