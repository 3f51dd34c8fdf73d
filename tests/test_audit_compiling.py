"""torch.compile against eager: what is measured on one forward, what is made of it, and what stands in the way."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch._inductor.config

from benchmarks.audit.compiling import MAX_DIFFERENCE, MIN_GAIN, judged, verdict
from benchmarks.audit.forwards import Forward
from serve_app.engine.flux import compiled
from serve_app.engine.flux.fill import FluxFill
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.models import Box, EditRequest
from serve_app.settings import Settings

from .engine_fixtures import flux_fill, photo, request

#: With the other modules that compile: the C++ compiler uses all cores.
pytestmark = pytest.mark.xdist_group("compiling")

SIDE = 64
#: Two windows side by side, of which nothing of the second is painted.
BOTH = [Box(x0=0, y0=0, x1=SIDE, y1=SIDE), Box(x0=SIDE, y0=0, x1=2 * SIDE, y1=SIDE)]


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Folders that the compiler is told of, and what it compiled, stay within the test."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def own_temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files lie, but for the compiler's headers."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def given() -> EditRequest:
    generator = torch.Generator().manual_seed(5)
    prompt = {
        "prompt_embeds": torch.randn(1, 16, 256, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 256, generator=generator),
    }
    mask = np.zeros((SIDE, 2 * SIDE), np.uint8)
    mask[16:48, 8:40] = 255
    canvas = photo(SIDE, 2 * SIDE)
    return request(canvas=canvas, mask=mask, windows=BOTH, steps=4, embeddings=safetensors.torch.save(prompt))


@pytest.fixture
def engine(shallow: TinyWeights) -> Iterator[FluxFill]:
    """Its rows of modulation are computed once, for as many forwards as the run has steps."""
    engine = flux_fill(shallow, "Q8_0")
    engine.load()
    yield engine
    engine.close()


def served(shallow: TinyWeights, cache: Path, **optimizations: Any) -> Settings:
    file = str(shallow.transformer("flux1-fill-dev-Q8_0.gguf"))
    definition = {"family": "flux-fill", "file": file, "base": str(shallow.base), "max_prompt_tokens": 64}
    return Settings.model_validate(
        {
            "variants": {"v": {"definition": definition, "optimizations": optimizations}, "telea": {}},
            "weights": {"cache": cache},
        }
    )


def test_the_inputs_are_those_of_a_real_call_and_it_can_be_repeated(engine: FluxFill, given: EditRequest) -> None:
    """More often than the run has steps, with the same output."""
    forward = Forward(engine, given)
    assert forward.per_edit == 4 * 1
    laps = [forward.lap() for _ in range(given.steps + 1)]
    outputs = [output for _, output in laps]
    assert outputs[0].shape == (1, (SIDE // 16) ** 2, 64)
    assert outputs[0].abs().max() > 0
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert min(seconds for seconds, _ in laps) > 0


@pytest.mark.slow
def test_the_forward_is_one_graph(engine: FluxFill, given: EditRequest) -> None:
    found = Forward(engine, given).explained()
    assert (found.graphs, found.breaks, found.reasons) == (1, 0, ())


@pytest.mark.slow
def test_what_breaks_the_graph_is_named_once_without_its_folder(engine: FluxFill, given: EditRequest) -> None:
    forward = Forward(engine, given)
    for block in engine._pipeline.transformer.transformer_blocks:
        block.forward = torch.no_grad()(breaking(block.forward))
    found = forward.explained()
    assert found.breaks == found.graphs - 1 > 0
    (reason,) = found.reasons
    assert reason.startswith("Failed to trace builtin operator (test_audit_compiling.py:")


def breaking(block: Any) -> Any:
    def forward(*given: Any, **named: Any) -> Any:
        made = block(*given, **named)
        print("a break")
        return made

    return forward


def test_the_engine_paints_as_before_when_its_inputs_were_caught(engine: FluxFill, given: EditRequest) -> None:
    from serve_app.engine.painting import paint_canvas

    before = paint_canvas(engine, given, lambda progress: None).images[0]
    Forward(engine, given)
    assert np.array_equal(before, paint_canvas(engine, given, lambda progress: None).images[0])


@pytest.mark.slow
def test_compiled_against_eager(shallow: TinyWeights, tmp_path: Path, given: EditRequest, own_temporary: Path) -> None:
    """Optimizations that would be in the way are off: what is served is compiled already, and skips steps."""
    before = compiled.graphs()
    settings = served(shallow, tmp_path, compile=True, step_cache={"kind": "taylor_seer"})
    found = verdict("v", settings, given)
    assert found.variant == "v"
    assert (found.graphs, found.breaks, found.break_reasons) == (1, 0, ())
    assert found.eager_s and found.compiled_s and found.compile_s and found.gain
    assert found.gain == found.eager_s / found.compiled_s
    assert found.max_difference is not None and found.max_difference < 0.1
    assert found.viable is (found.verdict == "proceed") is (found.gain >= MIN_GAIN)
    assert (found.pays_back_after is not None) == (found.gain > 1)
    assert compiled.graphs() - before == 2 + 1, "each kind of block, and what was explained"
    assert not list(own_temporary.iterdir())
    assert not list(tmp_path.glob("compiled")), "nothing is kept for replicas"


@pytest.mark.slow
def test_without_a_c_compiler_there_is_a_verdict(
    shallow: TinyWeights, tmp_path: Path, given: EditRequest, own_temporary: Path
) -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        found = verdict("v", served(shallow, tmp_path), given)
    assert not found.viable
    assert found.verdict.startswith("torch.compile fails: InvalidCxxCompiler: No working C++ compiler found")
    assert "\n" not in found.verdict
    assert (found.graphs, found.breaks) == (1, 0)
    assert found.eager_s and found.compiled_s is None and found.gain is None
    assert not list(own_temporary.iterdir())


def test_a_variant_that_does_not_load_has_a_verdict_without_folders(tmp_path: Path, given: EditRequest) -> None:
    definition = {"family": "flux-fill", "file": str(tmp_path / "no.gguf"), "base": str(tmp_path)}
    settings = Settings.model_validate(
        {"variants": {"v": {"definition": definition}}, "weights": {"cache": tmp_path / "cache"}}
    )
    found = verdict("v", settings, given)
    assert not found.viable
    assert found.verdict.startswith("it could not be loaded and run: ")
    assert "no.gguf" in found.verdict
    assert str(tmp_path) not in found.verdict


def test_a_family_without_a_transformer_has_nothing_to_compile(tmp_path: Path, given: EditRequest) -> None:
    settings = Settings.model_validate({"variants": {"telea": {}}, "weights": {"cache": tmp_path}})
    found = verdict("telea", settings, given)
    assert (found.viable, found.verdict) == (False, "the telea family has nothing to compile")
    assert found.graphs is None


FASTER = {"eager_s": 2.0, "compiled_s": 1.0, "compile_s": 50.0, "forwards": 28, "difference": 0.01, "largest": 4.0}


def judge(**changes: float) -> Any:
    return judged(**{**FASTER, **changes})  # type: ignore[arg-type]  # `forwards` is an int


def test_what_is_faster_and_the_same_but_for_rounding_proceeds() -> None:
    found = judge()
    assert (found["viable"], found["verdict"], found["gain"]) == (True, "proceed", 2.0)
    assert found["pays_back_after"] == 2, "50 s, of which an edit saves 28"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"compiled_s": 1.95}, "1.03 times as fast"),
        ({"compiled_s": 4.0}, "0.50 times as fast"),
        ({"difference": 4.0 * MAX_DIFFERENCE * 1.1}, "differ by 5.5% of the largest"),
        ({"difference": float("nan")}, "not finite"),
        ({"difference": float("inf")}, "not finite"),
        ({"difference": 0.1, "largest": 0.0}, "differ by inf%"),
    ],
)
def test_what_is_in_the_way_is_named(changes: dict[str, float], what: str) -> None:
    found = judge(**changes)
    assert not found["viable"]
    assert what in found["verdict"]


def test_what_saves_nothing_never_pays_back() -> None:
    assert judge(compiled_s=2.0)["pays_back_after"] is None
    assert judge(compiled_s=3.0)["pays_back_after"] is None


def test_what_was_compiled_at_once_pays_back_with_the_first_edit() -> None:
    assert judge(compile_s=0.0)["pays_back_after"] == 1
