import itertools
from heapq import heappop, heappush

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.edit import cover
from serve_app.edit.cost import forward_flops
from serve_app.edit.cover import Axis, Bucket, Search, Shown
from serve_app.edit.grid import Cells
from serve_app.models import Pixels
from serve_app.settings import BUCKETS

from .pictures import blank, masks, spot

PRICES = {bucket: forward_flops(*bucket) / 1e12 for bucket in BUCKETS}
SMALL_PRICES = {(32, 32): 3.0, (64, 32): 5.0, (32, 64): 5.0, (64, 64): 8.0, (256, 256): 90.0}
#: Small enough to compare with every cover there is.
TINY = {(4, 4): 4.0, (6, 4): 5.5, (4, 6): 5.5, (8, 8): 10.0}


def leash(width: int, height: int, *points: tuple[int, int], thickness: int = 12) -> Pixels:
    mask = blank(width, height)
    cv2.polylines(mask, [np.array(points, np.int32)], False, 255, thickness)
    return mask


def price(windows: list[Shown], prices: dict[Bucket, float]) -> float:
    return sum(prices[window.bucket] for window in windows)


def found(mask: Pixels, prices: dict[Bucket, float] = PRICES, context_px: int = 64, scale: float = 1) -> list[Shown]:
    windows = Search(Cells(mask, 0), prices, context_px, scale).best(1e9)
    assert windows is not None
    return windows


def shown_by(bucket: Bucket, at: tuple[int, int], size: tuple[int, int], context_px: int) -> list[range]:
    """Columns and rows that a window at a place shows with their context, or up to the photo's edge."""
    return [
        range(first + context_px * (first > 0), min(first + side, length) - context_px * (first + side < length))
        for first, side, length in zip(at, bucket, size, strict=True)
    ]


def cheapest_of_all(mask: Pixels, prices: dict[Bucket, float], context_px: int) -> float:
    """By Dijkstra over the sets of masked pixels that are covered."""
    height, width = mask.shape
    pixels = [(int(x), int(y)) for y, x in np.argwhere(mask)]
    windows = dict[int, float]()
    for bucket, x, y in itertools.product(prices, range(width), range(height)):
        columns, rows = shown_by(bucket, (x, y), (width, height), context_px)
        bits = sum(1 << i for i, (px, py) in enumerate(pixels) if px in columns and py in rows)
        is_inside = x + bucket[0] <= max(width, bucket[0]) and y + bucket[1] <= max(height, bucket[1])
        if is_inside:
            windows[bits] = min(prices[bucket], windows.get(bits, np.inf))
    queue, everything, done = [(0.0, 0)], (1 << len(pixels)) - 1, set[int]()
    while queue:
        spent, covered = heappop(queue)
        if covered == everything:
            return spent
        if covered not in done:
            done.add(covered)
            for bits, costs in windows.items():
                heappush(queue, (spent + costs, covered | bits))
    raise AssertionError("nothing covers it")


@st.composite
def scattered(draw: st.DrawFn) -> Pixels:
    """Up to seven masked pixels in a photo of 16 x 12."""
    mask = blank(16, 12)
    for x, y in draw(st.sets(st.tuples(st.integers(0, 15), st.integers(0, 11)), min_size=1, max_size=7)):
        mask[y, x] = 255
    return mask


@pytest.mark.slow
@settings(max_examples=60)
@given(mask=scattered())
def test_a_cover_is_near_the_cheapest_of_all(mask: Pixels) -> None:
    best = cheapest_of_all(mask, TINY, context_px=1)
    spent = price(found(mask, TINY, context_px=1), TINY)
    assert best - 1e-9 <= spent <= 1.25 * best


@settings(max_examples=200)
@given(mask=masks(), scale=st.sampled_from([1.0, 0.77, 0.4]), context_px=st.sampled_from([0, 1, 8]))
def test_windows_show_every_masked_pixel_with_its_context(mask: Pixels, scale: float, context_px: int) -> None:
    left = mask.copy()
    for window in found(mask, SMALL_PRICES, context_px, scale):
        left[window.y[0] : window.y[1], window.x[0] : window.x[1]] = 0
        for (first, end), side, length in zip((window.x, window.y), window.bucket, mask.shape[::-1], strict=True):
            # In the window's middle, but no further than the photo goes.
            begin = min(max(((first + end) * scale - side) / 2, 0), max(length * scale - side, 0))
            assert begin == 0 or first * scale - begin >= context_px - 1e-6
            assert begin + side >= length * scale - 1e-6 or begin + side - end * scale >= context_px - 1e-6
            assert begin - 1e-6 <= first * scale and end * scale <= begin + side + 1e-6
    assert not left.any()


@settings(max_examples=100)
@given(mask=masks(), context_px=st.sampled_from([0, 1, 8]))
def test_a_cover_costs_no_more_than_the_cheapest_single_window(mask: Pixels, context_px: int) -> None:
    cells = Cells(mask, 0)
    single = min(
        costs
        for bucket, costs in SMALL_PRICES.items()
        if all(
            Axis(n, context_px).finest(span, side) == 1
            for n, span, side in zip(cells.size, cells.reach, bucket, strict=True)
        )
    )
    assert price(found(mask, SMALL_PRICES, context_px), SMALL_PRICES) <= single


@settings(max_examples=100)
@given(mask=masks(), data=st.data(), reach_px=st.sampled_from([0, 1, 5]))
def test_a_part_of_the_grid_is_the_bounding_box_of_what_is_masked_in_it(
    mask: Pixels, data: st.DataObject, reach_px: int
) -> None:
    cells = Cells(mask, reach_px)
    grown = cv2.dilate(mask, np.ones((2 * reach_px + 1, 2 * reach_px + 1), np.uint8)) != 0
    columns, rows = (list(itertools.pairwise(edges)) for edges in cells.edges)
    grid = np.array([[grown[top:end, left:right].any() for left, right in columns] for top, end in rows])
    axis = data.draw(st.sampled_from([0, 1]))
    first = data.draw(st.integers(0, cells.everything()[axis][1] - 1))
    end = data.draw(st.integers(first + 1, cells.everything()[axis][1]))
    inside = np.zeros_like(grid)
    inside[(slice(None), slice(first, end)) if axis == 0 else (slice(first, end), slice(None))] = True
    ys, xs = np.nonzero(grid & inside)
    if xs.size:
        box = (xs.min(), xs.max() + 1), (ys.min(), ys.max() + 1)
        assert cells.part(cells.everything(), axis, first, end) == box
    assert all((edges[0], edges[-1]) == span for edges, span in zip(cells.edges, cells.reach, strict=True))


def test_a_diagonal_across_a_frame_takes_three_windows() -> None:
    windows = found(leash(1024, 1024, (0, 0), (1023, 1023)))
    assert sorted(window.bucket for window in windows) == [(384, 384), (512, 512), (512, 512)]


def test_the_whole_frame_takes_one() -> None:
    assert [window.bucket for window in found(np.full((1024, 1024), 255, np.uint8))] == [(1024, 1024)]


def test_far_corners_take_a_small_window_each() -> None:
    corners = np.maximum(spot(1024, 1024, 0, 0, size=9), spot(1024, 1024, 1000, 1000, size=9))
    windows = found(corners)
    assert [window.bucket for window in windows] == [(256, 256)] * 2
    assert {window.x for window in windows} == {(0, 16), (1000, 1009)}  # in cells of 8 pixels


def test_no_cover_costs_less_than_its_limit() -> None:
    cells = Cells(leash(1024, 1024, (0, 0), (1023, 1023)), 0)
    spent = price(Search(cells, PRICES, 64, 1).best(1e9) or [], PRICES)
    assert Search(cells, PRICES, 64, 1).best(spent) is not None
    assert Search(cells, PRICES, 64, 1).best(spent * 0.99) is None


random = np.random.default_rng(0)
HOSTILE = {
    "noise": (random.random((3000, 4000)) < 1e-4).astype(np.uint8),
    "dust": (random.random((3000, 4000)) < 2e-6).astype(np.uint8),
    "zigzag": leash(4000, 3000, *((i * 400, (i % 2) * 2900 + 50) for i in range(11))),
    "everything": np.ones((3000, 4000), np.uint8),
}


@pytest.mark.parametrize("scale", [0.256, 0.5, 1])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_search_ends_whatever_the_mask(name: str, scale: float) -> None:
    search = Search(Cells(HOSTILE[name], 8), PRICES, 64, scale)
    windows = search.best(1e9 if scale == 0.256 else 74.5)
    # After that many, one cut is tried of each box on the way back.
    assert search.cut_boxes <= 2 * cover.MAX_CUT_BOXES
    assert windows is None or price(windows, PRICES) <= 74.5


def test_what_no_window_could_show_in_budget_is_not_searched() -> None:
    search = Search(Cells(HOSTILE["everything"], 8), PRICES, 64, 1)
    assert search.best(74.5) is None
    assert search.cut_boxes == 0
