"""What files say beside their pixels, and what no pixel depends on."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from serve_app.edit.images import decode_photo, encode_edited
from serve_app.errors import ImageTooLarge, InvalidImage

from .picture_files import chunk, exif, segment, short, text, unsound, with_chunks, with_segments
from .test_images import FORMATS, LIMITS, MARKED, SRGB, TAG, blocks, encoded, exif_of, progressive

XMP_TURNED = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def edited(data: bytes) -> bytes:
    photo = decode_photo(data, LIMITS)
    return encode_edited(photo, photo.pixels)


def resized(data: bytes, size: tuple[int, int]) -> bytes:
    """The JPEG with another size in its frame header (T.81, B.2.2)."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", size[1], size[0]) + data[at + 9 :]


class TestJpeg:
    @pytest.mark.parametrize("tail", [b"\xff\xda" * 200, np.random.default_rng(7).bytes(100_000), b"\xff\xd8\xff\xda"])
    def test_what_follows_the_end_is_no_part_of_the_picture(self, tail: bytes) -> None:
        data = encoded(blocks(), "JPEG")
        assert np.array_equal(decode_photo(data + tail, LIMITS).pixels, decode_photo(data, LIMITS).pixels)

    def test_scans_within_metadata_are_not_the_pictures(self) -> None:
        data = encoded(blocks(), "JPEG")
        noted = with_segments(data, segment(4, b"\xff\xda" * 200), segment(1, b"Exif\0\0" + b"\xff\xda\0\2" * 200))
        assert np.array_equal(decode_photo(noted, LIMITS).pixels, decode_photo(data, LIMITS).pixels)

    def test_a_larger_picture_may_have_fewer_scans(self) -> None:
        with pytest.raises(InvalidImage, match="more than 24 JPEG scans"):
            decode_photo(resized(progressive(25), (7_000, 7_000)), LIMITS)
        with pytest.raises(InvalidImage, match="more than 99 JPEG scans"):
            decode_photo(resized(progressive(100), (4_000, 3_010)), LIMITS)
        with pytest.raises(ImageTooLarge):
            decode_photo(resized(progressive(10), (7_072, 7_072)), LIMITS)

    def test_a_file_of_nothing_but_segments_is_refused_early(self) -> None:
        with pytest.raises(InvalidImage, match="more than 5,000 JPEG segments"):
            decode_photo(with_segments(encoded(blocks(), "JPEG"), segment(5, b"") * 5_001), LIMITS)

    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    @pytest.mark.parametrize(
        "how", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=lambda how: [*how, ""][0]
    )
    @pytest.mark.parametrize("left_out", [1, 2])
    def test_a_missing_end_marker_costs_nothing(self, mode: str, how: dict[str, bool], left_out: int) -> None:
        data = encoded(Image.fromarray(MARKED).convert(mode), "JPEG", **how)
        assert np.array_equal(decode_photo(data[:-left_out], LIMITS).pixels, decode_photo(data, LIMITS).pixels)

    @pytest.mark.parametrize(
        "how", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=lambda how: [*how, ""][0]
    )
    def test_a_file_that_ends_before_its_pixels_do_is_refused(self, how: dict[str, bool]) -> None:
        data = encoded(blocks(), "JPEG", **how)
        first = data.index(b"\xff\xda")
        for end in range(first, len(data) - 4, 7):
            with pytest.raises(InvalidImage, match="the photo is damaged"):
                decode_photo(data[:end], LIMITS)

    def test_a_progressive_file_without_its_last_scans_is_refused(self) -> None:
        data = encoded(blocks(), "JPEG", progressive=True)
        for _ in range(data.count(b"\xff\xda") - 1):
            data = data[: data.rindex(b"\xff\xda")]
            with pytest.raises(InvalidImage, match="ends before its pixels do"):
                decode_photo(data, LIMITS)

    def test_the_density_goes_on(self) -> None:
        assert Image.open(io.BytesIO(edited(encoded(blocks(), "JPEG", dpi=(300, 150))))).info["dpi"] == (300, 150)

    def test_the_density_is_turned_with_the_picture(self) -> None:
        data = encoded(blocks(), "JPEG", dpi=(300, 150), exif=exif([short(TAG.Orientation, 6)]))
        assert Image.open(io.BytesIO(edited(data))).info["dpi"] == (150, 300)

    def test_without_a_density_none_is_claimed(self) -> None:
        assert "dpi" not in Image.open(io.BytesIO(edited(encoded(blocks())))).info


class TestPng:
    @pytest.mark.parametrize("kind", [b"tEXt", b"pHYs", b"iCCP", b"eXIf", b"tIME", b"cICP", b"abCd"])
    def test_a_damaged_chunk_that_no_pixel_needs_is_left_out(self, kind: bytes) -> None:
        data = encoded(blocks())
        for body in (b"", b"Software\0x", struct.pack(">IIB", 11811, 11811, 1), bytes(4)):
            photo = decode_photo(with_chunks(data, chunk(kind, body, sound=False)), LIMITS)
            assert np.array_equal(photo.pixels, np.asarray(blocks()))
            assert (photo.icc, photo.exif, photo.dpi) == (None, None, None)

    @pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT"])
    def test_a_wrong_checksum_of_what_the_pixels_need_is_fatal(self, kind: bytes) -> None:
        data = encoded(blocks().quantize(4))
        assert decode_photo(data, LIMITS).size == (48, 32)
        with pytest.raises(InvalidImage, match=f"the checksum of a PNG chunk {kind.decode()} is wrong"):
            decode_photo(unsound(data, kind), LIMITS)

    def test_a_damaged_or_missing_end_costs_nothing(self) -> None:
        data = encoded(blocks())
        for changed in (unsound(data, b"IEND"), data[:-12], data + b"more"):
            assert np.array_equal(decode_photo(changed, LIMITS).pixels, np.asarray(blocks()))

    def test_a_profile_of_megabytes_goes_on(self) -> None:
        profile = struct.pack(">I", 1_400_000) + SRGB[4:] + np.random.default_rng(0).bytes(1_400_000 - len(SRGB))
        data = encoded(blocks(), icc_profile=profile)
        assert decode_photo(data, LIMITS).icc == profile
        assert Image.open(io.BytesIO(edited(data))).info["icc_profile"] == profile

    @pytest.mark.parametrize("packed", [zlib.compress(bytes(20_000_000)), zlib.compress(SRGB)[:-9], b"junk", b""])
    def test_a_profile_that_is_damaged_or_a_bomb_is_left_out(self, packed: bytes) -> None:
        photo = decode_photo(with_chunks(encoded(blocks()), chunk(b"iCCP", b"x\0\0" + packed)), LIMITS)
        assert photo.icc is None and np.array_equal(photo.pixels, np.asarray(blocks()))

    @pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
    def test_text_of_any_length_is_not_read(self, kind: bytes) -> None:
        packed = zlib.compress(b"x" * 5_000_000)
        body = {b"zTXt": b"comment\0\0", b"iTXt": b"comment\0\1\0\0\0"}[kind] + packed
        data = with_chunks(encoded(blocks()), chunk(kind, body))
        assert np.array_equal(decode_photo(data, LIMITS).pixels, np.asarray(blocks()))

    def test_a_file_of_nothing_but_chunks_is_refused_early(self) -> None:
        with pytest.raises(InvalidImage, match="more than 100,000 PNG chunks"):
            decode_photo(with_chunks(encoded(blocks()), chunk(b"tEXt") * 100_001), LIMITS)

    def test_the_density_goes_on(self) -> None:
        assert Image.open(io.BytesIO(edited(encoded(blocks(), dpi=(300, 300))))).info["dpi"] == (300, 300)

    @pytest.mark.parametrize("density", [(0, 0), (2**32 - 1, 1), (11811, 0)])
    def test_an_impossible_density_is_left_out(self, density: tuple[int, int]) -> None:
        data = with_chunks(encoded(blocks()), chunk(b"pHYs", struct.pack(">IIB", *density, 1)))
        assert decode_photo(data, LIMITS).dpi is None

    def test_an_animations_picture_is_the_first(self) -> None:
        red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
        data = encoded(red, save_all=True, append_images=[blue], default_image=True)
        assert (decode_photo(data, LIMITS).pixels == (255, 0, 0)).all()


class TestOrientation:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_xmp_turns_nothing(self, kind: str) -> None:
        data = encoded(blocks(), kind, xmp=XMP_TURNED)
        if kind == "PNG":
            data = with_chunks(encoded(blocks()), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_TURNED))
        # pillow_heif's writer turns the container by XMP, too, which its reader undoes.
        turned = kind == "HEIF" and b"irot" in data
        assert XMP_TURNED in data and decode_photo(data, LIMITS).size == ((32, 48) if turned else (48, 32))

    @pytest.mark.parametrize(
        "entry",
        [short(TAG.Orientation, 0), short(TAG.Orientation, 9), text(TAG.Orientation, b"6"), (0x0112, 5, 1, bytes(8))],
    )
    def test_an_impossible_one_turns_nothing(self, entry: tuple[int, int, int, bytes]) -> None:
        assert decode_photo(encoded(blocks(), "JPEG", exif=exif([entry])), LIMITS).size == (48, 32)


class TestExif:
    NAMES = ("José Müller".encode(), "© 2024 José".encode(), "写真家".encode(), "Jörg".encode("latin-1"))

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("name", NAMES)
    def test_text_keeps_its_bytes(self, kind: str, name: bytes) -> None:
        block = exif([text(TAG.Artist, name), text(TAG.Copyright, name)], [text(TAG.CameraOwnerName, name)])
        data = edited(encoded(blocks(), kind, exif=block))
        assert data.count(name + b"\0") == 3

    def test_numbers_keep_their_bytes(self) -> None:
        values = struct.pack("<iiII", -2, 0, 0, 0)
        block = exif(
            [text(TAG.Make, b"Lumen")], [(TAG.ExposureBiasValue, 10, 1, values[:8]), (0x829A, 5, 1, values[8:])]
        )
        camera = exif_of(edited(encoded(blocks(), "JPEG", exif=block)))
        assert camera[TAG.Make] == "Lumen" and struct.pack("<ii", -2, 0) in camera.tobytes()

    @pytest.mark.parametrize(
        "entry",
        [
            (TAG.Artist, 2, 2**31, b"x" * 9),
            (TAG.Artist, 99, 4, b"abcd"),
            (TAG.Artist, 2, 0, b""),
            (0x8769, 4, 1, b"\xff" * 4),
        ],
        ids=["too long", "of no type", "empty", "directory beyond the end"],
    )
    def test_a_damaged_entry_leaves_the_others(self, entry: tuple[int, int, int, bytes]) -> None:
        block = exif([text(TAG.Make, b"Lumen"), entry])
        assert dict(exif_of(edited(encoded(blocks(), "JPEG", exif=block)))).keys() - {0x8769} == {TAG.Make}

    def test_many_large_entries_at_one_place_take_no_memory(self) -> None:
        # 60,000 bytes that 5,000 tags name: 300 MB, were each copied.
        entries = b"".join(struct.pack("<HHII", 0x9000 + i, 7, 60_000, 8) for i in range(5_000))
        block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5_000) + entries + bytes(60_000)
        assert decode_photo(with_chunks(encoded(blocks()), chunk(b"eXIf", block[6:])), LIMITS).exif is None

    def test_a_block_that_no_segment_holds_is_left_out(self) -> None:
        block = exif([text(TAG.Artist, b"x" * 40_000), text(TAG.Copyright, b"y" * 40_000)])
        photo = decode_photo(with_chunks(encoded(blocks()), chunk(b"eXIf", block[6:])), LIMITS)
        assert photo.exif is None
