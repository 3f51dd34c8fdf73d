"""What painting a window costs, in floating point operations, as the planner and the benchmarks count it.

Only the transformer is counted: the VAE runs once a window and the transformer at every step, so at 28 steps the VAE is
less than one part in a hundred of a window of 1024 x 1024; at FLUX.2 klein's 4 it is one in twenty-five.
"""

from collections.abc import Mapping

from ..models import Family

#: FLUX.1's transformer: 19 blocks of two streams and 38 of one, its width, and the tokens of its longest prompt.
BLOCKS, WIDTH, TEXT_TOKENS = 57, 3072, 512
#: A token of the picture shows this many pixels a side: the VAE makes one of 8, the transformer takes 2 x 2 of those.
TOKEN_PX = 16
#: By family: what `forward_flops` is to be told of its transformer, where that is not FLUX.1's. FLUX.2 klein 4B has 5
#: blocks of two streams and 20 of one, and its canvas has two references beside it, photo and mask.
SHAPES: Mapping[Family, Mapping[str, int]] = {"flux2-klein": {"blocks": 25, "block_weights": 13, "pictures": 3}}


def forward_flops(
    width_px: int,
    height_px: int,
    *,
    blocks: int = BLOCKS,
    width: int = WIDTH,
    text_tokens: int = TEXT_TOKENS,
    block_weights: int = 12,
    pictures: int = 1,
) -> int:
    """FLOPs of one denoising step of one window; its sides are multiples of 16 pixels.

    blocks · (2·w·d²·S + 4·S²·d) with S tokens of width d: those of the text, and of so many `pictures` of the window's
    size. Each block, of either kind, has w·d² weights that every token goes through (query, key, value and output 4·d²,
    a feed-forward of 4·d 8·d²; FLUX.2's gated one of 3·d 9·d²), two operations a weight; attention multiplies S x S by
    d twice. PyTorch's FlopCounterMode counts the same within 0.1%, of FLUX.2 within 0.3%.
    """
    tokens = text_tokens + pictures * (width_px // TOKEN_PX) * (height_px // TOKEN_PX)
    return blocks * (2 * block_weights * width**2 * tokens + 4 * tokens**2 * width)


def planned_tflop(width_px: int, height_px: int, *, family: Family, text_tokens: int) -> float:
    """TFLOP of one step of one window, in FLUX.1's, which the planner's budget and overhead are given in: those of
    another family are scaled so that its window of 1024 x 1024 costs as much as FLUX.1's."""
    shape = SHAPES.get(family, {})
    scale = forward_flops(1024, 1024) / forward_flops(1024, 1024, **shape)
    return scale * forward_flops(width_px, height_px, **{**shape, "text_tokens": text_tokens}) / 1e12
