"""Whether windows are cheaper painted together: a batch unpacks the weights once a step, whatever its size.

A step of a batch of B costs `overhead + B * arithmetic`, so the batch saves (B-1)/B of the overhead's share. Pure
functions; they know nothing of torch or of who waits.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..cost import forward_flops
from ..settings import Levers
from ..variants import Variant

#: A batch pays where it saves at least this share of the device's time: less is lost in how much paintings vary, and a
#: batch's first window is done later than it would be alone.
WORTH = 0.1


@dataclass(frozen=True, slots=True)
class Card:
    """What a GPU does at FLUX.1's shapes: bfloat16 arithmetic, and memory bandwidth."""

    tflop_per_s: float
    gb_per_s: float


#: By the word in the device's name. The L4's arithmetic is measured; the others' is 60% of their data sheets' dense
#: bfloat16 figure. Bandwidths are the data sheets'.
CARDS: Mapping[str, Card] = {
    "L4": Card(55, 300),
    "A100": Card(187, 1555),
    "H100": Card(593, 3350),
    "H200": Card(593, 4800),
}

#: Of FLUX.1's transformer: what every step unpacks, and the modulation's part, which `adaln_once` takes out.
_WEIGHTS, _MODULATION_WEIGHTS = 8.65e9, 3.25e9
#: Bytes read and written to unpack one weight, by the packing: in diffusers' eager kernels, measured; and compiled,
#: where the packed weight is read and its bfloat16 value written, once each.
_EAGER_BYTES: Mapping[str, float] = {"Q8_0": 7.1, "Q4_0": 14.6, "Q5_K": 23.4}
_COMPILED_BYTES: Mapping[str, float] = {"Q8_0": 34 / 32 + 2, "Q4_0": 18 / 32 + 2, "Q5_K": 176 / 256 + 2}


def is_known(device: str) -> bool:
    """Whether it can be said what pays on the device of this name. Where not, nothing is painted together."""
    return device.startswith("CPU") or _card(device) is not None


def sizes(width_px: int, height_px: int, variant: Variant, levers: Levers, device: str) -> tuple[int, ...]:
    """The batches of such windows that pay, in windows: powers of two up to `levers.max_batch`, in rising order. Few,
    because each is compiled by itself. On a CPU all do: measured with the tiny model, 2 save 11% and 4 save 19%."""
    powers = [2**n for n in range(1, levers.max_batch.bit_length())]
    if not is_known(device):
        return ()
    card = _card(device)
    if card is None:
        return tuple(powers)
    return tuple(batch for batch in powers if saved_share(width_px, height_px, batch, variant, levers, card) >= WORTH)


def saved_share(width_px: int, height_px: int, batch: int, variant: Variant, levers: Levers, card: Card) -> float:
    """The share of the device's time that a batch saves against its windows one by one, 0 to 1."""
    overhead_s = overhead_bytes(variant, levers) / (card.gb_per_s * 1e9)
    arithmetic_s = forward_flops(width_px, height_px) / (card.tflop_per_s * 1e12)
    return (batch - 1) / batch * overhead_s / (overhead_s + arithmetic_s)


def overhead_bytes(variant: Variant, levers: Levers) -> float:
    """What a step moves to unpack the weights. Reading unpacked ones is hidden behind the arithmetic on them."""
    if levers.unpack or variant.repack is not None:
        return 0.0
    weights = _WEIGHTS if levers.adaln_once else _WEIGHTS + _MODULATION_WEIGHTS
    bytes_by_packing = _COMPILED_BYTES if levers.compile else _EAGER_BYTES
    file = variant.file or ""
    return weights * next((moved for packing, moved in bytes_by_packing.items() if packing in file), 0.0)


def _card(device: str) -> Card | None:
    return next((CARDS[word] for word in re.split("[ -]", device) if word in CARDS), None)
