"""Pictures of tiny models with LoRAs: those of diffusers and PEFT, and nothing of one in the next."""

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from torch import nn

from serve_app.engine.flux import modulation
from serve_app.engine.flux.dev import FluxDev
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.generating import generate
from serve_app.engine.lora import hooks
from serve_app.engine.lora.adapter import Adapter
from serve_app.engine.sdxl.generator import Sdxl
from serve_app.engine.weights.fetch import Weights
from serve_app.errors import Canceled, LoraRefused, NotSupported, OutOfMemory, WrongModel
from serve_app.models import BUILT_IN, LoraUse, Pixels
from serve_app.settings import Optimizations, VariantSettings

from . import lora_files
from .test_engine_generate import asked, no_step

Lora = tuple[LoraUse, Adapter]

#: By family: layers of every kind.
ALL: Mapping[str, Any] = {"sdxl": {"convs": True, "text_encoders": True}, "flux": {"modulation": True}}


@dataclass(frozen=True)
class Painter:
    family: Any
    engine: Any
    folder: Path
    embeddings: bytes | None = None

    def file(self, seed: int, **how: Any) -> bytes:
        layers = lora_files.layers(self.family, seed, **{"strength": 0.5, **ALL[self.family], **how})
        return lora_files.file(layers, "diffusers", dtype=torch.float32)

    def lora(self, seed: int, scale: float = 0.8, **how: Any) -> Lora:
        return self.read(self.file(seed, **how), scale)

    def read(self, data: bytes, scale: float = 0.8) -> Lora:
        sha256 = hashlib.sha256(data).hexdigest()
        file = self.folder / f"{sha256}.safetensors"
        file.write_bytes(data)
        use = LoraUse(id="l", name="l", path=file.name, sha256=sha256, size_bytes=len(data), scale=scale)
        adapter: Adapter = self.engine.adapter(file, alpha=None, max_rank=256)
        return use, adapter

    def paint(self, *loras: Lora, on_step: Callable[[int], None] = no_step, **changes: Any) -> Pixels:
        request = asked(embeddings=self.embeddings, loras=[use for use, _ in loras], **changes)
        picture: Pixels = self.engine.generate(request, on_step, [adapter for _, adapter in loras])
        return picture

    def layer(self, name: str) -> nn.Module:
        find = getattr(self.engine, "_layer", None) or (lambda name: hooks.layer_of(self.engine._pipeline, name))
        return find(name)

    def hooked(self) -> int:
        return sum(len(self.layer(name)._forward_hooks) for name in self.engine._sizes)


def sdxl_of(weights: TinyWeights, **variant: Any) -> Sdxl:
    files = Weights(weights.folder / "sdxl.safetensors", weights.folder / "sdxl-base")
    engine = Sdxl(BUILT_IN["tiny-sdxl"].model_copy(update=variant), files, VariantSettings())
    engine.load()
    return engine


def dev_of(
    weights: TinyWeights, *, levers: Any = None, adaln_once: bool = True, dtype: Any = None, **variant: Any
) -> FluxDev:
    files = Weights(weights.transformer("flux1-dev-Q8_0.gguf"), weights.folder / "flux-dev-base")
    served = VariantSettings(optimizations=Optimizations(**levers or {}))
    row = BUILT_IN["tiny-flux-dev"].model_copy(update=variant)
    engine = FluxDev(row, files, served, adaln_once=adaln_once, dtype=dtype)
    engine.load()
    return engine


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: TinyWeights, tmp_path_factory: pytest.TempPathFactory) -> Painter:
    return Painter("sdxl", sdxl_of(tiny_sdxl), tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def flux(tiny_dev: TinyWeights, embeddings: bytes, tmp_path_factory: pytest.TempPathFactory) -> Painter:
    return Painter("flux", dev_of(tiny_dev), tmp_path_factory.mktemp("loras"), embeddings)


@pytest.fixture
def flux_as_on_a_gpu(flux: Painter, tiny_dev: TinyWeights) -> Painter:
    return replace(flux, engine=dev_of(tiny_dev, dtype=torch.bfloat16))


@pytest.fixture(params=["sdxl", "flux"])
def painter(request: pytest.FixtureRequest) -> Iterator[Painter]:
    painter: Painter = request.getfixturevalue(request.param)
    yield painter
    assert painter.hooked() == 0


def same(one: Pixels, other: Pixels) -> bool:
    return np.array_equal(one, other)


def far(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other).max())


# What diffusers and PEFT paint.


@pytest.fixture
def pipeline(painter: Painter, tiny_sdxl: TinyWeights, tiny_dev: TinyWeights) -> Callable[[], Pixels]:
    """diffusers' own, which PEFT may change, and how it makes the picture that `painter` makes."""
    request = asked(embeddings=painter.embeddings)
    told: dict[str, Any] = {"num_inference_steps": request.steps, "guidance_scale": request.guidance_scale}
    pipeline: Any
    if painter.embeddings is None:
        engine: Any = sdxl_of(tiny_sdxl)
        components = {**engine._pipeline.components, "scheduler": engine._scheduler}
        pipeline = StableDiffusionXLPipeline(**components, add_watermarker=False)
        told["prompt"] = request.prompt
    else:
        dtype = painter.engine._device.dtype
        pipeline = FluxPipeline(**dev_of(tiny_dev, adaln_once=False, dtype=dtype)._pipeline.components)
        prompt = safetensors.torch.load(painter.embeddings)
        told |= {name: tensor.to(dtype) for name, tensor in prompt.items()}
    pipeline.set_progress_bar_config(disable=True)

    def paint() -> Pixels:
        generator = torch.Generator().manual_seed(request.seed)
        return np.asarray(pipeline(width=64, height=64, generator=generator, **told).images[0])

    paint.pipeline = pipeline
    return paint


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("writer", ["diffusers", "kohya"])
@pytest.mark.parametrize("painter", ["sdxl", "flux", "flux_as_on_a_gpu"], indirect=True)
def test_pictures_are_those_of_diffusers_and_peft(painter: Painter, pipeline: Any, writer: lora_files.Writer) -> None:
    # Of kohya's modulation for FLUX.1, diffusers leaves layers out.
    how = {} if (writer, painter.family) == ("kohya", "flux") else ALL[painter.family]
    made = [lora_files.layers(painter.family, seed, strength=0.5, **how) for seed in (1, 2)]
    alpha = 2.0 if writer == "kohya" else None
    files = [lora_files.file(layers, writer, alpha=alpha, dtype=torch.float32) for layers in made]
    for name, layers in zip("ab", made, strict=True):
        tensors = lora_files.tensors(layers, writer, alpha=alpha, dtype=torch.float32)
        pipeline.pipeline.load_lora_weights(tensors, adapter_name=name)
    a, b = painter.read(files[0], 0.7), painter.read(files[1], -0.4)
    pictures = []
    for loras, names, scales in (
        ([a], ["a"], [0.7]),
        ([a, b], ["a", "b"], [0.7, -0.4]),
        ([b, a], ["b", "a"], [-0.4, 0.7]),
    ):
        pipeline.pipeline.set_adapters(names, scales)
        pictures.append(painter.paint(*loras))
        assert same(pictures[-1], pipeline())
    # Sums are rounded in the order that is asked for.
    assert far(pictures[1], pictures[2]) < far(pictures[0], pictures[1])


# Nothing of one picture in the next.


def test_each_picture_has_its_own_loras_and_no_other(painter: Painter) -> None:
    a, b = painter.lora(1), painter.lora(2)
    base, with_a, with_b = painter.paint(), painter.paint(a), painter.paint(b)
    assert min(far(base, with_a), far(base, with_b), far(with_a, with_b)) > 1
    for loras, picture in (((), base), ((a,), with_a), ((), base), ((b,), with_b), ((a,), with_a), ((), base)):
        assert same(painter.paint(*loras), picture)
    use, adapter = a
    assert same(painter.paint((use.model_copy(update={"scale": 0.0}), adapter)), base)
    assert not same(painter.paint((use.model_copy(update={"scale": -0.8}), adapter)), with_a)


def test_what_ends_a_painting_leaves_nothing(painter: Painter) -> None:
    a = painter.lora(1)
    base, with_a = painter.paint(), painter.paint(a)

    def stop(step: int) -> None:
        raise Canceled("the painting was stopped")

    with pytest.raises(Canceled):
        painter.paint(a, on_step=stop)
    assert painter.hooked() == 0 and same(painter.paint(), base)
    with pytest.raises(OutOfMemory):
        painter.paint(full(a))
    assert painter.hooked() == 0 and same(painter.paint(), base)
    assert same(painter.paint(a), with_a)


def full(lora: Lora) -> Lora:
    """One whose last layer finds no room on the device."""

    class Huge:
        def to(self, *_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    use, adapter = lora
    *_, last = adapter.layers
    layer = replace(adapter.layers[last], up=Huge())
    return use, replace(adapter, layers={**adapter.layers, last: layer})


def test_a_picture_that_ran_out_of_memory_is_begun_again_with_its_loras(painter: Painter) -> None:
    use, adapter = painter.lora(1)
    tries = 0

    def fail_once(progress: Any) -> None:
        nonlocal tries
        tries += progress.step == 1
        if tries == 1 and progress.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    request = asked(embeddings=painter.embeddings, loras=[use])
    (picture,) = generate(painter.engine, request, fail_once, adapters=[adapter]).images
    assert tries == 2 and same(picture, painter.paint((use, adapter)))


def test_a_file_that_is_refused_leaves_nothing(painter: Painter) -> None:
    base = painter.paint()
    for bad in ("a pickle", "cut in its data", "an infinite number", "another model's"):
        with pytest.raises(LoraRefused):
            painter.read(lora_files.bad()[bad][0])
    assert same(painter.paint(), base)


def test_an_adapter_of_another_model_is_refused(sdxl: Painter, flux: Painter) -> None:
    for painter, other in ((sdxl, flux), (flux, sdxl)):
        base = painter.paint()
        with pytest.raises(WrongModel, match="the model has no layer"):
            painter.paint(other.lora(1))
        assert painter.hooked() == 0 and same(painter.paint(), base)


@pytest.mark.slow
def test_after_a_hundred_loras_there_is_as_much_in_memory_as_after_ten(painter: Painter) -> None:
    files = [painter.file(seed, rank=64) for seed in range(5)]

    def once(number: int) -> None:
        painter.paint(painter.read(files[number % 5]), steps=1)

    def held() -> tuple[int, int]:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()), psutil.Process().memory_info().rss

    for number in range(10):
        once(number)
    tensors, rss = held()
    for number in range(90):
        once(number)
    tensors_then, rss_then = held()
    assert tensors_then == tensors and painter.hooked() == 0
    # A hundred of them would have more than 100 MB.
    assert rss_then - rss < 50_000_000


# Layers.


def test_each_layer_that_a_lora_can_name_is_called_as_a_module(painter: Painter) -> None:
    """One that computed with another's weight would leave hooks out."""
    called = set[str]()
    counters = [
        painter.layer(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in painter.engine._sizes
    ]
    painter.paint(seed=99, guidance_scale=6.5)
    for counter in counters:
        counter.remove()
    assert called == set(painter.engine._sizes)


def test_embeddings_of_sdxl_depend_on_a_loras_text_encoder_layers(sdxl: Painter) -> None:
    use, adapter = sdxl.lora(1)
    only = {name: layer for name, layer in adapter.layers.items() if name.startswith("text_encoder")}
    base = sdxl.paint()
    with_a = sdxl.paint((use, replace(adapter, layers=only)))
    assert far(base, with_a) > 1
    assert same(sdxl.paint(), base)


def test_modulation_is_the_same_hoisted_and_not(flux: Painter, tiny_dev: TinyWeights) -> None:
    plain = replace(flux, engine=dev_of(tiny_dev, adaln_once=False))
    a, b, c = flux.lora(1), flux.lora(2), flux.lora(3, modulation=False)
    assert not flux.engine._modulation.layers.keys().isdisjoint(a[1].layers)
    for loras in ((), (a,), (b,), (a, b), (c,), (b, c), (a,), ()):
        assert same(flux.paint(*loras), plain.paint(*loras))


def test_rows_are_kept_apart_by_what_changes_them(flux: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = flux.engine._modulation._kept
    a, b, c = flux.lora(1), flux.lora(2), flux.lora(3, modulation=False)
    kept.clear()
    pictures = [flux.paint(*loras) for loras in ((), (a,), (b,), (a, b))]
    assert len(kept) == 4
    # Neither the one without modulation nor a picture that was made before has rows of its own.
    flux.paint(c), flux.paint(a, c), flux.paint(a)
    assert len(kept) == 4
    monkeypatch.setattr(modulation, "_MAX_BYTES", 1)
    assert [same(flux.paint(*loras), one) for loras, one in zip(((), (a,), (b,), (a, b)), pictures, strict=True)] == [
        True
    ] * 4
    flux.paint(seed=2, guidance_scale=4.0)
    assert len(kept) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"repack": "w8a8"},
        {"levers": {"unpack": True}},
        {"levers": {"step_cache": {"kind": "first_block", "threshold": 0.2}}},
    ],
    ids=["w8a8", "unpacked", "step cache"],
)
def test_other_forms_of_the_weights_take_loras_too(flux: Painter, tiny_dev: TinyWeights, how: Any) -> None:
    other = replace(flux, engine=dev_of(tiny_dev, **how))
    a, b = other.lora(1), other.lora(2)
    base, with_a, with_b = other.paint(steps=4), other.paint(a, steps=4), other.paint(b, steps=4)
    assert min(far(base, with_a), far(base, with_b), far(with_a, with_b)) > 1
    for loras, picture in (((), base), ((a,), with_a), ((b,), with_b), ((), base)):
        assert same(other.paint(*loras, steps=4), picture)


def test_compiled_blocks_take_none(flux: Painter) -> None:
    compiled = FluxDev(
        BUILT_IN["tiny-flux-dev"], flux.engine._weights, VariantSettings(optimizations=Optimizations(compile=True))
    )
    with pytest.raises(NotSupported):
        compiled.adapter(Path("any"), alpha=None, max_rank=256)
