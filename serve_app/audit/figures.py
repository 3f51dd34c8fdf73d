"""What a measured cell comes to: medians, rates and costs of its trials. Pure.

Medians are over the warm trials. Rates divide by `denoise_s`, so that encoding and decoding do not count as steps.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import median

from ..edit.cost import SHAPES, forward_flops
from ..engine.weights.lock import Lock
from ..models import TINY, Box, Family, Measured, Trial, Variant
from ..parameters import AuditRequest, Cell
from ..settings import Settings
from .record import CellResult

#: Blocks, of both kinds, and width of the transformers that the modules `tiny` of `serve_app.engine` write.
TINY_SHAPES: Mapping[Family, Mapping[str, int]] = {
    "flux-fill": {"blocks": 6, "width": 256},
    "flux2-klein": {"blocks": 3, "width": 256},
}
#: `compute_capability` of an engine that uses no GPU.
_NO_GPU = "N/A"


def succeeded(
    name: str,
    cell: Cell,
    measured: Measured,
    *,
    request: AuditRequest,
    settings: Settings,
    locked: Lock,
    image_path: str,
    started_at: datetime | None,
    finished_at: datetime,
) -> CellResult:
    """The cell's record; figures that cannot be had are None."""
    variant = settings.variant(cell.variant)
    warm = measured.trials[1:] or measured.trials
    wall_s = median(trial.wall_s for trial in warm)
    price = settings.price(cell.variant) if request.price_per_hour is None else request.price_per_hour
    skips = settings.variants[cell.variant].optimizations.step_cache is not None
    return CellResult(
        name=name,
        cell=cell,
        status="succeeded",
        trials=tuple(measured.trials),
        repeats=measured.repeats,
        wall_s=wall_s,
        gpu_ms=_median([trial.gpu_ms for trial in warm]),
        first_wall_s=measured.trials[0].wall_s,
        windows=len(measured.windows),
        cost=None if price is None else price * wall_s / 3600,
        peak_bytes=_most([trial.peak_bytes for trial in measured.trials]),
        reserved_bytes=_most([trial.reserved_bytes for trial in measured.trials]),
        **_rates(variant, cell, measured.windows, warm, skips=skips),
        **_where(measured),
        revisions=revisions(variant, locked),
        started_at=started_at,
        finished_at=finished_at,
        image_path=image_path,
    )


def step_tflop(variant: Variant, windows: Sequence[Box]) -> float | None:
    """TFLOP of one denoising step of all windows, by `cost.forward_flops` with the prompt's padded length.

    The tiny checkpoints are counted with their own shape; every other base is taken for the only one that its family
    has. None for families without a transformer.
    """
    if not variant.edits_by_transformer:
        return None
    own = TINY_SHAPES[variant.family] if (variant.base or "").startswith(TINY) else {}
    shape = {**SHAPES.get(variant.family, {}), **own, "text_tokens": variant.max_prompt_tokens}
    return sum(forward_flops(box.width, box.height, **shape) for box in windows) / 1e12


def revisions(variant: Variant, locked: Lock) -> dict[str, str]:
    """Repository -> commit, of those that are pinned."""
    known = {name: repo.revision for name, repo in locked.repos.items()}
    given = ((variant.repo, variant.revision), (variant.base, variant.base_revision))
    return {name: revision for name, own in given if name and (revision := own or known.get(name))}


def _rates(
    variant: Variant, cell: Cell, windows: Sequence[Box], warm: Sequence[Trial], *, skips: bool
) -> dict[str, float | None]:
    """`skips`: a step cache leaves out an unknown number of forwards, so the achieved rate is unknown."""
    tflop = step_tflop(variant, windows)
    denoise_s = _median([trial.stages.get("denoise_s") for trial in warm])
    if not denoise_s or not variant.counts_steps:
        return {"step_tflop": tflop, "steps_per_s": None, "tflop_per_s": None}
    return {
        "step_tflop": tflop,
        "steps_per_s": cell.steps * len(windows) / denoise_s,
        "tflop_per_s": None if tflop is None or skips else tflop * cell.steps / denoise_s,
    }


def _where(measured: Measured) -> dict[str, str | Mapping[str, str]]:
    where = measured.where
    sm = str(where.get("compute_capability", _NO_GPU))
    return {
        "gpu": "CPU" if sm == _NO_GPU else str(where.get("device", "")),
        "sm": sm,
        "replica": str(where.get("replica", "")),
        "node": str(where.get("node", "")),
        "versions": {package: str(version) for package, version in where.get("versions", {}).items()},
    }


def _median(values: Sequence[float | None]) -> float | None:
    """None where one is not known."""
    known = [value for value in values if value is not None]
    return median(known) if values and len(known) == len(values) else None


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
