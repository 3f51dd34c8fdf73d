"""EXIF blocks (EXIF 2.32, a TIFF 6.0 structure): what they say of the picture, and the part of them that may go on.

Entries are copied byte for byte, so text stays in the encoding that it was written in. Damaged entries are left out.
"""

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import ExifTags

#: Precedes a block in JPEG files, and in those of some other writers.
PREFIX = b"Exif\0\0"
#: The longest block that a JPEG segment holds, prefix included.
MAX_BYTES = 65_533

_TAG = ExifTags.Base
#: Entries of the main directory that go on. The others may hold a place (GPS, XMP, IPTC), a picture from before the
#: edit, or what is true only of the file they came in (orientation, strips, sizes).
_KEPT_TAGS = {
    *(_TAG.ImageDescription, _TAG.Make, _TAG.Model, _TAG.Software, _TAG.HostComputer, _TAG.DateTime),
    *(_TAG.Artist, _TAG.Copyright, _TAG.XResolution, _TAG.YResolution, _TAG.ResolutionUnit),
}
#: Entries of the camera directory that go on: those that the standard names, but for some that tell as much.
_KEPT_CAMERA_TAGS = set(ExifTags.TAGS) - {
    *(_TAG.MakerNote, _TAG.UserComment, _TAG.ExifInteroperabilityOffset, _TAG.ExifImageWidth, _TAG.ExifImageHeight),
    # SubjectArea and SubjectLocation, in pixels of the picture before it was turned.
    *(0x9214, 0xA214),
}
#: InteroperabilityIndex and InteroperabilityVersion.
_KEPT_INTEROP_TAGS = {1, 2}

#: Bytes of one value, by type (TIFF 6.0, section 2).
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_SHORT, _LONG = 3, 4
_ENTRY_BYTES = 12


class _Entry(NamedTuple):
    kind: int
    values: int
    data: bytes


_Directory = Mapping[int, _Entry]


@dataclass(frozen=True, slots=True)
class Exif:
    """A block's directories, without what is damaged."""

    #: struct's: "<" or ">".
    order: str = ">"
    main: _Directory = field(default_factory=dict)
    camera: _Directory = field(default_factory=dict)
    interop: _Directory = field(default_factory=dict)

    @property
    def orientation(self) -> int:
        """1 to 8; 1 where it is absent or impossible."""
        value = _number(self.order, self.main.get(_TAG.Orientation))
        return value if value is not None and 1 <= value <= 8 else 1

    @property
    def is_adobe_rgb(self) -> bool:
        """Whether the block says so as cameras do, with an uncalibrated colour space and the index R03 (DCF 2.0)."""
        index = self.interop.get(1)
        uncalibrated = _number(self.order, self.camera.get(_TAG.ColorSpace)) == 0xFFFF
        return uncalibrated and index is not None and index.data[:3] == b"R03"

    def kept(self, *, orientation: int = 1) -> bytes | None:
        """A block with its prefix, without place, thumbnail and maker note; None where nothing is left of it.

        An `orientation` other than 1 is written into it. A block that would be longer than MAX_BYTES is left out.
        """
        main = {tag: entry for tag, entry in self.main.items() if tag in _KEPT_TAGS}
        camera = {tag: entry for tag, entry in self.camera.items() if tag in _KEPT_CAMERA_TAGS}
        turn: _Directory = {_TAG.Orientation: _Entry(_SHORT, 1, struct.pack(self.order + "H", orientation))}
        turn = turn if orientation != 1 else {}
        block = _block(self.order, {**main, **turn}, camera, self.interop)
        if len(block) > MAX_BYTES:
            block = _block(self.order, turn, {}, {})
        return block if len(block) > len(PREFIX) else None


def parse(block: bytes | None) -> Exif:
    """With or without the prefix; what cannot be read is left out."""
    tiff = (block or b"").removeprefix(PREFIX).removeprefix(PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return Exif()
    main_at, main_tags = _number(order, _Entry(_LONG, 1, tiff[4:8])), _KEPT_TAGS | {_TAG.Orientation, ExifTags.IFD.Exif}
    main = _directory(tiff, order, main_at, main_tags)
    camera_at, camera_tags = _number(order, main.get(ExifTags.IFD.Exif)), _KEPT_CAMERA_TAGS | {ExifTags.IFD.Interop}
    camera = _directory(tiff, order, camera_at, camera_tags)
    interop = _directory(tiff, order, _number(order, camera.get(ExifTags.IFD.Interop)), _KEPT_INTEROP_TAGS)
    return Exif(order, main, camera, interop)


def _number(order: str, entry: _Entry | None) -> int | None:
    form = {1: "B", _SHORT: "H", _LONG: "I"}.get(entry.kind) if entry else None
    if entry is None or form is None or len(entry.data) < struct.calcsize(form):
        return None
    return int(struct.unpack_from(order + form, entry.data)[0])


def _directory(tiff: bytes, order: str, at: int | None, tags: Collection[int]) -> _Directory:
    """The first entry of each of `tags`."""
    entries: dict[int, _Entry] = {}
    if not at or at + 2 > len(tiff):
        return entries
    first, (count,) = at + 2, struct.unpack_from(order + "H", tiff, at)
    last = min(first + count * _ENTRY_BYTES, len(tiff) - _ENTRY_BYTES + 1)
    for entry_at in range(first, last, _ENTRY_BYTES):
        tag, kind, values, offset = struct.unpack_from(order + "HHII", tiff, entry_at)
        size = values * _VALUE_BYTES.get(kind, 0)
        start = entry_at + 8 if size <= 4 else offset
        if tag in tags and tag not in entries and 0 < size <= MAX_BYTES and start + size <= len(tiff):
            entries[tag] = _Entry(kind, values, tiff[start : start + size])
    return entries


def _block(order: str, main: _Directory, camera: _Directory, interop: _Directory) -> bytes:
    """Only the prefix where all three are empty."""
    at = 8 + _size(main, bool(camera or interop))
    after = b""
    if camera or interop:
        camera_at, interop_at = at, at + _size(camera, bool(interop))
        main = {**main, ExifTags.IFD.Exif: _pointer(order, camera_at)}
        if interop:
            camera = {**camera, ExifTags.IFD.Interop: _pointer(order, interop_at)}
        after = _written(order, camera, camera_at) + (_written(order, interop, interop_at) if interop else b"")
    if not main:
        return PREFIX
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return PREFIX + head + _written(order, main, 8) + after


def _pointer(order: str, at: int) -> _Entry:
    return _Entry(_LONG, 1, struct.pack(order + "I", at))


def _size(directory: _Directory, with_pointer: bool) -> int:
    beyond = sum(len(e.data) + len(e.data) % 2 for e in directory.values() if len(e.data) > 4)
    return 6 + _ENTRY_BYTES * (len(directory) + with_pointer) + beyond


def _written(order: str, directory: _Directory, at: int) -> bytes:
    """The directory as it stands at `at`, with no other behind it (TIFF 6.0, section 2)."""
    table, beyond, beyond_at = b"", b"", at + 6 + _ENTRY_BYTES * len(directory)
    for tag, (kind, values, data) in sorted(directory.items()):
        value = data.ljust(4, b"\0")
        if len(data) > 4:
            value = struct.pack(order + "I", beyond_at + len(beyond))
            beyond += data + bytes(len(data) % 2)
        table += struct.pack(order + "HHI", tag, kind, values) + value
    return struct.pack(order + "H", len(directory)) + table + bytes(4) + beyond
