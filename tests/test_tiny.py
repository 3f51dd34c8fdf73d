import threading
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from serve_app.engine.flux import gguf_file
from serve_app.engine.flux import tiny as tiny_module
from serve_app.engine.flux.tiny import TinyWeights, ensure
from serve_app.engine.sdxl import tiny as sdxl_tiny


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_several_at_once_write_the_same_bytes_and_leave_nothing_else(tiny: TinyWeights, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    folder = tmp_path / "deep" / "again"
    threads = [threading.Thread(target=ensure, args=(folder,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(folder) == contents(tiny.folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["again", "again.lock"]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_write_that_fails_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(in_channels: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tiny_module, "_transformer", fail)
    with pytest.raises(OSError, match="disk full"):
        ensure(tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.lock"]


def test_what_is_there_is_not_written_again(tiny: TinyWeights) -> None:
    written = tiny.base.stat().st_mtime_ns
    assert ensure(tiny.folder).base.stat().st_mtime_ns == written


@pytest.mark.parametrize(("quant", "packing"), [("Q4_0", "Q4_0"), ("Q5_K_S", "Q5_K"), ("Q8_0", "Q8_0")])
def test_matrices_are_packed_and_vectors_are_not(tiny: TinyWeights, quant: str, packing: str) -> None:
    tensors = {t.name: t.packing for t in gguf_file.check(tiny.transformer(f"flux1-fill-dev-{quant}.gguf"))}
    assert tensors["transformer_blocks.0.attn.to_q.weight"] == packing
    assert tensors["transformer_blocks.0.attn.to_q.bias"] == "F32"
    assert list(tensors.values()).count(packing) > len(tensors) / 3


def test_the_tiny_sdxl_is_read_back_as_it_was_written(tiny_sdxl: TinyWeights, tmp_path: Path) -> None:
    base = tiny_sdxl.folder / "sdxl-base"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tiny_module.SEED)
        written = sdxl_tiny._pipeline(tmp_path)
    read = StableDiffusionXLPipeline.from_single_file(
        str(tiny_sdxl.folder / "sdxl.safetensors"), config=str(base), local_files_only=True, dtype=torch.float32
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (written, read))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    again = ensure(tmp_path / "again", sdxl_tiny.write)
    assert contents(again.folder) == contents(tiny_sdxl.folder)
    assert sum(map(len, contents(again.folder).values())) < 10_000_000


def test_it_is_small(tiny: TinyWeights) -> None:
    assert sum(map(len, contents(tiny.folder).values())) < 40_000_000
