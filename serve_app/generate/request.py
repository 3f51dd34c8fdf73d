"""What a client asks for, and what becomes of it: every value set, and one that the model can do."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..errors import InputError, LoraTooLarge, NotSupported, UnknownVariant, WrongModel
from ..jobs.kinds import PostedBody
from ..models import Family, Variant
from ..parameters import ID_PATTERN, GenerateParameters, Prompt, Seed, Whole
from ..settings import Settings
from .loras import Lora

#: What another system's clients name a family.
_ENGINES: Mapping[str, Family] = {"sdxl": "sdxl", "flux-srpo": "flux", "flux": "flux"}

Side = Annotated[Whole, Field(ge=64, le=2048)]

#: Of `api.smoke`.
SMOKE_SIDE_PX, SMOKE_STEPS = 256, 10


class LoraAsked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    #: Of a registered one.
    id: Annotated[str, StringConstraints(pattern=ID_PATTERN)]
    scale: Annotated[float, Field(strict=True, ge=-10, le=10, allow_inf_nan=False)] = 1.0


_EXAMPLE: Any = {"type": "generate", "prompt": "an old-growth forest at dawn", "steps": 24, "seed": 7}


class GenerateBody(PostedBody):
    """Pictures from a prompt. What is left out is as the model has it: see `defaults` of `GET /v1/models/{id}`; without
    `model_id`, the model is the first one of `engine`, or of all."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    type: Literal["generate"]
    prompt: Annotated[Prompt, StringConstraints(min_length=1)]
    negative_prompt: Prompt | None = None
    #: Pixels; a multiple of 8 for SDXL, of 16 for FLUX.1.
    width: Side | None = None
    height: Side | None = None
    #: Of the first picture; the others have the numbers that follow. Left out: one that the answer tells.
    seed: Seed | None = None
    count: Annotated[Whole, Field(ge=1, le=100)] = 1
    format: Literal["png", "jpg", "jpeg", "webp"] = "png"
    engine: Literal["sdxl", "flux", "flux-srpo"] | None = None
    scheduler: Annotated[str, StringConstraints(max_length=64)] | None = None
    #: Whether prompt, seed and model are written into each file.
    embed_metadata: bool = True
    #: Has no effect: all models run here.
    provider: Annotated[str, StringConstraints(max_length=64)] | None = None
    #: The pictures are made with these, all at once. Where no model is named, it is the first one that they fit.
    loras: Annotated[tuple[LoraAsked, ...], Field(max_length=16)] = ()
    #: Not supported: null, or left out.
    chain: None = None


def resolved(body: GenerateBody, settings: Settings, loras: Sequence[Lora] = ()) -> tuple[str, GenerateParameters]:
    """The model's name, and the parameters, none of which is left open. `api.smoke` goes before all. `loras` are those
    that `body` names.

    Raises UnknownVariant; WrongModel for a LoRA of another model; InputError for a value that the model cannot do.
    """
    name = _model(body, settings, loras)
    takes = settings.variant(name).generation
    assert takes is not None, "settings let nothing else be a generator"
    _check_loras(name, settings, loras)
    given = body.model_dump(include={"width", "height", "steps"}, exclude_none=True)
    if settings.api.smoke:
        given = {"width": SMOKE_SIDE_PX, "height": SMOKE_SIDE_PX, "steps": SMOKE_STEPS}
    guidance = {} if body.guidance is None else {"guidance_scale": body.guidance}
    parameters = GenerateParameters(
        **{**takes.defaults.model_dump(), **given, **guidance},
        prompt=body.prompt,
        negative_prompt=body.negative_prompt or "",
        count=body.count,
        format="jpg" if body.format == "jpeg" else body.format,
        scheduler=body.scheduler,
        embed_metadata=body.embed_metadata,
        loras=tuple(lora.use(asked.scale) for lora, asked in zip(loras, body.loras, strict=True)),
    )
    for side, px in (("width", parameters.width), ("height", parameters.height)):
        if rest := px % takes.multiple_px:
            near = f"{px - rest} or {px - rest + takes.multiple_px}"
            raise InputError(
                f"{side}: {px} is no multiple of {takes.multiple_px}, as {name} needs; {near} is", field=side
            )
    if body.scheduler is not None and body.scheduler not in takes.schedulers:
        raise InputError(f"scheduler: {name} has {', '.join(takes.schedulers)}", field="scheduler")
    if body.negative_prompt and not takes.takes_negative_prompt:
        raise InputError(f"negative_prompt: {name} takes none", field="negative_prompt")
    if body.count > (most := settings.generators[name].max_count):
        raise InputError(f"count: {name} makes at most {most} pictures in a job", field="count")
    return name, parameters


def _check_loras(name: str, settings: Settings, loras: Sequence[Lora]) -> None:
    if loras and not settings.takes_loras(name):
        raise NotSupported(f"loras: {name} takes none", field="loras")
    if len(loras) > (most := settings.loras.per_job):
        raise InputError(f"loras: a job uses at most {most} together (loras.per_job)", field="loras")
    if sum(lora.size_bytes for lora in loras) > (most := settings.loras.file_bytes):
        raise LoraTooLarge(f"loras: together they have more than {most} bytes (loras.file_bytes)", field="loras")
    if len({lora.id for lora in loras}) < len(loras):
        raise InputError("loras: one is given twice", field="loras")
    family = settings.variant(name).family
    for number, lora in enumerate(loras):
        if lora.facts.family != family:
            what = f"loras.{number}.id: {lora.name} is a LoRA of {lora.facts.family}, and {name} is {family}"
            raise WrongModel(what, field=f"loras.{number}.id")


def _model(body: GenerateBody, settings: Settings, loras: Sequence[Lora]) -> str:
    wanted = _ENGINES[body.engine] if body.engine else None

    def fits(row: Variant) -> bool:
        # A fake stands for every engine.
        return wanted is None or row.family in (wanted, "fake")

    names = [name for name in settings.generators if fits(settings.variant(name))]
    if body.model_id is None and names:
        # What none of them does is refused by name.
        families = {lora.facts.family for lora in loras}
        fitting = (name for name in names if {settings.variant(name).family} == families and settings.takes_loras(name))
        return next(fitting, names[0])
    if body.model_id not in names:
        of = f" of engine {body.engine}" if body.engine else ""
        why = f"model_id: {body.model_id} is no model{of}" if body.model_id else f"engine: there is no model{of}"
        field = "model_id" if body.model_id else "engine"
        raise UnknownVariant(f"{why}; the models{of} are {', '.join(names) or 'none'}", field=field)
    return body.model_id
