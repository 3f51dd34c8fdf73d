"""The engine room: what a replica holds and paints with. torch lives here and nowhere else in serve_app.

Importing this package, `canvas`, `families`, `prompts` or `weights` imports no torch, so a CPU ingress may.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..models import GenerateRequest, Pixels, steps_run

if TYPE_CHECKING:
    from .lora.adapter import Adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """One window to paint, and how."""

    #: uint8 RGB, `[h, w, 3]`.
    pixels: Pixels
    #: uint8, `[h, w]`: painted where it is 128 or more.
    mask: Pixels
    #: Of the whole schedule.
    steps: int
    guidance_scale: float
    seed: int
    #: As in `EditRequest`.
    embeddings: bytes | None
    #: Gets the number of steps done, from 1 up to `steps_run` (fewer where the family knows no steps). What it raises
    #: ends the painting within that step and passes through unchanged.
    on_step: Callable[[int], None]
    #: As in `EditRequest`.
    strength: float = 1.0

    @property
    def steps_run(self) -> int:
        return steps_run(self.steps, self.strength)


class AnyEngine(Protocol):
    """One loaded variant. Not for two callers at once: pipelines keep state between steps, so its holder locks it."""

    def load(self) -> None:
        """Take memory and get ready; slow. Raises WeightsError, VariantLoadFailed, OutOfMemory, GpuLost."""

    def warm_up(self, buckets: Sequence[tuple[int, int]]) -> None:
        """Run once, briefly, at the sizes `(width, height)`, so that the first job pays for no compilation."""

    def free_memory(self) -> None:
        """Give the device's memory back that no painting uses any more. Raises GpuLost."""

    def device_ms(self) -> float | None:
        """Device milliseconds painted since `load`, a count that only grows; None where there is no GPU."""

    def peak_memory(self) -> tuple[int, int] | None:
        """Bytes of device memory, allocated at most and reserved at most since this was last called; None where there
        is no GPU."""

    def describe(self) -> Mapping[str, Any]:
        """Where it runs: `device`, `compute_capability` ("8.9", or "N/A" on a CPU), `memory_used_bytes` and
        `memory_total_bytes` of the device (None on a CPU), `versions` of what computes. Raises GpuLost."""

    def close(self) -> None:
        """Free what `load` took."""


class Engine(AnyEngine, Protocol):
    """Edits photos."""

    def paint(self, window: Window) -> Pixels:
        """The window `[h, w, 3]` painted where its mask says so; pixels elsewhere may drift.

        Raises OutOfMemory; GpuLost, after which the process is of no use; PaintError; what `on_step` raises.
        """


class Generator(AnyEngine, Protocol):
    """Makes pictures from prompts."""

    def generate(
        self, request: GenerateRequest, on_step: Callable[[int], None], adapters: "Sequence[Adapter]" = ()
    ) -> Pixels:
        """One picture `[height, width, 3]`. Equal requests give equal bytes, independent of earlier requests.

        `adapters` are those of `request.loras`, in their order. `on_step` as in Window. Raises as `Engine.paint` does;
        BlankImage; WrongModel for an adapter of another model.
        """

    def adapter(self, file: Path, *, alpha: float | None, max_rank: int) -> "Adapter":
        """A LoRA's file, read and checked against the loaded model, which may paint meanwhile. `alpha` is for layers
        that say none.

        Raises LoraRefused, by its kind; NotSupported where the model takes none.
        """
