"""Used memory of this machine's GPUs, by NVML: asking makes no CUDA context, which would itself take memory."""

import pynvml


def used_bytes() -> int | None:
    """Of all GPUs of this machine together; None where NVML is not there, or does not answer."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return sum(int(pynvml.nvmlDeviceGetMemoryInfo(device).used) for device in devices)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
