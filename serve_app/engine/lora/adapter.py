"""A LoRA as it is painted with: tensors in host memory that nothing writes to."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...models import LoraFacts


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What one layer's output is changed by: `up(down(input))`, multiplied by `scale`."""

    #: `[rank, in]`; of a convolution `[rank, in, height, width]`.
    down: Tensor
    #: `[out, rank]`; of a convolution `[out, rank, 1, 1]`.
    up: Tensor
    #: alpha / rank.
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    #: By the layer's name in the pipeline, component first: `unet.`, `transformer.`, `text_encoder.`,
    #: `text_encoder_2.`
    layers: Mapping[str, Layer]
    facts: LoraFacts

    @property
    def host_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in (layer.down, layer.up))
