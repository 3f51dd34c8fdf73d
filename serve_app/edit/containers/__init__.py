"""Picture files before they are decoded: their segments, chunks and boxes, and what these say beside the pixels."""

import struct
from contextlib import suppress

from . import heic, jpeg, png, webp
from .source import CodePoints, Source

__all__ = ["CodePoints", "Source", "content_type", "read", "without_place"]


def content_type(data: bytes) -> str | None:
    """By the first 12 bytes; None for no picture that is read here."""
    if data.startswith(jpeg.START):
        return "image/jpeg"
    if data.startswith(png.START):
        return "image/png"
    if webp.is_webp(data):
        return "image/webp"
    return "image/heic" if heic.is_heic(data) else None


def read(data: bytes, what: str) -> Source | None:
    """A JPEG or PNG file less what no decoder needs; None for other files.

    Raises InvalidImage for what would take too long to decode, or whose pixels are damaged; `what` is its subject.
    """
    if data.startswith(jpeg.START):
        return jpeg.read(data, what)
    if data.startswith(png.START):
        return png.read(data, what)
    return None


def without_place(data: bytes) -> bytes | None:
    """The file of a picture that decodes, with the same pixels bit for bit, turned alike and in the same colours.

    Of EXIF it holds what `exif.Exif.kept` keeps; no XMP, no text, no video behind the picture. None where that cannot
    be told for sure, as of a HEIC with an unusual container.
    """
    rewrite = _REWRITE.get(content_type(data) or "")
    with suppress(ValueError, LookupError, struct.error, StopIteration):
        return rewrite(data) if rewrite else None
    return None


_REWRITE = {
    "image/jpeg": jpeg.without_place,
    "image/png": png.without_place,
    "image/webp": webp.without_place,
    "image/heic": heic.without_place,
}
