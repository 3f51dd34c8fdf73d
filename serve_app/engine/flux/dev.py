"""FLUX.1-dev as a Generator."""

from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers import FluxPipeline

from ...errors import InputError, NotSupported
from ...models import GenerateRequest, Pixels
from ..lora.adapter import Adapter
from ..lora.read import read
from ..rounding import rounded
from . import compiled
from .model import MULTIPLE_PX, Flux


class FluxDev(Flux):
    """Its prompts are encoded elsewhere; it has one scheduler."""

    kind = FluxPipeline

    def warm_up(self, buckets: Sequence[tuple[int, int]]) -> None:
        """One step at each size; on a CPU that compiles nothing, one small picture. Raises as FluxFill's."""
        for width, height in buckets if self.prepares_sizes else [(64, 64)]:
            nothing = GenerateRequest(
                job_id="", prompt="", width=width, height=height, steps=1, guidance_scale=1.0, seed=0
            )
            with compiled.translated():
                self.run(nothing, (width, height), self.no_prompt(), lambda step: None)
        self._device.ms = 0.0

    def adapter(self, file: Path, *, alpha: float | None, max_rank: int) -> Adapter:
        if self._levers.compile:
            raise NotSupported("compiled blocks paint without LoRAs")
        return read(file, "flux", self._sizes, alpha=alpha, max_rank=max_rank)

    def generate(
        self, request: GenerateRequest, on_step: Callable[[int], None], adapters: Sequence[Adapter] = ()
    ) -> Pixels:
        """Also raises InputError for sides that are no multiples of 16, and for an unknown scheduler."""
        width, height = request.width, request.height
        if height % MULTIPLE_PX or width % MULTIPLE_PX:
            raise InputError(f"a picture of {width}x{height} px: both must be multiples of {MULTIPLE_PX}")
        if request.scheduler not in (None, "euler"):
            raise InputError(f"there is no scheduler {request.scheduler}; FLUX.1 has euler alone")
        loras = list(zip(request.loras, adapters, strict=True))
        return rounded(self.run(request, (width, height), self.prompt(request.embeddings), on_step, loras=loras))
