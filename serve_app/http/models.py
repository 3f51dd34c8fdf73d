"""HTTP routes of models: those that are served, and the LoRAs that clients register for them. One body for several
clients."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ValidationError

from ..blobs import UploadLink
from ..generate.loras import Lora, LoraBody
from ..generate.request import GenerateBody
from ..jobs.kinds import Caller
from ..models import Family, LoraFacts
from ..parameters import VariantName
from ..settings import Settings
from .forms import read_json
from .openapi import portable
from .problems import invalid, json_body, problems
from .service import Served, VariantReadiness, caller_with

ModelState = Literal["available", "loading", "loaded", "failed"]
#: By the state of its replicas.
_STATES: Mapping[str, ModelState] = dict(
    ready="loaded", starting="loading", scaled_to_zero="available", failed="failed"
)
_KINDS: Mapping[Family, str] = {"sdxl": "sdxl-checkpoint", "flux": "flux-transformer", "fake": "fake"}


class ModelView(BaseModel):
    id: str
    object: Literal["model"] = "model"
    #: Not known.
    created: int = 0
    owned_by: str
    name: str
    #: `sdxl-checkpoint`, `flux-transformer`, `fake`; `inpaint` for those that edit photos.
    kind: str
    #: The commit of its repository; empty where it is not pinned.
    version: str
    installed: bool
    enabled: bool = True
    #: JSON Schema of what a job may ask of it; empty for models that edit photos.
    parameters_schema: Mapping[str, Any]
    #: `available`: loaded when a job comes.
    state: ModelState
    #: Of a replica that has loaded it.
    where: Mapping[str, Any]
    #: Why, if its state is `failed`.
    error: str
    capabilities: Mapping[str, Any]
    #: Of what a job leaves out.
    defaults: Mapping[str, Any]
    source_uri: str | None
    #: The name of a file of the server's own, without its folder.
    local_path: str | None
    files_json: Sequence[str]
    #: Of a LoRA; null for models that are served.
    lora: "LoraView | None" = None


class LoraView(LoraFacts):
    """What is known of a LoRA. `alpha_scale` is what its changes are multiplied by beside a job's scale."""

    sha256: str
    size_bytes: int
    trigger_word: str
    #: As it was given.
    alpha: float | None
    #: `applied`, `ignored` (FLUX.1's prompts are encoded without LoRAs), or `none`.
    text_encoder: Literal["applied", "ignored", "none"]


class Upload(BaseModel):
    """Where the file is to be sent: with `method` and just these headers. Ask again when it is there."""

    method: Literal["PUT"] = "PUT"
    url: str
    headers: Mapping[str, str]


class Registered(BaseModel):
    """One of the two is null."""

    model: ModelView | None
    upload: Upload | None


class ModelList(BaseModel):
    """The same twice: `data` for clients of OpenAI's, `models` for others."""

    object: Literal["list"] = "list"
    data: Sequence[ModelView]
    models: Sequence[ModelView]


_Id = Annotated[VariantName, Path(alias="id")]
_Reader = Annotated[Caller, caller_with("read")]
_Submitter = Annotated[Caller, caller_with("submit")]

router = APIRouter(prefix="/v1/models", responses=problems(401, 403, 429, 503))


@router.get("")
async def list_models(service: Served, caller: _Reader) -> ModelList:
    """The models that are served, whether they can work now or not; then the LoRAs, newest first."""
    rows = [_view(name, service.jobs.settings, readiness) for name, readiness in service.models().items()]
    rows += [lora_view(lora) for lora in await service.loras.list(caller)]
    return ModelList(data=rows, models=rows)


@router.get("/{id}", responses=problems(404))
async def get_model(name: _Id, service: Served, caller: _Reader) -> ModelView:
    """A model, or a LoRA."""
    readiness = service.models().get(name)
    if readiness is None:
        return lora_view(await service.loras.get(name, caller))
    return _view(name, service.jobs.settings, readiness)


@router.post(
    "",
    status_code=201,
    responses={202: {"model": Registered}, **problems(400, 404, 408, 413, 415, 422)},
    openapi_extra={"requestBody": json_body("LoraBody")},
)
async def register_lora(request: Request, response: Response, service: Served, caller: _Submitter) -> Registered:
    """Register a LoRA. 202 until its file is uploaded: send it to `upload`, and ask again with the same body."""
    try:
        body = LoraBody.model_validate(await read_json(request, service.limits))
    except ValidationError as e:
        raise invalid(e) from None
    found = await service.loras.register(body, caller)
    if isinstance(found, UploadLink):
        response.status_code = 202
        return Registered(model=None, upload=Upload(url=found.url, headers=found.headers))
    return Registered(model=lora_view(found), upload=None)


@router.delete("/{id}", status_code=204, responses=problems(404))
async def delete_lora(lora_id: _Id, service: Served, caller: _Submitter) -> None:
    """Delete a LoRA, and the file that was uploaded for it. Jobs that use it fail, but where it is loaded already."""
    await service.loras.delete(lora_id, caller)


def _view(name: str, settings: Settings, readiness: VariantReadiness) -> ModelView:
    row, state = settings.variant(name), _STATES[readiness.state]
    capabilities: dict[str, Any] = {"inpaint": row.generation is None, "generate": row.generation is not None}
    defaults, schema = dict[str, Any](), dict[str, Any]()
    if takes := row.generation:
        capabilities |= {"max_count": settings.generators[name].max_count, "multiple_px": takes.multiple_px}
        capabilities |= {"schedulers": takes.schedulers, "negative_prompt": takes.takes_negative_prompt}
        defaults = takes.defaults.model_dump(exclude={"guidance_scale"}) | {"guidance": takes.defaults.guidance_scale}
        schema = portable(GenerateBody.model_json_schema())
    return ModelView(
        id=name,
        owned_by=row.repo.partition("/")[0] if row.repo else "local",
        name=name,
        kind=_KINDS.get(row.family, "inpaint"),
        version=row.revision or "",
        installed=state != "failed",
        parameters_schema=schema,
        state=state,
        where=readiness.where,
        error=readiness.error,
        capabilities=capabilities,
        defaults=defaults,
        source_uri=f"hf://{row.repo}" if row.repo else None,
        local_path=_shown(row.file) if row.file and not row.repo else None,
        files_json=[_shown(one) for one in (row.file, row.base) if one],
    )


def lora_view(lora: Lora) -> ModelView:
    facts = lora.facts
    text_encoder: Any = "ignored" if lora.ignores_text_encoder else "applied" if facts.text_encoder_layers else "none"
    return ModelView(
        id=lora.id,
        created=int(lora.created_at.timestamp()),
        owned_by=lora.owner or "local",
        name=lora.name,
        kind=f"{facts.family}-lora",
        version=lora.version,
        installed=True,
        parameters_schema={},
        state="available",
        where={},
        error="",
        capabilities={"lora": True},
        defaults={"scale": 1.0},
        source_uri=None,
        local_path=None,
        files_json=[lora.path],
        lora=LoraView(
            **facts.model_dump(),
            **lora.model_dump(include={"sha256", "size_bytes", "trigger_word", "alpha"}),
            text_encoder=text_encoder,
        ),
    )


def _shown(path: str) -> str:
    """Without the folders of this machine."""
    return PurePath(path).name if PurePath(path).is_absolute() else path
