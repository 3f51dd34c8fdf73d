"""FLUX.1-Fill as an Engine: holds the pipeline on a device and runs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import InputError, PaintError, VariantLoadFailed
from ..images import Pixels
from ..variants import Variant
from . import pipeline
from .device import BUILDING, Device
from .weights import Weights

#: A window's sides are multiples of this: the VAE makes one of 8 pixels, and the transformer takes 2x2 of those.
_MULTIPLE_PX = 16
_PACKAGES = ("torch", "diffusers", "transformers", "gguf")


@cache
def _versions() -> Mapping[str, str]:
    return {package: version(package) for package in _PACKAGES}


#: `prompt_embeds` `[1, tokens, d]` and `pooled_prompt_embeds` `[1, d]`.
Prompt = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What one run of the pipeline is given."""

    pixels: Pixels
    mask: Pixels
    prompt: Prompt
    steps: int
    guidance_scale: float
    seed: int
    on_step: Callable[[int], None]


class FluxFill:
    """On a GPU where the variant wants one, otherwise on the CPU with `threads` threads."""

    def __init__(self, variant: Variant, weights: Weights | None, threads: int) -> None:
        """Raises VariantLoadFailed where there are no weights, or no GPU for a variant that wants one."""
        if weights is None:
            raise VariantLoadFailed("a flux-fill variant needs weights, and was given none")
        self._device = Device(wants_gpu=variant.num_gpus > 0)
        self._weights = weights
        self._threads = threads
        self._tokens = variant.max_prompt_tokens
        self._pipeline: Any = None

    def load(self) -> None:
        """Also raises CorruptWeights where the files are not those of FLUX.1-Fill."""
        torch.set_num_threads(self._threads)
        self._device.ms = 0.0
        with BUILDING, self._device.translated():
            self._pipeline = pipeline.build(self._weights, self._device)

    def warm_up(self, buckets: Sequence[tuple[int, int]]) -> None:
        """One step at each size on a GPU; at the smallest on a CPU, where no size is prepared for."""
        by_area = sorted(buckets, key=lambda size: size[0] * size[1])
        for width, height in by_area if self._device.is_gpu else by_area[:1]:
            self._run(
                _Run(
                    pixels=np.zeros((height, width, 3), np.uint8),
                    mask=np.full((height, width), 255, np.uint8),
                    prompt=self._no_prompt(),
                    steps=1,
                    guidance_scale=1.0,
                    seed=0,
                    on_step=lambda step: None,
                )
            )
        self._device.ms = 0.0

    def paint(
        self,
        window_pixels: Pixels,
        window_mask: Pixels,
        *,
        steps: int,
        guidance_scale: float,
        seed: int,
        embeddings: bytes | None,
        on_step: Callable[[int], None],
    ) -> Pixels:
        """Also raises InputError for a window whose sides are no multiples of 16: the pipeline would resize it."""
        height, width = window_mask.shape
        if height % _MULTIPLE_PX or width % _MULTIPLE_PX:
            raise InputError(f"a window of {width}x{height} px: both must be multiples of {_MULTIPLE_PX}")
        with self._device.translated():
            prompt = self._prompt(embeddings)
        return self._run(
            _Run(
                pixels=window_pixels,
                mask=window_mask,
                prompt=prompt,
                steps=steps,
                guidance_scale=guidance_scale,
                seed=seed,
                on_step=on_step,
            )
        )

    def device_ms(self) -> float | None:
        return self._device.ms if self._device.is_gpu else None

    def describe(self) -> Mapping[str, Any]:
        return {**self._device.describe(), "versions": _versions()}

    def free_memory(self) -> None:
        self._device.free_memory()

    def close(self) -> None:
        self._pipeline = None
        self.free_memory()

    def _run(self, run: _Run) -> Pixels:
        if self._pipeline is None:
            raise PaintError("the engine is not loaded")
        with self._device.translated(), self._device.timed(), torch.inference_mode():
            painted = self._pipeline(
                image=run.pixels.astype(np.float32) / 255,
                mask_image=(run.mask >= 128).astype(np.float32),
                height=run.mask.shape[0],
                width=run.mask.shape[1],
                num_inference_steps=run.steps,
                guidance_scale=run.guidance_scale,
                # Drawn on the CPU, noise is the same whatever the device.
                generator=torch.Generator("cpu").manual_seed(run.seed),
                callback_on_step_end=self._step_hook(run.on_step),
                output_type="np",
                **run.prompt,
            ).images[0]
        return np.asarray(np.rint(painted * 255), np.uint8)

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
