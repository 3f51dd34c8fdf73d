"""How long a picture takes on a GPU, computed: its FLOPs and bytes by the rates that a card is taken to reach. Pure.

Counted are the transformer's products and attention, the unpacking of packed weights, and the VAE. Loading, JPEG,
messages and the paste are not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..models import TINY, Family, Variant
from ..settings import Optimizations
from .cost import SHAPES, forward_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """FLOP/s that a card reaches, and the bytes/s of its memory."""

    bf16: float
    #: int8 and fp8.
    eight_bit: float
    attention: float
    #: The VAE's convolutions.
    vae: float
    memory: float


#: Sources. L4: products in bfloat16 as measured on one (its data sheet says 121), int8 by MLPerf's BERT, attention and
#: VAE assumed in proportion. H200: half of what its data sheet says for dense products, 989 and 1979, the rest assumed;
#: a single large product reached 761 there.
CARDS: Mapping[str, Card] = {
    "L4": Card(bf16=55e12, eight_bit=100e12, attention=48e12, vae=45e12, memory=300e9),
    "H200": Card(bf16=495e12, eight_bit=990e12, attention=400e12, vae=300e12, memory=4800e9),
}

#: How far off a figure for an L4 may be, as a share: the card's clock under load decides.
UNCERTAINTY = 0.25

#: Weights that a step multiplies by, of FLUX.1 and of the others; those of the modulation are not among them.
_WEIGHTS, _OTHER_WEIGHTS = 8.65e9, dict[Family, float]({"flux2-klein": 3.73e9})
#: Of a GGUF packing: bytes a weight takes, and bytes that unpacking one eagerly moves; see docs/performance.md.
_PACKINGS: Mapping[str, tuple[float, float]] = {"Q8_0": (1.0625, 7.1), "Q4_0": (0.5625, 14.6), "Q5_K": (0.6875, 23.4)}
#: Bytes that rounding to 8 bits moves in a step, from so many FLOPs on; less in proportion.
_ROUNDING_BYTES, _ROUNDING_FLOPS = 9e9, 16e12
#: FLOPs of the VAE for a picture of 1024 x 1024, and how many it encodes for an edit.
_ENCODING, _DECODING = 4.88e12, 10.47e12
_ENCODINGS: Mapping[Family, int] = {"flux-fill": 1, "flux2-klein": 2}
#: FLOPs of SDXL's UNet for 1024 x 1024, of what grows with the pixels and with their square; within 4% of what
#: PyTorch's FlopCounterMode counts from 512 x 384 on.
_UNET, _UNET_SQUARE = 6.0e12, 0.76e12


def seconds(
    variant: Variant, card: Card, width_px: int, height_px: int, *, steps: int, levers: Optimizations
) -> float | None:
    """Of one window, or of one picture from a prompt, with every step computed: a step cache takes fewer.

    None for what has no weights or random ones, for a packing that is not in the table, and for 8-bit arithmetic in
    blocks that are not compiled.
    """
    is_known = variant.edits_by_transformer or variant.family in ("flux", "sdxl")
    if not is_known or variant.file is None or variant.file.startswith(TINY):
        return None
    step_s = _step_s(variant, card, width_px, height_px, levers)
    if step_s is None:
        return None
    vae_flops = (_ENCODING * _ENCODINGS.get(variant.family, 0) + _DECODING) * width_px * height_px / 2**20
    return steps * step_s + vae_flops / card.vae


def _step_s(variant: Variant, card: Card, width_px: int, height_px: int, levers: Optimizations) -> float | None:
    if variant.family == "sdxl":
        share = width_px * height_px / 2**20
        # Guidance takes two passes.
        return 2 * (_UNET * share + _UNET_SQUARE * share**2) / card.bf16
    attention, linear = _flops(variant, width_px, height_px)
    if variant.repack:
        rounding_s = _ROUNDING_BYTES * min(1, linear / _ROUNDING_FLOPS) / card.memory
        return linear / card.eight_bit + attention / card.attention + rounding_s if levers.compile else None
    moved = _unpacking_bytes(variant, levers)
    return None if moved is None else linear / card.bf16 + attention / card.attention + moved / card.memory


def _flops(variant: Variant, width_px: int, height_px: int) -> tuple[float, float]:
    """Of a step: attention's, and the other products'."""
    shape: Mapping[str, int] = {"text_tokens": variant.max_prompt_tokens, **SHAPES.get(variant.family, {})}
    attention = forward_flops(width_px, height_px, **{**shape, "block_weights": 0})
    return attention, forward_flops(width_px, height_px, **shape) - attention


def _unpacking_bytes(variant: Variant, levers: Optimizations) -> float | None:
    """Of a step. Compiled blocks read what is packed and write bfloat16 once."""
    file, weights = str(variant.file), _OTHER_WEIGHTS.get(variant.family, _WEIGHTS)
    if levers.unpack or file.endswith(".safetensors"):
        return 0.0
    for name, (packed, moved) in _PACKINGS.items():
        if name in file:
            return weights * (packed + 2 if levers.compile else moved)
    return None
