"""T5 and CLIP: the only place that loads them."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import FluxFillPipeline
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
from transformers.utils import logging

from ...errors import PaintError
from ..device import BUILDING, Device


class TextEncoder:
    """Encodes prompts as FluxFillPipeline would, with the text encoders and tokenizers in the folder `base`.

    In bfloat16 whatever the device: that is what FLUX.1 was published in, and T5-XXL has 4.8 billion weights.
    """

    def __init__(self, base: Path, *, threads: int, wants_gpu: bool = False) -> None:
        """Raises VariantLoadFailed where a GPU is wanted and there is none."""
        self._base = base
        self._threads = threads
        self._device = Device(wants_gpu=wants_gpu)
        self._pipeline: Any = None

    def load(self) -> None:
        """Slow. Raises OutOfMemory, and what transformers raises for files that are no text encoders."""
        torch.set_num_threads(self._threads)
        # One line for each model in every replica's log, redrawn.
        logging.disable_progress_bar()
        with BUILDING, self._device.translated():
            self._pipeline = self._build().to(self._device.torch)

    def encode(self, prompt: str, max_tokens: int) -> bytes:
        """safetensors bytes: `prompt_embeds` `[1, max_tokens, d]`, `pooled_prompt_embeds` `[1, d]`.

        Longer prompts are cut. Raises OutOfMemory; PaintError.
        """
        if self._pipeline is None:
            raise PaintError("the text encoder is not loaded")
        with self._device.translated(), torch.inference_mode():
            prompt_embeds, pooled, _ = self._pipeline.encode_prompt(
                prompt, max_sequence_length=max_tokens, device=self._device.torch
            )
        tensors = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}
        return safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def close(self) -> None:
        self._pipeline = None
        self._device.free_memory()

    def _build(self) -> Any:
        models = {"dtype": torch.bfloat16, "local_files_only": True}
        return FluxFillPipeline(
            text_encoder=CLIPTextModel.from_pretrained(self._base, subfolder="text_encoder", **models),
            text_encoder_2=T5EncoderModel.from_pretrained(self._base, subfolder="text_encoder_2", **models),
            tokenizer=CLIPTokenizer.from_pretrained(self._base, subfolder="tokenizer", local_files_only=True),
            tokenizer_2=T5TokenizerFast.from_pretrained(self._base, subfolder="tokenizer_2", local_files_only=True),
            transformer=None,
            vae=None,
            scheduler=None,
        )
