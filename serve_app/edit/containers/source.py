"""What a decoder is given, and what a file says beside its pixels."""

from dataclasses import dataclass
from typing import NamedTuple

#: As much as a JPEG's 255 ICC segments hold.
MAX_ICC_BYTES = 255 * 65_519


class CodePoints(NamedTuple):
    """How colours are coded, in the numbers of ITU-T H.273: a PNG's cICP, a HEIC's nclx."""

    primaries: int
    transfer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    #: More than one where each must decode to the same pixels.
    streams: tuple[bytes, ...]
    exif: bytes | None = None
    icc: bytes | None = None
    code_points: CodePoints | None = None
