"""The engine's benchmark: that it counts rightly, runs without Ray, and what must hold of its counts."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engine
from benchmarks.comparison import memory, number_type
from benchmarks.comparison.counts import Calls, Flops, KleinFlops, unpacked_bytes
from benchmarks.comparison.meter import Meter
from benchmarks.comparison.models import FULL, KLEIN_FULL, Shape
from benchmarks.comparison.recipe import frame_size
from benchmarks.comparison.runs import Contender, Run, by_turns, compared
from benchmarks.comparison.scenarios import SCENARIOS, Scenario
from benchmarks.comparison.service import planned
from serve_app.edit.cost import SHAPES, forward_flops
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.errors import OutOfMemory

from .cpu import own_number_type
from .engine_fixtures import flux_fill

ROOT = Path(__file__).parent.parent
#: One block of each kind at FLUX.1's width.
CPU = Shape(double=1, single=1, narrow_vae=True)
SMALL = Shape(width=256, double=1, single=1, narrow_vae=True)


@pytest.fixture(scope="module")
def flops() -> Flops:
    return Flops(FULL)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1024, 1024), (768, 512), (256, 256)])
def test_the_planners_formula_agrees_with_the_counter(flops: Flops, size: tuple[int, int]) -> None:
    assert forward_flops(*size) == pytest.approx(flops.step(size), rel=0.003)
    klein = forward_flops(*size, **SHAPES["flux2-klein"])
    assert klein == pytest.approx(KleinFlops(KLEIN_FULL).step(size), rel=0.004)


def test_the_models_are_as_large_as_the_real_ones(flops: Flops) -> None:
    """In millions of weights: FLUX.1's transformer, its VAE, T5-XXL's encoder, CLIP-L's text model."""
    assert {name: round(count / 1e6) for name, count in flops.sizes().items()} == {
        "transformer": 11902,
        "vae": 84,
        "t5": 4762,
        "clip": 123,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("thin_vertical", 3.4), ("thin_diagonal", 1.2)])
def test_a_thin_leash_takes_so_many_times_fewer_flops(flops: Flops, name: str, least: float) -> None:
    """At full size, and at the CPU's."""
    row = SCENARIOS[name]
    windows = [(window.width, window.height) for window in planned(row).windows]
    frame, count = [frame_size(row.width, row.height)], len(windows)
    for counted in (flops, Flops(CPU)):
        recipe = counted.of(Calls(windows=frame, vae_encodes=2, vae_decodes=1, texts=1), 28)
        service = counted.of(Calls(windows=windows, vae_encodes=count, vae_decodes=count, texts=0), 28)
        assert sum(recipe.values()) / sum(service.values()) >= least


def test_vae_calls_count_with_the_window_that_they_were_for() -> None:
    flops, sizes = Flops(SMALL), [(256, 256), (512, 256)]

    def vae(*windows: tuple[int, int]) -> float:
        count = len(windows)
        return flops.of(Calls(windows=windows, vae_encodes=2 * count, vae_decodes=count, texts=0), 28)["vae"]

    assert vae(*sizes) == pytest.approx(sum(map(vae, sizes)))


def _contender(step_s: float, job_s: Sequence[float], **given: Any) -> Contender:
    """Runs of two steps, made up."""
    laps = {"step": [step_s, step_s], "vae_encode": [0.1], "vae_decode": [0.1]}
    return Contender(
        edit=lambda: None,
        meter=Meter(torch.device("cpu")),
        models=[torch.nn.Linear(1, 1)],
        windows=[(256, 256)],
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        runs=[Run(each_s, laps, graphs=0) for each_s in job_s],
        **given,
    )


def test_steps_are_compared_with_steps_and_jobs_with_jobs() -> None:
    flops = Flops(SMALL)
    recipe, service = (
        one.figures(flops, steps=2, counted_steps=28)
        for one in (_contender(6, (100, 150, 120)), _contender(2, (10, 9, 13)))
    )
    assert recipe["step_s"] == {"median": 6, "min": 6, "max": 6, "runs_s": [6, 6, 6]}
    assert service["job_s"] == {"median": 10, "min": 9, "max": 13, "runs_s": [10, 9, 13]}
    ratios = {"flops_ratio": 1, "wall_ratio": 3, "job_ratio": 12, "text_encoder_calls": 0}
    assert compared(recipe=recipe, service=service) == ratios


@pytest.mark.parametrize(("enough_s", "runs"), [(3600, 5), (-1, 3)], ids=["quick", "slow"])
def test_slow_runs_are_fewer_and_three_at_least(monkeypatch: pytest.MonkeyPatch, enough_s: float, runs: int) -> None:
    monkeypatch.setattr("benchmarks.comparison.runs._ENOUGH_S", enough_s)
    contenders = [_contender(1, ()), _contender(1, ())]
    by_turns(contenders, 5)
    assert [len(one.runs) for one in contenders] == [runs, runs]


def test_what_the_host_holds_counts_on_a_cpu() -> None:
    plain, holding = _contender(1, (1,)), _contender(1, (1,), host_bytes=1000)
    for one in (plain, holding):
        one.warm_up()
    assert holding.peak_bytes - plain.peak_bytes == 1000


def test_compiled_blocks_move_nothing_that_is_counted(tiny: TinyWeights) -> None:
    engine = flux_fill(tiny, "Q4_0")
    engine.load()
    eager, is_compiled = (_contender(1, (1,), is_compiled=is_compiled) for is_compiled in (False, True))
    for one in (eager, is_compiled):
        one.models = [engine._pipeline.transformer]
    found = [one.figures(Flops(SMALL), steps=2, counted_steps=2) for one in (eager, is_compiled)]
    assert found[0]["unpacked_gb_per_step"] > 0 and found[1]["unpacked_gb_per_step"] is None


def test_every_scenario_has_something_to_paint() -> None:
    for row in SCENARIOS.values():
        mask = row.painted()
        assert mask.shape == (row.height, row.width) and row.photo().shape == (row.height, row.width, 3)
        assert 0 < (mask != 0).mean() < 0.2, row.name


def test_the_recipe_paints_at_1024_at_most_in_multiples_of_16() -> None:
    sizes = {(4000, 3000): (1024, 768), (3000, 4001): (768, 1024), (1024, 1024): (1024, 1024), (500, 300): (496, 288)}
    assert {photo: frame_size(*photo) for photo in sizes} == sizes


@pytest.mark.parametrize(("packing", "bytes_per_weight"), [("Q8_0", 7.1), ("Q4_0", 14.6), ("Q5_K_S", 23.4)])
def test_what_unpacking_moves(tiny: TinyWeights, packing: str, bytes_per_weight: float) -> None:
    """Without what the optimizations take away, and with everything taken away."""
    plain, unpacked = (flux_fill(tiny, packing, adaln_once=False, unpack=unpack) for unpack in (False, True))
    moved = []
    for one in (plain, unpacked):
        one.load()
        moved.append(unpacked_bytes(one._pipeline.transformer, torch.bfloat16))
    weights = sum(
        module.in_features * module.out_features
        for module in plain._pipeline.transformer.modules()
        if type(module).__name__ == "GGUFLinear" and hasattr(module.weight, "quant_type")
    )
    assert moved[0] / weights == pytest.approx(bytes_per_weight, rel=0.05)
    assert moved[1] == 0


def test_a_meter_gives_each_lap_once() -> None:
    class Speaker:
        def say(self, word: str) -> str:
            return word.upper()

    speaker, meter = Speaker(), Meter(torch.device("cpu"))
    meter.watch("words", speaker, "say")
    assert [speaker.say("one"), speaker.say("two")] == ["ONE", "TWO"]
    assert [len(seconds) for seconds in meter.laps().values()] == [2]
    assert meter.laps() == {}


def test_storages_are_counted_from_their_birth_to_their_death() -> None:
    storages = memory.Storages()
    with storages:
        kept = torch.empty(1000, dtype=torch.uint8)
        view = kept.view(10, 100)
        passing = torch.empty(500, dtype=torch.uint8)
        del passing
        with storages.elsewhere():
            host = torch.empty(4000, dtype=torch.uint8)
            torch.empty(300, dtype=torch.uint8)
        assert storages.now() == 1000
        happened = storages.happened()
        more = torch.empty(200, dtype=torch.uint8)
    assert (storages.peak(), storages.peak(happened)) == (1500, 1200)
    assert more.nbytes == 200 and view.shape == (10, 100) and host.nbytes == 4000


@pytest.mark.slow
@own_number_type
def test_tracked_memory_is_what_the_allocator_measures(dtype: torch.dtype) -> None:
    """To 1% where the transformer decides; convolutions on a CPU copy what the tracker does not see."""
    for shape, side, most in (
        (Shape(width=1024, double=2, single=4, narrow_vae=True), 256, 1.01),
        (Shape(width=512, double=1, single=1), 128, 1.7),
    ):
        real = memory.measured(shape, "Q8_0", side, dtype=dtype)
        counted = memory.tracked(shape, "Q8_0", side, dtype=dtype, on_cpu=True)
        assert real.resident == pytest.approx(counted.resident, rel=0.01), shape
        assert real.loading == pytest.approx(counted.loading, rel=0.01), shape
        # What an edit takes besides the weights, which are the most.
        assert 0.99 < (real.painting - real.resident) / (counted.painting - counted.resident) < most, shape


@pytest.mark.slow
def test_a_full_size_q8_0_replica_fits_into_20_gb() -> None:
    found = memory.tracked(FULL, "Q8_0", 1024)
    # As much as the packed weights of GGUF's file less the modulation's, and the VAE's.
    assert found.resident == pytest.approx(9.41e9, rel=0.01)
    assert found.resident < found.loading < 20e9
    assert found.resident + 1e9 < found.painting < 20e9


@pytest.mark.slow
def test_it_runs_without_ray(tmp_path: Path) -> None:
    out, chart = tmp_path / "engine.json", tmp_path / "engine.png"
    given = ["--width", "256", "--scenarios", "exact_512,klein_exact_512", "--runs", "1", "--steps", "1"]
    script = f"""
import sys
sys.modules["ray"] = None
sys.argv = ["benchmarks.engine", *{given}, "--out", {str(out)!r}, "--chart", {str(chart)!r}]
import benchmarks.engine
benchmarks.engine.main()
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    context, found = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert found.keys() == {"exact_512", "klein_exact_512"}
    assert {**found, **context} == json.loads(out.read_text())
    one = found["exact_512"]
    assert one["text_encoder_calls"] == 0 and one["recipe"]["text_encoder_calls"] == 1
    assert one["recipe"]["vae_calls"] == 3 and one["service"]["vae_calls"] == 2
    # The same frame: what is left is the text encoders' and one VAE call.
    assert 1 < one["flops_ratio"] < 1.1
    assert one["service"]["unpacked_gb_per_step"] < one["recipe"]["unpacked_gb_per_step"]
    assert one["service"]["peak_gb"] < one["recipe"]["peak_gb"]
    klein = found["klein_exact_512"]
    # Two references are encoded. Four steps of a model of a third of the weights take far less at full size.
    assert klein["service"]["vae_calls"] == 3 and klein["service"]["text_encoder_calls"] == 0
    assert klein["steps_of_flops"] == 4 and 5 < klein["full_size_flops_ratio"] < 12
    dtype = number_type.name(number_type.of(torch.device("cpu")))
    assert context["context"]["dtype"] == dtype and dtype in context["context"]["title"]
    assert context["context"]["weights"] == "synthetic" and context["context"]["versions"]["torch"]
    assert [len(loads) for loads in context["context"]["load_average"].values()] == [3, 3]
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_an_engine_that_fails_loses_nothing_that_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Side:
        """The recipe, or a service whose second engine does not fit."""

        def __init__(self, weights: object, asked: object, *_: object, **__: object) -> None:
            if isinstance(asked, Scenario) and asked.name == "exact_512":
                raise OutOfMemory("no room")

        def contender(self, *_: object) -> Contender:
            return _contender(1, (1,))

        def warm_up(self, _: object) -> None: ...

        def close(self) -> None: ...

    for name in ("Recipe", "Service"):
        monkeypatch.setattr(engine, name, Side)
    monkeypatch.setattr(engine, "_weights", lambda *_: nullcontext({"flux-fill": None}))
    monkeypatch.setattr(engine, "by_turns", lambda *_: None)
    given = ["--width", "256", "--scenarios", "eager_512,exact_512", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["benchmarks.engine", *given])
    with pytest.raises(OutOfMemory):
        engine.main()
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept.keys() == {"eager_512", "context"}
    assert kept["eager_512"]["service"]["share_of_matmul"] > 0


def test_an_unknown_scenario_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks.engine", "--scenarios", "nothing"])
    with pytest.raises(SystemExit):
        engine.main()
    assert "no scenario nothing" in capsys.readouterr().err
