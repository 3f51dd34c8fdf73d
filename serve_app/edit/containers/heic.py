"""HEIC files (ISO/IEC 23008-12) as trees of boxes (ISO/IEC 14496-12)."""

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from . import exif

_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
#: Boxes beside which nothing is kept.
_KEPT = {b"ftyp", b"meta", b"mdat", b"free", b"skip"}
#: Items that hold no picture: EXIF, XMP, links.
_TELLING = {b"Exif", b"mime", b"uri "}
#: In front of an EXIF item's block: where its TIFF header begins (ISO/IEC 23008-12, A.2.1).
_HEADER_BYTES = 4
#: A picture of 50 megapixels has some 200 tiles.
_MAX_ITEMS, _MAX_TELLING = 5_000, 20
#: An item whose directory has no entries.
_EMPTY = bytes(_HEADER_BYTES) + b"MM\0*\0\0\0\x08" + bytes(6)


class _Box(NamedTuple):
    kind: bytes
    #: Of what is in it, and where the next one begins.
    start: int
    end: int


class _Bytes:
    """Big-endian numbers, one behind the other."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self.at = data, at

    def number(self, size: int) -> int:
        self.at += size
        if self.at > len(self._data):
            raise ValueError("a box is cut short")
        return int.from_bytes(self._data[self.at - size : self.at])


def is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS


def without_place(data: bytes) -> bytes:
    """The same file with its EXIF written over by what `exif` keeps of it, and its XMP by zeros; where other boxes
    follow the picture's, a phone's video, it ends. No offset changes. Raises ValueError for a file that is built
    otherwise than phones do."""
    boxes = list(_picture(data))
    changed = bytearray(data[: boxes[-1].end])
    meta = next(box for box in boxes if box.kind == b"meta")
    parts = {box.kind: box for box in _boxes(data, meta.start + 4, meta.end)}
    kinds, places = _kinds(data, parts[b"iinf"]), _places(data, parts)
    telling = {item for item, kind in kinds.items() if kind in _TELLING}
    if len(places) > _MAX_ITEMS or len(telling) > _MAX_TELLING:
        raise ValueError("there are too many items")
    shown = [place for item, pieces in places.items() if item not in telling for place in pieces]
    for item in telling:
        # As a rule in one piece; what is in several is emptied.
        whole = data[slice(*places[item][0])] if len(places[item]) == 1 else b""
        for start, end in places[item]:
            if end > len(changed) or any(start < shown_end and shown_start < end for shown_start, shown_end in shown):
                raise ValueError("an item lies beyond the picture, or within it")
            block = _kept(whole) if kinds[item] == b"Exif" else b""
            changed[start:end] = block.ljust(end - start, b"\0")
    return bytes(changed)


def _picture(data: bytes) -> Iterator[_Box]:
    """The first boxes of the file, to the last that belongs to the picture."""
    seen = set[bytes]()
    for box in _boxes(data, 0, len(data)):
        if box.kind not in _KEPT or (box.kind in seen and box.kind in (b"ftyp", b"meta")):
            break
        seen.add(box.kind)
        yield box
    if not {b"ftyp", b"meta", b"mdat"} <= seen:
        raise ValueError("the picture's boxes are not in front")


def _boxes(data: bytes, at: int, end: int) -> Iterator[_Box]:
    """Up to what is no box."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if size == 1:
            size, start = _Bytes(data, start).number(8), start + 8
        box_end = at + size if size else end
        if not start <= box_end <= end:
            return
        yield _Box(kind, start, box_end)
        at = box_end


def _kinds(data: bytes, box: _Box) -> Mapping[int, bytes]:
    """By item (14496-12, 8.11.6)."""
    wide = data[box.start] > 0
    entries = [entry for entry in _boxes(data, box.start + (8 if wide else 6), box.end) if entry.kind == b"infe"]
    kinds = {}
    for entry in entries:
        version, read = data[entry.start], _Bytes(data, entry.start + 4)
        if version < 2:
            raise ValueError("an item has no kind")
        item = read.number(4 if version > 2 else 2)
        kinds[item] = data[read.at + 2 : read.at + 6]
    return kinds


def _places(data: bytes, parts: Mapping[bytes, _Box]) -> Mapping[int, list[tuple[int, int]]]:
    """Where in the file each item's bytes are (14496-12, 8.11.3)."""
    read = _Bytes(data, parts[b"iloc"].start)
    version = read.number(4) >> 24
    sizes = read.number(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    places: dict[int, list[tuple[int, int]]] = {}
    for _ in range(read.number(4 if version > 1 else 2)):
        item = read.number(4 if version > 1 else 2)
        method = read.number(2) & 15 if version else 0
        if read.number(2) or method > 1:
            raise ValueError("an item is in another file, or made of others")
        base = read.number(base_size) + (parts[b"idat"].start if method else 0)
        places[item] = []
        pieces = read.number(2)
        if pieces > _MAX_TELLING:
            raise ValueError("an item is in too many pieces")
        for _ in range(pieces):
            read.number(index_size if version else 0)
            start = base + read.number(offset_size)
            length = read.number(length_size)
            if not length or start + length > len(data):
                raise ValueError("an item has no length, or is cut short")
            places[item].append((start, start + length))
    return places


def _kept(item: bytes) -> bytes:
    """What `exif` keeps of an item, or a block that says nothing, where that is no longer than the item. The container
    turns the picture."""
    skipped = int.from_bytes(item[:_HEADER_BYTES])
    block = exif.parse(item[_HEADER_BYTES + skipped :]).kept() or b""
    bare = block.removeprefix(exif.PREFIX)
    items = [struct.pack(">I", len(exif.PREFIX)) + block, bytes(_HEADER_BYTES) + bare] if block else []
    return next((kept for kept in [*items, _EMPTY] if len(kept) <= len(item)), b"")
