"""The columns of a report's table of results: figures as every report shows them, so that they agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...parameters import AuditRequest, plain
from ..metrics import METRICS, Metric
from ..record import CellResult

#: Where there is no figure.
NONE = "\N{EN DASH}"
Value = Callable[[CellResult], float | None]


@dataclass(frozen=True, slots=True)
class Axis:
    """A column that says which cell a row is."""

    head: str
    text: Callable[[CellResult], str]
    is_number: bool = True


@dataclass(frozen=True, slots=True)
class Column:
    head: str
    #: Empty where it has none.
    unit: str
    #: In a line.
    words: str
    value: Value
    decimals: int
    #: Whether it is there even where no cell has a figure.
    is_fixed: bool = False

    def text(self, result: CellResult) -> str:
        value = self.value(result)
        return NONE if value is None else f"{value:.{self.decimals}f}"


def _metric(metric: Metric) -> Column:
    # What is measured against the reference is not there for it.
    def value(result: CellResult) -> float | None:
        return getattr(result.compared, metric.name, None)

    return Column(metric.title, metric.unit, metric.words, value, metric.decimals)


def gigabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e9


_COLUMNS = (
    Column("Wall", "s", "Seconds of a warm painting, median.", lambda result: result.wall_s, 2, is_fixed=True),
    Column("First", "s", "Seconds of the first painting.", lambda result: result.first_wall_s, 2, is_fixed=True),
    Column("GPU", "ms", "Device time of a warm painting, median.", lambda result: result.gpu_ms, 1, is_fixed=True),
    *map(_metric, METRICS),
    Column("Steps/s", "", "Denoising steps a second.", lambda result: result.steps_per_s, 2),
    Column("TFLOP/s", "", "Achieved while denoising.", lambda result: result.tflop_per_s, 2),
    Column("Peak", "GB", "Device memory, allocated at most.", lambda result: gigabytes(result.peak_bytes), 2),
    Column("Cost", "", "Of a warm edit, in the currency of the price.", lambda result: result.cost, 5),
)


def columns(results: Sequence[CellResult]) -> list[Column]:
    """Those that any of the results has a figure for."""
    return [column for column in _COLUMNS if column.is_fixed or any(column.value(r) is not None for r in results)]


def axes(request: AuditRequest) -> list[Axis]:
    """Variant, guidance and steps, and what else has several values. Prompts go by name or number."""
    matrix = request.matrix
    further = (
        (matrix.seeds, Axis("Seed", lambda result: str(result.cell.seed))),
        (matrix.prompts, Axis("Prompt", lambda result: matrix.short(result.cell.prompt), is_number=False)),
        (matrix.crops, Axis("Crop", lambda result: str(result.cell.crop), is_number=False)),
        (matrix.mask_grows, Axis("Grown", lambda result: plain(result.cell.mask_grow))),
    )
    return [
        Axis("Variant", lambda result: result.cell.variant, is_number=False),
        Axis("Guidance", lambda result: plain(result.cell.guidance_scale)),
        Axis("Steps", lambda result: str(result.cell.steps)),
        *(axis for values, axis in further if len(values) > 1),
    ]
