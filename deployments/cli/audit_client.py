"""A run from the outside: start it, follow it, cancel it, bring its report here. Needs the stores, and Ray's job server
to start or stop one; no HTTP."""

import asyncio
import itertools
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from serve_app import adapters, parameters
from serve_app.audit import record
from serve_app.audit.ports import AuditLauncher, LaunchState
from serve_app.audit.record import Audit, AuditStatus
from serve_app.audit.runs import OUTAGE_S, Audits
from serve_app.audit.store import AuditStore
from serve_app.errors import AuditError, BlobNotFound, JobsUnavailable, UnknownAudit
from serve_app.jobs.lease import retry_unavailable
from serve_app.settings import Settings

#: Seconds between two looks at a run's record; every so many-th time its job is looked at, too.
POLL_S, JOB_EVERY = 0.5, 10
#: What a run's folder has for people: no cells, no record.
_FILES = re.compile(r"[^/]+\.(md|html|csv|png)|" + re.escape(record.RESULTS))


class AuditClient:
    """Over the stores that the settings name."""

    def __init__(self, settings: Settings, launcher: AuditLauncher | None = None) -> None:
        """Without a `launcher` none can be started, and a job that died is known by its silence only."""
        self._blobs = adapters.blob_store(settings.blobs, settings.public_url)
        self._max_bytes = settings.limits.stored_bytes
        job_store = adapters.job_store(settings.jobs)
        self.store = AuditStore(job_store, self._blobs)
        self.runs = Audits(blobs=self._blobs, job_store=job_store, launcher=launcher or _NoJobs(), settings=settings)

    async def resume(self, run_id: str) -> Audit:
        """A further attempt at a run that is over, or whose job has died. Raises as `Audits.resume`."""
        request = (await self.store.get(run_id)).request
        return await self.runs.resume(run_id, request.user_id, request.session_id)

    async def follow(
        self, run_id: str, on_change: Callable[[Audit], None], look: Callable[[str], Awaitable[Audit]] | None = None
    ) -> Audit:
        """The run once it is over; one whose job has died meanwhile has failed. `look` finds that out, and does what
        `Audits.look` does, which it is when left out. Raises UnknownAudit."""
        for turn in itertools.count(1):
            get = self.store.get if turn % JOB_EVERY else look or self.runs.look
            # A run takes up to an hour: a store that is away for a moment is no reason to stop looking.
            audit = await retry_unavailable(partial(get, run_id), OUTAGE_S)
            on_change(audit)
            if audit.status.is_over:
                return audit
            await asyncio.sleep(POLL_S)
        raise AssertionError("counting does not end")

    async def cancel(self, run_id: str) -> Audit:
        """The run, over, once its job has ended: by itself, or by force after GRACE_S. Raises UnknownAudit;
        IllegalTransition where it was over before."""
        audit = await self.runs.cancel(run_id)
        await self.runs.stopped()
        return audit

    async def fetch(self, run_id: str, folder: Path) -> list[Path]:
        """Write the report's files and the pictures into `folder`. Raises UnknownAudit."""
        await self.store.get(run_id)
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        written = []
        async for info in self._blobs.list(record.folder(run_id)):
            name = info.path.removeprefix(f"{record.folder(run_id)}/")
            if _FILES.fullmatch(name):
                data, _ = await self._blobs.get(info.path, max_bytes=self._max_bytes)
                await asyncio.to_thread((folder / name).write_bytes, data)
                written.append(folder / name)
        return written

    async def results(self, run: str) -> Mapping[str, Any]:
        """Its results.json. Raises UnknownAudit where there is none."""
        if not parameters.is_run_id(run):
            raise UnknownAudit(f"{run!r} is neither a run's id nor a results.json file")
        path = f"{record.folder(run)}/{record.RESULTS}"
        try:
            data, _ = await self._blobs.get(path, max_bytes=self._max_bytes)
        except BlobNotFound:
            audit = await self.store.get(run)
            raise UnknownAudit(f"{run} is {audit.status} and has no results", run_id=run) from None
        return read_results(data, path)

    async def final_results(self, run: str) -> Mapping[str, Any]:
        """As `results`. Raises AuditError where the run has none that count: what a resume that failed, was canceled or
        is not over leaves there is an earlier attempt's, or a part's."""
        results = await self.results(run)
        status = (await self.store.get(run)).status
        if status not in (AuditStatus.SUCCEEDED, AuditStatus.INCOMPLETE):
            raise AuditError(f"{run} is {status}: the results it has are not final", run_id=run)
        return results


class _NoJobs:
    """Where jobs are somebody else's."""

    is_apart = True

    async def launch(self, audit: Audit) -> None:
        raise JobsUnavailable("no job can be started from here")

    async def stop(self, audit: Audit) -> None:
        raise JobsUnavailable("no job can be stopped from here")

    async def state(self, audit: Audit) -> LaunchState:
        raise JobsUnavailable("no job can be seen from here")


def read_results(data: bytes, where: str) -> Mapping[str, Any]:
    """Raises UnknownAudit where `data`, found at `where`, is no results.json."""
    try:
        read = json.loads(data)
    except ValueError as e:
        raise UnknownAudit(f"{where} is no results.json: {e}") from e
    if not isinstance(read, dict):
        raise UnknownAudit(f"{where} is no results.json: not an object")
    return read
