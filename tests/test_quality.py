"""The four measures of an edit, on hostile inputs and on a failure of each kind. How often they find one,
benchmarks/quality.py measures."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import quality as benchmark
from serve_app.edit import quality
from serve_app.edit.quality import Edit
from serve_app.models import Pixels

Measure = Callable[[Edit], float | None]
MEASURES = [quality.put_back, quality.contrast, quality.busy, quality.cast]
SIZE = 160, 200


def ground(seed: int = 0) -> Pixels:
    """Textured, over a gradient of colour."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    base = np.stack([80 + x / 3, 90 + y / 3, np.full(SIZE, 110.0)], axis=-1)
    return np.clip(base + np.random.default_rng(seed).normal(0, 6, base.shape), 0, 255).astype(np.uint8)


def line(width_px: int = 9) -> Pixels:
    return cv2.line(np.zeros(SIZE, np.uint8), (20, 30), (170, 120), 255, width_px)


TRUTH, MASK = ground(), line()
LEASH = (200, 30, 40)


def with_leash(share: float = 1.0, colour: tuple[int, int, int] = LEASH, width_px: int = 7) -> Pixels:
    opacity = cv2.GaussianBlur(line(width_px).astype(np.float32) / 255, (0, 0), 1)[..., None] * share
    return (TRUTH * (1 - opacity) + np.array(colour) * opacity).astype(np.uint8)


PHOTO = with_leash()
SMEAR = cv2.inpaint(PHOTO, cv2.dilate(MASK, np.ones((9, 9))), 5, cv2.INPAINT_TELEA)


def cut(result: Pixels, photo: Pixels = PHOTO, mask: Pixels = MASK) -> Edit:
    found = quality.cut(photo, np.where(mask[..., None] > 0, result, photo), mask)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("result", "measure", "limit"),
    [
        pytest.param(PHOTO, quality.put_back, quality.PUT_BACK, id="put back"),
        pytest.param(with_leash(0.35), quality.put_back, quality.PUT_BACK, id="faint"),
        pytest.param(with_leash(0.35), quality.contrast, quality.CONTRAST, id="faint, by contrast"),
        pytest.param(with_leash(1, (20, 200, 220)), quality.contrast, quality.CONTRAST, id="another colour"),
        pytest.param(SMEAR, quality.busy, quality.BUSY, id="smear"),
        pytest.param(cv2.GaussianBlur(SMEAR, (0, 0), 5), quality.busy, quality.BUSY, id="blur"),
        pytest.param(np.clip(TRUTH + np.random.default_rng(2).normal(0, 25, TRUTH.shape), 0, 255).astype(np.uint8),
                     quality.busy, quality.BUSY, id="noise"),
        pytest.param(np.clip(TRUTH + np.array((45, 0, -45)), 0, 255).astype(np.uint8),
                     quality.cast, quality.CAST, id="cast"),
        pytest.param(np.full_like(TRUTH, 230), quality.cast, quality.CAST, id="another object"),
    ],
)  # fmt: skip
def test_a_failure_is_found(result: Pixels, measure: Measure, limit: float) -> None:
    found = measure(cut(result))
    assert found is not None and found > limit


@pytest.mark.parametrize("good", [TRUTH, ground(seed=7)], ids=["the truth", "other ground alike"])
def test_a_good_fill_is_not_accused(good: Pixels) -> None:
    edit = cut(good)
    limits = (quality.PUT_BACK, quality.CONTRAST, quality.BUSY, quality.CAST)
    for measure, limit in zip(MEASURES, limits, strict=True):
        found = measure(edit)
        assert found is not None and found < limit, measure.__name__


def test_a_leash_in_another_colour_or_none_is_not_put_back() -> None:
    for result in (SMEAR, with_leash(1, (20, 200, 220))):
        found = quality.put_back(cut(result))
        assert found is not None and found < quality.PUT_BACK


def test_a_trace_that_nobody_sees_is_not_put_back() -> None:
    """A hundredth of the leash on its fill: the two differences agree in all but size."""
    found = quality.put_back(cut((SMEAR + 0.01 * (PHOTO.astype(float) - SMEAR)).astype(np.uint8)))
    assert found is not None and found < 0.3


def at(*pixels: tuple[int, int]) -> Pixels:
    mask = np.zeros(SIZE, np.uint8)
    for pixel in pixels:
        mask[pixel] = 255
    return mask


def test_an_empty_mask_has_nothing_to_measure() -> None:
    assert quality.cut(PHOTO, PHOTO, np.zeros(SIZE, np.uint8)) is None


@pytest.mark.parametrize(
    "mask",
    [np.full(SIZE, 255, np.uint8), at((80, 80)), at((0, 0)), at((159, 199))],
    ids=["full", "a pixel", "a corner", "the last pixel"],
)
@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_what_cannot_be_told_is_none(mask: Pixels, measure: Measure) -> None:
    assert measure(cut(TRUTH, mask=mask)) is None


def test_of_a_flat_photo_nothing_can_have_been_put_back() -> None:
    flat = np.full((*SIZE, 3), 120, np.uint8)
    edit = cut(flat, photo=flat)
    assert [measure(edit) for measure in MEASURES[:3]] == [None, 0.0, 0.0]
    # The fill rounds to the grey level below.
    assert quality.cast(edit) == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("edge", [np.s_[:12], np.s_[-12:], np.s_[:, :12], np.s_[:, -12:], np.s_[1:], np.s_[:-1, :-1]])
@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_a_mask_at_the_photos_border_gives_a_number_or_none(edge: tuple[slice, ...], measure: Measure) -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[edge] = 255
    found = measure(cut(SMEAR, mask=mask))
    assert found is None or math.isfinite(found)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (5, 5)])
@pytest.mark.parametrize("value", [0, 255])
def test_no_photo_is_too_small(size: tuple[int, int], value: int) -> None:
    photo, mask = np.full((*size, 3), value, np.uint8), np.zeros(size, np.uint8)
    mask[0, : (size[1] + 1) // 2] = 255
    edit = quality.cut(photo, 255 - photo, mask)
    assert edit is not None
    for measure in MEASURES:
        found = measure(edit)
        assert found is None or math.isfinite(found)


def test_a_large_photo_is_measured_as_a_small_one_is() -> None:
    """At 12 megapixels: what is measured has the size that it has in a small photo."""
    size = 4000, 3000
    large = [cv2.resize(of, size, interpolation=cv2.INTER_LINEAR) for of in (PHOTO, with_leash(0.35), MASK)]
    edit = quality.cut(*large)
    assert edit is not None and max(edit.photo.shape) == quality.MAX_SIDE_PX
    found, small = quality.put_back(edit), quality.put_back(cut(with_leash(0.35)))
    assert found is not None and small is not None and found == pytest.approx(small, abs=0.1)


def test_a_thin_line_in_a_large_photo_is_not_lost() -> None:
    mask = cv2.line(np.zeros((3000, 4000), np.uint8), (100, 100), (3900, 2900), 255, 3)
    photo = np.full((3000, 4000, 3), 120, np.uint8)
    photo[mask > 0] = LEASH
    edit = quality.cut(photo, photo, mask)
    assert edit is not None
    found = quality.put_back(edit)
    assert found is not None and found > quality.PUT_BACK


def test_a_pixel_of_the_largest_photo_is_not_lost() -> None:
    photo, mask = np.zeros((20, 10_000, 3), np.uint8), np.zeros((20, 10_000), np.uint8)
    mask[0, 0] = mask[19, 9_999] = 255
    edit = quality.cut(photo, photo, mask)
    assert edit is not None and edit.inside.shape == (1, 512) and edit.inside[0, [0, -1]].all()


# -- how often: the benchmark

RESULTS = json.loads(Path("benchmarks/results/quality.json").read_text())


def test_the_document_has_the_benchmarks_figures() -> None:
    names = ["good: the truth", "good: background moved in from beside", "object put back", "faint, 35% of it"]
    names += ["in another colour", "another object", "colour cast", "blur", "smear (Telea)", "noise"]
    document = Path("docs/audit.md").read_text()
    for name, row in zip(names, RESULTS["rows"].values(), strict=True):
        told = re.search(rf"^\| {re.escape(name)} \| (.*) \| (\d+)% \|$", document, re.M)
        assert told is not None, name
        pairs = re.findall(r"(\d+)% \((-?[\d.]+)\)", told[1])
        assert [int(share) for share, _ in pairs] == [round(100 * row[one]["share"]) for one in RESULTS["thresholds"]]
        medians = [row[one]["median"] for one in RESULTS["thresholds"]]
        assert [float(median) for _, median in pairs] == pytest.approx(medians, abs=0.06)
        assert int(told[2]) == round(100 * row["any"])


def test_the_thresholds_are_those_that_were_measured() -> None:
    assert RESULTS["scenes"] >= 24
    assert list(RESULTS["thresholds"].values()) == [quality.PUT_BACK, quality.CONTRAST, quality.BUSY, quality.CAST]


def test_the_benchmark_tells_a_leash_from_none() -> None:
    scene = next(benchmark.scenes())
    found = {name: benchmark.measured(scene, fill)[0] for name, fill in benchmark.fills(scene).items()}
    assert (found["put back"]["put_back"] or 0) > (found["faint (35%)"]["put_back"] or 0) > quality.PUT_BACK
    assert all((row["put_back"] or 0) < quality.PUT_BACK for name, row in found.items() if name.startswith("good"))
    assert (found["smear"]["busy"] or 0) > quality.BUSY > (found["good: the truth"]["busy"] or 1)
