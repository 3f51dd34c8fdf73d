"""A photo that nothing was done to: its own file, pixels bit for bit, without what says where it was taken."""

import io
import struct
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from serve_app.edit.containers import content_type, without_place
from serve_app.edit.images import decode_photo, unchanged
from serve_app.errors import InputError

from .picture_files import chunk, exif, segment, short, text, with_chunks, with_segments
from .test_images import FORMATS, LIMITS, MARKED, SRGB, TAG, blocks, encoded, exif_of, telling_exif

TELLING = (b"GPS", b"Paris", b"xmpmeta", b"48,51N", b"MAKER-NOTE", b"at home", b"PRIVATE", b"40.7")
XMP = b"<x:xmpmeta>exif:GPSLatitude 48,51N</x:xmpmeta>"


def rewritten(data: bytes) -> bytes:
    photo = decode_photo(data, LIMITS)
    file, kind = unchanged(photo, data)
    assert kind == photo.content_type == content_type(file)
    again = decode_photo(file, LIMITS)
    assert np.array_equal(again.pixels, photo.pixels) and (again.icc, again.dpi) == (photo.icc, photo.dpi)
    return file


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


class TestPlace:
    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_the_place_goes_and_date_camera_and_colours_stay(self, kind: str, orientation: int) -> None:
        told = telling_exif()
        told[TAG.Orientation] = orientation
        data = encoded(Image.fromarray(MARKED), kind, exif=told, xmp=XMP, icc_profile=SRGB)
        assert sum(what in data for what in TELLING) >= 6
        file = rewritten(data)
        for telling in TELLING:
            assert telling not in file
        kept = exif_of(file)
        assert (kept[TAG.Make], kept[TAG.DateTime]) == ("Lumen", "2026:05:04 03:02:01")
        assert kept.get_ifd(ExifTags.IFD.Exif)[TAG.DateTimeOriginal] == "2026:05:04 03:02:00"
        assert not kept.get_ifd(ExifTags.IFD.GPSInfo)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_a_file_that_says_nothing_keeps_its_picture(self, kind: str) -> None:
        assert len(rewritten(encoded(blocks(), kind))) <= len(encoded(blocks(), kind))

    @pytest.mark.parametrize("kind", FORMATS)
    def test_twice_is_once(self, kind: str) -> None:
        file = rewritten(encoded(blocks(), kind, exif=telling_exif()))
        assert rewritten(file) == file

    @pytest.mark.parametrize("kind", FORMATS)
    def test_damaged_metadata_goes(self, kind: str) -> None:
        file = rewritten(encoded(blocks(), kind, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff GPS 48.85"))
        assert b"GPS" not in file

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_an_animation_stays_one(self, kind: str) -> None:
        red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
        data = encoded(red, kind, save_all=True, append_images=[blue], duration=100, exif=telling_exif())
        assert Image.open(io.BytesIO(rewritten(data))).n_frames == 2  # type: ignore[attr-defined]


class TestJpeg:
    def test_what_other_segments_say_goes(self) -> None:
        data = with_segments(
            encoded(blocks(), "JPEG", comment="40.7", dpi=(300, 300)),
            segment(1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
            segment(13, b"Photoshop 3.0\0 Paris"),
            segment(12, b"PRIVATE"),
        )
        file = rewritten(data)
        assert not [telling for telling in TELLING if telling in file]

    def test_a_video_behind_the_picture_goes(self) -> None:
        assert b"40.7" not in rewritten(encoded(blocks(), "JPEG") + box(b"ftyp") + box(b"moov", b"+40.7-074.0/"))

    def test_a_missing_end_is_put_there(self) -> None:
        assert rewritten(encoded(blocks(), "JPEG")[:-2]).endswith(b"\xff\xd9")

    def test_a_scan_is_left_as_it_is(self) -> None:
        data = encoded(blocks(), "JPEG", progressive=True, exif=telling_exif())
        scans = data[data.index(b"\xff\xc2") :]
        assert rewritten(data).endswith(scans)

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_how_colours_are_coded_stays(self, mode: str) -> None:
        rewritten(encoded(blocks().convert(mode), "JPEG", exif=telling_exif()))


def heic(pieces: int, *, version: int = 1, in_idat: bool = False, wide: bool = False) -> bytes:
    """A container with a picture, EXIF in so many pieces and XMP, as ISO/IEC 14496-12 lets them be listed (8.11.3 and
    8.11.6). The picture itself does not decode."""
    item = struct.pack(">I", 6) + exif([text(TAG.Make, b"Lumen"), (0x8825, 4, 1, bytes(4))]) + b"GPS 48.85"
    bodies = {1: b"picture", 2: item, 3: b"xmpmeta 48.85"}
    id_form, count_form = (">I", ">I") if wide else (">H", ">H")
    names = [(1, b"hvc1\0"), (2, b"Exif\0"), (3, b"mime\0application/rdf+xml\0")]
    entries = [
        box(b"infe", bytes([3 if wide else 2, 0, 0, 0]) + struct.pack(id_form, i) + bytes(2) + n) for i, n in names
    ]
    iinf = box(b"iinf", bytes([wide, 0, 0, 0]) + struct.pack(count_form, 3) + b"".join(entries))
    data = b"".join(bodies.values())

    def meta(start: int) -> bytes:
        places, at = b"", start
        for number, body in bodies.items():
            cuts = [len(body) * i // pieces for i in range(pieces + 1)] if number == 2 else [0, len(body)]
            extents = [(at + a, b - a) for a, b in pairwise(cuts)]
            places += struct.pack(id_form, number) + (struct.pack(">H", in_idat) if version else b"") + bytes(2)
            places += struct.pack(">H", len(extents)) + b"".join(struct.pack(">II", *extent) for extent in extents)
            at += len(body)
        iloc = bytes([version, 0, 0, 0, 0x44, 0]) + struct.pack(count_form, 3) + places
        held = [box(b"hdlr", bytes(20)), box(b"iloc", iloc), iinf, *([box(b"idat", data)] if in_idat else [])]
        return box(b"meta", bytes(4) + b"".join(held))

    head = box(b"ftyp", b"heic" + bytes(4))
    start = 0 if in_idat else len(head + meta(0)) + 8
    return head + meta(start) + box(b"mdat", b"" if in_idat else data)


class TestPng:
    def test_text_goes_and_what_colours_look_like_stays(self) -> None:
        data = with_chunks(
            encoded(blocks().quantize(4), dpi=(300, 300)),
            chunk(b"gAMA", struct.pack(">I", 45455)),
            chunk(b"tEXt", b"Comment\0Paris"),
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
            chunk(b"prVt", b"PRIVATE"),
        )
        file = rewritten(data)
        assert b"gAMA" in file and not [telling for telling in TELLING if telling in file]


class TestHeic:
    @pytest.mark.parametrize(
        "tail", [box(b"mpvd", b"+40.7-074.0/"), box(b"ftyp", b"mp42") + box(b"moov", b"+40.7"), b"40.7"]
    )
    def test_what_follows_the_picture_goes(self, tail: bytes) -> None:
        assert b"40.7" not in rewritten(encoded(blocks(), "HEIF", exif=telling_exif()) + tail)

    @pytest.mark.parametrize("options", [{"tile_size": 64}, {"save_all": True, "append_images": [blocks()]}])
    def test_grids_and_rows_of_pictures(self, options: Mapping[str, object]) -> None:
        picture = blocks(192, 128)
        assert not [
            t for t in TELLING if t in rewritten(encoded(picture, "HEIF", exif=telling_exif(), xmp=XMP, **options))
        ]

    @pytest.mark.parametrize("pieces", [1, 2, 5])
    @pytest.mark.parametrize(
        "listed",
        [
            {},
            {"version": 0},
            {"version": 2, "wide": True},
            {"in_idat": True},
            {"version": 2, "wide": True, "in_idat": True},
        ],
        ids=lambda listed: "-".join([*listed, "plain"][:3]),
    )
    def test_items_are_found_however_they_are_listed(self, listed: Mapping[str, Any], pieces: int) -> None:
        data = heic(pieces, **listed)
        file = without_place(data)
        assert file is not None and len(file) == len(data) and b"picture" in file
        assert b"48.85" in data and b"48.85" not in file and b"GPS" not in file
        assert (b"Lumen" in file) == (pieces == 1)

    @pytest.mark.parametrize("odd", [(b"iinf", b"iinx"), (b"iloc", b"ilox"), (b"mdat", b"mdax")])
    def test_one_that_is_built_otherwise_is_not_rewritten(self, odd: tuple[bytes, bytes]) -> None:
        assert without_place(encoded(blocks(), "HEIF", exif=telling_exif()).replace(*odd)) is None

    def test_a_file_that_cannot_be_rewritten_becomes_a_jpeg(self) -> None:
        data = encoded(blocks(), "HEIF", exif=telling_exif())
        photo = decode_photo(data, LIMITS)
        file, kind = unchanged(photo, data.replace(b"iloc", b"ilox"))
        assert (kind, content_type(file)) == ("image/jpeg", "image/jpeg") and b"GPS" not in file

    @pytest.mark.parametrize("length", [26, 20, 9])
    def test_an_exif_item_never_grows(self, length: int) -> None:
        """A block of 26 bytes has no room for a prefix; a shorter one is damaged, and emptied."""
        block = b"II*\0" + struct.pack("<IHHHI4sI", 8, 1, TAG.Make, 2, 4, b"Lum", 0)
        file = rewritten(encoded(blocks(), "HEIF", exif=block[:length]))
        assert (b"Lum" in file) == (length == 26)
        if length > 14:
            assert dict(exif_of(file)) == ({TAG.Make: "Lum"} if length == 26 else {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_decodes_is_rewritten_to_the_same(kind: str) -> None:
    good = encoded(Image.fromarray(MARKED), kind, exif=telling_exif(), icc_profile=SRGB, quality=60)
    place = st.one_of(st.integers(0, 63), st.integers(0, len(good) - 1))

    @settings(max_examples=60)
    @given(changes=st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=5))
    def rewrite(changes: list[tuple[int, int]]) -> None:
        data = bytearray(good)
        for index, value in changes:
            data[index] = value
        try:
            photo = decode_photo(bytes(data), LIMITS)
        except InputError:
            return
        file, kind = unchanged(photo, bytes(data))
        if kind == photo.content_type:
            assert np.array_equal(decode_photo(file, LIMITS).pixels, photo.pixels)

    rewrite()


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\r", "image/png"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
        (b"\0\0\0\x18ftypheic", "image/heic"),
        (b"\0\0\0\x18ftypavif", None),
        (b"RIFF\0\0\0\0WAVE", None),
        (b"<html>", None),
        (b"", None),
    ],
)
def test_the_first_bytes_tell_the_content_type(start: bytes, kind: str | None) -> None:
    assert content_type(start) == kind


def test_adobe_rgb_without_a_profile_is_still_told() -> None:
    block = exif([text(TAG.Make, b"Lumen")], [short(TAG.ColorSpace, 0xFFFF)], [text(1, b"R03")])
    kept = exif_of(rewritten(encoded(blocks(), "JPEG", exif=block)))
    assert kept.get_ifd(ExifTags.IFD.Exif)[TAG.ColorSpace] == 0xFFFF
    assert kept.get_ifd(ExifTags.IFD.Interop)[1] == "R03"
