"""The engine on a GPU: what it paints there, what it says of the GPU, and what the GPU's failures are called.

Skipped without a GPU; continuous integration has none. `pytest tests/test_engine_cuda.py` runs them on a machine with
an NVIDIA GPU of compute capability 8.0 or higher that nothing else uses: two of them fill its memory.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from benchmarks.audit.forwards import Forward
from serve_app.engine.flux import compiled
from serve_app.engine.flux.fill import FluxFill
from serve_app.engine.flux.text_encoder import TextEncoder
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.painting import paint_canvas
from serve_app.engine.weights.fetch import Weights
from serve_app.errors import Canceled, OutOfMemory
from serve_app.models import BUILT_IN, Pixels, Repacking
from serve_app.settings import FirstBlockCache, Optimizations, StepCache, TaylorSeerCache, VariantSettings

from .engine_fixtures import flux_fill, request, window
from .test_lora_pictures import Painter, dev_of, full, sdxl_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.xdist_group("gpu"),
]

#: Window sides that compiled engines are warmed up for, in pixels.
SIZES = ((64, 64), (96, 64))
#: How far two pictures of the same noise may be apart, of 255, on average. Those of two seeds differ by 40.
NEAR = 1.0


@pytest.fixture(scope="module")
def prompt() -> bytes:
    """Embeddings as long as the tiny variants' prompts are."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "prompt_embeds": torch.randn(1, BUILT_IN["tiny-Q4_0"].max_prompt_tokens, 256, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 256, generator=generator),
    }
    return safetensors.torch.save(tensors)


def on_gpu(tiny: TinyWeights, quant: str = "Q4_0", repack: Repacking | None = None, **optimizations: Any) -> FluxFill:
    """The variant `tiny-{quant}` on the GPU, not loaded yet."""
    variant = BUILT_IN[f"tiny-{quant}"].model_copy(update={"num_gpus": 1, "repack": repack})
    weights = Weights(tiny.transformer(f"flux1-fill-dev-{quant}.gguf"), tiny.base)
    exact = {name: optimizations.pop(name) for name in ("adaln_once", "one_encode") if name in optimizations}
    return FluxFill(variant, weights, VariantSettings(optimizations=Optimizations(**optimizations)), **exact)


@pytest.fixture
def loaded(tiny: TinyWeights) -> Iterator[Callable[..., FluxFill]]:
    """`on_gpu`, loaded, and closed when the test is over."""
    engines: list[FluxFill] = []

    def load(*given: Any, **optimizations: Any) -> FluxFill:
        engines.append(on_gpu(tiny, *given, **optimizations))
        engines[-1].load()
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def difference(first: Pixels, second: Pixels) -> float:
    """On average, of 255."""
    return float(np.abs(first.astype(int) - second).mean())


@pytest.mark.parametrize("quant", ["Q4_0", "Q5_K_S", "Q8_0"])
def test_it_paints_nearly_what_a_cpu_does(
    tiny: TinyWeights, prompt: bytes, loaded: Callable[..., FluxFill], quant: str
) -> None:
    # Noise drawn in bfloat16 need not be that of float32, rounded.
    cpu, given = flux_fill(tiny, quant, dtype=torch.bfloat16), window(embeddings=prompt)
    cpu.load()
    assert difference(loaded(quant).paint(given), cpu.paint(given)) < NEAR


def test_the_same_seed_paints_the_same_bits(prompt: bytes, loaded: Callable[..., FluxFill]) -> None:
    engine = loaded()
    first = engine.paint(window(embeddings=prompt))
    assert np.array_equal(engine.paint(window(embeddings=prompt)), first)
    assert not np.array_equal(engine.paint(window(embeddings=prompt, seed=2)), first)


@pytest.mark.parametrize("optimization", ["adaln_once", "one_encode", "unpack"])
def test_exact_optimizations_paint_the_same_bits(
    prompt: bytes, loaded: Callable[..., FluxFill], optimization: str
) -> None:
    off, given = {"adaln_once": False, "one_encode": False, "unpack": False}, window(embeddings=prompt)
    plain, pulled = loaded(**off), loaded(**off | {optimization: True})
    assert np.array_equal(pulled.paint(given), plain.paint(given))


def test_all_weights_stay_on_the_gpu(prompt: bytes, loaded: Callable[..., FluxFill]) -> None:
    """But for the modulation's, which the host keeps."""
    engine = loaded()
    engine.paint(window(embeddings=prompt))
    parts = (engine._pipeline.transformer, engine._pipeline.vae)
    assert {parameter.device.type for part in parts for parameter in part.parameters()} == {"cuda"}
    assert engine._modulation is not None
    assert {linear.weight.device.type for linear in engine._modulation._linears} == {"cpu"}


def test_it_says_which_gpu_and_how_long_and_how_much(prompt: bytes, loaded: Callable[..., FluxFill]) -> None:
    engine = loaded()
    where = engine.describe()
    assert where["device"] == torch.cuda.get_device_name()
    assert where["compute_capability"] == "{}.{}".format(*torch.cuda.get_device_capability())
    assert 0 < where["memory_used_bytes"] < where["memory_total_bytes"]
    engine.warm_up(SIZES)
    assert engine.device_ms() == 0
    painted = paint_canvas(engine, request(embeddings=prompt), lambda progress: None)
    assert painted.gpu_ms is not None and 0 < painted.gpu_ms <= painted.busy_s * 1000
    assert engine.device_ms() == painted.gpu_ms
    assert painted.peak_bytes is not None and painted.reserved_bytes is not None
    weights = sum(parameter.nbytes for parameter in engine._pipeline.transformer.parameters())
    assert weights < painted.peak_bytes <= painted.reserved_bytes < where["memory_total_bytes"]


def test_a_step_that_is_reported_is_done(prompt: bytes, loaded: Callable[..., FluxFill]) -> None:
    engine, idle = loaded(), []
    engine.paint(window(embeddings=prompt, on_step=lambda step: idle.append(torch.cuda.current_stream().query())))
    assert idle == [True, True]


def test_canceling_ends_within_a_step_and_leaves_it_usable(prompt: bytes, loaded: Callable[..., FluxFill]) -> None:
    engine, steps = loaded(), list[int]()
    expected = engine.paint(window(embeddings=prompt))

    def stop(step: int) -> None:
        steps.append(step)
        raise Canceled("a user asked")

    with pytest.raises(Canceled):
        engine.paint(window(embeddings=prompt, steps=8, on_step=stop))
    assert steps == [1]
    assert np.array_equal(engine.paint(window(embeddings=prompt)), expected)


def fill() -> list[torch.Tensor]:
    """What takes the GPU's memory but for less than 2 MB in a piece."""
    taken, size = list[torch.Tensor](), torch.cuda.mem_get_info()[0]
    while size > 2**20:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return taken


def test_memory_that_is_out_is_told_and_freed(prompt: bytes, loaded: Callable[..., FluxFill]) -> None:
    engine, given = loaded(), window(1024, 1024, embeddings=prompt, steps=1)
    expected = engine.paint(given)
    engine.free_memory()
    taken = fill()
    with pytest.raises(OutOfMemory, match=r"cuda failed: .*out of memory"):
        engine.paint(given)
    taken.clear()
    engine.free_memory()
    assert np.array_equal(engine.paint(given), expected)


def test_a_window_that_ran_out_of_memory_is_painted_once_more(prompt: bytes, loaded: Callable[..., FluxFill]) -> None:
    engine, given = loaded(), request(embeddings=prompt)
    expected = paint_canvas(engine, given, lambda progress: None).images[0]
    engine.free_memory()
    taken, out = fill(), list[bool]()

    def make_room() -> None:
        out.append(True)
        taken.clear()

    painted = paint_canvas(engine, given, lambda progress: None, make_room)
    assert out == [True]
    assert np.array_equal(painted.canvas, expected)


#: Breaks the GPU for its process, in the middle of a step, and prints what the engine calls that and what follows.
LOST = """
import sys
import torch
from pathlib import Path
from tests.engine_fixtures import window
from tests.test_engine_cuda import on_gpu
from serve_app.engine.flux.tiny import TinyWeights

def break_it(step):
    torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")]

engine = on_gpu(TinyWeights(Path(sys.argv[1])))
engine.load()
prompt = Path(sys.argv[2]).read_bytes()
for work in (
    lambda: engine.paint(window(64, 64, embeddings=prompt, on_step=break_it)),
    lambda: engine.paint(window(64, 64, embeddings=prompt)),
    engine.describe,
    engine.free_memory,
    engine.close,
):
    try:
        work()
        print("nothing")
    except Exception as e:
        print(type(e).__name__, e)
"""


def in_a_process(script: str, *given: object) -> list[str]:
    """The lines that it prints."""
    command = [sys.executable, "-c", script, *map(str, given)]
    root = Path(__file__).parent.parent
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root).stdout.splitlines()


def test_a_gpu_that_is_lost_is_told_by_all_that_use_it(tiny: TinyWeights, prompt: bytes, tmp_path: Path) -> None:
    (file := tmp_path / "prompt").write_bytes(prompt)
    told = in_a_process(LOST, tiny.folder, file)
    assert len(told) == 5
    assert all(line.startswith("GpuLost cuda failed: ") for line in told), told
    assert "device-side assert" in told[0]


@pytest.mark.parametrize("cache", [FirstBlockCache(threshold=1.0), TaylorSeerCache(interval=2)], ids=lambda c: c.kind)
def test_step_caches_skip_steps(prompt: bytes, loaded: Callable[..., FluxFill], cache: StepCache) -> None:
    given = window(64, 64, embeddings=prompt, steps=8)
    plain, cached = loaded().paint(given), loaded(step_cache=cache)
    painted = cached.paint(given)
    assert 0.2 < difference(painted, plain) < 60
    assert np.array_equal(cached.paint(given), painted), "one run left something for the next"


@pytest.mark.slow
def test_compiled_blocks_are_nearly_eager(prompt: bytes, loaded: Callable[..., FluxFill]) -> None:
    given = window(64, 96, embeddings=prompt, steps=4)
    engine = loaded(compile=True)
    engine.warm_up(SIZES)
    before = compiled.graphs()
    assert difference(engine.paint(given), loaded().paint(given)) < NEAR
    assert compiled.graphs() == before, "a size that was warmed up is compiled once more"


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
def test_repacked_weights_paint_nearly_the_same(
    prompt: bytes, loaded: Callable[..., FluxFill], kind: Repacking, compile: bool
) -> None:
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU multiplies no fp8")
    given = window(64, 64, embeddings=prompt)
    plain, repacked = loaded("Q8_0").paint(given), loaded("Q8_0", kind, compile=compile)
    assert 0 < difference(repacked.paint(given), plain) < {"w8a8": NEAR, "fp8": 2 * NEAR}[kind]


def test_int8_takes_prompts_of_few_tokens(embeddings: bytes, loaded: Callable[..., FluxFill]) -> None:
    """CUDA's int8 product takes no fewer than 17 rows, and this prompt has 16 tokens."""
    given = window(64, 64, embeddings=embeddings)
    assert difference(loaded("Q8_0", "w8a8").paint(given), loaded("Q8_0").paint(given)) < NEAR


def test_prompts_are_encoded_nearly_as_on_a_cpu(tiny: TinyWeights) -> None:
    found = []
    for wants_gpu in (False, True):
        encoder = TextEncoder(tiny.base, threads=2, wants_gpu=wants_gpu)
        encoder.load()
        found.append(safetensors.torch.load(encoder.encode("grass", 64)))
        encoder.close()
    cpu, gpu = found
    for name, tensor in cpu.items():
        error = (gpu[name] - tensor).float().norm() / tensor.float().norm()
        assert error < 0.02, name


@pytest.mark.slow
def test_the_audits_forward_is_timed_by_the_gpu(prompt: bytes, loaded: Callable[..., FluxFill]) -> None:
    forward = Forward(loaded(), request(embeddings=prompt))
    forward.lap()
    seconds, expected = forward.lap()
    assert 0 < seconds < 5
    assert (forward.explained().graphs, forward.explained().breaks) == (1, 0)
    forward.compile()
    _, output = forward.lap()
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()
    assert min(forward.by_turns()) > 0


#: A replica's start, in a process of its own: prints graphs, hits and misses of the compiler's cache.
REPLICA = """
import sys
from pathlib import Path
from torch._dynamo.utils import counters
from serve_app.engine.flux import compiled
from serve_app.engine.flux.compile_cache import CompileCache
from serve_app.engine.flux.tiny import TinyWeights
from tests.test_engine_cuda import SIZES, on_gpu

engine = on_gpu(TinyWeights(Path(sys.argv[1])), compile=True)
engine.load()
CompileCache(Path(sys.argv[2]), "fingerprint").warm_up(lambda: engine.warm_up(SIZES))
found = counters["inductor"]
print(compiled.graphs(), found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_the_next_replica_takes_what_was_compiled(tiny: TinyWeights, tmp_path: Path) -> None:
    assert in_a_process(REPLICA, tiny.folder, tmp_path)[-1] == "6 0 6"
    assert in_a_process(REPLICA, tiny.folder, tmp_path)[-1] == "6 6 0"


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_loras_leave_nothing_on_the_gpu(
    family: str, tiny_sdxl: TinyWeights, tiny_dev: TinyWeights, prompt: bytes, tmp_path: Path
) -> None:
    gpu = {"num_gpus": 1}
    engine: Any = sdxl_of(tiny_sdxl, **gpu) if family == "sdxl" else dev_of(tiny_dev, **gpu)
    painter = Painter(family, engine, tmp_path, None if family == "sdxl" else prompt)
    loras = [painter.lora(seed) for seed in (1, 2)]
    pictures = [painter.paint(), painter.paint(loras[0])]
    assert not np.array_equal(*pictures)
    used_bytes = torch.cuda.memory_allocated()
    for _ in range(5):
        for lora in loras:
            painter.paint(lora)
        with pytest.raises(OutOfMemory):
            painter.paint(full(loras[0]))
    assert torch.cuda.memory_allocated() == used_bytes
    assert [painter.paint().tobytes(), painter.paint(loras[0]).tobytes()] == [one.tobytes() for one in pictures]
    engine.close()
