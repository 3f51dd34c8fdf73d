"""PNG files (PNG, third edition) as rows of chunks.

As in libpng, a wrong checksum is fatal where pixels depend on it; another damaged chunk is left out.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from ...errors import InvalidImage
from . import exif
from .source import MAX_ICC_BYTES, CodePoints, Source

START = b"\x89PNG\r\n\x1a\n"
#: In the largest file that is taken, chunks of 250 bytes.
_MAX_CHUNKS = 100_000
#: What a decoder needs, and the density. Of an animation that is its first frame.
_DECODED = {b"IHDR", b"PLTE", b"tRNS", b"pHYs", b"IDAT"}
#: What else changes how pixels look, and an animation's frames.
_SHOWN = {
    *(b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"bKGD"),
    *(b"acTL", b"fcTL", b"fdAT"),
}
_CRITICAL = {b"IHDR", b"PLTE", b"IDAT"}
_SIZES = {b"pHYs": 9, b"cICP": 4}


class _Chunk(NamedTuple):
    kind: bytes
    #: With length, kind and checksum.
    whole: bytes
    body: bytes


def read(data: bytes, what: str) -> Source:
    """What decodes to the picture, and what the file says beside it. Text is not read, however much there is.

    Raises InvalidImage for a wrong checksum where it matters; `what` is its subject.
    """
    stream, said = [START], dict[bytes, bytes]()
    for kind, whole, body in _chunks(data, what):
        if kind in _DECODED:
            stream.append(whole)
        else:
            said.setdefault(kind, body)
    stream.append(_chunk(b"IEND", b""))
    points = said.get(b"cICP")
    return Source(
        streams=(b"".join(stream),),
        exif=said.get(b"eXIf"),
        icc=_profile(said.get(b"iCCP", b"")),
        code_points=CodePoints(points[0], points[1]) if points else None,
    )


def without_place(data: bytes) -> bytes:
    """The same pixels, bit for bit; of what the file says only what they look like and what `exif` keeps."""
    stream, block = [], b""
    for kind, whole, body in _chunks(data, "photo"):
        if kind == b"eXIf" and not block:
            said = exif.parse(body)
            block = said.kept(orientation=said.orientation) or b""
        elif kind in _DECODED or kind in _SHOWN:
            stream.append(whole)
    if block:
        # Behind IHDR.
        stream.insert(1, _chunk(b"eXIf", block.removeprefix(exif.PREFIX)))
    return b"".join([START, *stream, _chunk(b"IEND", b"")])


def _chunks(data: bytes, what: str) -> Iterator[_Chunk]:
    """Up to the end, or to one that is cut short, but for those that are damaged and do not matter."""
    at, count = len(START), 0
    while len(head := data[at : at + 8]) == 8 and head[4:] != b"IEND":
        size, kind = struct.unpack(">I4s", head)
        end = at + 12 + size
        body, checksum = data[at + 8 : end - 4], data[end - 4 : end]
        if end > len(data):
            if kind in _CRITICAL:
                raise InvalidImage(f"the {what} is damaged: it ends within a PNG chunk {_shown(kind)}")
            return
        count += 1
        if count > _MAX_CHUNKS:
            raise InvalidImage(f"the {what} has more than {_MAX_CHUNKS:,} PNG chunks")
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(checksum):
            if kind in _CRITICAL:
                raise InvalidImage(f"the {what} is damaged: the checksum of a PNG chunk {_shown(kind)} is wrong")
        elif len(body) == _SIZES.get(kind, len(body)):
            yield _Chunk(kind, data[at:end], body)
        at = end


def _shown(kind: bytes) -> str:
    return kind.decode("ascii")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _profile(body: bytes) -> bytes | None:
    """Behind a name and the method of compression; None where it is absent, damaged, or too long to go on."""
    _, found, packed = body.partition(b"\0")
    if not found or packed[:1] != b"\0":
        return None
    unpack = zlib.decompressobj()
    try:
        profile = unpack.decompress(packed[1:], MAX_ICC_BYTES + 1)
    except zlib.error:
        return None
    return profile if unpack.eof and len(profile) <= MAX_ICC_BYTES else None
