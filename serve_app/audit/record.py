"""What an audit is: the matrix of cells it paints, what each cell records, and what a run has come to. Pure data.

A cell is one edit of one session with one value of each axis. Everything a run has lies in the blob store under
`audit/{run_id}/`: see `docs/audit.md`.
"""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..models import Trial
from ..parameters import AuditRequest, Cell, RunId


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AuditStatus(StrEnum):
    #: Stored; its job has not begun.
    QUEUED = "queued"
    RUNNING = "running"
    #: Every cell is painted, the report is written.
    SUCCEEDED = "succeeded"
    #: The report is written, and says which cells failed.
    INCOMPLETE = "incomplete"
    #: There is no report: `error` says why.
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_over(self) -> bool:
        return self not in (AuditStatus.QUEUED, AuditStatus.RUNNING)


class AuditFault(_Frozen):
    code: str
    message: str


CellStatus = Literal["waiting", "running", "succeeded", "failed"]


class CellProgress(_Frozen):
    status: CellStatus = "waiting"
    #: Of all its paintings.
    step: int = 0
    steps: int = 0
    error: AuditFault | None = None


class Compared(_Frozen):
    """A picture's figures; see `serve_app.audit.metrics` for what each is. None where it cannot be had."""

    # Cells that an earlier version stored may have a figure that is not measured any more.
    model_config = ConfigDict(frozen=True, extra="ignore")

    #: Inside the mask, against the reference variant at the same other axes; for the reference itself: None.
    psnr_db: float | None
    ssim: float | None
    #: Of 255.
    mae: float | None
    #: Against the photo, outside what may change; of 255. Must be 0.
    outside_max: int
    #: Along the seam, of the picture alone.
    seam_gradient_ratio: float | None
    #: CIE76 distance in CIELAB.
    seam_colour_shift: float | None
    #: Against the photo and its smooth fill, as in `serve_app.edit.quality`; cells of earlier versions have none.
    put_back: float | None = None
    contrast: float | None = None
    busy: float | None = None
    cast: float | None = None


#: Which way a figure is better; `one`: the nearer to 1.
Better = Literal["higher", "lower", "one"]

#: Of each field of `Compared`.
BETTER: Mapping[str, Better] = {
    "psnr_db": "higher",
    "ssim": "higher",
    "mae": "lower",
    "outside_max": "lower",
    "seam_gradient_ratio": "one",
    "seam_colour_shift": "lower",
    "put_back": "lower",
    "contrast": "lower",
    "busy": "lower",
    "cast": "lower",
}


class CellResult(_Frozen):
    """What a cell came to, as it is stored: the run's own record, from which everything else is made."""

    name: str
    cell: Cell
    status: Literal["succeeded", "failed"]
    error: AuditFault | None = None
    #: The first painting, then the warm ones.
    trials: tuple[Trial, ...] = ()
    #: Whether all paintings gave the same bytes.
    repeats: bool | None = None
    #: Medians of the warm paintings.
    wall_s: float | None = None
    gpu_ms: float | None = None
    first_wall_s: float | None = None
    #: Windows painted, and what a step of all of them costs, by `cost.forward_flops`: TFLOP.
    windows: int | None = None
    step_tflop: float | None = None
    #: Denoising steps, of all windows, by the seconds of denoising.
    steps_per_s: float | None = None
    #: Achieved: `step_tflop` times the steps, by the seconds of denoising. None where a step cache skips forwards.
    tflop_per_s: float | None = None
    #: For one edit, warm, in the currency of `price_per_hour`.
    cost: float | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    #: The device's name, or "CPU"; its compute capability, or "N/A".
    gpu: str = "CPU"
    sm: str = "N/A"
    replica: str = ""
    node: str = ""
    #: Of packages, and of the weights' repositories.
    versions: Mapping[str, str] = {}
    revisions: Mapping[str, str] = {}
    #: When an engine first began with it, and when it was stored.
    started_at: datetime | None = None
    finished_at: datetime | None = None
    image_path: str | None = None
    compared: Compared | None = None


class MemoryReading(_Frozen):
    """Used memory of the devices, between two variants that share a GPU. None where there is no GPU to ask."""

    #: The variant that was gone by then; empty for the reading before the first.
    after: str
    used_bytes: int | None
    floor_bytes: int | None
    waited_s: float


class CompileVerdict(_Frozen):
    """torch.compile against eager, for one variant."""

    variant: str
    #: None where it was not looked at.
    viable: bool | None
    #: "proceed", or what is in the way, in a sentence.
    verdict: str
    graphs: int | None = None
    breaks: int | None = None
    #: Up to five.
    break_reasons: tuple[str, ...] = ()
    #: A step on the same inputs, medians, seconds.
    eager_s: float | None = None
    compiled_s: float | None = None
    #: eager_s / compiled_s.
    gain: float | None = None
    compile_s: float | None = None
    #: Largest difference of the outputs, absolute.
    max_difference: float | None = None
    #: Edits, of the matrix's first cell, until the seconds saved are those of compiling; None where none are saved.
    pays_back_after: int | None = None


class Recommendation(_Frozen):
    variant: str
    guidance_scale: float
    steps: int
    #: Each rule that led there, in order, with its figures.
    reasons: tuple[str, ...]
    #: Names of the cells that no other beats in both seconds and quality.
    pareto: tuple[str, ...]


class Findings(_Frozen):
    """What a run has come to so far, as its driver stores it: what the record of its job does not say."""

    #: When the first of its attempts began.
    started_at: datetime | None = None
    #: What it is at, for a person.
    stage: str = ""
    #: By the cell's name.
    cells: Mapping[str, CellProgress] = {}
    #: SHA-256 of the photo and the mask that its cells were painted from.
    inputs: str | None = None
    gpu: str | None = None
    sm: str | None = None
    memory: tuple[MemoryReading, ...] = ()
    compile: tuple[CompileVerdict, ...] = ()
    recommended: Recommendation | None = None


class Audit(Findings):
    """A run: its job and its findings."""

    id: RunId
    request: AuditRequest
    status: AuditStatus = AuditStatus.QUEUED
    #: Counts the jobs that worked on it: one, and one more for each resume.
    attempt: int = 1
    #: Whether the driver of this attempt has, by the end of a run that is over.
    has_begun: bool = False
    created_at: datetime
    finished_at: datetime | None = None
    #: Until when its driver is taken for alive without a sign of it; None where the run is over.
    alive_until: datetime | None = None
    error: AuditFault | None = None

    @property
    def job_name(self) -> str:
        """The submission id of its Ray job, which Ray takes once: no other job of the cluster has this prefix, and each
        resume has an id that differs."""
        name = f"fluxfill-audit-{self.id}"
        return name if self.attempt == 1 else f"{name}.{self.attempt}"

    @property
    def user_id(self) -> str:
        return self.request.user_id

    @property
    def session_id(self) -> str:
        return self.request.session_id

    @property
    def counts(self) -> Mapping[CellStatus, int]:
        """Cells by their status."""
        return Counter(cell.status for cell in self.cells.values())

    @property
    def compile_viable(self) -> bool | None:
        """None while it has not been looked at."""
        found = [verdict.viable for verdict in self.compile if verdict.viable is not None]
        return any(found) if found else None

    @property
    def result_count(self) -> int:
        return sum(cell.status == "succeeded" for cell in self.cells.values())


def folder(run_id: str) -> str:
    """Where everything of a run is. The id must have passed RUN_ID_PATTERN."""
    return f"audit/{run_id}"


def image_path(run_id: str, name: str) -> str:
    return f"{folder(run_id)}/{name}.png"


def cell_path(run_id: str, name: str) -> str:
    return f"{folder(run_id)}/cells/{name}.json"


def findings_path(run_id: str) -> str:
    return f"{folder(run_id)}/run.json"


#: File names in a run's folder.
REPORT, PAGE, RESULTS, TABLE = "REPORT.md", "report.html", "results.json", "results.csv"
