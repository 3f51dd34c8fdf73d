"""One attempt at one edit: the session's blobs in, the edited photo and its preview out."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from . import images, masks, paste, windows
from .errors import (
    BlobConflict,
    BlobNotFound,
    BlobTooLarge,
    ImageTooLarge,
    InferenceTimeout,
    MissingInput,
)
from .images import Photo, Pixels
from .jobs import Job, Progress, Timings
from .messages import CropStrategy
from .ports import BlobStore, OnProgress, Painted, Painter, PaintRequest, PromptEncoder
from .settings import Limits, Settings

T = TypeVar("T")

#: Roles of what an edit writes, and their file names; see docs/architecture.md.
OUTPUTS = {"edited": "edited.jpg", "preview": "preview.jpg"}
INPUTS = {"original": "original.jpg", "mask": "mask_auto.png"}

#: How often a stored output may change under the claim's holder before the attempt is given up.
CONFLICTS = 5


def session_path(user_id: str, session_id: str, name: str) -> str:
    """Both ids must have passed `messages.ID_PATTERN`."""
    return f"users/{user_id}/sessions/{session_id}/{name}"


async def read_input(blobs: BlobStore, user_id: str, session_id: str, role: str, limits: Limits) -> bytes:
    """The session's `original` or `mask`. Raises MissingInput, ImageTooLarge, StoreUnavailable."""
    path = session_path(user_id, session_id, INPUTS[role])
    try:
        data, _ = await blobs.get(path, max_bytes=limits.image_bytes)
    except BlobNotFound as e:
        raise MissingInput(f"{path} is not in the blob store", path=path) from e
    except BlobTooLarge as e:
        raise ImageTooLarge(e.message, path=path) from e
    return data


async def encode_within(prompts: PromptEncoder, variant: str, prompt: str, limit_s: float) -> bytes | None:
    """The prompt's embeddings. Raises InferenceTimeout after `limit_s` seconds, and what the encoder raises."""
    try:
        async with asyncio.timeout(limit_s):
            return await prompts.encode(variant, prompt)
    except TimeoutError as e:
        raise InferenceTimeout(f"encoding the prompt took longer than {limit_s:g} s", limit_s=limit_s) from e


async def begun_within(
    limit_s: float, variant: str, paint: Callable[[OnProgress], Awaitable[T]], on_progress: OnProgress
) -> T:
    """What `paint` returns. Raises InferenceTimeout once `limit_s` seconds have passed since its first report: waiting
    for a replica is not inference."""
    timeout = asyncio.timeout(None)
    try:
        async with timeout:

            async def started(progress: Progress) -> None:
                if timeout.when() is None:
                    timeout.reschedule(asyncio.get_running_loop().time() + limit_s)
                await on_progress(progress)

            return await paint(started)
    except TimeoutError as e:
        if not timeout.expired():
            raise
        raise InferenceTimeout(f"painting on {variant} took longer than {limit_s:g} s", limit_s=limit_s) from e


@dataclass(frozen=True, kw_only=True)
class Result:
    #: Blob paths by role.
    artifacts: dict[str, str]
    timings: Timings


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    photo: Photo
    mask: Pixels
    #: None where the mask is empty.
    plan: windows.Plan | None
    canvas: Pixels | None = None
    canvas_mask: Pixels | None = None


@dataclass
class _Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started


class Editor:
    """Runs attempts. Holds no state of any job, so many run at once."""

    def __init__(
        self,
        *,
        blobs: BlobStore,
        painter: Painter,
        prompts: PromptEncoder,
        settings: Settings,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._blobs, self._painter, self._prompts = blobs, painter, prompts
        self._settings, self._pool = settings, pool

    async def run(self, job: Job, *, on_progress: OnProgress, confirm: Callable[[], Awaitable[None]]) -> Result:
        """Paint `job` and store the result; `confirm` is awaited before the store is written to.

        Raises MissingInput, InvalidImage, ImageTooLarge, MaskMismatch for bad input; what the painter, the encoder
        and the store raise; InferenceTimeout; and what `confirm` raises.
        """
        clock = _Clock()
        stored = await self._output_versions(job)
        with clock.stage("download_s"):
            original, mask = await asyncio.gather(self._read(job, "original"), self._read(job, "mask"))
        with clock.stage("prepare_s"):
            prepared = await self._in_pool(self._prepare, original, mask, job.parameters.crop_strategy)
            embeddings = None
            if prepared.plan is not None:
                embeddings = await self._embeddings(job)
        painted = await self._paint(job, prepared, embeddings, on_progress, clock)
        with clock.stage("encode_s"):
            outputs = await self._in_pool(self._encode, prepared, original, painted)
        with clock.stage("upload_s"):
            await self._store(job, outputs, stored, confirm)
        gpu_ms = painted.gpu_ms if painted else None
        return Result(artifacts=_paths(job), timings=Timings(**clock.seconds, gpu_ms=gpu_ms))

    async def _in_pool(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def _read(self, job: Job, role: str) -> bytes:
        return await read_input(self._blobs, job.user_id, job.session_id, role, self._settings.limits)

    async def _embeddings(self, job: Job) -> bytes | None:
        limit_s = self._settings.work.inference_timeout_s
        return await encode_within(self._prompts, job.variant, job.parameters.prompt, limit_s)

    def _prepare(self, original: bytes, mask_bytes: bytes, strategy: CropStrategy) -> _Prepared:
        photo = images.decode_photo(original, self._settings.limits)
        mask = masks.decode_mask(mask_bytes, self._settings.limits, photo.size)
        plan = windows.plan(mask, strategy, self._settings.windows)
        if plan is None:
            return _Prepared(photo=photo, mask=mask, plan=None)
        canvas, canvas_mask = paste.cut(photo.pixels, mask, plan, self._settings.windows.feather_px)
        return _Prepared(photo=photo, mask=mask, plan=plan, canvas=canvas, canvas_mask=canvas_mask)

    async def _paint(
        self, job: Job, prepared: _Prepared, embeddings: bytes | None, on_progress: OnProgress, clock: _Clock
    ) -> Painted | None:
        if prepared.plan is None or prepared.canvas is None or prepared.canvas_mask is None:
            return None
        request = PaintRequest(
            job_id=job.id,
            canvas=prepared.canvas,
            mask=prepared.canvas_mask,
            windows=prepared.plan.windows,
            steps=job.parameters.steps,
            guidance_scale=job.parameters.guidance_scale,
            seed=job.seed,
            traceparent=job.traceparent,
            embeddings=embeddings,
        )
        started = time.perf_counter()
        limit_s = self._settings.work.inference_timeout_s
        paint = partial(self._painter.paint, job.variant, request)
        painted = await begun_within(limit_s, job.variant, paint, on_progress)
        clock.seconds["engine_s"] = painted.busy_s
        clock.seconds["wait_s"] = max(0.0, time.perf_counter() - started - painted.busy_s)
        return painted

    def _encode(self, prepared: _Prepared, original: bytes, painted: Painted | None) -> dict[str, tuple[bytes, str]]:
        photo = prepared.photo
        if prepared.plan is None or painted is None:
            preview = images.encode_preview(photo, photo.pixels)
            return {"preview": (preview, "image/jpeg"), "edited": (original, photo.content_type)}
        feather_px = self._settings.windows.feather_px
        pixels = paste.paste(photo.pixels, painted.canvas, prepared.mask, prepared.plan, feather_px)
        edited, preview = images.encode_edited(photo, pixels), images.encode_preview(photo, pixels)
        return {"preview": (preview, "image/jpeg"), "edited": (edited, "image/jpeg")}

    async def _output_versions(self, job: Job) -> dict[str, str]:
        return {role: await self._version(path) for role, path in _paths(job).items()}

    async def _version(self, path: str) -> str:
        try:
            return (await self._blobs.head(path)).version
        except BlobNotFound:
            return ""

    async def _store(
        self,
        job: Job,
        outputs: dict[str, tuple[bytes, str]],
        stored: dict[str, str],
        confirm: Callable[[], Awaitable[None]],
    ) -> None:
        """Write each output over the version seen when the attempt began, so that a stale worker's late write is
        either refused or written over."""
        for role, (data, content_type) in outputs.items():
            path, version = _paths(job)[role], stored[role]
            for _ in range(CONFLICTS):
                await confirm()
                try:
                    await self._blobs.put(path, data, content_type=content_type, if_version=version)
                    break
                except BlobConflict:
                    version = await self._version(path)
            else:
                raise BlobConflict(
                    f"{path} was written {CONFLICTS} times by others while it was to be stored", path=path
                )


def _paths(job: Job) -> dict[str, str]:
    return {role: session_path(job.user_id, job.session_id, name) for role, name in OUTPUTS.items()}
