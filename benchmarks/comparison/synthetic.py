"""Files of random weights that the real loaders read: nothing is downloaded.

A matrix repeats its first 64 rows, so that full size is written in seconds: what a step costs depends on no weight's
value. Tokenizers, schedulers and the narrow VAE are those of the modules `tiny` of `serve_app.engine`.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter

from serve_app.engine.flux import tiny
from serve_app.engine.flux2 import tiny as tiny_klein
from serve_app.engine.weights.fetch import Weights

from . import models
from .models import Shape

#: Rows that are made; the rest repeats them.
_ROWS = 64
Array = npt.NDArray[Any]


def write(folder: Path, shape: Shape, packing: str) -> Weights:
    """The transformer as a GGUF file of `packing`, and everything else in bfloat16 in the hub's layout."""
    small = tiny.ensure(folder / "tiny").base
    base = folder / "base"
    parts = ("scheduler", "tokenizer", "tokenizer_2", *(("vae",) if shape.narrow_vae else ()))
    for part in parts:
        shutil.copytree(small / part, base / part)
    torch.manual_seed(0)
    if not shape.narrow_vae:
        models.vae(shape).to(torch.bfloat16).save_pretrained(base / "vae")
    _save(models.clip, shape, base / "text_encoder")
    _save(models.t5, shape, base / "text_encoder_2")
    file = folder / f"flux1-fill-dev-{packing}.gguf"
    _write_transformer(models.transformer, shape, file, base, packing)
    return Weights(file, base)


def write_klein(folder: Path, shape: Shape, packing: str) -> Weights:
    """As `write`, FLUX.2 klein: with a prompt's embeddings and without a text encoder."""
    small, base = tiny.ensure(folder / "tiny-klein", tiny_klein.write).folder / "klein-base", folder / "klein-base"
    shutil.copytree(small / "scheduler", base / "scheduler")
    shutil.copy(small / "model_index.json", base)
    torch.manual_seed(0)
    models.klein_vae(shape).to(torch.bfloat16).save_pretrained(base / "vae")
    file = folder / f"flux-2-klein-4b-{packing}.gguf"
    _write_transformer(models.klein_transformer, shape, file, base, packing)
    embeddings = torch.randn(1, models.T5_TOKENS, models.KLEIN_TEXT_WIDTH).to(torch.bfloat16)
    return Weights(file, base, safetensors.torch.save({"prompt_embeds": embeddings}))


def _write_transformer(make: Callable[[Shape], Any], shape: Shape, file: Path, base: Path, packing: str) -> None:
    with torch.device("meta"):
        transformer = make(shape)
    transformer.save_config(base / "transformer")
    _write_gguf(file, {name: weight.shape for name, weight in transformer.state_dict().items()}, packing)


def is_packed(name: str, shape: Sequence[int], packing: str) -> bool:
    """As in published files: embedders and vectors stay unquantised."""
    kind, _ = tiny.packers()[packing]
    block, _ = GGML_QUANT_SIZES[kind]
    return len(shape) == 2 and shape[1] % block == 0 and "embed" not in name


def _save(make: Callable[[Shape], Any], shape: Shape, folder: Path) -> None:
    """Made in bfloat16 at once: T5-XXL takes 19 GB in float32, and minutes to draw all its weights."""
    with torch.device("meta"):
        model = make(shape).to(torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    for name, parameter in model.named_parameters():
        _fill(parameter.detach(), is_bias=name.endswith("bias"))
    model.save_pretrained(folder)


def _fill(parameter: torch.Tensor, *, is_bias: bool) -> None:
    if parameter.ndim == 1:
        parameter.fill_(0.0 if is_bias else 1.0)
        return
    count, columns = parameter.shape
    whole = count // _ROWS * _ROWS
    parameter[:whole].view(-1, _ROWS, columns).copy_(_drawn(columns))
    parameter[whole:].copy_(_drawn(columns)[: count - whole])


@cache
def _drawn(columns: int) -> torch.Tensor:
    return torch.normal(0.0, 0.02, (_ROWS, columns), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def _write_gguf(file: Path, shapes: Mapping[str, Sequence[int]], packing: str) -> None:
    """One tensor in memory at a time."""
    writer, first_rows = GGUFWriter(file, "flux"), cache(partial(_first_rows, packing))
    for name, shape in shapes.items():
        rows, kind = first_rows(tuple(shape), is_packed(name, shape, packing))
        size = (shape[0], *rows.shape[1:])
        writer.add_tensor_info(name, size, rows.dtype, math.prod(size) * rows.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        rows, _ = first_rows(tuple(shape), is_packed(name, shape, packing))
        writer.write_tensor_data(np.resize(rows, (shape[0], *rows.shape[1:])))
    writer.close()


def _first_rows(packing: str, shape: Sequence[int], packed: bool) -> tuple[Array, Any]:
    """What a tensor of this shape repeats, and its GGML type; None where the number type says it."""
    rng = np.random.default_rng(0)
    if len(shape) == 1:
        return rng.normal(1, 0.02, shape).astype(np.float32), None
    rows = rng.normal(0, 0.02, (min(shape[0], _ROWS), shape[1])).astype(np.float32)
    kind, pack = tiny.packers()[packing]
    return (pack(rows), kind) if packed else (rows.astype(np.float16), None)
