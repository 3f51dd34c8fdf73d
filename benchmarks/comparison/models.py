"""FLUX.1-Fill's models, and FLUX.2 klein's, at any depth and width, unloaded: on the device, and of the number type,
that the caller sets.

Source of the real shapes: the configs of black-forest-labs/FLUX.1-Fill-dev and FLUX.2-klein-4B.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

#: FLUX.1's blocks of both kinds, and the layers of its text encoders.
BLOCKS, T5_LAYERS, CLIP_LAYERS = 57, 24, 12
WIDTH = 3072
_HEAD = 128
#: Tokens of the longest prompt: T5's, CLIP's.
T5_TOKENS, CLIP_TOKENS = 512, 77


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """How large the models are. The text encoders are as deep, relative to the real ones, as the transformer is."""

    #: Of the transformer; a multiple of 256, which K-quants need.
    width: int = WIDTH
    #: Blocks of two streams, and of one.
    double: int = 19
    single: int = 38
    #: The real VAE takes minutes for a 1024 x 1024 frame on a CPU; the narrow one is `serve_app.engine.flux.tiny`'s.
    narrow_vae: bool = False

    @property
    def is_full(self) -> bool:
        return (self.width, self.double, self.single) == (WIDTH, 19, 38)

    def layers(self, real: int) -> int:
        """Of a text encoder that really has `real`; at least one."""
        return max(1, round(real * (self.double + self.single) / BLOCKS))

    @property
    def text_widths(self) -> tuple[int, int]:
        """T5's and CLIP's; the real ones beside the real width."""
        return (4096, 768) if self.width == WIDTH else (self.width, self.width)


FULL = Shape()
#: klein 4B's.
KLEIN_FULL = Shape(double=5, single=20)
#: Width of its prompts' embeddings, and channels of its latents.
KLEIN_TEXT_WIDTH, KLEIN_LATENT = 7680, 32


def transformer(shape: Shape) -> Any:
    t5, clip = shape.text_widths
    return FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=shape.double,
        num_single_layers=shape.single,
        attention_head_dim=_HEAD,
        num_attention_heads=shape.width // _HEAD,
        joint_attention_dim=t5,
        pooled_projection_dim=clip,
        guidance_embeds=True,
    ).eval()


def klein_transformer(shape: Shape) -> Any:
    return Flux2Transformer2DModel(
        in_channels=4 * KLEIN_LATENT,
        num_layers=shape.double,
        num_single_layers=shape.single,
        attention_head_dim=_HEAD,
        num_attention_heads=shape.width // _HEAD,
        joint_attention_dim=KLEIN_TEXT_WIDTH,
        guidance_embeds=False,
    ).eval()


def klein_vae(shape: Shape) -> Any:
    narrow = {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return AutoencoderKLFlux2(latent_channels=KLEIN_LATENT, **(narrow if shape.narrow_vae else {})).eval()


def vae(shape: Shape) -> Any:
    narrow = shape.narrow_vae
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32) if narrow else (128, 256, 512, 512),
        layers_per_block=1 if narrow else 2,
        latent_channels=16,
        norm_num_groups=8 if narrow else 32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    ).eval()


def t5(shape: Shape) -> Any:
    width, _ = shape.text_widths
    return T5EncoderModel(
        T5Config(
            d_model=width,
            d_ff=width * 5 // 2,
            d_kv=64,
            num_heads=width // 64,
            num_layers=shape.layers(T5_LAYERS),
            feed_forward_proj="gated-gelu",
            vocab_size=32128,
        )
    ).eval()


def clip(shape: Shape) -> Any:
    _, width = shape.text_widths
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=shape.layers(CLIP_LAYERS),
            num_attention_heads=width // 64,
            projection_dim=width,
            max_position_embeddings=CLIP_TOKENS,
            # Where the synthetic tokenizer has them.
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()


def inputs(shape: Shape, width_px: int, height_px: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What one forward of the transformer takes for a window of this size: memory that nobody has filled."""
    t5_width, clip_width = shape.text_widths
    tokens = (width_px // 16) * (height_px // 16)

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, device=device, dtype=dtype)

    return {
        "hidden_states": empty(1, tokens, 384),
        "encoder_hidden_states": empty(1, T5_TOKENS, t5_width),
        "pooled_projections": empty(1, clip_width),
        "timestep": empty(1),
        "guidance": empty(1, dtype=torch.float32),
        "img_ids": empty(tokens, 3),
        "txt_ids": empty(T5_TOKENS, 3),
        "return_dict": False,
    }


def klein_inputs(width_px: int, height_px: int) -> dict[str, Any]:
    """As `inputs`, of klein's, on the meta device: a canvas and two references."""
    tokens = 3 * (width_px // 16) * (height_px // 16)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    return {
        "hidden_states": empty(1, tokens, 4 * KLEIN_LATENT),
        "encoder_hidden_states": empty(1, T5_TOKENS, KLEIN_TEXT_WIDTH),
        "timestep": empty(1),
        "guidance": None,
        "img_ids": empty(1, tokens, 4),
        "txt_ids": empty(1, T5_TOKENS, 4),
        "return_dict": False,
    }


def weights_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
