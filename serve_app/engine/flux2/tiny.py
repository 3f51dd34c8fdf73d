"""A tiny FLUX.2 klein with random weights: as GGUF and as safetensors, with its text encoder and its prompt encoded.

As in `flux.tiny`, what it paints is noise.
"""

import json
from pathlib import Path
from typing import Any

from ..flux.tiny import SEED, packers, write_gguf

#: Part of the folder's name: raise it when what is written changes.
FORMAT = 1

_WIDTH, _TEXT_WIDTH, _LATENT = 256, 32, 8
#: The pipeline takes what three of the text encoder's layers give, of which the last is the 27th.
TOKENS, _TEXT_LAYERS = 64, 28


def write(folder: Path) -> None:
    """`klein-base`, `flux2-klein.safetensors`, `flux2-klein-Q8_0.gguf` and `prompt.safetensors`."""
    import torch
    from safetensors.torch import save_file
    from transformers.utils import logging

    from . import prompt

    logging.disable_progress_bar()
    base = folder / "klein-base"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        transformer = _transformer()
        _vae().save_pretrained(base / "vae")
        _write_text_encoder(base)
    transformer.save_config(base / "transformer")
    _scheduler().save_pretrained(base / "scheduler")
    (base / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline", "is_distilled": True}))
    tensors = {name: tensor.contiguous() for name, tensor in transformer.state_dict().items()}
    save_file(tensors, folder / "flux2-klein.safetensors")
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    write_gguf(folder / "flux2-klein-Q8_0.gguf", arrays, *packers()["Q8_0"])
    (folder / "prompt.safetensors").write_bytes(prompt.encode(base, prompt.PROMPT, TOKENS))


def _transformer() -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4 * _LATENT,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=_WIDTH // 64,
        joint_attention_dim=3 * _TEXT_WIDTH,
        timestep_guidance_channels=_WIDTH,
        axes_dims_rope=(16, 16, 16, 16),
        guidance_embeds=False,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 32, 32), layers_per_block=1, latent_channels=_LATENT, norm_num_groups=8
    )


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def _write_text_encoder(base: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    # Every byte, so that any text can be encoded.
    pieces = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=[], model_max_length=512)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(base / "tokenizer")
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(pieces),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=_TEXT_WIDTH,
            num_hidden_layers=_TEXT_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
        )
    ).save_pretrained(base / "text_encoder")
