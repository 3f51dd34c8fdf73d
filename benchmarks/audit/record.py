"""The run's record while its job works on it: changed in memory, stored by one task."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

from serve_app.audit_store import AuditStore
from serve_app.audits import Audit, AuditFault, CellProgress, MemoryReading
from serve_app.errors import BlobConflict, FluxFillError, StoreUnavailable

log = logging.getLogger(__name__)

#: Shortest time between two writes, and longest: each says that the job is alive.
EVERY_S = 2.0
AT_LEAST_S = 15.0
#: Fields of the record that the job writes. The others are the store's.
_OURS = ("stage", "cells", "inputs", "gpu", "sm", "memory", "compile", "recommended")


class Record:
    """`audit` is the run as this job has it; `keep` must run beside what changes it."""

    def __init__(
        self, store: AuditStore, audit: Audit, every_s: float = EVERY_S, at_least_s: float = AT_LEAST_S
    ) -> None:
        self._store, self._every_s, self._at_least_s = store, every_s, at_least_s
        self.audit = audit
        self._news = asyncio.Event()

    def change(self, **fields: Any) -> None:
        self.audit = self.audit.model_copy(update=fields)
        self._news.set()

    def stage(self, words: str) -> None:
        log.info("The audit is at: %s", words, extra={"action": "audit_stage"})
        self.change(stage=words)

    def cell(self, name: str, progress: CellProgress) -> None:
        self.change(cells={**self.audit.cells, name: progress})

    def settled(self, reading: MemoryReading) -> None:
        self.change(memory=(*self.audit.memory, reading))

    async def keep(self) -> None:
        """For ever. Raises StaleClaim where a later attempt has been made, IllegalTransition where the run is over,
        UnknownAudit where it is gone: whoever works on it must stop. A store that is down is waited out."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._at_least_s - self._every_s):
                    await self._news.wait()
            self._news.clear()
            try:
                await self.write()
            except (StoreUnavailable, BlobConflict) as e:
                self._news.set()
                log.warning("The record could not be written: %s", e, extra={"action": "audit_write_failed"})
            await asyncio.sleep(self._every_s)

    async def write(self) -> None:
        """Now. Raises as `AuditStore.update`."""
        fields = {name: getattr(self.audit, name) for name in _OURS}
        await self._store.update(self.audit.id, self.audit.attempt, lambda stored: stored.model_copy(update=fields))


def fault(error: Exception) -> AuditFault:
    """What a person and a program are told of it."""
    if isinstance(error, FluxFillError):
        return AuditFault(code=error.code, message=error.message)
    return AuditFault(code=FluxFillError.code, message=f"{type(error).__name__}: {error}")
