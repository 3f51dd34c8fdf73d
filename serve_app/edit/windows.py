"""From a mask to the windows to paint.

The model paints windows of a few fixed sizes, the buckets. A plan says which part of the photo (the region) is shown
on a canvas, at which scale, and which windows of that canvas are painted. Nothing is ever enlarged. Every masked pixel
is shown by some window with `context_px` pixels of surroundings at working scale, from which the model learns what
belongs there, or up to the photo's edge; what counts as masked is widened by `feather_px` photo pixels, which are
blended. Pixels that were added to the mask as it was drawn take from the context, down to half of it, so that a mask
that grows costs as much as before. Below the photo's own scale, rounding to pixels may take 2 px of the context.

    crop      One window round the mask, at the finest scale at which a bucket holds it, in the cheapest such bucket.
    resize    One window that shows the whole frame: the recipe this service replaces, where the largest bucket is
              1024 x 1024. Turns everything else here off.
    original  The finest scale at which at most `max_windows` windows cover the mask; as few of them as will do.
    auto      The finest scale at which the windows that cover the mask cost at most `budget_tflop` together, and there
              the cheapest windows. Never coarser than `resize`; at that scale the cheapest windows, whatever they cost.
              Each window after the first costs `window_overhead_tflop` beside its own FLOPs.

Scales go up to the photo's own, or as far as the canvas, which holds all windows, has at most `MAX_CANVAS_PX` pixels.
`cover.Search` finds the windows at a scale, `cost` says what one costs, with the variant's prompt tokens. Cover that a
mask has at some scale also covers it at every coarser one, so the finest scale is found by bisection, to 3%. The
strategies' names are IOPaint's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf

import cv2

from ..models import Box, Family, Pixels
from ..parameters import CropStrategy
from ..settings import WindowSettings
from .cost import TEXT_TOKENS, planned_tflop
from .cover import ROUNDING_PX, Axis, Bucket, Search, Shown
from .grid import Cells, Span

#: Of a canvas, which is sent to a replica and copied there: 48 MB, and any photo of 12 megapixels at its own scale.
MAX_CANVAS_PX = 16_000_000

#: How near bisection comes to the finest scale.
_NEAR = 1.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the canvas shows, and the windows to paint on it."""

    #: The one that was asked for.
    strategy: CropStrategy
    #: The part of the photo that the canvas shows, in photo pixels, inside the photo.
    region: Box
    #: (width, height) in canvas pixels.
    canvas_size: tuple[int, int]
    #: (width, height) of the canvas's top left part that shows the region, at the region's aspect ratio up to rounding
    #: and never larger than it. The rest is padding: the photo is smaller than the bucket or of another aspect.
    content_size: tuple[int, int]
    #: In canvas pixels, in painting order; each is a bucket size and inside the canvas. Sizes may differ.
    windows: tuple[Box, ...]


def plan(
    mask: Pixels,
    strategy: CropStrategy,
    settings: WindowSettings,
    *,
    grown_px: int = 0,
    text_tokens: int = TEXT_TOKENS,
    family: Family = "flux-fill",
) -> Plan | None:
    """The windows to paint for `mask`, uint8 `[height, width]` at the photo's size, 0 where the photo is kept, grown
    by `grown_px`; by a variant of `family` whose prompts have so many tokens.

    None for an empty mask. The module's docstring gives each strategy's rule.
    """
    if bounding_box(mask) is None:
        return None
    cells = Cells(mask, settings.feather_px, grown_px)
    tflop = {bucket: planned_tflop(*bucket, family=family, text_tokens=text_tokens) for bucket in settings.buckets}
    return _laid_out(cells, _STRATEGIES[strategy](cells, settings, tflop), strategy)


def bounding_box(mask: Pixels) -> Box | None:
    """The smallest box with every pixel of `mask` that is not 0; None where there is none."""
    x, y, width, height = cv2.boundingRect(mask)
    return Box(x0=x, y0=y, x1=x + width, y1=y + height) if width else None


def grown(box: Box, px: int, shape: tuple[int, ...]) -> Box:
    """The box and `px` pixels on each side of it, as far as an array of `shape`, height first, goes."""
    height, width = shape[:2]
    corner = {"x0": max(box.x0 - px, 0), "y0": max(box.y0 - px, 0)}
    return Box(**corner, x1=min(box.x1 + px, width), y1=min(box.y1 + px, height))


@dataclass(frozen=True, slots=True)
class _Cover:
    """Canvas pixels a photo pixel, and what each window shows."""

    scale: float
    windows: Sequence[Shown]


#: TFLOP of a window's step, as `cost.planned_tflop` has them.
_Tflop = Mapping[Bucket, float]


def _crop(cells: Cells, settings: WindowSettings, tflop: _Tflop) -> _Cover:
    return _in_one(cells, cells.reach, settings.context_px, tflop)


def _resize(cells: Cells, _: WindowSettings, tflop: _Tflop) -> _Cover:
    return _in_one(cells, ((0, cells.size[0]), (0, cells.size[1])), 0, tflop)


def _original(cells: Cells, settings: WindowSettings, tflop: _Tflop) -> _Cover:
    # 1 a window, and so little for its TFLOP that they decide only between as many.
    prices = {bucket: 1 + tflop[bucket] / 1e6 for bucket in tflop}
    return _finest(cells, settings, prices, settings.max_windows + 0.5, _crop(cells, settings, tflop))


def _auto(cells: Cells, settings: WindowSettings, tflop: _Tflop) -> _Cover:
    further = settings.window_overhead_tflop
    prices = {bucket: tflop[bucket] + further for bucket in tflop}
    cheapest = _at(cells, settings, prices, inf, _resize(cells, settings, tflop).scale)
    assert cheapest is not None, "one window shows the whole frame at this scale"
    # Every price has `further` in it, which the first window does not cost.
    return _finest(cells, settings, prices, settings.budget_tflop + further, cheapest)


_STRATEGIES: Mapping[CropStrategy, Callable[[Cells, WindowSettings, _Tflop], _Cover]] = {
    CropStrategy.AUTO: _auto,
    CropStrategy.CROP: _crop,
    CropStrategy.RESIZE: _resize,
    CropStrategy.ORIGINAL: _original,
}


def _in_one(cells: Cells, shown: tuple[Span, Span], context_px: int, tflop: _Tflop) -> _Cover:
    """One window that shows these photo pixels, at the finest scale that any bucket allows."""
    windows = [Shown(x=shown[0], y=shown[1], bucket=bucket) for bucket in sorted(tflop, key=lambda b: tflop[b])]
    # The first of those with the finest scale is the cheapest.
    best = max(windows, key=lambda window: _finest_scale(cells, window, context_px))
    return _Cover(_finest_scale(cells, best, context_px), [best])


def _finest_scale(cells: Cells, window: Shown, context_px: int) -> float:
    """Up to which the window shows what it should."""
    x, y = (Axis(length, context_px, cells.grown_px) for length in cells.size)
    return min(x.finest(window.x, window.bucket[0]), y.finest(window.y, window.bucket[1]))


def _at(
    cells: Cells, settings: WindowSettings, prices: Mapping[Bucket, float], limit: float, scale: float
) -> _Cover | None:
    """The best cover for at most `limit` that there is at `scale`, at the finest scale that its windows allow where
    the canvas may be that large. None where there is none, or its canvas is too large at `scale`, too."""
    context_px = settings.context_px if scale == 1 else max(settings.context_px, ROUNDING_PX)
    windows = Search(cells, prices, context_px, scale).best(limit)
    if windows is None:
        return None
    covers = (_Cover(at, windows) for at in (min(_finest_scale(cells, w, context_px) for w in windows), scale))
    return next((cover for cover in covers if _canvas_px(cells, cover) <= MAX_CANVAS_PX), None)


def _canvas_px(cells: Cells, cover: _Cover) -> int:
    x, y = _rows(cells, cover)
    return x.canvas * y.canvas


def _finest(
    cells: Cells, settings: WindowSettings, prices: Mapping[Bucket, float], limit: float, coarsest: _Cover
) -> _Cover:
    """The cover for at most `limit` at the finest scale; `coarsest` where there is none finer."""
    best, scale, too_fine = coarsest, 1.0, 1.0
    while best.scale < scale:
        if found := _at(cells, settings, prices, limit, scale):
            best = found
        else:
            too_fine = scale
        if best.scale * _NEAR >= too_fine:
            break
        scale = (best.scale * too_fine) ** 0.5
    return best


@dataclass(frozen=True, slots=True)
class _Row:
    """One axis of a plan: photo pixels `start` to `start + extent` on `content` canvas pixels, and where the windows
    begin on the canvas."""

    start: int
    extent: int
    content: int
    canvas: int
    offsets: Sequence[int]


def _row(length: int, scale: float, windows: Sequence[tuple[Span, int]]) -> _Row:
    """Each window, of `side` pixels, with what it shows in its middle, shifted where the photo ends; and between the
    outermost windows' outer sides all that the canvas shows of the photo's `length` pixels."""
    frame = round(length * scale)
    begins = [
        min(max(floor(((first + end) * scale - side) / 2), 0), max(frame - side, 0)) for (first, end), side in windows
    ]
    begin, stop = min(begins), max(begin + side for begin, (_, side) in zip(begins, windows, strict=True))
    first, end = min(span[0] for span, _ in windows), max(span[1] for span, _ in windows)
    # A window at the frame's edge shows the photo's last pixel, whatever rounding says.
    extent = length if begin == 0 and stop >= frame else min(length, max(round((stop - begin) / scale), end - first))
    start = length - extent if stop >= frame else round(begin / scale)
    start = max(min(start, first, length - extent), end - extent)
    content = max(1, round(extent * scale))
    canvas = max(content, *(side for _, side in windows))

    def offset(span: Span, side: int) -> int:
        before, after = (span[0] - start) * content // extent, -((start - span[1]) * content // extent)
        return min(max((before + after - side) // 2, 0), canvas - side)

    return _Row(start, extent, content, canvas, [offset(span, side) for span, side in windows])


def _rows(cells: Cells, cover: _Cover) -> tuple[_Row, _Row]:
    return (
        _row(cells.size[0], cover.scale, [(w.x, w.bucket[0]) for w in cover.windows]),
        _row(cells.size[1], cover.scale, [(w.y, w.bucket[1]) for w in cover.windows]),
    )


def _laid_out(cells: Cells, cover: _Cover, strategy: CropStrategy) -> Plan:
    x, y = _rows(cells, cover)
    corners = zip(x.offsets, y.offsets, (w.bucket for w in cover.windows), strict=True)
    boxes = [Box(x0=x0, y0=y0, x1=x0 + width, y1=y0 + height) for x0, y0, (width, height) in corners]
    return Plan(
        strategy=strategy,
        region=Box(x0=x.start, y0=y.start, x1=x.start + x.extent, y1=y.start + y.extent),
        canvas_size=(x.canvas, y.canvas),
        content_size=(x.content, y.content),
        windows=tuple(sorted(boxes, key=_sweep(x.canvas >= y.canvas))),
    )


def _sweep(is_wide: bool) -> Callable[[Box], tuple[int, int]]:
    """Sorts windows along the longer side of the canvas, so that most begin where the one before has ended."""
    if is_wide:
        return lambda box: (box.x0 + box.x1, box.y0 + box.y1)
    return lambda box: (box.y0 + box.y1, box.x0 + box.x1)
