"""How many GPUs, at what price, and what gives way first: answers from a simulation of the app.

    python -m benchmarks.capacity [check] [fleets] [replicas] [cost] [limits] [--per-day 5000] [--p95 300] ...

`check` compares the simulation with what was measured of the real app (`benchmarks.burst`). `fleets` has the same day
for the autoscaling policy, Serve's own, a fixed fleet, and an autoscaler that sees the queue minutes late. `replicas`
finds the cheapest limits on replicas that hold `--p95`, and the fleet that does so at a steady rate. `cost` says what
an edit costs by the day's edits, `limits` what stands in the way up to ten million of them. Without a name: all.

Prints, last, a JSON object. `--chart FILE` draws `fleets`. docs/scale.md has the answers, and the sources
of the defaults.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from serve_app.jobs.backlog import Reading
from serve_app.settings import Scaling, Settings, Work

from .burst import ANSWERS, LATE_S, Sample
from .burst import figures as of_samples
from .burst import settings as burst_settings
from .context import machine
from .simulation import (
    PIXEL_THREADS,
    App,
    Decide,
    Model,
    Polling,
    by_policy,
    by_serve,
    constant,
    day,
    fixed,
    log_normal,
    steady,
)

RESULTS = Path(__file__).with_name("results")
#: As much of their time may GPUs of a large fleet be at work.
BUSY = 0.8
DAY_S = 86_400.0
#: `max_replicas` that are tried.
MOST = (8, 12, 16, 24, 32)
#: Edits of the days whose cost is simulated, and of those that are worked out.
VOLUMES = (100, 1_000, 10_000)
TO_TEN_MILLION = tuple(10**n for n in range(3, 8))
#: How long the first message of `benchmarks.burst` is ahead of the others, in seconds.
BURST_GAP_S = 0.3
#: Within which the simulation must agree with what was measured.
TOLERANCE = 0.15


# -- the model


def app_settings(args: argparse.Namespace, *, least: int = 0, most: int | None = None) -> Settings:
    """Everything that the flags do not name has its default."""
    most = max(least, most or args.max_replicas)
    served = {"definition": {"family": "pause", "pause_s": 1.0}, "min_replicas": least, "max_replicas": most}
    return Settings(variants={"L4": served}, ingress_replicas=args.ingress_replicas)


def model(args: argparse.Namespace, settings: Settings, **changed: Any) -> Model:
    stages = measured_stages_s("busy_share")
    usual = Model(
        settings=settings,
        job_s=log_normal(*args.job_s),
        start_s=log_normal(*args.start_s),
        warm_start_s=log_normal(*args.warm_start_s),
        decode_s=stages["prepare_s"],
        encode_s=stages["encode_s"],
        stores_s=stages["download_s"] + stages["upload_s"],
        standby_s=args.standby_s,
    )
    return replace(usual, **changed)


@cache
def measured_stages_s(scenario: str) -> Mapping[str, float]:
    """What `benchmarks.serving` measured of one job, outside the engine."""
    stages = json.loads((RESULTS / "serving.json").read_text())["stages_ms"][scenario]
    return {name: ms / 1000 for name, ms in stages.items()}


def a_day(args: argparse.Namespace, jobs: int | None = None) -> list[float]:
    """Messages of a day."""
    pattern = {"swing": args.swing, "bursts": args.bursts, "burst_share": args.burst_share, "burst_s": args.burst_s}
    return day(Random(args.seed), jobs or args.per_day, **pattern)


def figures(args: argparse.Namespace, app: App, jobs: int, price: float) -> dict[str, Any]:
    """Costs include the standing part of the cluster."""
    if len(app.latencies_s) != jobs:
        raise RuntimeError(f"{jobs - len(app.latencies_s)} of {jobs} jobs are not done: this fleet is too small")
    middle, p95 = np.percentile(app.latencies_s, (50, 95))
    cost = app.node_s / 3600 * price + app.for_s / 3600 * args.standing_price
    return {
        "p50_s": round(float(middle)),
        "p95_s": round(float(p95)),
        "longest_s": round(max(app.latencies_s)),
        "most_nodes": app.most_nodes,
        "node_hours": round(app.node_s / 3600, 1),
        "busy_share": round(app.busy_s / app.node_s, 3),
        "jobs_lost_and_repeated": app.lost,
        "cents_an_edit": round(100 * cost / jobs, 2),
    }


def simulated(app: App, for_s: float = DAY_S) -> App:
    """So long, and four hours for what is left then."""
    return app.run(for_s, 4 * 3600)


# -- the questions


def check(args: argparse.Namespace) -> dict[str, Any]:
    """The bursts of `benchmarks.burst`. Given, as measured, are what replicas took to start in the first of them, and
    what `benchmarks.serving` says of a job."""
    found = json.loads((RESULTS / "burst.json").read_text())
    compared: dict[str, Any] = {}
    for answers in ANSWERS:
        measured = found[answers]
        ours = of_samples(burst(found, answers), found["replicas"])
        names = ("all_running_s", "all_done_s", "none_wanted_s")
        compared[answers] = {name: {"measured": measured[name], "simulated": ours[name]} for name in names}
    pairs = [pair for figures in compared.values() for pair in figures.values()]
    off = max(abs(pair["simulated"] / pair["measured"] - 1) for pair in pairs)
    return {**compared, "largest_difference": round(off, 3), "within": TOLERANCE, "agrees": off <= TOLERANCE}


def burst(found: Mapping[str, Any], answers: str) -> list[Sample]:
    """Samples as of `benchmarks.burst`, by its clock, until no replica is left."""

    def reads(app: App) -> Reading | None:
        if answers == "exact":
            return app.exact()
        taken_at = app.now - (LATE_S if answers == "late" else 0.0)
        return None if answers == "absent" else Reading(messages=0.0, oldest_age_s=0.0, taken_at=taken_at)

    first = found[ANSWERS[0]]
    start_s = first["all_running_s"] - first["all_wanted_s"]
    stages = measured_stages_s("busy_share_1024")
    asleep = json.loads((RESULTS / "serving.json").read_text())["busy_share"]
    told = Model(
        settings=burst_settings(Path("/nonexistent"), found["replicas"]),
        job_s=constant(found["pause_s"] / asleep),
        start_s=constant(start_s),
        warm_start_s=constant(start_s),
        decode_s=stages["prepare_s"],
        encode_s=stages["encode_s"],
        stores_s=stages["download_s"] + stages["upload_s"],
        reads=reads,
        turn_s=0.1,
    )
    published_s = [0.0] + [BURST_GAP_S] * (found["messages"] - 1)
    series = App(told, by_policy, published_s).run(300.0).series
    shifted = [replace(one, at_s=one.at_s - BURST_GAP_S) for one in series if one.at_s >= BURST_GAP_S]
    end = next(i for i, one in enumerate(shifted) if not (one.wanted or one.running or one.messages))
    return shifted[: end + 1]


def fleets(args: argparse.Namespace) -> dict[str, Any]:
    """A day, and a burst of `burst` messages while nothing runs; the fixed fleet has as many nodes as the policy's had
    on the average of the day."""
    days = each_fleet(args, a_day(args), DAY_S)
    bursts = each_fleet(args, [0.0] * args.burst, 3 * 3600)
    policy = days["policy"]
    nodes = math.ceil(policy.node_s / policy.for_s)
    always = model(args, app_settings(args, least=nodes), running=nodes)
    days["fixed"] = simulated(App(always, fixed(nodes), a_day(args), args.seed))
    bursts["fixed"] = simulated(App(always, fixed(nodes), [0.0] * args.burst, args.seed), 3 * 3600)
    if args.chart:
        chart(days, bursts, args.chart)
    return {
        "day": {name: figures(args, app, args.per_day, args.price) for name, app in days.items()},
        "burst_done_s": {name: round(max(app.latencies_s)) for name, app in bursts.items()},
    }


def each_fleet(args: argparse.Namespace, published_s: Sequence[float], for_s: float) -> dict[str, App]:
    told = model(args, app_settings(args))
    each: dict[str, Decide] = {"policy": by_policy, "serve": by_serve, "polling": Polling(args.job_s[0])}
    return {name: simulated(App(told, one, published_s, args.seed), for_s) for name, one in each.items()}


def replicas(args: argparse.Namespace) -> dict[str, Any]:
    """Of fleets from zero, and of fleets that always run, up to so many."""
    moments = a_day(args)
    by_fleet: dict[str, Any] = {}
    for least, most in [fleet for number in MOST for fleet in ((0, number), (number, number))]:
        told = model(args, app_settings(args, least=least, most=most), running=least)
        app = simulated(App(told, by_policy, moments, args.seed))
        by_fleet[f"{least}..{most}"] = figures(args, app, len(moments), args.price)
    held = [(row["cents_an_edit"], fleet) for fleet, row in by_fleet.items() if row["p95_s"] <= args.p95]
    return {
        "p95_s": args.p95,
        "by_min_and_max_replicas": by_fleet,
        "cheapest_that_holds": min(held)[1] if held else None,
        "at_a_steady_rate": {f"{rate:g}": for_steady(args, rate) for rate in args.per_hour},
    }


def for_steady(args: argparse.Namespace, per_hour: float) -> dict[str, Any]:
    """The smallest fleet of replicas that always run, by simulation."""
    moments = steady(Random(args.seed), per_hour, hours=min(48.0, 10_000 / per_hour))
    least = max(1, math.ceil(per_hour / 3600 * args.job_s[0]))
    for number in range(least, 10 * least + 10):
        told = model(args, app_settings(args, least=number, most=number), running=number, turn_s=60.0)
        app = App(told, fixed(number), moments, args.seed).run(moments[-1], 4 * 3600)
        if len(app.latencies_s) == len(moments) and (p95 := float(np.percentile(app.latencies_s, 95))) <= args.p95:
            return {"replicas": number, "p95_s": round(p95)}
    raise SystemExit(f"no fleet holds {args.p95} s: a job alone takes longer")


def cost(args: argparse.Namespace) -> dict[str, Any]:
    return {str(volume): for_volume(args, volume) for volume in VOLUMES}


def for_volume(args: argparse.Namespace, volume: int) -> dict[str, Any]:
    """On demand and on spot, with as many replicas as the day can use."""
    moments = a_day(args, volume)
    most = max(4, math.ceil(4 * volume * args.job_s[0] / DAY_S))
    losses = {"on_demand": (args.price, 0.0), "spot": (args.spot_price, args.losses_per_hour)}
    found = {}
    for kind, (price, losses_per_hour) in losses.items():
        told = model(args, app_settings(args, most=most), losses_per_hour=losses_per_hour)
        app = simulated(App(told, by_policy, moments, args.seed))
        found[kind] = figures(args, app, volume, price)
    return found


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """By arithmetic: no simulation is this large. The busiest hour has 1 + `swing` times the mean."""
    rates = {name: rate * DAY_S / (1 + args.swing) for name, rate in edits_per_s(args).items()}
    volumes = {}
    for volume in TO_TEN_MILLION:
        peak = volume / DAY_S * (1 + args.swing)
        busy_hours = volume * args.job_s[0] / 3600
        volumes[str(volume)] = {
            "l4s_in_the_busiest_hour": math.ceil(peak * args.job_s[0] / BUSY),
            "dollars_a_day": round(busy_hours / BUSY * args.price + 24 * args.standing_price),
            "ingress_replicas": math.ceil(peak / edits_per_s(args)["pixel threads of one ingress"]),
            "job_writes_a_second": round(peak * job_writes(args), 1),
            "gigabits_a_second": round(peak * args.edit_mb * 8 / 1000, 2),
            "beyond": [name for name, most in sorted(rates.items(), key=lambda one: one[1]) if volume > most],
        }
    most = {name: round(rate) for name, rate in sorted(rates.items(), key=lambda one: one[1])}
    return {"edits_a_day_at_most": most, "volumes": volumes}


def edits_per_s(args: argparse.Namespace) -> dict[str, float]:
    """What each part of the app can do."""
    stages, seconds = measured_stages_s("busy_share"), args.job_s[0]
    ingress = PIXEL_THREADS / (stages["prepare_s"] + stages["encode_s"])
    return {
        "max_replicas": args.max_replicas / seconds,
        "GPU quota": args.gpus / seconds,
        "max_replicas that settings allow": most_of(Scaling, "max_replicas") / seconds,
        "pixel threads of one ingress": ingress,
        "pixel threads of the ingresses that settings allow": ingress * most_of(Settings, "ingress_replicas"),
        "writes of jobs": args.store_writes / job_writes(args),
        "network of one CPU node": args.network_gbps * 1000 / 8 / args.edit_mb,
    }


def most_of(settings: type[Any], name: str) -> int:
    """The upper bound of a setting."""
    return int(next(rule.le for rule in settings.model_fields[name].metadata if hasattr(rule, "le")))


def job_writes(args: argparse.Namespace) -> float:
    """Writes of one edit to the jobs themselves: claimed, confirmed before the upload, finished, others told, and
    its renewals. Its progress, and the session's document, are kept apart."""
    return 4 + float(args.job_s[0] // Work().renew_s)


# -- the command


TITLES = {
    "policy": "the app's policy",
    "serve": "Serve's own policy",
    "polling": "an autoscaler that sees the queue minutes late",
    "fixed": "a fixed fleet",
}


def chart(days: Mapping[str, App], bursts: Mapping[str, App], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape: dict[str, Any] = {"sharex": "col", "sharey": "col", "width_ratios": (3, 1), "layout": "constrained"}
    figure, rows = pyplot.subplots(len(days), 2, figsize=(11, 9), **shape)
    for (of_day, of_burst), (name, title) in zip(rows, TITLES.items(), strict=True):
        p95_s, done_s = np.percentile(days[name].latencies_s, 95), max(bursts[name].latencies_s)
        _draw(of_day, days[name].series[::20], f"{title}: p95 {p95_s:.0f} s", 3600)
        _draw(of_burst, [one for one in bursts[name].series if one.at_s < 3600], f"done in {done_s:.0f} s", 60)
    rows[0][0].legend(loc="upper left")
    rows[-1][0].set(xlabel="hours of a day", xlim=(0, 25))
    rows[-1][1].set(xlabel="minutes after a burst while nothing ran", xlim=(0, 60))
    figure.savefig(path, dpi=70)


def _draw(axes: Any, series: Sequence[Sample], title: str, unit_s: float) -> None:
    at = [one.at_s / unit_s for one in series]
    axes.step(at, [one.running for one in series], where="post", label="replicas that run")
    axes.set(ylabel="replicas", ylim=(0, None), title=title)
    queue = axes.twinx()
    queue.plot(at, [one.messages for one in series], color="gray", linewidth=0.8)
    queue.set(ylabel="messages (gray)", ylim=(0, None))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pair: dict[str, Any] = {"nargs": 2, "type": float, "metavar": ("MEDIAN", "P95")}
    made.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)}; all by default")
    made.add_argument("--per-day", type=int, default=5000, help="edits of the day that is simulated")
    made.add_argument("--p95", type=float, default=300.0, help="seconds within which 95 in 100 edits must be done")
    made.add_argument("--per-hour", nargs="+", type=float, default=(50.0, 200.0, 800.0, 3200.0), help="steady rates")
    made.add_argument("--burst", type=int, default=200, help="messages of a burst while nothing runs")
    made.add_argument("--swing", type=float, default=0.8, help="of the day's sine, as a share of its mean")
    made.add_argument("--bursts", type=int, default=4, help="of a day")
    made.add_argument("--burst-share", type=float, default=0.1, help="of a day's edits that come in bursts")
    made.add_argument("--burst-s", type=float, default=60.0, help="for which a burst lasts")
    made.add_argument("--job-s", **pair, default=(40.0, 60.0), help="a replica's work on an edit")
    made.add_argument("--start-s", **pair, default=(240.0, 540.0), help="until a replica runs on a new node")
    made.add_argument("--warm-start-s", **pair, default=(60.0, 120.0), help="and on a node that stands by")
    made.add_argument("--standby-s", type=float, default=600.0, help="for which a node without a replica stays")
    made.add_argument("--max-replicas", type=int, default=12)
    made.add_argument("--ingress-replicas", type=int, default=2)
    made.add_argument("--gpus", type=int, default=8, help="the quota")
    made.add_argument("--price", type=float, default=0.854, help="of an L4 node's hour, in dollars")
    made.add_argument("--spot-price", type=float, default=0.341)
    made.add_argument("--standing-price", type=float, default=0.636, help="of an hour of what always runs")
    made.add_argument("--losses-per-hour", type=float, default=0.05, help="of one spot node")
    made.add_argument("--store-writes", type=float, default=500.0, help="that the jobs' collection takes in a second")
    made.add_argument("--network-gbps", type=float, default=16.0, help="of a CPU node")
    made.add_argument("--edit-mb", type=float, default=12.0, help="that are downloaded and uploaded for an edit")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    made.add_argument("--chart", type=Path, metavar="FILE", help="draw `fleets`")
    return made


def main(given: Sequence[str] | None = None) -> None:
    args = parser().parse_args(given)
    asked = args.questions or list(QUESTIONS)
    if unknown := set(asked) - QUESTIONS.keys():
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    found = {**{name: QUESTIONS[name](args) for name in asked}, **machine(("ray", "simpy"))}
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


QUESTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "check": check, "fleets": fleets, "replicas": replicas, "cost": cost, "limits": limits,
}  # fmt: skip


if __name__ == "__main__":
    main()
