"""What a job may ask for: the values and their limits, and the parameters of each type of job."""

import math
from collections.abc import Mapping
from enum import StrEnum
from itertools import product
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from .models import LoraUse


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


#: What may stand in a user or session id; nothing that matches can escape a path.
ID_PATTERN = r"\A[A-Za-z0-9_-]{1,128}\z"


def _whole(value: object) -> object:
    return int(value) if type(value) is float and value.is_integer() else value


Id = Annotated[str, StringConstraints(pattern=ID_PATTERN)]

#: JSON has one kind of number: 28.0 is 28. A string or a fraction is no whole number.
Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)]

#: Range checks shared with the settings' own defaults.
Steps = Annotated[Whole, Field(ge=1, le=100)]

GuidanceScale = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]

#: Of an edit; see `EditRequest.strength`. At the lowest, one step of the most is left.
Strength = Annotated[float, Field(strict=True, ge=0.01, le=1)]

#: See `WindowSettings.mask_grow`.
MaskGrow = Annotated[float, Field(strict=True, ge=0, le=0.05, allow_inf_nan=False)]

VariantName = Annotated[str, StringConstraints(pattern=r"\A[A-Za-z0-9_.-]{1,64}\z")]

Prompt = Annotated[str, StringConstraints(max_length=2000)]


#: Prompts for edits, by their names.
PROMPTS: Mapping[str, str] = {
    # What should be seen and nothing else: a negated word makes the model draw what it names. Source:
    # https://docs.bfl.ai/guides/prompting_unified_technical.
    "plain": "seamless natural background matching surrounding area, photorealistic",
    "seamless": "seamless natural background matching surrounding area, photorealistic, no leash, no rope, no cord",
    "ground": "empty ground, nothing here, just the natural ground surface continuing seamlessly",
}

#: Names of `PROMPTS`, by the prompts.
PROMPT_NAMES: Mapping[str, str] = {prompt: name for name, prompt in PROMPTS.items()}

#: In place of one of `PROMPTS`, its name may be given.
NamedPrompt = Annotated[Prompt, AfterValidator(lambda given: PROMPTS.get(given, given))]


class CropStrategy(StrEnum):
    """How much of the photo the model sees, and at which scale; see `serve_app.edit.windows`."""

    AUTO = "auto"
    CROP = "crop"
    RESIZE = "resize"
    ORIGINAL = "original"


#: Also in a Ray submission id, and a folder of the blob store.
RUN_ID_PATTERN = r"\A[A-Za-z0-9_-]{1,64}\z"

RunId = Annotated[str, StringConstraints(pattern=RUN_ID_PATTERN)]

_RUN_ID: TypeAdapter[str] = TypeAdapter(RunId)

Seed = Annotated[Whole, Field(ge=0, le=2**63 - 1)]

#: A matrix of an L4 takes about a minute a cell, twice.
MAX_CELLS = 500

#: Where nothing else is said.
MASK_GROW = 0.01

#: V4 signed links live no longer.
MAX_LINK_HOURS = 168


class Cell(_Value):
    """One value of each axis."""

    variant: VariantName
    guidance_scale: GuidanceScale
    steps: Steps
    seed: Seed
    prompt: Prompt
    crop: CropStrategy
    mask_grow: MaskGrow = MASK_GROW


class Matrix(_Value):
    """The axes. A cell is painted for every combination."""

    variants: tuple[VariantName, ...] = Field(("Q4_0", "Q5_K_S", "Q8_0"), min_length=1)
    guidance_scales: tuple[GuidanceScale, ...] = Field((2.0, 4.0, 10.0, 20.0, 30.0), min_length=1)
    steps: tuple[Steps, ...] = Field((28,), min_length=1)
    #: One for all cells by default: what differs between two pictures is then the axis, not the noise.
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    prompts: tuple[NamedPrompt, ...] = Field((PROMPTS["ground"],), min_length=1)
    crops: tuple[CropStrategy, ...] = Field((CropStrategy.AUTO,), min_length=1)
    #: Left out of a record where it says nothing, which older versions can read.
    mask_grows: tuple[MaskGrow, ...] = Field((MASK_GROW,), min_length=1, exclude_if=lambda value: value == (MASK_GROW,))

    @model_validator(mode="after")
    def _sound(self) -> "Matrix":
        axes = {name: getattr(self, name) for name in type(self).model_fields}
        for name, values in axes.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: a value is given twice")
        # Counted without making them: a body of 64 kB can ask for millions of millions.
        if (count := math.prod(map(len, axes.values()))) > MAX_CELLS:
            raise ValueError(f"{count} cells are more than {MAX_CELLS}")
        return self

    def cells(self) -> list[Cell]:
        """Variant by variant, in the order of the axes."""
        axes = (self.variants, self.guidance_scales, self.steps, self.seeds, self.prompts, self.crops, self.mask_grows)
        return [Cell(**dict(zip(Cell.model_fields, values, strict=True))) for values in product(*axes)]

    def name(self, cell: Cell) -> str:
        """Of the cell's files, without their ending: `Q4_0_gs2`. An axis beyond variant and guidance scale joins the
        name where it has several values: `Q4_0_gs2_st20_seed1_p2_crop_grow0.02`; prompts by their number, from 1."""
        more = (
            (self.steps, f"st{cell.steps}"),
            (self.seeds, f"seed{cell.seed}"),
            (self.prompts, self.number(cell.prompt)),
            (self.crops, str(cell.crop)),
            (self.mask_grows, f"grow{plain(cell.mask_grow)}"),
        )
        parts = [cell.variant, f"gs{plain(cell.guidance_scale)}", *(part for axis, part in more if len(axis) > 1)]
        return "_".join(parts)

    def number(self, prompt: str) -> str:
        """In names of files, from 1: `p2`."""
        return f"p{self.prompts.index(prompt) + 1}"

    def short(self, prompt: str) -> str:
        """In reports: its name where it is one of `PROMPTS`, otherwise its number."""
        return PROMPT_NAMES.get(prompt) or self.number(prompt)


def plain(number: float) -> str:
    """Without a fraction where there is none: 2, 2.5."""
    return str(int(number)) if float(number).is_integer() else repr(float(number))


class QualityBudget(_Value):
    """How far from the reference variant, inside the mask, a smaller one may be and still be recommended."""

    #: At least, mean over the variant's cells.
    min_ssim: float = Field(0.95, ge=-1, le=1)
    min_psnr_db: float = Field(30.0, ge=0)


class AuditRequest(_Value):
    """What is asked for: the parameters of the run's job, whose command line so repeats no caller's words."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: Literal["audit"] = "audit"
    user_id: Id
    session_id: Id
    matrix: Matrix = Matrix()
    #: What pictures are compared with. None: the last variant of the matrix.
    reference: VariantName | None = None
    #: Paintings of each cell: the first is timed apart, `wall_s` is the median of the others.
    runs: Annotated[Whole, Field(ge=2, le=20)] = 2
    #: Variants for which torch.compile is looked at. None: the recommended one.
    compile_variants: tuple[VariantName, ...] | None = None
    link_hours: float = Field(72.0, strict=True, gt=0, le=MAX_LINK_HOURS)
    budget: QualityBudget = QualityBudget()
    #: Of one replica's machine, in any one currency; None: costs are not given.
    price_per_hour: float | None = Field(None, strict=True, ge=0)
    #: GPUs the cluster can have. None: those it has when the audit starts.
    gpus: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _among(self) -> "AuditRequest":
        for name in (*((self.reference,) if self.reference else ()), *(self.compile_variants or ())):
            if name not in self.matrix.variants:
                raise ValueError(f"{name} is not among the matrix's variants: {', '.join(self.matrix.variants)}")
        return self

    @property
    def reference_variant(self) -> str:
        return self.reference or self.matrix.variants[-1]

    @property
    def link_s(self) -> int:
        return max(1, round(self.link_hours * 3600))


def is_run_id(text: str) -> bool:
    # By pydantic, whose pattern it is: Python's own re has no \z yet.
    try:
        _RUN_ID.validate_python(text)
    except ValidationError:
        return False
    return True


#: Of a picture: the ending of its file's name.
Format = Literal["png", "jpg", "webp"]

CONTENT_TYPES: Mapping[Format, str] = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


class GenerateParameters(_Value):
    """How to make the pictures of a job, resolved when the job is posted and the same for every attempt."""

    type: Literal["generate"] = "generate"
    prompt: str
    negative_prompt: str = ""
    #: Pixels.
    width: int
    height: int
    #: Denoising steps.
    steps: int
    guidance_scale: float
    #: Pictures; picture `i` is made with the job's seed plus `i`.
    count: int = 1
    format: Format = "png"
    #: None: the model's own.
    scheduler: str | None = None
    #: Whether prompt, seed and model are written into each file.
    embed_metadata: bool = True
    loras: tuple[LoraUse, ...] = ()


class EditParameters(_Value):
    """How to paint an edit, resolved at the first claim and the same for every attempt."""

    type: Literal["inpaint"] = "inpaint"
    prompt: str
    guidance_scale: float
    #: Denoising steps.
    steps: int
    crop_strategy: CropStrategy
    #: None: as the settings say. Left out of a record where it says nothing, which older versions can read.
    mask_grow: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    #: Of the edited photo, whatever its file is called. In PNG and WebP, which are lossless here, all that is not
    #: painted is the photo's, bit by bit. Left out of a record where it says nothing, which older versions can read.
    format: Annotated[Format, Field(exclude_if=lambda value: value == "jpg")] = "jpg"
    #: Below 1, painting starts from a filled hole; left out of a record at 1.
    strength: Annotated[Strength, Field(exclude_if=lambda value: value == 1)] = 1.0


#: What a job is to do, by its type.
Parameters = Annotated[EditParameters | GenerateParameters | AuditRequest, Field(discriminator="type")]

JobType = Literal["inpaint", "generate", "audit"]
