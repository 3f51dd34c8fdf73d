"""Painted windows back into their picture.

The worker cuts the plan's region out of the photo onto a canvas and pastes the painted canvas back; a replica blends
each painted window into its canvas. Outside the mask, dilated by the feather, nothing changes by a single bit: a
model's decoder moves every pixel a little, and people see it.

The mask is that of an edit, which has grown by a share of the photo's longest side (`WindowSettings.mask_grow`): drawn
tightly, it leaves out a leash's blurred edge and the shadow beside it, which no model could then remove.

The dilated mask is what the model paints; the worker blends over the feather, where both pictures show the same
surroundings. Distances are Euclidean, so the dilation is by a disc. Arrays are as in `images.Pixels`; masks are 0
where the photo is kept and 255 elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from ..models import Box, Pixels
from .windows import Plan, bounding_box, grown

_Number = TypeVar("_Number", np.uint8, np.float32)

#: Canvas pixels over which a window is blended into what windows before it painted. They were shown to the model as
#: they are, so both pictures are nearly the same there.
FADE_PX = 16
#: Rows of a photo that are blended at a time: floats of a whole 50-megapixel photo would take a gigabyte.
BAND_PX = 256


def growth_px(mask: Pixels, share: float) -> int:
    """A share of the photo's longest side, in whole pixels."""
    longest: int = max(mask.shape)
    return round(share * longest)


def grow(mask: Pixels, px: int) -> Pixels:
    """`mask` and every pixel at most `px` pixels from it."""
    wider = np.zeros(mask.shape, np.uint8)
    if (box := bounding_box(mask)) is not None:
        near = grown(box, px, mask.shape).slices
        wider[near] = np.where(_distance(mask[near]) <= px, np.uint8(255), np.uint8(0))
    return wider


def soft_mask(mask: Pixels, feather_px: int) -> npt.NDArray[np.float32]:
    """Opacity of the painted picture, `[height, width]`, 0..1.

    1 on the mask, falling by smoothstep (3t² - 2t³) with the distance from it, 0 beyond `grow(mask, feather_px)`.
    """
    distance = _distance(mask)
    return _smoothstep(np.where(distance <= feather_px, 1 - distance / np.float32(feather_px + 1), np.float32(0)))


def cut(photo: Pixels, mask: Pixels, plan: Plan, feather_px: int) -> tuple[Pixels, Pixels]:
    """The canvas that shows the plan's region, `[height, width, 3]`, and what to paint on it, `[height, width]`.

    A canvas pixel is painted where any part of the dilated mask falls into it, so that none is lost in scaling.
    Padding reflects both, mask included: a leash left standing in the mirror would be painted back into the photo.
    What is painted there is never pasted. `mask` and `feather_px` are those the plan was made with.
    """
    region, reach = plan.region, _reach(mask, plan, feather_px)
    grown = np.zeros((region.height, region.width), np.float32)
    grown[_within(reach, region)] = grow(mask[reach.slices], feather_px)
    # As floats, because in 8 bits a small coverage would round to none.
    covered = np.where(_scale(grown, plan.content_size) > 0, np.uint8(255), np.uint8(0))
    content = _scale(photo[region.slices], plan.content_size)
    return _pad(content, plan.canvas_size), _pad(covered, plan.canvas_size)


def shown(mask: Pixels, plan: Plan) -> Pixels:
    """What the canvas shows of `mask`, without padding, `plan.content_size`: not 0 where any part of it falls into a
    pixel."""
    of_region = mask[plan.region.slices].astype(np.float32)
    return np.where(_scale(of_region, plan.content_size) > 0, np.uint8(255), np.uint8(0))


def paste(photo: Pixels, painted: Pixels, mask: Pixels, plan: Plan, feather_px: int) -> Pixels:
    """A copy of `photo` with the painted canvas blended in.

    Every pixel outside `grow(mask, feather_px)` is the photo's; every pixel on the mask is the canvas's, scaled back
    to the photo. `mask` and `feather_px` are those the plan was made with.
    """
    reach = _reach(mask, plan, feather_px)
    width, height = plan.content_size
    patch = _scale(painted[:height, :width], (plan.region.width, plan.region.height))[_within(reach, plan.region)]
    result = photo.copy()
    target, kept = result[reach.slices], mask[reach.slices]
    for top in range(0, reach.height, BAND_PX):
        band = slice(top, top + BAND_PX)
        # The feather reaches as many rows beyond the band.
        above = min(top, feather_px)
        opacity = soft_mask(kept[top - above : top + BAND_PX + feather_px], feather_px)[above : above + BAND_PX]
        _blend(target[band], patch[band], opacity)
    return result


@dataclass(frozen=True, slots=True)
class Share:
    """What one window paints of a canvas. Arrays have the window's size."""

    #: Shown to the model as to be painted, 255: all that no window before it has painted. A leash left standing would
    #: be continued.
    unpainted: Pixels
    #: Opacity of the painted window, float32, 0..1. 1 on the window's own pixels; over what earlier windows painted it
    #: falls by smoothstep, to 0 at the window's side or `FADE_PX` away; 0 elsewhere.
    opacity: npt.NDArray[np.float32]

    @property
    def is_empty(self) -> bool:
        """Whether no pixel is the window's own: nothing of it would be kept."""
        return not self.opacity.any()


def share_out(mask: Pixels, windows: Sequence[Box]) -> list[Share]:
    """Each window's share of the canvas's `mask`, in painting order.

    A masked pixel is the own of one window: that in which it is deepest, by the distance to the window's sides, where
    sides on the canvas's edge do not count; of equals the earlier. A window without own pixels changes
    no other's share. Takes memory for the windows, not for the canvas.
    """
    depths = [_depth(box, mask.shape) for box in windows]
    return [_share(_owners(mask, box, windows, depths), number, depths[number]) for number, box in enumerate(windows)]


def paste_window(canvas: Pixels, painted: Pixels, box: Box, share: Share) -> None:
    """Blend the painted window at `box` into `canvas`, in place; outside its share nothing is written."""
    _blend(canvas[box.slices], painted, share.opacity)


#: In `_owners`: not masked, or in no window.
_NOBODY = -1


def _owners(
    mask: Pixels, within: Box, windows: Sequence[Box], depths: Sequence[npt.NDArray[np.float32]]
) -> npt.NDArray[np.int16]:
    """The number of the window whose own each pixel of `within` is."""
    owners = np.full((within.height, within.width), _NOBODY, np.int16)
    deepest = np.zeros(owners.shape, np.float32)
    for number, (box, depth) in enumerate(zip(windows, depths, strict=True)):
        if (both := _overlap(box, within)) is None:
            continue
        here, depth = _within(both, within), depth[_within(both, box)]
        owned = (mask[both.slices] != 0) & (depth > deepest[here])
        owners[here][owned] = number
        deepest[here][owned] = depth[owned]
    return owners


def _overlap(a: Box, b: Box) -> Box | None:
    x0, y0, x1, y1 = max(a.x0, b.x0), max(a.y0, b.y0), min(a.x1, b.x1), min(a.y1, b.y1)
    return Box(x0=x0, y0=y0, x1=x1, y1=y1) if x0 < x1 and y0 < y1 else None


def _depth(box: Box, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Pixels from each of the window's pixels to the nearest of its sides inside the canvas, from 1; `[h, w]`."""
    height, width = shape
    down = _depth_along(box.y0, box.y1, height)
    return np.minimum(down[:, None], _depth_along(box.x0, box.x1, width)[None, :])


def _depth_along(first: int, end: int, length: int) -> npt.NDArray[np.float32]:
    steps = np.arange(1, end - first + 1, dtype=np.float32)
    before = steps if first > 0 else np.full_like(steps, np.inf)
    after = steps[::-1] if end < length else np.full_like(steps, np.inf)
    return np.minimum(before, after)


def _share(owners: npt.NDArray[np.int16], number: int, depth: npt.NDArray[np.float32]) -> Share:
    own, before = owners == number, (owners >= 0) & (owners < number)
    unpainted = np.where(owners >= number, np.uint8(255), np.uint8(0))
    if not before.any():
        return Share(unpainted, own.astype(np.float32))
    distance = _distance(own.view(np.uint8))
    # What is left of the way to the window's side, where that is nearer than the fade is long.
    fade = np.minimum(np.float32(FADE_PX), depth + distance - 1)
    # Not below 0, because without own pixels the distance is too large to be cubed.
    faded = _smoothstep(np.maximum(1 - distance / (fade + 1), np.float32(0)))
    opacity = np.where(before & (distance <= fade), faded, own.astype(np.float32))
    return Share(unpainted, np.asarray(opacity, np.float32))


def _smoothstep(t: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _distance(mask: Pixels) -> npt.NDArray[np.float32]:
    """Of each pixel to the nearest one of `mask`; very large everywhere where that is empty."""
    kept = (mask == 0).view(np.uint8)
    return np.asarray(cv2.distanceTransform(kept, cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)


def _reach(mask: Pixels, plan: Plan, feather_px: int) -> Box:
    """The box, in photo pixels, that holds everything within `feather_px` of the mask.

    Raises ValueError where the plan's region does not hold it: the plan is another mask's, or another feather's.
    """
    box, region = bounding_box(mask), plan.region
    if box is not None:
        reach = grown(box, feather_px, mask.shape)
        if region.x0 <= reach.x0 and region.y0 <= reach.y0 and reach.x1 <= region.x1 and reach.y1 <= region.y1:
            return reach
    raise ValueError(f"the mask, at {box} with a feather of {feather_px} px, is not what {region} was planned for")


def _within(inner: Box, outer: Box) -> tuple[slice, slice]:
    """Index of `inner` in an array of the pixels of `outer`."""
    rows, columns = inner.slices
    return (
        slice(rows.start - outer.y0, rows.stop - outer.y0),
        slice(columns.start - outer.x0, columns.stop - outer.x0),
    )


def _scale(pixels: npt.NDArray[_Number], size: tuple[int, int]) -> npt.NDArray[_Number]:
    """Resampled to `size` (width, height); the same array where it has that size."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    is_smaller = size[0] <= width and size[1] <= height
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC))


def _pad(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """A new array of `size` (width, height) with `pixels` at its top left and their reflections beside and below."""
    height, width = pixels.shape[:2]
    return np.asarray(cv2.copyMakeBorder(pixels, 0, size[1] - height, 0, size[0] - width, cv2.BORDER_REFLECT))


def _blend(target: Pixels, patch: Pixels, opacity: npt.NDArray[np.float32]) -> None:
    """Lay `patch` over `target`, in place; where the opacity is 0, `target` is not written at all."""
    blended = cv2.blendLinear(patch, target, opacity, 1 - opacity)
    # As np.copyto(where=…) does, which takes several times longer over three channels.
    target[...] = cv2.copyTo(blended, (opacity > 0).view(np.uint8), target.copy())
