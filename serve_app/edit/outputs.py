"""Stores what an edit painted, so that no GPU paints what cannot be stored, nor anything twice.

Before a GPU is asked, the store has to have taken a write a short time ago. An upload that fails is tried for
`work.upload_timeout_s`; after that the bytes are kept in this process until the job's message comes again.
"""

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from .. import tracing
from ..blobs import ANY_VERSION, BlobInfo, BlobStore
from ..errors import BlobConflict, BlobNotFound, FluxFillError, StoreDenied, StoreUnavailable
from ..jobs.record import Artifact, Job, Quality

log = logging.getLogger(__name__)

#: A write that was taken so long ago proves that the next one will be, in seconds.
PROVEN_S = 30.0
#: How often a stored output may change under the claim's holder before the attempt is given up.
CONFLICTS = 5
#: Bytes of painted edits kept for their next delivery.
KEPT_BYTES = 256_000_000


@dataclass(frozen=True, kw_only=True)
class Painting:
    """What an attempt has to store."""

    #: Bytes and content type by role.
    files: Mapping[str, tuple[bytes, str]]
    #: Seconds by stage, as far as they were measured.
    seconds: Mapping[str, float]
    #: Device milliseconds; None where no GPU painted.
    gpu_ms: float | None
    #: Pixels of the edited photo; None where its maker knows it otherwise.
    width_height: tuple[int, int] | None = None
    #: None where it cannot be told.
    quality: Quality | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(len(data) for data, _ in self.files.values())


class Outputs:
    """The outputs of jobs in a blob store. For one event loop."""

    def __init__(self, blobs: BlobStore, *, upload_s: float) -> None:
        self._blobs, self._upload_s = blobs, upload_s
        self._probe_path = f"locks/writable-{uuid.uuid4().hex}"
        self._proven_at = -float("inf")
        self._probing = asyncio.Lock()
        #: By job, of which there may be several of one id after each other, and the versions of its inputs, the oldest
        #: first.
        self._kept: OrderedDict[tuple[str, datetime, tuple[str, ...]], Painting] = OrderedDict()

    async def check_writable(self) -> None:
        """Raises StoreUnavailable, and its StoreDenied, where the store does not take writes."""
        async with self._probing:
            if time.monotonic() - self._proven_at < PROVEN_S:
                return
            await self._write(self._probe_path, b"1", content_type="text/plain")
            with suppress(FluxFillError):
                # Whether it may be deleted is beside the point.
                await self._blobs.delete(self._probe_path)

    async def versions(self, paths: Mapping[str, str]) -> dict[str, str]:
        """The stored version at each path; empty where there is nothing."""
        return {role: await self._version(path) for role, path in paths.items()}

    async def store(
        self,
        painting: Painting,
        paths: Mapping[str, str],
        versions: Mapping[str, str],
        confirm: Callable[[], Awaitable[None]],
    ) -> tuple[Artifact, ...]:
        """Write each output to its path, over the one of `versions`, so that a stale worker's late write is either
        refused or written over. `confirm` is awaited before each write.

        Raises BlobConflict where others keep writing; StoreUnavailable after `upload_s`, and its StoreDenied at once;
        what `confirm` raises.
        """
        written: list[Artifact] = []
        with tracing.span("upload"):
            for role, (data, content_type) in painting.files.items():
                path, version = paths[role], versions[role]
                for _ in range(CONFLICTS):
                    write = partial(self._write, path, data, content_type=content_type, if_version=version)
                    try:
                        info = await self._insist(write, confirm)
                        of = {
                            "path": path,
                            "version": info.version,
                            "content_type": content_type,
                            "size_bytes": len(data),
                        }
                        if painting.quality is not None:
                            of["seed"] = painting.quality.seed
                        if painting.width_height and role == "edited":
                            of |= dict(zip(("width", "height"), painting.width_height, strict=True))
                        written.append(Artifact(role=role, **of))
                        break
                    except BlobConflict:
                        version = await self._version(path)
                else:
                    raise BlobConflict(
                        f"other writers replaced {path} {CONFLICTS} times while it was being stored", path=path
                    )
        # The edited photo is stored last, and is the first of the job's pictures.
        return tuple(reversed(written))

    def keep(self, job: Job, inputs: Sequence[str], painting: Painting) -> None:
        """Keep what could not be stored; `inputs` are the versions it was painted from."""
        self._kept[job.id, job.created_at, tuple(inputs)] = painting
        while sum(kept.size for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)

    def kept(self, job: Job, inputs: Sequence[str]) -> Painting | None:
        """What `keep` was given, once."""
        return self._kept.pop((job.id, job.created_at, tuple(inputs)), None)

    async def _insist(
        self, write: Callable[[], Awaitable[BlobInfo]], confirm: Callable[[], Awaitable[None]]
    ) -> BlobInfo:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_delay(self._upload_s),
            wait=wait_random_exponential(multiplier=0.5, max=15),
            reraise=True,
        ):
            await confirm()
            with attempt:
                return await write()
        raise AssertionError("tenacity raises what the last attempt did")

    async def _write(self, path: str, data: bytes, *, content_type: str, if_version: str = ANY_VERSION) -> BlobInfo:
        try:
            info = await self._blobs.put(path, data, content_type=content_type, if_version=if_version)
        except StoreUnavailable:
            self._proven_at = -float("inf")
            raise
        self._proven_at = time.monotonic()
        return info

    async def _version(self, path: str) -> str:
        try:
            return (await self._blobs.head(path)).version
        except BlobNotFound:
            return ""


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, StoreUnavailable) and not isinstance(error, StoreDenied)
