"""Two runs' results.json against each other: verdicts, noise, thresholds, and what cannot be compared."""

import io
import json
from datetime import UTC, datetime
from math import sqrt
from random import Random
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from serve_app.audit.compare import (
    MAX_NOISE,
    MEDIAN_ERROR,
    MIN_NOISE,
    TIMES,
    TOLERANCES,
    Comparison,
    Row,
    Thresholds,
    compare,
    table,
)
from serve_app.audit.record import BETTER, Audit, CellResult, Compared
from serve_app.audit.report.results import as_json, document
from serve_app.errors import AuditError
from serve_app.models import Trial
from serve_app.parameters import AuditRequest, Matrix

Results = dict[str, Any]
FIGURES: dict[str, Any] = {
    "wall_s": 2.0,
    "gpu_ms": 1800.0,
    "psnr_db": 34.0,
    "ssim": 0.97,
    "mae": 3.0,
    "outside_max": 0,
    "seam_gradient_ratio": 1.2,
    "seam_colour_shift": 3.0,
    "put_back": 0.1,
    "contrast": 0.3,
    "busy": 0.2,
    "cast": 9.0,
}


def cell(variant: str = "Q4_0", guidance: float = 2.0, **changed: Any) -> Results:
    """As results.json has it."""
    axes = {"steps": 28, "seed": 0, "prompt": "empty ground", "crop": "auto"}
    named = {"variant": variant, "guidance": guidance, "name": f"{variant}_gs{guidance:g}", "status": "succeeded"}
    return {**named, **axes, "gpu": "NVIDIA L4", "trials": [3.0, 2.0], "error": None, **FIGURES, **changed}


def results(*cells: Results, **changed: Any) -> Results:
    run = {"run_id": "audit-1", "user_id": "u", "session_id": "s", "reference": "Q8_0", "gpu": "NVIDIA L4"}
    return {**run, "cells": list(cells), **changed}


def row(comparison: Comparison, figure: str) -> Row:
    (found,) = (row for row in comparison.rows if row.figure == figure)
    return found


def changed(thresholds: Thresholds | None = None, **figures: Any) -> Comparison:
    """One cell, with these figures in the later run."""
    return compare(results(cell()), results(cell(**figures), run_id="audit-2"), thresholds or Thresholds())


def test_every_figure_has_a_tolerance_and_a_direction() -> None:
    assert list(TOLERANCES) == list(BETTER) == list(Compared.model_fields)


def test_a_run_against_itself_is_the_same_and_passes() -> None:
    got = changed()
    assert {each.verdict for each in got.rows} == {"same"}
    assert [each.figure for each in got.rows] == [*TIMES, *BETTER]
    assert (got.passed, got.failures, got.added, got.differences) == (True, (), (), ())


@pytest.mark.parametrize(
    ("figure", "after", "verdict"),
    [
        ("wall_s", 1.5, "faster"),
        ("wall_s", 2.5, "slower"),
        ("wall_s", 2.0 * (1 + MIN_NOISE) - 1e-6, "same"),
        ("gpu_ms", 1500.0, "faster"),
        ("psnr_db", 35.0, "better"),
        ("psnr_db", 33.95, "same"),
        ("psnr_db", 33.0, "worse"),
        ("ssim", 0.98, "better"),
        ("ssim", 0.96, "worse"),
        ("mae", 4.0, "worse"),
        ("outside_max", 1, "worse"),
        ("seam_gradient_ratio", 1.0, "better"),
        ("seam_gradient_ratio", 0.9, "better"),
        ("seam_gradient_ratio", 0.5, "worse"),
        ("seam_gradient_ratio", 1.5, "worse"),
        ("seam_colour_shift", 2.0, "better"),
        ("mae", None, "lost"),
    ],
)
def test_each_figure_has_its_own_better_and_worse(figure: str, after: Any, verdict: str) -> None:
    got = changed(**{figure: after})
    assert row(got, figure).verdict == verdict
    assert {each.verdict for each in got.rows if each.figure != figure} == {"same"}


def noise(*warm: float, before: float = 2.0) -> float:
    """Of `wall_s`, by the earlier one, where both runs' warm paintings took so long."""
    timed = results(cell(wall_s=before, trials=[9.0, *warm]))
    return row(compare(timed, timed), "wall_s").noise / before


@pytest.mark.parametrize(
    ("warm", "expected"),
    [
        ((), MIN_NOISE),
        ((2.0,), MIN_NOISE),
        ((2.0, 2.0, 2.0), MIN_NOISE),
        ((1.9, 2.0, 2.1) * 3, 2 * sqrt(2) * MEDIAN_ERROR * 0.1 / sqrt(9) / 2.0),
        ((1.0, 2.0, 3.0), MAX_NOISE),
        ((2.0, 2.0, 2.0, 6.0), MIN_NOISE),
        ((2.0, 60.0), MAX_NOISE),
    ],
)
def test_noise_is_the_uncertainty_of_the_medians(warm: tuple[float, ...], expected: float) -> None:
    assert noise(*warm) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("times", "passed"), [(1, True), (4, False)])
def test_more_paintings_make_the_gate_sharper(times: int, passed: bool) -> None:
    warm = (1.94, 2.0, 2.06) * times
    assert MIN_NOISE <= noise(*warm * 2) <= noise(*warm)
    slower = cell(wall_s=2.15, trials=[3.0, *(2.15 / 2 * each for each in warm)])
    got = compare(results(cell(trials=[3.0, *warm])), results(slower), Thresholds(max_slower_percent=5))
    assert got.passed == passed


@pytest.mark.parametrize("slower", [1.15, 3.0])
@pytest.mark.parametrize("held_up", ["before", "after", "both"])
def test_a_painting_that_was_held_up_hides_no_slowdown(held_up: str, slower: float) -> None:
    """Medians do not see it, so the noise must not either."""
    calm = [3.0, 2.0, 2.02, 1.98, 2.0]
    disturbed = [3.0, 2.0, 2.02, 1.98, 9.0]
    before = disturbed if held_up in ("before", "both") else calm
    after = disturbed if held_up in ("after", "both") else calm
    times = [median(trials[1:]) for trials in (before, after)]
    later = cell(wall_s=slower * times[1], trials=[slower * each for each in after])
    got = compare(results(cell(wall_s=times[0], trials=before)), results(later))
    assert row(got, "wall_s").verdict == "slower"
    assert not got.passed


def test_an_identical_build_rarely_fails_by_noise() -> None:
    """Three warm paintings with noise of 3% each."""
    random = Random(1)

    def timed() -> Results:
        warm = [random.gauss(2.0, 0.06) for _ in range(3)]
        return results(cell(wall_s=median(warm), trials=[3.0, *warm]))

    passed = [compare(timed(), timed()).passed for _ in range(500)]
    assert sum(passed) >= 495


@pytest.mark.parametrize(
    ("figures", "thresholds", "failure"),
    [
        ({"wall_s": 2.19}, Thresholds(), None),
        ({"wall_s": 2.3}, Thresholds(), "Q4_0_gs2: wall_s went from 2 to 2.3 (+15.0%)."),
        ({"gpu_ms": 2100.0}, Thresholds(), "Q4_0_gs2: gpu_ms went from 1800 to 2100 (+16.7%)."),
        ({"wall_s": 2.3}, Thresholds(max_slower_percent=20), None),
        ({"wall_s": 9.0}, Thresholds(max_slower_percent=None), None),
        ({"wall_s": 2.19, "trials": [3.0, 1.0, 2.2, 3.4]}, Thresholds(max_slower_percent=6), None),
        ({"ssim": 0.965}, Thresholds(), None),
        ({"ssim": 0.95}, Thresholds(), "Q4_0_gs2: ssim went from 0.97 to 0.95 (-0.02)."),
        ({"ssim": 0.965}, Thresholds(max_ssim_drop=0), "Q4_0_gs2: ssim went from 0.97 to 0.965 (-0.005)."),
        ({"ssim": 0.9695}, Thresholds(max_ssim_drop=0), None),
        ({"ssim": None}, Thresholds(), "Q4_0_gs2: ssim is no longer measured."),
        ({"psnr_db": 20.0, "mae": None}, Thresholds(), None),
        ({"psnr_db": 32.0}, Thresholds(max_psnr_drop_db=1), "Q4_0_gs2: psnr_db went from 34 to 32 (-2)."),
        ({"seam_colour_shift": 9.0}, Thresholds(), "Q4_0_gs2: seam_colour_shift went from 3 to 9 (+6)."),
        ({"seam_colour_shift": 5.2}, Thresholds(), None),
        ({"seam_colour_shift": 9.0}, Thresholds(max_colour_shift_rise=7), None),
        ({"seam_colour_shift": None}, Thresholds(), "Q4_0_gs2: seam_colour_shift is no longer measured."),
        ({"seam_gradient_ratio": 1.65}, Thresholds(), None),
        ({"seam_gradient_ratio": 1.8}, Thresholds(), "Q4_0_gs2: seam_gradient_ratio went from 1.2 to 1.8 (+0.6)."),
        ({"seam_gradient_ratio": 1 / 1.65}, Thresholds(), None),
        ({"seam_gradient_ratio": 0.5}, Thresholds(), "Q4_0_gs2: seam_gradient_ratio went from 1.2 to 0.5 (-0.7)."),
        ({"seam_gradient_ratio": 4.0}, Thresholds(max_seam_gradient_rise=None), None),
        ({"put_back": 0.29}, Thresholds(), None),
        ({"put_back": 0.9}, Thresholds(), "Q4_0_gs2: put_back went from 0.1 to 0.9 (+0.8)."),
        ({"put_back": 0.9}, Thresholds(max_put_back_rise=None), None),
        ({"contrast": 9.0, "busy": 3.0, "cast": 40.0}, Thresholds(), None),
        ({"outside_max": 1}, Thresholds(), "Q4_0_gs2: outside_max went from 0 to 1 (+1)."),
        ({"ssim": 0.99, "wall_s": 1.0}, Thresholds(max_slower_percent=0, max_ssim_drop=0), None),
    ],
)
def test_a_passed_threshold_speaks_against_the_later_run(
    figures: dict[str, Any], thresholds: Thresholds, failure: str | None
) -> None:
    got = changed(thresholds, **figures)
    assert got.failures == ((failure,) if failure else ())
    assert got.passed == (failure is None)


def test_a_change_outside_fails_even_where_it_was_there_before() -> None:
    changed_photo = results(cell(outside_max=2))
    got = compare(changed_photo, changed_photo)
    assert (row(got, "outside_max").verdict, got.passed) == ("same", False)


FAILED: Results = {"status": "failed", **dict.fromkeys(FIGURES)}
NOTHING = "The two runs have no painted cell in common."


@pytest.mark.parametrize(
    ("before", "after", "failures"),
    [
        ([], [], (NOTHING,)),
        ([], [cell()], (NOTHING,)),
        ([cell(**FAILED)], [cell()], (NOTHING,)),
        ([cell(**FAILED)], [cell(**FAILED)], (NOTHING,)),
        ([cell()], [], (NOTHING, "Q4_0_gs2 is missing.")),
        ([cell(guidance=2)], [cell(guidance=2, **FAILED)], (NOTHING, "Q4_0_gs2 failed.")),
        (
            [cell(**dict.fromkeys(FIGURES))],
            [cell(**dict.fromkeys(FIGURES))],
            ("The cells that both runs painted have no figure in common.",),
        ),
    ],
)
def test_nothing_compared_is_no_pass(before: list[Results], after: list[Results], failures: tuple[str, ...]) -> None:
    assert compare(results(*before), results(*after)).failures == failures


def test_pictures_that_broke_alike_are_seen_at_the_seam_where_their_edge_shows() -> None:
    """Against a reference that broke the same way they are as good as ever."""
    alike = {"psnr_db": 100.0, "ssim": 1.0, "mae": 0.0}
    noise = changed(**alike, seam_gradient_ratio=3.24, seam_colour_shift=20.6)
    assert {each.figure for each in noise.rows if each.is_failure} == {"seam_gradient_ratio", "seam_colour_shift"}
    assert changed(**alike).passed


def test_missing_and_newly_failed_cells_are_failures_and_new_ones_are_listed() -> None:
    failed = FAILED
    before = results(cell(guidance=2), cell(guidance=4), cell(guidance=10), cell(guidance=20, **failed))
    after = results(
        cell(guidance=2), cell(guidance=4, **failed), cell(guidance=20), cell(guidance=30), cell("Q8_0", **failed)
    )
    got = compare(before, after)
    assert got.failures == ("Q4_0_gs4 failed.", "Q4_0_gs10 is missing.")
    assert got.added == ("Q4_0_gs20", "Q4_0_gs30")
    assert {each.cell for each in got.rows} == {"Q4_0_gs2"}


def test_cells_match_by_their_axes_not_by_their_names() -> None:
    got = compare(results(cell()), results(cell(seed=1, name="Q4_0_gs2_seed1"), cell(name="Q4_0_gs2_seed0", ssim=0.99)))
    assert {each.cell for each in got.rows} == {"Q4_0_gs2_seed0"}
    assert got.added == ("Q4_0_gs2_seed1",)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (results(cell(gpu="NVIDIA A100")), "another GPU, NVIDIA L4 and NVIDIA A100"),
        (results(cell(), session_id="t"), "another session, u/s and u/t"),
        (results(cell(), reference="Q4_0"), "another reference, Q8_0 and Q4_0"),
    ],
)
def test_runs_that_say_nothing_about_each_other_are_refused_unless_allowed(after: Results, said: str) -> None:
    with pytest.raises(AuditError, match=said):
        compare(results(cell()), after)
    allowed = compare(results(cell()), after, allow_different=True)
    assert (allowed.differences, allowed.passed) == ((said,), True)


@pytest.mark.parametrize(
    ("broken", "place"),
    [
        ({}, "run_id"),
        (results(cell()) | {"cells": None}, "cells"),
        (results(cell(), "Q4_0"), "cells.1"),  # type: ignore[arg-type]  # the point
        (results(cell(ssim="good")), "cells.0.figures.ssim"),
        (results(cell(wall_s=float("nan"))), "cells.0.figures.wall_s"),
        (results(cell(status="waiting")), "cells.0.status"),
        (results(cell(seam_gradient_ratio=0.0)), "cells.0.figures: Value error, seam_gradient_ratio: 0 is not above 0"),
    ],
)
def test_what_is_no_results_file_is_refused_with_the_place(broken: Results, place: str) -> None:
    with pytest.raises(AuditError, match=f"the later run's results are no results.json of an audit: {place}"):
        compare(results(cell()), broken)
    with pytest.raises(AuditError, match="the earlier run's"):
        compare(broken, results(cell()))


def test_a_metric_that_an_older_run_did_not_have_is_no_row() -> None:
    older = cell()
    del older["mae"]
    assert "mae" not in {each.figure for each in compare(results(older), results(cell())).rows}


def test_a_time_of_nothing_divides_nothing() -> None:
    got = compare(results(cell(wall_s=0.0, trials=[0.0, 0.0, 0.0])), results(cell(wall_s=0.1)))
    assert row(got, "wall_s").verdict == "slower"
    assert "+0.1" in printed(got)


def printed(comparison: Comparison, everything: bool = False) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table(comparison, everything=everything))
    return console.export_text()


def test_the_table_shows_what_changed_and_counts_the_rest() -> None:
    text = printed(changed(wall_s=2.5, ssim=0.975, mae=None))
    assert "audit-1 → audit-2" in text
    assert "+25.0%" in text and "slower ✗" in text
    assert "better" in text and "+0.005" in text
    assert "lost" in text
    assert "seam_colour_shift" not in text
    assert "9 same" in text


def test_a_runs_words_are_no_markup() -> None:
    odd = results(cell(name="[red]a[/bold]"), run_id="[b]x[/i]")
    text = printed(compare(odd, odd), everything=True)
    assert "[red]a[/bold]" in text and "[b]x[/i]" in text


def test_the_table_can_show_everything() -> None:
    text = printed(changed(), everything=True)
    assert all(figure in text for figure in (*TIMES, *BETTER))


def test_what_the_report_writes_is_what_is_read() -> None:
    request = AuditRequest(user_id="u", session_id="s", matrix=Matrix(variants=("Q4_0", "Q8_0"), guidance_scales=(2,)))
    now = datetime(2026, 1, 1, tzinfo=UTC)
    audit = Audit(id="audit-1", request=request, created_at=now)
    times = (3.0, 2.0, 2.4)
    trials = tuple(Trial(wall_s=s, gpu_ms=None, stages={}, peak_bytes=None, reserved_bytes=None) for s in times)
    figures = {name: value for name, value in FIGURES.items() if name in Compared.model_fields}
    of = [
        CellResult(
            name=request.matrix.name(each), cell=each, status="succeeded", wall_s=2.2, trials=trials,
            compared=Compared.model_validate(figures),
        )
        for each in request.matrix.cells()
    ]  # fmt: skip
    written = json.loads(as_json(document(audit, of, {})))
    got = compare(written, written)
    assert [(each.cell, each.figure) for each in got.rows] == [
        (name, figure) for name in ("Q4_0_gs2", "Q8_0_gs2") for figure in ("wall_s", *BETTER)
    ]
    assert row(compare(written, written | {"cells": written["cells"][:1]}), "wall_s").noise == pytest.approx(0.1 * 2.2)
    assert {each.before for each in got.rows} == {2.2, *figures.values()}


amounts = st.floats(0.1, 10)


@given(amounts, amounts, st.sampled_from([*TIMES, *BETTER]))
def test_what_is_better_one_way_is_worse_the_other(one: Any, other: Any, figure: str) -> None:
    opposite = {"faster": "slower", "slower": "faster", "better": "worse", "worse": "better", "same": "same"}
    there = compare(results(cell(**{figure: one})), results(cell(**{figure: other})))
    back = compare(results(cell(**{figure: other})), results(cell(**{figure: one})))
    verdict, reverse = row(there, figure).verdict, row(back, figure).verdict
    # Noise of times is a share of the earlier one, so right at its limit one way may be within and the other not.
    assert reverse == opposite[verdict] or (figure in TIMES and "same" in (verdict, reverse))
