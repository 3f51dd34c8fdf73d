"""Two audits side by side: what got faster, slower, better or worse, beyond noise, and whether a release may pass.

It knows runs by their results.json alone. Cells are matched by their axes, whatever they are named.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, log2, sqrt
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from rich.table import Column, Table
from rich.text import Text

from ..errors import AuditError
from ..parameters import MASK_GROW
from .record import BETTER

Verdict = Literal["faster", "slower", "better", "worse", "same", "lost"]

#: Seconds and device milliseconds of a warm painting. The first painting is one number, whose noise nobody knows.
TIMES = ("wall_s", "gpu_ms")
#: Times that differ by no more of the earlier one are the same, however little the trials of a cell differ: a machine
#: drifts between two runs. Nor is more than MAX_NOISE ever noise, however much they do: a gate that bad timings open is
#: none.
MIN_NOISE = 0.05
MAX_NOISE = 2 * MIN_NOISE
#: The standard error of the median of n normal values, by their median absolute deviation over sqrt(n): 1.4826, which
#: makes sigma of the deviation, by sqrt(pi / 2), the median's error by the mean's for many values.
MEDIAN_ERROR = 1.858
#: Pictures repeat to the byte only in one process configuration: another number of threads, or a batch, moves a pixel
#: of bfloat16 by a grey level here and there. Differences of these figures up to this are none.
TOLERANCES: Mapping[str, float] = {
    "psnr_db": 0.1,
    "ssim": 0.001,
    "mae": 0.05,
    "outside_max": 0.0,
    # Of |log2 ratio|.
    "seam_gradient_ratio": 0.01,
    "seam_colour_shift": 0.05,
    "put_back": 0.02,
    "contrast": 0.02,
    "busy": 0.02,
    "cast": 0.2,
}
_STYLES: Mapping[Verdict, str] = {"faster": "green", "better": "green", "slower": "red", "worse": "red", "lost": "red"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """How much worse each figure of a cell may get. None: as much as it likes. What is within noise passes.

    The figures against the reference are blind to what breaks it alike; those of the seam see some of that."""

    #: Of both times, percent of the earlier one.
    max_slower_percent: float | None = 10.0
    max_ssim_drop: float | None = 0.01
    max_psnr_drop_db: float | None = None
    #: CIE76. About 2.3 is just noticeable (Mahy et al., 1994).
    max_colour_shift_rise: float | None = 2.3
    #: Of the gradient ratio's distance from 1, |log2 ratio|.
    max_seam_gradient_rise: float | None = 0.5
    max_put_back_rise: float | None = 0.2

    def limit(self, figure: str, before: float) -> float | None:
        """In the figure's own unit."""
        if figure in TIMES:
            return None if self.max_slower_percent is None else before * self.max_slower_percent / 100
        return {
            "ssim": self.max_ssim_drop,
            "psnr_db": self.max_psnr_drop_db,
            "seam_colour_shift": self.max_colour_shift_rise,
            "seam_gradient_ratio": self.max_seam_gradient_rise,
            "put_back": self.max_put_back_rise,
        }.get(figure)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure of one cell."""

    #: Its name in the later run.
    cell: str
    figure: str
    before: float
    #: None: the later run has not measured it.
    after: float | None
    #: Up to which a difference is none, in the figure's unit.
    noise: float
    verdict: Verdict
    #: Whether a threshold is passed.
    is_failure: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    #: Run ids.
    before: str
    after: str
    rows: tuple[Row, ...]
    #: What speaks against the later run, a sentence each.
    failures: tuple[str, ...]
    #: Cells that only the later run painted, by name.
    added: tuple[str, ...]
    #: What differs about the runs themselves, where that was allowed.
    differences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


class _Cell(BaseModel):
    """What counts of a cell in results.json."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    name: str
    variant: str
    guidance: float
    steps: int
    seed: int
    prompt: str
    crop: str
    mask_grow: float = MASK_GROW
    status: Literal["succeeded", "failed"]
    gpu: str = "CPU"
    #: Seconds of each painting; all but the first are warm.
    trials: tuple[float, ...] = ()
    figures: Mapping[str, float | None]

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {**data, "figures": {name: data.get(name) for name in (*TIMES, *BETTER)}}
        return data

    @field_validator("figures")
    @classmethod
    def _ratios(cls, figures: Mapping[str, float | None]) -> Mapping[str, float | None]:
        for name, value in figures.items():
            if BETTER.get(name) == "one" and value is not None and value <= 0:
                raise ValueError(f"{name}: {value:g} is not above 0")
        return figures

    @property
    def axes(self) -> tuple[Any, ...]:
        return self.variant, self.guidance, self.steps, self.seed, self.prompt, self.crop, self.mask_grow

    @property
    def uncertainty(self) -> float:
        """Of the warm paintings' median, its standard error by itself; 0 where there are not two to tell. One painting
        that was held up moves it little, and it falls with their number."""
        warm = self.trials[1:]
        middle = median(warm) if warm else 0.0
        if middle <= 0:
            return 0.0
        return MEDIAN_ERROR * median(abs(wall_s - middle) for wall_s in warm) / sqrt(len(warm)) / middle


class _Run(BaseModel):
    model_config = ConfigDict(frozen=True)

    run_id: str
    user_id: str
    session_id: str
    reference: str
    cells: tuple[_Cell, ...]


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    thresholds: Thresholds = Thresholds(),
    *,
    allow_different: bool = False,
) -> Comparison:
    """The figures of two runs' results.json, cell by cell, and what speaks against the later one.

    A cell that is missing or has newly failed, a figure with a threshold that is no longer measured, a photo that
    changed where nothing may change, and runs with nothing to compare always speak against it.
    Raises AuditError where one is no results.json, and, unless `allow_different`, where the runs are of another GPU,
    session or reference, so that their figures say nothing about each other.
    """
    earlier, later = _read(before, "earlier"), _read(after, "later")
    then = {cell.axes: cell for cell in earlier.cells if cell.status == "succeeded"}
    now = {cell.axes: cell for cell in later.cells}
    pairs = [(cell, now[axes]) for axes, cell in then.items() if axes in now and now[axes].status == "succeeded"]
    differences = _differences(earlier, later, pairs)
    if differences and not allow_different:
        raise AuditError(f"{earlier.run_id} and {later.run_id} cannot be compared: {'; '.join(differences)}")
    rows = tuple(row for pair in pairs for row in _rows(*pair, thresholds))
    return Comparison(
        before=earlier.run_id,
        after=later.run_id,
        rows=rows,
        failures=tuple(_failures(pairs, rows, then, now)),
        added=tuple(cell.name for axes, cell in now.items() if axes not in then and cell.status == "succeeded"),
        differences=differences,
    )


def table(comparison: Comparison, *, everything: bool = False) -> Table:
    """For a terminal: the rows that changed, or everything. No word of a run's is taken for markup."""
    counts = Counter(row.verdict for row in comparison.rows)
    shown = Table(
        *("cell", "figure"),
        *(Column(name, justify="right") for name in ("before", "after", "change")),
        "verdict",
        title=Text(f"{comparison.before} → {comparison.after}"),
        caption=", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "nothing in common",
    )
    for row in comparison.rows:
        if everything or row.verdict != "same" or row.is_failure:
            verdict = Text(row.verdict + (" ✗" if row.is_failure else ""), _STYLES.get(row.verdict, ""))
            shown.add_row(Text(row.cell), row.figure, _number(row.before), _number(row.after), _change(row), verdict)
    return shown


def _read(results: Mapping[str, Any], which: str) -> _Run:
    try:
        return _Run.model_validate(results)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise AuditError(f"the {which} run's results are no results.json of an audit: {place}: {first['msg']}") from e


def _differences(earlier: _Run, later: _Run, pairs: Iterable[tuple[_Cell, _Cell]]) -> tuple[str, ...]:
    gpus = {(one.gpu, other.gpu) for one, other in pairs}
    sessions = (f"{earlier.user_id}/{earlier.session_id}", f"{later.user_id}/{later.session_id}")
    named = [("GPU", gpu) for gpu in sorted(gpus)]
    named += [("session", sessions), ("reference", (earlier.reference, later.reference))]
    return tuple(f"another {name}, {one} and {other}" for name, (one, other) in named if one != other)


def _failures(
    pairs: Sequence[tuple[_Cell, _Cell]], rows: Sequence[Row], then: Mapping[Any, _Cell], now: Mapping[Any, _Cell]
) -> Iterator[str]:
    if not pairs:
        yield "The two runs have no painted cell in common."
    elif all(row.after is None for row in rows):
        yield "The cells that both runs painted have no figure in common."
    for axes, cell in then.items():
        if axes not in now:
            yield f"{cell.name} is missing."
        elif now[axes].status == "failed":
            yield f"{now[axes].name} failed."
    for row in rows:
        if row.is_failure and row.after is None:
            yield f"{row.cell}: {row.figure} is no longer measured."
        elif row.is_failure:
            yield f"{row.cell}: {row.figure} went from {_number(row.before)} to {_number(row.after)} ({_change(row)})."


def _rows(one: _Cell, other: _Cell, thresholds: Thresholds) -> Iterator[Row]:
    """Of the figures that the earlier cell has."""
    # Two standard errors of the difference.
    share = min(MAX_NOISE, max(MIN_NOISE, 2 * hypot(one.uncertainty, other.uncertainty)))
    for figure, before in one.figures.items():
        if before is None:
            continue
        after, limit = other.figures[figure], thresholds.limit(figure, before)
        noise = before * share if figure in TIMES else TOLERANCES[figure]
        worse_by = None if after is None else _worse_by(figure, before, after)
        is_beyond = limit is not None and (worse_by is None or worse_by > max(limit, noise))
        yield Row(
            cell=other.name,
            figure=figure,
            before=before,
            after=after,
            noise=noise,
            verdict=_verdict(figure, worse_by, noise),
            is_failure=is_beyond or (figure == "outside_max" and bool(after)),
        )


def _worse_by(figure: str, before: float, after: float) -> float:
    """In the figure's unit, or by |log2| where it is best at 1; below 0 where it is better."""
    better = "lower" if figure in TIMES else BETTER[figure]
    if better == "one":
        return abs(log2(after)) - abs(log2(before))
    return before - after if better == "higher" else after - before


def _verdict(figure: str, worse_by: float | None, noise: float) -> Verdict:
    if worse_by is None:
        return "lost"
    if abs(worse_by) <= noise:
        return "same"
    if figure in TIMES:
        return "slower" if worse_by > 0 else "faster"
    return "worse" if worse_by > 0 else "better"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _change(row: Row) -> str:
    """Of times in percent."""
    if row.after is None:
        return "-"
    change = row.after - row.before
    return f"{100 * change / row.before:+.1f}%" if row.figure in TIMES and row.before else f"{change:+.4g}"
