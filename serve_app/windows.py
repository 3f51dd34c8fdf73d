"""From a mask to the windows to paint.

The model paints windows of a few fixed sizes, the buckets. A plan says which part of the photo (the region) is shown
on a canvas, at which scale, and which windows of that canvas are painted. Nothing is ever enlarged. What must be
shown is the mask's bounding box, widened by `feather_px` photo pixels, which are blended, and by `context_px` pixels
at working scale, from which the model learns what belongs there. Where that meets an edge of the photo it is shifted,
not cut.

    crop      One window round the mask, in the bucket of the smallest area that holds it at the photo's own scale;
              where none does, the region is scaled down just enough to fit one. Most detail for one window's cost;
              the model sees only the surroundings.
    resize    One window that shows the whole frame: its longest side is at most the largest bucket's, in the smallest
              bucket that holds it. The model sees everything, and a large photo loses detail where it is painted.
    original  The photo's own scale: a grid of windows of one bucket size over the mask and its context, neighbours
              overlapping by at least the context, in reading order, without those that have no mask. The fewest
              windows, then the smallest area. Where that takes more than `max_windows`, the finest scale at which
              some grid just fits and takes no more. Full detail; the cost grows with the mask, and no window sees
              the whole.
    auto      `crop` where its region is smaller than the frame (more detail, or less cost), else `resize`.

The strategies' names are IOPaint's. Scales are fractions, so no rounding decides what fits.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np
import numpy.typing as npt

from .images import Pixels
from .messages import CropStrategy
from .settings import WindowSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """Pixels `x0 <= x < x1`, `y0 <= y < y1`."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of these pixels in an array `[height, width, ...]`."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the canvas shows, and the windows to paint on it."""

    #: The one that was used: never `auto`.
    strategy: CropStrategy
    #: The part of the photo that the canvas shows, in photo pixels, inside the photo.
    region: Box
    #: (width, height) in canvas pixels.
    canvas_size: tuple[int, int]
    #: (width, height) of the canvas's top left part that shows the region, at the region's aspect ratio up to rounding
    #: and never larger than it. The rest is padding: the photo is smaller than the bucket or of another aspect.
    content_size: tuple[int, int]
    #: In canvas pixels, in painting order; each is a bucket size and inside the canvas.
    windows: tuple[Box, ...]


def plan(mask: Pixels, strategy: CropStrategy, settings: WindowSettings) -> Plan | None:
    """The windows to paint for `mask`, uint8 `[height, width]` at the photo's size, 0 where the photo is kept.

    None for an empty mask. The module's docstring gives each strategy's rule.
    """
    box = bounding_box(mask)
    return _STRATEGIES[strategy](mask, box, settings) if box else None


def bounding_box(mask: Pixels) -> Box | None:
    """The smallest box with every pixel of `mask` that is not 0; None where there is none."""
    x, y, width, height = cv2.boundingRect(mask)
    return Box(x0=x, y0=y, x1=x + width, y1=y + height) if width else None


@dataclass(frozen=True, slots=True)
class _Row:
    """One dimension of a plan: windows of `side` canvas pixels in a row over a stretch of the photo."""

    #: Photo pixels: where the region starts, and how long it is.
    start: int
    extent: int
    #: Canvas pixels.
    content: int
    canvas: int
    side: int
    offsets: tuple[int, ...]

    def in_photo(self, reach_px: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First and end photo pixel of what each window shows, rounded outward and widened by `reach_px`."""
        first = np.array(self.offsets, np.int64)
        start = first * self.extent // self.content
        end = -(-(first + self.side) * self.extent // self.content)
        return self.start + start - reach_px, self.start + end + reach_px


@dataclass(frozen=True, slots=True)
class _Axis:
    """One dimension of the photo, `length` pixels, and the span of it to show, which may overhang the photo."""

    length: int
    start: int
    stop: int
    #: At working scale.
    context_px: int = 0

    def overlap(self, side: int) -> int:
        return min(self.context_px, side // 2)

    def scale(self, side: int, count: int = 1) -> Fraction:
        """The finest scale at which `count` windows hold the span and its context, or the photo's whole length."""
        overlap = self.overlap(side)
        room = count * (side - overlap) + overlap
        around = Fraction(room - 2 * self.context_px, self.stop - self.start)
        return min(Fraction(1), max(around, Fraction(room, self.length)))

    def lay(self, side: int, scale: Fraction) -> _Row:
        """As few windows as hold the span and its context, spread evenly; one window shows all that it can."""
        wanted = self.stop - self.start + int(2 * self.context_px / scale)
        extent = min(self.length, max(wanted, round(side / scale)))
        content = max(1, round(extent * scale))
        canvas = max(side, content)
        overlap = self.overlap(side)
        count = -(-(canvas - overlap) // (side - overlap))
        return _Row(
            start=min(max((self.start + self.stop - extent) // 2, 0), self.length - extent),
            extent=extent,
            content=content,
            canvas=canvas,
            side=side,
            offsets=tuple(i * (canvas - side) // max(count - 1, 1) for i in range(count)),
        )


@dataclass(frozen=True, slots=True)
class _Grid:
    x: _Row
    y: _Row
    #: (row, column) of the windows to paint, in reading order.
    cells: list[tuple[int, int]]

    @property
    def cost(self) -> tuple[int, int]:
        return len(self.cells), len(self.cells) * self.x.side * self.y.side

    def plan(self, strategy: CropStrategy) -> Plan:
        x, y = self.x, self.y
        return Plan(
            strategy=strategy,
            region=Box(x0=x.start, y0=y.start, x1=x.start + x.extent, y1=y.start + y.extent),
            canvas_size=(x.canvas, y.canvas),
            content_size=(x.content, y.content),
            windows=tuple(self._window(row, column) for row, column in self.cells),
        )

    def _window(self, row: int, column: int) -> Box:
        x0, y0 = self.x.offsets[column], self.y.offsets[row]
        return Box(x0=x0, y0=y0, x1=x0 + self.x.side, y1=y0 + self.y.side)


#: Which windows of a grid have something to paint: bool `[rows, columns]`.
_Occupied = Callable[[_Row, _Row], npt.NDArray[np.bool_]]


def _everywhere(x: _Row, y: _Row) -> npt.NDArray[np.bool_]:
    return np.ones((len(y.offsets), len(x.offsets)), np.bool_)


def _where_masked(mask: Pixels, box: Box, reach_px: int) -> _Occupied:
    """Windows with a masked pixel in them or within `reach_px` photo pixels of them, by a summed-area table."""
    sums = cv2.integral((mask[box.slices] != 0).view(np.uint8))

    def occupied(x: _Row, y: _Row) -> npt.NDArray[np.bool_]:
        left, right = (np.clip(edge - box.x0, 0, box.width) for edge in x.in_photo(reach_px))
        top, bottom = (np.clip(edge - box.y0, 0, box.height) for edge in y.in_photo(reach_px))
        inside = sums[np.ix_(bottom, right)] - sums[np.ix_(bottom, left)]
        return np.asarray(inside - sums[np.ix_(top, right)] + sums[np.ix_(top, left)] > 0)

    return occupied


@dataclass(frozen=True, slots=True)
class _Search:
    """The choice of bucket and scale for one photo."""

    x: _Axis
    y: _Axis
    buckets: tuple[tuple[int, int], ...]

    def scales(self, count: Callable[[_Axis, int], int]) -> list[Fraction]:
        """Every scale at which 1 to `count(axis, side)` windows just fit an axis, finest first."""
        sides = [(axis, bucket[i]) for i, axis in enumerate((self.x, self.y)) for bucket in self.buckets]
        fits = {axis.scale(side, n) for axis, side in set(sides) for n in range(1, count(axis, side) + 1)}
        return sorted(fits, reverse=True)

    def grids(self, scale: Fraction, occupied: _Occupied) -> Iterable[_Grid]:
        for width, height in self.buckets:
            x, y = self.x.lay(width, scale), self.y.lay(height, scale)
            rows, columns = np.nonzero(occupied(x, y))
            yield _Grid(x, y, list(zip(rows.tolist(), columns.tolist(), strict=True)))

    def finest(self, scales: list[Fraction], occupied: _Occupied, max_windows: int) -> _Grid:
        """The cheapest grid at the first scale that has one of at most `max_windows`. The last has: one holds all."""
        allowed = ([g for g in self.grids(scale, occupied) if len(g.cells) <= max_windows] for scale in scales)
        return min(next(grids for grids in allowed if grids), key=lambda grid: grid.cost)

    def single(self, strategy: CropStrategy) -> Plan:
        scales = self.scales(lambda axis, side: 1)
        return self.finest(scales, _everywhere, max_windows=1).plan(strategy)


def _around(mask: Pixels, box: Box, settings: WindowSettings) -> _Search:
    height, width = mask.shape
    feather, context = settings.feather_px, settings.context_px
    return _Search(
        _Axis(width, box.x0 - feather, box.x1 + feather, context),
        _Axis(height, box.y0 - feather, box.y1 + feather, context),
        settings.buckets,
    )


def _crop(mask: Pixels, box: Box, settings: WindowSettings) -> Plan:
    return _around(mask, box, settings).single(CropStrategy.CROP)


def _resize(mask: Pixels, box: Box, settings: WindowSettings) -> Plan:
    height, width = mask.shape
    search = _Search(_Axis(width, 0, width), _Axis(height, 0, height), settings.buckets)
    return search.single(CropStrategy.RESIZE)


def _original(mask: Pixels, box: Box, settings: WindowSettings) -> Plan:
    search = _around(mask, box, settings)
    scales = search.scales(lambda axis, side: len(axis.lay(side, Fraction(1)).offsets))
    occupied = _where_masked(mask, box, settings.feather_px)
    return search.finest(scales, occupied, settings.max_windows).plan(CropStrategy.ORIGINAL)


def _auto(mask: Pixels, box: Box, settings: WindowSettings) -> Plan:
    cropped = _crop(mask, box, settings)
    is_whole_frame = mask.shape == (cropped.region.height, cropped.region.width)
    return _resize(mask, box, settings) if is_whole_frame else cropped


_STRATEGIES: Mapping[CropStrategy, Callable[[Pixels, Box, WindowSettings], Plan]] = {
    CropStrategy.AUTO: _auto,
    CropStrategy.CROP: _crop,
    CropStrategy.RESIZE: _resize,
    CropStrategy.ORIGINAL: _original,
}
