"""Audits as they are when their report is due: made up figures, and pictures that were really painted."""

import io
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import count

import cv2
import numpy as np
from PIL import Image

from serve_app.adapters.memory import MemoryBlobStore
from serve_app.audit.recommend import recommend
from serve_app.audit.record import (
    Audit,
    AuditFault,
    AuditStatus,
    CellResult,
    Compared,
    CompileVerdict,
    MemoryReading,
    image_path,
)
from serve_app.audit.report.publish import publish
from serve_app.models import Pixels, Trial
from serve_app.parameters import AuditRequest, Cell

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
REQUEST = AuditRequest(user_id="user-1", session_id="session-1", price_per_hour=0.71)
#: Seconds and SSIM, by variant, in the order of the variants.
_LOOKS = ((11.4, 0.931), (13.9, 0.972), (17.6, None))
#: Of the default variants' weights.
SIZES_GB = {"Q4_0": 6.8, "Q5_K_S": 8.3, "Q8_0": 12.7}
_STORES = count()


def audit(request: AuditRequest = REQUEST, **changes: object) -> Audit:
    matrix = request.matrix
    values = {
        "id": "audit-1a2b3c4d",
        "request": request,
        "status": AuditStatus.SUCCEEDED,
        "created_at": NOW,
        "started_at": NOW + timedelta(seconds=12),
        "finished_at": NOW + timedelta(minutes=31),
        "gpu": "NVIDIA L4",
        "sm": "8.9",
        "memory": (
            MemoryReading(after="", used_bytes=412_000_000, floor_bytes=412_000_000, waited_s=0.0),
            MemoryReading(after=matrix.variants[0], used_bytes=431_000_000, floor_bytes=412_000_000, waited_s=38.4),
        ),
        "compile": (
            CompileVerdict(
                variant=matrix.variants[0],
                viable=True,
                verdict="proceed",
                graphs=1,
                breaks=0,
                eager_s=0.4961,
                compiled_s=0.3412,
                gain=1.454,
                compile_s=61.2,
                max_difference=0.0039,
                pays_back_after=15,
            ),
        ),
        "recommended": recommend(request, results(request), SIZES_GB),
    }
    return Audit.model_validate(values | changes)


def result(request: AuditRequest, cell: Cell, run_id: str = "audit-1a2b3c4d") -> CellResult:
    """One that succeeded. Figures differ from cell to cell, and have more digits than are shown."""
    matrix, name = request.matrix, request.matrix.name(cell)
    nth = matrix.variants.index(cell.variant)
    wall_s, ssim = _LOOKS[nth % len(_LOOKS)]
    wall_s += matrix.guidance_scales.index(cell.guidance_scale) * 0.0713 + cell.steps * 0.01001
    drift = cell.guidance_scale / 1234
    is_reference = cell.variant == request.reference_variant
    trials = tuple(
        Trial(
            wall_s=seconds,
            gpu_ms=seconds * 973.1,
            stages={"prepare_s": seconds * 0.03, "denoise_s": seconds * 0.9, "decode_s": seconds * 0.07},
            peak_bytes=12_345_678_901 + nth * 2_000_000_000,
            reserved_bytes=13_345_678_901 + nth * 2_000_000_000,
        )
        for seconds in (wall_s + 4.321, wall_s)
    )
    return CellResult(
        name=name,
        cell=cell,
        status="succeeded",
        trials=trials,
        repeats=True,
        wall_s=wall_s,
        gpu_ms=wall_s * 973.1,
        first_wall_s=wall_s + 4.321,
        windows=1,
        step_tflop=21.5,
        steps_per_s=cell.steps / wall_s / 0.9,
        tflop_per_s=21.5 * cell.steps / wall_s / 0.9,
        cost=0.71 * wall_s / 3600,
        peak_bytes=trials[0].peak_bytes,
        reserved_bytes=trials[0].reserved_bytes,
        gpu="NVIDIA L4",
        sm="8.9",
        replica=f"Inpainter-{cell.variant}#abc",
        node="node-1",
        versions={"torch": "2.13.0", "diffusers": "0.42.1"},
        revisions={"black-forest-labs/FLUX.1-Fill-dev": "358293f0"},
        started_at=NOW,
        finished_at=NOW,
        image_path=image_path(run_id, name),
        compared=Compared(
            psnr_db=None if is_reference else 33.12345 - drift,
            ssim=None if is_reference or ssim is None else ssim - drift,
            mae=None if is_reference else 2.34567 + drift,
            outside_max=0,
            seam_gradient_ratio=1.04321 + drift,
            seam_colour_shift=1.23456 + drift,
            put_back=0.12345 + drift,
            contrast=0.23456 + drift,
            busy=0.34567 + drift,
            cast=9.87654 + drift,
        ),
    )


def failed(request: AuditRequest, cell: Cell, message: str = "the device had no memory left") -> CellResult:
    name = request.matrix.name(cell)
    return CellResult(name=name, cell=cell, status="failed", error=AuditFault(code="out_of_memory", message=message))


def results(request: AuditRequest = REQUEST) -> list[CellResult]:
    return [result(request, cell) for cell in request.matrix.cells()]


def photo_and_mask(width: int = 240, height: int = 180) -> tuple[Pixels, Pixels]:
    """A gradient with a line drawn over it, and the mask of the line."""
    across, down = np.meshgrid(np.linspace(40, 220, width), np.linspace(60, 200, height))
    photo = np.stack([across, down, (across + down) / 2], axis=2).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    ends = (width // 3, height // 3), (2 * width // 3, 2 * height // 3)
    cv2.line(photo, *ends, (150, 24, 28), 9)
    cv2.line(mask, *ends, 255, 17)
    return photo, mask


def png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


class Published:
    """A report in a store of its own."""

    def __init__(self) -> None:
        url = f"memory:audited-{next(_STORES)}"
        self.blobs = MemoryBlobStore(url, "http://127.0.0.1:8000")

    async def confirm(self) -> None:
        """The claim holds."""

    async def keep(self, results: Sequence[CellResult], photo: Pixels, mask: Pixels) -> None:
        """A picture for each cell that has one: the mask filled, by a radius of its own."""
        for radius, one in enumerate(results, 2):
            if one.image_path:
                painted = cv2.inpaint(photo, mask, 1 + 2 * radius % 17, cv2.INPAINT_TELEA)
                data = png(np.asarray(painted, np.uint8))
                await self.blobs.put(one.image_path, data, content_type="image/png")

    async def publish(self, run: Audit, results: Sequence[CellResult], photo: Pixels, mask: Pixels) -> None:
        await publish(run, results, photo, mask, blobs=self.blobs, confirm=self.confirm, clock=lambda: NOW)

    async def read(self, run: Audit, name: str) -> str:
        data, _ = await self.blobs.get(f"audit/{run.id}/{name}", max_bytes=100_000_000)
        return data.decode()


async def published(run: Audit, results: Sequence[CellResult], size: tuple[int, int] = (240, 180)) -> Published:
    """The run's report, with the pictures it is about."""
    report, (photo, mask) = Published(), photo_and_mask(*size)
    await report.keep(results, photo, mask)
    await report.publish(run, results, photo, mask)
    return report
