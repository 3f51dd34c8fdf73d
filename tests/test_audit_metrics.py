"""Metrics against scikit-image on whole pictures, against their definitions, and on masks of every shape."""

import json
import math
from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from serve_app.audit import metrics
from serve_app.audit.metrics import BAND_PX, EDGE_PX, MAX_PSNR_DB, METRICS, Pictures, compare
from serve_app.audit.record import BETTER, Compared
from serve_app.edit.paste import grow, soft_mask
from serve_app.models import Pixels

from .pictures import blank, masks, noise, spot

FEATHER_PX = 3


def scene(width: int = 160, height: int = 120) -> Pixels:
    """A photo as photos are: smooth, with some texture."""
    rough = noise(width, height, 1).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(rough, (0, 0), 3) + 40, np.uint8)


def disc(width: int = 160, height: int = 120, x: int = 80, y: int = 60, radius: int = 30) -> Pixels:
    return np.asarray(cv2.circle(blank(width, height), (x, y), radius, 255, -1))


def edited(photo: Pixels, mask: Pixels, paint: Pixels, feather_px: int = FEATHER_PX) -> Pixels:
    opacity = soft_mask(mask, feather_px)[..., None]
    return np.asarray(np.rint(opacity * paint + (1 - opacity) * photo), np.uint8)


def measured(
    picture: Pixels, photo: Pixels, mask: Pixels, reference: Pixels | None = None, feather_px: int = FEATHER_PX
) -> Compared:
    return compare(picture, photo, mask, reference=reference, feather_px=feather_px)


def pictures(picture: Pixels, mask: Pixels, reference: Pixels) -> Pictures:
    return Pictures(picture=picture, photo=reference, mask=mask, reference=reference, feather_px=FEATHER_PX)


def test_the_table_names_every_field_and_its_direction() -> None:
    names = [metric.name for metric in METRICS]
    assert names == list(Compared.model_fields) == list(BETTER)
    assert all(metric.title and metric.words.endswith(".") for metric in METRICS)


def test_every_metric_says_where_it_comes_from() -> None:
    assert [metric.name for metric in METRICS if "Source:" not in (metric.measure.__doc__ or "")] == []


def test_a_mask_of_everything_gives_what_scikit_image_gives_for_the_whole_picture() -> None:
    reference, picture = scene(), np.roll(scene(), 1, axis=0)
    got = measured(picture, picture, np.full((120, 160), 255, np.uint8), reference)
    assert got.psnr_db == pytest.approx(peak_signal_noise_ratio(reference, picture, data_range=255), abs=1e-9)
    assert got.mae == pytest.approx(np.abs(reference.astype(int) - picture).mean(), abs=1e-9)
    whole = structural_similarity(
        reference,
        picture,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )[1]
    assert got.ssim == pytest.approx(whole.mean(), abs=1e-9)


@pytest.mark.parametrize("where", [(80, 60), (0, 0), (159, 60), (4, 119)])
def test_inside_a_mask_only_the_masks_pixels_count(where: tuple[int, int]) -> None:
    mask = disc(x=where[0], y=where[1], radius=14)
    reference, picture = noise(160, 120, 1), noise(160, 120, 2)
    got, inside = pictures(picture, mask, reference), mask > 0
    error = mean_squared_error(reference[inside], picture[inside])
    assert metrics.psnr_db(got) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)
    assert metrics.mae(got) == pytest.approx(np.abs(reference.astype(int) - picture)[inside].mean(), abs=1e-9)
    whole = structural_similarity(
        reference,
        picture,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )[1]
    assert metrics.ssim(got) == pytest.approx(whole[inside].mean(), abs=1e-12)


def test_what_differs_far_outside_the_mask_moves_nothing_inside() -> None:
    mask, reference, picture = spot(160, 120, 20, 20, 10), noise(160, 120, 1), noise(160, 120, 2)
    other = picture.copy()
    other[60:] = 0
    for metric in (metrics.psnr_db, metrics.ssim, metrics.mae):
        assert metric(pictures(picture, mask, reference)) == metric(pictures(other, mask, reference))


def test_equal_pictures_are_as_close_as_json_can_say() -> None:
    photo, mask = scene(), disc()
    got = measured(photo, photo, mask, photo.copy())
    assert (got.psnr_db, got.mae, got.outside_max) == (MAX_PSNR_DB, 0, 0)
    assert got.ssim == pytest.approx(1, abs=1e-12)
    json.dumps(got.model_dump(), allow_nan=False)


def test_nothing_finite_is_above_equal() -> None:
    reference = np.zeros((700, 700, 3), np.uint8)
    picture = reference.copy()
    picture[0, 0, 0] = 1
    assert metrics.psnr_db(pictures(picture, np.full((700, 700), 255, np.uint8), reference)) == MAX_PSNR_DB


def test_the_reference_itself_is_compared_with_nothing() -> None:
    got = measured(scene(), scene(), disc())
    assert (got.psnr_db, got.ssim, got.mae) == (None, None, None)
    assert got.seam_gradient_ratio is not None


def test_one_grey_level_beyond_the_feather_is_seen() -> None:
    photo, mask = scene(), disc()
    within, beyond = edited(photo, mask, photo + 9), edited(photo, mask, photo + 9)
    assert measured(within, photo, mask).outside_max == 0
    beyond[0, 0, 1] += 1
    assert measured(beyond, photo, mask).outside_max == 1


def test_what_may_change_ends_with_the_feather() -> None:
    photo, mask = scene(), spot(160, 120, 20, 20, 10)
    for column, largest in ((29 + FEATHER_PX, 0), (30 + FEATHER_PX, 3)):
        picture = photo.copy()
        picture[25, column] += 3
        assert measured(picture, photo, mask).outside_max == largest


def test_a_seam_that_is_not_there_is_not_seen() -> None:
    photo = scene(400, 300)
    got = measured(photo, photo, disc(400, 300, 200, 150, 60))
    assert got.seam_gradient_ratio == pytest.approx(1, abs=0.15)
    assert got.seam_colour_shift is not None and got.seam_colour_shift < 2.3


def test_a_stronger_seam_is_measured_as_stronger() -> None:
    photo, mask = scene(), disc()
    steps = [measured(edited(photo, mask, photo + np.uint8(step)), photo, mask) for step in (0, 10, 30, 60)]
    for weaker, stronger in pairwise(steps):
        assert (weaker.seam_gradient_ratio or 0) < (stronger.seam_gradient_ratio or 0)
        assert (weaker.seam_colour_shift or 0) < (stronger.seam_colour_shift or 0)


def test_a_smeared_seam_is_below_one() -> None:
    photo, mask = noise(160, 120), disc()
    smeared = np.asarray(cv2.GaussianBlur(photo, (0, 0), 4))
    ratio = measured(edited(photo, mask, smeared), photo, mask).seam_gradient_ratio
    assert ratio is not None and ratio < 0.9


@pytest.mark.parametrize("is_turned", [False, True])
def test_the_bands_are_where_they_are_said_to_be(is_turned: bool) -> None:
    """A bright line in each column in turn, of a mask whose edge is between columns 99 and 100."""
    beyond = 100 + FEATHER_PX + EDGE_PX
    along, outer, inner = range(100 - EDGE_PX, beyond), range(beyond, beyond + BAND_PX), range(100 - BAND_PX, 100)
    level, bright, grey_level = 90, 255, 1 / 255

    def gradient(line: int, band: range) -> float:
        """Mean over the band: central differences see the line from both sides."""
        hits = (line - 1 in band) + (line + 1 in band)
        return max(hits / len(band) * (bright - level) / 255 / 2, grey_level)

    mask, photo = blank(200, 60), np.full((60, 200, 3), level, np.uint8)
    mask[:, :100] = 255
    for line in range(75, 130):
        drawn = photo.copy()
        drawn[:, line] = bright
        turned = (drawn.transpose(1, 0, 2).copy(), mask.T.copy()) if is_turned else (drawn, mask)
        got = measured(turned[0], turned[0], turned[1])
        assert got.seam_gradient_ratio == pytest.approx(gradient(line, along) / gradient(line, outer)), line
        assert (got.seam_colour_shift or 0) > 0.1 or line not in (*inner, *outer), line
        assert (got.seam_colour_shift or 0) < 1e-9 or line in (*inner, *outer), line


def test_colour_shift_is_the_distance_in_cielab() -> None:
    """Black and white are 100 of L* apart."""
    mask = blank(200, 60)
    mask[:, :100] = 255
    photo = np.full((60, 200, 3), 255, np.uint8)
    picture = np.where(mask[..., None] > 0, np.uint8(0), photo)
    assert measured(picture, photo, mask, feather_px=0).seam_colour_shift == pytest.approx(100, abs=0.01)


def test_what_is_far_from_the_mask_does_not_move_the_seam() -> None:
    photo, mask = scene(400, 300), disc(400, 300, 200, 150, 40)
    other = photo.copy()
    other[grow(mask, FEATHER_PX + EDGE_PX + BAND_PX + 2) == 0] = 0
    # `busy` has a wider ring.
    figures = [measured(of, of, mask).model_dump(exclude={"busy"}) for of in (photo, other)]
    assert figures[0] == figures[1]


def test_a_mask_of_everything_has_no_seam_and_an_empty_one_no_inside() -> None:
    photo = scene()
    full = measured(photo, photo, np.full((120, 160), 255, np.uint8), photo)
    assert (full.seam_gradient_ratio, full.seam_colour_shift, full.outside_max) == (None, None, 0)
    empty = measured(photo, photo, blank(160, 120), photo)
    assert set(empty.model_dump().values()) == {None, 0}


def test_other_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"the reference is \(119, 160\)"):
        measured(scene(), scene(), disc(), scene(160, 119))


@settings(max_examples=150)
@given(masks(60), st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 8]))
def test_every_mask_has_figures_that_json_can_say(mask: Pixels, seed: int, feather_px: int) -> None:
    height, width = mask.shape
    photo, paint, reference = (noise(width, height, seed + number) for number in range(3))
    picture = edited(photo, mask, paint, feather_px)
    got = measured(picture, photo, mask, reference, feather_px)
    json.dumps(got.model_dump(), allow_nan=False)
    assert got.outside_max == 0
    assert got.psnr_db is not None and 0 <= got.psnr_db <= MAX_PSNR_DB
    assert (got.ssim is None) == (min(mask.shape) < 11)
    assert got.ssim is None or -1 <= got.ssim <= 1
    assert got.seam_gradient_ratio is None or got.seam_gradient_ratio > 0
    assert (got.seam_gradient_ratio is None) == (got.seam_colour_shift is None)


def test_a_stored_figure_that_is_not_measured_any_more_is_left_out() -> None:
    photo = scene()
    figures = measured(photo, photo, disc())
    assert Compared.model_validate(figures.model_dump() | {"lpips": 0.1}) == figures


def test_whether_the_object_is_gone_is_measured_as_of_an_edit() -> None:
    """A picture that is the photo, and one in which the disc is filled with what is round it."""
    truth, mask = scene(), disc()
    photo = truth.copy()
    photo[mask > 0] = (230, 20, 30)
    back, gone = measured(photo, photo, mask), measured(truth, photo, mask)
    assert back.put_back == pytest.approx(1) and back.contrast is not None and back.cast is not None
    assert gone.put_back is not None and gone.contrast is not None and gone.cast is not None
    assert gone.put_back < 0.3 and gone.contrast < back.contrast and gone.cast < back.cast


def test_a_cell_of_an_earlier_version_has_no_such_figures() -> None:
    kept = {"psnr_db": None, "ssim": None, "mae": None, "outside_max": 0}
    seam = {"seam_gradient_ratio": 1.0, "seam_colour_shift": 1.0}
    assert Compared.model_validate(kept | seam).put_back is None


def test_an_object_is_looked_for_where_it_was_drawn_and_not_where_the_mask_has_grown() -> None:
    photo, mask = scene(), disc()
    photo[mask > 0] = (230, 20, 30)
    grown = grow(mask, 9)
    got = compare(scene(), photo, grown, reference=None, feather_px=FEATHER_PX, drawn=mask)
    by_drawn, by_grown = measured(scene(), photo, mask), measured(scene(), photo, grown)
    assert got.put_back == by_drawn.put_back != by_grown.put_back
    assert got.contrast == by_grown.contrast != by_drawn.contrast
    assert (got.busy, got.cast) == (by_grown.busy, by_grown.cast)
