"""LoRAs of a fill variant: what they paint is diffusers' and PEFT's to the bit where the weights are exact, none of it
is lost in the hoisted modulation or in a packing, and a file that does not fit is named."""

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter

from deployments.replica import open_engine
from serve_app.engine.cold_start import recorded
from serve_app.engine.device import Device
from serve_app.engine.flux import compiled, pipeline
from serve_app.engine.flux.fill import FluxFill
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.lora import fixed
from serve_app.engine.lora.read import read
from serve_app.engine.weights.fetch import Weights
from serve_app.errors import VariantLoadFailed
from serve_app.models import BUILT_IN, Pixels, VariantLora
from serve_app.settings import LoraSettings, Optimizations, Settings, VariantSettings

from . import lora_files
from .engine_fixtures import window

pytestmark = pytest.mark.xdist_group("variant-loras")

SIDE = 64
#: LoRAs by their scales: one, and two.
SCALES: Mapping[str, Sequence[float]] = {"one": (0.7,), "two": (0.7, -0.4)}


def layers(seed: int, **how: Any) -> lora_files.Layers:
    """Of every kind: FLUX.1-dev's input, blocks, modulation, and what the modulation is computed from."""
    made = lora_files.layers("flux", seed, **{"strength": 0.5, "modulation": True, **how})
    random = torch.Generator().manual_seed(seed)
    embedder = torch.randn(4, 64, generator=random) / 8, torch.randn(256, 4, generator=random) / 4
    return {**made, "transformer.x_embedder": embedder}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    return [written(tmp_path_factory, layers(seed)) for seed in (1, 2)]


def written(tmp_path_factory: pytest.TempPathFactory, made: lora_files.Layers) -> Path:
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    file.write_bytes(lora_files.file(made, "diffusers", dtype=torch.float32))
    return file


@pytest.fixture(scope="module")
def dense(tiny: TinyWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Q8_0 unpacked, as a safetensors file."""
    weights = Weights(tiny.transformer("flux1-fill-dev-Q8_0.gguf"), tiny.base)
    transformer = pipeline.build(weights, Device(wants_gpu=False)).transformer
    transformer.dequantize()
    file = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in transformer.state_dict().items()}, file)
    return file


@pytest.fixture(scope="module")
def load(tiny: TinyWeights, files: Sequence[Path]) -> Callable[..., FluxFill]:
    """An engine of `tiny-{variant}`, loaded, with the first LoRAs at these scales."""

    def load(
        variant: str = "Q8_0",
        scales: Sequence[float] = (),
        *,
        loras: Sequence[Path] = files,
        transformer: Path | None = None,
        dtype: Any = None,
        adaln_once: bool = True,
        **optimizations: Any,
    ) -> FluxFill:
        used = loras[: len(scales)]
        rows = [VariantLora(file=str(file), scale=scale) for file, scale in zip(used, scales, strict=True)]
        row = BUILT_IN[f"tiny-{variant}"].model_copy(update={"loras": tuple(rows)})
        file = transformer or tiny.transformer(f"flux1-fill-dev-{variant.partition('-')[0]}.gguf")
        served = VariantSettings(optimizations=Optimizations(**optimizations))
        engine = FluxFill(row, Weights(file, tiny.base, loras=tuple(used)), served, dtype=dtype, adaln_once=adaln_once)
        engine.load()
        return engine

    return load


@pytest.fixture(scope="module")
def paint(embeddings: bytes) -> Callable[[FluxFill], Pixels]:
    return lambda engine: engine.paint(window(SIDE, SIDE, embeddings=embeddings, steps=3))


def far(one: Pixels, other: Pixels) -> float:
    """The mean difference."""
    return float(np.abs(one.astype(int) - other).mean())


# What diffusers and PEFT paint.


@pytest.fixture(scope="module")
def theirs(tiny: TinyWeights, files: Sequence[Path], embeddings: bytes) -> Callable[..., Pixels]:
    @cache
    def painted(transformer: Path, scales: Sequence[float], dtype: torch.dtype, form: str) -> Pixels:
        pipe = pipeline.build(Weights(transformer, tiny.base), Device(wants_gpu=False, dtype=dtype))
        if form == "unpacked":
            pipe.transformer.dequantize()
        names = ["a", "b"][: len(scales)]
        for name, file in zip(names, files, strict=False):
            # Not where the file's begin: products of tensors that lie otherwise in memory are rounded otherwise.
            tensors = {key: tensor.clone() for key, tensor in safetensors.torch.load_file(file).items()}
            pipe.load_lora_weights(tensors, adapter_name=name)
        pipe.set_adapters(names, list(scales))
        if form != "packed":
            pipe.fuse_lora(adapter_names=names)
        given = window(SIDE, SIDE)
        prompt = safetensors.torch.load(embeddings)
        picture = pipe(
            image=given.pixels.astype(np.float32) / 255,
            mask_image=(given.mask >= 128).astype(np.float32),
            height=SIDE,
            width=SIDE,
            num_inference_steps=3,
            guidance_scale=given.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(given.seed),
            output_type="np",
            **{name: tensor.to(dtype) for name, tensor in prompt.items()},
        ).images[0]
        return np.asarray(np.rint(picture * 255), np.uint8)

    return painted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("adaln_once", [True, False], ids=["hoisted", "in every step"])
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("form", ["packed", "unpacked"])
@pytest.mark.parametrize(
    ("quant", "dtype"),
    [
        ("Q8_0", torch.float32),
        ("Q8_0", torch.bfloat16),
        ("Q4_0", torch.float32),
        ("Q5_K_S", torch.float32),
    ],
)
def test_pictures_are_those_of_diffusers_and_peft(
    tiny: TinyWeights, load: Any, paint: Any, theirs: Any, quant: str, dtype: Any, form: str, scales: Any,
    adaln_once: bool,
) -> None:  # fmt: skip
    engine = load(quant, scales, dtype=dtype, adaln_once=adaln_once, unpack=form == "unpacked")
    expected = theirs(tiny.transformer(f"flux1-fill-dev-{quant}.gguf"), scales, dtype, form)
    assert np.array_equal(paint(engine), expected)
    assert far(expected, paint(load(quant, dtype=dtype))) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_weights_that_are_dense_in_their_file_have_them_merged(dense: Path, load: Any, paint: Any, theirs: Any) -> None:
    scales = SCALES["two"]
    engine = load(scales=scales, transformer=dense)
    assert np.array_equal(paint(engine), theirs(dense, scales, torch.float32, "dense"))
    assert not any(module._forward_hooks for module in engine._pipeline.transformer.modules())


# Nothing is lost.


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{}, {"unpack": True}, {"adaln_once": False}], ids=["packed", "unpacked", "not hoisted"]
)
def test_a_lora_of_the_modulation_alone_arrives(
    load: Any, paint: Any, how: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    only = {name: pair for name, pair in layers(3).items() if "norm" in name}
    engine = load(scales=[1.0], loras=[written(tmp_path_factory, only)], **how)
    assert far(paint(engine), paint(load(**how))) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["Q4_0", "Q5_K_S", "Q8_0"])
def test_packed_weights_stay_as_they_are(load: Any, quant: str) -> None:
    plain, changed = (load(quant, scales)._pipeline.transformer.state_dict() for scales in ((), (1.0,)))
    assert plain.keys() == changed.keys()
    packed = [name for name, weight in plain.items() if isinstance(weight, GGUFParameter)]
    assert "transformer_blocks.0.attn.to_q.weight" in packed
    assert all(torch.equal(plain[name].data, changed[name].data) for name in packed)


@pytest.mark.slow
def test_repacked_weights_have_them_added_before(load: Any, paint: Any) -> None:
    """As near to the exact picture as a repacked one without LoRAs is to its own."""
    exact, base = (paint(load(scales=scales)) for scales in ((0.7,), ()))
    for adaln_once in (True, False):
        engine = load("Q8_0-w8a8", (0.7,), adaln_once=adaln_once)
        without = far(paint(load("Q8_0-w8a8", adaln_once=adaln_once)), base)
        assert far(paint(engine), exact) < max(2 * without, 1) < far(exact, base) / 2
        # What is not repacked and stays packed has hooks: without hoisting, the norms' linears.
        hooked = {name for name, module in engine._pipeline.transformer.named_modules() if module._forward_hooks}
        assert all("norm" in name for name in hooked) and bool(hooked) != adaln_once


# With the levers that are not exact.


@pytest.mark.slow
def test_a_step_cache_goes_on_working(load: Any, paint: Any) -> None:
    cache = {"kind": "first_block", "threshold": 0.2}
    engine, base = load(scales=(0.7,), step_cache=cache), load(step_cache=cache)
    picture = paint(engine)
    assert far(picture, paint(base)) > 1 and np.array_equal(paint(engine), picture)


@pytest.mark.slow
def test_compiled_blocks_have_them_and_no_graphs_more(
    load: Any, paint: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager, engine = load(scales=(0.7,)), load(scales=(0.7,), compile=True)
    before = compiled.graphs()
    picture = paint(engine)
    # The double blocks, which differ in what the LoRA has for them; the first single block, and those after it.
    assert compiled.graphs() - before <= 5
    assert far(picture, paint(eager)) < 0.1 < far(picture, paint(load()))


# What is refused.

BAD: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "a pickle": (lambda: lora_files.bad()["a pickle"][0], "not in the safetensors format"),
    "cut short": (lambda: lora_files.bad()["cut in its data"][0], "cut short"),
    "another model's": (lambda: lora_files.bad()["another model's"][0], "do not fit|no layer|fit no layer"),
    "a control LoRA's input": (
        lambda: lora_files.file({"transformer.x_embedder": (torch.ones(4, 128), torch.ones(256, 4))}, "diffusers"),
        "x_embedder",
    ),
    "a text encoder's": (
        lambda: lora_files.file(lora_files.layers("flux", text_encoders=True), "kohya"),
        "of text encoders, and would be lost",
    ),
    "a huge header": (lambda: struct.pack("<Q", 2**40) + b"{}", "not in the safetensors format"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_named(load: Any, tmp_path: Path, name: str) -> None:
    make, reason = BAD[name]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(make())
    with pytest.raises(VariantLoadFailed, match=rf"the LoRA {file}: .*({reason})"):
        load(scales=[1.0], loras=[file])


@pytest.mark.parametrize(("limit", "reason"), [({"file_bytes": 1000}, "bytes"), ({"max_rank": 3}, "rank is 4")])
def test_a_file_that_is_too_large_is_named(
    load: Any, monkeypatch: pytest.MonkeyPatch, files: Sequence[Path], limit: Any, reason: str
) -> None:
    monkeypatch.setattr(fixed, "_LIMITS", LoraSettings(**limit))
    with pytest.raises(VariantLoadFailed, match=rf"the LoRA {files[0]}: .*{reason}"):
        load(scales=[1.0])


# The built-in row.


def test_the_tiny_turbo_is_served_with_its_lora(tiny: TinyWeights, tmp_path: Path, paint: Any, load: Any) -> None:
    settings = Settings(variants={"tiny-Q8_0-turbo": VariantSettings()}, weights={"cache": tmp_path})
    with recorded() as parts:
        engine = open_engine("tiny-Q8_0-turbo", settings)
    assert parts["loras"].bytes == (tiny.folder / "turbo.safetensors").stat().st_size
    # It has something for each layer.
    assert (
        read(engine._weights.loras[0], "flux", engine._sizes, alpha=None, max_rank=4).layers.keys()
        == engine._sizes.keys()
    )
    assert far(paint(engine), paint(load())) > 1
