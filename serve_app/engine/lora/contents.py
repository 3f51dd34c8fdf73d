"""What a LoRA's file holds, by its header and its alphas: the pairs of tensors of its layers. Nothing of it is trusted,
and no model is known here."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...errors import LoraTooLarge, NotFinite, NotSafetensors, Truncated, UnsupportedFormat

#: What the format allows.
_FORMATS_HEADER_BYTES = 100_000_000
#: Trainers' headers have less than 1 MB. One takes twelve times its size in memory.
_HEADER_BYTES = 25_000_000
#: A LoRA of all layers of SDXL has 3300.
_MAX_TENSORS = 20_000
_MAX_KEY_CHARS = 300
_MAX_ALPHA = 100_000
_DTYPES = ("F16", "BF16", "F32")

#: How the keys of a pair end. The last is of old processors, whose names are in what stands before it.
KOHYA, PEFT, OLD = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".down.weight", ".up.weight"),
)
_ENDINGS = (
    KOHYA,
    PEFT,
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    OLD,
)
_ENDS = [(ending, end) for ending in _ENDINGS for end in ending]
_ALPHA = ".alpha"
#: What another key says, and what it is then.
_OTHERS = {
    "lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
    "lora_mid": "a Tucker decomposition", ".bias": "a bias", ".diff": "a difference of weights", "norm": "a norm",
}  # fmt: skip
#: Names of PEFT's configuration, where their value is neither false nor empty.
_UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "alpha_pattern")


@dataclass(slots=True)
class Pair:
    """The down and up of a layer, or of several that the writer has as one."""

    stem: str
    ending: tuple[str, str]
    #: Those that are there.
    keys: list[str] = field(default_factory=list)
    #: As a tensor of its own says.
    alpha: float | None = None
    #: Of down and up.
    shapes: tuple[list[int], ...] = ()
    dtypes: set[str] = field(default_factory=set)

    @property
    def rank(self) -> int:
        return self.shapes[0][0]

    @property
    def elements(self) -> int:
        """Of the larger of the two."""
        return max(map(math.prod, self.shapes))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """safetensors' own reader of the file. Raises NotSafetensors, Truncated, LoraTooLarge."""
    with path.open("rb") as content:
        start = content.read(9)
    length, size = int.from_bytes(start[:8], "little"), path.stat().st_size
    if start[8:] != b"{" or length > _FORMATS_HEADER_BYTES:
        raise NotSafetensors("the file is not in the safetensors format")
    if length > size - 8:
        raise Truncated(f"the file was cut short: its header has {length} bytes, and {size - 8} are there")
    if length > _HEADER_BYTES:
        raise LoraTooLarge(f"the file's header has {length} bytes, more than {_HEADER_BYTES}")
    try:
        file = safe_open(path, "pt")
    except SafetensorError as e:
        if "not fully covered" in str(e):
            raise Truncated(f"the file was cut short, or is longer than its header says: it has {size} bytes") from None
        raise NotSafetensors(f"the file is not valid safetensors: {shown(str(e))}") from None
    with file:
        yield file


def pairs_of(file: Any, max_rank: int) -> list[Pair]:
    """At least one. Raises UnsupportedFormat, LoraTooLarge, NotFinite (for an alpha)."""
    if len(keys := file.keys()) > _MAX_TENSORS:
        raise LoraTooLarge(f"the file holds {len(keys)} tensors, more than {_MAX_TENSORS}")
    pairs: dict[str, Pair] = {}
    alphas: dict[str, str] = {}
    for key in keys:
        ending, end = next((found for found in _ENDS if key.endswith(found[1])), (None, _ALPHA))
        dtype = file.get_slice(key).get_dtype()
        _check_key(key, end, dtype)
        stem = key.removesuffix(end)
        if ending is None:
            alphas[stem] = key
            continue
        pair = pairs.setdefault(stem, Pair(stem, ending))
        pair.keys.append(key)
        pair.dtypes.add(dtype)
        if pair.ending != ending:
            raise UnsupportedFormat(f"{shown(key)}: {shown(pair.keys[0])} is for the same layer")
    for stem, key in alphas.items():
        if stem not in pairs:
            raise UnsupportedFormat(f"{shown(key)}: the alpha of a layer that is not there")
        pairs[stem].alpha = _alpha(file, key)
    for pair in pairs.values():
        _measure(file, pair, max_rank)
    if not pairs:
        raise UnsupportedFormat("the file holds no tensors")
    return list(pairs.values())


def _check_key(key: str, end: str, dtype: str) -> None:
    if len(key) > _MAX_KEY_CHARS or not key.endswith(end):
        other = next((f", but {what}" for says, what in _OTHERS.items() if says in key), "")
        raise UnsupportedFormat(f"{shown(key)}: neither down, up nor alpha of a LoRA's layer{other}")
    if dtype not in _DTYPES:
        raise UnsupportedFormat(f"{shown(key)}: its numbers are {dtype}, and can be {', '.join(_DTYPES)}")


def _alpha(file: Any, key: str) -> float:
    if math.prod(file.get_slice(key).get_shape()) != 1:
        raise UnsupportedFormat(f"{shown(key)}: not one number")
    return valid_alpha(key, file.get_tensor(key).item())


def _measure(file: Any, pair: Pair, max_rank: int) -> None:
    """Sets its shapes, which fit each other."""
    key = shown(pair.keys[0])
    if len(pair.keys) != 2:
        raise UnsupportedFormat(f"{key}: the other of down and up is not there")
    down, up = pair.shapes = tuple(file.get_slice(pair.stem + end).get_shape() for end in pair.ending)
    if not (len(down) == len(up) in (2, 4) and down[0] == up[1] and all(down + up)):
        raise UnsupportedFormat(f"{key}: {down} and {up} are not the sizes of a layer's down and up")
    if pair.rank > max_rank:
        raise LoraTooLarge(f"{key}: its rank is {pair.rank}, more than {max_rank}")


def metadata_of(file: Any) -> Mapping[str, Any]:
    """What diffusers and SimpleTuner write of PEFT's configuration: names with their component's before them, without
    where one was saved alone. Raises UnsupportedFormat."""
    try:
        said = json.loads((file.metadata() or {}).get("lora_adapter_metadata") or "{}")
    except (ValueError, RecursionError):
        raise UnsupportedFormat("lora_adapter_metadata: not JSON") from None
    if not isinstance(said, dict):
        raise UnsupportedFormat("lora_adapter_metadata: not an object")
    for key, value in said.items():
        if value and key.rpartition(".")[2] in _UNSUPPORTED:
            raise UnsupportedFormat(f"lora_adapter_metadata: {shown(key)} is not supported")
    return said


def valid_alpha(key: str, value: Any) -> float:
    """Raises NotFinite; UnsupportedFormat for what is no number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UnsupportedFormat(f"{shown(key)}: not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise NotFinite(f"{shown(key)}: infinite or none")
    if not 0 < value <= _MAX_ALPHA:
        raise UnsupportedFormat(f"{shown(key)}: must be above 0, and at most {_MAX_ALPHA}")
    return float(value)


def shown(key: str) -> str:
    """For people, whatever characters it has."""
    return ascii(key[:200])[1:-1]
