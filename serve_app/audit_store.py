"""Audits in the blob store: each run's record, its cells, and which run is the app's only one.

A record is written by one job at a time: every write names the attempt it belongs to, and one of an older attempt is
refused. Records and the lock are written by compare-and-set; a change that was stored though its answer was lost is
recognized when it is tried again, here or by a backend's client. The lock counts for what the record that it names
says, so a run is alive in its record before it asks for the lock: of two that are made at once, one gets it.

Runs are listed by an index, whose names are in it before their records are. A name without the record that it is of
counts for nothing.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from .audits import (
    INDEX,
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
    index_path,
    is_run_id,
    record_path,
)
from .errors import (
    AuditExists,
    AuditRunning,
    BlobConflict,
    BlobError,
    BlobNotFound,
    FluxFillError,
    IllegalTransition,
    InputError,
    StaleClaim,
    StoreUnavailable,
    UnknownAudit,
)
from .ports import BlobStore, Clock

log = logging.getLogger(__name__)
T = TypeVar("T")

#: From asking for a job to its first write: Ray starts a driver, which imports torch.
LAUNCH_S = 300.0
#: How long a running job may be silent.
ALIVE_S = 60.0
#: Records and cells; the pictures have limits of their own.
_MAX_BYTES = 4_000_000
#: How often others may write between a read and the write that follows it.
_CONFLICTS = 20
#: Blobs that are read at once.
_READS = 16
#: In `Audit.error` of a run whose job ended, or fell silent, before the run was over.
JOB_DIED = "job_died"
_JSON = "application/json"


class _Lock(BaseModel):
    run_id: RunId


Change = Callable[[Audit], Audit]


class AuditStore:
    """Every method raises StoreUnavailable while the store cannot be reached; those that change a run raise BlobError
    where its record is damaged."""

    def __init__(self, blobs: BlobStore, clock: Clock) -> None:
        self._blobs, self._clock = blobs, clock
        #: Whose runs are those that begin here.
        self._worker = uuid.uuid4().hex

    # -- runs

    async def create(self, request: AuditRequest, run_id: str | None = None, *, several: bool = False) -> Audit:
        """A queued run. Raises InputError for an id that is none; AuditExists for one that is taken; AuditRunning while
        another run is alive, unless `several` may be. A dead run that is not over fails here."""
        if run_id is not None and not is_run_id(run_id):
            raise InputError("run_id: 1 to 64 letters, digits, - and _ make one")
        now = self._clock()
        names = [request.matrix.name(cell) for cell in request.matrix.cells()]
        audit = Audit(
            id=run_id or f"audit-{uuid.uuid4().hex[:8]}",
            request=request,
            worker=uuid.uuid4().hex,
            created_at=now,
            alive_until=now + timedelta(seconds=LAUNCH_S),
            cells={name: CellProgress() for name in names},
        )
        # Before the record, so that no run is missing in the list.
        await self._blobs.put(index_path(audit.id, now), b"", content_type="text/plain")
        try:
            await self._put(record_path(audit.id), audit, "")
        except (BlobConflict, StoreUnavailable) as e:
            if not await self._is_stored(audit):
                if isinstance(e, StoreUnavailable):
                    raise
                await self._blobs.delete(index_path(audit.id, now))
                what = f"there is a run {audit.id} already; resume it, or take another id"
                raise AuditExists(what, run_id=audit.id) from None
        try:
            await self._lock(audit.id, several)
        except FluxFillError:
            await self._blobs.delete(record_path(audit.id))
            await self._blobs.delete(index_path(audit.id, now))
            raise
        return audit

    async def resume(self, run_id: str, *, several: bool = False) -> Audit:
        """The run, queued again as a further attempt: what succeeded stays.

        Raises UnknownAudit; AuditRunning while it, or another one, is alive.
        """

        before = await self.get(run_id)
        if not before.is_alive(self._clock()):
            # Not after: who cancels from then on means the new attempt.
            await self._blobs.delete(cancel_path(run_id))

        worker = uuid.uuid4().hex

        def again(audit: Audit) -> Audit:
            nonlocal before
            if audit.worker == worker:
                return audit
            if audit.is_alive(self._clock()):
                raise AuditRunning(f"{run_id} is {audit.status}", run_id=run_id)
            before = audit
            kept = {n: c if c.status == "succeeded" else CellProgress() for n, c in audit.cells.items()}
            queued = {"status": AuditStatus.QUEUED, "attempt": audit.attempt + 1, "error": None, "finished_at": None}
            new = {**queued, "worker": worker, "stage": "", "cells": kept}
            return audit.model_copy(update={**new, **self._alive(LAUNCH_S)})

        audit = await self._change(run_id, again)
        try:
            await self._lock(run_id, several)
        except FluxFillError:
            # As it was, but that the attempt is used.
            await self._change(run_id, lambda queued: before.model_copy(update={"attempt": queued.attempt}))
            raise
        return audit

    async def begin(self, run_id: str, attempt: int) -> Audit:
        """For the job: the run is its own from here on. Raises UnknownAudit; StaleClaim where a later attempt has been
        made; IllegalTransition where another AuditStore has begun the attempt already, or it is over."""

        def running(audit: Audit) -> Audit:
            self._check(audit, attempt)
            if audit.status == AuditStatus.RUNNING and audit.worker == self._worker:
                return audit
            if audit.status != AuditStatus.QUEUED:
                raise IllegalTransition(f"{run_id} is {audit.status}, not queued")
            started = audit.started_at or self._clock()
            begun = {"status": AuditStatus.RUNNING, "worker": self._worker, "started_at": started}
            return audit.model_copy(update={**begun, **self._alive(ALIVE_S)})

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
        """The run is over. Raises as `update`, but where it is over in just this way."""

        def over(audit: Audit) -> Audit:
            self._check(audit, attempt)
            if audit.status.is_over:
                if (audit.status, audit.error) == (status, error):
                    return audit
                raise IllegalTransition(f"{run_id} is {audit.status}")
            return audit.model_copy(update={**self._ended(status, error), **self._alive(ALIVE_S)})

        return await self._change(run_id, over)

    async def bury(self, run_id: str) -> Audit:
        """Fail the run where it is not over and its job is silent; the record, changed or not. Raises UnknownAudit."""

        def buried(audit: Audit) -> Audit:
            if audit.status.is_over or audit.is_alive(self._clock()):
                return audit
            why = f"its job was not heard of after {audit.alive_until:%Y-%m-%d %H:%M:%S} UTC"
            fault = AuditFault(code=JOB_DIED, message=why)
            return audit.model_copy(update=self._ended(AuditStatus.FAILED, fault))

        return await self._change(run_id, buried)

    async def get(self, run_id: str) -> Audit:
        """Raises UnknownAudit."""
        return (await self._read(run_id))[0]

    async def list(self, limit: int = 50) -> list[Audit]:
        """Newest first by `created_at`. Damaged records are left out; few are read that are not given."""
        names = sorted([info.path async for info in self._blobs.list(INDEX)])
        found: list[Audit] = []
        while names and len(found) < limit:
            read = [names.pop() for _ in range(min(limit - len(found), len(names)))]
            found += await _some(self._indexed, read)
        return found

    async def _indexed(self, path: str) -> Audit | None:
        """The run of a name in the index; None where it is gone, or where it never came to be under that name."""
        match = _INDEXED.fullmatch(path)
        audit = await self._readable(match[1]) if match else None
        return audit if audit and index_path(audit.id, audit.created_at) == path else None

    async def cancel(self, run_id: str) -> Audit:
        """Ask the run to stop; its job ends it, and a run without a live job is over at once. Raises UnknownAudit;
        IllegalTransition where it is over."""

        def canceled(audit: Audit) -> Audit:
            is_running = audit.status == AuditStatus.RUNNING and audit.is_alive(self._clock())
            if is_running or audit.status == AuditStatus.CANCELED:
                return audit
            if audit.status.is_over:
                raise IllegalTransition(f"{run_id} is {audit.status}")
            return audit.model_copy(update=self._ended(AuditStatus.CANCELED))

        if (audit := await self.get(run_id)).status.is_over:
            raise IllegalTransition(f"{run_id} is {audit.status}")
        # Before the record is read again: a job that begins in between finds it.
        await self._blobs.put(cancel_path(run_id), b"", content_type="text/plain")
        return await self._change(run_id, canceled)

    async def is_canceled(self, run_id: str) -> bool:
        try:
            await self._blobs.head(cancel_path(run_id))
        except BlobNotFound:
            return False
        return True

    # -- cells

    async def keep_cell(self, run_id: str, attempt: int, result: CellResult) -> None:
        """Raises UnknownAudit; StaleClaim where a later attempt has been made by then: one that is made at the very
        moment finds a cell that was painted as its own are."""
        await self._check_claim(run_id, attempt)
        await self._put(cell_path(run_id, result.name), result, None)

    async def cells(self, run_id: str) -> dict[str, CellResult]:
        """Those that are stored, by name. Damaged ones are left out, so that they are painted again."""
        paths = [info.path async for info in self._blobs.list(f"{folder(run_id)}/cells")]
        return {result.name: result for result in await _some(self._cell, paths)}

    async def _cell(self, path: str) -> CellResult | None:
        try:
            data, _ = await self._blobs.get(path, max_bytes=_MAX_BYTES)
            return CellResult.model_validate_json(data)
        except (BlobNotFound, ValidationError) as e:
            log.warning("Left %s out: %s", path, type(e).__name__, extra={"action": "record_unreadable"})
            return None

    async def keep_image(self, run_id: str, attempt: int, name: str, png: bytes) -> str:
        """Its path. Raises as `keep_cell`."""
        await self._check_claim(run_id, attempt)
        path = image_path(run_id, name)
        await self._blobs.put(path, png, content_type="image/png")
        return path

    # -- one at a time

    async def _lock(self, run_id: str, several: bool) -> None:
        if several:
            return
        for _ in range(_CONFLICTS):
            holder, version = await self._holder()
            try:
                if holder is not None and holder.id != run_id:
                    holder = await self.bury(holder.id)
                    if not holder.status.is_over:
                        what = f"{holder.id} is {holder.status} on this app; wait for it, or cancel it"
                        raise AuditRunning(what, run_id=holder.id)
                await self._put(LOCK_PATH, _Lock(run_id=run_id), version)
                return
            except (BlobConflict, UnknownAudit):
                continue
        raise AuditRunning("others start audits on this app at this moment")

    async def _holder(self) -> tuple[Audit | None, str]:
        """The run that the lock names, if it can be read, and the lock's version."""
        try:
            data, info = await self._blobs.get(LOCK_PATH, max_bytes=_MAX_BYTES)
        except BlobNotFound:
            return None, ""
        try:
            return await self._readable(_Lock.model_validate_json(data).run_id), info.version
        except ValidationError:
            return None, info.version

    # -- bytes

    def _alive(self, seconds: float) -> dict[str, datetime]:
        return {"alive_until": self._clock() + timedelta(seconds=seconds)}

    def _check(self, audit: Audit, attempt: int) -> None:
        if audit.attempt != attempt:
            raise StaleClaim(f"{audit.id} is at attempt {audit.attempt}, and this is {attempt}")

    async def _check_claim(self, run_id: str, attempt: int) -> None:
        self._check(await self.get(run_id), attempt)

    def _ended(self, status: AuditStatus, error: AuditFault | None = None) -> dict[str, object]:
        return {"status": status, "error": error, "finished_at": self._clock(), "stage": ""}

    async def _change(self, run_id: str, change: Change) -> Audit:
        for _ in range(_CONFLICTS):
            audit, version = await self._read(run_id)
            changed = change(audit)
            if changed is audit:
                return audit
            try:
                await self._put(record_path(run_id), changed, version)
                return changed
            except BlobConflict:
                continue
        raise BlobConflict(f"the record of {run_id} was written {_CONFLICTS} times by others")

    async def _read(self, run_id: str) -> tuple[Audit, str]:
        """The record and its version."""
        if not is_run_id(run_id):
            raise UnknownAudit("there is no such run")
        try:
            data, info = await self._blobs.get(record_path(run_id), max_bytes=_MAX_BYTES)
            return Audit.model_validate_json(data), info.version
        except BlobNotFound:
            raise UnknownAudit(f"there is no run {run_id}", run_id=run_id) from None
        except ValidationError as e:
            raise BlobError(f"the record of {run_id} cannot be read: {e.error_count()} fields are wrong") from e

    async def _is_stored(self, audit: Audit) -> bool:
        with suppress(UnknownAudit, BlobError):
            return await self.get(audit.id) == audit
        return False

    async def _readable(self, run_id: str) -> Audit | None:
        try:
            return await self.get(run_id)
        except UnknownAudit:
            return None
        except BlobError as e:
            log.warning("Left a run out: %s", e.message, extra={"action": "record_unreadable", "run_id": run_id})
            return None

    async def _put(self, path: str, value: BaseModel, version: str | None) -> None:
        data = value.model_dump_json(indent=1).encode()
        if version is None:
            await self._blobs.put(path, data, content_type=_JSON)
        else:
            await self._blobs.put(path, data, content_type=_JSON, if_version=version)


_INDEXED = re.compile(rf"{INDEX}/[0-9T.]+Z-([^/]+)")


async def _some(read: Callable[[str], Awaitable[T | None]], names: Iterable[str]) -> list[T]:
    """What `read` finds, a few at a time."""
    places = asyncio.Semaphore(_READS)

    async def one(name: str) -> T | None:
        async with places:
            return await read(name)

    return [found for found in await asyncio.gather(*map(one, names)) if found is not None]
