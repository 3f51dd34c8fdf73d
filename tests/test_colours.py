"""What a photo's numbers stand for: named by a number, by EXIF or by a profile."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from serve_app.edit.images import Photo, decode_photo, encode_edited, encode_preview, unchanged

from .picture_files import chunk, exif, short, text, with_chunks
from .test_images import LIMITS, SRGB, TAG, blocks, encoded

SRGB_POINTS, P3, P3_BT709, BT2020, PQ, HLG, P3_PQ = (1, 13), (12, 13), (12, 1), (9, 14), (9, 16), (9, 18), (12, 16)


def named(picture: Image.Image, kind: str, points: tuple[int, int]) -> bytes:
    """With its colours named by the numbers of primaries and transfer."""
    if kind == "PNG":
        return with_chunks(encoded(picture), chunk(b"cICP", bytes([*points, 0, 1])))
    options = {"color_primaries": points[0], "transfer_characteristics": points[1], "matrix_coefficients": 0}
    return encoded(picture, kind, quality=-1, chroma=444, **options)


def described(icc: bytes | None) -> str | None:
    return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(icc))).strip() if icc else None


def shown(photo: Photo) -> np.ndarray:
    """In sRGB, as a viewer with colour management shows it."""
    picture, to = Image.fromarray(photo.pixels), ImageCms.createProfile("sRGB")
    if photo.icc:
        picture = ImageCms.profileToProfile(picture, ImageCms.ImageCmsProfile(io.BytesIO(photo.icc)), to)  # type: ignore[assignment]
    return np.asarray(picture).astype(int)


def uniform(*colour: int) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


@pytest.mark.parametrize("kind", ["PNG", "HEIF"])
class TestNumbers:
    @pytest.mark.parametrize(
        ("points", "name"),
        [(SRGB_POINTS, None), (P3, "Display P3"), (P3_BT709, "Display P3"), (BT2020, "BT.2020"), ((5, 13), None)],
    )
    def test_a_profile_says_what_the_pixels_are(self, kind: str, points: tuple[int, int], name: str | None) -> None:
        photo = decode_photo(named(blocks(), kind, points), LIMITS)
        assert np.abs(photo.pixels.astype(int) - np.asarray(blocks())).max() <= 2, "the pixels are left as they are"
        for data in (encode_edited(photo, photo.pixels), encode_preview(photo, photo.pixels)):
            assert described(Image.open(io.BytesIO(data)).info.get("icc_profile")) == name

    @pytest.mark.parametrize(
        ("points", "signal", "white"),
        # 203 cd/m², SDR's white: PQ 58%, HLG 75% (ITU-R BT.2408, table 1).
        [(PQ, 148, 229), (P3_PQ, 148, 229), (HLG, 191, 229), (PQ, 0, 0), (HLG, 0, 0), (PQ, 255, 255), (HLG, 255, 255)],
    )
    def test_hdr_is_tone_mapped_to_srgb(self, kind: str, points: tuple[int, int], signal: int, white: int) -> None:
        photo = decode_photo(named(uniform(signal, signal, signal), kind, points), LIMITS)
        assert photo.icc is None and np.abs(photo.pixels.astype(int) - white).max() <= 3

    def test_a_picture_that_nothing_was_done_to_names_its_colours_as_before(self, kind: str) -> None:
        data = named(blocks(), kind, P3)
        photo = decode_photo(data, LIMITS)
        file, _ = unchanged(photo, data)
        assert described(decode_photo(file, LIMITS).icc) == "Display P3"


class TestValues:
    def test_display_p3s_primaries(self) -> None:
        icc = decode_photo(named(blocks(), "PNG", P3), LIMITS).icc
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc or b"")).profile
        # As in Apple's own Display P3 profile.
        expected = [(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)]
        columns = [profile.red_primary, profile.green_primary, profile.blue_primary]
        assert np.allclose([column[0] for column in columns if column], expected, atol=1e-4)

    def test_adobe_rgbs_primaries(self) -> None:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(decode_photo(CAMERA, LIMITS).icc or b"")).profile
        # Adobe RGB (1998) color image encoding, annex B.
        expected = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
        columns = [profile.red_primary, profile.green_primary, profile.blue_primary]
        assert np.allclose([column[0] for column in columns if column], expected, atol=1e-4)

    def test_grey_is_grey_and_red_is_redder(self) -> None:
        grey = decode_photo(named(uniform(128, 128, 128), "PNG", P3), LIMITS)
        assert np.abs(shown(grey) - 128).max() <= 1
        red = decode_photo(named(uniform(200, 100, 100), "PNG", P3), LIMITS)
        assert shown(red)[0, 0, 0] > 205 and shown(red)[0, 0, 1] < 98

    def test_tones_stay_in_order(self) -> None:
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(3, 0)).convert("RGB")
        for points in (PQ, HLG):
            steps = np.diff(decode_photo(named(ramp, "PNG", points), LIMITS).pixels[0, :, 0].astype(int))
            assert (steps >= 0).all()


CAMERA = encoded(
    blocks(),
    "JPEG",
    exif=exif([text(TAG.Make, b"Lumen")], [short(TAG.ColorSpace, 0xFFFF)], [text(1, b"R03")]),
)


class TestPrecedence:
    def test_adobe_rgb_by_exif_gets_its_profile(self) -> None:
        photo = decode_photo(CAMERA, LIMITS)
        assert described(photo.icc) == "Compatible with Adobe RGB (1998)"
        edited = Image.open(io.BytesIO(encode_edited(photo, photo.pixels)))
        assert edited.info["icc_profile"] == photo.icc
        assert edited.getexif().get_ifd(0x8769)[TAG.ColorSpace] == 0xFFFF

    @pytest.mark.parametrize(("space", "index"), [(1, b"R03"), (0xFFFF, b"R98"), (0xFFFF, None)])
    def test_other_exif_says_no_colour_space(self, space: int, index: bytes | None) -> None:
        block = exif((), [short(TAG.ColorSpace, space)], [text(1, index)] if index else ())
        assert decode_photo(encoded(blocks(), "JPEG", exif=block), LIMITS).icc is None

    def test_a_files_own_profile_wins_over_exif(self) -> None:
        block = exif((), [short(TAG.ColorSpace, 0xFFFF)], [text(1, b"R03")])
        assert decode_photo(encoded(blocks(), "JPEG", exif=block, icc_profile=SRGB), LIMITS).icc == SRGB

    def test_a_pngs_numbers_win_over_its_profile(self) -> None:
        data = with_chunks(encoded(blocks(), icc_profile=SRGB), chunk(b"cICP", bytes([*P3, 0, 1])))
        assert described(decode_photo(data, LIMITS).icc) == "Display P3"

    def test_numbers_of_no_colours_leave_the_profile(self) -> None:
        data = with_chunks(encoded(blocks(), icc_profile=SRGB), chunk(b"cICP", bytes([2, 2, 0, 1])))
        assert decode_photo(data, LIMITS).icc == SRGB
