import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.flux import q5_k
from serve_app.engine.flux.q5_k import Floats


def unpack(packed: q5_k.Bytes) -> Floats:
    return np.asarray(quants.dequantize(packed, GGMLQuantizationType.Q5_K), np.float32)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    blocks=st.integers(1, 3),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
)
@settings(max_examples=50)
def test_what_gguf_unpacks_is_near(seed: int, rows: int, blocks: int, scale: float, shift: float) -> None:
    weights = np.random.default_rng(seed).normal(shift, 1, (rows, 256 * blocks)).astype(np.float32) * np.float32(scale)
    packed = q5_k.pack(weights)
    assert packed.shape == (rows, 176 * blocks)
    # Half a step of 31, a scale and a minimum that are rounded to one in 63 of the block's largest.
    by_block = weights.reshape(-1, 256)
    span = np.maximum(by_block.max(-1), 0) - np.minimum(by_block.min(-1), 0)
    error = np.abs(unpack(packed) - weights).reshape(-1, 256).max(-1)
    assert (error <= 0.035 * span).all()


def test_it_is_nearer_than_four_bits() -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, (64, 1024)).astype(np.float32)
    four_bits = quants.dequantize(quants.quantize(weights, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
    rms = np.sqrt(np.square(unpack(q5_k.pack(weights)) - weights).mean())
    assert rms < 0.6 * np.sqrt(np.square(four_bits - weights).mean())


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_a_constant_block(value: float) -> None:
    weights = np.full((1, 256), value, np.float32)
    np.testing.assert_allclose(unpack(q5_k.pack(weights)), weights, rtol=2e-3)


def test_rows_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 256 weights, not 300"):
        q5_k.pack(np.zeros((2, 300), np.float32))
