"""What an edit costs the engine, against the recipe that the service replaces, on the same weights in one process.

The recipe paints the whole frame at 1024, takes the prompt in words each time with both text encoders loaded, and runs
eagerly; on a GPU with CPU offload. Both compute in bfloat16, or in float32 on a CPU that only emulates bfloat16, and
are warmed up; seconds are medians. FLOPs are counted, of an edit of 28 steps whatever `--steps` says; with step caching
as if no step were cached. Without Ray.

`wall_ratio` compares steps alone. `job_ratio` compares whole edits, with text encoders, VAE and offload: with
`--steps 28` it says how many times faster than the replaced recipe an edit is.

On a CPU the two run by turns. On a GPU the recipe runs first, alone on the card: FLUX.1's transformer in Q8_0 takes
12.65 GB, two of them 25.3, and an L4 has 24.15. Afterwards the recipe is on the host, 23 GB of it with T5, and an
engine takes its turn, with at most 12.65 GB of weights and about 2 to paint with.

    python -m benchmarks.engine                                        # random weights, one block of each kind: a CPU
    python -m benchmarks.engine --double 19 --single 38 --device cuda --steps 28  # full size, still nothing downloaded
    python -m benchmarks.engine --weights real --device cuda --steps 28 --packing Q8_0
    python -m benchmarks.engine --memory                               # of a full-size replica, without the memory

Prints a table, the context as a line of JSON and, last, a JSON object keyed by scenario. `--out` gets both in one,
anew after each engine: a run that is broken off leaves what it had measured.

Scenarios `klein_*` are painted by FLUX.2 klein 4B, of as many blocks as the recipe's FLUX.1-Fill where that is not full
size, with random weights always. Their FLOPs are of an edit of its 4 steps; `full_size_flops_ratio` is of both at full
size.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from serve_app.engine.weights.fetch import Sources, Weights, fetch, fetch_text_encoders
from serve_app.models import BUILT_IN, Family
from serve_app.settings import Inference, Secrets, WeightsSettings

from .comparison import memory, number_type, synthetic
from .comparison.counts import Flops, KleinFlops
from .comparison.models import FULL, KLEIN_FULL, Shape
from .comparison.recipe import Recipe
from .comparison.runs import Contender, by_turns, compared, matmul_tflop_per_s
from .comparison.scenarios import FOR_CPU, SCENARIOS, Scenario
from .comparison.service import Service
from .context import machine

#: Wide enough for the table, where no terminal says how wide it is.
out = Console(width=None if sys.stdout.isatty() else 120)

_EDIT = Inference()
_KLEIN_STEPS = BUILT_IN["klein-4B"].steps or _EDIT.steps
_PACKAGES = ("torch", "diffusers", "transformers", "gguf")
#: Of the replica whose memory `--memory` tells, in pixels.
_FRAME_PX = 1024

#: What is printed last, and its context.
Found = tuple[dict[str, Any], dict[str, Any]]
#: By the size of the photo, (width, height) in pixels.
Recipes = Mapping[tuple[int, int], Contender]


def main() -> None:
    args = _arguments()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    before = os.getloadavg()
    for found, context in [_memory(args)] if args.memory else _measured(args):
        # Of 1, 5 and 15 minutes: what else ran.
        context["load_average"] = {"before": before, "after": os.getloadavg()}
        if args.out:
            args.out.write_text(json.dumps({**found, "context": context}, indent=2) + "\n")
    if args.chart:
        from .comparison.chart import draw

        draw(found, context["title"], args.chart)
    print(json.dumps({"context": context}))
    print(json.dumps(found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=("synthetic", "real"), default="synthetic")
    parser.add_argument("--packing", choices=("Q4_0", "Q5_K_S", "Q8_0"), default="Q4_0")
    parser.add_argument("--width", type=int, default=FULL.width, help="of a synthetic transformer")
    parser.add_argument("--double", type=int, default=1, help="its blocks of two streams; FLUX.1 has 19")
    parser.add_argument("--single", type=int, default=1, help="its blocks of one stream; FLUX.1 has 38")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--scenarios", type=lambda names: names.split(","), help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--runs", type=int, default=7, help="at most; of runs that take minutes there are fewer")
    parser.add_argument("--steps", type=int, default=2, help="of a measured edit")
    parser.add_argument("--memory", action="store_true", help="print a replica's peak memory instead")
    parser.add_argument("--folder", type=Path, help="where synthetic weights are written; a temporary one otherwise")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    parser.add_argument("--chart", type=Path, help="draw the figures into this file")
    args = parser.parse_args()
    known = [name for name, one in SCENARIOS.items() if args.weights == "synthetic" or one.family == "flux-fill"]
    args.scenarios = args.scenarios or [name for name in known if args.device == "cuda" or name in FOR_CPU]
    if unknown := set(args.scenarios) - set(known):
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.memory and args.chart:
        parser.error("--memory draws no chart")
    return args


def _measured(args: argparse.Namespace) -> Iterator[Found]:
    """After each engine, all that is known by then: what fails later, or takes too long, loses none of it."""
    device, shape = torch.device(args.device), _shape(args)
    dtype = number_type.of(device)
    flops = Flops(shape)
    sizes = flops.sizes()
    out.print(", ".join(f"{name} {weights / 1e6:,.1f} M" for name, weights in sizes.items()), "weights")
    scenarios = [_on(SCENARIOS[name], device) for name in args.scenarios]
    asked = _EDIT.model_copy(update={"steps": args.steps})
    matmul = matmul_tflop_per_s(device, dtype)
    found: dict[str, Any] = {}
    with _weights(args, shape, {one.family for one in scenarios}) as weights:
        recipe = Recipe(weights["flux-fill"], device, dtype)
        alone = _recipes(recipe, scenarios, asked) if device.type == "cuda" else {}
        by_turns(alone.values(), args.runs)
        for group in _by_engine(scenarios):
            service = Service(weights[group[0].family], group[0], device=device, dtype=dtype, threads=args.threads)
            service.warm_up(group)
            services = {one.name: service.contender(one, asked) for one in group}
            rivals = {} if alone else _recipes(recipe, group, asked)
            by_turns([*rivals.values(), *services.values()], args.runs)
            figures = _figures(group, alone or rivals, services, flops, asked, shape)
            for one in figures.values():
                one["service"]["share_of_matmul"] = round(one["service"]["tflop_per_s"] / matmul, 3)
            found |= figures
            service.close()
            yield found, _context(args, sizes, dtype, matmul)
    _show(found)


def _shape(args: argparse.Namespace) -> Shape:
    if args.weights == "real":
        return FULL
    return Shape(width=args.width, double=args.double, single=args.single, narrow_vae=args.device == "cpu")


def _klein(shape: Shape) -> Shape:
    return KLEIN_FULL if shape.is_full else shape


@contextmanager
def _weights(
    args: argparse.Namespace, shape: Shape, families: Collection[Family]
) -> Iterator[Mapping[Family, Weights]]:
    """FLUX.1-Fill's, whose `base` holds the text encoders, too, and those of the other `families`."""
    if args.weights == "real":
        variant, sources = BUILT_IN[args.packing], Sources.of(WeightsSettings(), Secrets.from_environment())
        asyncio.run(fetch_text_encoders(variant, sources))
        yield {"flux-fill": asyncio.run(fetch(variant, sources))}
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        written: dict[Family, Weights] = {"flux-fill": synthetic.write(Path(folder), shape, args.packing)}
        if "flux2-klein" in families:
            written["flux2-klein"] = synthetic.write_klein(Path(folder), _klein(shape), args.packing)
        yield written


def _on(scenario: Scenario, device: torch.device) -> Scenario:
    """On a GPU without `unpack`: compiled blocks unpack as they go, and 24 GB do not hold FLUX.1 unpacked."""
    if device.type == "cpu":
        return scenario
    return replace(scenario, optimizations=scenario.optimizations.model_copy(update={"unpack": False}))


def _by_engine(scenarios: Sequence[Scenario]) -> Collection[list[Scenario]]:
    """Those that one engine paints. Two engines need not fit on a device together."""
    groups = defaultdict(list)
    for one in scenarios:
        groups[one.family, one.optimizations, one.adaln_once, one.one_encode, one.repack].append(one)
    return groups.values()


def _recipes(recipe: Recipe, scenarios: Iterable[Scenario], asked: Inference) -> Recipes:
    """One for all scenarios whose photo is of the same size."""
    return {(one.width, one.height): recipe.contender(one, asked) for one in scenarios}


def _figures(
    scenarios: Iterable[Scenario],
    recipes: Recipes,
    services: Mapping[str, Contender],
    flops: Flops,
    asked: Inference,
    shape: Shape,
) -> dict[str, Any]:
    found = {}
    for one in scenarios:
        recipe, service = recipes[one.width, one.height], services[one.name]
        is_klein = one.family == "flux2-klein"
        counted = {"steps": asked.steps, "counted_steps": _EDIT.steps}
        own = {**counted, "counted_steps": _KLEIN_STEPS} if is_klein else counted
        of_service = KleinFlops(_klein(shape)) if is_klein else flops
        row = _row(one, recipe=recipe.figures(flops, **counted), service=service.figures(of_service, **own))
        if is_klein:
            sides = recipe.figures(Flops(FULL), **counted), service.figures(KleinFlops(KLEIN_FULL), **own)
            totals = [sum(side["tflop"].values()) for side in sides]
            row |= {"steps_of_flops": _KLEIN_STEPS, "full_size_flops_ratio": round(totals[0] / totals[1], 3)}
        found[one.name] = row
    return found


def _row(scenario: Scenario, **sides: dict[str, Any]) -> dict[str, Any]:
    return {
        **compared(**sides),
        "photo": f"{scenario.width}x{scenario.height}",
        "strategy": scenario.strategy,
        "optimizations": {
            **scenario.optimizations.model_dump(),
            "adaln_once": scenario.adaln_once,
            "one_encode": scenario.one_encode,
        },
        "repack": scenario.repack,
        **sides,
    }


def _show(found: Mapping[str, Any]) -> None:
    columns = ("scenario", "windows", "FLOPs", "job", "step", "recipe's step, s", "service's step, s", "of matmul")
    table = Table(*columns, title="Times cheaper than the recipe")
    for name, one in found.items():
        table.add_row(
            name,
            " ".join(one["service"]["windows"]),
            f"{one['flops_ratio']:.2f} x",
            f"{one['job_ratio']:.2f} x",
            f"{one['wall_ratio']:.2f} x",
            *(_spread(one[side]["step_s"]) for side in ("recipe", "service")),
            f"{one['service']['share_of_matmul']:.0%}",
        )
    out.print(table)


def _spread(step_s: Mapping[str, Any]) -> str:
    return f"{step_s['median']:.2f} ({step_s['min']:.2f}-{step_s['max']:.2f})"


def _context(args: argparse.Namespace, sizes: Mapping[str, int], dtype: torch.dtype, matmul: float) -> dict[str, Any]:
    on = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads"
    blocks = f"{FULL.double} + {FULL.single}" if args.weights == "real" else f"{args.double} + {args.single}"
    of, number = f"{blocks} blocks of width {args.width}", number_type.name(dtype)
    return {
        "title": f"{args.weights} weights, {of}, {args.packing}, {number}, on {on}",
        "device": on,
        "dtype": number,
        "threads": args.threads,
        "weights": args.weights,
        "packing": args.packing,
        "model_weights": sizes,
        "steps": args.steps,
        "steps_of_flops": _EDIT.steps,
        "most_runs": args.runs,
        "warm_up_edits_left_out": 2,
        "matmul_tflop_per_s": round(matmul, 3),
        **machine(_PACKAGES),
    }


def _memory(args: argparse.Namespace) -> Found:
    """Of a full-size replica. The check is of a model that a CPU runs in seconds."""
    replica = memory.tracked(FULL, args.packing, _FRAME_PX)
    small, dtype = Shape(width=1024, double=2, single=4), number_type.of(torch.device("cpu"))
    tracked = memory.tracked(small, args.packing, 256, dtype=dtype, on_cpu=True)
    measured = memory.measured(small, args.packing, 256, dtype=dtype)
    table = Table("what", "GB", title=f"A replica of FLUX.1-Fill {args.packing}, one {_FRAME_PX}x{_FRAME_PX} window")
    table.add_row("resident on the device", f"{replica.resident / 1e9:.2f}")
    table.add_row("peak on the device, loading", f"{replica.loading / 1e9:.2f}")
    table.add_row("peak on the device, painting", f"{replica.painting / 1e9:.2f}")
    table.add_row("modulation, on the host", f"{replica.host / 1e9:.2f}")
    table.add_row(
        f"a small model on a CPU in {number_type.name(dtype)}, painting: tracked", f"{tracked.painting / 1e9:.3f}"
    )
    table.add_row("the same, measured", f"{measured.painting / 1e9:.3f}")
    out.print(table)
    found = {
        "memory": {**asdict(replica), "packing": args.packing, "window": f"{_FRAME_PX}x{_FRAME_PX}"},
        "check": {"tracked": asdict(tracked), "measured": asdict(measured), "dtype": number_type.name(dtype)},
    }
    return found, machine(_PACKAGES)


if __name__ == "__main__":
    main()
