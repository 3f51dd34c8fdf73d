"""Audits as clients see them: started, looked at, waited for, canceled. The job itself works elsewhere."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ..blobs import BlobStore
from ..edit.session import INPUTS, session_path
from ..errors import (
    AuditImpossible,
    AuditRunning,
    BlobNotFound,
    InputError,
    JobsUnavailable,
    MissingInput,
    Unavailable,
    UnknownAudit,
    UnknownVariant,
)
from ..jobs.lease import retry_unavailable
from ..jobs.ports import JobStore
from ..parameters import AuditRequest
from ..settings import Settings
from .ports import AuditLauncher, LaunchState
from .record import PAGE, Audit, AuditFault, AuditStatus, folder
from .store import JOB_DIED, AuditStore

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Between two looks at a run that somebody waits for, in seconds.
POLL_S = 1.0
#: How long a job that was asked to stop may take to do so by itself, in seconds: one step of the largest window takes
#: seconds on an L4, and then it writes what it has.
GRACE_S = 30.0
#: How long the store may be away from those who wait.
OUTAGE_S = 60.0

_ENDED: tuple[LaunchState, ...] = ("stopped", "succeeded", "failed")
_GOING: tuple[LaunchState, ...] = ("pending", "running")


class Report(NamedTuple):
    #: The page's, in the blob store.
    path: str
    #: A signed link, which is a secret: never log it.
    url: str


class Audits:
    """Every method that names a run raises UnknownAudit; all raise StoreUnavailable while the store is away."""

    def __init__(
        self,
        *,
        blobs: BlobStore,
        job_store: JobStore,
        launcher: AuditLauncher,
        settings: Settings,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_stopping`: whether this process is about to end, so that nobody may wait here any longer."""
        self._store = AuditStore(job_store, blobs)
        self._blobs, self._launcher = blobs, launcher
        self.settings, self._is_stopping = settings, is_stopping
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self, request: AuditRequest, run_id: str | None) -> Audit:
        """A new run and its job. Goes on to its end even where the caller hangs up.

        Raises AuditImpossible where a job cannot reach the stores; UnknownVariant; MissingInput; InputError for links
        of such a life; AuditExists; AuditRunning; JobsUnavailable: then the run has failed, and can be resumed.
        """
        await self._check(request)
        several = self.settings.audit.allow_concurrent
        return await self._to_the_end(self._queued(lambda: self._store.create(request, run_id, several=several)))

    async def resume(self, run_id: str, user_id: str, session_id: str) -> Audit:
        """As `start`, for what a run of this session lacks. A job of an earlier attempt that still goes is stopped
        first. Raises UnknownAudit for a run of another session, too."""
        audit = await self._store.get(run_id)
        if (audit.request.user_id, audit.request.session_id) != (user_id, session_id):
            raise UnknownAudit(f"there is no run {run_id} of this session", run_id=run_id)
        await self._check(audit.request)
        several = self.settings.audit.allow_concurrent
        return await self._to_the_end(self._queued(lambda: self._store.resume(run_id, several=several)))

    async def look(self, run_id: str) -> Audit:
        """The run. One whose job has died has failed."""
        audit = await self._store.get(run_id)
        if audit.status.is_over:
            return audit
        state = None
        with suppress(JobsUnavailable):
            state = await self._launcher.state(audit)
        if state in _ENDED:
            why = f"its job has {state} before the run was over; its log says more"
            return await self._store.fail(run_id, audit.attempt, AuditFault(code=JOB_DIED, message=why))
        # Ray is not asked further: a job that renews its lease may have been submitted by hand, and one that cannot
        # renew it stops by itself.
        if audit.alive_until is not None and await self._store.now() < audit.alive_until:
            return audit
        return await self._store.fail_if_dead(run_id)

    async def wait(self, run_id: str) -> Audit:
        """The run when it is over, or as it is when this process is about to end."""
        while True:
            audit = await retry_unavailable(partial(self.look, run_id), OUTAGE_S)
            if audit.status.is_over or self._is_stopping():
                return audit
            await asyncio.sleep(POLL_S)

    async def list(self, limit: int) -> Sequence[Audit]:
        """Newest first."""
        return await self._store.list(limit)

    async def cancel(self, run_id: str) -> Audit:
        """The run, over: its job is given time to end by itself, and then stopped. Raises IllegalTransition where the
        run was over before."""
        audit = await self._store.cancel(run_id)
        log.info("Canceled %s", run_id, extra={"action": "audit_canceled", "run_id": run_id})
        self._spawn(self._stop(audit, GRACE_S if audit.has_begun else 0.0))
        return audit

    async def stopped(self) -> None:
        """Returns when the jobs of canceled runs have ended, or could not be stopped."""
        await asyncio.gather(*self._tasks)

    async def report(self, audit: Audit) -> Report | None:
        """None while the run is not over, where it failed (what is there is an earlier attempt's), and where it came to
        none: a canceled run has one of what was painted."""
        path = f"{folder(audit.id)}/{PAGE}"
        has_none = not audit.status.is_over or audit.status == AuditStatus.FAILED
        if has_none or not await self._is_there(path):
            return None
        return Report(path, await self._blobs.link(path, expires_s=audit.request.link_s))

    async def close(self) -> None:
        """Jobs that were asked to stop see that for themselves."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- starting

    async def _check(self, request: AuditRequest) -> None:
        stores = {"jobs": self.settings.jobs, "blobs": self.settings.blobs}
        for name, url in stores.items():
            if url.startswith("memory:") and self._launcher.is_apart:
                raise AuditImpossible(f"{name}: {url} is in the app's own memory, where no audit's job can reach it")
        for variant in request.matrix.variants:
            if variant not in self.settings.variants:
                served = ", ".join(self.settings.variants)
                raise UnknownVariant(f"variant {variant} is not served here; there are {served}")
        paths = [session_path(request.user_id, request.session_id, name) for name in INPUTS.values()]
        there = await asyncio.gather(*map(self._is_there, paths))
        if not all(there):
            path = paths[there.index(False)]
            raise MissingInput(f"{path} is not in the blob store", path=path)
        try:
            # Rather now than after an hour of painting.
            await self._blobs.link(paths[0], expires_s=request.link_s)
        except ValueError as e:
            raise InputError(f"link_hours: {e}") from e

    async def _is_there(self, path: str) -> bool:
        try:
            await self._blobs.head(path)
        except BlobNotFound:
            return False
        return True

    async def _queued(self, queue: Callable[[], Awaitable[Audit]]) -> Audit:
        """What `queue` gives, with its job. Where another run is in the way whose job has died just now, that one has
        failed, and is not in the way."""
        try:
            audit = await queue()
        except AuditRunning as e:
            if not (await self.look(e.details["run_id"])).status.is_over:
                raise
            audit = await queue()
        return await self._launch(audit)

    async def _launch(self, audit: Audit) -> Audit:
        try:
            # Jobs of earlier attempts that fell silent and yet go would paint beside the new one. One that does not end
            # in time writes nothing any more.
            for attempt in range(1, audit.attempt):
                earlier = audit.model_copy(update={"attempt": attempt})
                if await self._launcher.state(earlier) in _GOING:
                    await self._launcher.stop(earlier)
                    await self._until_ended(earlier, GRACE_S)
            await self._launcher.launch(audit)
        except JobsUnavailable as e:
            # Kept, because Ray may have taken the job and not said so: an attempt that is over begins nothing.
            fault = AuditFault(code=e.code, message=e.message)
            await self._store.fail(audit.id, audit.attempt, fault)
            raise JobsUnavailable(f"{e.message}; {audit.id} has failed, and can be resumed", run_id=audit.id) from e
        extra = {"action": "audit_started", "run_id": audit.id, "attempt": audit.attempt, "cells": len(audit.cells)}
        log.info("Started the job of %s", audit.id, extra=extra)
        return audit

    # -- ending

    async def _until_ended(self, audit: Audit, limit_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while await self._launcher.state(audit) in _GOING:
                    await asyncio.sleep(POLL_S)

    async def _stop(self, audit: Audit, grace_s: float) -> None:
        try:
            # For the job's end, not the run's: it writes its report after that.
            await self._until_ended(audit, grace_s)
            await self._launcher.stop(audit)
        except Unavailable as e:
            extra = {"action": "audit_not_stopped", "run_id": audit.id, "code": e.code}
            log.warning("Could not stop the job of %s: %s", audit.id, e.message, extra=extra)

    # -- apart from who asked

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        # In a context of its own: Serve cancels what a request began when its client disconnects.
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
