import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

from serve_app.engine import gguf_file
from serve_app.engine.quant import PACKINGS, compute_dtype
from serve_app.engine.tiny import TinyWeights
from serve_app.errors import CorruptWeights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small sound file with metadata of every shape."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_string("name", "small")
    writer.add_array("sizes", [1, 2, 3])
    writer.add_array("words", ["a", "b"])
    writer.add_float32("ratio", 0.5)
    writer.add_tensor("vector", np.arange(8, dtype=np.float32))
    matrix = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("matrix", matrix, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_finds_what_the_gguf_package_finds(tiny: TinyWeights) -> None:
    path = tiny.transformer("flux1-fill-dev-Q5_K_S.gguf")
    found = [(t.name, t.packing, t.offset, t.size) for t in gguf_file.check(path)]
    theirs = gguf.GGUFReader(path).tensors
    assert found == [(t.name, t.tensor_type.name, t.data_offset, t.n_bytes) for t in theirs]


def test_every_shorter_file_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    last = max(tensor.offset + tensor.size for tensor in gguf_file.check(file))
    short = tmp_path / "short.gguf"
    for length in range(last):
        short.write_bytes(whole[:length])
        with pytest.raises(CorruptWeights, match=r"short\.gguf is no sound GGUF file"):
            gguf_file.check(short)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "starts with b'<!DO'"),
        (b"", "starts with b''"),
        (b"GGUF" + struct.pack("<I", 99), "its version is 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "holds no tensor"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "wants 8 more bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60), "wants 8 more bytes"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 1, 1, b"k", 9, 4, 2**60), "more bytes"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 1, 1, b"k", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "tensor t has 9 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 256, 16, 0), "has type 16"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 100, 13, 0), "no multiple of 256"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 1, 0, 1, b"\xff"), "utf-8"),
        (b"GGUF" + struct.pack("<IQQQ17sII", 3, 1, 1, 17, b"general.alignment", 4, 3), "alignment is 3"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CorruptWeights, match=reason) as caught:
        gguf_file.check(path)
    assert caught.value.details["file"] == str(path)


def test_packings_are_those_of_gguf_and_all_that_diffusers_unpacks() -> None:
    for number, packing in PACKINGS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (packing.name, packing.block, packing.block_bytes) == (kind.name, *gguf.GGML_QUANT_SIZES[kind])
    whole = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
    assert set(PACKINGS) == {int(kind) for kind in whole | set(SUPPORTED_GGUF_QUANT_TYPES)}


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(None, "float32"), ((7, 5), "float32"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_compute_dtype(capability: tuple[int, int] | None, dtype: str) -> None:
    assert compute_dtype(capability) == dtype
