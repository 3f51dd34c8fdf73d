"""JPEG files (ITU-T T.81, annex B) as rows of segments.

What follows a picture's end, a phone's video or more pictures, is no part of it.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...errors import InvalidImage
from . import exif
from .source import Source

START, END = b"\xff\xd8", b"\xff\xd9"
#: Each scan of a progressive JPEG costs a pass over all its pixels and takes some 75 bytes, so a file within every
#: other limit could take hours to decode. A camera writes about 10.
MAX_SCANS = 100
#: All scans together; 100 of 12 megapixels, decoded in about 2 s.
MAX_SCANNED_PX = 1_200_000_000
#: 255 segments of a profile and 400 of anything else fill the largest file that is taken.
_MAX_SEGMENTS = 5_000

_MARKER = re.compile(rb"\xff[\x01-\xfe]")
#: Within a scan FF 00 stands for a byte FF, and restart markers belong to it.
_AFTER_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
#: TEM, RST0 to RST7 and SOI have no length.
_ALONE = {0x01, *range(0xD0, 0xD9)}
#: SOF0 to SOF15, less DHT, JPG and DAC.
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_EOI, _SOS, _APP0, _APP1, _APP2, _APP14, _APP15, _COM = 0xD9, 0xDA, 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE

_ICC = b"ICC_PROFILE\0"
#: What two copies of a file without an end are continued with: where pixels are missing, they come out different.
_CONTINUED = (bytes(64) + END, bytes.fromhex("5aa5c33c96") * 13 + END)


class _Segment(NamedTuple):
    marker: int
    #: From the marker on, and what a scan's segment is followed by.
    whole: bytes
    #: Without marker and length.
    body: bytes


def read(data: bytes, what: str) -> Source:
    """What decodes to the picture, without what no decoder needs, and what the file says beside it.

    A file that lacks only its end marker is given twice, continued differently: where both come out alike, no pixel
    is missing. Raises InvalidImage where that is certain, and for more scans than are decoded; `what` is its subject.
    """
    segments = list(_segments(data, what))
    _check_scans(segments, what)
    stream = START + b"".join(s.whole for s in segments if _is_needed(s))
    ended = bool(segments) and segments[-1].marker == _EOI
    if not ended and not _is_refined(segments):
        raise InvalidImage(f"the {what} is damaged: the file ends before its pixels do")
    return Source(
        streams=(stream,) if ended else tuple(stream.rstrip(b"\xff") + end for end in _CONTINUED),
        exif=_exif(segments),
        icc=_profile(segments),
    )


def without_place(data: bytes) -> bytes:
    """The same pixels, bit for bit, up to their end; of what the file says only the profile and what `exif` keeps."""
    segments = list(_segments(data, "photo"))
    said = exif.parse(_exif(segments))
    block = said.kept(orientation=said.orientation) or b""
    header = [s.whole for s in segments if s.marker == _APP0 and _is_needed(s)]
    if block:
        header.append(struct.pack(">BBH", 0xFF, _APP1, len(block) + 2) + block)
    rest = [s.whole for s in segments if s.marker not in (_APP0, _EOI) and (_is_needed(s) or _is_profile(s))]
    return b"".join([START, *header, *rest]).rstrip(b"\xff") + END


def _segments(data: bytes, what: str) -> Iterator[_Segment]:
    """Up to the end of the picture, or to what is no segment."""
    at, count = len(START), 0
    while found := _MARKER.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        if marker == _EOI:
            yield _Segment(marker, END, b"")
            return
        if marker in _ALONE:
            continue
        length = int.from_bytes(data[at : at + 2])
        end = at + length
        if length < 2 or end > len(data):
            return
        body = data[at + 2 : end]
        if marker == _SOS:
            after = _AFTER_SCAN.search(data, end)
            end = after.start() if after else len(data)
        count += 1
        if count > _MAX_SEGMENTS:
            raise InvalidImage(f"the {what} has more than {_MAX_SEGMENTS:,} JPEG segments")
        yield _Segment(marker, data[found.start() : end], body)
        at = end


def _check_scans(segments: Sequence[_Segment], what: str) -> None:
    frames = [s.body for s in segments if s.marker in _FRAMES]
    pixels = max((int.from_bytes(f[1:3]) * int.from_bytes(f[3:5]) for f in frames), default=0)
    most = min(MAX_SCANS, MAX_SCANNED_PX // max(pixels, 1))
    if sum(s.marker == _SOS for s in segments) > most:
        raise InvalidImage(f"the {what} has more than {most} JPEG scans, the most that are decoded at its size")


def _is_needed(segment: _Segment) -> bool:
    """Of the application's segments only JFIF's and Adobe's, which say how colours are coded."""
    if segment.marker == _APP0:
        return segment.body.startswith(b"JFIF\0")
    if segment.marker == _APP14:
        return segment.body.startswith(b"Adobe")
    return not (_APP0 <= segment.marker <= _APP15 or segment.marker == _COM)


def _exif(segments: Sequence[_Segment]) -> bytes | None:
    """A block may be continued in more segments."""
    blocks = [s.body for s in segments if s.marker == _APP1 and s.body.startswith(exif.PREFIX)]
    return b"".join(block.removeprefix(exif.PREFIX) for block in blocks) or None


def _is_profile(segment: _Segment) -> bool:
    return segment.marker == _APP2 and segment.body.startswith(_ICC)


def _profile(segments: Sequence[_Segment]) -> bytes | None:
    """The parts in the order of their numbers (ICC.1:2022, B.4)."""
    parts = [s.body[len(_ICC) :] for s in segments if _is_profile(s)]
    return b"".join(part[2:] for part in sorted(parts, key=lambda part: part[:1])) or None


def _is_refined(segments: Sequence[_Segment]) -> bool:
    """Whether the scans bring every coefficient of every component to its last bit (T.81, B.2.3 and G.1.1)."""
    frame = next((s.body for s in segments if s.marker in _FRAMES), b"")
    missing = {(component, k) for component in frame[6::3] for k in range(64)}
    for scan in (s.body for s in segments if s.marker == _SOS and s.body):
        components, (first, last, bits) = scan[1 : 1 + 2 * scan[0] : 2], (*scan[-3:], 0, 0, 0)[:3]
        if bits & 15 == 0:
            missing -= {(component, k) for component in components for k in range(first, last + 1)}
    return bool(frame) and not missing
