"""A tiny Stable Diffusion XL with random weights: one file in the original names, and the folder of its configs.

diffusers' own converter reads the file as it reads the real model's. What it makes of a prompt is noise.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..flux.tiny import SEED, write_clip_tokenizer

#: Part of the folder's name: raise it when what is written changes.
FORMAT = 1

#: Widths of the two text encoders. They differ: the converter tells them apart by them.
_WIDTHS = (32, 64)
_TOKENS = 77

#: By component: its prefix in the file, and what turns diffusers' names into the original ones, in this order. Source:
#: diffusers' loaders/single_file_utils.py, the other way round.
_NAMES: Mapping[str, tuple[str, Sequence[tuple[str, str]]]] = {
    "unet": ("model.diffusion_model.", (
        (r"(resnets\.\d)\.norm1", r"\1.in_layers.0"), (r"(resnets\.\d)\.conv1", r"\1.in_layers.2"),
        (r"(resnets\.\d)\.norm2", r"\1.out_layers.0"), (r"(resnets\.\d)\.conv2", r"\1.out_layers.3"),
        ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"), ("^conv_in", "input_blocks.0.0"),
        (r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^add_embedding\.linear_1", "label_emb.0.0"), (r"^add_embedding\.linear_2", "label_emb.0.2"),
        (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
        (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
        (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"), (r"^down_blocks\.1\.attentions\.0", "input_blocks.3.1"),
        (r"^mid_block\.resnets\.0", "middle_block.0"), (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^mid_block\.resnets\.1", "middle_block.2"), (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
        (r"^up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
        (r"^up_blocks\.0\.upsamplers\.0", "output_blocks.1.2"), (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
        (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"), ("^conv_norm_out", "out.0"), ("^conv_out", "out.2"),
    )),
    "vae": ("first_stage_model.", (
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"), (r"up_blocks\.0\.resnets", "up.3.block"),
        (r"up_blocks\.1\.resnets", "up.2.block"), (r"up_blocks\.2\.resnets", "up.1.block"),
        (r"up_blocks\.3\.resnets", "up.0.block"), (r"up_blocks\.0\.upsamplers\.0", "up.3.upsample"),
        (r"up_blocks\.1\.upsamplers\.0", "up.2.upsample"), (r"up_blocks\.2\.upsamplers\.0", "up.1.upsample"),
        (r"up_blocks\.3\.upsamplers\.0", "up.0.upsample"), (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("group_norm", "norm"), (r"to_out\.0", "proj_out"), ("to_([qkv])", r"\1"), ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    )),
    "text_encoder": ("conditioner.embedders.0.transformer.text_model.", (
        (r"^text_model\.", ""),
    )),
    "text_encoder_2": ("conditioner.embedders.1.model.", (
        (r"^text_model\.", ""), (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^embeddings\.token_embedding", "token_embedding"), ("^final_layer_norm", "ln_final"),
        (r"^encoder\.layers", "transformer.resblocks"), ("layer_norm", "ln_"), ("fc1", "c_fc"), ("fc2", "c_proj"),
        ("self_attn", "attn"), (r"^text_projection\.weight", "text_projection"),
    )),
}  # fmt: skip


def write(folder: Path) -> None:
    """`sdxl.safetensors`, and `sdxl-base` with everything but the weights."""
    import torch
    from safetensors.torch import save_file
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        pipeline = _pipeline(folder / "sdxl-base")
    tensors: dict[str, Any] = {}
    for component in _NAMES:
        model = getattr(pipeline, component)
        # transformers' models have configs with a method of their own.
        save = model.config.save_pretrained if component.startswith("text") else model.save_config
        save(folder / "sdxl-base" / component)
        tensors.update(_original(component, model.state_dict()))
    pipeline.save_config(folder / "sdxl-base")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sdxl.safetensors")


def _original(component: str, state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors under their original names and in their original shapes."""
    import torch

    prefix, names = _NAMES[component]
    for name, tensor in state.items():
        original = name
        for pattern, replacement in names:
            original = re.sub(pattern, replacement, original)
        if component == "vae" and ".attn_1." in original and tensor.ndim == 2:
            # Linear layers of today were convolutions.
            tensor = tensor[:, :, None, None]
        if original == "text_projection":
            tensor = tensor.T
        if component == "text_encoder_2" and (found := re.fullmatch(r"(.*attn\.)([qkv])_proj\.(\w+)", original)):
            # Three in one.
            if found[2] != "q":
                continue
            tensor = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            original = f"{found[1]}in_proj_{found[3]}"
        yield prefix + original, tensor


def _pipeline(base: Path) -> Any:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizers = [write_clip_tokenizer(base / name) for name in ("tokenizer", "tokenizer_2")]
    encoders = [
        kind(
            CLIPTextConfig(
                vocab_size=len(tokenizers[0]),
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=width,
                max_position_embeddings=_TOKENS,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        for kind, width in zip((CLIPTextModel, CLIPTextModelWithProjection), _WIDTHS, strict=True)
    ]
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + _WIDTHS[1],
        cross_attention_dim=sum(_WIDTHS),
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        sample_size=64,
        norm_num_groups=8,
        # SDXL's own.
        scaling_factor=0.13025,
        force_upcast=True,
    )
    # As SDXL's own is configured.
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    scheduler.save_pretrained(base / "scheduler")
    return StableDiffusionXLPipeline(vae, *encoders, *tokenizers, unet, scheduler, add_watermarker=False)
