from collections.abc import Iterable

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.edit.cost import SHAPES, forward_flops, planned_tflop
from serve_app.edit.paste import cut, grow, growth_px
from serve_app.edit.windows import MAX_CANVAS_PX, Plan, bounding_box, plan
from serve_app.models import Box, Pixels
from serve_app.parameters import CropStrategy
from serve_app.settings import WindowSettings

from .pictures import SMALL, blank, masks, spot

CROP, RESIZE, ORIGINAL, AUTO = CropStrategy.CROP, CropStrategy.RESIZE, CropStrategy.ORIGINAL, CropStrategy.AUTO
DEFAULT = WindowSettings()
pixels = st.integers(0, 1023)
#: From nothing through what unpacking takes on an L4 to more than any plan.
further_tflop = st.sampled_from([0.0, 1.0, 11.0, 37.0, 1000.0])
WHOLE_FRAME_TFLOP = forward_flops(1024, 1024) / 1e12

window_settings = st.builds(
    WindowSettings,
    buckets=st.lists(
        st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 48, 64])), min_size=1, max_size=4
    ).map(tuple),
    context_px=st.sampled_from([0, 1, 8, 40]),
    feather_px=st.sampled_from([0, 1, 5]),
    max_windows=st.sampled_from([1, 2, 4, 9]),
)
#: By how many pixels a mask was grown: none, some, all of the context and more.
growths = st.sampled_from([0, 3, 50])


def made(mask: Pixels, strategy: CropStrategy, window: WindowSettings = DEFAULT, grown_px: int = 0) -> Plan:
    planned = plan(mask, strategy, window, grown_px=grown_px)
    assert planned is not None
    return planned


def line(width: int, height: int, start: tuple[int, int], end: tuple[int, int], thickness: int = 12) -> Pixels:
    mask = blank(width, height)
    cv2.line(mask, start, end, 255, thickness)
    return mask


def specks(width: int, height: int, *points: tuple[int, int]) -> Pixels:
    mask = blank(width, height)
    for x, y in points:
        mask[y : y + 3, x : x + 3] = 255
    return mask


def scale_of(planned: Plan) -> float:
    return planned.content_size[0] / planned.region.width


def is_inside(box: Box, width: int, height: int) -> bool:
    return 0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height


def tflop(boxes: Iterable[Box]) -> float:
    return sum(forward_flops(box.width, box.height) for box in boxes) / 1e12


@pytest.mark.slow
@settings(max_examples=300)
@given(mask=masks(), strategy=st.sampled_from(CropStrategy), window=window_settings)
@example(mask=spot(10_000, 1, 9_999, 0), strategy=ORIGINAL, window=DEFAULT)
@example(mask=np.full((1, 10_000), 255, np.uint8), strategy=RESIZE, window=DEFAULT)
@example(mask=np.full((10_000, 1), 255, np.uint8), strategy=ORIGINAL, window=DEFAULT)
@example(mask=np.full((1, 1), 255, np.uint8), strategy=AUTO, window=DEFAULT)
def test_every_plan_is_well_formed(mask: Pixels, strategy: CropStrategy, window: WindowSettings) -> None:
    planned = made(mask, strategy, window)
    region, (width, height), (content_width, content_height) = planned.region, planned.canvas_size, planned.content_size
    assert is_inside(region, mask.shape[1], mask.shape[0])
    assert 1 <= content_width <= min(width, region.width) and 1 <= content_height <= min(height, region.height)
    assert planned.windows and all(is_inside(box, width, height) for box in planned.windows)
    assert all((box.width, box.height) in window.buckets for box in planned.windows)
    assert len(planned.windows) == 1 or strategy in (ORIGINAL, AUTO)
    assert len(planned.windows) <= window.max_windows or strategy == AUTO
    assert planned.strategy == strategy


@pytest.mark.slow
@settings(max_examples=300)
@given(mask=masks(), strategy=st.sampled_from([CROP, ORIGINAL, AUTO]), window=window_settings, grown_px=growths)
def test_every_masked_pixel_is_shown_with_its_context(
    mask: Pixels, strategy: CropStrategy, window: WindowSettings, grown_px: int
) -> None:
    mask = grow(mask, grown_px)
    planned = made(mask, strategy, window, grown_px)
    _, canvas_mask = cut(np.zeros((*mask.shape, 3), np.uint8), mask, planned, window.feather_px)
    canvas_mask[planned.content_size[1] :], canvas_mask[:, planned.content_size[0] :] = 0, 0
    region, (width, height) = planned.region, planned.content_size
    is_scaled = (width, height) != (region.width, region.height)
    left_px = max(window.context_px - grown_px * scale_of(planned), window.context_px / 2)
    # Of the context, scaling may round away two pixels.
    context_px = max(int(left_px) - 2, 0) if is_scaled else int(left_px)
    for box in planned.windows:
        # The region may end where the photo does; there is no context beyond.
        x0 = 0 if box.x0 == region.x0 == 0 else box.x0 + context_px
        y0 = 0 if box.y0 == region.y0 == 0 else box.y0 + context_px
        x1 = width if box.x1 >= width and region.x1 == mask.shape[1] else box.x1 - context_px
        y1 = height if box.y1 >= height and region.y1 == mask.shape[0] else box.y1 - context_px
        canvas_mask[y0 : max(y1, 0), x0 : max(x1, 0)] = 0
    assert not canvas_mask.any()


@pytest.mark.slow
@settings(max_examples=200)
@given(mask=masks(), strategy=st.sampled_from(CropStrategy), window=window_settings)
def test_both_dimensions_have_one_scale_up_to_rounding(
    mask: Pixels, strategy: CropStrategy, window: WindowSettings
) -> None:
    planned = made(mask, strategy, window)
    (content_width, content_height), region = planned.content_size, planned.region
    lowest = max((content_width - 0.5) / region.width, (content_height - 0.5) / region.height)
    highest = min((content_width + 0.5) / region.width, (content_height + 0.5) / region.height)
    assert lowest <= highest or 1 in (content_width, content_height)


@pytest.mark.slow
@settings(max_examples=200)
@given(mask=masks(), strategy=st.sampled_from(CropStrategy), window=window_settings)
def test_padding_only_where_the_photo_has_no_more(mask: Pixels, strategy: CropStrategy, window: WindowSettings) -> None:
    planned = made(mask, strategy, window)
    assert planned.content_size[0] == planned.canvas_size[0] or planned.region.width == mask.shape[1]
    assert planned.content_size[1] == planned.canvas_size[1] or planned.region.height == mask.shape[0]


@pytest.mark.parametrize("strategy", CropStrategy)
def test_an_empty_mask_has_no_plan(strategy: CropStrategy) -> None:
    assert plan(blank(40, 30), strategy, SMALL) is None
    assert bounding_box(blank(40, 30)) is None


class TestCrop:
    def test_the_mask_is_in_the_middle_of_the_smallest_bucket_that_holds_it(self) -> None:
        planned = made(spot(4000, 3000, 2000, 1000, size=10), CROP)
        assert planned.region == Box(x0=1877, y0=877, x1=2133, y1=1133)
        assert planned.canvas_size == planned.content_size == (256, 256)
        assert planned.windows == (Box(x0=0, y0=0, x1=256, y1=256),)

    @pytest.mark.parametrize(("mask_px", "bucket_px"), [(112, 256), (113, 384)])
    def test_context_and_feather_count_on_both_sides(self, mask_px: int, bucket_px: int) -> None:
        # 112 + 2 · (64 + 8) = 256
        planned = made(spot(4000, 3000, 2000, 1000, size=mask_px), CROP)
        assert planned.canvas_size == (bucket_px, bucket_px)

    @pytest.mark.parametrize(
        ("x", "y", "x0", "y0"), [(0, 0, 0, 0), (3999, 0, 3744, 0), (0, 2999, 0, 2744), (3999, 2999, 3744, 2744)]
    )
    def test_at_an_edge_the_region_is_shifted_not_cut(self, x: int, y: int, x0: int, y0: int) -> None:
        planned = made(spot(4000, 3000, x, y), CROP)
        assert planned.region == Box(x0=x0, y0=y0, x1=x0 + 256, y1=y0 + 256)

    def test_a_wide_mask_takes_a_wide_bucket(self) -> None:
        mask = blank(4000, 3000)
        mask[1500:1510, 1000:1600] = 255
        assert made(mask, CROP).canvas_size == (768, 384)

    def test_a_mask_no_bucket_holds_is_scaled_down_just_enough(self) -> None:
        mask = blank(4000, 3000)
        mask[1000:1100, 1000:2984] = 255  # with the feather 2000 wide: 1024 - 2 · 64 canvas pixels for it
        planned = made(mask, CROP)
        assert planned.canvas_size == (1024, 768)
        assert scale_of(planned) == pytest.approx(896 / 2000, rel=1e-3)

    def test_a_scaled_region_fills_its_window(self) -> None:
        mask = blank(500, 500)
        mask[200:244, 250] = 255  # scale (64 - 2 · 8) / (44 + 2 · 3): 66.67 photo pixels fill the width
        planned = made(mask, CROP, SMALL.model_copy(update={"buckets": ((64, 64),)}))
        assert planned.region.width == 67
        assert planned.content_size == (64, 64)

    def test_a_full_mask_is_the_whole_frame(self) -> None:
        planned = made(np.full((3000, 4000), 255, np.uint8), CROP)
        assert planned.region == Box(x0=0, y0=0, x1=4000, y1=3000)
        assert planned.canvas_size == planned.content_size == (1024, 768)

    def test_a_photo_smaller_than_the_bucket_is_padded_not_enlarged(self) -> None:
        planned = made(spot(100, 60, 50, 30), CROP)
        assert planned.content_size == (100, 60)
        assert planned.canvas_size == (256, 256)


class TestResize:
    @pytest.mark.parametrize(
        ("photo", "content", "canvas"),
        [
            ((4000, 3000), (1024, 768), (1024, 768)),
            ((3000, 4000), (768, 1024), (768, 1024)),
            ((3000, 3000), (1024, 1024), (1024, 1024)),
            ((1920, 1080), (1024, 576), (1024, 768)),
            ((600, 400), (600, 400), (768, 512)),
            ((10_000, 1), (1024, 1), (1024, 768)),
            ((1, 1), (1, 1), (256, 256)),
        ],
    )
    def test_the_whole_frame_at_1024(
        self, photo: tuple[int, int], content: tuple[int, int], canvas: tuple[int, int]
    ) -> None:
        planned = made(spot(*photo, 0, 0), RESIZE)
        assert planned.region == Box(x0=0, y0=0, x1=photo[0], y1=photo[1])
        assert (planned.content_size, planned.canvas_size) == (content, canvas)


class TestGrowth:
    """What a grown mask costs: the growth takes from the context."""

    @pytest.mark.parametrize(
        ("width", "height", "start", "end"),
        [
            (1024, 1024, (0.5, 0.32), (0.5, 0.66)),
            (1024, 1024, (0, 0), (1, 1)),
            (1024, 768, (0.5, 0.3), (0.53, 0.75)),
            (4000, 3000, (0.5, 0.5), (0.5, 0.6)),
            (4000, 3000, (0, 0), (1, 1)),
        ],
        ids=["upright", "diagonal", "wide-upright", "phone-short", "phone-diagonal"],
    )
    def test_it_costs_what_the_drawn_one_does(
        self, width: int, height: int, start: tuple[float, float], end: tuple[float, float]
    ) -> None:
        corners = [(round(x * (width - 1)), round(y * (height - 1))) for x, y in (start, end)]
        drawn = line(width, height, corners[0], corners[1], max(width, height) // 100)
        px = growth_px(drawn, DEFAULT.mask_grow)
        before, after = made(drawn, AUTO), made(grow(drawn, px), AUTO, grown_px=px)
        assert tflop(after.windows) <= tflop(before.windows) * 1.02
        assert scale_of(after) >= scale_of(before) * 0.94

    @pytest.mark.parametrize(("px", "bucket_px"), [(0, 256), (32, 256), (33, 384)])
    def test_half_of_the_context_stays(self, px: int, bucket_px: int) -> None:
        # 112 + 2 · (64 + 8) = 256
        drawn = spot(4000, 3000, 2000, 1000, size=112)
        assert made(grow(drawn, px), CROP, grown_px=px).canvas_size == (bucket_px, bucket_px)

    def test_at_a_coarser_scale_it_takes_less_of_the_context(self) -> None:
        drawn = blank(4000, 3000)
        drawn[1000:1100, 1000:2984] = 255
        px = 40
        planned = made(grow(drawn, px), CROP, grown_px=px)
        # As for the drawn one: with the feather it is 2000 wide, and there are 1024 - 2 · 64 canvas pixels for it.
        assert scale_of(planned) == pytest.approx(896 / 2000, rel=1e-3)


class TestOriginal:
    def test_a_mask_that_fits_one_window_is_planned_as_a_crop(self) -> None:
        mask = spot(4000, 3000, 2000, 1000, size=100)
        crop, original = made(mask, CROP), made(mask, ORIGINAL)
        assert (original.region, original.windows) == (crop.region, crop.windows)

    def test_a_line_longer_than_a_window_keeps_the_photos_scale(self) -> None:
        planned = made(line(4000, 3000, (1000, 1500), (2600, 1500)), ORIGINAL)
        assert scale_of(planned) == 1 and len(planned.windows) == 2

    def test_as_few_windows_as_will_do(self) -> None:
        corners = np.maximum(spot(1000, 1000, 0, 0), spot(1000, 1000, 999, 999))
        assert len(made(corners, ORIGINAL).windows) == 1
        assert len(made(corners, AUTO).windows) == 2

    @pytest.mark.parametrize("max_windows", [1, 2, 4, 6, 64])
    def test_more_windows_than_allowed_are_traded_for_scale(self, max_windows: int) -> None:
        mask = np.full((3000, 4000), 255, np.uint8)
        planned = made(mask, ORIGINAL, DEFAULT.model_copy(update={"max_windows": max_windows}))
        # Windows in a row share 2 · 64 pixels: 2 · 1024 - 128 canvas pixels in a row of two, 2816 in one of three.
        expected = {1: 1024 / 4000, 2: 1024 / 3000, 4: 1920 / 4000, 6: 1920 / 3000, 64: 1}
        assert len(planned.windows) <= max_windows
        assert expected[max_windows] * 0.97 <= scale_of(planned) <= expected[max_windows] * 1.04

    def test_a_window_with_nothing_but_feather_is_painted(self) -> None:
        window = WindowSettings(buckets=((32, 32),), context_px=0, feather_px=5)
        mask = np.maximum(spot(200, 200, 100, 100), spot(200, 200, 122, 100))
        assert len(made(mask, ORIGINAL, window).windows) == 2
        assert len(made(mask, ORIGINAL, window.model_copy(update={"feather_px": 4})).windows) == 1


class TestAuto:
    def test_a_small_mask_in_a_large_photo_is_cropped(self) -> None:
        mask = spot(4000, 3000, 2000, 1500, size=300)
        crop, auto = made(mask, CROP), made(mask, AUTO)
        assert (auto.region, auto.windows) == (crop.region, crop.windows)

    def test_a_full_mask_is_the_whole_frame(self) -> None:
        mask = np.full((3000, 4000), 255, np.uint8)
        auto, whole = made(mask, AUTO), made(mask, RESIZE)
        assert (auto.region, auto.windows) == (whole.region, whole.windows)

    def test_a_thin_vertical_leash_costs_a_third_of_the_frame(self) -> None:
        planned = made(line(1024, 1024, (500, 300), (530, 650)), AUTO)
        assert tflop(planned.windows) <= tflop(made(spot(1024, 1024, 0, 0), RESIZE).windows) / 3.4

    @settings(max_examples=60)
    @given(mask=masks())
    @example(mask=line(4000, 3000, (0, 0), (3999, 2999)))
    def test_fewer_prompt_tokens_leave_room_for_a_finer_scale_within_the_budget(self, mask: Pixels) -> None:
        few, many = plan(mask, AUTO, DEFAULT, text_tokens=64), made(mask, AUTO)
        assert few is not None
        assert scale_of(few) >= scale_of(many) / 1.05
        spent = sum(forward_flops(box.width, box.height, text_tokens=64) for box in few.windows) / 1e12
        assert spent <= DEFAULT.budget_tflop

    def test_a_family_is_planned_by_what_its_windows_cost(self) -> None:
        """Attention to three pictures makes large windows dearer: klein takes smaller ones, within the same budget."""
        mask = line(1024, 1024, (0, 0), (1023, 1023))
        klein, fill = plan(mask, AUTO, DEFAULT, family="flux2-klein"), made(mask, AUTO)
        assert klein is not None
        costs = [
            sum(forward_flops(box.width, box.height, **SHAPES["flux2-klein"]) for box in one.windows)
            for one in (klein, fill)
        ]
        assert costs[0] < 0.95 * costs[1] and scale_of(klein) == scale_of(fill) == 1
        frame, small = (
            planned_tflop(*size, family="flux2-klein", text_tokens=512) for size in ((1024, 1024), (512, 384))
        )
        assert frame == pytest.approx(WHOLE_FRAME_TFLOP) and small < 0.7 * forward_flops(512, 384) / 1e12

    def test_a_thin_diagonal_across_the_frame_takes_windows_along_it(self) -> None:
        planned = made(line(1024, 1024, (0, 0), (1023, 1023)), AUTO)
        assert tflop(planned.windows) <= WHOLE_FRAME_TFLOP / 1.2
        assert [(box.x0, box.y0) for box in planned.windows] == sorted((box.x0, box.y0) for box in planned.windows)

    @settings(max_examples=60)
    @given(
        start=st.tuples(pixels, pixels),
        end=st.tuples(pixels, pixels),
        thickness=st.integers(1, 80),
        window_overhead_tflop=further_tflop,
    )
    def test_a_further_window_saves_at_least_what_it_costs(
        self, start: tuple[int, int], end: tuple[int, int], thickness: int, window_overhead_tflop: float
    ) -> None:
        mask = line(1024, 1024, start, end, thickness)
        windows = made(mask, AUTO, WindowSettings(window_overhead_tflop=window_overhead_tflop)).windows
        spent = tflop(windows) + window_overhead_tflop * (len(windows) - 1)
        assert spent <= tflop(made(mask, CROP).windows) + 1e-6

    def test_where_unpacking_takes_long_a_diagonal_takes_the_whole_frame(self) -> None:
        mask = line(1024, 1024, (0, 0), (1023, 1023))
        windows = {tflop: made(mask, AUTO, WindowSettings(window_overhead_tflop=tflop)).windows for tflop in (5, 11)}
        assert len(windows[5]) == 3
        assert windows[11] == made(mask, RESIZE).windows

    @pytest.mark.slow
    def test_the_dearer_a_further_window_the_fewer_and_the_coarser(self) -> None:
        mask = line(4000, 3000, (0, 0), (3999, 2999), thickness=30)
        plans = [made(mask, AUTO, WindowSettings(window_overhead_tflop=tflop)) for tflop in (0, 1, 11, 23, 37, 1000)]
        for figures in ([scale_of(planned) for planned in plans], [len(planned.windows) for planned in plans]):
            assert figures == sorted(figures, reverse=True) and figures[0] > figures[-1]

    @settings(max_examples=100)
    @given(mask=masks(), window_overhead_tflop=further_tflop)
    def test_one_window_in_budget_is_taken_whatever_a_further_one_costs(
        self, mask: Pixels, window_overhead_tflop: float
    ) -> None:
        window = SMALL.model_copy(update={"window_overhead_tflop": window_overhead_tflop})
        auto, crop = made(mask, AUTO, window), made(mask, CROP, window)
        rounding = 1 / auto.region.width + 1 / crop.region.width
        assert scale_of(auto) >= scale_of(crop) / 1.03 - rounding

    def test_what_is_saved_is_spent_on_detail(self) -> None:
        planned = made(line(4000, 3000, (0, 0), (3999, 2999), thickness=30), AUTO)
        assert tflop(planned.windows) <= DEFAULT.budget_tflop
        assert scale_of(planned) > 1.4 * 1024 / 4000

    def test_a_larger_budget_is_more_detail(self) -> None:
        mask = line(4000, 3000, (0, 0), (3999, 2999), thickness=30)
        budgets = [WindowSettings(budget_tflop=tflop) for tflop in (1, 60, 150, 1000)]
        scales = [scale_of(made(mask, AUTO, window)) for window in budgets]
        assert scales == sorted(scales) and scales[-1] == 1

    @pytest.mark.slow
    @settings(max_examples=200)
    @given(mask=masks(), window=window_settings)
    def test_never_coarser_than_the_whole_frame(self, mask: Pixels, window: WindowSettings) -> None:
        auto, whole = made(mask, AUTO, window), made(mask, RESIZE, window)
        rounding = 1 / auto.region.width + 1 / whole.region.width
        assert scale_of(auto) >= scale_of(whole) - rounding

    @pytest.mark.slow
    @settings(max_examples=200)
    @given(
        mask=masks(),
        window=window_settings,
        budget_tflop=st.sampled_from([1.0, 8.0, 15.0, 74.5]),
        window_overhead_tflop=further_tflop,
    )
    def test_the_budget_is_kept_or_the_frame_at_its_coarsest_costs_no_less(
        self, mask: Pixels, window: WindowSettings, budget_tflop: float, window_overhead_tflop: float
    ) -> None:
        window = window.model_copy(
            update={"budget_tflop": budget_tflop, "window_overhead_tflop": window_overhead_tflop}
        )
        auto, whole = made(mask, AUTO, window), made(mask, RESIZE, window)
        spent = tflop(auto.windows) + window_overhead_tflop * (len(auto.windows) - 1)
        assert spent <= max(budget_tflop, tflop(whole.windows)) + 1e-6

    @settings(max_examples=100)
    @given(mask=masks(longest_px=64))
    def test_at_the_recipes_scale_it_costs_no_more_than_one_window(self, mask: Pixels) -> None:
        # A photo no larger than the largest bucket has one scale only.
        assert tflop(made(mask, AUTO, SMALL).windows) <= tflop(made(mask, CROP, SMALL).windows)


def test_a_small_mask_in_a_large_photo_touches_a_small_part_of_it() -> None:
    planned = made(spot(4000, 3000, 2000, 1500, size=100), AUTO)
    assert (planned.region.width, planned.region.height) == planned.canvas_size == planned.content_size == (256, 256)


def two_specks(width: int, height: int) -> Pixels:
    return np.maximum(spot(width, height, 0, 0), spot(width, height, width - 1, height - 1))


@pytest.mark.parametrize("strategy", [ORIGINAL, AUTO])
def test_a_canvas_too_large_is_made_coarser(strategy: CropStrategy) -> None:
    planned = made(two_specks(10_000, 5_000), strategy)
    assert [(box.width, box.height) for box in planned.windows] == [(256, 256)] * 2
    width, height = planned.canvas_size
    assert MAX_CANVAS_PX / 1.03**2 <= width * height <= MAX_CANVAS_PX


@pytest.mark.parametrize("strategy", [ORIGINAL, AUTO])
def test_two_specks_in_a_photo_of_12_megapixels_keep_its_scale(strategy: CropStrategy) -> None:
    planned = made(two_specks(4000, 3000), strategy)
    assert planned.canvas_size == planned.content_size == (4000, 3000) and len(planned.windows) == 2


@pytest.mark.slow
@settings(max_examples=300)
@given(mask=masks(), strategy=st.sampled_from(CropStrategy), window=window_settings)
@example(mask=specks(64, 256, (18, 16), (18, 88), (8, 160)), strategy=AUTO, window=SMALL)
@example(mask=specks(256, 64, (16, 18), (88, 18), (160, 8)), strategy=AUTO, window=SMALL)
def test_windows_are_in_painting_order(mask: Pixels, strategy: CropStrategy, window: WindowSettings) -> None:
    planned = plan(mask, strategy, window)
    if planned is None:
        return
    middles = [(box.x0 + box.x1, box.y0 + box.y1) for box in planned.windows]
    is_wide = planned.canvas_size[0] >= planned.canvas_size[1]
    assert middles == sorted(middles, key=lambda middle: middle if is_wide else middle[::-1])


def test_windows_are_painted_along_the_longer_side() -> None:
    for size, points in (((1024, 600), ((0, 30), (1023, 570))), ((600, 1024), ((570, 0), (30, 1023)))):
        boxes = made(line(*size, *points), AUTO).windows
        along = [box.x0 + box.x1 if size[0] > size[1] else box.y0 + box.y1 for box in boxes]
        assert len(boxes) > 1 and along == sorted(along)
