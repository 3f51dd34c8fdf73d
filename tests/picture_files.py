"""Picture files put together byte by byte, as no library writes them."""

import struct
import zlib
from collections.abc import Sequence

#: (tag, type, values, bytes) of a TIFF directory.
Entry = tuple[int, int, int, bytes]


def chunk(kind: bytes, body: bytes = b"", *, sound: bool = True) -> bytes:
    """A PNG chunk; its checksum is wrong where it is not `sound`."""
    checksum = zlib.crc32(kind + body) ^ (not sound)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Put right behind its IHDR, which ends at byte 33."""
    return png[:33] + b"".join(chunks) + png[33:]


def unsound(png: bytes, kind: bytes) -> bytes:
    """With a wrong checksum of the first such chunk."""
    at = png.index(kind)
    end = at + 4 + int.from_bytes(png[at - 4 : at])
    return png[:end] + bytes(b ^ 0xFF for b in png[end : end + 4]) + png[end + 4 :]


def segment(number: int, body: bytes) -> bytes:
    """A JPEG's APP0 to APP15."""
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(body) + 2) + body


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def text(tag: int, value: bytes) -> Entry:
    return tag, 2, len(value) + 1, value + b"\0"


def short(tag: int, value: int) -> Entry:
    return tag, 3, 1, struct.pack("<H", value)


def exif(main: Sequence[Entry] = (), camera: Sequence[Entry] = (), interop: Sequence[Entry] = ()) -> bytes:
    """A little-endian block with its prefix (EXIF 2.32, 4.6.2), each directory where the one before it ends."""
    camera_at = 8 + _length([*main, _link(0x8769, 0)])
    interop_at = camera_at + _length([*camera, _link(0xA005, 0)])
    directories = [([*main, _link(0x8769, camera_at)], 8), ([*camera, _link(0xA005, interop_at)], camera_at)]
    body = b"".join(_directory(*placed) for placed in [*directories, (interop, interop_at)])
    return b"Exif\0\0II" + struct.pack("<HI", 42, 8) + body


def _link(tag: int, at: int) -> Entry:
    return tag, 4, 1, struct.pack("<I", at)


def _length(entries: Sequence[Entry]) -> int:
    return len(_directory(entries, 0))


def _directory(entries: Sequence[Entry], at: int) -> bytes:
    table, values = struct.pack("<H", len(entries)), b""
    for tag, kind, count, value in sorted(entries):
        held = value.ljust(4, b"\0")
        if len(held) > 4:
            held, values = struct.pack("<I", at + 6 + 12 * len(entries) + len(values)), values + value
        table += struct.pack("<HHI", tag, kind, count) + held
    return table + bytes(4) + values
