"""HTTP routes in the shapes of Black Forest Labs (https://docs.bfl.ai), for clients of its fill endpoint. Tasks are
edits."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.security import APIKeyHeader
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UnknownJob
from ..jobs.kinds import Caller
from ..jobs.record import Job, State
from ..parameters import Prompt, Seed, Whole
from .forms import JSON, read_job
from .problems import invalid, problems
from .service import Served, caller_with
from .views import progress_view


class FillBody(BaseModel):
    """What is left out is as the app has it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    #: In base64; or a `data:` URI, or an https link.
    image: str
    #: White where the image is to be filled. Left out: where the image is transparent.
    mask: str | None = None
    prompt: Prompt | None = None
    steps: Annotated[Whole, Field(ge=15, le=50)] | None = None
    guidance: Annotated[float, Field(ge=1.5, le=100)] | None = None
    seed: Seed | None = None
    output_format: Literal["jpeg", "png", "webp"] = "jpeg"
    #: These have no effect.
    prompt_upsampling: bool | None = None
    safety_tolerance: Annotated[Whole, Field(ge=0, le=6)] | None = None


class Task(BaseModel):
    id: str
    polling_url: str


class Result(BaseModel):
    """Where the picture is, as a signed link, and how it was made."""

    sample: str
    prompt: str
    seed: int
    #: Seconds of Unix.
    start_time: float
    end_time: float
    duration: float


class TaskStatus(BaseModel):
    id: str
    status: Literal["Task not found", "Pending", "Ready", "Error"]
    result: Result | None = None
    #: From 0 to 1.
    progress: float | None = None
    #: Why it failed.
    details: dict[str, str] | None = None


_KEY = Depends(APIKeyHeader(name="X-Key", auto_error=False, scheme_name="x-key"))
router = APIRouter(responses=problems(401, 403, 422, 429, 503), dependencies=[_KEY])
_BODY = {"required": True, "content": {JSON: {"schema": FillBody.model_json_schema()}}}
_HINTS = {"prompt_upsampling", "safety_tolerance"}


@router.post(
    "/v1/flux-pro-1.0-fill",
    responses=problems(400, 404, 408, 409, 413, 415),
    openapi_extra={"requestBody": _BODY},
)
async def fill(request: Request, service: Served, caller: Annotated[Caller, caller_with("submit")]) -> Task:
    """Fill a part of an image, by the default variant."""
    try:
        asked = FillBody.model_validate(await read_job(request, service.limits))
        body: dict[str, Any] = asked.model_dump(exclude=_HINTS, exclude_none=True)
        body |= {name: _picture(body[name]) for name in ("image", "mask") if name in body}
        polarity = "white" if "mask" in body else "transparent"
        body |= {"type": "inpaint", "mask_polarity": polarity, "format": body.pop("output_format")}
        job, _ = await service.jobs.post(body, caller)
    except ValidationError as e:
        raise invalid(e) from None
    url = service.jobs.settings.public_url.rstrip("/")
    return Task(id=job.id, polling_url=f"{url}/v1/get_result?id={job.id}")


@router.get("/v1/get_result")
async def get_result(
    task: Annotated[str, Query(alias="id")], service: Served, caller: Annotated[Caller, caller_with("read")]
) -> TaskStatus:
    """The state of a task, and its picture once it is ready."""
    try:
        job = await service.jobs.get(task, caller)
    except UnknownJob:
        return TaskStatus(id=task, status="Task not found")
    progress = progress_view(job).progress
    if not job.status.is_final:
        return TaskStatus(id=job.id, status="Pending", progress=progress)
    if job.status != State.SUCCEEDED:
        why = job.error.model_dump() if job.error else None
        return TaskStatus(id=job.id, status="Error", progress=progress, details=why)
    link = await service.jobs.link(job.artifacts[0], service.jobs.settings.api.link_s)
    return TaskStatus(id=job.id, status="Ready", progress=progress, result=_result(job, link))


def _result(job: Job, link: str) -> Result:
    assert job.started_at and job.finished_at, "it has succeeded"
    began, ended = job.started_at.timestamp(), job.finished_at.timestamp()
    times = {"start_time": began, "end_time": ended, "duration": ended - began}
    return Result(sample=link, prompt=getattr(job.parameters, "prompt", ""), seed=job.seed, **times)


def _picture(given: str) -> str:
    return given if given.startswith(("data:", "https:", "http:")) else f"data:;base64,{given}"
