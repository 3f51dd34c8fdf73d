"""An AuditLauncher whose jobs are tasks of this process, held to the contract of the real one in test_launcher.py; and
what such a job does with the stores."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from serve_app.audit.files import RunFiles, read_findings
from serve_app.audit.ports import LaunchState
from serve_app.audit.record import Audit, AuditFault, AuditStatus
from serve_app.audit.store import AuditStore
from serve_app.blobs import BlobStore
from serve_app.errors import JobsUnavailable, StoreUnavailable
from serve_app.jobs import claims


async def never_ends(_audit: Audit) -> None:
    await asyncio.Event().wait()


class LocalJobs:
    def __init__(self, work: Callable[[Audit], Awaitable[None]] = never_ends) -> None:
        self.work = work
        self.is_down = self.is_apart = False
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def launch(self, audit: Audit) -> None:
        self._check()
        if audit.job_name not in self.tasks:
            self.tasks[audit.job_name] = asyncio.create_task(self._run(audit))

    async def stop(self, audit: Audit) -> None:
        self._check()
        if task := self.tasks.get(audit.job_name):
            task.cancel()

    async def state(self, audit: Audit) -> LaunchState:
        self._check()
        task = self.tasks.get(audit.job_name)
        if task is None:
            return "gone"
        if not task.done():
            return "running"
        if task.cancelled():
            return "stopped"
        return "failed" if task.exception() else "succeeded"

    async def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    async def _run(self, audit: Audit) -> None:
        await self.work(audit)

    def _check(self) -> None:
        if self.is_down:
            raise JobsUnavailable("switched off")


async def always() -> None:
    """A claim that holds."""


class Driver:
    """Of one attempt at a run: it claims the run, writes what a test tells it, and ends it."""

    def __init__(self, store: AuditStore, blobs: BlobStore, audit: Audit) -> None:
        self.store, self.audit, self._blobs = store, audit, blobs
        self.files = RunFiles(blobs, audit.id, always)

    async def begin(self) -> None:
        job = await self.store.begin(self.audit.id, self.audit.attempt, lease_s=60.0)
        self._claim = claims.claim_of(job)

    async def note(self, **findings: Any) -> None:
        """Beside what was found before."""
        before = await read_findings(self._blobs, self.audit.id)
        await self.files.keep_findings(before.model_copy(update=findings))

    async def is_canceled(self) -> bool:
        with suppress(StoreUnavailable):
            return (await self.store.get(self.audit.id)).status == AuditStatus.CANCELED
        return False

    async def finish(self, status: AuditStatus, error: AuditFault | None = None) -> None:
        if status == AuditStatus.CANCELED:
            await self.store.cancel(self.audit.id, self.audit.attempt)
        else:
            await self.store.finish(self._claim, status, error)
