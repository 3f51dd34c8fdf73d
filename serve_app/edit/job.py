"""One attempt at one edit: the session's blobs in, the edited photo and its preview out."""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from .. import tracing
from ..blobs import BlobInfo, BlobStore
from ..errors import BlobNotFound, InferenceTimeout, StoreUnavailable, VariantNotReady
from ..jobs.kinds import Asked, Attempt, Caller, Result
from ..jobs.messages import EditMessage, parse_edit
from ..jobs.record import Job, Message, Quality, Timings
from ..models import EditRequest, ImageModel, Images, OnProgress, Pixels, Progress, PromptEncoder, Variant
from ..parameters import CONTENT_TYPES, EditParameters, Format, JobType
from ..settings import Inference, Settings
from . import images, masks, paste, quality, windows
from .checking import paint_checked
from .images import Photo
from .outputs import Outputs, Painting
from .planned import lay_out
from .posted import API_USER, InpaintBody, Links, Sessions, served_variant
from .session import INPUTS, OUTPUTS, lock_key, read_input, session_document, session_path

T = TypeVar("T")


async def encode_within(prompts: PromptEncoder, variant: str, prompt: str, wait_s: float) -> bytes | None:
    """The prompt's embeddings. Raises VariantNotReady after `wait_s` seconds, which go by in the text encoder's queue
    (it limits its own work), and what the encoder raises."""
    try:
        with tracing.span("prompt"):
            async with asyncio.timeout(wait_s):
                return await prompts.encode(variant, prompt)
    except TimeoutError as e:
        raise VariantNotReady(f"the text encoder did not start on this prompt within {wait_s:g} s") from e


async def begun_within(
    limit_s: float,
    variant: str,
    paint: Callable[[OnProgress], Awaitable[T]],
    on_progress: OnProgress,
    *,
    wait_s: float | None = None,
) -> T:
    """What `paint` returns. Its first report is its beginning: waiting for a replica is not inference.

    Raises InferenceTimeout `limit_s` seconds after the first report; VariantNotReady after `wait_s` seconds without
    one (None: waits for ever).
    """
    began, asked_at = False, time.time()
    try:
        async with asyncio.timeout(wait_s) as timeout:

            async def started(progress: Progress) -> None:
                nonlocal began
                if not began:
                    began = True
                    tracing.ended("wait", asked_at)
                    timeout.reschedule(asyncio.get_running_loop().time() + limit_s)
                await on_progress(progress)

            return await paint(started)
    except TimeoutError as e:
        if not timeout.expired():
            raise
        if not began:
            raise VariantNotReady(f"no replica of {variant} started within {wait_s:g} s") from e
        raise InferenceTimeout(f"painting on {variant} took longer than {limit_s:g} s", limit_s=limit_s) from e


@dataclass(kw_only=True)
class _Prepared:
    """A job's picture while it is in this process."""

    original: bytes
    mask: bytes
    #: How far the mask grows, in photo pixels.
    grown_px: int
    #: What the bytes decode to; None where memory has no room for it while a replica paints.
    decoded: tuple[Photo, Pixels] | None
    #: None where the mask is empty.
    plan: windows.Plan | None
    canvas: Pixels | None = None
    canvas_mask: Pixels | None = None
    #: The mask as the user drew it, at the canvas's scale.
    drawn: Pixels | None = None

    @property
    def decoded_px(self) -> int:
        """Pixels of the photo, while it is decoded."""
        return self.decoded[1].size if self.decoded else 0


@dataclass
class _Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    #: Device milliseconds; None where no GPU painted.
    gpu_ms: float | None = None

    def add(self, name: str, seconds: float) -> None:
        """To what an earlier painting took."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started


def edit_job_id(message: EditMessage, *, versions: Sequence[str], idempotency_key: str | None) -> str:
    """The identity of an edit: what it would compute.

    User, session, the stored versions of original and mask (replaced by the idempotency key where there is one),
    and the parameters given explicitly. A republished message has the same id; a changed photo has another.
    """
    given = {"key": idempotency_key} if idempotency_key else {"versions": list(versions)}
    return f"edit-{_digest(message, given)}"


def edit_request(message: EditMessage, *, idempotency_key: str | None) -> str:
    """See `Job.request`."""
    return "" if idempotency_key else _digest(message, {})


def _digest(message: EditMessage, given: Mapping[str, Any]) -> str:
    what = {
        "user": message.user_id,
        "session": message.session_id,
        "input": dict(given),
        "explicit": message.explicit(),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def seed_of(job_id: str) -> int:
    """An edit's seed where none is given: 32 bits of its id's hash, so that every attempt draws the same noise."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:4], "big")


class Editor:
    """The kind of job that an edit is."""

    type: JobType = "inpaint"
    event = "edit"

    def __init__(
        self,
        *,
        blobs: BlobStore,
        models: Mapping[str, ImageModel[EditRequest]],
        prompts: PromptEncoder,
        settings: Settings,
        defaults: Callable[[], Inference],
        links: Links,
    ) -> None:
        """`models` by variant. `defaults` is asked for each new job, so it may change meanwhile."""
        self._blobs, self._models, self._prompts = blobs, models, prompts
        self._settings, self._defaults = settings, defaults
        self._outputs = Outputs(blobs, upload_s=settings.work.upload_timeout_s)
        self._sessions = Sessions(blobs, links, settings.limits)
        #: How many decoded pixels more may be kept.
        self._room_px = settings.limits.decoded_pixels

    def read(self, data: bytes) -> Asked:
        message, unknown = parse_edit(data, max_bytes=self._settings.limits.message_bytes)
        return Asked(message=message, variant=message.variant or self._defaults().variant, unknown_fields=unknown)

    async def new_job(self, asked: Asked, *, variant: str, idempotency_key: str | None) -> Job:
        message: EditMessage = asked.message
        versions = await asyncio.gather(*(self._version(message, name) for name in INPUTS.values()))
        job_id = edit_job_id(message, versions=versions, idempotency_key=idempotency_key)
        explicit = message.explicit()
        explicit.pop("variant", None)
        return Job(
            id=job_id,
            user_id=message.user_id,
            session_id=message.session_id,
            lock_key=lock_key(message.user_id, message.session_id),
            variant=variant,
            seed=explicit.pop("seed", seed_of(job_id)),
            request=edit_request(message, idempotency_key=idempotency_key),
            parameters=EditParameters(**(self._settings.unsaid(self._defaults(), variant) | explicit)),
            deadline=message.deadline,
            callback_url=str(message.callback_url or ""),
            message=Message(data=message.model_dump_json(by_alias=True, exclude_none=True), attributes={}),
        )

    async def post(self, body: Mapping[str, Any], caller: Caller, *, job_id: str) -> Job:
        asked, defaults = InpaintBody.model_validate(body), self._defaults()
        variant = served_variant(asked, self._settings, defaults)
        session = await self._sessions.of(asked, job_id)
        return Job(
            id=job_id,
            user_id=session.user_id,
            session_id=session.session_id,
            lock_key=lock_key(session.user_id, session.session_id),
            variant=variant,
            seed=seed_of(job_id) if asked.seed in (None, -1) else asked.seed,
            parameters=EditParameters(**(self._settings.unsaid(defaults, variant) | asked.explicit())),
        )

    def inputs(self, job: Job) -> Sequence[str]:
        return [session_path(job.user_id, job.session_id, name) for name in INPUTS.values()] if _is_alone(job) else []

    def outputs(self, job: Job) -> Sequence[str]:
        return list(_paths(job).values()) if _is_alone(job) else []

    async def _version(self, message: EditMessage, name: str) -> str:
        try:
            return (await self._blobs.head(session_path(message.user_id, message.session_id, name))).version
        except BlobNotFound:
            return ""

    async def run(self, job: Job, attempt: Attempt) -> Result:
        """Paint `job` and store the result. What was painted and could not be stored is kept, and not painted again.

        Raises MissingInput, InvalidImage, ImageTooLarge, MaskMismatch, MaskUnclear for bad input; what the model, the
        encoder and the store raise; InferenceTimeout; and what `attempt.confirm` raises.
        """
        clock, paths = _Clock(), _paths(job)
        await self._outputs.check_writable()
        versions = await self._outputs.versions(paths)
        with clock.stage("download_s"), tracing.span("fetch"):
            (original, of), (mask, of_mask) = await asyncio.gather(self._read(job, "original"), self._read(job, "mask"))
        inputs = (of.version, of_mask.version)
        painting = self._outputs.kept(job, inputs) or await self._painting(job, original, mask, attempt, clock)
        try:
            with clock.stage("upload_s"):
                written = await self._outputs.store(painting, paths, versions, attempt.confirm)
        except StoreUnavailable:
            self._outputs.keep(job, inputs, painting)
            raise
        timings = Timings(**{**painting.seconds, **clock.seconds}, gpu_ms=painting.gpu_ms)
        return Result(artifacts=written, timings=timings, quality=painting.quality)

    def document(self, job: Job) -> Mapping[str, Any]:
        return session_document(job)

    async def _read(self, job: Job, role: str) -> tuple[bytes, BlobInfo]:
        return await read_input(self._blobs, job.user_id, job.session_id, role, self._settings.limits)

    async def _painting(self, job: Job, original: bytes, mask: bytes, attempt: Attempt, clock: _Clock) -> Painting:
        in_pool = partial(asyncio.get_running_loop().run_in_executor, attempt.pool)
        with clock.stage("prepare_s"), tracing.span("decode"):
            variant = self._settings.variant(job.variant)
            prepared = await in_pool(self._prepare, original, mask, _asked(job), variant)
        with self._in_memory(prepared):
            painted, found = await self._paint(job, prepared, attempt, clock)
            with clock.stage("encode_s"), tracing.span("encode"):
                files, size = await in_pool(self._encode, prepared, painted, _asked(job).format)
        return Painting(files=files, seconds=clock.seconds, gpu_ms=clock.gpu_ms, width_height=size, quality=found)

    @contextmanager
    def _in_memory(self, prepared: _Prepared) -> Iterator[None]:
        """Drops the decoded picture where there is no room for it."""
        if prepared.decoded_px > self._room_px:
            prepared.decoded = None
        size = prepared.decoded_px
        self._room_px -= size
        try:
            yield
        finally:
            self._room_px += size

    async def _embeddings(self, job: Job) -> bytes | None:
        wait_s = self._settings.work.replica_wait_s
        return await encode_within(self._prompts, job.variant, _asked(job).prompt, wait_s)

    def _decode(self, original: bytes, mask: bytes) -> tuple[Photo, Pixels]:
        photo = images.decode_photo(original, self._settings.limits)
        return photo, masks.decode_mask(mask, self._settings.limits, photo.size)

    def _prepare(self, original: bytes, mask_bytes: bytes, asked: EditParameters, variant: Variant) -> _Prepared:
        photo, drawn = decoded = self._decode(original, mask_bytes)
        mask, grown_px, plan = lay_out(drawn, asked, variant, self._settings.windows)
        prepared = _Prepared(original=original, mask=mask_bytes, grown_px=grown_px, decoded=decoded, plan=plan)
        if plan is not None:
            prepared.canvas, prepared.canvas_mask = paste.cut(
                photo.pixels, mask, plan, self._settings.windows.feather_px
            )
            prepared.drawn = paste.shown(drawn, plan)
        return prepared

    async def _paint(
        self, job: Job, prepared: _Prepared, attempt: Attempt, clock: _Clock
    ) -> tuple[Images | None, Quality | None]:
        if prepared.plan is None or prepared.canvas is None or prepared.canvas_mask is None:
            return None, None
        asked = time.perf_counter()
        embeddings = await self._embeddings(job)
        clock.seconds["prepare_s"] += time.perf_counter() - asked
        request = EditRequest(
            job_id=job.id,
            canvas=prepared.canvas,
            mask=prepared.canvas_mask,
            windows=prepared.plan.windows,
            steps=_asked(job).steps,
            guidance_scale=_asked(job).guidance_scale,
            seed=job.seed,
            strength=_asked(job).strength if self._settings.variant(job.variant).takes_strength else 1.0,
            traceparent=tracing.traceparent(job.traceparent),
            embeddings=embeddings,
        )
        paint = partial(self._paint_once, job, attempt.on_progress, clock)
        if not self._settings.variant(job.variant).removes:
            return await paint(request), None
        in_pool = partial(asyncio.get_running_loop().run_in_executor, attempt.pool)
        return await paint_checked(
            request,
            paint,
            lambda painted: in_pool(_put_back, prepared, painted),
            self._settings.quality,
            left_s=attempt.left_s,
            # Encoding and uploading take about as long as what they undo.
            after_s=clock.seconds["download_s"] + clock.seconds["prepare_s"],
        )

    async def _paint_once(self, job: Job, on_progress: OnProgress, clock: _Clock, request: EditRequest) -> Images:
        started = time.perf_counter()
        work, paint = self._settings.work, partial(self._models[job.variant].run, request)
        painted = await begun_within(
            work.inference_timeout_s, job.variant, paint, on_progress, wait_s=work.replica_wait_s
        )
        clock.add("engine_s", painted.busy_s)
        clock.add("wait_s", max(0.0, time.perf_counter() - started - painted.busy_s))
        if painted.gpu_ms is not None:
            clock.gpu_ms = (clock.gpu_ms or 0.0) + painted.gpu_ms
        return painted

    def _encode(
        self, prepared: _Prepared, painted: Images | None, format: Format
    ) -> tuple[dict[str, tuple[bytes, str]], tuple[int, int]]:
        """The files, and the photo's size."""
        photo, drawn = prepared.decoded or self._decode(prepared.original, prepared.mask)
        if prepared.plan is None or painted is None:
            pixels, edited = photo.pixels, images.unchanged(photo, prepared.original, format)
        else:
            feather_px = self._settings.windows.feather_px
            mask = paste.grow(drawn, prepared.grown_px)
            pixels = paste.paste(photo.pixels, painted.images[0], mask, prepared.plan, feather_px)
            edited = images.encode_edited(photo, pixels, format), CONTENT_TYPES[format]
        preview = images.encode_preview(photo, pixels)
        return {"preview": (preview, "image/jpeg"), "edited": edited}, photo.size


def _asked(job: Job) -> EditParameters:
    assert isinstance(job.parameters, EditParameters), "the worker gives each kind its own jobs"
    return job.parameters


def _put_back(prepared: _Prepared, painted: Images) -> float | None:
    """At the canvas's scale, without its padding. Inside the mask the canvas is what will be pasted."""
    assert prepared.canvas is not None and prepared.drawn is not None, "nothing else is painted"
    content = np.s_[: prepared.drawn.shape[0], : prepared.drawn.shape[1]]
    edit = quality.cut(prepared.canvas[content], painted.images[0][content], prepared.drawn)
    return None if edit is None else quality.put_back(edit)


def _is_alone(job: Job) -> bool:
    """Whether no other job has its session."""
    return (job.user_id, job.session_id) == (API_USER, job.id)


def _paths(job: Job) -> dict[str, str]:
    return {role: session_path(job.user_id, job.session_id, name) for role, name in OUTPUTS.items()}
