"""HTTP routes of models: which are served, what they take, and whether they can work. One body for several clients."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..generate.request import GenerateBody
from ..models import Family
from ..parameters import VariantName
from ..settings import Settings
from .openapi import portable
from .problems import problems
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


class ModelList(BaseModel):
    """The same twice: `data` for clients of OpenAI's, `models` for others."""

    object: Literal["list"] = "list"
    data: Sequence[ModelView]
    models: Sequence[ModelView]


router = APIRouter(prefix="/v1/models", dependencies=[caller_with("read")], responses=problems(401, 403, 429, 503))


@router.get("")
async def list_models(service: Served) -> ModelList:
    """The models that are served, whether they can work now or not."""
    rows = [_view(name, service.jobs.settings, readiness) for name, readiness in service.models().items()]
    return ModelList(data=rows, models=rows)


@router.get("/{id}", responses=problems(404))
async def get_model(name: Annotated[VariantName, Path(alias="id")], service: Served) -> ModelView:
    """A model."""
    readiness = service.models().get(name)
    if readiness is None:
        raise HTTPException(404, "no such model is served; see GET /v1/models")
    return _view(name, service.jobs.settings, readiness)


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


def _shown(path: str) -> str:
    """Without the folders of this machine."""
    return PurePath(path).name if PurePath(path).is_absolute() else path
