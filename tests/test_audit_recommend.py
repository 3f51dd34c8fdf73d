"""The rules of a recommendation, one by one, and what holds for all of them."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.audit.recommend import TIE, pareto, recommend, visibility
from serve_app.audit.record import AuditFault, CellResult, Compared, Recommendation
from serve_app.parameters import AuditRequest, Cell, CropStrategy, Matrix

SIZES = {"small": 6.8, "middle": 8.3, "large": 12.7}
REQUEST = AuditRequest(
    user_id="u", session_id="s", matrix=Matrix(variants=("small", "middle", "large"), guidance_scales=(2, 10, 30))
)


Figures = dict[str, float | None]


def seam(visible: float) -> Figures:
    """Of the given visibility."""
    return {"seam_gradient_ratio": 2.0**visible, "seam_colour_shift": 0.0}


GOOD: Figures = {"ssim": 0.97, "psnr_db": 35.0}
BAD: Figures = {"ssim": 0.90, "psnr_db": 35.0}


def painted(
    cell: Cell, figures: Figures | None = None, *, request: AuditRequest = REQUEST, wall_s: float = 1.0
) -> CellResult:
    """With these figures of `Compared`, and none else."""
    every: Figures = dict.fromkeys(Compared.model_fields)
    compared = Compared.model_validate(every | {"outside_max": 0} | (figures or {}))
    return CellResult(name=request.matrix.name(cell), cell=cell, status="succeeded", wall_s=wall_s, compared=compared)


def failed(cell: Cell, request: AuditRequest = REQUEST) -> CellResult:
    fault = AuditFault(code="out_of_memory", message="none left")
    return CellResult(name=request.matrix.name(cell), cell=cell, status="failed", error=fault)


def results(
    likeness: Mapping[str, Figures], seams: Mapping[float, float], request: AuditRequest = REQUEST
) -> list[CellResult]:
    """All cells of the matrix; the reference's have a seam alone."""
    return [
        painted(cell, likeness.get(cell.variant, {}) | seam(seams[cell.guidance_scale]), request=request)
        for cell in request.matrix.cells()
    ]


def recommended(of: list[CellResult], request: AuditRequest = REQUEST) -> Recommendation:
    got = recommend(request, of, SIZES)
    assert got is not None
    return got


FLAT = dict.fromkeys((2.0, 10.0, 30.0), 1.0)


@pytest.mark.parametrize(
    ("small", "middle", "chosen"),
    [
        (GOOD, GOOD, "small"),
        (BAD, GOOD, "middle"),
        (GOOD | {"psnr_db": 29.9}, GOOD, "middle"),
        (BAD, BAD, "large"),
        ({}, GOOD, "middle"),
    ],
)
def test_the_smallest_variant_within_the_budget_is_chosen(small: Figures, middle: Figures, chosen: str) -> None:
    got = recommended(results({"small": small, "middle": middle}, FLAT))
    assert got.variant == chosen
    assert "SSIM at least 0.95 and PSNR at least 30 dB against large" in got.reasons[0]
    assert all(f"{name} ({size:g} GB)" in got.reasons[0] for name, size in SIZES.items())


def test_smallest_is_by_size_not_by_place() -> None:
    got = recommend(REQUEST, results({"small": GOOD, "middle": GOOD}, FLAT), SIZES | {"small": 99.0})
    assert got and got.variant == "middle"


def test_without_sizes_the_matrix_says_what_is_smaller() -> None:
    got = recommend(REQUEST, results({"small": GOOD, "middle": GOOD}, FLAT), {})
    assert got and got.variant == "small"


def test_a_reference_that_is_the_smallest_is_chosen() -> None:
    request = REQUEST.model_copy(update={"reference": "small"})
    assert recommended(results({"middle": GOOD, "large": GOOD}, FLAT), request).variant == "small"


def test_the_budget_holds_for_the_mean() -> None:
    cells = REQUEST.matrix.cells()
    figures: dict[float, Figures] = {
        2.0: {"ssim": 0.99, "psnr_db": 40.0},
        10.0: {"ssim": 0.94, "psnr_db": 31.0},
        30.0: {"ssim": 0.93, "psnr_db": 31.0},
    }
    of = [painted(cell, figures[cell.guidance_scale] if cell.variant == "small" else None) for cell in cells]
    got = recommended(of)
    assert got.variant == "small"
    assert "small (6.8 GB): SSIM 0.9533, PSNR 34.0 dB over 3 cells" in got.reasons[0]


def test_failed_cells_are_in_no_mean_and_are_named() -> None:
    of = results({"small": GOOD, "middle": GOOD}, FLAT)
    of[0] = failed(of[0].cell)
    got = recommended(of)
    assert got.variant == "small"
    assert "over 2 cells" in got.reasons[0]
    assert "Failed, and in no mean: small_gs2 (out_of_memory)." in got.reasons


def but_for(of: list[CellResult], kept: Callable[[Cell], bool]) -> list[CellResult]:
    return [result if kept(result.cell) else failed(result.cell) for result in of]


@pytest.mark.parametrize(("left", "chosen"), [((2.0,), "large"), ((2.0, 10.0), "small")])
def test_a_variant_of_which_less_than_half_is_left_is_not_judged_by_that(left: tuple[float, ...], chosen: str) -> None:
    of = results({"small": GOOD, "middle": BAD}, FLAT)
    got = recommended(but_for(of, lambda cell: cell.variant != "small" or cell.guidance_scale in left))
    assert got.variant == chosen
    told = "Not counted, because less than half as many cells are judged: small (1 of 3)."
    assert (told in got.reasons) == (chosen == "large")


def test_half_of_what_the_reference_has_is_enough() -> None:
    left = {"small": (2.0,), "middle": (), "large": (2.0, 10.0)}
    of = but_for(results({"small": GOOD}, FLAT), lambda cell: cell.guidance_scale in left[cell.variant])
    assert recommended(of).variant == "small"


def test_without_the_reference_one_cell_makes_no_largest() -> None:
    left = {"small": (2.0, 10.0, 30.0), "middle": (2.0,), "large": ()}
    got = recommended(but_for(results({}, FLAT), lambda cell: cell.guidance_scale in left[cell.variant]))
    assert got.variant == "small"
    assert any("middle (1 of 3)" in reason for reason in got.reasons)


@pytest.mark.parametrize(("left", "chosen"), [((0,), 30), ((0, 1), 2)])
def test_a_guidance_scale_of_which_less_than_half_is_left_is_not_chosen(left: tuple[int, ...], chosen: float) -> None:
    matrix = Matrix(variants=("large",), guidance_scales=(2, 30), seeds=(0, 1, 2, 3))
    request = REQUEST.model_copy(update={"matrix": matrix})
    of = [painted(c, seam(0 if c.guidance_scale == 2 else 2), request=request) for c in matrix.cells()]
    of = [r if r.cell.guidance_scale == 30 or r.cell.seed in left else failed(r.cell, request) for r in of]
    got = recommended(of, request)
    assert got.guidance_scale == chosen
    assert any("guidance scale 2 (1 of 4)" in reason for reason in got.reasons) == (chosen == 30)


def test_steps_of_which_less_than_half_is_left_are_not_chosen() -> None:
    matrix = Matrix(variants=("large",), guidance_scales=(30,), steps=(8, 28), seeds=(0, 1, 2))
    request = REQUEST.model_copy(update={"matrix": matrix})
    of = [painted(cell, seam(1), request=request) for cell in matrix.cells()]
    of = [r if r.cell.steps == 28 or r.cell.seed == 0 else failed(r.cell, request) for r in of]
    got = recommended(of, request)
    assert got.steps == 28
    assert any("8 steps (1 of 3)" in reason for reason in got.reasons)


def test_without_the_reference_the_largest_that_painted_is_chosen() -> None:
    of = results({}, FLAT)
    of = [failed(result.cell) if result.cell.variant == "large" else result for result in of]
    got = recommended(of)
    assert got.variant == "middle"
    assert "Of the reference large none are judged" in got.reasons[0]
    assert got.pareto == ()


@pytest.mark.parametrize(
    ("seams", "chosen"),
    [
        ({2: 0.5, 10: 1.0, 30: 2.0}, 2),
        ({2: -0.5, 10: 1.0, 30: 2.0}, 2),
        ({2: 1.0, 10: 0.2, 30: 2.0}, 10),
        ({2: 1.0, 10: 1.0, 30: 1.0}, 30),
        ({2: 1.0, 10: 1.0, 30: 1.0 + 0.9 * TIE}, 30),
        ({2: 1.0, 10: 1.0, 30: 1.0 + 1.1 * TIE}, 10),
    ],
)
def test_the_guidance_scale_with_the_least_visible_seam_is_chosen(seams: dict[float, float], chosen: float) -> None:
    got = recommended(results({"small": GOOD}, seams))
    assert got.guidance_scale == chosen
    assert f"2: {abs(seams[2]):.2f}, 10: {seams[10]:.2f}, 30: {seams[30]:.2f}" in got.reasons[1]


def test_only_the_chosen_variants_seams_count() -> None:
    of = [
        painted(cell, (GOOD if cell.variant == "small" else {}) | seam(0 if cell.variant == "large" else visible))
        for cell, visible in zip(REQUEST.matrix.cells(), (1, 2, 3) * 3, strict=True)
    ]
    assert recommended(of).guidance_scale == 2


def test_without_a_seam_the_official_guidance_scale_is_chosen() -> None:
    got = recommended([painted(cell, GOOD) for cell in REQUEST.matrix.cells()])
    assert got.guidance_scale == 30
    assert "no seam was measured" in got.reasons[1]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [((1.0, 1.0, 1.0), 8), ((2.0, 1.05, 1.0), 20), ((2.0, 1.5, 1.0), 28), ((None, None, None), 8)],
)
def test_the_fewest_steps_of_an_equally_good_seam_are_chosen(visible: tuple[float | None, ...], chosen: int) -> None:
    matrix = Matrix(variants=("large",), guidance_scales=(30,), steps=(28, 8, 20))
    request = REQUEST.model_copy(update={"matrix": matrix})
    seams = dict(zip((8, 20, 28), visible, strict=True))
    of = []
    for cell in matrix.cells():
        of.append(painted(cell, {} if (seen := seams[cell.steps]) is None else seam(seen), request=request))
    got = recommended(of, request)
    assert got.steps == chosen
    assert any(reason.startswith(f"{chosen} steps: the fewest") for reason in got.reasons)


def test_one_number_of_steps_is_no_choice_and_gets_no_reason() -> None:
    got = recommended(results({"small": GOOD}, FLAT))
    assert got.steps == 28
    assert not any("steps:" in reason for reason in got.reasons)


def timed(seconds: Mapping[str, float], likeness: Mapping[str, Figures], **axes: Any) -> Recommendation:
    """Of a matrix with one guidance scale, the variants' cells all alike."""
    request = REQUEST.model_copy(update={"matrix": Matrix(variants=tuple(seconds), guidance_scales=(30,), **axes)})
    cells = request.matrix.cells()
    of = [painted(c, likeness.get(c.variant, {}), request=request, wall_s=seconds[c.variant]) for c in cells]
    return recommended(of, request)


def test_a_choice_that_saves_memory_only_is_said_to() -> None:
    got = timed({"small": 50.0, "middle": 60.0, "large": 40.0}, {"small": GOOD, "middle": GOOD})
    assert got.variant == "small" and "small_gs30" not in got.pareto
    assert got.reasons[-2] == (
        "large is faster (40 s against 50 s) and nearer to the reference (SSIM 1.0000 against 0.9700): "
        "all that small can save is memory."
    )


def test_all_that_beat_the_choice_are_named() -> None:
    got = timed({"small": 50.0, "middle": 50.0, "large": 40.0}, {"small": GOOD, "middle": GOOD | {"ssim": 0.98}})
    assert got.variant == "small"
    assert "middle is as fast (50 s against 50 s) and nearer" in got.reasons[-2]
    assert "; large is faster" in got.reasons[-2]
    equal = timed({"small": 50.0, "large": 40.0}, {"small": {"ssim": 1.0, "psnr_db": 100.0}})
    assert "large is faster (40 s against 50 s) and as near to the reference" in equal.reasons[-2]


@pytest.mark.parametrize(
    ("seconds", "likeness", "chosen"),
    [
        ({"small": 30.0, "middle": 40.0, "large": 40.0}, {"small": GOOD, "middle": GOOD}, "small"),
        ({"small": 50.0, "middle": 40.0, "large": 60.0}, {"small": GOOD, "middle": BAD}, "small"),
        ({"small": 40.0, "middle": 40.0, "large": 60.0}, {"small": GOOD, "middle": GOOD}, "small"),
        ({"small": 10.0, "middle": 10.0, "large": 60.0}, {"small": BAD, "middle": BAD}, "large"),
        ({"small": 50.0, "middle": 40.0, "large": 60.0}, {"small": GOOD}, "small"),
    ],
)
def test_a_choice_that_no_larger_variant_beats_in_both_needs_no_excuse(
    seconds: Mapping[str, float], likeness: Mapping[str, Figures], chosen: str
) -> None:
    got = timed(seconds, likeness)
    assert got.variant == chosen
    assert not any("can save" in reason for reason in got.reasons)


def test_only_the_settings_that_are_chosen_count_against_the_choice() -> None:
    """Of other guidance scales nothing is said, and a cell that the other has not is left out of both means."""
    of = results({"small": GOOD}, {2.0: 3.0, 10.0: 3.0, 30.0: 0.0})
    slow = {"small_gs30": 9.0, "large_gs30": 10.0, "small_gs2": 50.0}
    of = [result.model_copy(update={"wall_s": slow.get(result.name, 1.0)}) for result in of]
    got = recommended(of)
    assert (got.variant, got.guidance_scale) == ("small", 30)
    assert not any("can save" in reason for reason in got.reasons)
    seeds = Matrix(variants=("small", "large"), guidance_scales=(30,), seeds=(0, 1))
    request = REQUEST.model_copy(update={"matrix": seeds})
    cells = {(c.variant, c.seed): c for c in seeds.cells()}
    times = {("small", 0): 50.0, ("large", 0): 40.0, ("large", 1): 90.0}
    some = [painted(cells[at], GOOD, request=request, wall_s=wall_s) for at, wall_s in times.items()]
    got = recommended([*some, failed(cells["small", 1], request)], request)
    assert any("large is faster (40 s against 50 s)" in reason for reason in got.reasons)


def test_a_changed_photo_is_called_a_defect() -> None:
    of = results({"small": GOOD}, FLAT)
    of[3] = painted(of[3].cell, {"outside_max": 2})
    assert any("middle_gs2 (by 2 of 255)" in reason for reason in recommended(of).reasons)


def test_the_last_reason_says_what_figures_cannot_judge() -> None:
    assert "Look at the pictures" in recommended(results({}, FLAT)).reasons[-1]


def test_nothing_is_recommended_where_nothing_succeeded() -> None:
    assert recommend(REQUEST, [failed(cell) for cell in REQUEST.matrix.cells()], SIZES) is None
    assert recommend(REQUEST, [], SIZES) is None


def test_visibility_counts_edges_and_smears_alike_and_adds_colour() -> None:
    cell = REQUEST.matrix.cells()[0]
    for ratio, shift, expected in ((1, 0, 0), (2, 0, 1), (0.5, 0, 1), (1, 2.3, 1), (4, 4.6, 4)):
        result = painted(cell, {"seam_gradient_ratio": ratio, "seam_colour_shift": shift})
        assert visibility(result) == pytest.approx(expected)
    assert visibility(painted(cell, {"seam_gradient_ratio": 2})) is None
    assert visibility(failed(cell)) is None


@st.composite
def measured(draw: st.DrawFn) -> list[CellResult]:
    of = []
    for cell in REQUEST.matrix.cells():
        if draw(st.integers(0, 4)) == 0:
            of.append(failed(cell))
            continue
        ssim = None if cell.variant == "large" else draw(st.none() | st.sampled_from([0.2, 0.9, 0.95, 1.0]))
        ratio = draw(st.none() | st.floats(0.1, 10))
        figures: Figures = {
            "ssim": ssim,
            "psnr_db": ssim and 40.0,
            "seam_gradient_ratio": ratio,
            "seam_colour_shift": 1.0,
        }
        of.append(painted(cell, figures, wall_s=draw(st.sampled_from([1.0, 1.5, 2.0]))))
    return of


def point(result: CellResult) -> tuple[float, float] | None:
    if result.wall_s is None or result.compared is None:
        return None
    quality = 1.0 if result.cell.variant == "large" else result.compared.ssim
    return None if quality is None else (result.wall_s, -quality)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@pytest.mark.slow
@given(measured())
def test_the_front_is_every_cell_that_no_other_beats(of: list[CellResult]) -> None:
    points = {result.name: at for result in of if (at := point(result)) is not None}
    front = pareto(REQUEST, [result for result in of if result.status == "succeeded"])
    assert set(front) == {n for n, at in points.items() if not any(beats(other, at) for other in points.values())}
    assert bool(front) == bool(points)
    assert [points[name][0] for name in front] == sorted(points[name][0] for name in front)


@pytest.mark.slow
@given(measured())
def test_what_is_recommended_was_painted_and_said_in_sentences(of: list[CellResult]) -> None:
    got = recommend(REQUEST, of, SIZES)
    cells = [result.cell for result in of if result.status == "succeeded"]
    assert (got is None) == (not cells)
    if got:
        assert (got.variant, got.guidance_scale, got.steps) in {(c.variant, c.guidance_scale, c.steps) for c in cells}
        assert all(reason.endswith(".") for reason in got.reasons)


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 1.5, 2.0]), st.sampled_from([0.2, 0.9, 1.0])), min_size=12, max_size=12)
)
def test_each_combination_has_a_front_of_its_own(measures: list[tuple[float, float]]) -> None:
    """Fewer steps are always faster: they beat nothing."""
    matrix = Matrix(variants=("small", "large"), guidance_scales=(2, 30), steps=(28, 8, 20))
    request = REQUEST.model_copy(update={"matrix": matrix})
    of = []
    for cell, (wall_s, ssim) in zip(matrix.cells(), measures, strict=True):
        of.append(painted(cell, {"ssim": ssim}, request=request, wall_s=wall_s + cell.steps))
    alone = [pareto(request, [result for result in of if result.cell.steps == steps]) for steps in matrix.steps]
    assert all(alone)
    assert pareto(request, of) == tuple(name for front in alone for name in front)


def test_each_of_the_further_axes_makes_a_combination() -> None:
    matrix = Matrix(
        variants=("small", "large"),
        guidance_scales=(30,),
        seeds=(1, 0),
        prompts=("b", "a"),
        crops=(CropStrategy.CROP, CropStrategy.AUTO),
        mask_grows=(0.02, 0),
    )
    request = REQUEST.model_copy(update={"matrix": matrix})
    of = [painted(c, GOOD, request=request, wall_s=i + 1.0) for i, c in enumerate(matrix.cells())]
    assert set(pareto(request, of)) == {result.name for result in of}


@pytest.mark.slow
@given(measured(), st.randoms())
def test_the_order_of_results_changes_nothing(of: list[CellResult], random: Random) -> None:
    shuffled = of[:]
    random.shuffle(shuffled)
    one, other = recommend(REQUEST, of, SIZES), recommend(REQUEST, shuffled, SIZES)
    assert (one and one.model_dump(exclude={"reasons"})) == (other and other.model_dump(exclude={"reasons"}))


# -- pictures that put the object back


BACK: Figures = {"put_back": 0.9}
GONE: Figures = {"put_back": 0.1}


def with_put_back(of: Mapping[str, Sequence[bool]], likeness: Figures = GOOD) -> list[CellResult]:
    """By variant, of each of its cells, in order, whether it puts the object back."""
    turns = {variant: iter(values) for variant, values in of.items()}
    return [
        painted(cell, likeness | seam(1.0) | (BACK if next(turns[cell.variant]) else GONE))
        for cell in REQUEST.matrix.cells()
    ]


NO, YES = (False,) * 3, (True,) * 3


@pytest.mark.parametrize(
    ("small", "middle", "large", "chosen"),
    [
        (NO, NO, NO, "small"),
        (YES, NO, NO, "middle"),
        ((True, True, False), NO, NO, "middle"),
        ((True, False, False), NO, NO, "small"),
        (YES, YES, NO, "large"),
        (NO, NO, YES, "middle"),
        (YES, YES, YES, "small"),
    ],
)
def test_a_variant_that_puts_the_object_back_is_not_recommended(
    small: Sequence[bool], middle: Sequence[bool], large: Sequence[bool], chosen: str
) -> None:
    """Without a reference to be near to, the largest variant that is left is chosen."""
    got = recommended(with_put_back({"small": small, "middle": middle, "large": large}))
    assert got.variant == chosen
    assert any("The object is put back" in reason for reason in got.reasons) == any((*small, *middle, *large))


def test_the_reasons_say_which_variant_puts_the_object_back() -> None:
    got = recommended(with_put_back({"small": YES, "middle": (True, False, False), "large": NO}))
    assert (
        "The object is put back (put_back above 0.45) by small in 3 of 3 cells, middle in 1 of 3 cells: those cells "
        "are not judged, and small is not recommended."
    ) in got.reasons


def test_where_all_put_the_object_back_the_rules_say_so_and_choose_as_ever() -> None:
    got = recommended(with_put_back({"small": YES, "middle": YES, "large": YES}))
    assert got.variant == "small"
    assert any("none of the variants removes it" in reason for reason in got.reasons)


def test_a_guidance_scale_that_puts_the_object_back_is_not_chosen() -> None:
    """However invisible its seams are."""
    got = recommended(with_put_back({"small": (False, False, True), "middle": NO, "large": NO}))
    assert (got.variant, got.guidance_scale) == ("small", 10.0)


def test_the_threshold_is_the_settings() -> None:
    of = with_put_back({"small": YES, "middle": NO, "large": NO})
    got = recommend(REQUEST, of, SIZES, 0.95)
    assert got is not None and got.variant == "small"


def test_cells_that_were_not_measured_put_nothing_back() -> None:
    cells = [painted(cell, GOOD | seam(1.0)) for cell in REQUEST.matrix.cells()]
    assert not any("put back" in reason for reason in recommended(cells).reasons)
