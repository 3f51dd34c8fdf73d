import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.edit.paste import FADE_PX, cut, grow, growth_px, paste, paste_window, share_out, soft_mask
from serve_app.edit.windows import Plan, plan
from serve_app.models import Box, Pixels
from serve_app.parameters import CropStrategy
from serve_app.settings import WindowSettings

from .pictures import MAGENTA, SMALL, blank, masks, noise, spot

strategies = st.sampled_from(CropStrategy)
feathers = st.sampled_from([0, 1, 3, 8])


def small(feather_px: int) -> WindowSettings:
    return SMALL.model_copy(update={"feather_px": feather_px})


def made(mask: Pixels, strategy: CropStrategy, feather_px: int) -> Plan:
    planned = plan(mask, strategy, small(feather_px))
    assert planned is not None
    return planned


def painted_magenta(canvas: Pixels, canvas_mask: Pixels, planned: Plan) -> Pixels:
    """The canvas as a replica gives it back: each window painted, one after the other."""
    result = canvas.copy()
    for box, share in zip(planned.windows, share_out(canvas_mask, planned.windows), strict=True):
        window = np.broadcast_to(np.array(MAGENTA, np.uint8), (box.height, box.width, 3))
        paste_window(result, window, box, share)
    return result


@pytest.mark.slow
@settings(max_examples=300)
@given(mask=masks(), strategy=strategies, feather_px=feathers)
def test_what_is_outside_the_dilated_mask_is_identical(mask: Pixels, strategy: CropStrategy, feather_px: int) -> None:
    photo, planned = noise(mask.shape[1], mask.shape[0]), made(mask, strategy, feather_px)
    before = photo.copy()
    # The whole canvas is painted over, as a model's decoder does: the guarantee must not rest on the replica.
    magenta = np.full((planned.canvas_size[1], planned.canvas_size[0], 3), MAGENTA, np.uint8)
    edited = paste(photo, magenta, mask, planned, feather_px)
    outside = grow(mask, feather_px) == 0
    assert np.array_equal(edited[outside], before[outside])
    assert (edited[mask == 255] == MAGENTA).all()
    assert np.array_equal(photo, before)


@pytest.mark.slow
@settings(max_examples=300)
@given(mask=masks(), strategy=strategies, feather_px=feathers)
def test_at_the_photos_scale_the_mask_shows_what_the_windows_painted(
    mask: Pixels, strategy: CropStrategy, feather_px: int
) -> None:
    photo, planned = noise(mask.shape[1], mask.shape[0]), made(mask, strategy, feather_px)
    canvas, canvas_mask = cut(photo, mask, planned, feather_px)
    edited = paste(photo, painted_magenta(canvas, canvas_mask, planned), mask, planned, feather_px)
    outside = grow(mask, feather_px) == 0
    assert np.array_equal(edited[outside], photo[outside])
    if planned.content_size == (planned.region.width, planned.region.height):
        assert (edited[mask == 255] == MAGENTA).all()


@pytest.mark.slow
@settings(max_examples=300)
@given(mask=masks(), strategy=strategies, feather_px=feathers)
def test_every_masked_pixel_is_in_the_canvas_mask_and_in_a_window(
    mask: Pixels, strategy: CropStrategy, feather_px: int
) -> None:
    planned = made(mask, strategy, feather_px)
    canvas, canvas_mask = cut(noise(mask.shape[1], mask.shape[0]), mask, planned, feather_px)
    (width, height), (content_width, content_height) = planned.canvas_size, planned.content_size
    assert canvas.shape == (height, width, 3) and canvas_mask.shape == (height, width)
    assert canvas.dtype == canvas_mask.dtype == np.uint8
    assert set(np.unique(canvas_mask)) <= {0, 255}

    covered = blank(width, height)
    for box in planned.windows:
        covered[box.slices] = 255
    # Beyond the photo a window may be smaller than the canvas.
    assert not (canvas_mask & ~covered)[:content_height, :content_width].any()

    rows, columns = np.nonzero(grow(mask, feather_px))
    canvas_rows = (rows - planned.region.y0) * content_height // planned.region.height
    canvas_columns = (columns - planned.region.x0) * content_width // planned.region.width
    assert canvas_mask[canvas_rows, canvas_columns].all()


@settings(max_examples=100)
@given(mask=masks(), feather_px=feathers, band_px=st.integers(1, 40))
def test_a_photo_blended_in_bands_is_the_photo_blended_at_once(mask: Pixels, feather_px: int, band_px: int) -> None:
    photo, planned = noise(mask.shape[1], mask.shape[0]), made(mask, CropStrategy.AUTO, feather_px)
    painted = np.full((planned.canvas_size[1], planned.canvas_size[0], 3), MAGENTA, np.uint8)
    at_once = paste(photo, painted, mask, planned, feather_px)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("serve_app.edit.paste.BAND_PX", band_px)
        assert np.array_equal(paste(photo, painted, mask, planned, feather_px), at_once)


@settings(max_examples=100)
@given(mask=masks(longest_px=60), px=st.integers(0, 12))
def test_grow_is_a_disc_round_every_pixel(mask: Pixels, px: int) -> None:
    masked = np.argwhere(mask)[:, None, None]
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    squared = ((masked - np.stack([rows, columns], axis=-1)) ** 2).sum(axis=-1).min(axis=0)
    assert np.array_equal(grow(mask, px) == 255, squared <= px**2)


@settings(max_examples=100)
@given(mask=masks(), feather_px=feathers)
def test_opacity_is_one_on_the_mask_and_nothing_beyond_the_feather(mask: Pixels, feather_px: int) -> None:
    opacity = soft_mask(mask, feather_px)
    assert opacity.dtype == np.float32 and opacity.shape == mask.shape
    assert np.array_equal(opacity == 1, mask == 255)
    assert np.array_equal(opacity > 0, grow(mask, feather_px) == 255)


@pytest.mark.parametrize(
    "mask",
    [
        np.full((30, 40), 255, np.uint8),
        blank(40, 30),
        spot(40, 30, 0, 0),
        spot(40, 30, 39, 29),
        spot(1, 1, 0, 0),
        spot(2000, 1, 1999, 0),
    ],
    ids=["full", "empty", "first", "last", "one-pixel-photo", "one-row-photo"],
)
@pytest.mark.parametrize("share", [0, 0.01, 0.05])
def test_a_hostile_mask_grows_as_far_as_the_photo_goes(mask: Pixels, share: float) -> None:
    px = growth_px(mask, share)
    assert px == round(share * max(mask.shape))
    wider = grow(mask, px)
    assert wider.shape == mask.shape and wider.dtype == np.uint8
    rows, columns = np.nonzero(mask)
    for y, x in np.ndindex(*mask.shape):
        near = ((rows - y) ** 2 + (columns - x) ** 2 <= px**2).any()
        assert wider[y, x] == (255 if near else 0)
    if share == 0:
        assert np.array_equal(wider, mask)


def test_a_mask_of_12_megapixels_grows_by_a_disc() -> None:
    mask = spot(4000, 3000, 2000, 10)
    disc = blank(4000, 3000)
    rows, columns = np.ogrid[:3000, :4000]
    disc[(rows - 10) ** 2 + (columns - 2000) ** 2 <= 200**2] = 255
    assert np.array_equal(grow(mask, growth_px(mask, 0.05)), disc)


def test_opacity_falls_smoothly_with_the_distance() -> None:
    opacity = soft_mask(spot(41, 1, 20, 0), 8)[0, 20:]
    t = 1 - np.arange(10) / 9
    assert opacity[:10] == pytest.approx(3 * t**2 - 2 * t**3, abs=1e-6)
    assert (np.diff(opacity[:10]) < 0).all() and not opacity[9:].any()


def test_nothing_grows_from_an_empty_mask() -> None:
    assert not grow(blank(20, 10), 8).any()
    assert not soft_mask(blank(20, 10), 8).any()


def test_a_region_at_the_photos_scale_is_cut_unchanged() -> None:
    photo, mask = noise(200, 150), spot(200, 150, 100, 70, size=4)
    planned = made(mask, CropStrategy.CROP, 3)
    canvas, _ = cut(photo, mask, planned, 3)
    assert np.array_equal(canvas, photo[planned.region.slices])


def test_a_cut_canvas_is_not_a_view_of_the_photo() -> None:
    photo, mask = noise(200, 150), spot(200, 150, 100, 70, size=4)
    canvas, _ = cut(photo, mask, made(mask, CropStrategy.CROP, 3), 3)
    assert not np.shares_memory(canvas, photo)


def test_a_photo_smaller_than_its_padding_is_reflected_again_and_again() -> None:
    photo, mask = noise(3, 1), spot(3, 1, 0, 0)
    canvas, _ = cut(photo, mask, made(mask, CropStrategy.CROP, 3), 3)
    assert canvas.shape == (32, 32, 3)
    assert np.array_equal(canvas[17, :9], photo[0][[0, 1, 2, 2, 1, 0, 0, 1, 2]])


def test_nothing_masked_is_left_standing_in_the_mirror() -> None:
    mask = blank(40, 20)
    cv2.line(mask, (0, 3), (39, 19), 255, 3)
    photo = np.where(mask[..., None] == 255, np.array(MAGENTA, np.uint8), noise(40, 20))
    canvas, canvas_mask = cut(photo, mask, made(mask, CropStrategy.RESIZE, 3), 3)
    leash = (canvas == MAGENTA).all(axis=-1)
    assert canvas.shape == (32, 64, 3) and leash[20:].any() and leash[:, 40:].any()
    assert canvas_mask[leash].all()


def test_a_single_pixel_survives_the_coarsest_scale() -> None:
    mask = np.maximum(spot(2000, 1500, 1234, 777), spot(2000, 1500, 3, 1490))
    planned = made(mask, CropStrategy.RESIZE, 0)
    _, canvas_mask = cut(noise(2000, 1500), mask, planned, 0)
    assert canvas_mask[777 * 48 // 1500, 1234 * 64 // 2000] == 255
    assert 2 <= np.count_nonzero(canvas_mask) <= 4


def wave(side: int, px: int) -> Pixels:
    """Vertical stripes, smooth, of 16 px: each of these pixels is `px` wide."""
    row = 128 + 100 * np.sin(2 * np.pi * (np.arange(side) + 0.5) * px / 16)
    return np.repeat(np.rint(np.broadcast_to(row, (side, side)))[..., None], 3, axis=2).astype(np.uint8)


def test_what_was_painted_at_a_coarser_scale_comes_back_as_fine_as_it_was_painted() -> None:
    """Within 3 grey levels of 200: as blocks, it would be 18 off, as straight lines between pixels, 6."""
    region, canvas = Box(x0=0, y0=0, x1=128, y1=128), Box(x0=0, y0=0, x1=64, y1=64)
    planned = Plan(
        strategy=CropStrategy.RESIZE, region=region, canvas_size=(64, 64), content_size=(64, 64), windows=(canvas,)
    )
    pasted = paste(np.zeros((128, 128, 3), np.uint8), wave(64, 2), np.full((128, 128), 255, np.uint8), planned, 0)
    off = np.abs(pasted.astype(int) - wave(128, 1))[8:-8, 8:-8]
    assert off.max() <= 4


def test_a_flat_photo_painted_in_its_own_colour_stays_flat_at_any_scale() -> None:
    mask = spot(500, 400, 10, 10, size=380)
    photo = np.full((400, 500, 3), (200, 17, 101), np.uint8)
    planned = made(mask, CropStrategy.RESIZE, 8)
    canvas, _ = cut(photo, mask, planned, 8)
    assert np.array_equal(paste(photo, canvas, mask, planned, 8), photo)


@pytest.mark.slow
@settings(max_examples=200)
@given(mask=masks(), feather_px=feathers)
def test_every_masked_pixel_is_one_windows_own_and_shown_until_it_is_painted(mask: Pixels, feather_px: int) -> None:
    planned = made(mask, CropStrategy.AUTO, feather_px)
    _, canvas_mask = cut(noise(mask.shape[1], mask.shape[0]), mask, planned, feather_px)
    left, in_window = canvas_mask.copy(), blank(*planned.canvas_size)
    for box, share in zip(planned.windows, share_out(canvas_mask, planned.windows), strict=True):
        in_window[box.slices] = 255
        assert np.array_equal(share.unpainted, left[box.slices])
        own = (share.opacity == 1) & (share.unpainted != 0)
        left[box.slices][own] = 0
        # What is not its own it touches only where it was painted before.
        beside = (share.opacity > 0) & ~own
        assert (share.opacity[beside] < 1).all()
        assert not left[box.slices][beside].any() and canvas_mask[box.slices][beside].all()
    assert not (left & in_window).any()


def test_one_window_paints_its_whole_mask() -> None:
    mask = spot(96, 64, 20, 10, size=40)
    (share,) = share_out(mask, [Box(x0=0, y0=0, x1=96, y1=64)])
    assert np.array_equal(share.unpainted, mask)
    assert np.array_equal(share.opacity, mask / 255)


LEFT, RIGHT = Box(x0=0, y0=0, x1=120, y1=40), Box(x0=40, y0=0, x1=160, y1=40)


def test_a_pixel_is_its_deepest_windows_own() -> None:
    left, right = share_out(np.full((40, 160), 255, np.uint8), [LEFT, RIGHT])
    # Sides on the canvas's edge do not count: the middle of the overlap is at 80.
    assert (left.opacity[:, :80] == 1).all() and not left.opacity[:, 80:].any()
    assert (right.opacity[:, 40:] == 1).all() and (right.unpainted[:, 40:] == 255).all()
    assert not right.unpainted[:, :40].any()


def test_a_later_window_fades_into_an_earlier_one() -> None:
    _, right = share_out(np.full((40, 160), 255, np.uint8), [LEFT, RIGHT])
    t = 1 - np.arange(FADE_PX + 2) / (FADE_PX + 1)
    fade = right.opacity[20, 39 : 39 - FADE_PX - 1 : -1]
    assert fade == pytest.approx((3 * t**2 - 2 * t**3)[1:], abs=1e-6)
    assert not right.opacity[:, : 40 - FADE_PX].any()


def test_a_narrow_overlap_fades_to_the_windows_side() -> None:
    narrow = Box(x0=110, y0=0, x1=160, y1=40)
    _, right = share_out(np.full((40, 160), 255, np.uint8), [LEFT, narrow])
    assert (np.diff(right.opacity[20, :6]) > 0).all() and 0 < right.opacity[20, 0] < 0.1


def test_windows_that_agree_on_the_overlap_leave_no_seam() -> None:
    mask, picture = np.full((40, 160), 255, np.uint8), noise(160, 40)
    canvas = np.zeros_like(picture)
    for box, share in zip((LEFT, RIGHT), share_out(mask, [LEFT, RIGHT]), strict=True):
        paste_window(canvas, picture[box.slices], box, share)
    assert np.array_equal(canvas, picture)


def test_a_window_without_own_pixels_changes_no_others_share() -> None:
    mask, middle = np.full((40, 160), 255, np.uint8), Box(x0=60, y0=0, x1=100, y1=40)
    left, empty, right = share_out(mask, [LEFT, middle, RIGHT])
    assert (left.is_empty, empty.is_empty, right.is_empty) == (False, True, False)
    for with_it, without in zip((left, right), share_out(mask, [LEFT, RIGHT]), strict=True):
        assert np.array_equal(with_it.unpainted, without.unpainted)
        assert np.array_equal(with_it.opacity, without.opacity)


def peak_bytes(mask: Pixels) -> int:
    """Of sharing it out to a window in each of two corners."""
    height, width = mask.shape
    corners = [Box(x0=0, y0=0, x1=64, y1=64), Box(x0=width - 64, y0=height - 64, x1=width, y1=height)]
    tracemalloc.start()
    share_out(mask, corners)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_sharing_out_takes_no_more_memory_for_a_larger_canvas() -> None:
    small, large = np.full((200, 200), 255, np.uint8), np.full((4000, 3000), 255, np.uint8)
    assert peak_bytes(large) < 2 * peak_bytes(small) < large.nbytes


def test_a_window_changes_the_canvas_only_inside_its_box_and_mask() -> None:
    canvas, canvas_mask = noise(96, 64), spot(96, 64, 20, 10, size=40)
    before, box = canvas.copy(), Box(x0=32, y0=16, x1=64, y1=48)
    (share,) = share_out(canvas_mask, [box])
    paste_window(canvas, np.full((32, 32, 3), MAGENTA, np.uint8), box, share)
    changed = blank(96, 64)
    changed[16:48, 32:60] = 255
    assert (canvas[changed == 255] == MAGENTA).all()
    assert np.array_equal(canvas[changed == 0], before[changed == 0])


def test_a_plan_for_another_mask_is_refused() -> None:
    photo, mask, other = noise(200, 150), spot(200, 150, 10, 10), spot(200, 150, 190, 140)
    planned = made(mask, CropStrategy.CROP, 3)
    for wrong in (other, blank(200, 150)):
        with pytest.raises(ValueError, match=r"is not what .* was planned for"):
            cut(photo, wrong, planned, 3)
        with pytest.raises(ValueError, match=r"is not what .* was planned for"):
            paste(photo, noise(*planned.canvas_size), wrong, planned, 3)
