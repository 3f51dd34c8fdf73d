"""WebP files (RFC 9649) as rows of RIFF chunks."""

import struct
from collections.abc import Iterator

from . import exif

_EXTENDED, _EXIF = b"VP8X", b"EXIF"
_KEPT = {_EXTENDED, b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"ICCP"}
#: Bits of the extended header's first byte.
_HAS_EXIF, _HAS_XMP = 0x08, 0x04


def is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def without_place(data: bytes) -> bytes:
    """The same pixels, bit for bit; of what the file says only the profile and what `exif` keeps."""
    chunks = list(_chunks(data))
    # Decoders read the block where the header announces it.
    announced = any(kind == _EXTENDED and body[0] & _HAS_EXIF for kind, body in chunks)
    said = exif.parse(next((body for kind, body in chunks if kind == _EXIF and announced), None))
    block = (said.kept(orientation=said.orientation) or b"").removeprefix(exif.PREFIX)
    kept = [
        (kind, _flagged(body, bool(block)) if kind == _EXTENDED else body) for kind, body in chunks if kind in _KEPT
    ]
    if block:
        kept.append((_EXIF, block))
    form = b"WEBP" + b"".join(_chunk(kind, body) for kind, body in kept)
    return b"RIFF" + struct.pack("<I", len(form)) + form


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= end:
        kind, size = struct.unpack_from("<4sI", data, at)
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _flagged(header: bytes, has_exif: bool) -> bytes:
    flags = header[0] & ~(_HAS_EXIF | _HAS_XMP) | (_HAS_EXIF if has_exif else 0)
    return bytes([flags]) + header[1:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
