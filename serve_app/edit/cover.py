"""The cheapest windows that show every masked cell with its surroundings.

The search looks at boxes of cells, each the bounding box of what is masked in it. A box is either shown by one window,
of the cheapest bucket that holds it and its context, or cut in two between cells: each part shrinks to its own bounding
box, and is looked at in turn. Tried are the cuts that make one part just fit a bucket, and those that make it fit the
bucket's one side, to be cut again across. So every cover is a tree of straight cuts: never dearer than one window, and
not always the cheapest of all.

What the masked cells cost at least, however they are covered, cuts branches off, and a limit on the cost ends a
hopeless search at once. After `MAX_CUT_BOXES` boxes only the likeliest cut of each box is still tried.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf

from .grid import CellBox, Cells, Span

#: (width, height) in pixels.
Bucket = tuple[int, int]

#: Boxes of which one search tries every cut: leashes take tens, noise would take millions.
MAX_CUT_BOXES = 40
#: What a cover usually costs, by its lower bound. Only the order of the search rests on it.
_OVER_BOUND = 1.2
#: Pixels of context that rounding may take below the photo's own scale.
ROUNDING_PX = 2
#: Of a pixel: more than floats get wrong in a few operations.
_SLACK_PX = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What one window shows with its context, in the photo's pixels, and the window's size."""

    x: Span
    y: Span
    bucket: Bucket


@dataclass(frozen=True)
class Axis:
    """One axis of a photo of `length` pixels, seen with surroundings of `context_px` at working scale round the mask
    as it was drawn. The spans are those of the mask grown by `grown_px` of the photo's pixels: they are part of the
    context, of which half stays at least.

    Where the photo ends there are no more surroundings: a window shifted to that edge saves them.
    """

    length: int
    context_px: int
    grown_px: int = 0

    def finest(self, span: Span, side: int) -> float:
        """The finest scale, up to 1, at which a window of `side` shows the photo's pixels `span`."""
        (first, end), length = span, self.length
        shown = (self._finest(end - first, side, 2), self._finest(end, side, 1), self._finest(length - first, side, 1))
        return min(1.0, max(*shown, side / length))

    def needed_px(self, span: Span, scale: float) -> float:
        """How long a window must be, at working scale, to show the photo's pixels `span`."""
        (first, end), length = span, self.length
        return min(
            self._needed(end - first, scale, 2),
            self._needed(end, scale, 1),
            self._needed(length - first, scale, 1),
            length * scale,
        )

    def around_px(self, scale: float) -> float:
        """The least context of a span, at working scale."""
        return max(self.context_px - self.grown_px * scale, self._least_px)

    @cached_property
    def _least_px(self) -> float:
        # Not less than what rounding may take.
        return max(self.context_px / 2, min(self.context_px, ROUNDING_PX))

    def _needed(self, px: int, scale: float, sides: int) -> float:
        """For `px` of the photo, with context on one side or on two. A part of the mask may be narrower than what was
        added to it; its context counts from its middle: so more is never needed at a coarser scale."""
        drawn, grown = px - sides * self.grown_px, px * scale + sides * self._least_px
        of_drawn = (drawn * scale if drawn > 0 else 0.0) + sides * self.context_px
        return of_drawn if of_drawn > grown else grown

    def _finest(self, px: int, side: int, sides: int) -> float:
        drawn, left = px - sides * self.grown_px, side - sides * self.context_px
        of_drawn = left / drawn if drawn > 0 else 1.0 if left >= 0 else 0.0
        return min((side - sides * self._least_px) / px, of_drawn)

    def end(self, first: int, side: int, scale: float) -> float:
        """The last photo pixel's end that a window of `side` shows together with pixel `first`."""
        context_px = self.around_px(scale)
        return max(first + (side - 2 * context_px) / scale, (side - context_px) / scale)

    def first(self, end: int, side: int, scale: float) -> float:
        return self.length - self.end(self.length - end, side, scale)

    def core_px(self, side: int, scale: float) -> float:
        """How many pixels at working scale, of those that have their context on both sides, a window shows at most."""
        return min(side, self.length * scale) - 2 * self.around_px(scale)


class _Bound:
    """What a box costs at least: no bucket shows more masked columns, rows, columns and rows together, or cells, with
    their context, for its price than the best one does."""

    def __init__(self, cells: Cells, axes: tuple[Axis, Axis], prices: Mapping[Bucket, float], scale: float) -> None:
        self._cells = cells
        x, y = axes
        self._inside = tuple(
            cells.whole(i, axis.around_px(scale) / scale, axis.length - axis.around_px(scale) / scale)
            for i, axis in enumerate(axes)
        )
        self._cheapest = min(prices.values())
        shown = [(price, x.core_px(w, scale), y.core_px(h, scale)) for (w, h), price in prices.items()]
        cell_px = cells.side_px * scale
        self._column = min((cell_px * price / w for price, w, _ in shown if w > 0), default=0.0)
        self._row = min((cell_px * price / h for price, _, h in shown if h > 0), default=0.0)
        self._either = min((cell_px * price / (w + h) for price, w, h in shown if w > 0 and h > 0), default=0.0)
        self._cell = min((cell_px**2 * price / (w * h) for price, w, h in shown if w > 0 and h > 0), default=0.0)
        self._known: dict[CellBox, float] = {}

    def of(self, box: CellBox) -> float:
        if box not in self._known:
            columns, rows = (self._cells.count(box, i, self._inside[i]) for i in (0, 1))
            masked = self._cells.area(box, self._inside) * self._cell
            both = (columns + rows) * self._either
            self._known[box] = max(self._cheapest, columns * self._column, rows * self._row, both, masked)
        return self._known[box]


class Search:
    """For the cheapest cover at one scale."""

    def __init__(self, cells: Cells, prices: Mapping[Bucket, float], context_px: int, scale: float) -> None:
        """`prices`, above 0, of one window of each bucket; `context_px` at `scale`, canvas pixels a photo pixel."""
        self._cells, self._scale = cells, scale
        width, height = cells.size
        self._axes = Axis(width, context_px, cells.grown_px), Axis(height, context_px, cells.grown_px)
        self._buckets = sorted((price, bucket) for bucket, price in prices.items())
        self._bound = _Bound(cells, self._axes, prices, scale)
        #: Of boxes: the price of the cheapest cover, and a bucket for one window or the parts that it is cut into.
        self._solved: dict[CellBox, tuple[float, Bucket | None, tuple[CellBox, ...]]] = {}
        #: Of boxes for which no cover was found: the highest price that was allowed.
        self._failed: dict[CellBox, float] = {}
        self.cut_boxes = 0

    def best(self, limit: float) -> list[Shown] | None:
        """The windows of the cheapest cover that was found; None where none costs `limit` or less."""
        box = self._cells.everything()
        return list(self._windows(box)) if self._price(box, limit) <= limit else None

    def _windows(self, box: CellBox) -> Iterator[Shown]:
        _, bucket, parts = self._solved[box]
        if bucket:
            yield Shown(x=self._cells.pixels(0, box[0]), y=self._cells.pixels(1, box[1]), bucket=bucket)
        for part in parts:
            yield from self._windows(part)

    def _price(self, box: CellBox, limit: float) -> float:
        """Of the box's cheapest cover; infinite where none costs `limit` or less."""
        if box in self._solved:
            return self._solved[box][0]
        if limit <= self._failed.get(box, 0.0):
            return inf
        price, bucket = self._one_window(box)
        parts: tuple[CellBox, ...] = ()
        for first, second in self._cuts(box, min(limit, price)):
            allowed = min(limit, price)
            if self._bound.of(first) + self._bound.of(second) >= allowed:
                continue
            of_first = self._price(first, allowed - self._bound.of(second))
            of_both = of_first + self._price(second, allowed - of_first) if of_first < allowed else inf
            if of_both < price:
                price, bucket, parts = of_both, None, (first, second)
            if self.cut_boxes >= MAX_CUT_BOXES:
                break
        if price > limit:
            self._failed[box] = limit
            return inf
        self._solved[box] = price, bucket, parts
        return price

    def _one_window(self, box: CellBox) -> tuple[float, Bucket | None]:
        width, height = self._needed_px(0, box[0]), self._needed_px(1, box[1])
        return next(((price, b) for price, b in self._buckets if b[0] >= width and b[1] >= height), (inf, None))

    def _needed_px(self, axis: int, span: Span) -> float:
        return self._axes[axis].needed_px(self._cells.pixels(axis, span), self._scale) - _SLACK_PX

    def _cuts(self, box: CellBox, limit: float) -> list[tuple[CellBox, CellBox]]:
        """Both parts of each cut that may cost less than `limit`, the likely cheapest first."""
        if self._bound.of(box) >= limit:
            return []
        self.cut_boxes += 1
        cuts = [
            (self._cells.part(box, axis, box[axis][0], at), self._cells.part(box, axis, at, box[axis][1]))
            for axis in (0, 1)
            for at in sorted(self._places(box, axis))
        ]
        return sorted(cuts, key=lambda parts: self._guess(parts[0]) + self._guess(parts[1]))

    def _guess(self, box: CellBox) -> float:
        return min(self._one_window(box)[0], self._bound.of(box) * _OVER_BOUND)

    def _places(self, box: CellBox, axis: int) -> set[int]:
        """Lines between the cells of an axis at which to cut."""
        first, end = box[axis]
        places, furthest, foremost = set[int](), first, end
        for _, bucket in self._buckets:
            from_first, furthest = self._from_first(box, axis, bucket, furthest)
            from_end, foremost = self._from_end(box, axis, bucket, foremost)
            places |= {from_first, furthest, from_end, foremost}
        return {at for at in places if first < at < end}

    def _from_first(self, box: CellBox, axis: int, bucket: Bucket, furthest: int) -> tuple[int, int]:
        """How far the bucket's one side reaches, and how far the bucket, or a cheaper one (`furthest`), shows all that
        is masked."""
        edges, (first, end) = self._cells.edges[axis], box[axis]
        reached_px = self._axes[axis].end(edges[first], bucket[axis], self._scale) + _SLACK_PX
        reached = min(bisect_right(edges, reached_px) - 1, end)

        def is_too_high(at: int) -> bool:
            return self._needed_px(1 - axis, self._cells.across(axis, first, at, box[1 - axis])) > bucket[1 - axis]

        if reached <= furthest:
            return reached, furthest
        return reached, bisect_left(range(reached + 1), True, lo=furthest + 1, key=is_too_high) - 1

    def _from_end(self, box: CellBox, axis: int, bucket: Bucket, foremost: int) -> tuple[int, int]:
        edges, (first, end) = self._cells.edges[axis], box[axis]
        reached_px = self._axes[axis].first(edges[end], bucket[axis], self._scale) - _SLACK_PX
        reached = max(bisect_left(edges, reached_px), first)

        def is_low_enough(at: int) -> bool:
            return self._needed_px(1 - axis, self._cells.across(axis, at, end, box[1 - axis])) <= bucket[1 - axis]

        return reached, bisect_left(range(foremost), True, lo=min(reached, foremost), key=is_low_enough)
