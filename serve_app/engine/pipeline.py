"""Builds FLUX.1-Fill from files: a GGUF transformer, and VAE and scheduler from its base. It does not run it."""

from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
)

from ..errors import CorruptWeights
from . import gguf_file
from .device import Device
from .weights import Weights


def build(weights: Weights, device: Device) -> Any:
    """A FluxFillPipeline without text encoders, every part of it resident on `device`.

    Raises CorruptWeights where the GGUF file is damaged or is not this transformer's.
    """
    gguf_file.check(weights.transformer)
    pipeline = FluxFillPipeline(
        transformer=_transformer(weights, device),
        vae=AutoencoderKL.from_pretrained(
            weights.base, subfolder="vae", torch_dtype=device.dtype, local_files_only=True
        ),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(
            weights.base, subfolder="scheduler", local_files_only=True
        ),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device.torch)


def _transformer(weights: Weights, device: Device) -> Any:
    file = str(weights.transformer)
    try:
        return FluxTransformer2DModel.from_single_file(
            file,
            config=str(weights.base),
            subfolder="transformer",
            quantization_config=GGUFQuantizationConfig(compute_dtype=device.dtype),
            torch_dtype=device.dtype,
            local_files_only=True,
        )
    except (LookupError, ValueError) as e:
        # The loader looks its tensors up by name, and says no more than which look-up failed.
        described = weights.base / "transformer" / "config.json"
        raise CorruptWeights(f"{file} does not hold the model that {described} describes: {e!r}", file=file) from e
