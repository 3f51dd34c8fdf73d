import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
import safetensors.torch
import torch

from serve_app.adapters.memory import MemoryBlobStore
from serve_app.blobs import BlobInfo
from serve_app.engine import prompts
from serve_app.engine.flux.text_encoder import TextEncoder
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.prompts import PromptCache, is_sound, key_of
from serve_app.errors import BlobNotFound, PaintError, ReplicaLost, StoreUnavailable
from serve_app.models import BUILT_IN, Variant

from .engine_fixtures import flux_fill, photo, window

#: With as many tokens as the fixture `embeddings` has.
VARIANT = BUILT_IN["tiny-Q4_0"].model_copy(update={"max_prompt_tokens": 16})


class Encoder:
    """Counts its calls. `gate` holds them back; `errors` are raised first."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.calls = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.errors: list[Exception] = []

    async def __call__(self) -> bytes:
        self.calls += 1
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop()
        return self.data


class BrokenStore(MemoryBlobStore):
    async def get(self, path: str, *, max_bytes: int) -> tuple[bytes, BlobInfo]:
        raise StoreUnavailable("the bucket is away")

    async def put(self, path: str, data: bytes, *, content_type: str, if_version: str = "*") -> BlobInfo:
        raise StoreUnavailable("the bucket is away")


@pytest.fixture
def store() -> MemoryBlobStore:
    return MemoryBlobStore(uuid4().hex)


@pytest.fixture
def encoder(embeddings: bytes) -> Encoder:
    return Encoder(embeddings)


def blob_of(prompt: str) -> str:
    return f"prompts/{key_of(VARIANT, None, prompt)}.safetensors"


async def test_a_prompt_is_encoded_once(store: MemoryBlobStore, encoder: Encoder) -> None:
    cache = PromptCache(store)
    for _ in range(2):
        assert await cache.get_or_encode(VARIANT, None, "a wall", encoder) == encoder.data
    assert encoder.calls == 1
    assert await PromptCache(store).get_or_encode(VARIANT, None, "a wall", encoder) == encoder.data
    assert encoder.calls == 1
    assert (await store.get(blob_of("a wall"), max_bytes=10**7))[0] == encoder.data


async def test_memory_is_asked_before_the_store(store: MemoryBlobStore, encoder: Encoder) -> None:
    cache = PromptCache(store)
    await cache.get_or_encode(VARIANT, None, "a wall", encoder)
    await store.delete(blob_of("a wall"))
    await cache.get_or_encode(VARIANT, None, "a wall", encoder)
    assert encoder.calls == 1


async def test_the_least_recently_used_is_dropped(store: MemoryBlobStore, encoder: Encoder) -> None:
    cache = PromptCache(store, max_bytes=2 * len(encoder.data))
    for prompt in ("a", "b", "a", "c"):
        await cache.get_or_encode(VARIANT, None, prompt, encoder)
    for prompt in ("a", "b", "c"):
        await store.delete(blob_of(prompt))
    encoder.calls = 0
    for prompt in ("a", "c"):
        await cache.get_or_encode(VARIANT, None, prompt, encoder)
    assert encoder.calls == 0
    await cache.get_or_encode(VARIANT, None, "b", encoder)
    assert encoder.calls == 1


async def test_what_is_larger_than_the_memory_is_not_kept_in_it(store: MemoryBlobStore, encoder: Encoder) -> None:
    cache = PromptCache(store, max_bytes=10)
    await cache.get_or_encode(VARIANT, None, "a wall", encoder)
    await store.delete(blob_of("a wall"))
    await cache.get_or_encode(VARIANT, None, "a wall", encoder)
    assert encoder.calls == 2


async def test_callers_at_once_share_one_encoding(store: MemoryBlobStore, encoder: Encoder) -> None:
    cache = PromptCache(store)
    found = await asyncio.gather(*(cache.get_or_encode(VARIANT, None, "a wall", encoder) for _ in range(5)))
    assert found == [encoder.data] * 5
    assert encoder.calls == 1


async def test_a_failed_encoding_is_the_failing_callers_alone(store: MemoryBlobStore, encoder: Encoder) -> None:
    encoder.errors = [ReplicaLost("the encoder died")]
    cache = PromptCache(store)
    calls = (cache.get_or_encode(VARIANT, None, "a wall", encoder) for _ in range(3))
    first, *others = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(first, ReplicaLost)
    assert others == [encoder.data] * 2
    assert encoder.calls == 2


async def test_a_canceled_encoding_is_the_canceled_callers_alone(store: MemoryBlobStore, encoder: Encoder) -> None:
    encoder.gate.clear()
    cache = PromptCache(store)
    first, second = (asyncio.create_task(cache.get_or_encode(VARIANT, None, "a wall", encoder)) for _ in range(2))
    while not encoder.calls:
        await asyncio.sleep(0)
    first.cancel()
    encoder.gate.set()
    assert await second == encoder.data
    assert first.cancelled()


async def test_one_prompt_does_not_wait_for_another(store: MemoryBlobStore, encoder: Encoder) -> None:
    slow = Encoder(encoder.data)
    slow.gate.clear()
    cache = PromptCache(store)
    waiting = asyncio.create_task(cache.get_or_encode(VARIANT, None, "slow", slow))
    while not slow.calls:
        await asyncio.sleep(0)
    assert await cache.get_or_encode(VARIANT, None, "fast", encoder) == encoder.data
    slow.gate.set()
    assert await waiting == encoder.data


@pytest.mark.parametrize("damage", [lambda sound: sound[:-1], lambda _: (10_000).to_bytes(8, "little") + b"[" * 10_000])
async def test_a_damaged_blob_is_replaced(
    store: MemoryBlobStore, encoder: Encoder, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    await store.put(blob_of("a wall"), damage(encoder.data), content_type="application/octet-stream")
    with caplog.at_level(logging.WARNING):
        assert await PromptCache(store).get_or_encode(VARIANT, None, "a wall", encoder) == encoder.data
    assert encoder.calls == 1
    assert "damaged" in caplog.text
    assert (await store.get(blob_of("a wall"), max_bytes=10**7))[0] == encoder.data


async def test_a_store_that_fails_makes_it_slower_not_broken(
    encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PromptCache(BrokenStore(uuid4().hex))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert await cache.get_or_encode(VARIANT, None, "a wall", encoder) == encoder.data
    assert encoder.calls == 1
    actions = [getattr(record, "action", "") for record in caplog.records]
    assert actions == ["prompt_cache_read_failed", "prompt_cache_write_failed"]


async def test_an_encoding_that_fails_is_not_stored(store: MemoryBlobStore, encoder: Encoder) -> None:
    encoder.errors = [ReplicaLost("the encoder died")]
    with pytest.raises(ReplicaLost):
        await PromptCache(store).get_or_encode(VARIANT, None, "a wall", encoder)
    with pytest.raises(BlobNotFound):
        await store.head(blob_of("a wall"))


def test_the_key_tells_apart_all_that_the_embeddings_depend_on() -> None:
    other_base = VARIANT.model_copy(update={"base": "o/r"})
    other_tokens = VARIANT.model_copy(update={"max_prompt_tokens": 65})
    keys = {
        key_of(VARIANT, None, "a wall"),
        key_of(VARIANT, "c" * 40, "a wall"),
        key_of(VARIANT, None, "a wall "),
        key_of(other_base, None, "a wall"),
        key_of(other_tokens, None, "a wall"),
    }
    assert len(keys) == 5
    assert key_of(Variant(family="flux-fill", base=VARIANT.base, max_prompt_tokens=16), None, "a wall") in keys


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


POOLED, EMBEDS = tensor([1, 2], 0, 8), tensor([1, 3, 2], 8, 32)


@pytest.mark.parametrize(
    ("data", "sound"),
    [
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=EMBEDS) + bytes(32), True),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=EMBEDS) + bytes(31), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=EMBEDS) + bytes(33), False),
        (header(pooled_prompt_embeds=POOLED) + bytes(8), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=tensor([2, 3, 1], 8, 32)) + bytes(32), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=tensor([1, 3, 3], 8, 32)) + bytes(32), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=tensor([1, 6], 8, 32)) + bytes(32), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=tensor([1, 3, 2], 8, 32, "I32")) + bytes(32), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=7) + bytes(32), False),
        (b"", False),
        (b"\xff" * 64, False),
        (b"<html>Sign in</html>", False),
        ((2).to_bytes(8, "little") + b"[]", False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=tensor([1, -3, -2], 8, 32)) + bytes(32), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=tensor([1, -1, -1], 8, 12)) + bytes(12), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=tensor([1, 4, 2], 8, 40)) + bytes(40), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=tensor([1, 3, 2], -24, 0)) + bytes(8), False),
        (
            header(pooled_prompt_embeds=tensor([1, 2], 24, 32), prompt_embeds=tensor([1, 3, 2], 8, 32)) + bytes(32),
            False,
        ),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=EMBEDS) + bytes(28) + b"\0\0\xc0\x7f", False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=tensor([1, 3, 0], 8, 8)) + bytes(8), False),
        ((10_000).to_bytes(8, "little") + b"[" * 10_000, False),
        (header(__metadata__={"a": "b"}, pooled_prompt_embeds=POOLED, prompt_embeds=EMBEDS) + bytes(32), True),
        (header(__metadata__={"a": 1}, pooled_prompt_embeds=POOLED, prompt_embeds=EMBEDS) + bytes(32), False),
        (header(__metadata__=[], pooled_prompt_embeds=POOLED, prompt_embeds=EMBEDS) + bytes(32), False),
        (header(more="x", pooled_prompt_embeds=POOLED, prompt_embeds=EMBEDS) + bytes(32), False),
        (header(pooled_prompt_embeds=tensor([1, 2], False, 8), prompt_embeds=EMBEDS) + bytes(32), False),
        (header(pooled_prompt_embeds=POOLED, prompt_embeds=EMBEDS, more=" " * 20_000) + bytes(32), False),
    ],
)
def test_soundness(data: bytes, sound: bool) -> None:
    assert is_sound(data, tokens=3) is sound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1.0])
def test_no_number_is_infinite(dtype: torch.dtype, value: float) -> None:
    embeds = torch.full((1, 3, 2), torch.finfo(dtype).max, dtype=dtype)
    embeds[0, 2, 1] = value
    data = safetensors.torch.save({"prompt_embeds": embeds, "pooled_prompt_embeds": torch.zeros((1, 2), dtype=dtype)})
    assert is_sound(data, tokens=3) is (value == 1.0)


def test_what_safetensors_writes_is_sound(embeddings: bytes) -> None:
    assert is_sound(embeddings, tokens=VARIANT.max_prompt_tokens)
    assert len(embeddings) < prompts._MAX_BYTES


@pytest.fixture(scope="module")
def text_encoder(tiny: TinyWeights) -> TextEncoder:
    encoder = TextEncoder(tiny.base, threads=2)
    encoder.load()
    return encoder


@pytest.mark.parametrize("prompt", ["no leash, no rope", "", "crème brûlée 🐕", "long " * 400])
def test_prompts_are_encoded_as_the_whole_pipeline_does(
    tiny: TinyWeights, text_encoder: TextEncoder, prompt: str
) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    whole = FluxFillPipeline(
        transformer=FluxTransformer2DModel.from_config(tiny.base / "transformer"),
        vae=AutoencoderKL.from_pretrained(tiny.base, subfolder="vae"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(tiny.base, subfolder="scheduler"),
        text_encoder=CLIPTextModel.from_pretrained(tiny.base, subfolder="text_encoder", dtype=torch.bfloat16),
        text_encoder_2=T5EncoderModel.from_pretrained(tiny.base, subfolder="text_encoder_2", dtype=torch.bfloat16),
        tokenizer=CLIPTokenizer.from_pretrained(tiny.base, subfolder="tokenizer"),
        tokenizer_2=T5TokenizerFast.from_pretrained(tiny.base, subfolder="tokenizer_2"),
    )
    with torch.inference_mode():
        prompt_embeds, pooled, _ = whole.encode_prompt(prompt, max_sequence_length=64)
    data = text_encoder.encode(prompt, 64)
    assert is_sound(data, tokens=64)
    found = safetensors.torch.load(data)
    assert found["prompt_embeds"].shape == (1, 64, 256)
    assert torch.equal(found["prompt_embeds"], prompt_embeds)
    assert torch.equal(found["pooled_prompt_embeds"], pooled)


def test_different_prompts_differ(text_encoder: TextEncoder) -> None:
    assert text_encoder.encode("a wall", 64) == text_encoder.encode("a wall", 64)
    assert text_encoder.encode("a wall", 64) != text_encoder.encode("a lawn", 64)


def test_the_engine_takes_what_the_encoder_makes(tiny: TinyWeights, text_encoder: TextEncoder) -> None:
    engine = flux_fill(tiny)
    engine.load()
    painted = engine.paint(window(steps=1, embeddings=text_encoder.encode("a wall", 64)))
    assert painted.shape == photo().shape


def test_an_encoder_that_is_closed_says_so(tiny: TinyWeights, tmp_path: Path) -> None:
    encoder = TextEncoder(tiny.base, threads=2)
    encoder.load()
    encoder.close()
    with pytest.raises(PaintError, match="not loaded"):
        encoder.encode("a wall", 64)
