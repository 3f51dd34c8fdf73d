"""HTTP routes in the shapes of Replicate (https://replicate.com/docs/reference/http), for its clients. Predictions are
jobs; a model has one version, which has its name."""

import base64
import hashlib
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ..errors import IllegalTransition, InputError, RateLimited, Unavailable, UnknownModel
from ..generate.request import Side
from ..jobs.kinds import Caller
from ..jobs.record import Job, State
from ..parameters import GuidanceScale, Id, Prompt, Seed, Steps, Whole
from . import views
from .forms import FILE_BODY, JSON, read_file, read_job
from .jobs import Cursor, JobId, Reader, Shown, Submitter, page
from .openapi import portable
from .problems import invalid, problems
from .service import Served, Service
from .waiting import waited

#: The owner of all models here, for which clients may give any other name; and the predictions of a page.
OWNER, PAGE = "flux-fill-serve", 100

#: The family that stands in for a model of Replicate's, by its name, or for a version of SDXL, by its id.
_ELSEWHERE: Mapping[str, str] = {
    "flux-dev": "flux", "flux-dev-lora": "flux", "flux-fill-dev": "flux-fill", "flux-fill-pro": "flux-fill",
    "sdxl": "sdxl", "39ed52f2a78e934b3ba6e2a89f5b1c712de7dfea535525255b1aa35c5565e08b": "sdxl",
    "7762fd07cf82c948538e41f63f77d685e02b063e37e496e96eefd46c929f9bdc": "sdxl",
}  # fmt: skip
_SCHEDULERS = {"DDIM": "ddim", "K_EULER": "euler", "K_EULER_ANCESTRAL": "euler_a"}
_SCHEDULERS |= {"DPMSolverMultistep": "dpmpp_2m", "KarrasDPM": "dpmpp_2m_karras"}
#: Width and height of FLUX.1's pictures at Replicate, in pixels, by aspect ratio.
_SIDES: Mapping[str, tuple[int, int]] = {
    "1:1": (1024, 1024), "16:9": (1344, 768), "21:9": (1536, 640), "3:2": (1216, 832), "4:3": (1152, 896),
    "5:4": (1088, 896), "9:16": (768, 1344), "9:21": (640, 1536), "2:3": (832, 1216), "3:4": (896, 1152),
    "4:5": (896, 1088),
}  # fmt: skip
#: Inputs that have no effect here: hints, and those that modify another one, which is refused.
_HINTS = {"go_fast", "disable_safety_checker", "output_quality", "apply_watermark"}
_HINTS |= {"high_noise_frac", "prompt_strength"}
_THEIRS = {"steps": "num_inference_steps", "count": "num_outputs", "format": "output_format"}
_STATES = {State.QUEUED: "starting", State.RUNNING: "processing", State.EXPIRED: "failed"}


class _Input(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    steps: Steps | None = Field(None, alias="num_inference_steps")
    guidance: GuidanceScale | None = Field(None, validation_alias=AliasChoices("guidance", "guidance_scale"))
    seed: Seed | None = None
    #: Without effect on edits.
    megapixels: Literal["1", "0.25", "match_input"] = "1"
    format: Literal["png", "jpg", "webp"] = Field("png", alias="output_format")


class PictureInput(_Input):
    """Of a model that makes pictures."""

    prompt: Annotated[Prompt, StringConstraints(min_length=1)]
    negative_prompt: Prompt | None = None
    width: Side | None = None
    height: Side | None = None
    aspect_ratio: Annotated[str, Field(pattern=rf"\A({'|'.join(_SIDES)})\z")] | None = None
    count: Annotated[Whole, Field(ge=1, le=100)] = Field(1, alias="num_outputs")
    scheduler: Annotated[str, StringConstraints(max_length=64)] | None = None
    #: The id of one that is registered here.
    lora: Id | None = Field(None, validation_alias=AliasChoices("lora_weights", "hf_lora"))
    lora_scale: Annotated[float, Field(ge=-10, le=10)] = 1.0

    def job(self) -> dict[str, Any]:
        own = {"aspect_ratio", "megapixels", "scheduler", "lora", "lora_scale"}
        body = {"type": "generate", **self.model_dump(exclude=own, exclude_none=True)}
        if self.aspect_ratio is not None:
            if self.width or self.height:
                raise InputError("aspect_ratio: give it, or width and height", field="aspect_ratio")
            parts = 2 if self.megapixels == "0.25" else 1
            body["width"], body["height"] = (px // parts for px in _SIDES[self.aspect_ratio])
        if self.scheduler is not None:
            body["scheduler"] = _SCHEDULERS.get(self.scheduler, self.scheduler)
        return body | {"loras": [{"id": self.lora, "scale": self.lora_scale}] if self.lora else []}


class EditInput(_Input):
    """Of a model that edits photos."""

    image: str
    #: White where the photo is to be painted.
    mask: str
    prompt: Prompt | None = None
    count: Literal[1] = Field(1, alias="num_outputs")

    def job(self) -> dict[str, Any]:
        return {"type": "inpaint", **self.model_dump(exclude={"count", "megapixels"}, exclude_none=True)}


class PredictionBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    input: dict[str, Any]
    #: Of `/v1/predictions`: a version's id, `owner/name`, or `owner/name:version`.
    version: Annotated[str, StringConstraints(max_length=200)] = ""


_Prefer = Annotated[str, Header(description="`wait`, or `wait=` and seconds: answer when it is over.")]

router = APIRouter(prefix="/replicate/v1", responses=problems(401, 403, 404, 422, 429, 503))
_BODY = {"required": True, "content": {JSON: {"schema": PredictionBody.model_json_schema()}}}
_POSTING: dict[str, Any] = {"status_code": 201, "responses": problems(400, 408, 409, 413, 415)}
_PREDICTING: dict[str, Any] = {**_POSTING, "openapi_extra": {"requestBody": _BODY}}


@router.post("/models/{owner}/{name}/predictions", **_PREDICTING)
async def predict_with_model(
    owner: str, name: str, request: Request, service: Served, caller: Submitter, prefer: _Prefer = ""
) -> dict[str, Any]:
    """Ask for a prediction of a model. An answer before it is over says `starting`."""
    return await _posted(request, service, caller, prefer, name)


@router.post("/predictions", **_PREDICTING)
async def predict(request: Request, service: Served, caller: Submitter, prefer: _Prefer = "") -> dict[str, Any]:
    """Ask for a prediction of a version. An answer before it is over says `starting`."""
    return await _posted(request, service, caller, prefer)


async def _posted(request: Request, service: Service, caller: Caller, prefer: str, name: str = "") -> dict[str, Any]:
    began = time.monotonic()
    try:
        asked = PredictionBody.model_validate(await read_job(request, service.limits))
        model = _served(name or re.split("[/:]", asked.version)[-1], service)
        given = {name: value for name, value in asked.input.items() if name not in _HINTS}
        kind = PictureInput if model in service.jobs.settings.generators else EditInput
        job, _ = await service.jobs.post({**kind.model_validate(given).job(), "model_id": model}, caller)
    except ValidationError as e:
        raise invalid(e) from None
    if wait := re.search(r"\bwait(?:=([0-9]{1,4}))?", prefer):
        # The Python client gives up half a second after the time that it asks for.
        limit_s = min(60, int(wait[1] or 60)) - 0.5 - (time.monotonic() - began)
        # Where too many wait, or this replica stops, the job goes on all the same.
        with suppress(RateLimited, Unavailable):
            job = await waited(request, job, caller, limit_s=limit_s)
    # Clients take any other status in this answer as final.
    return await _prediction(job, service) | ({} if job.status.is_final else {"status": "starting"})


@router.get("/predictions")
async def list_predictions(service: Served, caller: Reader, cursor: Cursor = None) -> dict[str, Any]:
    """Jobs of all types, newest first."""
    jobs, following = await page(service, caller, cursor, PAGE)
    url = f"{_url(service)}/predictions?cursor={following}" if following else None
    return {"next": url, "previous": None, "results": [await _prediction(job, service) for job in jobs]}


@router.get("/predictions/{id}")
async def get_prediction(job: Shown, service: Served) -> dict[str, Any]:
    """A prediction."""
    return await _prediction(job, service)


@router.post("/predictions/{id}/cancel")
async def cancel_prediction(job_id: JobId, service: Served, caller: Submitter) -> dict[str, Any]:
    """Cancel a prediction. One that is over stays as it is."""
    with suppress(IllegalTransition):
        await service.jobs.cancel(job_id, caller)
    return await _prediction(await service.jobs.get(job_id, caller), service)


@router.get("/models/{owner}/{name}")
async def get_model_with_version(owner: str, name: str, service: Served, _: Reader) -> dict[str, Any]:
    """A model, with its version."""
    served = _served(name, service)
    of = {"url": f"{_url(service)}/models/{OWNER}/{served}", "owner": OWNER, "name": served}
    return {**of, "visibility": "private", "run_count": 0, "latest_version": _version(served, service)}


@router.get("/models/{owner}/{name}/versions/{version}")
async def get_version(owner: str, name: str, version: str, service: Served, _: Reader) -> dict[str, Any]:
    """A version, with the schema of its input."""
    return _version(_served(version, service), service)


@router.post("/files", **_POSTING, openapi_extra={"requestBody": FILE_BODY})
async def send_file(request: Request, service: Served, _: Submitter) -> dict[str, Any]:
    """A file for an input, in the part `content` of a form. Nothing is stored: the URL is a `data:` URI of the file."""
    data, kind = await read_file(request, "content", service.limits), "application/octet-stream"
    digest, url = hashlib.sha256(data).hexdigest(), f"data:{kind};base64,{base64.b64encode(data).decode()}"
    of = {"id": digest[:32], "name": "file", "content_type": kind, "size": len(data), "created_at": datetime.now(UTC)}
    return {**of, "etag": digest, "checksums": {"sha256": digest}, "metadata": {}, "urls": {"get": url}}


def _served(name: str, service: Service) -> str:
    """The served model that the name of a model or the id of a version stands for. Raises UnknownModel."""
    settings, family = service.jobs.settings, _ELSEWHERE.get(name)
    if name in settings.served:
        return name
    for one in (service.readiness().default_variant, *settings.served):
        if settings.variant(one).family == family:
            return one
    raise UnknownModel(f"there is no model {name}; there are {', '.join(settings.served)}")


def _version(name: str, service: Service) -> dict[str, Any]:
    output = {"title": "Output", "type": "array", "items": {"type": "string", "format": "uri"}}
    kind = PictureInput if name in service.jobs.settings.generators else EditInput
    schemas = {"Input": portable(kind.model_json_schema()), "Output": output}
    # The date is not known. Since Cog 0.3.9, an array is no iterator.
    of = {"id": name, "created_at": datetime.fromtimestamp(0, UTC), "cog_version": "0.16.0"}
    return {**of, "openapi_schema": {"openapi": "3.0.2", "components": {"schemas": schemas}}}


def _url(service: Service) -> str:
    return f"{service.jobs.settings.public_url.rstrip('/')}/replicate/v1"


async def _prediction(job: Job, service: Service) -> dict[str, Any]:
    status, url = _STATES.get(job.status, str(job.status)), f"{_url(service)}/predictions/{job.id}"
    shown = [one for one in job.artifacts if one.role != "preview"] if status == "succeeded" else []
    return {
        "id": job.id,
        "model": f"{OWNER}/{job.variant}",
        "version": job.variant,
        "status": status,
        "input": {_THEIRS.get(name, name): value for name, value in views.job_view(job).parameters.items()},
        "output": [await service.jobs.link(one, service.jobs.settings.api.link_s) for one in shown] or None,
        "logs": _logs(job),
        "error": job.error.message if job.error and status == "failed" else None,
        "metrics": {"predict_time": job.timings.total_s} if job.timings.total_s else {},
        "created_at": job.created_at,
        "started_at": job.started_at,
        "completed_at": job.finished_at,
        "urls": {"get": url, "cancel": f"{url}/cancel"},
    }


def _logs(job: Job) -> str:
    """Once the job has started, the last line is as tqdm writes it: clients read the progress from it."""
    lines = [line.message for event in job.events for line in views.log_lines(job, event)]
    if job.started_at:
        done, steps = views.progress_view(job).progress, job.progress.steps or 100
        lines.append(f"{int(100 * done):3}%|{'█' * int(10 * done):10}| {round(done * steps)}/{steps}")
    return "".join(f"{line}\n" for line in lines)
