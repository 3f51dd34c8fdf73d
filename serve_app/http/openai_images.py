"""OpenAI's Images API, over the same jobs: the package `openai` and programs that speak it work here unchanged
(https://developers.openai.com/api/docs/api-reference/images). A request waits for its job, which ends soon after its
client has left; a request that the client sends again takes it over."""

import base64
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WithJsonSchema

from ..edit.masks import Polarity
from ..errors import FluxFillError, InputError, Unavailable
from ..generate.request import LoraAsked
from ..jobs.api import JobApi
from ..jobs.kinds import Caller
from ..jobs.record import Artifact, Job, State
from ..parameters import GuidanceScale, MaskGrow, Prompt, Seed, Steps, VariantName, Whole
from .forms import FORM, read_form, read_json
from .jobs import Submitter
from .problems import NO_RETRY, invalid, json_body, problem, problems, wrong
from .service import Served, Service
from .waiting import looks, waited

#: OpenAI's own models: they mean the first of this app's, so that programs need not be changed.
_THEIRS = ("gpt-image", "dall-e", "chatgpt-image")
#: Their names of a job's fields.
_NAMES = {"width": "size", "height": "size", "count": "n", "format": "output_format", "model_id": "model"}
#: Fields of a form that are no text.
_VALUES = ("n", "partial_images", "stream", "seed", "steps", "guidance", "mask_grow")
#: Bytes of a picture that are encoded at a time: base64 makes four of three.
_PIECE_BYTES = 3 * 2**18

_File = Annotated[bytes, Field(strict=True), WithJsonSchema({"type": "string", "format": "binary"})]


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    event: ClassVar[str]
    #: Fields of theirs that have no effect here.
    hints: ClassVar[Sequence[str]] = ("quality", "style", "moderation", "user", "safety_identifier")

    #: One of `GET /v1/models`, or one of OpenAI's, which means the first.
    model: VariantName | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    #: None are sent: a picture is there as a whole or not at all.
    partial_images: Annotated[Whole, Field(ge=0, le=3)] = 0
    background: Literal["auto", "opaque"] = "auto"
    #: Of this service, like all that comes by `extra_body` of the package `openai`.
    seed: Seed | None = None
    steps: Steps | None = None
    guidance: GuidanceScale | None = None

    def _given(self, *names: str) -> dict[str, Any]:
        """Fields of a job: those of both, and those of `names`."""
        given = self.model_dump(include={"seed", "steps", "guidance", "prompt", *names}, exclude_none=True)
        named = {"model_id": self.model} if self.model and not self.model.startswith(_THEIRS) else {}
        return {**given, **named, "format": self.output_format}


class ImagesBody(_Asked):
    """Pictures from a prompt."""

    event = "image_generation.completed"
    prompt: Annotated[Prompt, StringConstraints(min_length=1)]
    n: Annotated[Whole, Field(ge=1, le=10)] = 1
    size: Annotated[str, StringConstraints(pattern=r"\A(auto|[0-9]{1,5}x[0-9]{1,5})\z")] = "auto"
    negative_prompt: Prompt | None = None
    loras: Annotated[tuple[LoraAsked, ...], Field(max_length=16)] = ()

    def job(self) -> dict[str, Any]:
        width, _, height = self.size.partition("x")
        sides = {"width": int(width), "height": int(height)} if height else {}
        return {"type": "generate", "count": self.n, **sides, **self._given("negative_prompt", "loras")}


class ImagesEdit(_Asked):
    """An edit of a photo where its mask, or its own transparency, says. All else stays as it is, its size included."""

    event, hints = "image_edit.completed", (*_Asked.hints, "size", "input_fidelity")
    image: _File
    mask: _File | None = None
    #: What the mask is where the photo is edited.
    mask_polarity: Polarity = "transparent"
    #: Of this service, too.
    mask_grow: MaskGrow | None = None
    prompt: Prompt | None = None
    n: Annotated[Whole, Field(ge=1, le=1)] = 1

    def job(self) -> dict[str, Any]:
        return {"type": "inpaint", **self._given("image", "mask", "mask_polarity", "mask_grow")}


T = TypeVar("T")
_Model = type[ImagesBody | ImagesEdit]
_PICTURES = {"description": "The pictures.", "content": {"application/json": {}, "text/event-stream": {}}}

router = APIRouter(
    prefix="/v1/images", responses={200: _PICTURES, **problems(400, 401, 403, 404, 408, 409, 413, 415, 429, 503)}
)


@router.post("/generations", openapi_extra={"requestBody": json_body("ImagesBody")})
async def generate_images(request: Request, service: Served, caller: Submitter) -> Response:
    """Make pictures, and wait for them."""
    body = await read_json(request, service.limits)
    return await _answer(request, caller, service.jobs, await _posted(request, caller, service.jobs, ImagesBody, body))


@router.post("/edits", openapi_extra={"requestBody": json_body("ImagesEdit", FORM)})
async def edit_image(request: Request, service: Served, caller: Submitter) -> Response:
    """Edit a photo, and wait for it."""
    # Nothing here holds the photo while the request waits.
    posted = await _posted(request, caller, service.jobs, ImagesEdit, await _form(request, service))
    return await _answer(request, caller, service.jobs, posted)


async def _form(request: Request, service: Service) -> Mapping[str, Any]:
    body: dict[str, Any] = {}
    for name, value in await read_form(request, service.limits, max_fields=32):
        # As `image[]` comes what the package was given as a list.
        if (name := name.removesuffix("[]")) in body:
            raise wrong(name, "one is taken here")
        body[name] = value
        with suppress(ValueError, RecursionError):
            body[name] = json.loads(value) if name in _VALUES else value
    return body


class _Posted(NamedTuple):
    job: Job
    #: Of a stream: the name of its events.
    event: str | None
    by_url: bool


async def _posted(request: Request, caller: Caller, jobs: JobApi, model: _Model, body: Mapping[str, Any]) -> _Posted:
    # Before anything is stored for it.
    request.app.state.streams.check(caller, jobs.settings.api)
    given = {name: value for name, value in body.items() if value is not None and name not in model.hints}
    is_again = request.headers.get("X-Stainless-Retry-Count", "0") != "0"
    try:
        asked = model.model_validate(given)
        job = (is_again and await jobs.again(asked.job(), caller)) or (await jobs.post(asked.job(), caller))[0]
    except ValidationError as e:
        raise invalid(e, names=_NAMES) from None
    except InputError as e:
        if name := _NAMES.get(field := e.details.get("field", "")):
            e.details["field"], e.message = name, e.message.replace(f"{field}:", f"{name}:", 1)
        raise
    return _Posted(job, asked.event if asked.stream else None, asked.response_format == "url")


async def _answer(request: Request, caller: Caller, jobs: JobApi, posted: _Posted) -> Response:
    limit_s, headers = jobs.settings.api.wait_s, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    if posted.event:
        seen = looks(request, posted.job, caller, limit_s=limit_s, attends=True)
        # What fails before the first look, or the first piece, is an answer of its own.
        events = _events(jobs, posted.event, _following(await anext(seen), seen))
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    job = await waited(request, posted.job, caller, limit_s=limit_s, attends=True)
    if refusal := _refusal(job):
        return refusal
    pieces = _whole(jobs, job, by_url=posted.by_url)
    return StreamingResponse(_following(await anext(pieces), pieces), media_type="application/json")


def _refusal(job: Job) -> JSONResponse | None:
    """What is answered in place of the pictures of a job that has none. It was tried as often as is of use."""
    if job.status == State.SUCCEEDED:
        return None
    if not job.status.is_final:
        raise Unavailable("the pictures are not ready yet; sent again, the request waits on", retry_after_s=1)
    code, message = (job.error.code, job.error.message) if job.error else (str(job.status), "it has ended")
    status = 409 if job.status == State.CANCELED else 500
    return problem(status, code, message, headers=NO_RETRY, details={"job_id": job.id})


async def _following(first: T, others: AsyncGenerator[T]) -> AsyncGenerator[T]:
    async with aclosing(others):
        yield first
        async for one in others:
            yield one


def _pictures(job: Job) -> Sequence[Artifact]:
    return sorted((one for one in job.artifacts if one.role != "preview"), key=lambda one: one.index or 0)


def _about(artifact: Artifact) -> dict[str, Any]:
    """What an answer says of its pictures."""
    size, format = f"{artifact.width}x{artifact.height}", artifact.content_type.removeprefix("image/")
    usage: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    usage["input_tokens_details"] = {"text_tokens": 0, "image_tokens": 0}
    return {"size": size, "output_format": format, "quality": "auto", "background": "opaque", "usage": usage}


async def _picture(
    jobs: JobApi, job: Job, artifact: Artifact, lead: bytes, *, by_url: bool = False, **more: Any
) -> AsyncGenerator[bytes]:
    """`lead`, and JSON of a picture, piece by piece: it may have a hundred megabytes."""
    more |= {"seed": job.seed if artifact.seed is None else artifact.seed, "job_id": job.id}
    if by_url:
        yield lead + json.dumps({"url": await jobs.link(artifact, jobs.settings.api.link_s), **more}).encode()
        return
    head, text = b'{"b64_json": "', json.dumps({"b64_json": "", **more}).encode()
    data = await jobs.data(artifact)
    yield lead + head
    for start in range(0, len(data), _PIECE_BYTES):
        yield base64.b64encode(data[start : start + _PIECE_BYTES])
    yield text.removeprefix(head)


async def _whole(jobs: JobApi, job: Job, *, by_url: bool) -> AsyncGenerator[bytes]:
    pictures, answered = _pictures(job), False
    about = {"created": int((job.finished_at or job.created_at).timestamp()), **_about(pictures[0])}
    try:
        for number, artifact in enumerate(pictures):
            async for piece in _picture(jobs, job, artifact, b", " if number else b'{"data": [', by_url=by_url):
                yield piece
        yield b"], " + json.dumps(about).encode().removeprefix(b"{")
        answered = True
    finally:
        await jobs.leave(job, answered=answered)


async def _events(jobs: JobApi, name: str, seen: AsyncGenerator[Job]) -> AsyncGenerator[bytes]:
    """Each picture as soon as it is there; between them comments, so that no proxy takes the stream for dead."""
    sent, lead = 0, f"event: {name}\ndata: ".encode()
    try:
        async with aclosing(seen):
            async for job in seen:
                for artifact in _pictures(job)[sent:]:
                    about = {"type": name, "created_at": int(job.created_at.timestamp()), **_about(artifact)}
                    async for piece in _picture(jobs, job, artifact, lead, **about):
                        yield piece
                    sent += 1
                    yield b"\n\n"
                yield f": {job.progress.fraction:.0%}\n\n".encode()
        refusal = _refusal(job)
    except FluxFillError as e:
        refusal = problem(e.http_status, e.code, e.message)
    if refusal is None:
        await jobs.leave(job, answered=True)
        yield b"data: [DONE]\n\n"
    else:
        yield b"event: error\ndata: " + bytes(refusal.body) + b"\n\n"
