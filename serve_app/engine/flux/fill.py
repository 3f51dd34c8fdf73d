"""FLUX.1-Fill as an Engine."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FluxFillPipeline

from ...errors import InputError
from ...models import Pixels, Variant
from ...settings import VariantSettings
from .. import Window
from ..telea import inpaint
from ..weights.fetch import Weights
from . import compiled, pipeline
from .model import MULTIPLE_PX, Flux, Prompt


class FluxFill(Flux):
    kind = FluxFillPipeline

    def __init__(
        self, variant: Variant, weights: Weights | None, served: VariantSettings, *, one_encode: bool = True, **how: Any
    ) -> None:
        """As Flux. `one_encode` leaves out another computation that changes no bit."""
        super().__init__(variant, weights, served, **how)
        self._one_encode = one_encode

    def warm_up(self, buckets: Sequence[tuple[int, int]]) -> None:
        """One step at each size, or at the smallest where none is prepared for.

        Raises VariantLoadFailed where blocks do not compile.
        """
        by_area = sorted(buckets, key=lambda size: size[0] * size[1])
        for width, height in by_area if self.prepares_sizes else by_area[:1]:
            with compiled.translated():
                self._run(nothing(width, height), self.no_prompt())
        self._device.ms = 0.0

    def paint(self, window: Window) -> Pixels:
        """Also raises InputError for a window whose sides are no multiples of 16: the pipeline would resize it."""
        height, width = window.mask.shape
        if height % MULTIPLE_PX or width % MULTIPLE_PX:
            raise InputError(f"a window of {width}x{height} px: both must be multiples of {MULTIPLE_PX}")
        return self._run(window, self.prompt(window.embeddings))

    def _run(self, window: Window, prompt: Prompt) -> Pixels:
        height, width = window.mask.shape
        hole, pixels, is_from_noise = window.mask >= 128, window.pixels, window.strength == 1
        if not is_from_noise:
            # Filled in the hole alone: around it the model sees the photo.
            pixels = np.where(hole[..., np.newaxis], inpaint(pixels, window.mask), pixels)

        def inputs(generator: torch.Generator) -> Mapping[str, Any]:
            return {
                "image": pixels[np.newaxis].astype(np.float32) / 255,
                "mask_image": hole[np.newaxis].astype(np.float32),
                "strength": window.strength,
                # The pipeline itself encodes what it starts from.
                "latents": self._noise(generator, height, width) if self._one_encode and is_from_noise else None,
            }

        painted = self.run(window, (width, height), prompt, window.on_step, inputs)
        return np.asarray(np.rint(painted * 255), np.uint8)

    def _noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """What the pipeline would start from, without encoding the photo: at full strength it starts from noise alone,
        and of the photo nothing remains but that its encoding drew from the generator, too."""
        shape = (1, self._pipeline.vae.config.latent_channels, height // 8, width // 8)
        torch.randn(shape, generator=generator, dtype=self._device.dtype)
        noise = torch.randn(shape, generator=generator, dtype=self._device.dtype)
        return pipeline.packed(self._pipeline, noise).to(self._device.torch)


def nothing(width: int, height: int) -> Window:
    """What a size is warmed up with."""
    return Window(
        pixels=np.zeros((height, width, 3), np.uint8),
        mask=np.full((height, width), 255, np.uint8),
        steps=1,
        guidance_scale=1.0,
        seed=0,
        embeddings=None,
        on_step=lambda step: None,
    )
