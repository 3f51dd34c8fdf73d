"""Builds a FLUX.1 from files: its transformer, and VAE and scheduler from its base. It does not run it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
)
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift, retrieve_timesteps
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...errors import CorruptWeights
from ...models import steps_run
from ..cold_start import timed
from ..device import Device
from ..weights.fetch import Weights
from . import gguf_tensors


def build(weights: Weights, device: Device, kind: Any = FluxFillPipeline) -> Any:
    """A pipeline of this kind without text encoders, every part of it resident on `device`.

    Raises CorruptWeights where the transformer's file is damaged or is not this transformer's.
    """
    pipeline = kind(
        transformer=transformer(weights, device),
        vae=vae(weights, device),
        scheduler=scheduler(weights),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    return placed(pipeline, device)


def placed(pipeline: Any, device: Device) -> Any:
    """The pipeline, every part of it resident on `device`."""
    pipeline.set_progress_bar_config(disable=True)
    with timed("to_device"):
        return pipeline.to(device.torch)


def timesteps(pipeline: Any, width: int, height: int, steps: int, strength: float = 1.0) -> torch.Tensor:
    """Those of a run of the pipeline, `[steps_run(steps, strength)]`, from a scheduler of their own. Source:
    FluxFillPipeline.__call__."""
    config = pipeline.scheduler.config
    shift = calculate_shift(
        (width // 16) * (height // 16),
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler = type(pipeline.scheduler).from_config(config)
    sigmas = np.linspace(1.0, 1 / steps, steps)
    found, _ = retrieve_timesteps(scheduler, steps, pipeline.device, sigmas=sigmas, mu=shift)
    return torch.as_tensor(found)[-steps_run(steps, strength) :]


def packed(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents `[batch, channels, h, w]` as the transformer's tokens `[batch, h/2 * w/2, 4 * channels]`."""
    return torch.as_tensor(pipeline._pack_latents(latents, *latents.shape))


def scheduler(weights: Weights) -> Any:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(weights.base, subfolder="scheduler", local_files_only=True)


def transformer(weights: Weights, device: Device, kind: Any = FluxTransformer2DModel) -> Any:
    """GGUF stays packed; safetensors, in the original names or in diffusers', become of the device's type.

    Raises CorruptWeights where the file is damaged or is not this transformer's.
    """
    file, options = str(weights.transformer), dict[str, Any]()
    if weights.transformer.suffix == ".safetensors":
        tensors = _read(weights.transformer, device)
    else:
        tensors = gguf_tensors.read(weights.transformer, device.torch, device.dtype)
        options["quantization_config"] = GGUFQuantizationConfig(compute_dtype=device.dtype)
    try:
        with timed("build"):
            return kind.from_single_file(
                tensors,
                config=str(weights.base),
                subfolder="transformer",
                torch_dtype=device.dtype,
                device=device.torch,
                local_files_only=True,
                **options,
            )
    except (LookupError, ValueError, NotImplementedError) as e:
        # The loader looks its tensors up by name, and says no more than which look-up failed, or that a tensor for
        # which it found nothing cannot be moved.
        described = weights.base / "transformer" / "config.json"
        raise CorruptWeights(f"{file} does not hold the model that {described} describes: {e!r}", file=file) from e


def _read(path: Path, device: Device) -> dict[str, torch.Tensor]:
    try:
        with timed("read", path.stat().st_size):
            return load_file(path, device=str(device.torch))
    except SafetensorError as e:
        raise CorruptWeights(f"{path} is no whole safetensors file: {e}", file=str(path)) from e


def vae(weights: Weights, device: Device, kind: Any = AutoencoderKL) -> Any:
    folder = weights.base / "vae"
    with timed("vae", sum(file.stat().st_size for file in folder.glob("*.safetensors"))):
        return kind.from_pretrained(folder, torch_dtype=device.dtype, local_files_only=True)
