"""Repacks a loaded transformer's weights to int8 or fp8, so that tensor cores multiply them as they are. Approximate.

GGUF saves memory, not arithmetic: its weights are unpacked and multiplied in bfloat16. Repacked, a weight is one byte,
and the activations are rounded to one byte as they come: symmetrically, one scale for each row of either, so that what
is painted in one batch stays apart. The products are summed in int32 or float32. The work is torchao's.

Only the blocks' linear layers are repacked, where the arithmetic is. Two kinds are left out:

- the norms' (AdaLN's), where `modulation` has not taken them out: they multiply a single row, and CUDA's int8 product
  takes no fewer than 17 (`_int_mm_out_cuda` in PyTorch's aten/src/ATen/native/cuda/Blas.cpp);
- those before and after the blocks: less than 0.1% of the arithmetic, and all there is passes through them.

On a GPU it pays compiled only: uncompiled, each layer reads and writes its activations once more to round them, and
torchao's int8 product prints its input, which waits for the device.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    quantize_,
)
from torchao.utils import should_reduce_range

from ...errors import VariantLoadFailed
from ...models import Repacking

log = logging.getLogger(__name__)

_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
#: The first CUDA compute capability whose tensor cores take fp8: Ada's.
_FP8_CAPABILITY = (8, 9)


def repack(
    transformer: nn.Module, kind: Repacking, change: Callable[[str, nn.Linear], None] = lambda name, layer: None
) -> None:
    """Repack in place, on the device that the weights are on, one layer at a time: no two are unpacked at once.
    `change` may change each while it is unpacked; it is called with `transformer.` before the layer's name.

    Raises VariantLoadFailed, with nothing repacked, where the device cannot multiply numbers of this kind.
    """
    started_s = time.perf_counter()
    _require(kind, next(transformer.parameters()).device)
    names, left_out = layers(transformer)
    for name in names:
        layer = repacked(transformer.get_submodule(name), kind, partial(change, f"transformer.{name}"))
        transformer.set_submodule(name, layer)
    took_s = round(time.perf_counter() - started_s, 3)
    extra = {"action": "repacked", "repack": kind, "layers": len(names), "left_out": len(left_out), "took_s": took_s}
    log.info("Repacked %d layers to %s in %.1f s; %d stay", len(names), kind, took_s, len(left_out), extra=extra)


def layers(transformer: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the linear layers that are repacked, and of those that are left as they are."""
    chosen: dict[bool, list[str]] = {True: [], False: []}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            chosen[_is_repacked(name)].append(name)
    return chosen[True], chosen[False]


def _is_repacked(name: str) -> bool:
    part, *within = name.split(".")
    return part in _BLOCKS and not any("norm" in each for each in within)


@torch.no_grad()
def repacked(layer: nn.Module, kind: Repacking, change: Callable[[nn.Linear], None] = lambda layer: None) -> nn.Linear:
    """A linear layer, GGUF or plain, as a new one with weights of one byte, on its device and of its compute dtype,
    after `change`.

    `fp8` takes bfloat16 only; torchao raises AssertionError for others.
    """
    unpacked = _unpacked(layer)
    change(unpacked)
    quantize_(unpacked, _CONFIGS[kind](unpacked.weight.device))
    return unpacked


def _unpacked(layer: Any) -> nn.Linear:
    dtype = layer.compute_dtype if isinstance(layer, GGUFLinear) else layer.weight.dtype
    has_bias = layer.bias is not None
    unpacked = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    unpacked.weight = nn.Parameter(dequantize_gguf_tensor(layer.weight).to(dtype), requires_grad=False)
    if has_bias:
        unpacked.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return unpacked


def _w8a8(device: torch.device) -> Any:
    reduce_range = should_reduce_range(device) or _overflows(device)
    return Int8DynamicActivationInt8WeightConfig(reduce_range=reduce_range, set_inductor_config=False)


@cache
def _overflows(device: torch.device) -> bool:
    """Whether products of int8 are summed in 16 bits at first, too few for the full range: those of a CPU without VNNI,
    or where oneDNN was told to leave VNNI alone, which torchao does not see."""
    if device.type != "cpu":
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return int(torch._int_mm(largest, largest)[0, 0]) != 64 * 127**2


def _fp8(_: torch.device) -> Any:
    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)


#: torchao's own settings for the compiler are the whole process's, and how blocks are compiled is not decided here.
_CONFIGS: Mapping[Repacking, Callable[[torch.device], Any]] = {"w8a8": _w8a8, "fp8": _fp8}


def _require(kind: Repacking, device: torch.device) -> None:
    capability = _capability(device)
    if kind == "fp8" and (capability is None or capability < _FP8_CAPABILITY):
        found = "a CPU" if capability is None else "one of {}.{}".format(*capability)
        raise VariantLoadFailed(f"fp8 needs a GPU of compute capability 8.9 or more, but this is {found}")


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
