"""Audits in the blob store: each run's record, its cells, and which run is the app's only one.

A record is written by one job at a time: every write names the attempt it belongs to, and one of an older attempt is
refused. What two processes may write at once is written by compare-and-set.
"""

import uuid
from collections.abc import Callable
from datetime import datetime, timedelta

from pydantic import BaseModel, ValidationError

from .audits import (
    LOCK_PATH,
    Audit,
    AuditFault,
    AuditRequest,
    AuditStatus,
    CellProgress,
    CellResult,
    RunId,
    cancel_path,
    cell_path,
    folder,
    image_path,
    record_path,
)
from .errors import (
    AuditExists,
    AuditRunning,
    BlobConflict,
    BlobError,
    BlobNotFound,
    IllegalTransition,
    StaleClaim,
    UnknownAudit,
)
from .ports import BlobStore, Clock

#: From asking for a job to its first write: Ray starts a driver, which imports torch.
LAUNCH_S = 300.0
#: How long a running job may be silent.
ALIVE_S = 60.0
#: Records and cells; the pictures have limits of their own.
_MAX_BYTES = 4_000_000
#: How often others may write between a read and the write that follows it.
_CONFLICTS = 20
_JSON = "application/json"


class _Lock(BaseModel):
    run_id: RunId


Change = Callable[[Audit], Audit]


class AuditStore:
    """Every method raises StoreUnavailable while the store cannot be reached."""

    def __init__(self, blobs: BlobStore, clock: Clock) -> None:
        self._blobs, self._clock = blobs, clock

    # -- runs

    async def create(self, request: AuditRequest, run_id: str | None = None, *, several: bool = False) -> Audit:
        """A queued run. Raises AuditExists for an id that is taken; AuditRunning while another run is alive, unless
        `several` may be."""
        now = self._clock()
        names = [request.matrix.name(cell) for cell in request.matrix.cells()]
        audit = Audit(
            id=run_id or f"audit-{uuid.uuid4().hex[:8]}",
            request=request,
            created_at=now,
            alive_until=now + timedelta(seconds=LAUNCH_S),
            cells={name: CellProgress() for name in names},
        )
        try:
            await self._put(record_path(audit.id), audit, "")
        except BlobConflict:
            what = f"there is a run {audit.id} already; resume it, or take another id"
            raise AuditExists(what, run_id=audit.id) from None
        # Only now: a lock counts for what the record it names says.
        try:
            await self._lock(audit.id, several)
        except AuditRunning:
            await self._blobs.delete(record_path(audit.id))
            raise
        return audit

    async def resume(self, run_id: str, *, several: bool = False) -> Audit:
        """The run, queued again as a further attempt: what succeeded stays.

        Raises UnknownAudit; AuditRunning while it, or another one, is alive.
        """

        def again(audit: Audit) -> Audit:
            if audit.is_alive(self._clock()):
                raise AuditRunning(f"{run_id} is {audit.status}", run_id=run_id)
            kept = {n: c if c.status == "succeeded" else CellProgress() for n, c in audit.cells.items()}
            queued = {"status": AuditStatus.QUEUED, "attempt": audit.attempt + 1, "error": None, "finished_at": None}
            return audit.model_copy(update={**queued, "cells": kept, **self._alive(LAUNCH_S)})

        before = await self.get(run_id)
        audit = await self._change(run_id, again)
        try:
            await self._lock(run_id, several)
        except AuditRunning:
            # As it was, but that the attempt is used.
            await self._change(run_id, lambda queued: before.model_copy(update={"attempt": queued.attempt}))
            raise
        await self._blobs.delete(cancel_path(run_id))
        return audit

    async def begin(self, run_id: str, attempt: int) -> Audit:
        """For the job: the run is its own from here on. Raises UnknownAudit; StaleClaim where a later attempt has been
        made; IllegalTransition where the attempt has begun already, or is over."""

        def running(audit: Audit) -> Audit:
            self._check(audit, attempt)
            if audit.status != AuditStatus.QUEUED:
                raise IllegalTransition(f"{run_id} is {audit.status}, not queued")
            started = audit.started_at or self._clock()
            return audit.model_copy(
                update={"status": AuditStatus.RUNNING, "started_at": started, **self._alive(ALIVE_S)}
            )

        return await self._change(run_id, running)

    async def update(self, run_id: str, attempt: int, change: Change) -> Audit:
        """For the job: what `change` makes of the record; also says that the job is alive. Raises UnknownAudit;
        StaleClaim where a later attempt has been made; IllegalTransition where the run is over."""

        def changed(audit: Audit) -> Audit:
            self._check(audit, attempt)
            if audit.status.is_over:
                raise IllegalTransition(f"{run_id} is {audit.status}")
            return change(audit).model_copy(update=self._alive(ALIVE_S))

        return await self._change(run_id, changed)

    async def finish(self, run_id: str, attempt: int, status: AuditStatus, error: AuditFault | None = None) -> Audit:
        """The run is over. Raises as `update`."""
        ended = {"status": status, "error": error, "finished_at": self._clock(), "stage": ""}
        return await self.update(run_id, attempt, lambda audit: audit.model_copy(update=ended))

    async def get(self, run_id: str) -> Audit:
        """Raises UnknownAudit."""
        found = await self._find(run_id)
        if found is None:
            raise UnknownAudit(f"there is no run {run_id}", run_id=run_id)
        return found[0]

    async def list(self, limit: int = 50) -> list[Audit]:
        """Newest first by `created_at`."""
        ids = [info.path.split("/")[1] async for info in self._blobs.list("audit") if info.path.endswith("/run.json")]
        found = [await self._find(run_id) for run_id in ids]
        audits = sorted((one[0] for one in found if one), key=lambda audit: audit.created_at, reverse=True)
        return audits[:limit]

    async def cancel(self, run_id: str) -> Audit:
        """Ask the run to stop; its job ends it, and a run without a live job is over at once. Raises UnknownAudit;
        IllegalTransition where it is over."""
        await self.get(run_id)
        await self._blobs.put(cancel_path(run_id), b"", content_type="text/plain")

        def canceled(audit: Audit) -> Audit:
            if audit.status.is_over:
                raise IllegalTransition(f"{run_id} is {audit.status}")
            if audit.status == AuditStatus.RUNNING and audit.is_alive(self._clock()):
                return audit
            ended = {"status": AuditStatus.CANCELED, "finished_at": self._clock(), "stage": ""}
            return audit.model_copy(update=ended)

        return await self._change(run_id, canceled)

    async def is_canceled(self, run_id: str) -> bool:
        try:
            await self._blobs.head(cancel_path(run_id))
        except BlobNotFound:
            return False
        return True

    # -- cells

    async def keep_cell(self, run_id: str, result: CellResult) -> None:
        await self._put(cell_path(run_id, result.name), result, None)

    async def cells(self, run_id: str) -> dict[str, CellResult]:
        """Those that are stored, by name."""
        results = {}
        async for info in self._blobs.list(f"{folder(run_id)}/cells"):
            data, _ = await self._blobs.get(info.path, max_bytes=_MAX_BYTES)
            result = CellResult.model_validate_json(data)
            results[result.name] = result
        return results

    async def keep_image(self, run_id: str, name: str, png: bytes) -> str:
        """Its path."""
        path = image_path(run_id, name)
        await self._blobs.put(path, png, content_type="image/png")
        return path

    # -- one at a time

    async def _lock(self, run_id: str, several: bool) -> None:
        if several:
            return
        for _ in range(_CONFLICTS):
            holder, version = await self._holder()
            if holder is not None and holder.id != run_id and holder.is_alive(self._clock()):
                raise AuditRunning(
                    f"{holder.id} is {holder.status} on this app; wait for it, or cancel it", run_id=holder.id
                )
            try:
                await self._put(LOCK_PATH, _Lock(run_id=run_id), version)
                return
            except BlobConflict:
                continue
        raise AuditRunning("others start audits on this app at this moment")

    async def _holder(self) -> tuple[Audit | None, str]:
        """The run that the lock names, and the lock's version."""
        try:
            data, info = await self._blobs.get(LOCK_PATH, max_bytes=_MAX_BYTES)
        except BlobNotFound:
            return None, ""
        try:
            found = await self._find(_Lock.model_validate_json(data).run_id)
        except ValidationError:
            found = None
        return found[0] if found else None, info.version

    # -- bytes

    def _alive(self, seconds: float) -> dict[str, datetime]:
        return {"alive_until": self._clock() + timedelta(seconds=seconds)}

    def _check(self, audit: Audit, attempt: int) -> None:
        if audit.attempt != attempt:
            raise StaleClaim(f"{audit.id} is at attempt {audit.attempt}, and this is {attempt}")

    async def _change(self, run_id: str, change: Change) -> Audit:
        for _ in range(_CONFLICTS):
            found = await self._find(run_id)
            if found is None:
                raise UnknownAudit(f"there is no run {run_id}", run_id=run_id)
            changed = change(found[0])
            try:
                await self._put(record_path(run_id), changed, found[1])
                return changed
            except BlobConflict:
                continue
        raise BlobConflict(f"the record of {run_id} was written {_CONFLICTS} times by others")

    async def _find(self, run_id: str) -> tuple[Audit, str] | None:
        """The record and its version."""
        try:
            data, info = await self._blobs.get(record_path(run_id), max_bytes=_MAX_BYTES)
        except BlobNotFound:
            return None
        try:
            return Audit.model_validate_json(data), info.version
        except ValidationError as e:
            raise BlobError(f"the record of {run_id} cannot be read: {e.error_count()} fields are wrong") from e

    async def _put(self, path: str, value: BaseModel, version: str | None) -> None:
        data = value.model_dump_json(indent=1).encode()
        if version is None:
            await self._blobs.put(path, data, content_type=_JSON)
        else:
            await self._blobs.put(path, data, content_type=_JSON, if_version=version)
