"""What the engine's tests share: tiny checkpoints written once a run, and small requests."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from serve_app.engine import Window
from serve_app.engine.flux.tiny import TinyWeights, ensure, write_dev
from serve_app.engine.weights.fetch import Weights
from serve_app.models import BUILT_IN, Box, EditRequest, Pixels
from serve_app.settings import Optimizations, VariantSettings

# torch takes seconds to import, and tests that need none of it load this module too.
if TYPE_CHECKING:
    from serve_app.engine.flux.fill import FluxFill

#: Side of the windows most tests paint, in pixels: small, to be quick.
SIDE = 128


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyWeights:
    return ensure(of_the_run(tmp_path_factory) / "tiny")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> TinyWeights:
    from serve_app.engine.sdxl import tiny

    return ensure(of_the_run(tmp_path_factory) / "tiny-sdxl", tiny.write)


@pytest.fixture(scope="session")
def tiny_dev(tmp_path_factory: pytest.TempPathFactory) -> TinyWeights:
    return ensure(of_the_run(tmp_path_factory) / "tiny-dev", write_dev)


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory: pytest.TempPathFactory) -> TinyWeights:
    from serve_app.engine.flux2 import tiny

    return ensure(of_the_run(tmp_path_factory) / "tiny-klein", tiny.write)


def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the run's processes share, where there are several."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def shallow(tiny: TinyWeights, tmp_path_factory: pytest.TempPathFactory) -> TinyWeights:
    """The Q8_0's first block of each kind and nothing else: less to compile."""
    import gguf

    shallow, kept = (
        TinyWeights(tmp_path_factory.mktemp("shallow")),
        ("transformer_blocks.0.", "single_transformer_blocks.0."),
    )
    shutil.copytree(tiny.base, shallow.base)
    config = shallow.base / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 1, "num_single_layers": 1}))
    file = "flux1-fill-dev-Q8_0.gguf"
    writer = gguf.GGUFWriter(shallow.transformer(file), "flux")
    for tensor in gguf.GGUFReader(tiny.transformer(file)).tensors:
        if "transformer_blocks." not in tensor.name or tensor.name.startswith(kept):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return shallow


@pytest.fixture(scope="session")
def embeddings() -> bytes:
    """Some prompt's, in the tiny model's width."""
    import safetensors.torch
    import torch

    generator = torch.Generator().manual_seed(7)
    tensors = {
        "prompt_embeds": torch.randn(1, 16, 256, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 256, generator=generator),
    }
    return safetensors.torch.save(tensors)


def flux_fill(tiny: TinyWeights, quant: str = "Q4_0", *, dtype: Any = None, **optimizations: Any) -> "FluxFill":
    """The variant `tiny-{quant}`, not loaded yet."""
    from serve_app.engine.flux.fill import FluxFill

    weights = Weights(tiny.transformer(f"flux1-fill-dev-{quant.partition('-')[0]}.gguf"), tiny.base)
    exact = {name: optimizations.pop(name) for name in ("adaln_once", "one_encode") if name in optimizations}
    return FluxFill(
        BUILT_IN[f"tiny-{quant}"],
        weights,
        VariantSettings(optimizations=Optimizations(**optimizations)),
        dtype=dtype,
        **exact,
    )


@pytest.fixture(scope="session")
def engine(tiny: TinyWeights) -> "Iterator[FluxFill]":
    """A loaded Q4_0, shared by tests that leave it as it is."""
    engine = flux_fill(tiny)
    engine.load()
    yield engine
    engine.close()


def photo(height: int = SIDE, width: int = SIDE) -> Pixels:
    """A picture with something in it."""
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return ramp.astype(np.uint8)


def square_mask(height: int = SIDE, width: int = SIDE) -> Pixels:
    """The middle quarter is painted."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = 255
    return mask


def window(height: int = SIDE, width: int = SIDE, **changes: Any) -> Window:
    """Two steps; nobody follows them."""
    given = {
        "pixels": photo(height, width),
        "mask": square_mask(height, width),
        "steps": 2,
        "guidance_scale": 30.0,
        "seed": 1,
        "embeddings": None,
        "on_step": lambda step: None,
        **changes,
    }
    return Window(**given)


def request(**changes: Any) -> EditRequest:
    """One window, two steps."""
    whole = Box(x0=0, y0=0, x1=SIDE, y1=SIDE)
    given = {
        "job_id": "job",
        "canvas": photo(),
        "mask": square_mask(),
        "windows": [whole],
        "steps": 2,
        "guidance_scale": 30.0,
        "seed": 1,
        **changes,
    }
    return EditRequest(**given)
