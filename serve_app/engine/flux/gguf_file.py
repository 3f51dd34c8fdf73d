"""Whether a file is a whole GGUF file that can be loaded, read strictly: no count in it is trusted.

Format: ggml's `docs/gguf.md`. The `gguf` package's reader loops over whatever counts a damaged header holds.
"""

import math
import struct
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from ...errors import CorruptWeights
from .quant import PACKINGS

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
#: Metadata value type -> bytes of a scalar; 8 is a string and 9 an array.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_MAX_DIMENSIONS = 4
#: Of tensor data, unless `general.alignment` says otherwise.
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    #: Name of its packing, e.g. `Q5_K`.
    packing: str
    #: In weights, rows last.
    shape: tuple[int, ...]
    #: Bytes from the start of the file.
    offset: int
    size: int


def check(path: Path) -> list[Tensor]:
    """The tensors of the GGUF file, each known to lie within it.

    Raises CorruptWeights, naming the file and what is wrong, where it is no GGUF file, was cut short, or holds a tensor
    of a type that cannot be unpacked.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).tensors()
    except (_Broken, UnicodeDecodeError) as e:
        raise CorruptWeights(f"{path} is not a valid GGUF file: {e}", file=str(path)) from e


class _Broken(Exception):
    pass


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._alignment = _ALIGNMENT

    def tensors(self) -> list[Tensor]:
        magic = self._file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise _Broken(f"it starts with {magic!r}, not {_MAGIC!r}")
        version = self._uint32()
        if version not in _VERSIONS:
            raise _Broken(f"its version is {version}; {_VERSIONS} can be read")
        tensor_count, metadata_count = self._uint64(), self._uint64()
        for _ in range(metadata_count):
            self._metadata()
        found = [self._tensor() for _ in range(tensor_count)]
        if not found:
            raise _Broken("it has no tensors")
        names = Counter(tensor.name for tensor in found)
        if len(names) < len(found):
            raise _Broken(f"several of its tensors are called {names.most_common(1)[0][0]}")
        start = -(-self._file.tell() // self._alignment) * self._alignment
        return [self._placed(tensor, start) for tensor in found]

    def _metadata(self) -> None:
        key, kind = self._string(), self._uint32()
        if key == "general.alignment" and kind == _UINT32:
            self._alignment = self._uint32()
            if self._alignment < 1 or self._alignment & (self._alignment - 1):
                raise _Broken(f"its alignment is {self._alignment}, which is not a power of two")
        else:
            self._skip_value(kind)

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            self._skip_array()
        else:
            self._skip(self._scalar_bytes(kind))

    def _skip_array(self) -> None:
        kind, count = self._uint32(), self._uint64()
        if kind != _STRING:
            self._skip(self._scalar_bytes(kind) * count)
            return
        for _ in range(count):
            self._string()

    def _scalar_bytes(self, kind: int) -> int:
        if kind not in _SCALARS:
            raise _Broken(f"its metadata has a value of unknown type {kind}")
        return _SCALARS[kind]

    def _tensor(self) -> Tensor:
        """A tensor whose offset still counts from the start of the data."""
        name, dimensions = self._string(), self._uint32()
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _Broken(f"tensor {name} has {dimensions} dimensions")
        shape = [self._uint64() for _ in range(dimensions)]
        if 0 in shape:
            raise _Broken(f"tensor {name} is empty")
        kind, offset = self._uint32(), self._uint64()
        packing = PACKINGS.get(kind)
        if packing is None:
            raise _Broken(f"tensor {name} has type {kind}, which cannot be unpacked")
        if shape[0] % packing.block:
            raise _Broken(
                f"tensor {name} has rows of {shape[0]}, not a multiple of {packing.block} as {packing.name} needs"
            )
        size = math.prod(shape) // packing.block * packing.block_bytes
        # GGUF names the innermost dimension first.
        return Tensor(name, packing.name, tuple(reversed(shape)), offset, size)

    def _placed(self, tensor: Tensor, start: int) -> Tensor:
        end = start + tensor.offset + tensor.size
        if end > self._size:
            raise _Broken(f"tensor {tensor.name} ends at byte {end}, but the file at {self._size}")
        return replace(tensor, offset=start + tensor.offset)

    def _string(self) -> str:
        return self._read(self._uint64()).decode()

    def _uint32(self) -> int:
        (value,) = struct.unpack("<I", self._read(4))
        return int(value)

    def _uint64(self) -> int:
        (value,) = struct.unpack("<Q", self._read(8))
        return int(value)

    def _read(self, count: int) -> bytes:
        self._require(count)
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        self._require(count)
        self._file.seek(count, 1)

    def _require(self, count: int) -> None:
        left = self._size - self._file.tell()
        if count > left:
            raise _Broken(f"its header wants {count} more bytes where {left} are left")
