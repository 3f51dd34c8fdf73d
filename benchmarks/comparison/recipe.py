"""The recipe that the service replaces: the whole frame at 1024, the prompt in words each time, nothing kept.

diffusers' FluxFillPipeline as its documentation calls it, with GGUF weights and both text encoders. On a GPU its parts
come and go (`enable_model_cpu_offload`): with the text encoders they do not fit on 24 GB together. After an edit all of
them are on the host.
"""

from typing import Any

import cv2
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from serve_app.engine.weights.fetch import Weights
from serve_app.models import Pixels
from serve_app.settings import Inference

from .meter import Meter
from .runs import Contender
from .scenarios import Scenario

#: The longest side of what is painted.
SIDE_PX = 1024
_MULTIPLE_PX = 16


def frame_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) that a photo is painted at: at most 1024 a side, in multiples of 16."""
    scale = min(1.0, SIDE_PX / max(width, height))

    def fitted(side: int) -> int:
        return max(_MULTIPLE_PX, round(side * scale) // _MULTIPLE_PX * _MULTIPLE_PX)

    return fitted(width), fitted(height)


class Recipe:
    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        base = weights.base
        here = {"local_files_only": True}
        typed = {"dtype": dtype, **here}
        self._pipeline: Any = FluxFillPipeline(
            transformer=FluxTransformer2DModel.from_single_file(
                str(weights.transformer),
                config=str(base),
                subfolder="transformer",
                quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
                **typed,
            ),
            vae=AutoencoderKL.from_pretrained(base, subfolder="vae", **typed),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler", **here),
            text_encoder=CLIPTextModel.from_pretrained(base, subfolder="text_encoder", **typed),
            text_encoder_2=T5EncoderModel.from_pretrained(base, subfolder="text_encoder_2", **typed),
            tokenizer=CLIPTokenizer.from_pretrained(base, subfolder="tokenizer", **here),
            tokenizer_2=T5TokenizerFast.from_pretrained(base, subfolder="tokenizer_2", **here),
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._device, self._dtype, self._meter = device, dtype, Meter(device)
        self._meter.watch_pipeline(self._pipeline)
        self._meter.watch("text", self._pipeline, "encode_prompt")
        # Behind the meter, so that a step is no longer for the weights that come before it: they are the job's.
        if device.type == "cuda":
            self._pipeline.enable_model_cpu_offload()

    def contender(self, scenario: Scenario, asked: Inference) -> Contender:
        """Of `asked`, only what the recipe knows of."""
        pipeline, photo, mask = self._pipeline, scenario.photo(), scenario.painted()
        return Contender(
            edit=lambda: self._edit(photo, mask, asked),
            meter=self._meter,
            models=[pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2],
            windows=[frame_size(scenario.width, scenario.height)],
            device=self._device,
            dtype=self._dtype,
        )

    def _edit(self, photo: Pixels, mask: Pixels, asked: Inference) -> Pixels:
        """The photo, painted and brought back to its size."""
        height, width = mask.shape
        size = frame_size(width, height)
        painted = self._pipeline(
            prompt=asked.prompt,
            image=cv2.resize(photo, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255,
            mask_image=cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST).astype(np.float32) / 255,
            width=size[0],
            height=size[1],
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="np",
        ).images[0]
        return np.asarray(cv2.resize(np.asarray(np.rint(painted * 255), np.uint8), (width, height)))
