"""What quantised weights need: how GGUF packs them, and the number type they are computed in."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Packing:
    name: str
    #: Weights in a block, and the bytes it takes.
    block: int
    block_bytes: int


#: GGML type number -> packing, for every type that diffusers unpacks. Numbers and sizes: `ggml.h`, `ggml-common.h`.
PACKINGS: Mapping[int, Packing] = {
    0: Packing("F32", 1, 4),
    1: Packing("F16", 1, 2),
    2: Packing("Q4_0", 32, 18),
    3: Packing("Q4_1", 32, 20),
    6: Packing("Q5_0", 32, 22),
    7: Packing("Q5_1", 32, 24),
    8: Packing("Q8_0", 32, 34),
    10: Packing("Q2_K", 256, 84),
    11: Packing("Q3_K", 256, 110),
    12: Packing("Q4_K", 256, 144),
    13: Packing("Q5_K", 256, 176),
    14: Packing("Q6_K", 256, 210),
    20: Packing("IQ4_NL", 32, 18),
    23: Packing("IQ4_XS", 256, 136),
    30: Packing("BF16", 1, 2),
}


def compute_dtype(capability: tuple[int, int] | None) -> str:
    """The torch dtype to unpack to and compute in, by CUDA compute capability; None is a CPU.

    bfloat16 is computed by devices from 8.0 on. FLUX overflows float16, so older ones get float32. So does the CPU:
    there bfloat16 is no faster (tiny, 8 steps, 2 threads: 0.43 s against 0.46 s with AVX-512 BF16) and less exact.
    """
    return "bfloat16" if capability is not None and capability >= (8, 0) else "float32"
