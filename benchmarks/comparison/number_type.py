"""The number type that both sides of the comparison compute in."""

import torch


def of(device: torch.device) -> torch.dtype:
    """bfloat16, as a GPU paints; float32 on a CPU that has no arithmetic for bfloat16, only an emulation of it."""
    emulates = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulates else torch.bfloat16


def name(dtype: torch.dtype) -> str:
    """As in `bfloat16`."""
    return str(dtype).removeprefix("torch.")
