"""Variants: which weights paint, in which engine family, and what they need. Pure data."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Family = Literal["flux-fill", "telea", "pause"]
#: `w8a8`: weights and activations int8. `fp8`: both float8 (e4m3).
Repacking = Literal["w8a8", "fp8"]


class Variant(BaseModel):
    """One way to paint: an engine family and the weights it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Which engine runs it; see `serve_app.engine.families`.
    family: Family
    #: Hub repository of the quantised transformer, e.g. `owner/name`.
    repo: str | None = None
    #: File in `repo`, or a local path where `repo` is absent.
    file: str | None = None
    #: Commit of `repo`. None: not pinned here; the weights lock file may pin it.
    revision: str | None = None
    #: Repository or local folder with VAE, scheduler, text encoders and the transformer's config.
    base: str | None = None
    base_revision: str | None = None
    #: What the transformer's blocks are repacked to at load, approximately; None computes with what `file` holds.
    repack: Repacking | None = None
    #: Tokens a prompt is padded to for T5.
    max_prompt_tokens: int = Field(512, ge=1, le=512)
    #: Whole GPUs a replica takes. 0 runs on the CPU.
    num_gpus: int = Field(0, ge=0, le=1)
    #: GiB resident on the device while serving (without text encoders); informative.
    memory_gib: float | None = None
    #: Seconds the `pause` family sleeps per window in place of painting.
    pause_s: float = Field(1.0, ge=0, le=600)
    #: For load tests: the `pause` family reports no step and goes on after it was told to stop, as a hung GPU does.
    deaf: bool = False

    @property
    def takes_prompt(self) -> bool:
        return self.family == "flux-fill"

    @property
    def counts_steps(self) -> bool:
        """Whether it paints in as many steps as it is asked for."""
        return self.family != "telea"


#: A `base` or `file` under this prefix is written by `serve_app.engine.tiny` on first use.
TINY = "tiny:"

_GGUF_REPO = "YarvixPA/FLUX.1-Fill-dev-GGUF"
_BASE = "black-forest-labs/FLUX.1-Fill-dev"


def _gguf(quant: str, memory_gib: float, repack: Repacking | None = None) -> Variant:
    return Variant(
        family="flux-fill",
        repo=_GGUF_REPO,
        file=f"flux1-fill-dev-{quant}.gguf",
        base=_BASE,
        repack=repack,
        num_gpus=1,
        memory_gib=memory_gib,
    )


def _tiny(quant: str, repack: Repacking | None = None) -> Variant:
    return Variant(
        family="flux-fill",
        file=f"{TINY}flux1-fill-dev-{quant}.gguf",
        base=f"{TINY}base",
        repack=repack,
        max_prompt_tokens=64,
    )


#: Resident sizes were computed from the tensor shapes.
BUILT_IN: dict[str, Variant] = {
    "Q4_0": _gguf("Q4_0", 11.0),
    "Q5_K_S": _gguf("Q5_K_S", 12.5),
    "Q8_0": _gguf("Q8_0", 16.9),
    "Q8_0-w8a8": _gguf("Q8_0", 16.4, "w8a8"),
    "Q8_0-fp8": _gguf("Q8_0", 16.4, "fp8"),
    "tiny-Q4_0": _tiny("Q4_0"),
    "tiny-Q5_K_S": _tiny("Q5_K_S"),
    "tiny-Q8_0": _tiny("Q8_0"),
    "tiny-Q8_0-w8a8": _tiny("Q8_0", "w8a8"),
    "telea": Variant(family="telea"),
}
