"""Draws the figures: seconds a step, and how many times fewer FLOPs and seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

_RECIPE, _SERVICE, _FLOPS = "#9aa5b1", "#1f6feb", "#57a773"
_BAR = 0.38


def draw(scenarios: Mapping[str, Any], title: str, file: Path) -> None:
    """`scenarios` as `benchmarks.engine` prints them; the file's name says in which format."""
    figure, (seconds, ratios) = pyplot.subplots(1, 2, figsize=(11, 1.6 + 0.8 * len(scenarios)), layout="constrained")
    steps = {side: [one[side]["step_s"]["median"] for one in scenarios.values()] for side in ("recipe", "service")}
    _bars(
        seconds,
        scenarios,
        {"replaced recipe": (steps["recipe"], _RECIPE), "service": (steps["service"], _SERVICE)},
        "%.2f s",
    )
    seconds.set_xlabel("seconds per denoising step, all windows (median)")
    times = {key: [one[key] for one in scenarios.values()] for key in ("flops_ratio", "wall_ratio")}
    _bars(
        ratios,
        scenarios,
        {"FLOPs of an edit": (times["flops_ratio"], _FLOPS), "seconds of a step": (times["wall_ratio"], _SERVICE)},
        "%.2f x",
    )
    ratios.axvline(1, color="black", linewidth=0.8)
    ratios.set_xlabel("times fewer than the replaced recipe")
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _bars(axes: Any, names: Mapping[str, Any], series: Mapping[str, tuple[list[float], str]], text: str) -> None:
    """Two bars for each name, from the top down, in the order of the legend."""
    for number, (label, (values, color)) in enumerate(series.items()):
        places = [place + (number - 0.5) * _BAR for place in range(len(names))]
        bars = axes.barh(places, values, _BAR, label=label, color=color)
        axes.bar_label(bars, fmt=text, padding=3)
    axes.set_yticks(range(len(names)), list(names))
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=2, frameon=False)
