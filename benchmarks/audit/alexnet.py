"""LPIPS's network: AlexNet's convolutions, and a linear head on what each of them answers."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from serve_app.errors import CorruptWeights
from serve_app.images import Pixels

#: Of AlexNet's convolutions, by their number in torchvision's `features`: (channels out, channels in, kernel px).
_CONVOLUTIONS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
_STRIDES = {0: 4}
_PADDINGS = {0: 2, 3: 2, 6: 1, 8: 1, 10: 1}
#: Convolutions that a 3 x 3 maximum at every second pixel comes before.
_POOLED = (3, 6)
#: What the authors take from and divide channels of -1..1 by, as ImageNet's mean and deviation.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
#: Against a division by 0, as in the authors' package.
_EPSILON = 1e-10
#: A shorter side is scaled to this: below, the last layers see less than 3 x 3 pixels.
MIN_SIDE_PX = 64

_ALEXNET_SHAPES: Mapping[str, tuple[int, ...]] = {
    f"features.{number}.{name}": shape
    for number, (out, into, kernel) in _CONVOLUTIONS.items()
    for name, shape in {"weight": (out, into, kernel, kernel), "bias": (out,)}.items()
}
_HEAD_SHAPES: Mapping[str, tuple[int, ...]] = {
    f"lin{index}.model.1.weight": (1, out, 1, 1) for index, (out, _, _) in enumerate(_CONVOLUTIONS.values())
}


class Distance:
    """Of two pictures, as `lpips.Lpips`."""

    def __init__(self, alexnet: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        """Tensors by the names they have in the published files, float32."""
        self._alexnet = alexnet
        self._heads = [heads[name] for name in _HEAD_SHAPES]

    @classmethod
    def load(cls, alexnet: Path, heads: Path) -> "Distance":
        """Raises CorruptWeights."""
        return cls(_read(alexnet, _ALEXNET_SHAPES), _read(heads, _HEAD_SHAPES))

    @torch.inference_mode()
    def __call__(self, picture: Pixels, other: Pixels) -> float:
        pairs = zip(self._layers(_scaled(picture)), self._layers(_scaled(other)), self._heads, strict=True)
        return sum(float(functional.conv2d((a - b) ** 2, head).mean()) for a, b, head in pairs)

    def _layers(self, pixels: Tensor) -> Iterator[Tensor]:
        """What each convolution answers, `[1, channels, height, width]`, each pixel's channels of length 1."""
        for number in _CONVOLUTIONS:
            if number in _POOLED:
                pixels = functional.max_pool2d(pixels, kernel_size=3, stride=2)
            weight, bias = (self._alexnet[f"features.{number}.{name}"] for name in ("weight", "bias"))
            stride, padding = _STRIDES.get(number, 1), _PADDINGS[number]
            pixels = functional.relu(functional.conv2d(pixels, weight, bias, stride, padding))
            yield pixels / (pixels.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)


def _scaled(pixels: Pixels) -> Tensor:
    """The network's input, float32 `[1, 3, height, width]`, no side below MIN_SIDE_PX."""
    height, width = pixels.shape[:2]
    size = (max(width, MIN_SIDE_PX), max(height, MIN_SIDE_PX))
    if size != (width, height):
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR))
    channels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 127.5 - 1
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (_SHIFT, _SCALE))
    return ((channels - shift) / scale)[None]


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors named in `shapes`, float32. Raises CorruptWeights."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # on damage an unpickler raises whatever it trips over
        raise _corrupt(path, "cannot be read as weights") from e
    if not isinstance(stored, Mapping):
        raise _corrupt(path, "holds no tensors by name")
    for name, shape in shapes.items():
        tensor = stored.get(name)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            raise _corrupt(path, f"has no {name} of {' x '.join(map(str, shape))}")
        if not torch.isfinite(tensor).all():
            raise _corrupt(path, f"has numbers in {name} that are none")
    return {name: stored[name].float() for name in shapes}


def _corrupt(path: Path, what: str) -> CorruptWeights:
    return CorruptWeights(f"LPIPS was not measured: {path} {what}")
