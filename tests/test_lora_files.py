"""LoRA files: what the programs in the field write is read as what it is, and all else is refused with its own error.

Known trouble elsewhere: LoRAs that are not applied, in silence (huggingface/diffusers#9291, #10599, #10512;
comfyanonymous/ComfyUI#5359).
"""

from pathlib import Path

import pytest
import torch

from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.lora.architecture import described
from serve_app.engine.lora.check import check
from serve_app.engine.lora.read import Sizes, look, read
from serve_app.errors import LoraRefused
from serve_app.models import Variant

from . import lora_files
from .lora_files import WRITERS, Family, Writer

FULL = {"modulation": True, "convs": True, "text_encoders": True}


@pytest.fixture(scope="module")
def sizes(tiny_sdxl: TinyWeights, tiny_dev: TinyWeights) -> dict[Family, Sizes]:
    return {
        "sdxl": described("sdxl", tiny_sdxl.folder / "sdxl-base"),
        "flux": described("flux", tiny_dev.folder / "flux-dev-base"),
    }


@pytest.fixture
def models(tiny_sdxl: TinyWeights, tiny_dev: TinyWeights) -> list[Variant]:
    return [
        Variant(family="sdxl", file="none", base=str(tiny_sdxl.folder / "sdxl-base")),
        Variant(family="flux", file="none", base=str(tiny_dev.folder / "flux-dev-base")),
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


# --- What is written in the field ---


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize(("family", "writer"), [(family, writer) for family in WRITERS for writer in WRITERS[family]])
def test_each_writers_file_is_read_as_the_layers_that_it_was_written_from(
    family: Family, writer: Writer, alpha: float | None, sizes: dict[Family, Sizes], file: Path
) -> None:
    made = lora_files.layers(family, **FULL)
    file.write_bytes(lora_files.file(made, writer, alpha=alpha))
    adapter = read(file, family, sizes[family], alpha=None, max_rank=4)
    # FLUX.1's prompts are encoded without LoRAs.
    wanted = {name: pair for name, pair in made.items() if family == "sdxl" or not name.startswith("text_encoder")}
    assert set(adapter.layers) == {_named(name, sizes[family]) for name in wanted}
    says_alpha = alpha is not None and writer != "old-diffusers"
    for name, (down, up) in wanted.items():
        layer = adapter.layers[_named(name, sizes[family])]
        assert torch.equal(layer.down, down.half())
        assert torch.equal(layer.up, up.half())
        assert layer.scale == (0.5 if says_alpha else 1.0)
    facts = adapter.facts
    assert facts == look(file, family, sizes[family], alpha=None, max_rank=4)
    assert (facts.family, facts.dtype, facts.rank, facts.layers) == (family, "F16", 4, len(made))
    assert facts.format == {"simpletuner": "diffusers", "old-diffusers": "diffusers"}.get(writer, writer)
    assert facts.text_encoder_layers == (6 if family == "sdxl" else 3)
    assert facts.has_alpha == says_alpha
    assert facts.alpha_scale == ((0.5, 0.5) if says_alpha else (1.0, 1.0))


def _named(name: str, sizes: Sizes) -> str:
    """Newer versions of transformers leave a part out."""
    return name if name in sizes else name.replace(".text_model.", ".")


# --- What is refused ---


_BAD = lora_files.bad()


@pytest.mark.parametrize("name", _BAD)
def test_a_bad_file_is_refused_by_what_is_wrong_with_it(name: str, models: list[Variant], file: Path) -> None:
    content, code = _BAD[name]
    file.write_bytes(content)
    with pytest.raises(LoraRefused) as refused:
        check(file, models, alpha=None, max_rank=256, cache=file.parent)
    assert refused.value.code == code
