"""Paints with LoRAs: while a painting goes on, each layer that they name adds their changes to what it gives.

Nothing of the model is replaced or written to, so what it paints without them is the same before and after, whatever
its weights are packed as. The arithmetic is PEFT's, so pictures are those of diffusers' own way, bit by bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ...errors import WrongModel
from ...models import LoraUse, VariantLora
from ..device import Device
from .adapter import Adapter


def layer_of(pipeline: Any, name: str) -> nn.Module:
    """The layer that a LoRA calls so. Raises WrongModel where there is none."""
    component, _, path = name.partition(".")
    try:
        layer: nn.Module = getattr(pipeline, component).get_submodule(path)
    except AttributeError as e:
        raise WrongModel(f"the model has no layer {name}") from e
    return layer


@contextmanager
def applied(
    layer_of: Callable[[str], nn.Module], loras: Sequence[tuple[LoraUse | VariantLora, Adapter]], device: Device
) -> Iterator[None]:
    """A model paints with `loras` inside, each at its scale; they are added in this order. Their tensors are on the
    device meanwhile. `layer_of` finds a layer by its name.

    Raises WrongModel, and what torch raises where the device has no room; no hook stays.
    """
    with ExitStack() as hooks:
        for use, adapter in loras:
            for name, layer in adapter.layers.items():
                down, up = (tensor.to(device.torch, device.dtype) for tensor in (layer.down, layer.up))
                hook = partial(_add, down=down, up=up, scale=use.scale * layer.scale)
                hooks.enter_context(layer_of(name).register_forward_hook(hook))
        yield


def _add(module: Any, inputs: tuple[Tensor, ...], output: Tensor, *, down: Tensor, up: Tensor, scale: float) -> Tensor:
    x = inputs[0].to(down.dtype)
    if down.ndim == 4:
        inner = functional.conv2d(x, down, None, module.stride, module.padding)
        return (output + functional.conv2d(inner, up) * scale).to(output.dtype)
    return (output + functional.linear(functional.linear(x, down), up) * scale).to(output.dtype)
