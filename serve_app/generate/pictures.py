"""Pixels to files, which say what they were made of and nothing of when or for whom."""

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..models import Pixels
from ..parameters import Format

_QUALITY = 95
#: EXIF 2.32's ImageDescription.
_DESCRIPTION = 0x010E


def encode(pixels: Pixels, format: Format, about: Mapping[str, Any] | None) -> bytes:
    """A file of `pixels`, `[height, width, 3]`. One version of Pillow gives the same bytes for the same input.

    `about` is written into PNG's text chunks, one for each entry, and into JPEG's and WebP's EXIF as JSON.
    """
    out, image = io.BytesIO(), Image.fromarray(pixels)
    if format == "png":
        image.save(out, "PNG", pnginfo=_chunks(about or {}))
        return out.getvalue()
    exif = Image.Exif()
    if about:
        exif[_DESCRIPTION] = json.dumps(about)
    if format == "jpg":
        image.save(out, "JPEG", quality=_QUALITY, subsampling="4:4:4", exif=exif)
    else:
        image.save(out, "WEBP", quality=_QUALITY, exif=exif)
    return out.getvalue()


def _chunks(about: Mapping[str, Any]) -> PngInfo:
    info = PngInfo()
    for name, value in about.items():
        # Unlike a tEXt chunk, one of this type takes every character.
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    return info
