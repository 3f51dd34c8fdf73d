import math
import shutil
import struct
from collections.abc import Mapping
from io import FileIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, dequantize_gguf_tensor
from torch.profiler import ProfilerActivity, profile

from serve_app.engine.device import Device
from serve_app.engine.flux import gguf_file, gguf_tensors, pipeline
from serve_app.engine.flux.fill import FluxFill
from serve_app.engine.flux.quant import PACKINGS, compute_dtype
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.weights.fetch import Weights
from serve_app.errors import CorruptWeights
from serve_app.models import BUILT_IN
from serve_app.settings import VariantSettings

from .engine_fixtures import window


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
    writer.add_tensor("halves", np.arange(6, dtype=np.float16).reshape(2, 3))
    brain = gguf.quants.quantize(np.ones((3, 5), np.float32), gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("brain", brain, raw_dtype=gguf.GGMLQuantizationType.BF16)
    packed_vector = gguf.quants.quantize(np.arange(64, dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed_vector", packed_vector, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_finds_what_the_gguf_package_finds(tiny: TinyWeights) -> None:
    path = tiny.transformer("flux1-fill-dev-Q5_K_S.gguf")
    found = [(t.name, t.packing, t.shape[::-1], t.offset, t.size) for t in gguf_file.check(path)]
    theirs = gguf.GGUFReader(path).tensors
    assert found == [(t.name, t.tensor_type.name, tuple(t.shape), t.data_offset, t.n_bytes) for t in theirs]


def test_every_shorter_file_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    last = max(tensor.offset + tensor.size for tensor in gguf_file.check(file))
    short = tmp_path / "short.gguf"
    for length in range(last):
        short.write_bytes(whole[:length])
        with pytest.raises(CorruptWeights, match=r"short\.gguf is not a valid GGUF file"):
            gguf_file.check(short)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "starts with b'<!DO'"),
        (b"", "starts with b''"),
        (b"GGUF" + struct.pack("<I", 99), "its version is 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "has no tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "wants 8 more bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60), "wants 8 more bytes"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 1, 1, b"k", 9, 4, 2**60), "more bytes"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 1, 1, b"k", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "tensor t has 9 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 0, 1, b"t", 0, 0, 0), "tensor t has 0 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 0, 0, 0), "tensor t is empty"),
        (b"GGUF" + struct.pack("<IQQ" + "Q1sIQIQ" * 2, 3, 2, 0, *(1, b"t", 1, 8, 0, 0) * 2), "several .* called t"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 256, 16, 0), "has type 16"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 100, 13, 0), "not a multiple of 256"),
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


# -- its tensors


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Names, types, packings, shapes and every byte."""
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        found = ours[name]
        assert type(found) is type(expected), name
        assert getattr(found, "quant_type", None) == getattr(expected, "quant_type", None), name
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(found.data.view(torch.uint8), expected.data.view(torch.uint8)), name


def test_tensors_are_those_that_diffusers_reads(file: Path) -> None:
    """But for those that torch knows itself and for vectors, which arrive unpacked."""
    theirs = load_gguf_checkpoint(str(file))
    plain = {name: dequantize_gguf_tensor(theirs[name]) for name in ("vector", "halves", "brain", "packed_vector")}
    for dtype in (torch.float32, torch.bfloat16):
        ours = gguf_tensors.read(file, torch.device("cpu"), dtype)
        assert_same(ours, {**theirs, **{name: tensor.to(dtype) for name, tensor in plain.items()}})


@pytest.mark.parametrize("quant", ["Q4_0", "Q5_K_S", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_is_the_one_that_diffusers_loads(tiny: TinyWeights, quant: str, dtype: torch.dtype) -> None:
    weights = Weights(tiny.transformer(f"flux1-fill-dev-{quant}.gguf"), tiny.base)
    ours = pipeline.build(weights, Device(wants_gpu=False, dtype=dtype)).transformer
    theirs = FluxTransformer2DModel.from_single_file(
        str(weights.transformer),
        config=str(tiny.base),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        local_files_only=True,
    )
    assert_same(ours.state_dict(keep_vars=True), theirs.state_dict(keep_vars=True))


def rewritten(source: Path, path: Path, kind: Any, *, matrices: bool, unpacked: bool) -> Path:
    """The file with its vectors, or all of its tensors, rounded to `kind`, and stored as that or `unpacked`."""
    writer = gguf.GGUFWriter(path, "flux")
    for tensor in gguf.GGUFReader(source).tensors:
        if matrices or len(tensor.shape) == 1:
            rounded = gguf.quants.quantize(gguf.quants.dequantize(tensor.data, tensor.tensor_type), kind)
            if unpacked:
                writer.add_tensor(tensor.name, gguf.quants.dequantize(rounded, kind))
            else:
                writer.add_tensor(tensor.name, rounded, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "matrices", "most"),
    [("F16", False, 0), ("BF16", False, 0), ("Q8_0", False, 1), ("BF16", True, 0)],
    ids=["F16 vectors", "BF16 vectors", "Q8_0 vectors", "everything in BF16"],
)
def test_a_file_paints_however_its_vectors_are_stored(
    tiny: TinyWeights, embeddings: bytes, tmp_path: Path, kind: str, matrices: bool, most: int
) -> None:
    """The same bits as with the same numbers in float32; diffusers unpacks Q8_0 in float16, which may cost a level."""
    source, given = tiny.transformer("flux1-fill-dev-Q8_0.gguf"), window(64, 64, embeddings=embeddings, steps=1)
    painted = []
    for unpacked in (True, False):
        path = tmp_path / f"{unpacked}.gguf"
        rewritten(source, path, gguf.GGMLQuantizationType[kind], matrices=matrices, unpacked=unpacked)
        engine = FluxFill(BUILT_IN["tiny-Q8_0"], Weights(path, tiny.base), VariantSettings())
        engine.load()
        painted.append(engine.paint(given))
    plain, stored = (picture.astype(int) for picture in painted)
    assert np.abs(plain - stored).max() <= most


def peak_bytes(recorded: profile) -> int:
    """The most that torch held at once in host memory."""
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    return max(accumulate(int(event.nbytes()) for event in results.events() if event.name() == "[memory]"))


def test_host_memory_holds_the_file_once(tiny: TinyWeights) -> None:
    weights = Weights(tiny.transformer("flux1-fill-dev-Q8_0.gguf"), tiny.base)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        pipeline.transformer(weights, Device(wants_gpu=False, dtype=torch.bfloat16))
    # An empty layer is made in float32, one at a time.
    layer = max(math.prod(tensor.shape) * 4 for tensor in gguf_file.check(weights.transformer))
    assert peak_bytes(recorded) <= weights.transformer.stat().st_size + layer


def test_host_memory_holds_one_tensor_where_another_device_takes_them(tiny: TinyWeights) -> None:
    """The meta device stands for a GPU: what it takes is gone from here."""
    path = tiny.transformer("flux1-fill-dev-Q8_0.gguf")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tensors = gguf_tensors.read(path, torch.device("meta"), torch.bfloat16)
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert peak_bytes(recorded) == max(tensor.size for tensor in gguf_file.check(path))


def test_a_file_is_read_once_from_front_to_back(tiny: TinyWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors share a read; a large one takes two at most."""
    reads: list[tuple[int, int]] = []

    class Watched(FileIO):
        def readinto(self, buffer: Any, /) -> int | None:
            reads.append((self.tell(), count := super().readinto(buffer) or 0))
            return count

    monkeypatch.setattr(gguf_tensors, "FileIO", Watched)
    monkeypatch.setattr(gguf_tensors, "_CHUNK_BYTES", 2**16)
    path = tiny.transformer("flux1-fill-dev-Q8_0.gguf")
    gguf_tensors.read(path, torch.device("cpu"), torch.float32)
    size = path.stat().st_size
    assert all(start + count <= later for (start, count), (later, _) in pairwise(reads))
    assert sum(count for _, count in reads) <= size
    large = sum(tensor.size > 2**16 for tensor in gguf_file.check(path))
    assert len(reads) <= size / 2**16 + 2 * large


def test_a_file_that_shrinks_while_it_is_read_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gguf_file.check(file)
    monkeypatch.setattr(gguf_file, "check", lambda path: found)
    file.write_bytes(file.read_bytes()[: found[-1].offset + 1])
    with pytest.raises(CorruptWeights, match=r"small\.gguf became shorter"):
        gguf_tensors.read(file, torch.device("cpu"), torch.float32)


def test_painting_loads_no_text_encoder(tiny: TinyWeights, tmp_path: Path) -> None:
    """None is in the base that it loads from."""
    shutil.copytree(tiny.base, tmp_path / "base", ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    weights = Weights(tiny.transformer("flux1-fill-dev-Q4_0.gguf"), tmp_path / "base")
    built = pipeline.build(weights, Device(wants_gpu=False))
    held = {name for name, part in built.components.items() if part is not None}
    assert held == {"transformer", "vae", "scheduler"}
