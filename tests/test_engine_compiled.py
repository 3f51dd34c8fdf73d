"""Compiled blocks: what is compiled and when, how near it is to eager, and what the next replica takes over."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch._inductor.utils import clear_caches

from deployments.loading import sources
from deployments.replica import open_engine
from serve_app.engine.flux import compile_cache, compiled
from serve_app.engine.flux.fill import FluxFill
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.errors import OutOfMemory, VariantLoadFailed
from serve_app.models import BUILT_IN
from serve_app.settings import FirstBlockCache, Settings, TaylorSeerCache

from .engine_fixtures import flux_fill, window

#: One process after the other: the C++ compiler uses all cores.
pytestmark = pytest.mark.xdist_group("compiling")

#: Of the packings, the one whose unpacking compiles in half the time.
QUANT = "Q8_0"
BUCKETS = ((64, 64), (96, 64))
#: A bucket's: the double blocks, the first single block, the other single blocks.
GRAPHS = 3


@pytest.fixture(scope="module")
def prompts() -> list[bytes]:
    """As long as the tiny variants' prompts are."""
    generator = torch.Generator().manual_seed(3)

    def drawn() -> bytes:
        prompt = torch.randn(1, BUILT_IN["tiny-Q4_0"].max_prompt_tokens, 256, generator=generator)
        pooled = torch.randn(1, 256, generator=generator)
        return safetensors.torch.save({"prompt_embeds": prompt, "pooled_prompt_embeds": pooled})

    return [drawn(), drawn()]


@pytest.fixture(scope="module")
def warm(tiny: TinyWeights, prompts: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FluxFill]:
    """Compiled, at one size by painting and at all by warming up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        engine = flux_fill(tiny, QUANT, compile=True)
        engine.load()
        before, (width, height) = compiled.graphs(), BUCKETS[0]
        for seed in (1, 2):
            engine.paint(window(height, width, embeddings=prompts[0], seed=seed))
            assert compiled.graphs() - before == GRAPHS, "a size that was not warmed up is compiled once"
        engine.warm_up(BUCKETS)
        assert compiled.graphs() - before == GRAPHS * len(BUCKETS)
        yield engine
        engine.close()


@pytest.mark.slow
def test_after_warm_up_nothing_more_is_compiled(warm: FluxFill, prompts: list[bytes]) -> None:
    """Whatever the prompt, the guidance scale, the number of steps and the seed, which change the rows of each step."""
    before = compiled.graphs()
    for width, height in BUCKETS:
        for number, (steps, guidance_scale) in enumerate(((1, 1.0), (3, 30.0), (2, 0.0))):
            embeddings = prompts[number % 2]
            warm.paint(
                window(height, width, embeddings=embeddings, steps=steps, guidance_scale=guidance_scale, seed=number)
            )
    assert compiled.graphs() == before


@pytest.mark.slow
def test_it_is_nearly_eager(warm: FluxFill, tiny: TinyWeights, prompts: list[bytes]) -> None:
    """Fused kernels round at other places: in bfloat16, by a level of 255 here and there after a few steps."""
    given = window(64, 96, embeddings=prompts[0], steps=4)
    eager = flux_fill(tiny, QUANT)
    eager.load()
    difference = np.abs(warm.paint(given).astype(int) - eager.paint(given))
    assert difference.max() <= 2
    assert difference.mean() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("cache", [FirstBlockCache(threshold=1.0), TaylorSeerCache(interval=2)], ids=lambda c: c.kind)
def test_step_caching_goes_with_it_and_takes_the_same_graphs(
    warm: FluxFill, tiny: TinyWeights, prompts: list[bytes], cache: FirstBlockCache | TaylorSeerCache
) -> None:
    given = window(64, 64, embeddings=prompts[0], steps=6)
    eager, both = (flux_fill(tiny, QUANT, step_cache=cache, compile=compile) for compile in (False, True))
    eager.load()
    both.load()
    before = compiled.graphs()
    difference = np.abs(both.paint(given).astype(int) - eager.paint(given))
    assert compiled.graphs() == before
    assert difference.mean() < 0.05
    assert np.abs(warm.paint(given).astype(int) - eager.paint(given)).mean() > 0.2, "no step was skipped"


@pytest.mark.slow
def test_a_closed_engine_leaves_no_weights_behind(warm: FluxFill, tiny: TinyWeights, prompts: list[bytes]) -> None:
    engine = flux_fill(tiny, QUANT, compile=True)
    engine.load()
    engine.paint(window(64, 64, embeddings=prompts[0]))
    transformer = weakref.ref(engine._pipeline.transformer)
    engine.close()
    assert transformer() is None


def test_nothing_is_compiled_where_it_is_off(tiny: TinyWeights, prompts: list[bytes]) -> None:
    engine = flux_fill(tiny, QUANT)
    engine.load()
    before = compiled.graphs()
    engine.warm_up(BUCKETS)
    engine.paint(window(64, 64, embeddings=prompts[0]))
    assert compiled.graphs() == before


def test_blocks_that_do_not_compile_are_a_variant_that_does_not_load(tiny: TinyWeights) -> None:
    engine = flux_fill(tiny, QUANT, compile=True)
    engine.load()
    block = engine._pipeline.transformer.transformer_blocks[0]

    def broken(*given: object, **named: object) -> None:
        torch._dynamo.graph_break()

    block.forward = torch.compile(broken, fullgraph=True)
    with pytest.raises(VariantLoadFailed, match=r"do not compile: .*graph_break"):
        engine.warm_up(BUCKETS)


def test_compilers_that_speak_of_cuda_are_no_failure_of_the_gpu(tiny: TinyWeights) -> None:
    with pytest.raises(VariantLoadFailed, match=r"(?s)do not compile: .*CUDA driver version"):
        warm_up_with(tiny, RuntimeError("CUDA driver version is insufficient"))


def test_compilers_that_fill_the_device_are_out_of_memory(tiny: TinyWeights) -> None:
    with pytest.raises(OutOfMemory):
        warm_up_with(tiny, torch.OutOfMemoryError("CUDA out of memory"))


def warm_up_with(tiny: TinyWeights, error: Exception) -> None:
    """Where the compiler raises this."""

    def backend(*given: object) -> Callable[..., object]:
        raise error

    engine = flux_fill(tiny, QUANT, compile=True)
    engine.load()
    block = engine._pipeline.transformer.transformer_blocks[0]
    block.forward = torch.compile(type(block).forward.__get__(block), backend=backend)
    engine.warm_up(BUCKETS)


#: A replica's start, in a process of its own: prints graphs, hits and misses of the compiler's cache.
REPLICA = """
import logging, sys
from torch._dynamo.utils import counters
from deployments.replica import open_engine
from deployments.loading import sources
from serve_app.engine.flux import compile_cache, compiled
from serve_app.settings import Settings

logging.basicConfig(level=logging.WARNING)
engine = open_engine("v", Settings.model_validate_json(sys.argv[1]))
found = counters["inductor"]
print(compiled.graphs(), found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
engine.close()
"""


def machine(folder: Path, shallow: TinyWeights) -> dict[str, Any]:
    """Settings of one that shares a mirror with the others."""
    file, base = str(shallow.transformer(f"flux1-fill-dev-{QUANT}.gguf")), str(shallow.base)
    definition = {"family": "flux-fill", "file": file, "base": base, "max_prompt_tokens": 64, "num_gpus": 0}
    return {
        "variants": {"v": {"definition": definition, "optimizations": {"compile": True, "unpack": True}}},
        "windows": {"buckets": [(64, 192)]},
        "weights": {"cache": str(folder), "mirror": f"files:{folder.parent / 'mirror'}"},
    }


def start(machine: dict[str, Any]) -> tuple[str, str]:
    """What it prints, and what it logs."""
    command = [sys.executable, "-c", REPLICA, json.dumps(machine)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return done.stdout.strip().splitlines()[-1], done.stderr


@pytest.mark.slow
def test_the_next_replica_takes_what_the_first_compiled(
    shallow: TinyWeights,
    engine: FluxFill,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On its disk; on another machine by way of the mirror, but for what the C++ compiler made. What is damaged or does
    not work is compiled anew."""
    one, two = machine(tmp_path / "one", shallow), machine(tmp_path / "two", shallow)
    settings, graphs = Settings.model_validate(one), 2
    kept = compile_cache.of(
        settings.variant("v"), settings.variants["v"], settings.windows.buckets, sources(settings), engine.describe()
    )
    shared = tmp_path / "mirror" / "models" / "compiled" / kept.fingerprint / "artifacts.bin"
    shared.parent.mkdir(parents=True)
    shared.write_bytes(b"cut short")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    caplog.set_level("INFO")
    # As in a new process.
    torch._dynamo.reset()
    clear_caches()
    open_engine("v", settings).close()
    assert "damaged, or from another version" in caplog.text

    assert start(two)[0] == f"{graphs} {graphs} 0"
    break_code(tmp_path / "one" / "compiled" / kept.fingerprint)
    printed, logged = start(one)
    # The first graph's code works, the second's does not, and both are compiled anew.
    assert printed == f"{1 + graphs} 1 {graphs}"
    assert "do not compile" in logged
    assert start(one)[0] == f"{graphs} {graphs} 0"


def break_code(folder: Path) -> None:
    """That of a graph compiled late: those before it work."""
    last = max(folder.rglob("*.so"), key=lambda path: path.stat().st_mtime)
    # Not into the file itself, from which this process runs.
    last.unlink()
    last.write_bytes(b"no code")
