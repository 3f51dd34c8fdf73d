"""Audits in the job store: a run is a job, which the driver of its Ray job claims, keeps and ends like any other.

While a run is queued its lease is its launch's: a run has died whose driver does not come in time, or stops renewing.
Runs that exclude each other have one `lock_key`, and are refused when they are asked for. What a run has found lies in
the blob store (`files.py`), where only its claim's holder writes.
"""

import asyncio
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from ..blobs import BlobStore
from ..errors import (
    AuditExists,
    AuditRunning,
    Canceled,
    IllegalTransition,
    InputError,
    StaleClaim,
    StoreUnavailable,
    UnknownAudit,
)
from ..jobs import claims
from ..jobs.claims import Claim
from ..jobs.ports import JobStore
from ..jobs.record import Cause, Job, JobError, State
from ..parameters import AuditRequest, is_run_id
from .files import read_findings
from .record import Audit, AuditFault, AuditStatus, CellProgress, Findings, folder

#: From asking for a job to its first write: Ray starts a driver, which imports torch.
LAUNCH_S = 300.0
#: In `Audit.error` of a run whose driver ended, or fell silent, before the run was over.
JOB_DIED = "job_died"
#: The code of a job that failed though its report is written: some cells failed.
INCOMPLETE = "audit_incomplete"
#: Of the runs of which there is one at a time: neither a run's id nor a session's key.
_LOCK_KEY = "audits/*"

#: As `jobs.Change`, of a run that is there.
_Change = Callable[[Job, Sequence[Job], datetime], Sequence[Job]]


class AuditStore:
    """Every method that names a run raises UnknownAudit; all raise StoreUnavailable while a store is away."""

    def __init__(self, job_store: JobStore, blobs: BlobStore) -> None:
        self._jobs, self._blobs = job_store, blobs
        #: Whose runs are those that begin here.
        self._claimer = uuid.uuid4().hex

    async def now(self) -> datetime:
        return await self._jobs.now()

    async def create(self, request: AuditRequest, run_id: str | None = None, *, several: bool = False) -> Audit:
        """A queued run. Raises InputError for an id that is none; AuditExists for one that is taken, also where only
        blobs are left of its run; AuditRunning while another run is alive, unless `several` may be. A dead run that is
        not over fails here."""
        if run_id is not None and not is_run_id(run_id):
            raise InputError("run_id: 1 to 64 letters, digits, - and _ make one")
        run_id = run_id or f"audit-{uuid.uuid4().hex[:8]}"
        left = [info.path async for info in self._blobs.list(folder(run_id))]
        new = Job(
            id=run_id,
            claimed_by=uuid.uuid4().hex,
            user_id=request.user_id,
            session_id=request.session_id,
            lock_key=run_id if several else _LOCK_KEY,
            parameters=request,
        )

        def created(stored: Job | None, rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
            if stored is not None and stored.claimed_by == new.claimed_by:
                return ()
            if stored is not None:
                raise AuditExists(f"there is a run {run_id} already; resume it, or take another id", run_id=run_id)
            if left:
                what = f"{folder(run_id)}/ holds the blobs of another run of this id; take another id"
                raise AuditExists(what, run_id=run_id)
            return (_launching(new.evolve(created_at=now), now), *_out_of_the_way(rivals, now))

        # Of a new run there are no findings. Reading might fail, and leave a run that is in the way and never launched.
        return composed(await _answered(lambda: self._jobs.update(run_id, new.lock_key, created)), Findings())

    async def resume(self, run_id: str, *, several: bool = False) -> Audit:
        """The run, queued again as a further attempt: what succeeded stays. Raises AuditRunning while it, or another
        one, is alive."""
        key = run_id if several else _LOCK_KEY
        mark = uuid.uuid4().hex
        await self._job(run_id)
        # Before anything is stored, as in `create`.
        findings = await read_findings(self._blobs, run_id)

        def resumed(job: Job, rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
            if job.claimed_by == mark:
                return ()
            if _is_alive(job, now):
                raise AuditRunning(f"{run_id} is {job.status}", run_id=run_id)
            ended = job if job.status.is_final else _died(job, now)
            fresh = {"error": None, "lock_key": key, "claimed_by": mark, "started_at": None}
            again = ended.after(Cause.RESUMED, now, fence=ended.fence + 1, **fresh)
            return (_launching(again, now), *_out_of_the_way(rivals, now))

        return composed(await _answered(lambda: self._updated(run_id, resumed, key)), findings)

    async def begin(self, run_id: str, attempt: int, *, lease_s: float) -> Job:
        """For the driver: the run is its own from here on. Raises StaleClaim where a later attempt has been made;
        IllegalTransition where another AuditStore has begun the attempt already, or it is over."""

        def begun(job: Job, rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
            _check_attempt(job, attempt)
            if job.status == State.RUNNING and job.claimed_by == self._claimer:
                # Stored by a call whose answer was lost.
                return ()
            if job.status != State.QUEUED:
                raise IllegalTransition(f"{run_id} is {job.status}, not queued")
            claim = claims.claim(job, lease_s=lease_s, max_attempts=sys.maxsize, claimer=self._claimer)
            return claim(job, rivals, now)

        return await self._updated(run_id, begun, (await self._job(run_id)).lock_key)

    async def finish(self, claim: Claim, status: AuditStatus, error: AuditFault | None = None) -> Audit:
        """The run is over: SUCCEEDED, INCOMPLETE or FAILED. Raises Canceled; StaleClaim where the claim no longer
        holds."""
        cause = Cause.SUCCEEDED if status == AuditStatus.SUCCEEDED else Cause.EXHAUSTED
        if status == AuditStatus.INCOMPLETE:
            error = AuditFault(code=INCOMPLETE, message="some cells failed")

        def finished(job: Job, rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
            if job.fence == claim.fence and job.status.is_final:
                # Stored by a call whose answer was lost.
                return ()
            if job.fence == claim.fence + 1 and job.status == State.CANCELED:
                raise Canceled("canceled by a user")
            end = claims.finish(claim, cause, error=error and JobError(**error.model_dump()))
            return end(job, rivals, now)

        return await self._changed(claim.job_id, finished)

    async def fail(self, run_id: str, attempt: int, fault: AuditFault) -> Audit:
        """The run, whose attempt has failed unless it was over by then. Whoever works on it can do nothing more."""

        def failed(job: Job, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
            if job.status.is_final or _attempt(job) != attempt:
                return ()
            return (_failed(job, now, fault),)

        return await self._changed(run_id, failed)

    async def fail_if_dead(self, run_id: str) -> Audit:
        """The run, which has failed where it was not over and its driver is silent."""

        def failed(job: Job, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
            return () if job.status.is_final or _is_alive(job, now) else (_died(job, now),)

        return await self._changed(run_id, failed)

    async def cancel(self, run_id: str, attempt: int | None = None) -> Audit:
        """The run, over: its driver stops painting, and writes a report of what there is. Raises IllegalTransition
        where it was over before. The driver names its `attempt`: then StaleClaim where a later one has been made, and
        what is canceled already stays."""

        def canceled(job: Job, rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
            if attempt is not None:
                _check_attempt(job, attempt)
                if job.status == State.CANCELED:
                    return ()
            (after,) = claims.cancel(job, rivals, now)
            return (after.evolve(attempt=_attempt(job)),)

        job = await self._updated(run_id, canceled)
        try:
            return await self._composed(job)
        except StoreUnavailable:
            # It is canceled all the same, and its job is to be stopped.
            return composed(job, Findings())

    async def check_canceled(self, run_id: str, attempt: int) -> None:
        """For the driver of a canceled run. Raises StaleClaim where it was resumed since."""
        _check_attempt(await self._job(run_id), attempt)

    async def get(self, run_id: str) -> Audit:
        return await self._composed(await self._job(run_id))

    async def list(self, limit: int = 50) -> list[Audit]:
        """Newest first by `created_at`."""
        found = await self._jobs.list(type="audit", limit=limit)
        at_once = asyncio.Semaphore(16)

        async def composed(job: Job) -> Audit:
            async with at_once:
                return await self._composed(job)

        return list(await asyncio.gather(*map(composed, found)))

    async def _job(self, run_id: str) -> Job:
        if not is_run_id(run_id):
            raise UnknownAudit("there is no such run")
        return _audit(await self._jobs.get(run_id), run_id)

    async def _updated(self, run_id: str, change: _Change, lock_key: str = "") -> Job:
        """Without a `lock_key` the change sees no other run."""
        if not is_run_id(run_id):
            raise UnknownAudit("there is no such run")
        return await self._jobs.update(run_id, lock_key, lambda job, *rest: change(_audit(job, run_id), *rest))

    async def _changed(self, run_id: str, change: _Change, lock_key: str = "") -> Audit:
        return await self._composed(await self._updated(run_id, change, lock_key))

    async def _composed(self, job: Job) -> Audit:
        return composed(job, await read_findings(self._blobs, job.id))


def composed(job: Job, findings: Findings) -> Audit:
    """The run, as clients and its report see it."""
    request = job.parameters
    assert isinstance(request, AuditRequest)
    is_incomplete = job.error is not None and job.error.code == INCOMPLETE
    status = AuditStatus.INCOMPLETE if is_incomplete else AuditStatus(job.status)
    # A cell waits that was begun where the run is not worked on, and one that failed where it is queued again.
    is_past = {"running": job.status != State.RUNNING, "failed": job.status == State.QUEUED}
    cells = {name: cell for name, cell in findings.cells.items() if not is_past.get(cell.status)}
    names = map(request.matrix.name, request.matrix.cells())
    found = {
        "cells": {name: cells.get(name, CellProgress()) for name in names},
        "stage": findings.stage if job.status == State.RUNNING else "",
        "started_at": findings.started_at or job.started_at,
    }
    return Audit(
        **{**dict(findings), **found},
        id=job.id,
        request=request,
        status=status,
        attempt=_attempt(job),
        has_begun=job.started_at is not None,
        created_at=job.created_at,
        finished_at=job.finished_at,
        alive_until=job.lease_until,
        error=AuditFault(**job.error.model_dump()) if job.error and not is_incomplete else None,
    )


async def _answered(update: Callable[[], Awaitable[Job]]) -> Job:
    """What `update` returns. It is made a second time where the answer was lost, and must know its own job by then."""
    try:
        return await update()
    except StoreUnavailable:
        return await update()


def _audit(job: Job | None, run_id: str) -> Job:
    if job is None or job.type != "audit":
        raise UnknownAudit(f"there is no run {run_id}", run_id=run_id)
    return job


def _attempt(job: Job) -> int:
    """Which of its jobs works on the run, or is to: a claim counts the attempt."""
    return job.attempt + (job.status == State.QUEUED)


def _check_attempt(job: Job, attempt: int) -> None:
    if _attempt(job) != attempt:
        raise StaleClaim(f"{job.id} is at attempt {_attempt(job)}, and this is {attempt}")


def _is_alive(job: Job, now: datetime) -> bool:
    return not job.status.is_final and job.lease_until is not None and now < job.lease_until


def _launching(job: Job, now: datetime) -> Job:
    return job.evolve(lease_until=now + timedelta(seconds=LAUNCH_S))


def _failed(job: Job, now: datetime, fault: AuditFault) -> Job:
    """The attempt is used, though it may not have begun: its Ray job's name is."""
    error = JobError(code=fault.code, message=fault.message)
    return job.after(Cause.EXHAUSTED, now, attempt=_attempt(job), fence=job.fence + 1, error=error)


def _died(job: Job, now: datetime) -> Job:
    since = f" after {job.lease_until:%Y-%m-%d %H:%M:%S} UTC" if job.lease_until else ""
    return _failed(job, now, AuditFault(code=JOB_DIED, message=f"its job was not heard of{since}"))


def _out_of_the_way(rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
    """Runs that have died. Raises AuditRunning where one is alive."""
    for rival in rivals:
        if _is_alive(rival, now):
            what = f"{rival.id} is {rival.status} on this app; wait for it, or cancel it"
            raise AuditRunning(what, run_id=rival.id)
    return [_died(rival, now) for rival in rivals]
