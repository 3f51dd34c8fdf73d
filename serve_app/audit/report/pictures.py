"""The pictures of a report's page: of the photo what lies round the mask, small enough to be part of the page."""

import asyncio
import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ...blobs import BlobStore
from ...edit.images import decode_photo, encode_jpeg
from ...edit.windows import bounding_box, grown
from ...errors import BlobError, InputError, InvalidImage
from ...models import Box, Pixels
from ...settings import Limits
from ..record import CellResult

#: Longest side of a shown picture.
SIDE_PX = 1024
#: So many pictures may have SIDE_PX; more are shown smaller.
FULL_SIZE = 16
#: Of all pictures together, in the page's base64; the rest of a page of 15 cells has about 100 kB.
PICTURES_BYTES = 7_500_000
#: JPEG's, the first that keeps within the bytes.
_QUALITIES = (86, 78, 68, 55, 40)
#: What masked pixels are mixed with, half and half, where the mask is shown.
_TINT = (230, 0, 120)


@dataclass(frozen=True, slots=True)
class Picture:
    #: A JPEG as a `data:` URI.
    uri: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Pictures:
    """Shown pictures of one size, which is what makes them comparable."""

    original: Picture
    masked: Picture
    #: By the cell's name; those that could be read back.
    cells: Mapping[str, Picture]
    #: By the cell's name: why its picture could not be read back.
    unreadable: Mapping[str, str]


class Frame:
    """What of a photo is shown, and how large."""

    def __init__(self, photo: Pixels, mask: Pixels, cells: int) -> None:
        self._box = shown_box(mask)
        side_px = SIDE_PX * min(1.0, math.sqrt(FULL_SIZE / max(cells, 1)))
        scale = min(1.0, side_px / max(self._box.width, self._box.height))
        self._size = max(1, round(self._box.width * scale)), max(1, round(self._box.height * scale))
        # With the original and the masked picture; base64 writes 4 bytes for 3.
        self._max_bytes = PICTURES_BYTES * 3 // 4 // (cells + 2)
        self.shape = photo.shape

    def show(self, pixels: Pixels) -> Picture:
        """Of a picture of the photo's size, `[height, width, 3]`."""
        part = np.ascontiguousarray(pixels[self._box.slices])
        if (part.shape[1], part.shape[0]) != self._size:
            part = np.asarray(cv2.resize(part, self._size, interpolation=cv2.INTER_AREA), np.uint8)
        data = b""
        for quality in _QUALITIES:
            data = encode_jpeg(part, quality=quality, icc=None, exif=None)
            if len(data) <= self._max_bytes:
                break
        return Picture(f"data:image/jpeg;base64,{base64.b64encode(data).decode()}", *self._size)


def shown_box(mask: Pixels) -> Box:
    """The mask's box, grown on each side by a third of its longer side; the whole photo for an empty mask."""
    box = bounding_box(mask)
    if box is None:
        return Box(x0=0, y0=0, x1=mask.shape[1], y1=mask.shape[0])
    return grown(box, math.ceil(max(box.width, box.height) / 3), mask.shape)


def tinted(photo: Pixels, mask: Pixels) -> Pixels:
    """The photo with the mask in colour over it."""
    marked = photo.copy()
    marked[mask != 0] = (marked[mask != 0].astype(np.uint16) + _TINT) // 2
    return marked


async def show_all(blobs: BlobStore, photo: Pixels, mask: Pixels, results: Sequence[CellResult]) -> Pictures:
    """Those of the cells are read from the store, one at a time: each may be a photo of 50 million pixels.

    Raises StoreUnavailable.
    """
    painted = [(result.name, result.image_path) for result in results if result.image_path]
    frame = Frame(photo, mask, len(painted))
    shown: dict[str, Picture] = {}
    unreadable: dict[str, str] = {}
    for name, path in painted:
        try:
            shown[name] = await _read(blobs, path, frame)
        except (BlobError, InputError) as e:
            unreadable[name] = e.message
    original = await asyncio.to_thread(frame.show, photo)
    masked = await asyncio.to_thread(lambda: frame.show(tinted(photo, mask)))
    return Pictures(original, masked, shown, unreadable)


async def _read(blobs: BlobStore, path: str, frame: Frame) -> Picture:
    height, width, channels = frame.shape
    # A PNG of noise has little more bytes than pixels have.
    limits = Limits(
        image_bytes=2 * height * width * channels + 100_000,
        image_pixels=height * width,
        image_side_px=max(height, width),
    )
    data, _ = await blobs.get(path, max_bytes=limits.image_bytes)
    return await asyncio.to_thread(_decode, data, limits, frame)


def _decode(data: bytes, limits: Limits, frame: Frame) -> Picture:
    pixels = decode_photo(data, limits).pixels
    if pixels.shape != frame.shape:
        found, wanted = (f"{width}x{height}" for height, width, _ in (pixels.shape, frame.shape))
        raise InvalidImage(f"the picture is {found}, the photo {wanted}")
    return frame.show(pixels)
