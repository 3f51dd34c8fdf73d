"""HTTP routes of models: which are served, what they take, and whether they can work. One body for several clients."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from ..generate.request import GenerateBody
from ..models import Family, Variant
from ..settings import Settings
from .auth import caller_with
from .openapi import portable
from .problems import problems

if TYPE_CHECKING:
    from .app import Services, VariantReadiness

ModelState = Literal["available", "loading", "loaded", "failed"]
#: By the state of its replicas.
_STATES: Mapping[str, ModelState] = {
    "ready": "loaded",
    "starting": "loading",
    "scaled_to_zero": "available",
    "failed": "failed",
}
_KINDS: Mapping[Family, str] = {"sdxl": "sdxl-checkpoint", "flux": "flux-transformer", "fake": "fake"}


class ModelRow(BaseModel):
    model_config = ConfigDict(frozen=True)

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


class ModelDetail(ModelRow):
    source_uri: str | None
    #: The name of a file of the server's own, without its folder.
    local_path: str | None
    files_json: Sequence[str]


class ModelList(BaseModel):
    """The same twice: `data` for clients of OpenAI's, `models` for others."""

    object: Literal["list"] = "list"
    data: Sequence[ModelRow]
    models: Sequence[ModelRow]


def routes(service: "Services") -> APIRouter:
    made = APIRouter(prefix="/v1/models", dependencies=[Depends(caller_with(lambda: service().access, "read"))])

    def found() -> Sequence[ModelDetail]:
        settings = service().jobs.settings
        return [_model(name, settings, readiness) for name, readiness in service().models().items()]

    @made.get("", responses=problems(401, 403, 429, 503))
    async def list_models() -> ModelList:
        """The models that are served, whether they can work now or not."""
        rows = [ModelRow.model_validate(one.model_dump(exclude=_OF_DETAIL)) for one in found()]
        return ModelList(data=rows, models=rows)

    @made.get("/{id}", responses=problems(401, 403, 404, 422, 429, 503))
    async def get_model(name: Annotated[str, Path(alias="id", pattern=r"\A[A-Za-z0-9_.-]{1,64}\z")]) -> ModelDetail:
        """A model."""
        for one in found():
            if one.id == name:
                return one
        raise HTTPException(404, "no such model is served; see GET /v1/models")

    return made


_OF_DETAIL = set(ModelDetail.model_fields) - set(ModelRow.model_fields)


def _model(name: str, settings: Settings, readiness: "VariantReadiness") -> ModelDetail:
    row, state = settings.variant(name), _STATES[readiness.state]
    files = [one for one in (row.file, row.base) if one]
    return ModelDetail(
        id=name,
        owned_by=row.repo.partition("/")[0] if row.repo else "local",
        name=name,
        kind=_KINDS.get(row.family, "inpaint"),
        version=row.revision or "",
        installed=state != "failed",
        state=state,
        where=readiness.where,
        error=readiness.error,
        **_of_jobs(name, row, settings),
        source_uri=f"hf://{row.repo}" + (f"@{row.revision}" if row.revision else "") if row.repo else None,
        local_path=_shown(row.file) if row.file and not row.repo else None,
        files_json=[_shown(one) for one in files],
    )


def _of_jobs(name: str, row: Variant, settings: Settings) -> dict[str, Any]:
    takes = row.generation
    if takes is None:
        return {"capabilities": {"inpaint": True}, "defaults": {}, "parameters_schema": {}}
    capabilities = {
        "generate": True,
        "max_count": settings.generators[name].max_count,
        "multiple_px": takes.multiple_px,
        "schedulers": takes.schedulers,
        "negative_prompt": takes.takes_negative_prompt,
    }
    defaults = takes.defaults.model_dump()
    defaults["guidance"] = defaults.pop("guidance_scale")
    return {
        "capabilities": capabilities,
        "defaults": defaults,
        "parameters_schema": portable(GenerateBody.model_json_schema()),
    }


def _shown(path: str) -> str:
    """Without the folders of this machine."""
    return PurePath(path).name if PurePath(path).is_absolute() else path
