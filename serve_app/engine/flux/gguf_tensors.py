"""A GGUF file's tensors as diffusers takes them, read from front to back.

diffusers' own loader maps the file into memory and copies each tensor out of the map into fresh memory: twice as many
page faults, and on a network disk small reads.
"""

from io import BufferedReader, FileIO
from pathlib import Path

import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from gguf import GGMLQuantizationType

from ...errors import CorruptWeights
from ..cold_start import timed
from . import gguf_file

#: A larger tensor is one read; smaller ones share reads of this size.
_CHUNK_BYTES = 16 * 2**20
#: Packings that torch knows itself.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Dimensions of a linear layer's weight, the only tensor that diffusers unpacks as it computes.
_MATRIX = 2


def read(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor by name, on `device`: packed matrices as GGUFParameter, `[rows, bytes]`; all others as `dtype`.

    Host memory: what the tensors take on a CPU; for another device the largest one's, pinned where that is a GPU.
    Raises CorruptWeights, naming the file and what is wrong in it.
    """
    tensors = sorted(gguf_file.check(path), key=lambda tensor: tensor.offset)
    landing = None
    if device.type != "cpu":
        # Tensors pass through it one by one: reading into memory that is there already is what is fast.
        largest = max(tensor.size for tensor in tensors)
        landing = torch.empty(largest, dtype=torch.uint8, pin_memory=device.type == "cuda")
    with timed("read", sum(t.size for t in tensors)), BufferedReader(FileIO(path), _CHUNK_BYTES) as file:
        found = {}
        for tensor in tensors:
            memory = torch.empty(tensor.size, dtype=torch.uint8) if landing is None else landing[: tensor.size]
            _fill(memory, file, tensor)
            found[tensor.name] = _wrapped(tensor, memory.to(device), dtype)
        return found


def _fill(memory: torch.Tensor, file: "BufferedReader[FileIO]", tensor: gguf_file.Tensor) -> None:
    file.seek(tensor.offset)
    # It reads until `memory` is full, and what is larger than its buffer right into it.
    if file.readinto(memory.numpy().data) < tensor.size:
        raise CorruptWeights(f"{file.raw.name} became shorter while it was read", file=str(file.raw.name))


def _wrapped(tensor: gguf_file.Tensor, memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.packing in _PLAIN:
        return memory.view(_PLAIN[tensor.packing]).reshape(tensor.shape).to(dtype)
    rows = memory.reshape(*tensor.shape[:-1], -1)
    packed: torch.Tensor = GGUFParameter(rows, quant_type=GGMLQuantizationType[tensor.packing])
    if len(tensor.shape) != _MATRIX:
        return torch.as_tensor(dequantize_gguf_tensor(packed).to(dtype))
    return packed
