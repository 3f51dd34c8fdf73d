"""Which pixels a mask edits, and which masks are refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from serve_app.edit.masks import decode_mask
from serve_app.errors import MaskMismatch, MaskUnclear
from serve_app.models import Pixels

from .pictures import masks, noise
from .test_images import FORMATS, LIMITS, encoded, turned

SIZE = (64, 48)


def stroke(width: int = 64, height: int = 48) -> Pixels:
    drawn = np.zeros((height, width), np.uint8)
    cv2.line(drawn, (width // 5, height // 3), (width * 4 // 5, height // 2), 255, 5)
    return drawn


def on_clear(colour: tuple[int, int, int], below: int = 0, opacity: int = 255) -> Image.Image:
    """The stroke on transparency, as a canvas exports it."""
    drawn = np.full((48, 64, 4), (below, below, below, 0), np.uint8)
    drawn[stroke() > 0] = (*colour, opacity)
    return Image.fromarray(drawn)


def labels(mode: str = "L") -> Image.Image:
    drawn = Image.fromarray((stroke() > 0).astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        drawn.putpalette([0, 0, 0, 128, 0, 0])
    return drawn


def scene(width: int = 160, height: int = 120) -> Image.Image:
    """As a photo: slopes of colour, and no two places alike."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) * 2 % 256], -1).astype(np.uint8))


class TestWhatIsEdited:
    @pytest.mark.parametrize(("value", "seen"), [(0, 0), (127, 0), (128, 255), (255, 255)])
    def test_thresholded_at_128(self, value: int, seen: int) -> None:
        mask = decode_mask(encoded(Image.new("L", (4, 3), value)), LIMITS, (4, 3))
        assert mask.shape == (3, 4) and mask.dtype == np.uint8 and (mask == seen).all()

    @pytest.mark.parametrize(
        ("mode", "colour", "seen"),
        [
            ("1", 1, 255),
            ("I;16", 32768, 255),
            ("I;16", 32767, 0),
            ("RGB", (255, 255, 255), 255),
            ("RGB", (0, 255, 0), 255),  # luminance 150
            ("RGB", (255, 0, 0), 0),  # luminance 76
            ("RGBA", (255, 255, 255, 255), 255),
            ("RGBA", (255, 255, 255, 0), 0),
            ("RGBA", (0, 0, 0, 0), 0),
            ("LA", (255, 255), 255),
            ("LA", (255, 100), 0),
        ],
    )
    def test_light_and_opaque_is_edited(self, mode: str, colour: int | tuple[int, ...], seen: int) -> None:
        assert (decode_mask(encoded(Image.new(mode, (4, 3), colour)), LIMITS, (4, 3)) == seen).all()

    def test_a_cmyk_mask(self) -> None:
        data = encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
        assert (decode_mask(data, LIMITS, (8, 8)) == 255).all()

    @pytest.mark.parametrize("kind", FORMATS)
    def test_the_stroke_is_edited(self, kind: str) -> None:
        mask = decode_mask(encoded(Image.fromarray(stroke()), kind, quality=90), LIMITS, SIZE)
        # Within a pixel of it, as codecs ring.
        assert not (mask & ~cv2.dilate(stroke(), np.ones((3, 3)))).any()
        assert not (cv2.erode(stroke(), np.ones((3, 3))) & ~mask).any()

    @pytest.mark.parametrize("below", [0, 255])
    def test_white_on_transparency_is_edited(self, below: int) -> None:
        data = encoded(on_clear((255, 255, 255), below))
        assert np.array_equal(decode_mask(data, LIMITS, SIZE), stroke())

    def test_a_soft_mask_is_edited_from_half_on(self) -> None:
        soft = cv2.GaussianBlur(stroke(), (0, 0), 4)
        soft = (soft.astype(float) * 255 / soft.max()).astype(np.uint8)
        assert np.array_equal(decode_mask(encoded(Image.fromarray(soft)), LIMITS, SIZE) > 0, soft >= 128)


class TestNothingToEdit:
    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "CMYK"])
    def test_a_black_mask_edits_nothing(self, kind: str, mode: str) -> None:
        if (mode == "CMYK" and kind != "JPEG") or (mode == "RGBA" and kind == "JPEG"):
            return
        black = Image.new("L", SIZE).convert("RGB" if mode == "CMYK" else mode)
        black = black.convert(mode) if mode == "CMYK" else black
        assert not decode_mask(encoded(black, kind), LIMITS, SIZE).any()

    def test_a_clear_canvas_edits_nothing_whatever_lies_below(self) -> None:
        drawn = np.dstack([noise(*SIZE), np.zeros(SIZE[::-1], np.uint8)])
        assert not decode_mask(encoded(Image.fromarray(drawn)), LIMITS, SIZE).any()

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "HEIF"])
    def test_the_noise_of_compression_means_nothing(self, kind: str) -> None:
        grain = np.random.default_rng(0).integers(0, 12, SIZE[::-1], np.uint8)
        assert not decode_mask(encoded(Image.fromarray(grain), kind, quality=80), LIMITS, SIZE).any()

    @pytest.mark.parametrize(
        ("drawn", "said"),
        [
            (on_clear((255, 0, 0)), "the brightest is 76,"),
            (on_clear((255, 0, 0), opacity=128), "the brightest is 38,"),
            (on_clear((0, 0, 0)), "only in its transparency"),
            (on_clear((0, 0, 0)).quantize(4), "only in its transparency"),
            (labels(), "the brightest is 1,"),
            (labels("I;16"), "the brightest is 1,"),
            (labels("P"), "the brightest is 38,"),
            (Image.fromarray(stroke() // 2), "the brightest is 127,"),
        ],
        ids=["red", "half red", "black on clear", "black on clear palette", "labels", "labels 16", "palette", "grey"],
    )
    def test_something_without_anything_bright_is_refused(self, drawn: Image.Image, said: str) -> None:
        with pytest.raises(MaskUnclear, match=rf"{said}.*invert.*alpha channel"):
            decode_mask(encoded(drawn), LIMITS, SIZE)

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "HEIF"])
    @pytest.mark.parametrize("colour", ["red", "blue", (40, 40, 40)])
    def test_lossy_strokes_in_dark_colours_are_refused(self, kind: str, colour: str | tuple[int, ...]) -> None:
        drawn = Image.new("RGB", SIZE)
        drawn.paste(colour, mask=Image.fromarray(stroke()))
        with pytest.raises(MaskUnclear, match="no bright pixels"):
            decode_mask(encoded(drawn, kind, quality=90), LIMITS, SIZE)


class TestPhotos:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_a_photo_is_refused(self, kind: str) -> None:
        with pytest.raises(MaskUnclear, match="looks like a photo"):
            decode_mask(encoded(scene(), kind), LIMITS, (160, 120))

    @pytest.mark.parametrize("left", [1.0, 0.5, 0.2])
    def test_a_photo_with_a_hole_is_refused(self, left: float) -> None:
        cut = scene()
        cut.putalpha(
            Image.fromarray(np.where(np.arange(160) < 160 * left, 255, 0).astype(np.uint8)[None].repeat(120, 0))
        )
        with pytest.raises(MaskUnclear, match="looks like a photo"):
            decode_mask(encoded(cut), LIMITS, (160, 120))

    def test_the_cat_is_refused(self) -> None:
        cat = Image.open(Path("docs/images/before_after.jpg"))
        with pytest.raises(MaskUnclear, match="looks like a photo"):
            decode_mask(encoded(cat, "JPEG"), LIMITS, cat.size)

    @pytest.mark.parametrize("blur", [0, 2, 12])
    @pytest.mark.parametrize("colours", [["white"], ["red", "white"], ["yellow"], ["lime", "cyan"]])
    @pytest.mark.parametrize("quality", [None, 10, 75])
    def test_strokes_are_no_photo_however_soft_or_compressed(
        self, colours: list[str], blur: int, quality: int | None
    ) -> None:
        drawn, places = Image.new("RGB", (640, 480)), np.random.default_rng(1).uniform(0, 1, (8, 4)) * ([640, 480] * 2)
        for number, ends in enumerate(places):
            ImageDraw.Draw(drawn).line(tuple(ends), fill=colours[number % len(colours)], width=30)
        soft = drawn.filter(ImageFilter.GaussianBlur(blur))
        data = encoded(soft, "JPEG", quality=quality) if quality else encoded(soft)
        decode_mask(data, LIMITS, (640, 480))

    @pytest.mark.parametrize("quality", [None, 10, 75])
    def test_grey_is_no_photo(self, quality: int | None) -> None:
        grey = cv2.GaussianBlur(noise(640, 480)[..., 0], (0, 0), 3)
        grey = cv2.normalize(grey, None, 0, 255, cv2.NORM_MINMAX)
        drawn = Image.fromarray(grey).convert("RGB")
        data = encoded(drawn, "JPEG", quality=quality) if quality else encoded(drawn)
        assert decode_mask(data, LIMITS, (640, 480)).any()


class TestOtherSizes:
    @pytest.mark.parametrize("size", [(50, 40), (200, 160), (101, 80), (400, 317)])
    def test_another_size_is_scaled(self, size: tuple[int, int]) -> None:
        small = np.zeros((size[1], size[0]), np.uint8)
        small[: size[1] // 2] = 255
        mask = decode_mask(encoded(Image.fromarray(small)), LIMITS, (100, 80))
        assert mask.shape == (80, 100) and set(np.unique(mask)) == {0, 255}
        assert mask[:39].all() and not mask[41:].any()

    def test_whole_pixels_are_repeated_and_joined(self) -> None:
        mask = np.where(noise(25, 20)[..., 0] < 128, 0, 255).astype(np.uint8)
        enlarged = mask.repeat(4, axis=0).repeat(4, axis=1)
        assert np.array_equal(decode_mask(encoded(Image.fromarray(mask)), LIMITS, (100, 80)), enlarged)
        assert np.array_equal(decode_mask(encoded(Image.fromarray(enlarged)), LIMITS, (25, 20)), mask)

    @pytest.mark.parametrize("size", [(102, 80), (100, 82), (80, 100)])
    def test_another_shape_is_refused_by_both_sizes(self, size: tuple[int, int]) -> None:
        said = rf"the mask is {size[0]} x {size[1]} and the photo 100 x 80"
        with pytest.raises(MaskMismatch, match=said):
            decode_mask(encoded(Image.new("L", size)), LIMITS, (100, 80))

    def test_sizes_are_compared_after_turning(self) -> None:
        upright = np.zeros((16, 32), np.uint8)
        assert decode_mask(turned(upright, 6), LIMITS, (64, 32)).shape == (32, 64)
        with pytest.raises(MaskMismatch):
            decode_mask(turned(upright, 6), LIMITS, (32, 64))

    @pytest.mark.parametrize(
        ("mask_size", "photo_size"),
        [((512, 28), (9000, 500)), ((64, 47), (2016, 1512)), ((512, 26), (6000, 300)), ((26, 512), (300, 6000))],
    )
    def test_a_side_may_be_a_pixel_off_in_rounding(
        self, mask_size: tuple[int, int], photo_size: tuple[int, int]
    ) -> None:
        mask = decode_mask(encoded(Image.new("L", mask_size, 255)), LIMITS, photo_size)
        assert mask.shape == photo_size[::-1] and mask.all()

    @pytest.mark.parametrize(("mask_size", "photo_size"), [((512, 30), (9000, 500)), ((64, 46), (2016, 1512))])
    def test_two_pixels_off_is_another_shape(self, mask_size: tuple[int, int], photo_size: tuple[int, int]) -> None:
        with pytest.raises(MaskMismatch):
            decode_mask(encoded(Image.new("L", mask_size)), LIMITS, photo_size)

    @pytest.mark.parametrize("row", range(400, 408))
    def test_a_hairline_of_a_larger_mask_is_edited(self, row: int) -> None:
        drawn = np.zeros((960, 1280), np.uint8)
        drawn[row] = 255
        mask = decode_mask(encoded(Image.fromarray(drawn)), LIMITS, (640, 480))
        assert mask[row // 2].all() and mask.sum() == 255 * 640

    @given(mask=masks(60), width=st.integers(1, 60), height=st.integers(1, 60))
    def test_a_pixel_is_edited_where_any_part_of_an_edited_one_falls_into_it(
        self, mask: Pixels, width: int, height: int
    ) -> None:
        try:
            scaled = decode_mask(encoded(Image.fromarray(mask)), LIMITS, (width, height))
        except MaskMismatch:
            return
        # At a scale that both sizes divide.
        fine = mask.repeat(height, axis=0).repeat(width, axis=1)
        parts = fine.reshape(height, mask.shape[0], width, mask.shape[1])
        assert np.array_equal(scaled, parts.max(axis=(1, 3)))
