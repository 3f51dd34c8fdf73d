"""A report's charts: matplotlib draws them as SVG, and the page lends its colours, for light and dark, and its type."""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import StringIO
from statistics import median
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...parameters import AuditRequest, plain
from ..recommend import combination, nearness
from ..record import CellResult
from .sheets import title

#: By style: matplotlib's name, and the character nearest to it. Further variants take them again.
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"))
#: Colours of the page's style sheet, each with the one that stands for it in matplotlib's SVG.
_COLOURS = {
    name: f"#{n:06x}"
    for n, name in enumerate(["ink", "soft", "rule", "paper", "alarm", *(f"style{n}" for n in range(6))])
}
_VARIABLES = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}
#: The room for texts is what they take on a phone, where the page has them largest.
_TEXT = 16
#: What HTML does without, and a style sheet that the Content-Security-Policy forbids.
_NOT_INLINE = re.compile(
    r' xmlns(:xlink)?="[^"]*"|xlink:(?=href)|<metadata>.*?</metadata>|<style.*?</style>', re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Scatter:
    svg: Markup
    #: Variant, style and character, in the request's order.
    legend: Sequence[tuple[str, int, str]]


# Ids are hashes: each chart has its own, and the same every time.
@rc_context({"font.size": _TEXT, "svg.fonttype": "none", "svg.hashsalt": "timings"})
def timings(request: AuditRequest, results: Sequence[CellResult], recommended: Collection[str]) -> Markup | None:
    """A lane of cells for each variant. None where no cell was timed. `recommended`: names of cells."""
    timed = [(result, result.wall_s) for result in results if result.wall_s is not None]
    used = {result.cell.variant for result, _ in timed}
    lanes = {variant: y for y, variant in enumerate(name for name in request.matrix.variants if name in used)}
    if not lanes:
        return None
    axes = _axes(50 + 50 * len(lanes))
    medians = {name: median(seconds for result, seconds in timed if result.cell.variant == name) for name in lanes}
    for variant, y in lanes.items():
        colour = _COLOURS[f"style{_style(request, variant)}"]
        axes.plot([0, medians[variant]], [y, y], color=colour, alpha=0.3, linewidth=3, solid_capstyle="butt")
        place, label = axes.get_yaxis_transform(), variant if len(variant) <= 32 else f"{variant[:31]}…"
        for x, side, weight, text in ((0, "left", 700, label), (1, "right", 400, f"{medians[variant]:.2f} s")):
            axes.text(x, y - 0.2, text, ha=side, weight=weight, transform=place, in_layout=False)
    for result, seconds in timed:
        at = seconds, lanes[result.cell.variant]
        _mark(axes, request, result, at, f"{seconds:.2f} s", result.name in recommended, fill=0.55)
    axes.set(xlim=(0, None), ylim=(len(lanes) - 0.7, -0.65), yticks=())
    said = ", ".join(f"{variant} {middle:.2f}" for variant, middle in medians.items())
    return _svg(axes, "timings-chart", f"Wall seconds by variant: {said} (medians)")


@rc_context({"font.size": _TEXT, "svg.fonttype": "none", "svg.hashsalt": "scatter"})
def scatter(
    request: AuditRequest, results: Sequence[CellResult], recommended: Collection[str], pareto: Collection[str]
) -> Scatter | None:
    """Seconds to the right, SSIM upwards, and a line along the front of each combination of steps, seed, prompt and
    crop. None where less than two cells have both figures. The reference's SSIM is 1, as it is compared with itself.
    """
    # Finer differences would be ticks with more digits than a chart has room for.
    found = [
        (result, round(result.wall_s, 6), round(ssim, 6))
        for result in results
        if result.wall_s is not None and (ssim := nearness(request, result)) is not None
    ]
    if len(found) < 2:
        return None
    axes, fronts = _axes(290), defaultdict(list)
    for result, seconds, ssim in found:
        is_pareto, said = result.name in pareto, f"{seconds:.2f} s, SSIM {ssim:.4f}"
        _mark(axes, request, result, (seconds, ssim), said, result.name in recommended, fill=float(is_pareto))
        if is_pareto:
            fronts[combination(result.cell)].append((seconds, ssim))
    for front in fronts.values():
        # A staircase: what a second more buys comes only at the next cell of the front.
        if len(front) > 1:
            xs, ys = zip(*sorted(front), strict=True)
            axes.plot(xs, ys, drawstyle="steps-post", color=_COLOURS["soft"], linewidth=1.5, zorder=1.5, gid="front|")
    (bottom, top), budget = axes.get_ylim(), request.budget.min_ssim
    if bottom <= budget <= top:
        axes.axhline(budget, color=_COLOURS["alarm"], linewidth=1, dashes=(5, 4), zorder=1.5, gid="budget|")
        axes.text(1, budget, f"budget {budget}", ha="right", va="bottom", transform=axes.get_yaxis_transform())
    legend = [(name, (style := _style(request, name)), _MARKERS[style][1]) for name in request.matrix.variants]
    used = {result.cell.variant for result, *_ in found}
    svg = _svg(axes, "scatter-chart", "Seconds against SSIM; the Pareto front is listed below")
    return Scatter(svg, [key for key in legend if key[0] in used])


def _axes(height: float) -> Axes:
    """Nothing but a grid, and its numbers in full."""
    axes = Figure((480 / 72, height / 72), layout="constrained").subplots()
    axes.set(xlabel="seconds", axisbelow=True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(color=_COLOURS["rule"])
    axes.ticklabel_format(useOffset=False, style="plain")
    axes.locator_params(nbins=5)
    return axes


def _style(request: AuditRequest, variant: str) -> int:
    return request.matrix.variants.index(variant) % len(_MARKERS)


def _mark(
    axes: Axes,
    request: AuditRequest,
    result: CellResult,
    at: tuple[float, float],
    said: str,
    is_chosen: bool,
    *,
    fill: float,
) -> None:
    """`fill` is how opaque it is; 1 on the Pareto front, 0 beside it."""
    cell, style = result.cell, _style(request, result.cell.variant)
    colour = _COLOURS[f"style{style}"]
    parts = (cell.variant, f"guidance {plain(cell.guidance_scale)}", title(request.matrix, cell))
    classes = f"mark{' pareto' * (fill == 1)}{' chosen' * is_chosen}"
    axes.plot(
        *([value] for value in at),
        linestyle="",
        marker=_MARKERS[style][0],
        markersize=11,
        markerfacecolor=(colour, fill) if fill else _COLOURS["paper"],
        markeredgecolor=_COLOURS["ink"] if is_chosen else colour,
        markeredgewidth=2.5 if is_chosen else 1.5,
        clip_on=False,
        zorder=2.5 if is_chosen else 2,
        gid=f"{classes}|{result.name}|{', '.join(filter(None, parts))}: {said}",
    )


def _svg(axes: Axes, name: str, words: str) -> Markup:
    """An element for a page; `words` are for who cannot see it. A mark's gid is its classes, its cell and its title."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(file := StringIO(), format="svg", transparent=True)
    svg = ElementTree.fromstring(_NOT_INLINE.sub("", file.getvalue()))
    for element in svg.iter():
        for declaration in filter(None, element.attrib.pop("style", "").split("; ")):
            key, value = declaration.split(": ")
            if key != "font-family":
                element.set(key, _VARIABLES.get(value, value))
        classes, *about = element.get("id", "").split("|")
        if about:
            element.set("class", classes)
        if len(about) == 2:
            element.set("data-cell", about[0])
            (said := ElementTree.Element("title")).text = about[1]
            element.insert(0, said)
        # The numbers that matplotlib gives are not this page's only ones.
        if about or "_" in classes:
            del element.attrib["id"]
    svg.attrib = {"id": name, "viewBox": svg.attrib["viewBox"], "role": "img", "aria-label": words}
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
