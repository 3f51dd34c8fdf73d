"""What torch's errors say of the GPU: no memory left, a failure that may pass, or a GPU that this process has lost."""

from collections.abc import Iterable, Mapping

import torch

from ..errors import GpuLost, OutOfMemory, PaintError

#: cudaErrorMemoryAllocation.
_NO_MEMORY = 2
#: How the allocators of CUDA, of its libraries and of the CPU say it.
_NO_MEMORY_WORDS = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")

#: Words in the RuntimeErrors that torch raises for a GPU's own failures.
_GPU_WORDS = ("CUDA", "CUBLAS", "CUDNN", "cuDNN", "NVRTC")

#: Errors after which every CUDA call of the process fails: those of which driver_types.h (CUDA 13.0) says that the
#: process must be relaunched, uncorrectable memory and link errors, a destroyed context, and the unknown error of a GPU
#: that does not answer. By cudaError_t, what cudaGetErrorString says.
STICKY: Mapping[int, str] = {
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error detected during the execution",
    226: "Invalid access of peer GPU memory over nvlink or a hardware error",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    709: "context is destroyed",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    721: "tensor memory not completely freed",
    999: "unknown error",
}


def kind_of(error: RuntimeError) -> type[PaintError] | None:
    """OutOfMemory, GpuLost, PaintError for another failure of the GPU; None for an error that is not the device's."""
    # Set where torch raises it for a CUDA call that failed; libraries on top of CUDA raise words alone.
    code = getattr(error, "error_code", None)
    words = str(error)
    if isinstance(error, torch.OutOfMemoryError) or code == _NO_MEMORY or _any_in(_NO_MEMORY_WORDS, words):
        return OutOfMemory
    if not isinstance(error, torch.AcceleratorError) and not _any_in(_GPU_WORDS, words):
        return None
    return GpuLost if code in STICKY or _any_in(STICKY.values(), words) else PaintError


def _any_in(phrases: Iterable[str], words: str) -> bool:
    return any(phrase in words for phrase in phrases)
