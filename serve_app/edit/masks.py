"""Masks: which pixels of a photo are edited."""

import io
from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageChops

from ..errors import MaskMismatch, MaskUnclear
from ..models import Pixels
from ..settings import Limits
from .pictures import flatten, in_mode, load, turn

#: What a mask's pixels are where the photo is edited.
Polarity = Literal["white", "black", "transparent"]
#: A mask's pixel of this value or more is edited.
THRESHOLD = 128
#: Values that lossy compression may give to a uniform picture; blue strokes have 29.
_NOISE = 16
#: Pixels a side that are looked at for a photo's colours.
_SAMPLE_PX = 256
#: A photo is more than a mask's shapes, however their edges were softened and compressed: coloured pixels of other
#: than its 32 most frequent colours, at 4 bits a channel, are 17 to 67% of the photos tried, and at most 13% of strokes
#: in up to six colours at JPEG quality 10.
_STROKE_COLOURS, _PHOTO_SHARE = 32, 0.15
#: Between a pixel's channels, where it is coloured.
_CHROMA = 32


class _Seen(NamedTuple):
    """What a mask shows as it is stored."""

    grey: Pixels
    #: Its values, 8 bits or 16; and by how much its opacity differs.
    darkest: int
    brightest: int
    opacities: int
    looks_like_photo: bool


def decode_mask(data: bytes, limits: Limits, photo_size: tuple[int, int], polarity: Polarity = "white") -> Pixels:
    """The mask in JPEG, PNG, WebP or HEIC bytes, as 0 (kept) and 255 (edited), `[height, width]` of `photo_size`.

    Edited is what has a luminance (ITU-R BT.601) of THRESHOLD or more; transparency shows black, and is kept.
    A mask of another size is scaled where the aspect ratios agree within 1%, or where one side is that of the photo at
    the other side's scale, give or take a pixel. A photo's pixel is edited where any part of an edited one falls into
    it, so that no line is lost. `photo_size` is (width, height) after turning.

    A uniform mask without bright pixels edits nothing. Raises MaskUnclear for a mask that has content but no bright
    pixels, and for a colour photo; in lossy formats, values that differ by `_NOISE` or less are no content. Grey masks
    are never taken for photos. Raises MaskMismatch, and what `pictures.load` raises.

    With polarity `black`, edited is what is darker than THRESHOLD, and transparency shows white; with `transparent`,
    what has no opacity at all, and a photo may be its own mask. Of these a mask that edits nothing raises MaskUnclear.
    """
    seen, said = load(data, "mask", limits, lambda image: _look(image, polarity))
    grey = turn(seen.grey, said.exif.orientation)
    size = grey.shape[1], grey.shape[0]
    _check_shape(size, photo_size)
    if seen.looks_like_photo:
        raise MaskUnclear(f"the mask looks like a photo: it has more colours than a drawn mask; {_REMEDIES}")
    mask = np.asarray(cv2.threshold(grey, THRESHOLD - 1, 255, cv2.THRESH_BINARY)[1], np.uint8)
    if not mask.any():
        if polarity != "white":
            lacks = f"pixels darker than {THRESHOLD}" if polarity == "black" else "wholly transparent pixels"
            raise MaskUnclear(f"the mask has no {lacks}, which would be edited: mask_polarity is {polarity}")
        _check_means_nothing(seen, noise=0 if said.content_type == "image/png" else _NOISE)
    if size != photo_size:
        mask = _scaled(_scaled(mask, photo_size[0], axis=1), photo_size[1], axis=0)
    return mask


_REMEDIES = (
    "draw the area to edit in white on black, invert a mask that is drawn the other way round, "
    "or export the alpha channel as the mask if it holds the shape"
)


def encode_mask(mask: Pixels) -> bytes:
    """A PNG."""
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _look(image: Image.Image, polarity: Polarity) -> _Seen:
    if polarity == "transparent":
        if not image.has_transparency_data:
            opacity = Image.new("L", image.size, 255)
        else:
            opacity = (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")
        edited = opacity.point(lambda value: 255 * (value == 0))
        return _Seen(np.asarray(edited), 0, 255, 0, looks_like_photo=False)
    flat = flatten(image, "white" if polarity == "black" else "black")
    grey = in_mode(flat.image, "L")
    if polarity == "black":
        grey = ImageChops.invert(grey)
    # 16 bits, before they are scaled to 8.
    darkest, brightest, *_ = np.ravel((image if image.mode.startswith("I") else grey).getextrema()).astype(int)
    return _Seen(
        grey=np.asarray(grey),
        darkest=darkest,
        brightest=brightest,
        opacities=flat.opacity[1] - flat.opacity[0],
        looks_like_photo=_looks_like_photo(image, flat.image),
    )


def _looks_like_photo(image: Image.Image, flat: Image.Image) -> bool:
    if flat.mode == "L":
        return False
    size = min(image.width, _SAMPLE_PX), min(image.height, _SAMPLE_PX)
    pixels = np.asarray(in_mode(flat.resize(size, Image.Resampling.NEAREST), "RGB")).reshape(-1, 3)
    if "A" in image.getbands():
        pixels = pixels[np.asarray(image.getchannel("A").resize(size, Image.Resampling.NEAREST)).ravel() >= 128]
    coloured = pixels[pixels.max(axis=1, initial=0) - pixels.min(axis=1, initial=255) >= _CHROMA] >> 4
    counts = np.bincount(coloured @ np.array([256, 16, 1]), minlength=4096)
    rare = int(np.sort(counts)[:-_STROKE_COLOURS].sum())
    return rare > _PHOTO_SHARE * len(pixels)


def _check_shape(size: tuple[int, int], photo_size: tuple[int, int]) -> None:
    across, along = size[0] * photo_size[1], size[1] * photo_size[0]
    # The second: of two sides at the scale of the other, one is less than or just a pixel off.
    if abs(across - along) > max(along // 100, *photo_size):
        mask, photo = (f"{width} x {height}" for width, height in (size, photo_size))
        raise MaskMismatch(f"the mask is {mask} and the photo {photo}: their aspect ratios differ by more than 1%")


def _check_means_nothing(seen: _Seen, *, noise: int) -> None:
    if seen.brightest - seen.darkest > noise:
        bright = f"the brightest is {seen.brightest}, and pixels from {THRESHOLD} of 255 are edited"
        raise MaskUnclear(f"the mask has content but no bright pixels: {bright}; {_REMEDIES}")
    if seen.opacities > noise:
        raise MaskUnclear(f"the mask has a shape only in its transparency, which counts as black; {_REMEDIES}")


def _scaled(mask: Pixels, length: int, *, axis: int) -> Pixels:
    """`axis` with another length. Each of its pixels has the highest value of those that it covers any part of."""
    was = mask.shape[axis]
    if was == length:
        return mask
    ends = np.arange(1, length + 1) * was
    first, last = (ends - was) // length, (ends - 1) // length
    # All that a pixel covers but the last; of a smaller mask it covers two at most.
    before: Pixels = mask.take(first, axis) if was < length else np.maximum.reduceat(mask, first, axis)
    at_last: Pixels = mask.take(last, axis)
    return np.maximum(before, at_last)
