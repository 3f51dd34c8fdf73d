"""Q5_K, the quantisation of Q5_K_S files, packed with numpy: the `gguf` package can only unpack it.

Layout of one block, `block_q5_K` in ggml (`ggml/src/ggml-common.h`); 256 weights in 176 bytes:

    bytes     0..1    d       float16, unit of the eight scales
              2..3    dmin    float16, unit of the eight minima
              4..15   scales  eight scales and eight minima of 6 bits, packed as `get_scale_min_k4` reads them
             16..47   qh      bit j of byte i: the fifth bit of weight i of group j
             48..175  qs      byte 32*k + i: low four bits of weight i of group 2k, then of group 2k+1

A weight of group j is `d * scale[j] * q - dmin * minimum[j]`, with q in 0..31.
"""

import numpy as np
import numpy.typing as npt

#: Weights in a block, in groups of `_GROUP` that share a scale and a minimum.
BLOCK = 256
_GROUPS, _GROUP = 8, 32

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def pack(weights: Floats) -> Bytes:
    """`[rows, columns]` float32 as `[rows, columns / 256 * 176]` bytes.

    Raises ValueError where columns is no multiple of 256.
    """
    rows, columns = weights.shape
    if columns % BLOCK:
        raise ValueError(f"Q5_K packs rows of a multiple of {BLOCK} weights, not {columns}")
    groups = weights.astype(np.float32).reshape(-1, _GROUPS, _GROUP)
    # A minimum is stored as what is subtracted, so it is never negative.
    below = np.maximum(-groups.min(-1), 0)
    d, scales = _six_bits((groups.max(-1) + below) / 31)
    dmin, minima = _six_bits(below)
    quants = _whole(groups + (dmin * minima)[..., None], (d * scales)[..., None], most=31)
    halves = [np.float16(unit).view(np.uint8).reshape(-1, 2) for unit in (d, dmin)]
    packed = np.concatenate([*halves, _pack_scales(scales, minima), _high_bits(quants), _low_bits(quants)], axis=-1)
    return packed.reshape(rows, -1)


def _six_bits(values: Floats) -> tuple[Floats, Bytes]:
    """`[n, 8]` values >= 0 as a unit `[n, 1]` (a float16 value) and whole multiples 0..63 of it."""
    unit = (values.max(-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
    return unit, _whole(values, unit, most=63)


def _whole(values: Floats, unit: Floats, *, most: int) -> Bytes:
    multiples = np.divide(values, unit, out=np.zeros_like(values), where=unit > 0)
    return np.clip(np.rint(multiples), 0, most).astype(np.uint8)


def _pack_scales(scales: Bytes, minima: Bytes) -> Bytes:
    """Twelve bytes: groups 0..3 in the low six bits of bytes 0..7; groups 4..7 split over bytes 8..11 and the rest."""
    low = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    middle = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    high = (scales[:, 4:] & 0xF) | (minima[:, 4:] & 0xF) << 4
    return np.concatenate([low, middle, high], axis=-1)


def _high_bits(quants: Bytes) -> Bytes:
    weights = np.arange(_GROUPS, dtype=np.uint8)[None, :, None]
    return np.asarray(np.bitwise_or.reduce((quants >> 4) << weights, axis=1), np.uint8)


def _low_bits(quants: Bytes) -> Bytes:
    low = quants & 0xF
    return np.asarray(low[:, 0::2] | low[:, 1::2] << 4, np.uint8).reshape(len(quants), -1)
