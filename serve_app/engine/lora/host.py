"""From a job's LoRA to its adapter in host memory: the file is fetched, is the one that was registered, and is read.
Imports no torch."""

import asyncio
import hashlib
import logging
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...blobs import BlobStore
from ...errors import BlobNotFound, LoraChanged, LoraTooLarge, NotSupported, Truncated, UnknownModel
from ...models import LoraUse
from ...settings import LoraSettings
from .. import Generator

if TYPE_CHECKING:
    from .adapter import Adapter

log = logging.getLogger(__name__)

#: As `fetched`, of the generator that is to paint with it.
AdapterOf = Callable[[LoraUse], Awaitable["Adapter"]]


async def none(use: LoraUse) -> "Adapter":
    """The AdapterOf of a generator without a blob store."""
    raise NotSupported(f"this generator paints with no LoRA, so not with {use.name}")


async def fetched(use: LoraUse, *, blobs: BlobStore, engine: Generator, settings: LoraSettings) -> "Adapter":
    """The adapter, for this engine. Nothing of its file stays on the disk.

    Raises UnknownModel where the file is gone; LoraChanged where it is not the one that was registered; LoraRefused as
    `Generator.adapter`; StoreUnavailable.
    """
    if use.size_bytes > settings.file_bytes:
        raise LoraTooLarge(f"the LoRA {use.name} has {use.size_bytes} bytes, of {settings.file_bytes}")
    with tempfile.TemporaryDirectory(prefix="lora-") as folder:
        file = Path(folder) / "lora.safetensors"
        try:
            # Before it is downloaded: another one may have any size.
            info = await blobs.head(use.path)
            if info.size != use.size_bytes:
                raise LoraChanged(f"the LoRA {use.name} has {info.size} bytes, not the {use.size_bytes} registered")
            await blobs.download(use.path, file)
        except BlobNotFound as e:
            raise UnknownModel(f"the file of the LoRA {use.name} is gone") from e
        await asyncio.to_thread(verified_sha256, file, use.sha256, use.size_bytes)
        adapter = await asyncio.to_thread(engine.adapter, file, alpha=use.alpha, max_rank=settings.max_rank)
    extra = {"action": "lora_read", "sha256": use.sha256, "host_bytes": adapter.host_bytes}
    log.info("Read the LoRA %s", use.name, extra=extra)
    return adapter


def verified_sha256(file: Path, expected: str | None, size_bytes: int) -> str:
    """The file's SHA-256. Raises Truncated, or LoraChanged, where the file is not the expected one."""
    if (size := file.stat().st_size) < size_bytes:
        raise Truncated(f"the file has {size} bytes, of {size_bytes}")
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if expected not in (None, sha256):
        raise LoraChanged(f"the file's SHA-256 is {sha256}, not {expected}", sha256=sha256)
    return sha256
