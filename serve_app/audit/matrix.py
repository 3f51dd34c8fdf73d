"""All cells of a run that are left, wave by wave: each asked for, painted, pasted into the photo, stored. Whatever goes
wrong with a cell is its own, unless the run is not to go on."""

import asyncio
import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from PIL import Image
from rich.console import Console
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from ..clock import Clock
from ..edit.job import begun_within
from ..engine.weights.lock import Lock
from ..errors import AuditImpossible, Canceled, FluxFillError, GpuLost, ReplicaLost, StaleClaim, VariantNotReady
from ..jobs.lease import retry_unavailable
from ..models import Measured, OnProgress, Pixels, Progress
from ..parameters import Cell
from ..settings import Settings
from . import figures
from .fan_out import FanOut, fan_out
from .handover import GpuHandover
from .progress import OUTAGE_S, Record, fault
from .record import CellProgress, CellResult
from .replicas import Replicas
from .session import Session
from .waves import Wave

log = logging.getLogger(__name__)
out = Console(highlight=False, markup=False, soft_wrap=True)

#: What befalls a replica, not a cell: another one paints it.
_PASSING = (ReplicaLost, GpuLost, VariantNotReady)
#: Paintings of a cell in all, where each is lost with its replica.
ATTEMPTS = 4
#: zlib's: 6 takes a second more for a photo of 12 megapixels, and saves a tenth.
_PNG_LEVEL = 3


@dataclass(frozen=True)
class MatrixPainter:
    record: Record
    session: Session
    #: By name: what is in there at first is not painted again.
    results: dict[str, CellResult]
    replicas: Replicas
    handover: GpuHandover
    settings: Settings
    locked: Lock
    clock: Clock
    #: Before a cell is asked for again; doubles. A replica whose GPU is lost is replaced within three checks of 2 s.
    again_s: float = 2.0
    #: How long a store that is down is waited for before a painted cell is given up.
    keep_s: float = OUTAGE_S

    async def paint(self, waves: Sequence[Wave]) -> None:
        """Where a wave's GPUs do not become free, its cells and those of the waves after it fail."""
        after = ""
        for number, wave in enumerate(waves):
            if wave.waits:
                self._tell(f"waiting for a GPU for {', '.join(wave.wanted)}")
                reading, error = await self.handover.wait(after, wave, self._tell)
                self.record.change(memory=(*self.record.audit.memory, reading))
                if error:
                    await self._give_up(waves[number:], error)
                    return
            await self._paint_wave(wave)
            after = ", ".join(wave.wanted)

    async def _give_up(self, waves: Sequence[Wave], error: AuditImpossible) -> None:
        for wave in waves:
            for name, cell in self._left(wave).items():
                self._note(await self._failed(name, cell, error))

    def _tell(self, stage: str) -> None:
        if stage != self.record.audit.stage:
            self.record.stage(stage)

    async def _paint_wave(self, wave: Wave) -> None:
        self.record.stage(f"painting with {', '.join(wave.wanted)}")
        async with (
            fan_out(self.replicas, wave, self.settings.audit) as fan,
            # No cell raises what is its own: what ends the group ends the run.
            asyncio.TaskGroup() as group,
        ):
            for name, cell in self._left(wave).items():
                group.create_task(self._paint_cell(fan, name, cell))

    def _left(self, wave: Wave) -> dict[str, Cell]:
        matrix = self.record.audit.request.matrix
        cells = {matrix.name(cell): cell for cell in matrix.cells() if cell.variant in wave.wanted}
        return {name: cell for name, cell in cells.items() if name not in self.results}

    async def _paint_cell(self, fan: FanOut, name: str, cell: Cell) -> None:
        """The picture is stored before the result; a cell that cannot be painted or stored has a failed one. Raises
        StaleClaim and Canceled: the run is not to go on here."""
        began: list[datetime] = []

        async def on_progress(progress: Progress) -> None:
            # The first report comes when the engine begins.
            began[:] = began or [self.clock()]
            self.record.cell(name, CellProgress(status="running", step=progress.step, steps=progress.steps))

        try:
            measured = await self._measured(fan, name, cell, on_progress)
            png = await asyncio.to_thread(self._png, measured.canvas, cell)
            path = await retry_unavailable(partial(self.record.files.keep_image, name, png), self.keep_s)
            result = figures.succeeded(
                name,
                cell,
                measured,
                request=self.record.audit.request,
                settings=self.settings,
                locked=self.locked,
                image_path=path,
                started_at=began[0] if began else None,
                finished_at=self.clock(),
            )
            await retry_unavailable(partial(self.record.files.keep_cell, result), self.keep_s)
        except (StaleClaim, Canceled):
            raise
        except Exception as e:
            # One failed cell is reported as failed, with its error; the others go on.
            extra = {"action": "audit_cell_failed", "cell": name, "code": fault(e).code}
            log.warning("Cell %s failed: %s", name, e, extra=extra, exc_info=not isinstance(e, FluxFillError))
            result = await self._failed(name, cell, e)
        self._note(result)

    async def _failed(self, name: str, cell: Cell, error: Exception) -> CellResult:
        """Stored where the store can be reached: a resume paints the cell anyway."""
        result = CellResult(name=name, cell=cell, status="failed", error=fault(error), finished_at=self.clock())
        try:
            await self.record.files.keep_cell(result)
        except FluxFillError as e:
            extra = {"action": "audit_cell_not_stored", "cell": name}
            log.warning("A failed cell could not be noted: %s", e, extra=extra)
        return result

    async def _measured(self, fan: FanOut, name: str, cell: Cell, on_progress: OnProgress) -> Measured:
        request = self.session.request(f"{self.record.audit.id}/{name}", cell)
        runs = self.record.audit.request.runs
        limit_s = runs * self.settings.work.inference_timeout_s
        ask = partial(fan.measure, cell.variant, request, trials=runs)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_PASSING),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=self.again_s),
            reraise=True,
        )
        return await retrying(begun_within, limit_s, cell.variant, ask, on_progress)

    def _png(self, canvas: Pixels, cell: Cell) -> bytes:
        out = io.BytesIO()
        picture = Image.fromarray(self.session.picture(canvas, cell))
        picture.save(out, "PNG", compress_level=_PNG_LEVEL, icc_profile=self.session.photo.icc)
        return out.getvalue()

    def _note(self, result: CellResult) -> None:
        self.results[result.name] = result
        self.record.cell(result.name, progress_of(result))
        self.record.change(**devices(self.results.values()))
        error = result.error
        said = (
            f"failed: {error.code}: {error.message}"
            if error
            else f"{result.wall_s:.2f} s (first {result.first_wall_s:.2f} s)"
        )
        out.print(f"{len(self.results)}/{len(self.record.audit.cells)} {result.name} {said}")


def progress_of(result: CellResult) -> CellProgress:
    steps = result.cell.steps * len(result.trials) * (result.windows or 1)
    return CellProgress(status=result.status, step=steps, steps=steps, error=result.error)


def devices(results: Iterable[CellResult]) -> dict[str, str]:
    """`gpu` and `sm` of the record: each that painted, once."""
    painted = [result for result in results if result.status == "succeeded"]
    found = {"gpu": sorted({result.gpu for result in painted}), "sm": sorted({result.sm for result in painted})}
    return {name: ", ".join(values) for name, values in found.items() if values}
