"""int8 and fp8 weights on a CPU, where the numbers are a GPU's but for the order of sums. Speed is for benchmarks."""

from collections.abc import Iterator
from typing import Any

import gguf
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torchao.quantization import quant_api

from serve_app.engine.flux.repack import _overflows, layers, repack, repacked
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.errors import VariantLoadFailed
from serve_app.models import Repacking

from .engine_fixtures import flux_fill, window

#: Root mean square of what rounding to fp8 (e4m3) leaves, at most: numbers of 3 bits behind the leading one lie 2^-3 of
#: the power of two below them apart, so each is at most 2^-4 away, uniformly.
FP8_ERROR = 2**-4 / 3**0.5


@pytest.fixture
def transformer(tiny: TinyWeights) -> Iterator[Any]:
    """The tiny Q8_0's, with all its linear layers."""
    engine = flux_fill(tiny, "Q8_0", adaln_once=False)
    engine.load()
    yield engine._pipeline.transformer
    engine.close()


@pytest.fixture(params=[8, 7], ids=["8 bits where int8 does not overflow", "7 bits where it does"])
def bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Those that w8a8 rounds to: 8 on a CPU with VNNI, and 7, which any CPU computes, without it."""
    number = int(request.param)
    if number == 8 and _overflows(torch.device("cpu")):
        pytest.skip("this CPU's sums of int8 products overflow at 8 bits")
    monkeypatch.setattr("serve_app.engine.flux.repack._overflows", lambda device: number == 7)
    return number


@pytest.fixture
def fp8_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao refuses fp8 on a CPU, although torch computes it there."""
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)


def gguf_linear(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> GGUFLinear:
    generator = torch.Generator().manual_seed(rows)
    layer = GGUFLinear(columns, rows, bias=True, compute_dtype=dtype)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    kind = gguf.GGMLQuantizationType.Q8_0
    layer.weight = GGUFParameter(torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind)), quant_type=kind)
    layer.bias = nn.Parameter(torch.randn(rows, generator=generator).to(dtype), requires_grad=False)
    return layer


def activations(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 48, columns, generator=torch.Generator().manual_seed(3)).to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


def rounding_error(rows: Tensor, bits: int) -> float:
    """Root mean square of what rounding to so many bits leaves, relative to the rows': a row's largest number is 127 or
    63 steps, and rounding is uniform within one."""
    steps = rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return float((steps.square() / 12).mean().sqrt() / rows.square().mean().sqrt())


def stored(tensor: Tensor) -> list[Tensor]:
    """What a tensor of torchao's consists of."""
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # of tensor subclasses only
    return [getattr(tensor, name) for name in names]


def stored_bytes(tensor: Tensor) -> int:
    return sum(part.untyped_storage().nbytes() for part in stored(tensor))


def test_every_linear_in_the_blocks_but_the_norms(transformer: Any) -> None:
    names, left_out = layers(transformer)
    assert len(names) == 2 * 12 + 4 * 5
    assert {name.rpartition(".")[0] for name in left_out if "transformer_blocks" in name} == {
        *(f"transformer_blocks.{block}.{norm}" for block in range(2) for norm in ("norm1", "norm1_context")),
        *(f"single_transformer_blocks.{block}.norm" for block in range(4)),
    }
    repack(transformer, "w8a8")
    whole = {name for name, module in transformer.named_modules() if type(module) is GGUFLinear}
    assert not whole & set(names)
    assert whole <= set(left_out)
    assert layers(transformer) == (names, left_out)


def test_a_weight_takes_one_byte(transformer: Any) -> None:
    repack(transformer, "w8a8")
    for name in layers(transformer)[0]:
        layer = transformer.get_submodule(name)
        numbers, *scales = stored(layer.weight)
        assert numbers.dtype == torch.int8
        # Of a row: the scale, float32, and a zero point of one byte that is not used.
        assert stored_bytes(layer.weight) == layer.in_features * layer.out_features + 5 * layer.out_features, name
        assert all(scale.shape == (layer.out_features, 1) for scale in scales)


def test_each_layer_computes_nearly_the_same(transformer: Any, bits: int) -> None:
    for name in layers(transformer)[0]:
        layer = transformer.get_submodule(name)
        inputs, weight = activations(layer.in_features), dequantize_gguf_tensor(layer.weight).float()
        with torch.inference_mode():
            plain = layer(inputs) - layer.bias
            found = repacked(layer, "w8a8")(inputs) - layer.bias
        # Both factors are rounded, independently: relative errors add as squares do.
        expected = (rounding_error(inputs, bits) ** 2 + rounding_error(weight, bits) ** 2) ** 0.5
        assert 0.5 * expected < relative(found, plain) < 1.1 * expected, name


def test_sums_of_the_largest_products_do_not_overflow() -> None:
    """With what this CPU is found to have."""
    layer = nn.Linear(256, 64, bias=False).requires_grad_(False)
    layer.weight.fill_(1)
    assert repacked(layer, "w8a8")(torch.ones(1, 256)).numpy() == pytest.approx(256, rel=0.03)


def test_the_variant_paints_nearly_the_same(tiny: TinyWeights, embeddings: bytes, bits: int) -> None:
    given, painted = window(64, 64, embeddings=embeddings), []
    for quant in ("Q8_0", "Q8_0-w8a8"):
        engine = flux_fill(tiny, quant)
        engine.load()
        painted.append(engine.paint(given).astype(int))
        engine.close()
    assert painted[1].shape == given.pixels.shape
    # Of 255. Another seed's picture differs by 40, Q5_K_S's by 0.7.
    assert 0 < abs(painted[1] - painted[0]).mean() < {8: 0.2, 7: 0.4}[bits]


def test_no_two_layers_are_unpacked_at_once(transformer: Any) -> None:
    largest = max(transformer.get_submodule(name).weight.numel() for name in layers(transformer)[0])
    cpu, tracker = torch.device("cpu"), MemTracker()
    with tracker:
        repack(transformer, "w8a8")
    peak, result = (tracker.get_tracker_snapshot(when)[cpu]["Total"] for when in ("peak", "current"))
    # The unpacked weight in float32, and two of its size while it is rounded.
    assert result < peak < result + 3.1 * 4 * largest
    everything = sum(transformer.get_submodule(name).weight.numel() for name in layers(transformer)[0])
    assert 4 * everything > 2 * peak


def test_unpacked_weights_are_repacked_too(bits: int) -> None:
    """A file may hold a tensor that no packing was used for."""
    layer = nn.Linear(256, 64, bias=False).requires_grad_(False)
    found = repacked(layer, "w8a8")
    assert stored(found.weight)[0].dtype == torch.int8
    assert found.bias is None
    assert relative(found(activations(256)), layer(activations(256))) < {8: 0.02, 7: 0.04}[bits]


def single_block(dtype: torch.dtype) -> nn.Module:
    """One of FLUX.1's full width with weights of variance 1 / width, in a module with its name in the transformer.

    A matrix repeats 64 rows, so that it is made quickly: each is rounded by itself.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        block = FluxSingleTransformerBlock(3072, 24, 128)
    block = block.to_empty(device="cpu").to(dtype).requires_grad_(False)
    for parameter in block.parameters():
        if parameter.ndim == 2:
            parameter.view(-1, 64, parameter.shape[1])[:] = torch.randn(64, parameter.shape[1]) * 3072**-0.5
        else:
            parameter.fill_(1)
    holder = nn.Module()
    holder.single_transformer_blocks = nn.ModuleList([block])
    return holder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_of_full_width_in_w8a8(dtype: torch.dtype, bits: int) -> None:
    """Measured: 0.019 and 0.020 at 8 bits, 0.037 and 0.038 at 7; three layers follow one on another."""
    assert 0 < error_of_a_block("w8a8", dtype) < {8: 0.03, 7: 0.05}[bits]


@pytest.mark.slow
@pytest.mark.usefixtures("fp8_anywhere")
def test_a_block_of_full_width_in_fp8() -> None:
    """Measured: 0.056."""
    assert 0 < error_of_a_block("fp8", torch.bfloat16) < 0.07


def error_of_a_block(kind: Repacking, dtype: torch.dtype) -> float:
    """Of what it adds to its input."""
    holder = single_block(dtype)
    generator = torch.Generator().manual_seed(1)
    image, text, row = (
        torch.randn(shape, generator=generator).to(dtype) for shape in [(1, 48, 3072), (1, 16, 3072), (1, 3072)]
    )
    rope = (torch.ones(64, 128), torch.zeros(64, 128))

    def added() -> Tensor:
        with torch.inference_mode():
            outputs = holder.get_submodule("single_transformer_blocks.0")(image, text, row, rope)
        return torch.cat([outputs[0] - text, outputs[1] - image], 1)

    plain = added()
    for name in layers(holder)[0]:
        holder.set_submodule(name, repacked(holder.get_submodule(name), kind))
    return relative(added(), plain)


@pytest.mark.usefixtures("fp8_anywhere")
def test_fp8_on_a_cpu() -> None:
    plain = gguf_linear(64, 256, torch.bfloat16)
    inputs = activations(256, torch.bfloat16)
    found = repacked(plain, "fp8")
    assert stored(found.weight)[0].dtype == torch.float8_e4m3fn
    assert stored_bytes(found.weight) == 64 * 256 + 4 * 64
    assert found(inputs).dtype == torch.bfloat16
    error = relative(found(inputs) - plain.bias, plain(inputs) - plain.bias)
    assert 0.5 * FP8_ERROR < error < 2**0.5 * FP8_ERROR


@pytest.mark.parametrize(("capability", "found"), [(None, "a CPU"), ((8, 6), "one of 8.6"), ((8, 0), "one of 8.0")])
def test_fp8_needs_a_gpu_that_multiplies_it(
    transformer: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, found: str
) -> None:
    monkeypatch.setattr("serve_app.engine.flux.repack._capability", lambda device: capability)
    with pytest.raises(VariantLoadFailed, match=f"8.9 or more, but this is {found}$"):
        repack(transformer, "fp8")
    assert isinstance(transformer.get_submodule(layers(transformer)[0][0]), GGUFLinear)


@pytest.mark.slow
@pytest.mark.xdist_group("compiling")
def test_it_compiles_without_a_graph_break(tiny: TinyWeights, embeddings: bytes) -> None:
    """With the modulation taken out: torch 2.13 breaks the graph at the class of a GGUF weight without Inductor."""
    # Graphs of the same blocks that other tests compiled count towards torch's limit.
    torch._dynamo.reset()
    engine = flux_fill(tiny, "Q8_0")
    engine.load()
    transformer = engine._pipeline.transformer
    repack(transformer, "w8a8")
    eager = engine.paint(window(64, 64, embeddings=embeddings, steps=1))
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert (engine.paint(window(64, 64, embeddings=embeddings, steps=1)) == eager).all()
    engine.close()
    torch._dynamo.reset()
