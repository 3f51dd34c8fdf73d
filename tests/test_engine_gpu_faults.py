"""Which of torch's errors mean that a GPU is lost. What CUDA says is what its cudaGetErrorString returned."""

import pytest
import torch

from serve_app.engine.gpu_faults import STICKY, kind_of
from serve_app.errors import GpuLost, OutOfMemory, PaintError


def accelerator_error(code: int, words: str) -> torch.AcceleratorError:
    """As torch raises it for a CUDA call that failed."""
    error = torch.AcceleratorError(f"CUDA error: {words}\nSearch for its name in CUDA's documents.")
    setattr(error, "error_code", code)  # noqa: B010 - torch declares no such attribute
    return error


def test_the_errors_that_end_a_process_are_cudas() -> None:
    """Written out, so that none is lost from the table: cudaError_t of driver_types.h."""
    assert set(STICKY) == {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999}


@pytest.mark.parametrize("code", STICKY)
def test_a_gpu_is_lost_by_its_errors_code_or_words(code: int) -> None:
    assert kind_of(accelerator_error(code, "in words of another version")) is GpuLost
    assert kind_of(accelerator_error(0, STICKY[code])) is GpuLost
    assert kind_of(RuntimeError(f"Triton Error [CUDA]: {STICKY[code]}")) is GpuLost


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        accelerator_error(2, "in words of another version"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_memory_that_is_out(error: RuntimeError) -> None:
    assert kind_of(error) is OutOfMemory


@pytest.mark.parametrize(
    "error",
    [
        accelerator_error(1, "invalid argument"),
        accelerator_error(46, "CUDA-capable device(s) is/are busy or unavailable"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx`"),
    ],
)
def test_other_failures_of_a_gpu_may_pass(error: RuntimeError) -> None:
    assert kind_of(error) is PaintError


@pytest.mark.parametrize("words", ["shapes do not match", "an unknown error", "the event loop is closed"])
def test_what_is_not_the_devices(words: str) -> None:
    assert kind_of(RuntimeError(words)) is None
