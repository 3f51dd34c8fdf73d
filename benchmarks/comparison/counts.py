"""What an edit computes, and what unpacking its weights moves: counted, not timed.

FLOPs are counted by PyTorch's FlopCounterMode on the meta device: on a CPU it leaves attention out. A matrix product
of m x k by k x n counts 2·m·k·n, a convolution likewise; element-wise work is not counted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from . import models
from .models import Shape

#: (width, height) in pixels.
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """What one edit calls, as the meters saw it."""

    windows: Sequence[Size]
    vae_encodes: int
    vae_decodes: int
    texts: int


class Flops:
    """Of models of one shape."""

    _latent_channels = 16

    def __init__(self, shape: Shape) -> None:
        with torch.device("meta"):
            self._transformer, self._vae = models.transformer(shape), models.vae(shape)
            self._t5, self._clip = models.t5(shape), models.clip(shape)
        self._shape = shape
        self.step = cache(self._step)
        self._encode = cache(self._encode_once)
        self._decode = cache(self._decode_once)

    def of(self, calls: Calls, steps: int) -> Mapping[str, float]:
        """By part. The VAE's calls are spread evenly over the windows."""
        each = 1 / len(calls.windows)
        return {
            "transformer": sum(steps * self.step(size) for size in calls.windows),
            "vae": sum(
                each * (calls.vae_encodes * self._encode(size) + calls.vae_decodes * self._decode(size))
                for size in calls.windows
            ),
            "text": calls.texts * self._text() if calls.texts else 0,
        }

    def sizes(self) -> Mapping[str, int]:
        """Weights of each model."""
        named = {"transformer": self._transformer, "vae": self._vae, "t5": self._t5, "clip": self._clip}
        return {name: models.weights_of(model) for name, model in named.items()}

    def _step(self, size: Size) -> int:
        given = models.inputs(self._shape, *size, "meta", torch.float32)
        return _counted(lambda: self._transformer(**given))

    def _encode_once(self, size: Size) -> int:
        width, height = size
        return _counted(lambda: self._vae.encode(torch.empty(1, 3, height, width, device="meta")))

    def _decode_once(self, size: Size) -> int:
        width, height = size
        return _counted(
            lambda: self._vae.decode(torch.empty(1, self._latent_channels, height // 8, width // 8, device="meta"))
        )

    def _text(self) -> int:
        def tokens(count: int) -> Tensor:
            return torch.zeros(1, count, dtype=torch.long, device="meta")

        return _counted(lambda: (self._t5(tokens(models.T5_TOKENS)), self._clip(tokens(models.CLIP_TOKENS))))


class KleinFlops(Flops):
    """Of FLUX.2 klein, which has no text encoder."""

    _latent_channels = models.KLEIN_LATENT

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        with torch.device("meta"):
            self._transformer, self._vae = models.klein_transformer(shape), models.klein_vae(shape)

    def _step(self, size: Size) -> int:
        return _counted(lambda: self._transformer(**models.klein_inputs(*size)))


def _counted(work: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has not annotated its modes
    """Bytes that kernels read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.bytes += sum(map(_stored_bytes, _tensors((args, kwargs, returned))))
        return returned


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _stored_bytes(tensor: Tensor) -> int:
    """Without what an expanded dimension repeats."""
    stored = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        stored *= length if stride else 1
    return stored


def unpacked_bytes(transformer: nn.Module, dtype: torch.dtype) -> int:
    """What diffusers' eager kernels read and write in one step to unpack the weights that are packed still.

    On the meta device: nothing is unpacked, which at full size takes a CPU many seconds.
    """
    packed = [one for one in transformer.parameters() if isinstance(one, GGUFParameter)]
    with torch.no_grad(), _Traffic() as traffic:
        for parameter in packed:
            bytes_alone = torch.empty_like(parameter.as_tensor(), device="meta")
            dequantize_gguf_tensor(GGUFParameter(bytes_alone, quant_type=parameter.quant_type)).to(dtype)
    return int(traffic.bytes)
