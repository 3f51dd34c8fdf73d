"""FLUX.1-Fill as an Engine: holds the pipeline on a device and runs it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from ...errors import InputError, PaintError, VariantLoadFailed
from ...models import Pixels, Variant
from ...settings import VariantSettings
from .. import Window
from ..cold_start import timed
from ..device import BUILDING, Device
from ..weights.fetch import Weights
from . import compiled, pipeline, step_cache
from .modulation import Conditions, Modulation
from .repack import repack

#: A window's sides are multiples of this: the VAE makes one of 8 pixels, and the transformer takes 2x2 of those.
_MULTIPLE_PX = 16
_PACKAGES = ("torch", "diffusers", "transformers", "gguf", "torchao")


@cache
def _versions() -> Mapping[str, str]:
    return {package: version(package) for package in _PACKAGES}


#: `prompt_embeds` `[1, tokens, d]` and `pooled_prompt_embeds` `[1, d]`.
Prompt = Mapping[str, torch.Tensor]


class FluxFill:
    """On a GPU where the variant wants one, otherwise on the CPU with `served.threads` threads."""

    def __init__(
        self,
        variant: Variant,
        weights: Weights | None,
        served: VariantSettings,
        *,
        dtype: torch.dtype | None = None,
        adaln_once: bool = True,
        one_encode: bool = True,
    ) -> None:
        """`dtype` as in `Device`: the benchmark computes in bfloat16 on a CPU, too. `adaln_once` and `one_encode` leave
        out computation that changes no bit: benchmarks and tests compare an engine with one that does it.

        Raises VariantLoadFailed where there are no weights, or no GPU for a variant that wants one.
        """
        if weights is None:
            raise VariantLoadFailed("a flux-fill variant needs weights, and was given none")
        self._device = Device(wants_gpu=variant.num_gpus > 0, dtype=dtype)
        self._weights = weights
        self._threads, self._levers = served.threads, served.optimizations
        self._adaln_once, self._one_encode = adaln_once, one_encode
        self._tokens, self._repack = variant.max_prompt_tokens, variant.repack
        self._pipeline: Any = None
        self._modulation: Modulation | None = None

    def load(self) -> None:
        """Also raises CorruptWeights where the files are not those of FLUX.1-Fill."""
        torch.set_num_threads(self._threads)
        self._device.ms = 0.0
        with BUILDING, self._device.translated():
            self._pipeline = pipeline.build(self._weights, self._device)
            if self._adaln_once:
                with timed("adaln"):
                    self._modulation = Modulation(self._pipeline.transformer, self._device.dtype)
            if self._repack is not None:
                with timed("repack"):
                    repack(self._pipeline.transformer, self._repack)
            elif self._levers.unpack:
                with timed("unpack"):
                    self._pipeline.transformer.dequantize()
            # What loading left behind, the weights that left the device among it.
            self._device.free_memory()
            if self._levers.compile:
                compiled.compile_blocks(self._pipeline.transformer)
            if self._levers.step_cache is not None:
                step_cache.enable(self._pipeline.transformer, self._levers.step_cache)

    def warm_up(self, buckets: Sequence[tuple[int, int]]) -> None:
        """One step at each size on a GPU, or where blocks are compiled; else at the smallest: no size is prepared for.

        Raises VariantLoadFailed where blocks do not compile.
        """
        by_area = sorted(buckets, key=lambda size: size[0] * size[1])
        for width, height in by_area if self._device.is_gpu or self._levers.compile else by_area[:1]:
            with compiled.translated():
                self._run(_nothing(width, height), self._no_prompt())
        self._device.ms = 0.0

    def paint(self, window: Window) -> Pixels:
        """Also raises InputError for a window whose sides are no multiples of 16: the pipeline would resize it."""
        height, width = window.mask.shape
        if height % _MULTIPLE_PX or width % _MULTIPLE_PX:
            raise InputError(f"a window of {width}x{height} px: both must be multiples of {_MULTIPLE_PX}")
        with self._device.translated():
            prompt = self._prompt(window.embeddings)
        return self._run(window, prompt)

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

    def _run(self, window: Window, prompt: Prompt) -> Pixels:
        if self._pipeline is None:
            raise PaintError("the engine is not loaded")
        height, width = window.mask.shape
        # Drawn on the CPU, noise is the same whatever the device.
        generator = torch.Generator("cpu").manual_seed(window.seed)
        one_run = step_cache.one_run(self._pipeline.transformer)
        with self._device.translated(), self._device.timed(), torch.inference_mode(), one_run:
            if self._modulation is not None:
                timesteps = pipeline.timesteps(self._pipeline, width, height, window.steps)
                self._modulation.begin(Conditions(timesteps, window.guidance_scale, prompt["pooled_prompt_embeds"]))
            (painted,) = self._pipeline(
                image=window.pixels[np.newaxis].astype(np.float32) / 255,
                mask_image=(window.mask[np.newaxis] >= 128).astype(np.float32),
                height=height,
                width=width,
                num_inference_steps=window.steps,
                guidance_scale=window.guidance_scale,
                generator=generator,
                latents=self._noise(generator, height, width) if self._one_encode else None,
                callback_on_step_end=self._step_hook(window.on_step),
                output_type="np",
                **prompt,
            ).images
        return np.asarray(np.rint(painted * 255), np.uint8)

    def _noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """What the pipeline would start from, without encoding the photo: at full strength it starts from noise alone,
        and of the photo nothing remains but that its encoding drew from the generator, too."""
        shape = (1, self._pipeline.vae.config.latent_channels, height // 8, width // 8)
        torch.randn(shape, generator=generator, dtype=self._device.dtype)
        noise = torch.randn(shape, generator=generator, dtype=self._device.dtype)
        return pipeline.packed(self._pipeline, noise).to(self._device.torch)

    def _step_hook(self, on_step: Callable[[int], None]) -> Callable[..., dict[str, Any]]:
        """The pipeline's callback. Raising in it ends the run at once; the pipeline's own flag would still decode."""

        def hook(_pipeline: Any, index: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
            # Kernels run behind the code that launches them: wait, so that a step reported is a step done.
            self._device.synchronize()
            on_step(index + 1)
            return {}

        return hook

    def _prompt(self, embeddings: bytes | None) -> Prompt:
        if embeddings is None:
            raise PaintError("a flux-fill variant needs a prompt's embeddings, and was given none")
        try:
            tensors = safetensors.torch.load(embeddings)
            names = ("prompt_embeds", "pooled_prompt_embeds")
            return {name: tensors[name].to(self._device.torch, self._device.dtype) for name in names}
        except (SafetensorError, KeyError) as e:
            raise PaintError(f"the prompt's embeddings cannot be read: {e!r}") from e

    def _no_prompt(self) -> Prompt:
        config = self._pipeline.transformer.config
        shapes = {
            "prompt_embeds": (1, self._tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (1, config.pooled_projection_dim),
        }
        device, dtype = self._device.torch, self._device.dtype
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()}


def _nothing(width: int, height: int) -> Window:
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
