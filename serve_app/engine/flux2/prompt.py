"""The one prompt of a FLUX.2 klein: encoded once by its text encoder, Qwen3, and read from a file ever after."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import Flux2KleinPipeline
from safetensors import SafetensorError
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM
from transformers.utils import logging

from ...errors import VariantLoadFailed
from ..device import BUILDING

_TENSOR = "prompt_embeds"
#: What the model is asked with its two references.
PROMPT = "Remove what the white area of image 2 covers from image 1, and continue the background there."


def encode(base: Path, prompt: str, tokens: int) -> bytes:
    """safetensors bytes with `prompt_embeds` `[1, tokens, d]` and, in words, the prompt. `base` has the text encoder
    and its tokenizer. On the CPU, in bfloat16, in which Qwen3 was published: 4B takes 8 GB.

    Longer prompts are cut. Raises what transformers raises for files that are no text encoder.
    """
    logging.disable_progress_bar()
    here: dict[str, Any] = {"local_files_only": True}
    with BUILDING, torch.inference_mode():
        embeddings = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            Qwen3ForCausalLM.from_pretrained(base, subfolder="text_encoder", dtype=torch.bfloat16, **here),
            Qwen2TokenizerFast.from_pretrained(base, subfolder="tokenizer", **here),
            prompt,
            max_sequence_length=tokens,
        )
    return safetensors.torch.save({_TENSOR: embeddings.contiguous()}, {"prompt": prompt})


def decode(data: bytes, tokens: int, width: int) -> Tensor:
    """`[1, tokens, width]`. Raises VariantLoadFailed, which says what is wrong with the bytes."""
    try:
        found = safetensors.torch.load(data)[_TENSOR]
    except (SafetensorError, KeyError) as e:
        raise VariantLoadFailed(f"the prompt's embeddings cannot be read: {e!r}") from e
    if found.shape != (1, tokens, width):
        wanted = f"{[1, tokens, width]}, tokens by the transformer's width for text"
        raise VariantLoadFailed(f"the prompt's embeddings are {list(found.shape)}, and must be {wanted}")
    if not torch.isfinite(found).all():
        raise VariantLoadFailed("the prompt's embeddings hold a number that is not finite")
    return found
