"""Names and sizes of a model's layers: of one that is loaded, or by its description, since where LoRAs are registered
there are no weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ...models import Family
from .read import Sizes

#: By component: the class, its configuration's class where it has one, and its built-in configuration. FLUX.1-dev's is
#: diffusers' default but for `guidance_embeds`. Source of SDXL's: the config.json files of
#: stabilityai/stable-diffusion-xl-base-1.0.
_COMPONENTS: Mapping[Family, Mapping[str, tuple[Any, Any, Mapping[str, Any]]]] = {
    "flux": {"transformer": (FluxTransformer2DModel, None, {"guidance_embeds": True})},
    "sdxl": {
        "unet": (UNet2DConditionModel, None, {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }),
        "text_encoder": (CLIPTextModel, CLIPTextConfig, {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "projection_dim": 768,
        }),
        "text_encoder_2": (CLIPTextModelWithProjection, CLIPTextConfig, {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
            "projection_dim": 1280,
        }),
    },
}  # fmt: skip


def components(family: Family) -> Mapping[str, Any]:
    """The names of those that LoRAs change."""
    return _COMPONENTS[family]


def sizes_of(models: Mapping[str, nn.Module]) -> Sizes:
    """`models` by component."""
    sizes: dict[str, tuple[int, ...]] = {}
    for component, model in models.items():
        for name, module in model.named_modules(prefix=component):
            # Not of the weights, which may be packed.
            if isinstance(module, nn.Linear):
                sizes[name] = module.out_features, module.in_features
            elif isinstance(module, nn.Conv2d):
                sizes[name] = module.out_channels, module.in_channels // module.groups, *module.kernel_size
    return sizes


def described(family: Family, base: Path | None) -> Sizes:
    """By the configurations in the folder `base`; of the family's published model where there is none."""
    models = {}
    with torch.device("meta"):
        for component, (kind, config_kind, config) in _COMPONENTS[family].items():
            if base is not None:
                config = json.loads((base / component / "config.json").read_text())
            models[component] = kind.from_config(config) if config_kind is None else kind(config_kind(**config))
    return sizes_of(models)
