"""A mask as a grid of cells that answers quickly where, within any box of cells, something is masked.

A cell is masked where any pixel in it is: a search over cells loses no pixel, and shows at most a cell too much.
"""

from bisect import bisect_left, bisect_right
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

from ..models import Pixels

#: First and end, of pixels or of cells, along one axis.
Span = tuple[int, int]
#: Columns and rows of cells. Plain tuples, because a search makes them by the ten thousand.
CellBox = tuple[Span, Span]

#: Along the longer side of what is masked, at most: of a frame of 1024 pixels, cells of 8.
_CELLS = 128


class _Lines:
    """Lines of cells as the bits of integers. Tables over 1, 2, 4, ... lines answer for any run by two look-ups."""

    def __init__(self, masked: npt.NDArray[np.bool_]) -> None:
        packed = np.packbits(masked, axis=1, bitorder="little")
        self._runs = [[int.from_bytes(line.tobytes(), "little") for line in packed]]
        while len(last := self._runs[-1]) > (length := 1 << (len(self._runs) - 1)):
            self._runs.append([a | b for a, b in zip(last, last[length:], strict=False)])

    def across(self, first: int, end: int, within: Span) -> int:
        level = (end - first).bit_length() - 1
        runs = self._runs[level]
        bits = runs[first] | runs[end - (1 << level)]
        return (bits & ((1 << within[1]) - 1)) >> within[0]


class Cells:
    """Axis 0 is x, axis 1 is y. Boxes are not empty, and something in them is masked."""

    def __init__(self, mask: Pixels, reach_px: int, grown_px: int = 0) -> None:
        """`mask` is uint8 `[height, width]`, not empty; what is at most `reach_px` rows and columns away counts too."""
        #: How many pixels were added to the mask as it was drawn, on all sides.
        self.grown_px = grown_px
        left, top, width, height = cv2.boundingRect(mask)
        #: (width, height) of the mask in pixels.
        self.size = (mask.shape[1], mask.shape[0])
        #: The smallest box with all that counts, in pixels.
        self.reach: tuple[Span, Span] = (
            (max(left - reach_px, 0), min(left + width + reach_px, self.size[0])),
            (max(top - reach_px, 0), min(top + height + reach_px, self.size[1])),
        )
        #: Side of a cell in pixels; the last of an axis may be smaller.
        self.side_px = -(-max(end - first for first, end in self.reach) // _CELLS)
        #: The pixel at which each cell of an axis begins, and at which the last one ends.
        self.edges = tuple([*range(first, end, self.side_px), end] for first, end in self.reach)
        columns, rows = (
            [(max(first - reach_px, 0), end + reach_px) for first, end in pairwise(edges)] for edges in self.edges
        )
        lines = np.stack([mask[first:end].max(axis=0) for first, end in rows])
        masked = np.stack([lines[:, first:end].max(axis=1) for first, end in columns], axis=1) != 0
        self._lines = _Lines(masked.T), _Lines(masked)
        self._sums: list[list[int]] = cv2.integral(masked.view(np.uint8)).tolist()

    def everything(self) -> CellBox:
        return (0, len(self.edges[0]) - 1), (0, len(self.edges[1]) - 1)

    def across(self, axis: int, first: int, end: int, within: Span) -> Span:
        """The smallest span of `within`, on the other axis, with all that is masked in the lines `first` to `end`."""
        bits = self._lines[axis].across(first, end, within)
        return within[0] + (bits & -bits).bit_length() - 1, within[0] + bits.bit_length()

    def part(self, box: CellBox, axis: int, first: int, end: int) -> CellBox:
        """The bounding box of what is masked in the lines `first` to `end` of a box along an axis."""
        if axis == 0:
            rows = self.across(0, first, end, box[1])
            return self.across(1, *rows, (first, end)), rows
        columns = self.across(1, first, end, box[0])
        return columns, self.across(0, *columns, (first, end))

    def count(self, box: CellBox, axis: int, inside: Span) -> int:
        """How many of the lines `inside` have something masked in `box`."""
        first, end = max(box[axis][0], inside[0]), min(box[axis][1], inside[1])
        return self._lines[1 - axis].across(*box[1 - axis], (first, end)).bit_count() if first < end else 0

    def area(self, box: CellBox, inside: tuple[Span, ...]) -> int:
        """How many cells are masked where `box` and the columns and rows `inside` meet."""
        (x0, x1), (y0, y1) = ((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(box, inside, strict=True))
        if x0 >= x1 or y0 >= y1:
            return 0
        return self._sums[y1][x1] - self._sums[y1][x0] - self._sums[y0][x1] + self._sums[y0][x0]

    def pixels(self, axis: int, span: Span) -> Span:
        edges = self.edges[axis]
        return edges[span[0]], edges[span[1]]

    def whole(self, axis: int, first_px: float, end_px: float) -> Span:
        """The cells of full size that lie in these pixels of an axis."""
        edges = self.edges[axis]
        return bisect_left(edges, first_px), min(bisect_right(edges, end_px), len(edges) - 1) - 1
