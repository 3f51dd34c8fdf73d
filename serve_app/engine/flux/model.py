"""FLUX.1 on a device: its pipeline loaded and made ready, and run. What goes in, its subclasses know."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ...errors import PaintError, VariantLoadFailed
from ...models import Variant
from ...settings import VariantSettings
from ..cold_start import timed
from ..device import BUILDING, Device
from ..weights.fetch import Weights
from . import compiled, pipeline, step_cache
from .modulation import Conditions, Modulation
from .repack import repack

#: A picture's sides are multiples of this: the VAE makes one of 8 pixels, and the transformer takes 2x2 of those.
MULTIPLE_PX = 16
_PACKAGES = ("torch", "diffusers", "transformers", "gguf", "torchao")


@cache
def _versions() -> Mapping[str, str]:
    return {package: version(package) for package in _PACKAGES}


#: `prompt_embeds` `[1, tokens, d]` and `pooled_prompt_embeds` `[1, d]`.
Prompt = Mapping[str, torch.Tensor]


class Flux:
    """On a GPU where the variant wants one, otherwise on the CPU with `served.threads` threads."""

    #: Of diffusers.
    kind: Any

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
        self._pipeline: Any = None
        self._modulation: Modulation | None = None

    def load(self) -> None:
        """Also raises CorruptWeights where the files are not those of this model."""
        torch.set_num_threads(self._threads)
        self._device.ms = 0.0
        with BUILDING, self._device.translated():
            self._pipeline = pipeline.build(self._weights, self._device, self.kind)
            if self._adaln_once:
                with timed("adaln"):
                    self._modulation = Modulation(self._pipeline.transformer, self._device.dtype)
            if self._repack is not None:
                with timed("repack"):
                    repack(self._pipeline.transformer, self._repack)
            elif self._levers.unpack and self._weights.transformer.suffix == ".gguf":
                with timed("unpack"):
                    self._pipeline.transformer.dequantize()
            # What loading left behind, the weights that left the device among it.
            self._device.free_memory()
            if self._levers.compile:
                compiled.compile_blocks(self._pipeline.transformer)
            if self._levers.step_cache is not None:
                step_cache.enable(self._pipeline.transformer, self._levers.step_cache)

    @property
    def prepares_sizes(self) -> bool:
        """Whether the first picture of a size takes longer than the next."""
        return self._device.is_gpu or self._levers.compile

    def device_ms(self) -> float | None:
        return self._device.ms if self._device.is_gpu else None

    def peak_memory(self) -> tuple[int, int] | None:
        return self._device.peak_memory()

    def describe(self) -> Mapping[str, Any]:
        return {**self._device.describe(), "versions": _versions()}

    def free_memory(self) -> None:
        self._device.free_memory()

    def close(self) -> None:
        self._pipeline = self._modulation = None
        self.free_memory()

    def run(
        self,
        prompt: Prompt,
        on_step: Callable[[int], None],
        *,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        inputs: Callable[[], Mapping[str, Any]],
    ) -> Any:
        """float32 `[height, width, 3]`, 0 to 1. `inputs` gives what else this pipeline takes."""
        if self._pipeline is None:
            raise PaintError("the engine is not loaded")
        one_run = step_cache.one_run(self._pipeline.transformer)
        with self._device.translated(), self._device.timed(), torch.inference_mode(), one_run:
            if self._modulation is not None:
                timesteps = pipeline.timesteps(self._pipeline, width, height, steps)
                self._modulation.begin(Conditions(timesteps, guidance_scale, prompt["pooled_prompt_embeds"]))
            (image,) = self._pipeline(
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                callback_on_step_end=self._step_hook(on_step),
                output_type="np",
                **prompt,
                **inputs(),
            ).images
        return image

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

    def _step_hook(self, on_step: Callable[[int], None]) -> Callable[..., dict[str, Any]]:
        """The pipeline's callback. Raising in it ends the run at once; the pipeline's own flag would still decode."""

        def hook(_pipeline: Any, index: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
            # Kernels run behind the code that launches them: wait, so that a step reported is a step done.
            self._device.synchronize()
            on_step(index + 1)
            return {}

        return hook
