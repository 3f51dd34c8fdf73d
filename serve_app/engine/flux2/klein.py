"""FLUX.2 klein as an Engine: photo and mask are references beside an empty canvas, and it repaints the whole window.

It has one prompt, whose embeddings are a file of the variant, so neither a replica nor the app has its text encoder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image

from ...errors import InputError, VariantLoadFailed
from ...models import Pixels, Variant
from ...settings import FirstBlockCache, VariantSettings
from .. import Window
from ..flux import compiled, pipeline
from ..flux.fill import nothing
from ..flux.model import MULTIPLE_PX, Flux, Prompt
from ..weights.fetch import Weights
from . import prompt

#: What diffusers' Flux2ImageProcessor refuses: shorter sides, and sides of a larger ratio.
_MIN_SIDE_PX, _MAX_ASPECT = 64, 8


class Klein(Flux):
    """The distilled model: a window's guidance scale has no effect."""

    kind = Flux2KleinPipeline
    lora_family = "flux2-klein"

    def __init__(self, variant: Variant, weights: Weights | None, served: VariantSettings, **how: Any) -> None:
        # Its blocks share three modulation layers, 4% of its weights: nothing is gained by computing them once.
        super().__init__(variant, weights, served, adaln_once=False, **how)
        self._prompt: Prompt = {}

    def _built(self) -> Any:
        """Also raises VariantLoadFailed for embeddings of another model, and for a model that takes guidance."""
        weights, device = self._weights, self._device
        if isinstance(self._levers.step_cache, FirstBlockCache):
            # It takes what a block of one stream gives for a pair.
            raise VariantLoadFailed("optimizations.step_cache: diffusers' first_block does not fit FLUX.2's blocks")
        if weights.embeddings is None:
            raise VariantLoadFailed("a flux2-klein variant needs `embeddings`: the file with those of its prompt")
        index = weights.base / "model_index.json"
        if not json.loads(index.read_text()).get("is_distilled"):
            raise VariantLoadFailed(
                f"{index} is not of a distilled model: others take guidance, and ten times the steps"
            )
        config = Flux2Transformer2DModel.load_config(weights.base, subfolder="transformer", local_files_only=True)
        embeddings = prompt.decode(weights.embeddings, self._tokens, config["joint_attention_dim"])
        self._prompt = {"prompt_embeds": embeddings.to(device.torch, device.dtype)}
        built = self.kind(
            transformer=pipeline.transformer(weights, device, Flux2Transformer2DModel),
            vae=pipeline.vae(weights, device, AutoencoderKLFlux2),
            scheduler=pipeline.scheduler(weights),
            text_encoder=None,
            tokenizer=None,
            is_distilled=True,
        )
        return pipeline.placed(built, device)

    def warm_up(self, buckets: Sequence[tuple[int, int]]) -> None:
        """As FluxFill's. Also raises VariantLoadFailed for a size that the model does not take."""
        for width, height in buckets:
            if min(width, height) < _MIN_SIDE_PX or max(width, height) > _MAX_ASPECT * min(width, height):
                taken = f"sides of {_MIN_SIDE_PX} px or more, one at most {_MAX_ASPECT} times the other"
                raise VariantLoadFailed(f"windows.buckets: {width}x{height} px; FLUX.2 takes {taken}")
        by_area = sorted(buckets, key=lambda size: size[0] * size[1])
        for width, height in by_area if self.prepares_sizes else by_area[:1]:
            with compiled.translated():
                self.paint(nothing(width, height))
        self._device.ms = 0.0

    def paint(self, window: Window) -> Pixels:
        """Also raises InputError for a window whose sides are no multiples of 16: the pipeline would crop it."""
        height, width = window.mask.shape
        if height % MULTIPLE_PX or width % MULTIPLE_PX:
            raise InputError(f"a window of {width}x{height} px: both must be multiples of {MULTIPLE_PX}")
        masked = np.where(window.mask >= 128, 255, 0).astype(np.uint8)

        def references(_: torch.Generator) -> Mapping[str, Any]:
            return {"image": [Image.fromarray(window.pixels), Image.fromarray(masked).convert("RGB")]}

        # The pipeline warns of guidance that it ignores.
        asked = replace(window, guidance_scale=1.0)
        painted = self.run(asked, (width, height), self._prompt, window.on_step, references)
        return np.asarray(np.rint(painted * 255), np.uint8)
