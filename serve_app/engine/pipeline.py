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
    transformer = FluxTransformer2DModel.from_single_file(
        str(weights.transformer),
        config=str(weights.base),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=device.dtype),
        torch_dtype=device.dtype,
        local_files_only=True,
    )
    missing = [name for name, parameter in transformer.named_parameters() if parameter.is_meta]
    if missing:
        file = str(weights.transformer)
        raise CorruptWeights(f"{file} lacks {len(missing)} tensors of the model, {missing[0]} first", file=file)
    return transformer
