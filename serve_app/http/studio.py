"""HTTP routes of another system (masuka, a studio of FLUX.1 and LoRAs), in its own shapes, for its clients: the same
jobs, and the same LoRAs, as those of /v1."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ..errors import IllegalTransition, InputError, UnknownJob, UnknownVariant
from ..generate.loras import Lora
from ..jobs.kinds import Caller
from ..jobs.record import Job, State
from ..models import GENERATIONS
from ..parameters import ID_PATTERN, GenerateParameters, Seed, Whole
from ..settings import Settings
from .forms import read_json
from .problems import invalid, json_body, problems
from .service import Served, Service, caller_with

_Text = StringConstraints(max_length=500)
#: Every generator makes multiples of 16.
_Side = Annotated[Whole, Field(ge=512, le=2048), AfterValidator(lambda px: (px + 8) // 16 * 16)]


class StudioBody(BaseModel):
    """Pictures from a prompt. Fields that are not listed are ignored."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    prompt: Annotated[str, _Text, StringConstraints(min_length=1)]
    #: Has no effect on a model that takes none, as FLUX.1.
    negative_prompt: Annotated[str, _Text] | None = None
    #: Of a LoRA; null or empty: none.
    model_id: Annotated[str, StringConstraints(pattern=r"\A[A-Za-z0-9_-]{0,128}\z")] | None = None
    lora_weight: Annotated[float, Field(strict=True, ge=0, le=1)] | None = 0.8
    num_images: Annotated[Whole, Field(ge=1, le=4)] = 1
    num_inference_steps: Annotated[Whole, Field(ge=10, le=100)] = 30
    guidance_scale: Annotated[float, Field(strict=True, ge=1, le=20)] = 3.5
    #: Pixels, rounded to the nearest multiple of 16.
    width: _Side = 1024
    height: _Side = 1024
    #: Of the first picture; the others have the numbers that follow. Null: one that the job tells.
    seed: Seed | None = None
    #: Has no effect.
    config: Mapping[str, Any] | None = None


class StudioCreated(BaseModel):
    job_id: str
    status: Literal["pending"] = "pending"
    #: The same as `job_id`.
    task_id: str


class StudioParameters(BaseModel):
    """What the pictures are made with. `seed` is the first one's; `seeds` and `output_paths`, paths in the blob store,
    are of those that are stored; `model_id` and `lora_weight` are of the first LoRA, and null without one."""

    num_images: int
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    seed: int
    seeds: Sequence[int]
    model_id: str | None
    lora_weight: float | None
    output_paths: Sequence[str]


class StudioJob(BaseModel):
    id: str
    status: Literal["processing", "completed", "failed"]
    prompt: str
    parameters: StudioParameters
    #: Links to the pictures that are stored, signed anew in each answer.
    output_paths: Sequence[str]
    #: Why it failed, was canceled, or expired.
    error_message: str | None
    created_at: datetime
    completed_at: datetime | None


class StudioModel(BaseModel):
    """A LoRA."""

    id: str
    name: str
    version: str
    #: `flux_image` or `sdxl_image`.
    model_type: str
    trigger_word: str | None
    #: Of 2**20 bytes, rounded up.
    file_size_mb: int
    model_metadata: Mapping[str, Any]
    created_at: datetime
    #: To its file, signed anew in each answer.
    download_url: str


_Id = Annotated[str, Path(pattern=ID_PATTERN)]
_Reader = Annotated[Caller, caller_with("read")]
_Submitter = Annotated[Caller, caller_with("submit")]

router = APIRouter(prefix="/api", responses=problems(401, 403, 429, 503))


@router.post(
    "/generate/image",
    status_code=201,
    responses=problems(400, 404, 408, 413, 415, 422),
    openapi_extra={"requestBody": json_body("StudioBody")},
)
async def post_studio_job(request: Request, service: Served, caller: _Submitter) -> StudioCreated:
    """Ask for pictures: of the LoRA's model, or without one of the first FLUX.1, or else of the first generator."""
    try:
        body = StudioBody.model_validate(await read_json(request, service.limits))
    except ValidationError as e:
        raise invalid(e) from None
    lora = await service.loras.get(body.model_id, caller) if body.model_id else None
    job, _ = await service.jobs.post(_asked(body, lora, service.jobs.settings), caller)
    return StudioCreated(job_id=job.id, task_id=job.id)


# Its clients ask for lists with a slash at the end; there, one without is redirected.
@router.get("/generate/")
@router.get("/generate", include_in_schema=False)
async def list_studio_jobs(
    service: Served, caller: _Reader, limit: Annotated[int, Query(ge=1, le=200)] = 20
) -> Sequence[StudioJob]:
    """Jobs of pictures, newest first, whichever API they were posted to."""
    found = await service.jobs.list(caller, type="generate", limit=limit)
    return await asyncio.gather(*(_job(job, service) for job in found))


@router.get("/generate/{job_id}", responses=problems(404))
async def get_studio_job(job_id: _Id, service: Served, caller: _Reader) -> StudioJob:
    """A job of pictures."""
    return await _job(await _found(job_id, service, caller), service)


@router.delete("/generate/{job_id}", status_code=204, responses=problems(404))
async def delete_studio_job(job_id: _Id, service: Served, caller: _Submitter) -> None:
    """Delete a job and its pictures. One that has not ended is canceled first."""
    await _found(job_id, service, caller)
    with suppress(IllegalTransition):
        await service.jobs.cancel(job_id, caller)
    await service.jobs.delete(job_id, caller)


@router.get("/models/")
@router.get("/models", include_in_schema=False)
async def list_studio_models(
    service: Served,
    caller: _Reader,
    model_type: Annotated[str | None, Query(description="Only these: `flux_image` or `sdxl_image`.")] = None,
) -> Sequence[StudioModel]:
    """LoRAs, newest first."""
    found = [lora for lora in await service.loras.list(caller) if model_type in (None, _type(lora))]
    return await asyncio.gather(*(_model(lora, service) for lora in found))


@router.get("/models/{model_id}", responses=problems(404))
async def get_studio_model(model_id: _Id, service: Served, caller: _Reader) -> StudioModel:
    """A LoRA."""
    return await _model(await service.loras.get(model_id, caller), service)


@router.delete("/models/{model_id}", status_code=204, responses=problems(404))
async def delete_studio_model(model_id: _Id, service: Served, caller: _Submitter) -> None:
    """Delete a LoRA, and the file that was uploaded for it. Jobs that use it fail, but where it is loaded already."""
    await service.loras.delete(model_id, caller)


def _asked(body: StudioBody, lora: Lora | None, settings: Settings) -> dict[str, Any]:
    """The body of a job of /v1. Raises InputError, by the studio's names, for what no generator here does."""
    family = lora.facts.family if lora else "flux"
    served = [name for name in settings.generators if lora is None or settings.takes_loras(name)]
    fitting = [name for name in served if settings.variant(name).family == family] or ([] if lora else served)
    if not fitting:
        of = f" that takes LoRAs of {family}" if lora else ""
        raise UnknownVariant(f"model_id: there is no generator here{of}", field="model_id")
    name = fitting[0]
    takes = GENERATIONS[settings.variant(name).family]
    if body.num_images > (most := settings.generators[name].max_count):
        raise InputError(f"num_images: {name} makes at most {most} pictures in a job", field="num_images")
    return {
        "type": "generate",
        "model_id": name,
        **body.model_dump(include={"prompt", "width", "height", "seed"}),
        "negative_prompt": body.negative_prompt if takes.takes_negative_prompt else None,
        "steps": body.num_inference_steps,
        "guidance": body.guidance_scale,
        "count": body.num_images,
        "loras": [{"id": lora.id, "scale": 0.8 if body.lora_weight is None else body.lora_weight}] if lora else [],
    }


async def _found(job_id: str, service: Service, caller: Caller) -> Job:
    job = await service.jobs.get(job_id, caller)
    if job.type != "generate":
        raise UnknownJob(f"there is no job {job_id} of pictures")
    return job


async def _job(job: Job, service: Service) -> StudioJob:
    parameters = job.parameters
    assert isinstance(parameters, GenerateParameters), "other types are not shown here"
    stored = sorted(job.artifacts, key=lambda one: one.index or 0)
    links = await asyncio.gather(*(service.jobs.link(one, service.jobs.settings.api.link_s) for one in stored))
    lora = next(iter(parameters.loras), None)
    has_failed = job.status.is_final and job.status != State.SUCCEEDED
    return StudioJob(
        **job.model_dump(include={"id", "created_at"}),
        status="failed" if has_failed else "completed" if job.status.is_final else "processing",
        prompt=parameters.prompt,
        parameters=StudioParameters(
            **parameters.model_dump(include={"guidance_scale", "width", "height"}),
            num_images=parameters.count,
            num_inference_steps=parameters.steps,
            seed=job.seed,
            seeds=[job.seed if one.seed is None else one.seed for one in stored],
            model_id=lora and lora.id,
            lora_weight=lora and lora.scale,
            output_paths=[one.path for one in stored],
        ),
        output_paths=links,
        error_message=job.error.message if has_failed and job.error else None,
        completed_at=job.finished_at,
    )


def _type(lora: Lora) -> str:
    return f"{lora.facts.family}_image"


async def _model(lora: Lora, service: Service) -> StudioModel:
    return StudioModel(
        **lora.model_dump(include={"id", "name", "version", "created_at"}),
        model_type=_type(lora),
        trigger_word=lora.trigger_word or None,
        file_size_mb=math.ceil(lora.size_bytes / 2**20),
        model_metadata=lora.facts.model_dump() | lora.model_dump(include={"sha256", "alpha"}),
        download_url=await service.loras.link(lora, service.jobs.settings.api.link_s),
    )
