import contextlib
import io
import struct
import sys
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from serve_app.edit.images import Photo, decode_photo, encode_edited, encode_jpeg, encode_preview
from serve_app.edit.masks import decode_mask
from serve_app.errors import ImageTooLarge, InputError, InvalidImage, OutOfMemory
from serve_app.models import Pixels
from serve_app.settings import Limits

from .pictures import noise

LIMITS = Limits()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FORMATS = ["JPEG", "PNG", "WEBP", "HEIF"]
TAG = ExifTags.Base


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def blocks(width: int = 48, height: int = 32) -> Image.Image:
    """Large blocks of colour, which every codec keeps nearly as they are."""
    return Image.fromarray(noise(3, 2)).resize((width, height), Image.Resampling.NEAREST)


def exif_of(data: bytes) -> Image.Exif:
    return Image.open(io.BytesIO(data)).getexif()


def icc_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC 2.4 input profile (ICC.1:2001-04, 6.1 and 6.2)."""
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, offset + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    d50 = struct.pack(">iii", 63190, 65536, 54061)
    head = struct.pack(
        ">I4sI4s4s4s12x4s28x12s48x", offset + len(body), b"lcms", 0x02400000, b"scnr", space, b"Lab ", b"acsp", d50
    )
    return head + struct.pack(">I", len(tags)) + table + body


#: Grey whose values are linear in light, on paper that is not quite white.
LINEAR_GREY = icc_profile(
    b"GRAY",
    {b"kTRC": b"curv" + bytes(8), b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 50_000, 52_000, 42_000)},
).replace(b"Lab ", b"XYZ ", 1)
#: CMYK that shows L* 100 (white) or 0 (black) by its K alone: lut8 with a grid of 2 points.
K_ONLY = icc_profile(
    b"CMYK",
    {
        b"A2B0": b"mft1"
        + bytes(4)
        + bytes([4, 3, 2, 0])
        + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
        + bytes(range(256)) * 4
        + b"".join(bytes([0 if k else 255, 128, 128]) for _ in range(8) for k in (0, 1))
        + bytes(range(256)) * 3
    },
)


class TestFormats:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_each_format_is_decoded_to_what_was_encoded(self, kind: str) -> None:
        picture = blocks()
        photo = decode_photo(encoded(picture, kind, quality=95), LIMITS)
        assert photo.pixels.dtype == np.uint8 and photo.pixels.shape == (32, 48, 3)
        assert photo.size == (48, 32)
        # Away from the edges of the blocks, where codecs ring.
        centres = (slice(8, None, 16), slice(8, None, 16))
        assert np.abs(photo.pixels[centres].astype(int) - np.asarray(picture)[centres]).max() < 12
        assert photo.content_type == {"JPEG": "image/jpeg", "HEIF": "image/heic"}.get(kind, f"image/{kind.lower()}")

    def test_a_phones_jpeg_with_a_second_picture_behind_it_is_a_jpeg(self) -> None:
        data = encoded(blocks(), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
        photo = decode_photo(data, LIMITS)
        assert (photo.size, photo.content_type) == ((48, 32), "image/jpeg")

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_an_animations_first_frame_is_the_photo(self, kind: str) -> None:
        red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
        data = encoded(red, kind, save_all=True, append_images=[blue], duration=100, lossless=True)
        assert (decode_photo(data, LIMITS).pixels == (255, 0, 0)).all()

    def test_heic_without_the_extra_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = encoded(blocks(), "HEIF")
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(InvalidImage, match=r"the photo is HEIC.*flux-fill-serve\[heif\]"):
            decode_photo(data, LIMITS)
        assert decode_photo(encoded(blocks(), "JPEG"), LIMITS).size == (48, 32)

    @pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF"])
    def test_other_formats_are_refused(self, kind: str) -> None:
        with pytest.raises(InvalidImage, match="is not a JPEG, PNG, WebP or HEIC picture"):
            decode_photo(encoded(blocks(), kind), LIMITS)


class TestModes:
    def test_grey_becomes_rgb(self) -> None:
        grey = noise(20, 10)[..., 0]
        assert (decode_photo(encoded(Image.fromarray(grey)), LIMITS).pixels == grey[..., None]).all()

    def test_one_bit_becomes_black_and_white(self) -> None:
        bits = Image.fromarray(noise(20, 10)[..., 0]).convert("1")
        assert np.array_equal(decode_photo(encoded(bits), LIMITS).pixels, np.asarray(bits.convert("RGB")))

    def test_a_palette_is_looked_up(self) -> None:
        picture = blocks()
        pixels = decode_photo(encoded(picture.quantize(8)), LIMITS).pixels
        assert np.array_equal(pixels, np.asarray(picture))

    def test_a_palettes_transparent_entry_shows_white(self) -> None:
        picture = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
        picture.putpalette([10, 20, 30, 40, 50, 60])
        pixels = decode_photo(encoded(picture, transparency=b"\x00\xff"), LIMITS).pixels
        assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]

    def test_16_bit_grey_is_scaled_not_clipped(self) -> None:
        grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
        assert decode_photo(encoded(Image.fromarray(grey)), LIMITS).pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]

    @pytest.mark.parametrize(
        ("mode", "colour", "seen"),
        [
            ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
            ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
            ("RGBA", (200, 0, 0, 51), (244, 204, 204)),
            ("LA", (100, 255), (100, 100, 100)),
            ("LA", (100, 0), (255, 255, 255)),
        ],
    )
    def test_transparency_shows_white(self, mode: str, colour: tuple[int, ...], seen: tuple[int, ...]) -> None:
        pixels = decode_photo(encoded(Image.new(mode, (4, 3), colour)), LIMITS).pixels
        assert (np.abs(pixels.astype(int) - seen) <= 1).all()

    @pytest.mark.parametrize(("mode", "key"), [("RGB", (200, 0, 0)), ("L", 100)])
    def test_a_transparent_colour_shows_white(self, mode: str, key: int | tuple[int, ...]) -> None:
        data = encoded(Image.new(mode, (4, 3), key), transparency=key)
        assert (decode_photo(data, LIMITS).pixels == 255).all()

    @pytest.mark.parametrize(
        ("cmyk", "rgb"), [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))]
    )
    def test_cmyk_as_adobe_writes_it_is_not_inverted(self, cmyk: tuple[int, ...], rgb: tuple[int, ...]) -> None:
        data = encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95)
        assert b"Adobe" in data
        photo = decode_photo(data, LIMITS)
        assert np.abs(photo.pixels.astype(int) - rgb).max() < 6


class TestProfile:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_an_rgb_profile_is_kept_and_written_back(self, kind: str) -> None:
        photo = decode_photo(encoded(blocks(), kind, icc_profile=SRGB), LIMITS)
        assert photo.icc == SRGB
        for data in (encode_edited(photo, photo.pixels), encode_preview(photo, photo.pixels)):
            assert Image.open(io.BytesIO(data)).info["icc_profile"] == SRGB

    def test_a_grey_picture_keeps_its_rgb_profile(self) -> None:
        assert decode_photo(encoded(Image.new("L", (4, 4), 9), icc_profile=SRGB), LIMITS).icc == SRGB

    def test_a_grey_profile_is_converted_away(self) -> None:
        photo = decode_photo(encoded(Image.new("L", (4, 4), 128), icc_profile=LINEAR_GREY), LIMITS)
        # IEC 61966-2-1: linear 128 / 255 is 188 in sRGB.
        assert photo.icc is None and np.abs(photo.pixels.astype(int) - 188).max() <= 1

    def test_a_cmyk_profile_is_converted_away(self) -> None:
        cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
        photo = decode_photo(encoded(cyan, "JPEG", icc_profile=K_ONLY), LIMITS)
        # The profile, not the formula, says what is seen: without K this one shows white.
        assert photo.icc is None and photo.pixels.min() > 250

    def test_the_papers_white_is_white(self) -> None:
        photo = decode_photo(encoded(Image.new("L", (4, 4), 255), icc_profile=LINEAR_GREY), LIMITS)
        assert (photo.pixels == 255).all()

    def test_a_profile_longer_than_a_jpeg_holds_is_dropped(self) -> None:
        length = 17_000_000
        profile = struct.pack(">I", length) + SRGB[4:] + bytes(length - len(SRGB))
        photo = decode_photo(encoded(blocks(), "WEBP", icc_profile=profile), LIMITS)
        assert photo.icc is None and encode_edited(photo, photo.pixels)

    @pytest.mark.parametrize("profile", [K_ONLY, LINEAR_GREY], ids=["cmyk", "grey"])
    def test_a_profile_of_other_pixels_is_dropped(self, profile: bytes) -> None:
        photo = decode_photo(encoded(blocks(), icc_profile=profile), LIMITS)
        assert photo.icc is None and np.array_equal(photo.pixels, np.asarray(blocks()))

    def test_cmyk_with_an_rgb_profile_drops_it(self) -> None:
        assert decode_photo(encoded(Image.new("CMYK", (8, 8)), "JPEG", icc_profile=SRGB), LIMITS).icc is None

    @pytest.mark.parametrize("damaged", [b"nothing", SRGB[:200], SRGB[:128] + bytes(len(SRGB) - 128)])
    def test_a_damaged_profile_is_dropped(self, damaged: bytes) -> None:
        photo = decode_photo(encoded(blocks(), icc_profile=damaged), LIMITS)
        assert photo.icc is None and photo.size == (48, 32)


#: A picture each of whose corners has its own colour, upright.
MARKED = np.zeros((16, 32, 3), np.uint8)
MARKED[:8, :16], MARKED[:8, 16:], MARKED[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)

#: By EXIF orientation, how the upright picture is stored: the inverse of what a viewer does.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


def turned(upright: Pixels, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[TAG.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    return encoded(stored, kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))


class TestOrientation:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_the_photo_is_upright(self, orientation: int, kind: str) -> None:
        photo = decode_photo(turned(MARKED, orientation, kind), LIMITS)
        assert photo.size == (32, 16)
        assert np.abs(photo.pixels.astype(int) - MARKED).max() < 12

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_the_mask_is_upright(self, orientation: int) -> None:
        upright = np.zeros((16, 32), np.uint8)
        upright[1:5, 20:31] = 255
        assert np.array_equal(decode_mask(turned(upright, orientation), LIMITS, (32, 16)), upright)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_the_table_agrees_with_pillow(self, orientation: int) -> None:
        stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](MARKED)))
        stored.getexif()[TAG.Orientation] = orientation
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(stored)), MARKED)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_heic_is_turned_once(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[TAG.Orientation] = orientation
        stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](MARKED)))
        # From bytes, not from the object, the writer takes the orientation for the container too.
        data = encoded(stored, "HEIF", exif=exif.tobytes())
        assert (b"irot" in data or b"imir" in data) == (orientation > 1)
        photo = decode_photo(data, LIMITS)
        assert photo.size == (32, 16) and np.abs(photo.pixels.astype(int) - MARKED).max() < 20

    def test_in_heic_the_exif_alone_turns_nothing(self) -> None:
        data = turned(MARKED, 6, "HEIF")
        assert b"irot" not in data
        assert decode_photo(data, LIMITS).size == (16, 32)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_what_is_written_is_not_turned_again(self, orientation: int) -> None:
        photo = decode_photo(turned(MARKED, orientation), LIMITS)
        data = encode_edited(photo, photo.pixels)
        assert TAG.Orientation not in exif_of(data)
        assert Image.open(io.BytesIO(data)).size == (32, 16)

    def test_an_impossible_orientation_is_ignored(self) -> None:
        exif = Image.Exif()
        exif[TAG.Orientation] = 99
        assert decode_photo(encoded(blocks(), exif=exif), LIMITS).size == (48, 32)


def telling_exif() -> Image.Exif:
    """Everything that must go, and what may stay."""
    exif = Image.Exif()
    exif[TAG.Make], exif[TAG.DateTime], exif[TAG.Orientation] = "Lumen", "2026:05:04 03:02:01", 1
    exif[TAG.XMLPacket] = b"<x:xmpmeta>exif:GPSLatitude 48,51N</x:xmpmeta>"
    exif[TAG.IPTCNAA] = b"City: Paris"
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (48.0, 51.0, 24.0), 27: b"GPS-METHOD"}
    exif[ExifTags.IFD.Exif] = {
        TAG.DateTimeOriginal: "2026:05:04 03:02:00",
        TAG.ExposureTime: 0.008,
        TAG.MakerNote: b"MAKER-NOTE 48.85",
        TAG.UserComment: b"ASCII\0\0\0at home",
        0xFDE8: b"PRIVATE 48.85",
    }
    return exif


class TestExif:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_date_and_camera_stay_and_the_place_goes(self, kind: str) -> None:
        photo = decode_photo(encoded(blocks(), kind, exif=telling_exif(), xmp=b"<x>48,51N</x>"), LIMITS)
        data = encode_edited(photo, photo.pixels)
        exif = exif_of(data)
        assert dict(exif).keys() == {TAG.Make, TAG.DateTime, ExifTags.IFD.Exif}
        assert (exif[TAG.Make], exif[TAG.DateTime]) == ("Lumen", "2026:05:04 03:02:01")
        camera = exif.get_ifd(ExifTags.IFD.Exif)
        assert camera.keys() == {TAG.DateTimeOriginal, TAG.ExposureTime}
        assert camera[TAG.DateTimeOriginal] == "2026:05:04 03:02:00"
        assert float(camera[TAG.ExposureTime]) == pytest.approx(0.008)
        for telling in (b"GPS", b"Paris", b"xmpmeta", b"48,51N", b"MAKER-NOTE", b"at home", b"PRIVATE"):
            assert telling not in data

    def test_the_thumbnail_goes(self) -> None:
        exif = telling_exif().tobytes()
        # A second directory (TIFF 6.0, section 2) with the tags that name a thumbnail's place and length.
        first = 6 + 8
        entries = struct.unpack(">H", exif[first : first + 2])[0]
        link = first + 2 + 12 * entries
        second = struct.pack(">HHHIIHHIII", 2, 0x0201, 4, 1, len(exif) - 6 + 30, 0x0202, 4, 1, 14, 0)
        exif = exif[:link] + struct.pack(">I", len(exif) - 6) + exif[link + 4 :] + second + b"THUMBNAIL-JPEG"
        data = encoded(blocks(), "JPEG", exif=exif)
        assert exif_of(data).get_ifd(ExifTags.IFD.IFD1)[0x0202] == 14
        photo = decode_photo(data, LIMITS)
        edited = encode_edited(photo, photo.pixels)
        assert b"THUMBNAIL" not in edited and not exif_of(edited).get_ifd(ExifTags.IFD.IFD1)

    def test_the_preview_has_none(self) -> None:
        photo = decode_photo(encoded(blocks(), exif=telling_exif()), LIMITS)
        assert not exif_of(encode_preview(photo, photo.pixels))

    def test_without_any_there_is_none(self) -> None:
        assert decode_photo(encoded(blocks()), LIMITS).exif is None

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize(
        "damaged",
        [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", telling_exif().tobytes()[:60]],
        ids=["nonsense", "endless", "truncated"],
    )
    def test_a_damaged_block_does_not_fail_the_edit(self, damaged: bytes) -> None:
        photo = decode_photo(encoded(blocks(), "JPEG", exif=damaged), LIMITS)
        assert photo.size == (48, 32)
        assert Image.open(io.BytesIO(encode_edited(photo, photo.pixels))).size == (48, 32)

    def test_a_block_too_long_for_jpeg_is_dropped(self) -> None:
        exif = Image.Exif()
        exif[TAG.ImageDescription] = "x" * 70_000
        photo = decode_photo(encoded(blocks(), exif=exif), LIMITS)
        assert photo.exif is None and encode_edited(photo, photo.pixels)


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "said"),
        [
            (Limits(image_bytes=100), r"bytes; the limit is 100"),
            (Limits(image_pixels=48 * 32 - 1), r"48 x 32; the limit is 1,535 pixels"),
            (Limits(image_side_px=47), r"48 x 32; the limit is 47 px a side"),
        ],
    )
    @pytest.mark.parametrize("kind", FORMATS)
    def test_each_limit_is_named(self, kind: str, limits: Limits, said: str) -> None:
        data = encoded(blocks(), kind)
        with pytest.raises(ImageTooLarge, match="the photo .*" + said):
            decode_photo(data, limits)
        with pytest.raises(ImageTooLarge, match="the mask .*" + said):
            decode_mask(data, limits, (48, 32))

    @pytest.mark.parametrize("kind", FORMATS)
    def test_exactly_the_limit_is_allowed(self, kind: str) -> None:
        data = encoded(blocks(), kind)
        limits = Limits(image_bytes=len(data), image_pixels=48 * 32, image_side_px=48)
        assert decode_photo(data, limits).size == (48, 32)

    @pytest.mark.parametrize(
        ("width", "height"), [(10_001, 1), (8_000, 8_000), (13_000, 13_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)]
    )
    def test_a_bomb_is_refused_by_its_header(self, width: int, height: int) -> None:
        # No pixels follow: decoding would say "damaged". Pillow itself warns at 90 and refuses at 179 megapixels.
        with pytest.raises(ImageTooLarge):
            decode_photo(png_header(width, height), LIMITS)

    def test_no_memory_is_not_the_pictures_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(self: Image.Image) -> None:
            raise MemoryError

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
        with pytest.raises(OutOfMemory, match="no memory left to decode the photo"):
            decode_photo(encoded(blocks()), LIMITS)


def progressive(scans: int) -> bytes:
    """A progressive JPEG whose last scan is there again until there are so many: small, and slow to decode."""
    data = encoded(blocks(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + data[-2:]


class TestScans:
    def test_a_progressive_jpeg_is_read(self) -> None:
        assert decode_photo(progressive(10), Limits()).pixels.shape == (32, 48, 3)

    @pytest.mark.slow
    def test_a_large_png_is_no_jpeg_of_many_scans(self) -> None:
        large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2400, 1600, 3), np.uint8))
        data = encoded(large, compress_level=0)
        assert data.count(b"\xff\xda") > 100
        assert decode_photo(data, Limits()).size == (1600, 2400)

    def test_a_jpeg_that_would_take_hours_is_refused_before_it_is_decoded(self) -> None:
        with pytest.raises(InvalidImage, match="more than 100 JPEG scans"):
            decode_photo(progressive(101), Limits())


class TestDamage:
    def test_empty(self) -> None:
        with pytest.raises(InvalidImage, match="the photo is empty"):
            decode_photo(b"", LIMITS)
        with pytest.raises(InvalidImage, match="the mask is empty"):
            decode_mask(b"", LIMITS, (1, 1))

    @pytest.mark.parametrize("data", [b"\0" * 100, b"<html>not found</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
    def test_not_a_picture(self, data: bytes) -> None:
        with pytest.raises(InvalidImage, match="the photo is"):
            decode_photo(data, LIMITS)

    def test_zero_size(self) -> None:
        with pytest.raises(InvalidImage):
            decode_photo(png_header(0, 10), LIMITS)

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
    def test_truncated(self, kind: str, share: float) -> None:
        data = encoded(Image.fromarray(noise(80, 60)), kind)
        with pytest.raises(InvalidImage, match="the photo is"):
            decode_photo(data[: int(len(data) * share)], LIMITS)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", FORMATS)
    def test_whatever_the_bytes_it_is_a_picture_or_an_input_error(self, kind: str) -> None:
        good = encoded(Image.fromarray(MARKED), kind, exif=telling_exif(), icc_profile=SRGB, quality=60)
        place = st.one_of(st.integers(0, 63), st.integers(0, len(good) - 1))

        @settings(max_examples=100)
        @given(changes=st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=20))
        def decode(changes: list[tuple[int, int]]) -> None:
            data = bytearray(good)
            for index, value in changes:
                data[index] = value
            with contextlib.suppress(InputError):
                decode_photo(bytes(data), LIMITS)
            with contextlib.suppress(InputError):
                decode_mask(bytes(data), LIMITS, (32, 16))

        decode()


def a_photo(pixels: Pixels) -> Photo:
    return Photo(pixels=pixels, icc=None, exif=None, content_type="image/png")


class TestEncoding:
    def test_the_edited_photo_keeps_full_colour_resolution(self) -> None:
        red_and_blue = np.zeros((32, 32, 3), np.uint8)
        red_and_blue[:, ::2, 0], red_and_blue[:, 1::2, 2] = 255, 255
        data = encode_edited(a_photo(red_and_blue), red_and_blue)
        decoded = np.asarray(Image.open(io.BytesIO(data))).astype(int)
        assert np.abs(decoded - red_and_blue).max() < 30

    @pytest.mark.parametrize(
        ("size", "expected"),
        [((1000, 500), (512, 256)), ((300, 1024), (150, 512)), ((512, 9), (512, 9)), ((3, 2), (3, 2))],
    )
    def test_the_previews_longest_side_is_512_and_never_enlarged(
        self, size: tuple[int, int], expected: tuple[int, int]
    ) -> None:
        pixels = noise(*size)
        assert Image.open(io.BytesIO(encode_preview(a_photo(pixels), pixels))).size == expected

    def test_a_long_thin_photo_has_a_preview(self) -> None:
        pixels = noise(4000, 1)
        assert Image.open(io.BytesIO(encode_preview(a_photo(pixels), pixels))).size == (512, 1)

    def test_the_preview_shows_the_photo(self) -> None:
        pixels = np.asarray(blocks(1024, 512))
        preview = np.asarray(Image.open(io.BytesIO(encode_preview(a_photo(pixels), pixels))))
        expected = cv2.resize(pixels, (512, 256), interpolation=cv2.INTER_AREA)
        assert np.abs(preview[32::64, 40::80].astype(int) - expected[32::64, 40::80]).mean() < 5

    def test_higher_quality_is_nearer(self) -> None:
        pixels = noise(64, 64)
        low, high = (encode_jpeg(pixels, quality=quality, icc=None, exif=None) for quality in (10, 95))
        distance = [
            np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - pixels).mean() for data in (low, high)
        ]
        assert distance[1] < distance[0]

    def test_decoded_pixels_cannot_be_written_to(self) -> None:
        pixels = decode_photo(turned(MARKED, 6), LIMITS).pixels
        with pytest.raises(ValueError, match="read-only"):
            pixels[0] = 0
