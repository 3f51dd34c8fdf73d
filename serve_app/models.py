"""Models: the variants that paint, what a model is asked for, and what it gives. Pure data."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

#: The first four edit photos, the others make pictures from prompts. `fake` draws a card with its prompt and seed.
Family = Literal["flux-fill", "flux2-klein", "telea", "pause", "sdxl", "flux", "fake"]
#: `w8a8`: weights and activations int8. `fp8`: both float8 (e4m3).
Repacking = Literal["w8a8", "fp8"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Defaults(_Value):
    """What a picture from a prompt is made with where its job says nothing."""

    width: int = 1024
    height: int = 1024
    steps: int
    guidance_scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What a family that makes pictures from prompts takes."""

    defaults: Defaults
    #: Sides are multiples of this, in pixels.
    multiple_px: int
    #: Names of the schedulers that a job may choose.
    schedulers: tuple[str, ...]
    takes_negative_prompt: bool
    takes_loras: bool = True


#: Source of the defaults: most tools call diffusers' StableDiffusionXLPipeline so.
_SDXL = Generation(
    defaults=Defaults(steps=30, guidance_scale=7.0),
    multiple_px=8,
    schedulers=("euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "unipc"),
    takes_negative_prompt=True,
)
#: By family. Source of FLUX.1-dev's defaults: its model card.
GENERATIONS: Mapping[Family, Generation] = {
    "sdxl": _SDXL,
    "flux": Generation(
        defaults=Defaults(steps=28, guidance_scale=3.5),
        multiple_px=16,
        schedulers=("euler",),
        takes_negative_prompt=False,
    ),
    "fake": replace(_SDXL, takes_loras=False),
}


class VariantLora(_Value):
    """A LoRA that a variant always paints with."""

    #: Hub repository of `file`.
    repo: str | None = None
    #: safetensors file in `repo`, or a local path where `repo` is absent.
    file: str = Field(pattern=r"\.safetensors\z")
    #: As `Variant.revision`.
    revision: str | None = None
    #: The change of a layer is multiplied by it and by its alpha / rank.
    scale: float = Field(1.0, ge=-10, le=10)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.repo}/{self.file}" if self.repo else self.file


class Variant(_Value):
    """One way to paint: an engine family and the weights it runs."""

    #: Which engine runs it; see `serve_app.engine.families`.
    family: Family
    #: Hub repository of `file`, e.g. `owner/name`.
    repo: str | None = None
    #: File in `repo`, or a local path where `repo` is absent: the transformer, as GGUF or safetensors; of
    #: `sdxl` all weights as safetensors, or a local folder in diffusers' layout, which is then its `base`, too.
    file: str | None = None
    #: Commit of `repo`. None: not pinned here; the weights lock file may pin it.
    revision: str | None = None
    #: Repository or local folder with VAE, scheduler, text encoders and the transformer's config; of `sdxl` the configs
    #: alone are read.
    base: str | None = None
    base_revision: str | None = None
    #: What the transformer's blocks are repacked to at load, approximately; None computes with what `file` holds.
    repack: Repacking | None = None
    #: Of `flux-fill` and `flux2-klein`. Added to the weights where those are unpacked or repacked, in this order, and
    #: otherwise to what the packed layers give.
    loras: tuple[VariantLora, ...] = ()
    #: Denoising steps of an edit whose message names none; None: those of the app's inference defaults.
    steps: int | None = Field(None, ge=1, le=100)
    #: Of `flux2-klein`, which has one prompt for all edits: the file with its embeddings, a local path or one in the
    #: blob store; `fluxfill weights embed` writes it there.
    embeddings: str | None = None
    #: Tokens a prompt is padded to for T5; of `flux2-klein`, for Qwen3.
    max_prompt_tokens: int = Field(512, ge=1, le=512)
    #: Whole GPUs a replica takes. 0 runs on the CPU.
    num_gpus: int = Field(0, ge=0, le=1)
    #: GiB resident on the device while serving (without text encoders); informative.
    memory_gib: float | None = None
    #: Of the weights, by its short name; informative. None where there are none, or where it is not known.
    licence: str | None = None
    #: Seconds the `pause` family sleeps per window in place of painting.
    pause_s: float = Field(1.0, ge=0, le=600)
    #: For load tests: the `pause` family reports no step and goes on after it was told to stop, as a hung GPU does.
    deaf: bool = False

    @model_validator(mode="after")
    def _takes_loras(self) -> "Variant":
        if self.loras and not self.edits_by_transformer:
            raise ValueError(f"loras: a variant of family {self.family} has none of its own")
        return self

    @property
    def takes_prompt(self) -> bool:
        """Whether a text encoder of its base model encodes its prompts. SDXL encodes them itself."""
        return self.family in ("flux-fill", "flux")

    @property
    def generation(self) -> Generation | None:
        """None for one that edits photos."""
        return GENERATIONS.get(self.family)

    @property
    def takes_strength(self) -> bool:
        """Whether its painting may start from a filled hole. The other families have no noise to start from."""
        return self.family == "flux-fill"

    @property
    def edits_by_transformer(self) -> bool:
        """Whether its edits have FLOPs that can be counted, and blocks that can be compiled."""
        return self.family in ("flux-fill", "flux2-klein")

    @property
    def removes(self) -> bool:
        """Whether it claims to remove what is under a mask; the `pause` family leaves a photo as it is."""
        return self.family != "pause"

    @property
    def counts_steps(self) -> bool:
        """Whether it paints in as many steps as it is asked for."""
        return self.family != "telea"


#: A `base`, `file` or `embeddings` under this prefix is written by a module `tiny` of `serve_app.engine` on first use.
TINY = "tiny:"

#: Of FLUX.1 [dev], FLUX.1 Fill [dev] and all that is made of them, packed files and LoRAs among it; see docs/models.md.
FLUX_DEV = "FLUX.1 [dev] Non-Commercial"
_GGUF_REPO = "YarvixPA/FLUX.1-Fill-dev-GGUF"
_BASE = "black-forest-labs/FLUX.1-Fill-dev"


def _gguf(quant: str, memory_gib: float, repack: Repacking | None = None, **more: Any) -> Variant:
    return Variant(
        family="flux-fill",
        repo=_GGUF_REPO,
        file=f"flux1-fill-dev-{quant}.gguf",
        base=_BASE,
        repack=repack,
        num_gpus=1,
        memory_gib=memory_gib,
        licence=FLUX_DEV,
        **more,
    )


def _tiny(quant: str, repack: Repacking | None = None, **more: Any) -> Variant:
    return Variant(
        family="flux-fill",
        file=f"{TINY}flux1-fill-dev-{quant}.gguf",
        base=f"{TINY}base",
        repack=repack,
        max_prompt_tokens=64,
        **more,
    )


def _flux_dev(quant: str, memory_gib: float) -> Variant:
    return Variant(
        family="flux",
        repo="city96/FLUX.1-dev-gguf",
        file=f"flux1-dev-{quant}.gguf",
        base="black-forest-labs/FLUX.1-dev",
        num_gpus=1,
        memory_gib=memory_gib,
        licence=FLUX_DEV,
    )


_KLEIN = "black-forest-labs/FLUX.2-klein-4B"
#: Distils FLUX.1-dev to 8 steps. Made for another model than FLUX.1-Fill: what they paint together was never looked at.
_TURBO: Mapping[str, Any] = {
    "loras": (VariantLora(repo="alimama-creative/FLUX.1-Turbo-Alpha", file="diffusion_pytorch_model.safetensors"),),
    "steps": 8,
}

_SDXL_REPO = "stabilityai/stable-diffusion-xl-base-1.0"

#: Resident sizes were computed from the tensor shapes; of FLUX.1 by `python -m benchmarks.engine --memory`.
BUILT_IN: dict[str, Variant] = {
    "Q4_0": _gguf("Q4_0", 4.8),
    "Q5_K_S": _gguf("Q5_K_S", 5.8),
    "Q8_0": _gguf("Q8_0", 8.8),
    "Q8_0-w8a8": _gguf("Q8_0", 8.3, "w8a8"),
    "Q8_0-fp8": _gguf("Q8_0", 8.3, "fp8"),
    # Beside packed layers, a LoRA of rank 64 for all of them takes 0.7 GiB.
    "Q8_0-turbo": _gguf("Q8_0", 9.5, **_TURBO),
    "Q8_0-turbo-w8a8": _gguf("Q8_0", 8.3, "w8a8", **_TURBO),
    "tiny-Q4_0": _tiny("Q4_0"),
    "tiny-Q5_K_S": _tiny("Q5_K_S"),
    "tiny-Q8_0": _tiny("Q8_0"),
    "tiny-Q8_0-w8a8": _tiny("Q8_0", "w8a8"),
    "tiny-Q8_0-turbo": _tiny("Q8_0", loras=(VariantLora(file=f"{TINY}turbo.safetensors"),), steps=8),
    "klein-4B": Variant(
        family="flux2-klein",
        repo=_KLEIN,
        file="transformer/diffusion_pytorch_model.safetensors",
        base=_KLEIN,
        embeddings="prompts/klein-4B.safetensors",
        steps=4,
        num_gpus=1,
        memory_gib=7.4,
        licence="Apache-2.0",
    ),
    "tiny-klein": Variant(
        family="flux2-klein",
        file=f"{TINY}flux2-klein.safetensors",
        base=f"{TINY}klein-base",
        embeddings=f"{TINY}prompt.safetensors",
        steps=4,
        max_prompt_tokens=64,
    ),
    "telea": Variant(family="telea"),
    "sdxl": Variant(
        family="sdxl",
        repo=_SDXL_REPO,
        file="sd_xl_base_1.0.safetensors",
        base=_SDXL_REPO,
        num_gpus=1,
        memory_gib=6.6,
        licence="OpenRAIL++-M",
    ),
    "flux-dev-Q8_0": _flux_dev("Q8_0", 8.8),
    "flux-dev-Q4_0": _flux_dev("Q4_0", 4.8),
    "tiny-sdxl": Variant(family="sdxl", file=f"{TINY}sdxl.safetensors", base=f"{TINY}sdxl-base"),
    "tiny-flux-dev": Variant(
        family="flux", file=f"{TINY}flux1-dev-Q8_0.gguf", base=f"{TINY}flux-dev-base", max_prompt_tokens=64
    ),
    "fake": Variant(family="fake"),
}


class Trial(_Value):
    """One painting of a cell, timed in the replica."""

    #: From the painting's beginning to its end.
    wall_s: float
    #: By CUDA events; None where there is no GPU.
    gpu_ms: float | None
    #: Seconds: `prepare_s` (up to the first step: the photo is encoded), `denoise_s` (the steps), `decode_s` (what
    #: follows the last step: decoding and blending). Summed over the windows. With one step, or none, it cannot be told
    #: from what comes before: `prepare_s` is 0.
    stages: Mapping[str, float]
    #: Bytes of device memory, allocated at most and reserved at most while it was painted; None where there is no GPU.
    peak_bytes: int | None
    reserved_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """Pixels `x0 <= x < x1`, `y0 <= y < y1`."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of these pixels in an array `[height, width, ...]`."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)


#: uint8; `[height, width, 3]` RGB for photos, `[height, width]` for masks.
Pixels = npt.NDArray[np.uint8]


class Progress(_Value):
    #: Steps done, over all windows.
    step: int = 0
    #: Steps in all; 0 while unknown.
    steps: int = 0

    @property
    def fraction(self) -> float:
        """0..1."""
        return self.step / self.steps if self.steps else 0.0


def steps_run(steps: int, strength: float) -> int:
    """Of a schedule of `steps`, those that are left, at its end, for an edit of this strength, above 0 and up to 1:
    rounded up. Source: FluxFillPipeline.get_timesteps of diffusers."""
    return steps - int(steps - steps * strength)


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRequest:
    """What a replica needs for one job, and nothing about whose it is but the id."""

    job_id: str
    #: uint8 RGB, `[height, width, 3]`, at working scale.
    canvas: Pixels
    #: uint8, `[height, width]`; 255 is painted, 0 is kept.
    mask: Pixels
    #: In painting order, in canvas pixels; each is a bucket size.
    windows: Sequence[Box]
    #: Of the whole schedule.
    steps: int
    guidance_scale: float
    seed: int
    #: Below 1, painting starts from a filled hole under so much noise, and only the schedule's last steps run.
    strength: float = 1.0
    #: W3C trace context of the message that asked, for the replica's log; empty where there is none.
    traceparent: str = ""
    #: safetensors bytes with `prompt_embeds` `[1, tokens, d]` and `pooled_prompt_embeds` `[1, d]`; None where the
    #: variant takes no prompt.
    embeddings: bytes | None = None

    @property
    def steps_run(self) -> int:
        """Of each window."""
        return steps_run(self.steps, self.strength)


class LoraFacts(_Value):
    """What a LoRA's file holds, as it was found by looking at all of it."""

    #: Of the models that it fits.
    family: Family
    #: Who writes such files: `diffusers`, `kohya`, `ai-toolkit`, `peft`, `xlabs`, `lycoris`.
    format: str
    #: `F16`, `BF16` or `F32`; several are joined by commas.
    dtype: str
    #: The largest of its layers'.
    rank: int
    #: Layers of the model that it changes, those of text encoders among them.
    layers: int
    text_encoder_layers: int = 0
    #: Whether each layer says its alpha. Those that do not have alpha = rank, or the one that was given.
    has_alpha: bool
    #: alpha / rank, the lowest and the highest of its layers': what the change is multiplied by beside the job's scale.
    alpha_scale: tuple[float, float]


class LoraUse(_Value):
    """A LoRA of a job: what a replica needs to find its file, to know that it is the one that was registered, and to
    use it."""

    id: str
    name: str
    #: Of the blob.
    path: str
    sha256: str
    size_bytes: int
    #: For layers that say none; None: their rank.
    alpha: float | None = None
    #: As the job gives it; the change of a layer is multiplied by it and by its alpha / rank.
    scale: float = 1.0
    #: `scale` times alpha / rank, the lowest and the highest of its layers'.
    effective_scale: tuple[float, float] = (1.0, 1.0)
    #: Whether it has layers of text encoders that have no effect: FLUX.1's prompts are encoded elsewhere.
    ignores_text_encoder: bool = False

    @property
    def key(self) -> str:
        """The same for uses whose adapters are equal."""
        return self.sha256 if self.alpha is None else f"{self.sha256}-{self.alpha!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """What a replica needs to make one picture from a prompt."""

    job_id: str
    prompt: str
    negative_prompt: str = ""
    #: Pixels; multiples of the family's `multiple_px`.
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    #: None: the model's own.
    scheduler: str | None = None
    #: As in EditRequest.
    traceparent: str = ""
    #: As in EditRequest; None for families that encode prompts themselves.
    embeddings: bytes | None = None
    #: The picture is made with these and no other.
    loras: Sequence[LoraUse] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """What a model made of one request."""

    #: One, of the request's canvas size or width and height.
    images: Sequence[Pixels]
    #: Seconds the engine was at work.
    busy_s: float
    #: Device milliseconds; None where there is no GPU.
    gpu_ms: float | None = None
    #: Seconds: `prepare_s` (up to the first step: the photo is encoded), `denoise_s` (the steps), `decode_s` (what
    #: follows the last step). Summed over the windows; of one that was begun again, the second time's.
    stages: Mapping[str, float] = field(default_factory=dict)
    #: Bytes of device memory, allocated at most and reserved at most meanwhile; None where there is no GPU.
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    #: Where it ran: device, compute capability, replica, node.
    where: Mapping[str, Any] = field(default_factory=dict)
    #: Those of the request that were painted: of the others nothing would have been kept.
    windows: Sequence[Box] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One request painted several times for an audit."""

    #: uint8 RGB, the request's canvas size: the last painting's.
    canvas: Pixels
    #: The first painting, then the warm ones.
    trials: Sequence[Trial]
    #: Whether all gave the same bytes.
    repeats: bool
    #: As in Images, with `replica`, `node` and `pid`.
    where: Mapping[str, Any]
    #: As in Images.
    windows: Sequence[Box]


OnProgress = Callable[[Progress], Awaitable[None]]


R_contra = TypeVar("R_contra", EditRequest, GenerateRequest, contravariant=True)


class Model(Protocol):
    """One variant, wherever it runs."""

    @property
    def is_ready(self) -> bool:
        """Whether a request would begin without waiting for a replica to start or to load."""


class ImageModel(Model, Protocol[R_contra]):
    """A variant that edits photos, or one that makes pictures from prompts."""

    async def run(self, request: R_contra, on_progress: OnProgress) -> Images:
        """Paint the windows in order, or make the picture. Cancelling the call stops the engine within one step.

        Raises VariantNotReady, VariantLoadFailed, ReplicaLost, GpuLost, OutOfMemory, PaintError.
        """


class PromptEncoder(Protocol):
    async def encode(self, variant: str, prompt: str) -> bytes | None:
        """Embeddings as EditRequest wants them; None where the variant takes no prompt.

        Raises UnknownVariant, VariantLoadFailed, ReplicaLost, StoreUnavailable.
        """
