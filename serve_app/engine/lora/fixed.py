"""LoRAs that a variant always paints with.

Weights that are dense get them added, as PEFT's merge does. Packed ones stay as they are and have hooks: packed again
to four or five bits, a weight with a small LoRA added mostly falls back to what it was.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFLinear
from torch import nn

from ...errors import LoraRefused, LoraTooLarge, UnsupportedFormat, VariantLoadFailed
from ...models import Family, VariantLora
from ...settings import LoraSettings
from ..cold_start import timed
from ..device import Device
from . import hooks
from .adapter import Adapter
from .read import Sizes, read

#: Those that clients' LoRAs have by default.
_LIMITS = LoraSettings()


class FixedLoras:
    def __init__(self, loras: Sequence[VariantLora], files: Sequence[Path], family: Family, sizes: Sizes) -> None:
        """For a FLUX with layers of these sizes, as `names` has its `family`. Raises VariantLoadFailed, naming the LoRA
        and what is wrong."""
        self._loras = [(lora, _read(lora, file, family, sizes)) for lora, file in zip(loras, files, strict=True)]
        self._merged: set[str] = set()

    @torch.no_grad()
    def merge(self, name: str, layer: Any) -> None:
        """Add to a dense weight what the LoRAs have for the layer of this name; on a CPU, to the bit as PEFT does."""
        for lora, adapter in self._loras:
            if (change := adapter.layers.get(name)) is not None:
                weight = layer.weight
                with timed("loras"):
                    up, down = (half.to(weight.device, weight.dtype).float() for half in (change.up, change.down))
                    weight += (up @ down * (lora.scale * change.scale)).to(weight.dtype)
        self._merged.add(name)

    def applied(
        self, layer_of: Callable[[str], nn.Module], device: Device, *, merges: bool
    ) -> AbstractContextManager[None]:
        """Merge what is not yet into the layers that are dense, where `merges`; the other layers have hooks inside the
        context."""
        for name in sorted({name for _, adapter in self._loras for name in adapter.layers} - self._merged):
            if merges and not isinstance(layer := layer_of(name), GGUFLinear):
                self.merge(name, layer)
        unmerged = []
        for lora, adapter in self._loras:
            layers = {name: change for name, change in adapter.layers.items() if name not in self._merged}
            unmerged.append((lora, Adapter(layers, adapter.facts)))
        return hooks.applied(layer_of, unmerged, device)


def _read(lora: VariantLora, file: Path, family: Family, sizes: Sizes) -> Adapter:
    try:
        if (size := file.stat().st_size) > _LIMITS.file_bytes:
            raise LoraTooLarge(f"the file has {size} bytes, more than {_LIMITS.file_bytes}")
        with timed("loras", size):
            adapter = read(file, family, sizes, alpha=None, max_rank=_LIMITS.max_rank)
        if count := adapter.facts.text_encoder_layers:
            raise UnsupportedFormat(f"{count} of its layers are of text encoders, and would be lost")
    except LoraRefused as e:
        raise VariantLoadFailed(f"the LoRA {lora.name}: {e.message}", lora=lora.name, reason=e.code) from e
    return adapter
