from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import FluxPipeline
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from safetensors.torch import save_file

from serve_app.engine.flux.dev import FluxDev
from serve_app.engine.flux.text_encoder import TextEncoder
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.generating import generate
from serve_app.engine.prompts import is_sound, key_of
from serve_app.engine.weights.fetch import Sources, Weights, fetch, fetch_text_encoders
from serve_app.errors import BlankImage, Canceled, CorruptWeights, InputError, PaintError
from serve_app.models import BUILT_IN, Progress
from serve_app.settings import Optimizations, VariantSettings

from .test_engine_generate import asked, no_step

VARIANT = BUILT_IN["tiny-flux-dev"]


def dev(weights: Weights, *, adaln_once: bool = True, **optimizations: Any) -> FluxDev:
    """Loaded."""
    served = VariantSettings(optimizations=Optimizations(**optimizations))
    engine = FluxDev(VARIANT, weights, served, adaln_once=adaln_once)
    engine.load()
    return engine


@pytest.fixture(scope="module")
def weights(tiny_dev: TinyWeights) -> Weights:
    return Weights(tiny_dev.transformer("flux1-dev-Q8_0.gguf"), tiny_dev.folder / "flux-dev-base")


@pytest.fixture(scope="module")
def engine(weights: Weights) -> Iterator[FluxDev]:
    engine = dev(weights)
    yield engine
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("unpack", [False, True])
def test_it_is_the_picture_of_diffusers_own_pipeline(
    engine: FluxDev, weights: Weights, embeddings: bytes, unpack: bool
) -> None:
    plain = dev(weights, adaln_once=False)
    prompt = safetensors.torch.load(embeddings)
    (image,) = FluxPipeline(**plain._pipeline.components)(
        height=64,
        width=96,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(1),
        **prompt,
    ).images
    request = asked(width=96, steps=3, embeddings=embeddings)
    ours = dev(weights, unpack=True) if unpack else engine
    assert np.array_equal(ours.generate(request, no_step), np.asarray(image))


def test_a_picture_is_the_same_whatever_was_made_before(engine: FluxDev, embeddings: bytes) -> None:
    request, told = asked(embeddings=embeddings, scheduler="euler", steps=3), list[int]()
    first = engine.generate(request, told.append)
    assert told == [1, 2, 3]
    for change in ({"seed": 2}, {"steps": 5}, {"width": 96}, {"guidance_scale": 1.0}):
        other = engine.generate(asked(embeddings=embeddings, **change), no_step)
        assert not np.array_equal(other, first)

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise Canceled("the painting was stopped")

    with pytest.raises(Canceled):
        generate(engine, request, stop)
    engine.warm_up([(1024, 1024)])
    assert np.array_equal(engine.generate(request, no_step), first)


@pytest.mark.slow
def test_a_file_of_safetensors_takes_the_place_of_gguf(
    engine: FluxDev, weights: Weights, embeddings: bytes, tmp_path: Path
) -> None:
    state = dev(weights, adaln_once=False)._pipeline.transformer.state_dict(keep_vars=True)
    plain = {name: dequantize_gguf_tensor(tensor).contiguous() for name, tensor in state.items()}
    save_file(plain, tmp_path / "dev.safetensors")
    request = asked(embeddings=embeddings)
    whole = dev(Weights(tmp_path / "dev.safetensors", weights.base), unpack=True)
    assert np.array_equal(whole.generate(request, no_step), engine.generate(request, no_step))

    del plain["transformer_blocks.0.attn.to_q.weight"]
    save_file(plain, tmp_path / "odd.safetensors")
    with pytest.raises(CorruptWeights, match=r"odd\.safetensors does not hold the model"):
        dev(Weights(tmp_path / "odd.safetensors", weights.base))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "dev.safetensors").read_bytes()[:-1])
    with pytest.raises(CorruptWeights, match="no whole safetensors file"):
        dev(Weights(tmp_path / "cut.safetensors", weights.base))


def test_the_weights_of_fill_are_refused(tiny: TinyWeights, weights: Weights) -> None:
    with pytest.raises(CorruptWeights, match="does not hold the model that"):
        dev(Weights(tiny.transformer("flux1-fill-dev-Q8_0.gguf"), weights.base))


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"width": 72}, InputError, "multiples of 16"),
        ({"scheduler": "ddim"}, InputError, "no scheduler ddim"),
        ({"embeddings": None}, PaintError, "a flux variant needs a prompt's embeddings"),
        ({"embeddings": b"odd"}, PaintError, "cannot be read"),
    ],
)
def test_what_it_cannot_make(
    engine: FluxDev, embeddings: bytes, change: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        engine.generate(asked(**{"embeddings": embeddings, **change}), no_step)


def test_a_picture_that_is_none_is_refused(engine: FluxDev, embeddings: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = torch.full((1, 3, 64, 64), torch.nan)
    monkeypatch.setattr(engine._pipeline.vae, "decode", lambda *_, **__: [lost])
    with pytest.raises(BlankImage, match="not finite"):
        engine.generate(asked(embeddings=embeddings), no_step)


@pytest.mark.slow
async def test_its_text_encoder_encodes_what_it_takes(tmp_path: Path) -> None:
    sources = Sources(cache=tmp_path)
    encoder = TextEncoder(await fetch_text_encoders(VARIANT, sources), threads=2)
    encoder.load()
    encoded = encoder.encode("a cat in the snow", VARIANT.max_prompt_tokens)
    assert is_sound(encoded, tokens=VARIANT.max_prompt_tokens)
    assert key_of(VARIANT, None, "a cat") != key_of(BUILT_IN["tiny-Q8_0"], None, "a cat")
    engine = dev(await fetch(VARIANT, sources))
    other = encoder.encode("a dog", VARIANT.max_prompt_tokens)
    pictures = [engine.generate(asked(embeddings=prompt), no_step).tobytes() for prompt in (encoded, other)]
    assert pictures[0] != pictures[1]
