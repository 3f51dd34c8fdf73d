"""Used memory of this machine's GPUs, by NVML: asking makes no CUDA context, which would itself take memory."""

from contextlib import suppress

import pynvml


def used_bytes() -> list[int]:
    """Of each GPU of this machine, by index; none where NVML is not there, or does not answer."""
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            return [int(pynvml.nvmlDeviceGetMemoryInfo(device).used) for device in devices]
        finally:
            pynvml.nvmlShutdown()
    return []
