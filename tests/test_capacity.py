"""The simulation of the app, and what it says of capacity: `benchmarks.simulation` and `benchmarks.capacity`."""

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig

from benchmarks import capacity, simulation
from benchmarks.burst import ANSWERS
from benchmarks.burst import figures as burst_figures
from benchmarks.simulation import App, Model, Polling, by_policy, by_serve, constant, fixed, log_normal, steady

JOB_S, START_S, LIMIT = 40.0, 240.0, 8
FOUND = json.loads(Path("benchmarks/results/burst.json").read_text())
FLEETS: dict[str, Callable[[], Callable[[App], int]]] = {
    "policy": lambda: by_policy,
    "serve": lambda: by_serve,
    "polling": lambda: Polling(JOB_S),
    "fixed": lambda: fixed(LIMIT),
}
#: Two bursts, of which the first meets no replica, and single messages between them.
BUSY = [0.0] * 60 + [float(at_s) for at_s in range(600, 7200, 60)] + [7200.0] * 60


def model(*, least: int = 0, most: int = LIMIT, **changed: Any) -> Model:
    args = capacity.parser().parse_args([])
    usual = {"job_s": constant(JOB_S), "start_s": log_normal(START_S, 2 * START_S), "decode_s": 0.0, "encode_s": 0.0}
    settings = capacity.app_settings(args, least=least, most=most)
    return capacity.model(args, settings, **{**usual, "stores_s": 0.0, **changed})


def busy(fleet: str, **changed: Any) -> App:
    return App(model(**changed), FLEETS[fleet](), BUSY).run(14_400, 7200)


def p95_s(app: App) -> float:
    return float(np.percentile(app.latencies_s, 95))


# -- what was measured


@pytest.mark.parametrize("answers", ANSWERS)
def test_a_simulated_burst_takes_as_long_as_the_measured_one(answers: str) -> None:
    simulated = burst_figures(capacity.burst(FOUND, answers), FOUND["replicas"])
    for name in ("all_running_s", "all_done_s", "none_wanted_s"):
        assert simulated[name] == pytest.approx(FOUND[answers][name], rel=capacity.TOLERANCE), (name, simulated)


def test_a_replica_that_starts_later_than_measured_is_noticed() -> None:
    slower = {**FOUND["exact"], "all_running_s": 2 * FOUND["exact"]["all_running_s"]}
    simulated = burst_figures(capacity.burst({**FOUND, "exact": slower}, "exact"), FOUND["replicas"])
    assert simulated["all_done_s"] != pytest.approx(FOUND["exact"]["all_done_s"], rel=capacity.TOLERANCE)


# -- what queueing theory says


def erlang_c(servers: int, load: float) -> float:
    own = load**servers / math.factorial(servers) * servers / (servers - load)
    return own / (sum(load**k / math.factorial(k) for k in range(servers)) + own)


@pytest.mark.slow
def test_jobs_wait_for_a_fixed_fleet_as_erlang_says() -> None:
    servers, load = 4, 2.8
    told = model(least=servers, running=servers, job_s=lambda random: random.expovariate(1 / JOB_S), turn_s=3600.0)
    moments = steady(Random(3), load / JOB_S * 3600, hours=200)
    app = App(told, fixed(servers), moments).run(moments[-1], 3600)
    waited_s = np.mean(app.latencies_s) - app.busy_s / len(moments)
    assert waited_s == pytest.approx(erlang_c(servers, load) * JOB_S / (servers - load), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("fleet", FLEETS)
def test_messages_on_the_average_are_their_rate_times_their_time(fleet: str) -> None:
    """Little's law."""
    moments = steady(Random(1), 240, hours=12)
    app = App(model(running=2), FLEETS[fleet](), moments).run(12 * 3600)
    inside = np.mean([one.messages for one in app.series])
    assert inside == pytest.approx(len(moments) / (12 * 3600) * np.mean(app.latencies_s), rel=0.03)


# -- what must always hold


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("losses_per_hour", [0.0, 4.0])
def test_every_job_is_done_within_the_limit_on_replicas(fleet: str, losses_per_hour: float) -> None:
    app = busy(fleet, losses_per_hour=losses_per_hour)
    assert len(app.latencies_s) == len(BUSY)
    assert app.messages == 0
    assert 0 < app.most_nodes <= LIMIT
    assert max(one.wanted for one in app.series) <= LIMIT
    assert (app.lost > 0) == (losses_per_hour > 0)
    assert min(app.latencies_s) >= JOB_S
    assert app.busy_s <= app.node_s


def test_a_job_whose_replica_is_lost_waits_for_its_lease_and_is_done_again() -> None:
    told = model(most=1, least=1, running=1, job_s=constant(3600.0), losses_per_hour=3.0, turn_s=60.0)
    app = App(told, fixed(1), [0.0], seed=1).run(48 * 3600)
    assert app.lost >= 1
    assert app.latencies_s[0] >= 3600 + app.lost * told.settings.work.lease_s


def test_the_policy_wakes_all_replicas_for_a_burst_and_serves_own_wakes_one() -> None:
    apps = {name: App(model(start_s=constant(START_S)), FLEETS[name](), [0.0] * 60).run(7200) for name in FLEETS}
    at_once = {name: max(one.wanted for one in app.series if one.at_s < START_S) for name, app in apps.items()}
    assert (at_once["policy"], at_once["serve"]) == (LIMIT, 1)
    assert max(apps["policy"].latencies_s) < START_S + math.ceil(60 / LIMIT) * JOB_S + 10
    assert max(apps["serve"].latencies_s) > 2 * START_S
    assert apps["policy"].series[-1].running == apps["serve"].series[-1].running == 0


def test_polling_sees_a_burst_minutes_late() -> None:
    app = App(model(), Polling(JOB_S), [300.0] * 60).run(3600, 7200)
    first = next(one.at_s for one in app.series if one.wanted)
    assert 300 + simulation.LATE_S[0] <= first <= 300 + simulation.LATE_S[1] + simulation.SAMPLED_S + simulation.POLL_S


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_policy_is_no_slower_than_serves_own(seed: int) -> None:
    p95 = {fleet: p95_s(App(model(), FLEETS[fleet](), BUSY, seed).run(14_400)) for fleet in ("policy", "serve")}
    assert p95["policy"] <= p95["serve"]


def test_a_day_has_its_jobs_in_order_and_most_of_them_in_its_light_half() -> None:
    moments = simulation.day(Random(0), 2000, swing=0.8, bursts=3, burst_share=0.1, burst_s=60)
    assert len(moments) == 2000
    assert moments == sorted(moments)
    assert 0.65 < np.mean([9 * 3600 < at_s < 21 * 3600 for at_s in moments]) < 0.8


@pytest.mark.parametrize("number", [0, 1, 3.2, 99])
def test_a_number_becomes_what_serve_makes_of_it(number: float) -> None:
    """With no delays, which Serve takes by the real time."""
    config = AutoscalingConfig(min_replicas=1, max_replicas=LIMIT, upscale_delay_s=0, downscale_delay_s=0)
    told = model(least=1)
    wrapped = _apply_app_level_autoscaling_config(lambda contexts: ({"it": number}, {}))
    for running, target, requests in product((0, 1, 4), (0, 1, 4), (0.0, 2.0)):
        seen: dict[str, Any] = {"current_num_replicas": running, "target_num_replicas": target, "policy_state": {}}
        ctx = SimpleNamespace(**seen, total_num_requests=requests, config=config)
        theirs = max(1, min(LIMIT, wrapped({"it": ctx})[0]["it"]))
        app = App(told, by_serve, [])
        assert simulation._after_delays(app, ctx, number) == theirs


# -- the command


@pytest.mark.slow
def test_the_command_prints_what_it_found_and_draws_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capacity.main(
        ["fleets", "limits", "--per-day=200", "--burst=30", f"--chart={tmp_path}/x.png", f"--out={tmp_path}/x.json"]
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((tmp_path / "x.json").read_text())
    assert found["fleets"]["day"].keys() == found["fleets"]["burst_done_s"].keys() == FLEETS.keys()
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_what_gives_way_first_is_named_first_and_nothing_recovers() -> None:
    found = capacity.limits(capacity.parser().parse_args(["--gpus=4"]))
    most = list(found["edits_a_day_at_most"].values())
    assert most == sorted(most)
    beyond = [set(row["beyond"]) for row in found["volumes"].values()]
    assert all(fewer <= more for fewer, more in pairwise(beyond))
    assert found["volumes"]["10000"]["beyond"][0] == "GPU quota"


def test_the_document_has_the_figures_of_the_stored_run() -> None:
    """Cells without their units and thousands' commas."""
    found = json.loads(Path("benchmarks/results/capacity.json").read_text())
    cells = [
        [re.sub("[ s%,]+", "", cell) for cell in line.strip("|").split("|")]
        for line in Path("docs/scale.md").read_text().splitlines()
        if line.startswith("|")
    ]
    for name, row in found["fleets"]["day"].items():
        ours = [row["p50_s"], row["p95_s"], row["longest_s"], round(row["node_hours"]), round(100 * row["busy_share"])]
        done_s = found["fleets"]["burst_done_s"][name]
        assert [*map(str, ours), str(row["cents_an_edit"]), str(done_s)] in [line[1:] for line in cells], name
    for fleet, row in found["replicas"]["by_min_and_max_replicas"].items():
        least, most = fleet.split("..")
        shown = next(line[1:] for line in cells if line[0] == most and len(line) == 5)
        assert (shown[:2] if least == "0" else shown[2:]) == [str(row["p95_s"]), f"{row['cents_an_edit']:.2f}"]
    for rate, row in found["replicas"]["at_a_steady_rate"].items():
        assert [rate, str(row["replicas"]), str(row["p95_s"])] in cells
    for volume, kinds in found["cost"].items():
        ours = [f"{kinds[kind]['cents_an_edit']:.2f}" for kind in ("on_demand", "spot")]
        assert [volume, *ours] in [line[:3] for line in cells]
    for volume, row in found["limits"]["volumes"].items():
        assert [volume, *(str(row[name]) for name in list(row)[:3])] in [line[:4] for line in cells]


def test_an_unknown_question_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown: price"):
        capacity.main(["price"])
