"""One attempt at one run: from its stored request to its report. Knows nothing of Ray.

What is stored is finished: a cell's picture first, then its record, and a run that is resumed paints only the cells
that have no record, or one that says they failed. So the job may be killed at any line.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ..blobs import BlobStore
from ..clock import Clock
from ..engine.weights import lock
from ..errors import AuditError, Canceled, FluxFillError, StaleClaim, StoreUnavailable
from ..jobs import claims
from ..jobs.claims import Claim
from ..jobs.lease import Lease, retry_unavailable
from ..jobs.lease import Pace as LeasePace
from ..jobs.ports import JobStore
from ..models import PromptEncoder
from ..parameters import AuditRequest
from ..settings import Settings
from ..telemetry import logged_with
from . import handover, progress
from .files import RunFiles, read_cells
from .handover import GpuHandover
from .matrix import MatrixPainter, devices, progress_of
from .progress import Record, fault
from .record import Audit, AuditFault, AuditStatus, CellResult
from .replicas import Replicas
from .report.publish import publish
from .session import Session, read_session
from .store import AuditStore
from .verdicts import Compiler, Verdicts
from .waves import plan

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often and how long, in seconds."""

    #: Of keeping the claim.
    lease: LeasePace = field(default_factory=LeasePace)
    #: Between two writes of the findings.
    write_s: float = progress.EVERY_S
    #: Looking whether GPUs are free.
    handover_poll_s: float = handover.POLL_S
    #: Before a cell that was lost with its replica is asked for again; doubles.
    again_s: float = 2.0
    #: A store that is down is waited for.
    outage_s: float = progress.OUTAGE_S
    #: Of a canceled run, the comparing of its pictures may take. Below what a job has that was asked to stop.
    judge_s: float = 15.0


@dataclass
class _Run:
    record: Record
    claim: Claim
    #: By name: what succeeded in earlier attempts, and whatever became of the others in this one.
    results: dict[str, CellResult] = field(default_factory=dict)
    session: Session | None = None
    #: As soon as there is a session.
    verdicts: Verdicts | None = None

    @property
    def request(self) -> AuditRequest:
        return self.record.audit.request


class Auditor:
    def __init__(
        self,
        *,
        job_store: JobStore,
        blobs: BlobStore,
        replicas: Replicas,
        prompts: PromptEncoder,
        settings: Settings,
        compiler: Compiler,
        clock: Clock,
        pace: Pace | None = None,
    ) -> None:
        self._jobs, self._blobs = job_store, blobs
        self._store = AuditStore(job_store, blobs)
        self._replicas, self._prompts, self._compiler = replicas, prompts, compiler
        self._settings, self._clock = settings, clock
        self._pace = pace or Pace()
        self._canceled = asyncio.Event()

    def cancel(self) -> None:
        """Have `run` stop what it paints, and end the run as canceled. From the event loop's thread."""
        self._canceled.set()

    async def run(self, run_id: str, attempt: int) -> Audit:
        """The run, when it is over: SUCCEEDED, INCOMPLETE, CANCELED, or FAILED with the reason.

        Raises UnknownAudit; StaleClaim where a later attempt has been made, also in the middle; IllegalTransition
        where the attempt has begun already or is over; StoreUnavailable where a store stays away.
        """
        with logged_with(run_id=run_id, attempt=attempt):
            claimed_at, work = time.monotonic(), self._settings.work
            begin = partial(self._store.begin, run_id, attempt, lease_s=work.lease_s)
            job = await self._patiently(begin)
            held = Lease(job, store=self._jobs, work=work, claimed_at=claimed_at, pace=self._pace.lease)
            claim = claims.claim_of(job)
            try:
                audit = await held.guard(self._patiently(partial(self._store.get, run_id)))
            except FluxFillError as e:
                return await self._patiently(partial(self._store.finish, claim, AuditStatus.FAILED, fault(e)))
            log.info("Begun: %d cells", len(audit.cells), extra={"action": "audit_begun"})
            files = RunFiles(self._blobs, run_id, held.confirm)
            run = _Run(Record(files, audit, self._pace.write_s), claim)
            audit = await self._ended(run, held)
            extra = {"action": "audit_ended", "status": audit.status, "code": audit.error and audit.error.code}
            log.info("The audit is %s", audit.status, extra=extra)
            return audit

    async def _ended(self, run: _Run, held: Lease) -> Audit:
        try:
            try:
                status = await held.guard(self._attempt(run))
                return await self._finish(run, status)
            except (Canceled, StaleClaim):
                raise
            except FluxFillError as e:
                return await self._finish(run, AuditStatus.FAILED, fault(e))
            except Exception as e:
                await self._finish(run, AuditStatus.FAILED, fault(e))
                raise
        except Canceled:
            return await self._stopped(run)

    async def _attempt(self, run: _Run) -> AuditStatus:
        """Raises Canceled where `cancel` is called meanwhile."""
        work = asyncio.create_task(self._work(run))
        keeping = asyncio.create_task(run.record.keep())
        told = asyncio.create_task(self._canceled.wait())
        tasks = {work, keeping, told}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not keeping.cancelled():
            # It raises where the run is not to go on.
            keeping.result()
        if work.cancelled():
            raise Canceled("its job was told to stop")
        return work.result()

    async def _stopped(self, run: _Run) -> Audit:
        """Over first, then the report, then its figures: the signal that came may be followed by one that nobody
        survives."""
        run_id, attempt = run.record.audit.id, run.record.audit.attempt
        await self._patiently(partial(self._store.cancel, run_id, attempt))
        run.record.files.confirm = partial(self._store.check_canceled, run_id, attempt)
        await self._patiently(run.record.write)
        audit = await self._patiently(partial(self._store.get, run_id))
        if run.results and run.verdicts:
            try:
                await self._publish(run, audit)
                await self._judged_late(run, run.verdicts, audit)
            except Exception as e:
                log.exception("There is no report, or not all of it: %s", e, extra={"action": "audit_report_failed"})
        return audit

    async def _judged_late(self, run: _Run, verdicts: Verdicts, audit: Audit) -> None:
        """The report again, with what can be said of a canceled run's pictures in a short time."""
        try:
            async with asyncio.timeout(self._pace.judge_s):
                await verdicts.compare()
            verdicts.recommend()
        except TimeoutError:
            log.warning("The pictures were not all compared", extra={"action": "audit_not_compared"})
        await self._publish(run, audit.model_copy(update={"recommended": run.record.audit.recommended}))

    async def _work(self, run: _Run) -> AuditStatus:
        """Everything, up to the report. Raises what ends the run as FAILED."""
        locked = lock.read(self._settings.weights.lock)
        gpus = await self._gpus(run.request)
        waves = plan(await self._left(run), self._settings, gpus)
        handover = GpuHandover(
            self._replicas, run.request.matrix.variants, self._settings, gpus, self._pace.handover_poll_s
        )
        if any(wave.waits for wave in waves):
            # Before the prompts, for which a text encoder may wake on a GPU.
            await handover.note_floor()
        run.record.stage("reading the session")
        read = partial(read_session, blobs=self._blobs, prompts=self._prompts, settings=self._settings)
        run.session = await self._patiently(partial(read, run.request))
        if run.results and run.record.audit.inputs not in (None, run.session.digest):
            raise AuditError("the session's photo or mask was replaced since this run began: start another run")
        run.record.change(inputs=run.session.digest)
        of_run = (run.record, run.session, run.results)
        run.verdicts = Verdicts(*of_run, blobs=self._blobs, settings=self._settings, locked=locked)
        painter = MatrixPainter(
            *of_run,
            replicas=self._replicas,
            handover=handover,
            settings=self._settings,
            locked=locked,
            clock=self._clock,
            again_s=self._pace.again_s,
            keep_s=self._pace.outage_s,
        )
        await painter.paint(waves)
        await run.verdicts.compare()
        run.verdicts.recommend()
        await run.verdicts.compile(self._compiler)
        run.record.stage("writing the report")
        is_whole = all(result.status == "succeeded" for result in run.results.values())
        status = AuditStatus.SUCCEEDED if is_whole else AuditStatus.INCOMPLETE
        over = {"status": status, "stage": "", "finished_at": self._clock()}
        await self._publish(run, run.record.audit.model_copy(update=over))
        return status

    async def _left(self, run: _Run) -> Counter[str]:
        """Cells to paint, by variant; what is stored as succeeded is taken over into the run."""
        stored = await self._patiently(partial(read_cells, self._blobs, run.record.audit.id))
        cells = {run.request.matrix.name(cell): cell for cell in run.request.matrix.cells()}
        for name, result in stored.items():
            if result.cell == cells.get(name) and result.status == "succeeded":
                run.results[name] = result
                run.record.cell(name, progress_of(result))
        # An earlier attempt's recommendation knew less.
        run.record.change(recommended=None, **devices(run.results.values()))
        return Counter(cell.variant for name, cell in cells.items() if name not in run.results)

    async def _gpus(self, request: AuditRequest) -> int:
        for given in (request.gpus, self._settings.audit.gpus):
            if given is not None:
                return given
        return await self._replicas.gpus()

    async def _publish(self, run: _Run, audit: Audit) -> None:
        if run.session is None or run.verdicts is None:
            return
        photo, mask = run.session.photo.pixels, run.session.mask
        results = list(run.results.values())
        written = partial(publish, blobs=self._blobs, confirm=run.record.files.confirm)
        await self._patiently(partial(written, audit, results, photo, mask))

    async def _finish(self, run: _Run, status: AuditStatus, error: AuditFault | None = None) -> Audit:
        try:
            await self._patiently(run.record.write)
        except StoreUnavailable as e:
            if error is None:
                raise
            # The job store is to hear why the run failed, whatever becomes of its findings.
            log.warning("The findings could not be written: %s", e, extra={"action": "audit_write_failed"})
        return await self._patiently(partial(self._store.finish, run.claim, status, error))

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        return await retry_unavailable(call, self._pace.outage_s)
