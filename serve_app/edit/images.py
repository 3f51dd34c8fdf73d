"""Photos to pixels and back.

Decoding gives what a person would see: turned as EXIF says, on white where it was transparent, 8-bit RGB. Encoding
writes JPEG, or losslessly; of the photo's metadata the ICC profile, the density and the harmless part of the EXIF go
with it, and nothing that says where it was taken.
"""

import io
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from ..models import Pixels
from ..parameters import CONTENT_TYPES, Format
from ..settings import Limits
from . import containers
from .colours import to_rgb
from .pictures import flatten, load, turn

EDITED_QUALITY = 95
PREVIEW_QUALITY = 85
PREVIEW_SIDE_PX = 512


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Photo:
    """A decoded photo, and what is to be written back with it."""

    #: Turned as EXIF says. Read-only.
    pixels: Pixels
    #: The profile that the pixels are in; None: sRGB, or unknown.
    icc: bytes | None
    #: Without place, thumbnail and orientation, as `encode_jpeg` takes it.
    exif: bytes | None
    #: Of the bytes it was decoded from.
    content_type: str
    #: Dots per inch, across and down; of a file that says so outside EXIF.
    dpi: tuple[float, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


def decode_photo(data: bytes, limits: Limits) -> Photo:
    """The photo in JPEG, PNG, WebP or HEIC bytes; of an animation the first frame.

    Transparency is laid on white, the paper that JPEG viewers and printers would show. Raises what
    `pictures.load` raises.
    """
    flat, said = load(data, "photo", limits, lambda image: flatten(image, "white").image)
    rgb, icc = to_rgb(flat, said)
    del flat
    turned = said.exif.orientation > 4
    return Photo(
        pixels=turn(np.asarray(rgb), said.exif.orientation),
        icc=icc,
        exif=said.exif.kept(),
        content_type=said.content_type,
        dpi=said.dpi[::-1] if said.dpi and turned else said.dpi,
    )


def unchanged(photo: Photo, original: bytes, format: Format = "jpg") -> tuple[bytes, str]:
    """The photo's own file, pixels bit for bit, without what `encode_edited` leaves out either; and its content type.

    A file that cannot be rewritten for sure, or is not as lossless as `format`, becomes one of `format`.
    """
    file = containers.without_place(original)
    if file is not None and (format == "jpg" or photo.content_type == CONTENT_TYPES[format]):
        return file, photo.content_type
    return encode_edited(photo, photo.pixels, format), CONTENT_TYPES[format]


def encode_edited(photo: Photo, pixels: Pixels, format: Format = "jpg") -> bytes:
    """The edited photo, of any size up to JPEG's 65,535 px a side, WebP's 16,383; PNG and WebP are lossless.

    With full colour resolution: halving it once more would visibly move the colours that the edit leaves alone.
    """
    if format == "jpg":
        return encode_jpeg(
            pixels, quality=EDITED_QUALITY, icc=photo.icc, exif=photo.exif, dpi=photo.dpi, subsampling="4:4:4"
        )
    out, kept = io.BytesIO(), {"icc_profile": photo.icc, "exif": photo.exif or b""}
    # With the least effort: more of it takes seconds for a tenth of the bytes.
    if format == "png":
        Image.fromarray(pixels).save(out, "PNG", compress_level=1, dpi=photo.dpi, **kept)
    else:
        Image.fromarray(pixels).save(out, "WEBP", lossless=True, quality=0, method=0, **kept)
    return out.getvalue()


def encode_preview(photo: Photo, pixels: Pixels) -> bytes:
    """`pixels` with a longest side of at most PREVIEW_SIDE_PX, never enlarged, without EXIF."""
    height, width = pixels.shape[:2]
    scale = min(1.0, PREVIEW_SIDE_PX / max(width, height))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return encode_jpeg(pixels, quality=PREVIEW_QUALITY, icc=photo.icc, exif=None)


def encode_jpeg(
    pixels: Pixels,
    *,
    quality: int,
    icc: bytes | None,
    exif: bytes | None,
    dpi: tuple[float, float] | None = None,
    subsampling: Literal["4:4:4", "4:2:0"] = "4:2:0",
) -> bytes:
    """A JPEG of `pixels`, `[height, width, 3]`; quality 1..95 as libjpeg counts it."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(
        out, "JPEG", quality=quality, subsampling=subsampling, icc_profile=icc, exif=exif or b"", dpi=dpi or (0, 0)
    )
    return out.getvalue()
