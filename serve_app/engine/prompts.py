"""Prompt embeddings, encoded once and kept: in memory, and in the blob store for every other process.

What encodes them is `text_encoder`, elsewhere: nothing here imports torch.
"""

import asyncio
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from math import prod
from weakref import WeakValueDictionary

import numpy as np

from ..blobs import BlobStore
from ..errors import BlobError, BlobNotFound, StoreUnavailable
from ..models import Variant

log = logging.getLogger(__name__)

_CONTENT_TYPE = "application/octet-stream"
#: Twice the size of 512 tokens of T5-XXL in float32, `[1, 512, 4096]`.
_MAX_BYTES = 16_000_000
#: What comes before the tensors; ours takes 200 bytes.
_MAX_HEADER_BYTES = 16_384
#: Tensor -> its number of dimensions, of which the first is 1.
_TENSORS = {"prompt_embeds": 3, "pooled_prompt_embeds": 2}
#: By safetensors' name for a type: what holds its bits, and those that are all set in an infinity or a NaN.
_DTYPES = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F80_0000)}


def key_of(variant: Variant, base_revision: str | None, prompt: str) -> str:
    """SHA-256, in hex, of what the embeddings depend on: base, its revision, tokens and prompt, as a JSON list.

    `base_revision` is the commit in use; None where it is not pinned: what is cached may then be of an older one.
    """
    parts = [variant.base, base_revision, variant.max_prompt_tokens, prompt]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_sound(data: bytes, *, tokens: int) -> bool:
    """Whether these are whole safetensors bytes of the two tensors, shaped as `EditRequest` wants them for so
    many `tokens`, each number finite. Format: github.com/huggingface/safetensors.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        return False
    body = memoryview(data)[8 + header_bytes :]
    try:
        header = json.loads(data[8 : 8 + header_bytes])
        if not isinstance(header, dict) or not _is_known(header):
            return False
        first, last = sorted(_checked_range(header[name], body, dimensions) for name, dimensions in _TENSORS.items())
        is_whole = first[0] == 0 and first[1] == last[0] and last[1] == len(body)
        return is_whole and header["prompt_embeds"]["shape"][1] == tokens
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_known(header: dict[str, object]) -> bool:
    """Whether safetensors reads it, too: nothing beside the tensors but words about them."""
    words = header.get("__metadata__", {})
    are_words = isinstance(words, dict) and all(isinstance(word, str) for word in words.values())
    return are_words and header.keys() <= {"__metadata__", *_TENSORS}


def _checked_range(entry: dict[str, list[int]], body: memoryview, dimensions: int) -> tuple[int, int]:
    """Where the tensor begins and ends. Raises ValueError, KeyError or TypeError where the entry makes no sense."""
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    dtype, infinite = _DTYPES[str(entry["dtype"])]
    are_numbers = all(type(n) is int for n in (*shape, start, end))
    if len(shape) != dimensions or shape[0] != 1 or not are_numbers or min(*shape, end) <= 0:
        raise ValueError(f"a tensor of {shape}")
    bits = np.frombuffer(body[start:end], dtype)
    if start < 0 or bits.size != prod(shape) or bits.nbytes != end - start:
        raise ValueError(f"{shape} in bytes {start} to {end}")
    if np.any((bits & infinite) == infinite):
        raise ValueError("a number that is not finite")
    return start, end


class PromptCache:
    """Embeddings by key, in at most `max_bytes` of memory and under `prompts/{key}.safetensors` in the blob store."""

    def __init__(self, blobs: BlobStore, *, max_bytes: int = 256_000_000) -> None:
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._bytes = 0
        #: Least recently used first.
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        #: A lock lives as long as somebody waits for its key.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def get_or_encode(
        self, variant: Variant, base_revision: str | None, prompt: str, encode: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """The embeddings under `key_of` these, by `encode` where nobody has them.

        Of several callers at once one encodes; where it fails or is canceled, the next one tries with its own `encode`.
        A blob that is damaged is replaced; a blob store that fails is gone without. Raises what `encode` raises.
        """
        key = key_of(variant, base_revision, prompt)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            data = self._remembered(key) or await self._stored(key, variant.max_prompt_tokens)
            if data is None:
                data = await encode()
                await self._store(key, data)
            self._remember(key, data)
            return data

    def _remembered(self, key: str) -> bytes | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def _remember(self, key: str, data: bytes) -> None:
        if key not in self._kept and len(data) <= self._max_bytes:
            self._kept[key] = data
            self._bytes += len(data)
        while self._bytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= len(dropped)

    async def _stored(self, key: str, tokens: int) -> bytes | None:
        try:
            data, _ = await self._blobs.get(_path(key), max_bytes=_MAX_BYTES)
        except BlobNotFound:
            return None
        except (BlobError, StoreUnavailable) as e:
            log.warning("Could not read a prompt's embeddings: %s", e, extra={"action": "prompt_cache_read_failed"})
            return None
        if not is_sound(data, tokens=tokens):
            log.warning("The embeddings at %s are damaged", _path(key), extra={"action": "prompt_cache_corrupt"})
            return None
        return data

    async def _store(self, key: str, data: bytes) -> None:
        try:
            await self._blobs.put(_path(key), data, content_type=_CONTENT_TYPE)
        except (BlobError, StoreUnavailable) as e:
            log.warning("Could not store a prompt's embeddings: %s", e, extra={"action": "prompt_cache_write_failed"})


def _path(key: str) -> str:
    return f"prompts/{key}.safetensors"
