"""One cell: asked for, painted, pasted into the photo, stored. Whatever goes wrong with it is the cell's own, but
for a run that was taken over."""

import asyncio
import io
import logging
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from PIL import Image
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from serve_app.audit_files import RunFiles
from serve_app.audits import AuditRequest, Cell, CellResult
from serve_app.edit import begun_within
from serve_app.engine.lock import Lock
from serve_app.errors import Canceled, FluxFillError, GpuLost, ReplicaLost, StaleClaim, VariantNotReady
from serve_app.images import Pixels
from serve_app.jobs import Progress
from serve_app.ports import Clock, Measured, OnProgress
from serve_app.settings import Settings

from . import figures
from .fan_out import FanOut
from .outage import LIMIT_S, waited_out
from .record import fault
from .session import Session

log = logging.getLogger(__name__)

#: What befalls a replica, not a cell: another one paints it.
_PASSING = (ReplicaLost, GpuLost, VariantNotReady)
#: Paintings of a cell in all, where each is lost with its replica.
ATTEMPTS = 4
#: zlib's: 6 takes a second more for a photo of 12 megapixels, and saves a tenth.
_PNG_LEVEL = 3


@dataclass(frozen=True, kw_only=True)
class Easel:
    """What painting any cell of a run takes."""

    run_id: str
    request: AuditRequest
    session: Session
    files: RunFiles
    settings: Settings
    locked: Lock
    clock: Clock
    #: Before a cell is asked for again; doubles. A replica whose GPU is lost is replaced within three checks of 2 s.
    again_s: float = 2.0
    #: How long a store that is down is waited for before a painted cell is given up.
    keep_s: float = LIMIT_S

    async def paint(self, fan: FanOut, name: str, cell: Cell, on_progress: OnProgress) -> CellResult:
        """The cell's result, stored after its picture. One that cannot be painted or stored is a failed result.
        Raises StaleClaim and Canceled: the run is not to go on here."""
        began: list[datetime] = []

        async def on_step(progress: Progress) -> None:
            # The first report comes when the engine begins.
            began[:] = began or [self.clock()]
            await on_progress(progress)

        try:
            measured = await self._measured(fan, name, cell, on_step)
            png = await asyncio.to_thread(self._png, measured.canvas, cell)
            path = await waited_out(partial(self.files.keep_image, name, png), self.keep_s)
            result = figures.succeeded(
                name,
                cell,
                measured,
                request=self.request,
                settings=self.settings,
                locked=self.locked,
                image_path=path,
                started_at=began[0] if began else None,
                finished_at=self.clock(),
            )
            await waited_out(partial(self.files.keep_cell, result), self.keep_s)
        except (StaleClaim, Canceled):
            raise
        except Exception as e:
            # One failed cell is reported as failed, with its error; the others go on.
            extra = {"action": "audit_cell_failed", "cell": name, "code": fault(e).code}
            log.warning("Cell %s failed: %s", name, e, extra=extra, exc_info=not isinstance(e, FluxFillError))
            return await self.failed(name, cell, e)
        return result

    async def failed(self, name: str, cell: Cell, error: Exception) -> CellResult:
        """Stored where the store can be reached: a resume paints the cell anyway."""
        result = CellResult(name=name, cell=cell, status="failed", error=fault(error), finished_at=self.clock())
        try:
            await self.files.keep_cell(result)
        except FluxFillError as e:
            log.warning(
                "A failed cell could not be noted: %s", e, extra={"action": "audit_cell_not_stored", "cell": name}
            )
        return result

    async def _measured(self, fan: FanOut, name: str, cell: Cell, on_progress: OnProgress) -> Measured:
        request = self.session.request(f"{self.run_id}/{name}", cell)
        limit_s = self.request.runs * self.settings.work.inference_timeout_s
        ask = partial(fan.measure, cell.variant, request, trials=self.request.runs)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_PASSING),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=self.again_s),
            reraise=True,
        )
        return await retrying(begun_within, limit_s, cell.variant, ask, on_progress)

    def _png(self, canvas: Pixels, cell: Cell) -> bytes:
        out = io.BytesIO()
        pixels = self.session.picture(canvas, cell.crop)
        profile = self.session.photo.icc
        Image.fromarray(pixels).save(out, "PNG", compress_level=_PNG_LEVEL, icc_profile=profile)
        return out.getvalue()
