"""What painting a window costs, in floating point operations, as the planner and the benchmarks count it.

Only the transformer is counted: the VAE runs once a window and the transformer at every step, so at 28 steps the VAE is
less than one part in a hundred of a window of 1024 x 1024.
"""

#: FLUX.1's transformer: 19 blocks of two streams and 38 of one, its width, and the tokens of its longest prompt.
BLOCKS, WIDTH, TEXT_TOKENS = 57, 3072, 512
#: A token of the picture shows this many pixels a side: the VAE makes one of 8, the transformer takes 2 x 2 of those.
TOKEN_PX = 16


def forward_flops(
    width_px: int, height_px: int, *, blocks: int = BLOCKS, width: int = WIDTH, text_tokens: int = TEXT_TOKENS
) -> int:
    """FLOPs of one denoising step of one window; its sides are multiples of 16 pixels.

    blocks · (24·d²·S + 4·S²·d) with S tokens of width d. Each block, of either kind, has 12·d² weights that every token
    goes through (query, key, value and output 4·d², a feed-forward of 4·d 8·d²), two operations a weight; attention
    multiplies S x S by d twice. PyTorch's FlopCounterMode counts the same within 0.1%.
    """
    tokens = text_tokens + (width_px // TOKEN_PX) * (height_px // TOKEN_PX)
    return blocks * (24 * width**2 * tokens + 4 * tokens**2 * width)
