"""Picture files before they are decoded: their segments, chunks and boxes, and what these say beside the pixels."""

from . import jpeg, png
from .source import CodePoints, Source

__all__ = ["CodePoints", "Source", "read"]


def read(data: bytes, what: str) -> Source | None:
    """A JPEG or PNG file less what no decoder needs; None for other files.

    Raises InvalidImage for what would take too long to decode, or whose pixels are damaged; `what` is its subject.
    """
    if data.startswith(jpeg.START):
        return jpeg.read(data, what)
    if data.startswith(png.START):
        return png.read(data, what)
    return None
