"""Where the marks of a report's charts go, in the pixels of an SVG; the page's template draws them."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from serve_app.audits import AuditRequest, Cell, CellResult, plain

from .sheets import title

WIDTH = 480
_LEFT, _RIGHT = 12, 468
_ROW = 46
#: Of the scatter.
_TOP, _BOTTOM, _INNER_LEFT = 16, 252, 56
#: Of a tick's text, at the size that narrow screens have.
_CHAR = 9.5
#: Colours and shapes that the page has; further variants take them again.
STYLES = 6


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """One cell."""

    name: str
    #: What it shows, in words.
    title: str
    x: float
    y: float
    style: int
    is_recommended: bool
    #: Whether no other cell of its steps, seed, prompt and crop beats it in both.
    is_pareto: bool = False


@dataclass(frozen=True, slots=True)
class Lane:
    """A variant's cells along the axis of seconds."""

    variant: str
    style: int
    y: float
    #: Of its median.
    x: float
    median_s: float
    marks: Sequence[Mark]


@dataclass(frozen=True, slots=True)
class Timings:
    height: float
    left: float
    right: float
    ticks: Sequence[Tick]
    lanes: Sequence[Lane]


@dataclass(frozen=True, slots=True)
class Scatter:
    """Seconds to the right, SSIM upwards."""

    left: float
    right: float
    top: float
    bottom: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[Mark]
    #: Variant and style, in the request's order.
    legend: Sequence[tuple[str, int]]
    #: An SVG path along the front of each combination of steps, seed, prompt and crop that has two cells; may be empty.
    front: str
    #: Of the least SSIM that the budget allows; None where that is outside.
    budget_y: float | None


def timings(request: AuditRequest, results: Sequence[CellResult], recommended: Collection[str]) -> Timings | None:
    """None where no cell was timed. `recommended`: names of cells."""
    timed = [result for result in results if result.wall_s is not None]
    if not timed:
        return None
    ticks, x_of = _axis(0.0, max(map(_seconds, timed)), _LEFT, _RIGHT)
    lanes: list[Lane] = []
    for style, variant in enumerate(request.matrix.variants):
        own = [result for result in timed if result.cell.variant == variant]
        if own:
            y, middle = _ROW * len(lanes) + 34.0, median(map(_seconds, own))
            marks = [_mark(request, r, x_of(_seconds(r)), y, style, recommended, f"{_seconds(r):.2f} s") for r in own]
            lanes.append(Lane(variant, style % STYLES, y, x_of(middle), middle, marks))
    return Timings(_ROW * len(lanes) + 36, _LEFT, _RIGHT, ticks, lanes)


def scatter(
    request: AuditRequest, results: Sequence[CellResult], recommended: Collection[str], pareto: Collection[str]
) -> Scatter | None:
    """None where less than two cells have both figures. The reference's SSIM is 1, as it is compared with itself."""
    found = [(r, ssim) for r in results if r.wall_s is not None and (ssim := ssim_of(request, r)) is not None]
    if len(found) < 2:
        return None
    seconds, heights = [_seconds(r) for r, _ in found], [ssim for _, ssim in found]
    y_ticks, y_of = _axis(min(heights), 1.0, _BOTTOM, _TOP)
    left = max(_INNER_LEFT, round(_LEFT + _CHAR * max(len(tick.text) for tick in y_ticks)))
    x_ticks, x_of = _axis(min(seconds), max(seconds), left, _RIGHT)
    marks = [
        _mark(
            request,
            r,
            x_of(_seconds(r)),
            y_of(ssim),
            request.matrix.variants.index(r.cell.variant),
            recommended,
            f"{_seconds(r):.2f} s, SSIM {ssim:.4f}",
            r.name in pareto,
        )
        for r, ssim in found
    ]
    budget_y = y_of(request.budget.min_ssim)
    used = {r.cell.variant for r, _ in found}
    return Scatter(
        left=left,
        right=_RIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        marks=marks,
        legend=[(name, i % STYLES) for i, name in enumerate(request.matrix.variants) if name in used],
        front=_fronts((r.cell, mark) for (r, _), mark in zip(found, marks, strict=True) if mark.is_pareto),
        budget_y=budget_y if _TOP <= budget_y <= _BOTTOM else None,
    )


def ssim_of(request: AuditRequest, result: CellResult) -> float | None:
    if result.cell.variant == request.reference_variant:
        return 1.0
    return result.compared.ssim if result.compared else None


def _seconds(result: CellResult) -> float:
    assert result.wall_s is not None
    return result.wall_s


def _mark(
    request: AuditRequest,
    result: CellResult,
    x: float,
    y: float,
    style: int,
    recommended: Collection[str],
    said: str,
    pareto: bool = False,
) -> Mark:
    cell = result.cell
    parts = (cell.variant, f"guidance {plain(cell.guidance_scale)}", title(request.matrix, cell))
    words = f"{', '.join(filter(None, parts))}: {said}"
    return Mark(result.name, words, x, y, style % STYLES, result.name in recommended, pareto)


def _axis(low: float, high: float, start: float, end: float) -> tuple[Sequence[Tick], Callable[[float], float]]:
    """Ticks at round numbers round [low, high], and where a value lies between `start` and `end`."""
    step = _round_step((high - low) or abs(high) or 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))

    def place(value: float) -> float:
        return round(start + (value / step - first) / (last - first) * (end - start), 2)

    return [Tick(place(n * step), f"{n * step:.{digits}f}") for n in range(first, last + 1)], place


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten; about five of them make `span`."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 5 * (1 - 1e-9))


def _fronts(cells: Iterable[tuple[Cell, Mark]]) -> str:
    groups = defaultdict(list)
    for cell, mark in cells:
        groups[cell.steps, cell.seed, cell.prompt, cell.crop].append(mark)
    return "".join(map(_front, groups.values()))


def _front(marks: Sequence[Mark]) -> str:
    """A staircase: what a second more buys comes only at the next cell of the front."""
    # Of two that are drawn at the same second, the one with less likeness was the faster.
    ordered = sorted(marks, key=lambda mark: (mark.x, -mark.y))
    if len(ordered) < 2:
        return ""
    first, *others = ordered
    return f"M{first.x} {first.y}" + "".join(f"H{mark.x}V{mark.y}" for mark in others)
