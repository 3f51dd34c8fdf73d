"""Reads a LoRA's file strictly: by its content, not its name, and all of it against the layers of the model."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import NotFinite, UnsupportedFormat, WrongModel
from ...models import Family, LoraFacts
from . import names
from .adapter import Adapter, Layer
from .contents import Pair, metadata_of, opened, pairs_of, shown, valid_alpha

#: Of a layer's weight: `[out, in]`, of a convolution `[out, in, height, width]`. By its name, component first.
Sizes = Mapping[str, tuple[int, ...]]

#: FLUX.1-dev's input.
_DEV_CHANNELS = 64
_FIRST_BLOCK = re.compile(r"unet\.down_blocks\.0\.resnets\.\d+\.conv1")


def read(file: Path, family: Family, sizes: Sizes, *, alpha: float | None, max_rank: int) -> Adapter:
    """`sizes` are those of the model's layers; `alpha` is for layers whose alpha the file does not say.

    Raises LoraRefused, by its kind.
    """
    with opened(file) as content:
        return _Reader(content, family, sizes, alpha, max_rank).read(keep=True)


def look(file: Path, family: Family, sizes: Sizes, *, alpha: float | None, max_rank: int) -> LoraFacts:
    """As `read`, in the memory of one layer."""
    with opened(file) as content:
        return _Reader(content, family, sizes, alpha, max_rank).read(keep=False).facts


class _Reader:
    def __init__(self, file: Any, family: Family, sizes: Sizes, alpha: float | None, max_rank: int) -> None:
        self._file, self._family, self._sizes, self._alpha = file, family, sizes, alpha
        self._pairs, self._said = pairs_of(file, max_rank), metadata_of(file)
        self._joined = names.joined(sizes)
        self._layers_per_block = sum(bool(_FIRST_BLOCK.fullmatch(name)) for name in sizes)
        #: Elements of a tensor. Some writers have four layers as one.
        self._most = 4 * max_rank * max(max(out, math.prod(rest)) for out, *rest in sizes.values())

    def read(self, *, keep: bool) -> Adapter:
        layers: dict[str, Layer] = {}
        scales: dict[str, float] = {}
        ignored, has_alpha = 0, True
        for pair in self._pairs:
            down, up = self._tensors(pair)
            if self._family == "flux" and names.is_of_text_encoder(pair.stem):
                ignored += 1
                continue
            for name, tensors in self._fitted(pair, down, up).items():
                if name in scales:
                    raise UnsupportedFormat(f"{shown(pair.keys[0])}: another key is for the same layer, {name}")
                component = name.partition(".")[0]
                said = self._alpha_of(pair, component)
                has_alpha = has_alpha and said is not None
                alpha = self._alpha if said is None else said
                divisor = math.sqrt(pair.rank) if self._of(component, "use_rslora") else pair.rank
                scales[name] = 1.0 if alpha is None else alpha / divisor
                if keep:
                    layers[name] = Layer(*tensors, scales[name])
        if not scales:
            raise WrongModel("all its layers are of text encoders, and FLUX.1 takes no LoRA for those")
        facts = LoraFacts(
            family=self._family,
            format=self._format(),
            dtype=", ".join(sorted(set().union(*(pair.dtypes for pair in self._pairs)))),
            rank=max(pair.rank for pair in self._pairs),
            layers=len(scales) + ignored,
            text_encoder_layers=sum(name.startswith("text_encoder") for name in scales) + ignored,
            has_alpha=has_alpha,
            alpha_scale=(min(scales.values()), max(scales.values())),
        )
        return Adapter(layers, facts)

    def _tensors(self, pair: Pair) -> Sequence[Tensor]:
        if pair.elements > self._most:
            raise WrongModel(f"{shown(pair.keys[0])}: {_sizes(*pair.shapes)} fit no layer of the model")
        tensors = [self._file.get_tensor(pair.stem + end) for end in pair.ending]
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise NotFinite(f"{shown(pair.keys[0])}: it or its other half holds a number that is infinite or none")
        return tensors

    def _fitted(self, pair: Pair, down: Tensor, up: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
        """By layer of the model, in memory of their own."""
        key = shown(pair.keys[0])
        try:
            found = names.converted(
                self._family, pair, down, up, joined=self._joined, layers_per_block=self._layers_per_block
            )
        except Exception as e:  # whatever diffusers makes of a name that it does not know
            raise WrongModel(f"{key}: the model has no layer of this name, or not of this size") from e
        fitted = {}
        own = {id(tensor): tensor.clone() for tensors in found.values() for tensor in tensors}
        for given, (first, second) in found.items():
            # Newer versions of transformers have CLIP's layers without this.
            name = given if given in self._sizes else given.replace(".text_model.", ".", 1)
            if name not in self._sizes:
                raise WrongModel(f"{key}: the model has no layer {shown(name)}")
            out, *rest = self._sizes[name]
            own_first, own_second = own[id(first)], own[id(second)]
            is_input = self._family == "flux" and name == "transformer.x_embedder"
            if is_input and first.ndim == 2 and first.shape[1] == _DEV_CHANNELS < rest[0]:
                # FLUX.1-Fill has the mask and what it leaves of the photo behind FLUX.1-dev's channels: a LoRA for
                # FLUX.1-dev changes nothing of those. diffusers does the same.
                first = own_first = functional.pad(own_first, (0, rest[0] - _DEV_CHANNELS))
            wanted = [len(first), *rest], [out, len(first), *[1] * (len(rest) - 1)]
            if (list(first.shape), list(second.shape)) != wanted:
                if name == "transformer.x_embedder" and first.shape[1] > rest[0]:
                    raise UnsupportedFormat(f"{key}: it takes more channels than the model, as a control LoRA does")
                found_sizes = _sizes(first.shape, second.shape)
                raise WrongModel(f"{key}: {found_sizes} do not fit {name}, {_sizes(*wanted)} would")
            fitted[name] = own_first, own_second
        return fitted

    def _alpha_of(self, pair: Pair, component: str) -> float | None:
        """As the file says it."""
        said = self._of(component, "lora_alpha") if pair.alpha is None else pair.alpha
        return None if said is None else valid_alpha("lora_adapter_metadata: lora_alpha", said)

    def _of(self, component: str, name: str) -> Any:
        """By the metadata."""
        return self._said.get(f"{component}.{name}", self._said.get(name))

    def _format(self) -> str:
        if "ai-toolkit" in (self._file.metadata() or {}).get("software", ""):
            return "ai-toolkit"
        stems = [pair.stem for pair in self._pairs]
        writers = {names.writer(stem) for stem in stems if not names.is_of_text_encoder(stem)}
        return ", ".join(sorted(writers or {names.writer(stems[0])}))


def _sizes(down: Sequence[int], up: Sequence[int]) -> str:
    return f"{list(down)} and {list(up)}"
