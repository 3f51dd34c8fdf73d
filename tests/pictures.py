"""Photos and masks made by drawing, and hypothesis strategies that draw them."""

import cv2
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from serve_app.edit.paste import grow, growth_px
from serve_app.models import Pixels
from serve_app.settings import WindowSettings

MAGENTA = (255, 0, 255)
#: Small buckets, so that drawn photos of a few hundred pixels need every rule.
SMALL = WindowSettings(buckets=((32, 32), (64, 32), (32, 64), (64, 64)), context_px=8, feather_px=3)


def noise(width: int, height: int, seed: int = 0) -> Pixels:
    """A photo `[height, width, 3]` in which no two regions look alike, and no pixel is magenta."""
    return np.random.default_rng(seed).integers(0, 250, (height, width, 3), np.uint8)


def blank(width: int, height: int) -> Pixels:
    return np.zeros((height, width), np.uint8)


def spot(width: int, height: int, x: int, y: int, size: int = 1) -> Pixels:
    """A mask with one square, its top left corner at (x, y)."""
    mask = blank(width, height)
    mask[y : y + size, x : x + size] = 255
    return mask


def kept(mask: Pixels, window: WindowSettings) -> npt.NDArray[np.bool_]:
    """Where an edit with this mask, as it was drawn, may change nothing."""
    return grow(grow(mask, growth_px(mask, window.mask_grow)), window.feather_px) == 0


@st.composite
def masks(draw: st.DrawFn, longest_px: int = 200) -> Pixels:
    """Masks that are not empty, of photos from one pixel up: single pixels, blobs, lines, edges, all of it."""
    side = st.one_of(st.integers(1, 5), st.integers(1, longest_px))
    width, height = draw(side), draw(side)
    mask = blank(width, height)
    x, y = st.integers(0, width - 1), st.integers(0, height - 1)
    kind = draw(st.sampled_from(["pixels", "blob", "line", "edge", "full"]))
    if kind == "pixels":
        for column, row in draw(st.lists(st.tuples(x, y), min_size=1, max_size=3)):
            mask[row, column] = 255
    elif kind == "blob":
        cv2.circle(mask, (draw(x), draw(y)), draw(st.integers(0, 30)), 255, -1)
    elif kind == "line":
        cv2.line(mask, (draw(x), draw(y)), (draw(x), draw(y)), 255, draw(st.integers(1, 6)))
    elif kind == "edge":
        mask[:: max(height - 1, 1), draw(x) :] = 255
    else:
        mask[:] = 255
    return mask
