"""Stable Diffusion XL as a Generator: holds the pipeline on a device and runs it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ...errors import CorruptWeights, InputError, PaintError, VariantLoadFailed
from ...models import GenerateRequest, Pixels, Variant
from ...settings import VariantSettings
from ..cold_start import timed
from ..device import BUILDING, Device, OnDevice
from ..lora import hooks
from ..lora.adapter import Adapter
from ..lora.architecture import components, sizes_of
from ..lora.read import Sizes, read
from ..rounding import rounded
from ..weights.fetch import Weights
from . import checkpoint

_MULTIPLE_PX = 8

#: By the names of `models.GENERATIONS`: the class, and what it changes of the model's own scheduler's config.
_SCHEDULERS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "euler": (EulerDiscreteScheduler, {"use_karras_sigmas": False}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    # By default it clips latents as if they were pixels, and not every model's config says no.
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"use_karras_sigmas": False}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {"use_karras_sigmas": False}),
}


class Sdxl(OnDevice):
    """On a GPU where the variant wants one, in float16; otherwise on the CPU with `served.threads` threads."""

    def __init__(self, variant: Variant, weights: Weights | None, served: VariantSettings) -> None:
        """Raises VariantLoadFailed where there are no weights, or no GPU for a variant that wants one."""
        if weights is None:
            raise VariantLoadFailed("an sdxl variant needs weights, and was given none")
        wants_gpu = variant.num_gpus > 0
        self._device = Device(wants_gpu=wants_gpu, dtype=torch.float16 if wants_gpu else None)
        self._weights, self._threads = weights, served.threads
        self._pipeline: Any = None
        #: The model's own, which no picture is made with: its config alone is read.
        self._scheduler: Any = None
        #: By the names that LoRAs have for its layers.
        self._sizes: Sizes = {}

    def load(self) -> None:
        """Also raises CorruptWeights where the file or folder holds something else than SDXL's base model."""
        checkpoint.check(self._weights.transformer)
        torch.set_num_threads(self._threads)
        # Redrawn lines in every replica's log.
        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()
        self._device.ms = 0.0
        with BUILDING, self._device.translated():
            self._pipeline = _build(self._weights, self._device)
            self._scheduler = self._pipeline.scheduler
            self._sizes = sizes_of({name: getattr(self._pipeline, name) for name in components("sdxl")})
            self._device.free_memory()

    def warm_up(self, buckets: Sequence[tuple[int, int]]) -> None:
        """One step at each size on a GPU; one small picture on a CPU, where no size is prepared for."""
        for width, height in buckets if self._device.is_gpu else [(64, 64)]:
            nothing = GenerateRequest(
                job_id="", prompt="", width=width, height=height, steps=1, guidance_scale=2.0, seed=0
            )
            self._decoded(nothing, lambda step: None, ())
        self._device.ms = 0.0

    def adapter(self, file: Path, *, alpha: float | None, max_rank: int) -> Adapter:
        return read(file, "sdxl", self._sizes, alpha=alpha, max_rank=max_rank)

    def generate(
        self, request: GenerateRequest, on_step: Callable[[int], None], adapters: Sequence[Adapter] = ()
    ) -> Pixels:
        """Also raises InputError for sides that are no multiples of 8, and for an unknown scheduler."""
        if request.height % _MULTIPLE_PX or request.width % _MULTIPLE_PX:
            size = f"{request.width}x{request.height}"
            raise InputError(f"a picture of {size} px: both must be multiples of {_MULTIPLE_PX}")
        return rounded(self._decoded(request, on_step, adapters).permute(1, 2, 0).numpy())

    def close(self) -> None:
        self._pipeline = self._scheduler = None
        self.free_memory()

    def _decoded(
        self, request: GenerateRequest, on_step: Callable[[int], None], adapters: Sequence[Adapter]
    ) -> torch.Tensor:
        """float32 `[3, height, width]` in host memory; 0 is black and 1 is white."""
        if self._pipeline is None:
            raise PaintError("the engine is not loaded")
        # New for each picture: a scheduler keeps state between steps, and the last picture's may be another.
        self._pipeline.scheduler = self._scheduler_of(request.scheduler)
        vae, loras = self._pipeline.vae, list(zip(request.loras, adapters, strict=True))
        # Also the text encoders': a prompt's embeddings depend on the LoRAs, and are computed for each picture.
        with_loras = hooks.applied(partial(hooks.layer_of, self._pipeline), loras, self._device)
        with self._device.translated(), self._device.timed(), torch.inference_mode(), with_loras:
            latents = self._pipeline(
                request.prompt,
                # Without one, the model's config says what takes its place.
                negative_prompt=request.negative_prompt or None,
                width=request.width,
                height=request.height,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                # Noise from the CPU is the same for every device.
                generator=torch.Generator("cpu").manual_seed(request.seed),
                callback_on_step_end=self._step_hook(on_step),
                output_type="latent",
            ).images
            image = vae.decode(_scaled(latents.to(vae.dtype), vae.config), return_dict=False)[0][0]
            return torch.as_tensor(image.float() * 0.5 + 0.5).cpu()

    def _scheduler_of(self, name: str | None) -> Any:
        config = self._scheduler.config
        if name is None:
            return type(self._scheduler).from_config(config)
        if name not in _SCHEDULERS:
            raise InputError(f"there is no scheduler {name}; there are {', '.join(_SCHEDULERS)}")
        kind, changes = _SCHEDULERS[name]
        return kind.from_config(config, **changes)


def _build(weights: Weights, device: Device) -> Any:
    """Raises CorruptWeights where the weights are not those that the configs describe."""
    path, options = weights.transformer, {"dtype": device.dtype, "local_files_only": True, "add_watermarker": False}
    try:
        with timed("build"):
            if path.is_dir():
                halves = "fp16" if any(path.glob("*/*.fp16*.safetensors")) else None
                pipeline = StableDiffusionXLPipeline.from_pretrained(
                    path, use_safetensors=True, variant=halves, **options
                )
            else:
                # A folder: without one, diffusers asks the hub whatever `local_files_only` says.
                config = str(weights.base)
                pipeline = StableDiffusionXLPipeline.from_single_file(str(path), config=config, **options)
        if pipeline.vae.config.force_upcast and device.dtype == torch.float16:
            # It overflows float16. For good: the pipeline would convert it for each picture, and leave it converted
            # where that picture fails.
            pipeline.vae.to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        with timed("to_device"):
            return pipeline.to(device.torch)
    except (LookupError, ValueError, OSError, NotImplementedError, SingleFileComponentError) as e:
        # NotImplementedError: a tensor that is not in the file has no data to move.
        what = f"{path} does not hold the model that {weights.base} describes: {e!r}"
        raise CorruptWeights(what, file=str(path)) from e


def _scaled(latents: Any, config: Any) -> Any:
    """As the VAE takes them. Source: StableDiffusionXLPipeline.__call__."""
    if config.latents_mean is None or config.latents_std is None:
        return latents / config.scaling_factor
    mean, deviation = (
        latents.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    return latents * deviation / config.scaling_factor + mean
