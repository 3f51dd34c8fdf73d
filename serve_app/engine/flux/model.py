"""FLUX on a device: its pipeline loaded and made ready, and run. What goes in, its subclasses know."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from ...errors import PaintError, VariantLoadFailed
from ...models import Family, GenerateRequest, LoraUse, Variant
from ...settings import VariantSettings
from .. import Window
from ..cold_start import timed
from ..device import BUILDING, Device, OnDevice
from ..lora import hooks
from ..lora.adapter import Adapter
from ..lora.architecture import sizes_of
from ..lora.fixed import FixedLoras
from ..lora.read import Sizes
from ..weights.fetch import Weights
from . import compiled, pipeline, step_cache
from .modulation import Conditions, Modulation
from .repack import repack

#: A picture's sides are multiples of this: the VAE makes one of 8 pixels, and the transformer takes 2x2 of those.
MULTIPLE_PX = 16
#: `prompt_embeds` `[1, tokens, d]` and `pooled_prompt_embeds` `[1, d]`.
Prompt = Mapping[str, torch.Tensor]


class Flux(OnDevice):
    """On a GPU where the variant wants one, otherwise on the CPU with `served.threads` threads."""

    packages = ("torch", "diffusers", "transformers", "gguf", "torchao")
    #: Of diffusers.
    kind: Any
    #: Whose names and layers its LoRAs have.
    lora_family: Family = "flux"

    def __init__(
        self,
        variant: Variant,
        weights: Weights | None,
        served: VariantSettings,
        *,
        dtype: torch.dtype | None = None,
        adaln_once: bool = True,
    ) -> None:
        """`dtype` as in `Device`: the benchmark computes in bfloat16 on a CPU, too. `adaln_once` leaves out computation
        that changes no bit: benchmarks and tests compare an engine with one that does it.

        Raises VariantLoadFailed where there are no weights, or no GPU for a variant that wants one.
        """
        if weights is None:
            raise VariantLoadFailed(f"a {variant.family} variant needs weights, and was given none")
        self._family = variant.family
        self._device = Device(wants_gpu=variant.num_gpus > 0, dtype=dtype)
        self._weights = weights
        self._threads, self._levers = served.threads, served.optimizations
        self._adaln_once = adaln_once
        self._tokens, self._repack = variant.max_prompt_tokens, variant.repack
        self._loras, self._changed = variant.loras, ExitStack()
        self._pipeline: Any = None
        self._modulation: Modulation | None = None
        #: By the names that LoRAs have for its layers.
        self._sizes: Sizes = {}

    def load(self) -> None:
        """Also raises CorruptWeights where the files are not those of this model."""
        torch.set_num_threads(self._threads)
        self._device.ms = 0.0
        is_packed = self._weights.transformer.suffix == ".gguf"
        with BUILDING, self._device.translated():
            self._pipeline = self._built()
            self._sizes = sizes_of({"transformer": self._pipeline.transformer})
            loras = FixedLoras(self._loras, self._weights.loras, self.lora_family, self._sizes)
            if self._adaln_once:
                with timed("adaln"):
                    self._modulation = Modulation(self._pipeline.transformer, self._device.dtype)
            if self._repack is not None:
                with timed("repack"):
                    repack(self._pipeline.transformer, self._repack, loras.merge)
            elif self._levers.unpack and is_packed:
                with timed("unpack"):
                    self._pipeline.transformer.dequantize()
            merges = self._repack is not None or self._levers.unpack or not is_packed
            self._changed.enter_context(loras.applied(self._layer, self._device, merges=merges))
            # What loading left behind, the weights that left the device among it.
            self._device.free_memory()
            if self._levers.compile:
                compiled.compile_blocks(self._pipeline.transformer)
            if self._levers.step_cache is not None:
                step_cache.enable(self._pipeline.transformer, self._levers.step_cache)

    def _built(self) -> Any:
        return pipeline.build(self._weights, self._device, self.kind)

    @property
    def prepares_sizes(self) -> bool:
        """Whether the first picture of a size takes longer than the next."""
        return self._device.is_gpu or self._levers.compile

    def close(self) -> None:
        self._changed.close()
        self._pipeline = self._modulation = None
        self.free_memory()

    def run(
        self,
        asked: Window | GenerateRequest,
        size: tuple[int, int],
        prompt: Prompt,
        on_step: Callable[[int], None],
        inputs: Callable[[torch.Generator], Mapping[str, Any]] = lambda _: {},
        loras: Sequence[tuple[LoraUse, Adapter]] = (),
    ) -> Any:
        """float32 `[height, width, 3]`, 0 to 1. `inputs` gives what else the pipeline takes, `strength` among it."""
        if self._pipeline is None:
            raise PaintError("the engine is not loaded")
        (width, height), scale = size, asked.guidance_scale
        # Drawn on the CPU, noise is the same whatever the device.
        generator = torch.Generator("cpu").manual_seed(asked.seed)
        one_run = step_cache.one_run(self._pipeline.transformer)
        with_loras = hooks.applied(self._layer, loras, self._device)
        with self._device.translated(), self._device.timed(), torch.inference_mode(), one_run, with_loras:
            given = inputs(generator)
            if self._modulation is not None:
                strength = given.get("strength", 1.0)
                timesteps = pipeline.timesteps(self._pipeline, width, height, asked.steps, strength)
                pooled, changed = prompt["pooled_prompt_embeds"], self._modulation.changed_by(loras)
                self._modulation.begin(Conditions(timesteps, scale, pooled, changed))
            (image,) = self._pipeline(
                height=height,
                width=width,
                num_inference_steps=asked.steps,
                guidance_scale=scale,
                generator=generator,
                callback_on_step_end=self._step_hook(on_step),
                output_type="np",
                **prompt,
                **given,
            ).images
        return image

    def _layer(self, name: str) -> nn.Module:
        if self._modulation is not None and name in self._modulation.layers:
            return self._modulation.layers[name]
        return hooks.layer_of(self._pipeline, name)

    def prompt(self, embeddings: bytes | None) -> Prompt:
        if embeddings is None:
            raise PaintError(f"a {self._family} variant needs a prompt's embeddings, and was given none")
        names = ("prompt_embeds", "pooled_prompt_embeds")
        try:
            with self._device.translated():
                tensors = safetensors.torch.load(embeddings)
                return {name: tensors[name].to(self._device.torch, self._device.dtype) for name in names}
        except (SafetensorError, KeyError) as e:
            raise PaintError(f"the prompt's embeddings cannot be read: {e!r}") from e

    def no_prompt(self) -> Prompt:
        config = self._pipeline.transformer.config
        shapes = {
            "prompt_embeds": (1, self._tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (1, config.pooled_projection_dim),
        }
        device, dtype = self._device.torch, self._device.dtype
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
