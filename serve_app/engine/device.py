"""The device that torch computes on: which, how well, how long, and what its failures mean."""

import gc
import platform
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from ..errors import OutOfMemory, PaintError, VariantLoadFailed
from . import gpu_faults
from .flux import quant

#: Held while models are built: accelerate replaces `torch.nn.Module`'s methods meanwhile, for the whole process.
BUILDING = threading.Lock()


class Device:
    """A GPU where one is wanted, else the CPU."""

    def __init__(self, *, wants_gpu: bool, dtype: torch.dtype | None = None) -> None:
        """`dtype` is what it computes in; None takes `quant.compute_dtype`.

        Raises VariantLoadFailed where a GPU is wanted and torch sees none.
        """
        if wants_gpu and not torch.cuda.is_available():
            raise VariantLoadFailed("the variant needs a GPU, but torch finds none")
        self.is_gpu = wants_gpu
        self.torch = torch.device("cuda" if wants_gpu else "cpu")
        self.capability = torch.cuda.get_device_capability() if wants_gpu else None
        self.dtype: torch.dtype = dtype or getattr(torch, quant.compute_dtype(self.capability))
        self.ms = 0.0

    def describe(self) -> Mapping[str, Any]:
        """The device's part of `Engine.describe`. Raises as `translated` does."""
        if self.capability is None:
            return _describe_cpu()
        with self.translated():
            free, total = torch.cuda.mem_get_info()
        return {
            "device": torch.cuda.get_device_name(),
            "compute_capability": ".".join(map(str, self.capability)),
            "memory_used_bytes": total - free,
            "memory_total_bytes": total,
        }

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def free_memory(self) -> None:
        """Give back what nothing uses any more. Raises as `translated` does."""
        gc.collect()
        if self.is_gpu:
            with self.translated():
                torch.cuda.empty_cache()

    def peak_memory(self) -> tuple[int, int] | None:
        """As `Engine.peak_memory`: what torch's allocator took, which leaves out CUDA's own context."""
        if not self.is_gpu:
            return None
        peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        return peak

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the device time of what runs inside to `ms`, by CUDA events; on a CPU nothing is added."""
        if not self.is_gpu:
            yield
            return
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
        finally:
            end.record()
            end.synchronize()
            self.ms += start.elapsed_time(end)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise OutOfMemory, GpuLost or PaintError for the device's own failures; other errors pass through."""
        try:
            yield
        except RuntimeError as e:
            kind = _kind_of(e)
            if kind is None:
                raise
            # The frames that failed still hold what filled the memory.
            traceback.clear_frames(e.__traceback__)
            raise kind(f"{self.torch} failed: {_first_line(e)}") from e


class OnDevice:
    """What an engine on a device says of it."""

    #: Whose versions it names.
    packages: tuple[str, ...] = ("torch", "diffusers", "transformers")
    _device: Device

    def device_ms(self) -> float | None:
        return self._device.ms if self._device.is_gpu else None

    def peak_memory(self) -> tuple[int, int] | None:
        return self._device.peak_memory()

    def describe(self) -> Mapping[str, Any]:
        return {**self._device.describe(), "versions": _versions(self.packages)}

    def free_memory(self) -> None:
        self._device.free_memory()

    def _step_hook(self, on_step: Callable[[int], None]) -> Callable[..., dict[str, Any]]:
        """A pipeline's callback. Raising in it ends the run at once; the pipeline's own flag would still decode."""

        def hook(_pipeline: Any, index: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
            # Kernels run behind the code that launches them: wait, so that a step reported is a step done.
            self._device.synchronize()
            on_step(index + 1)
            return {}

        return hook


@cache
def _versions(packages: tuple[str, ...]) -> Mapping[str, str]:
    return {package: version(package) for package in packages}


def _kind_of(error: RuntimeError) -> type[PaintError] | None:
    if not isinstance(error, TorchDynamoException):
        return gpu_faults.kind_of(error)
    # The compiler's errors quote code, where "CUDA" says nothing of the GPU's health.
    inner = getattr(error, "inner_exception", None)
    is_full = isinstance(inner, RuntimeError) and gpu_faults.kind_of(inner) is OutOfMemory
    return OutOfMemory if is_full else None


def _describe_cpu() -> Mapping[str, Any]:
    return {
        "device": f"CPU {platform.machine()}",
        "compute_capability": "N/A",
        "memory_used_bytes": None,
        "memory_total_bytes": None,
    }


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
