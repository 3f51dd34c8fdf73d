"""What the run has come to while its driver works on it: changed in memory, stored by one task."""

import asyncio
import logging
from typing import Any

from ..errors import FluxFillError, StoreUnavailable
from .files import RunFiles
from .record import Audit, AuditFault, CellProgress, Findings

log = logging.getLogger(__name__)

#: Shortest time between two writes, in seconds.
EVERY_S = 2.0
#: How long a store that is down is waited for, in seconds.
OUTAGE_S = 60.0


class Record:
    """`audit` is the run as its driver has it; `keep` must run beside what changes it."""

    def __init__(self, files: RunFiles, audit: Audit, every_s: float = EVERY_S) -> None:
        self.files, self.audit, self._every_s = files, audit, every_s
        self._news = asyncio.Event()

    def change(self, **fields: Any) -> None:
        self.audit = self.audit.model_copy(update=fields)
        self._news.set()

    def stage(self, words: str) -> None:
        log.info("The audit is at: %s", words, extra={"action": "audit_stage"})
        self.change(stage=words)

    def cell(self, name: str, progress: CellProgress) -> None:
        self.change(cells={**self.audit.cells, name: progress})

    async def keep(self) -> None:
        """For ever. Raises StaleClaim, Canceled: whoever works on the run must stop. A store that is down is waited
        out."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self.write()
            except StoreUnavailable as e:
                self._news.set()
                log.warning("The findings could not be written: %s", e, extra={"action": "audit_write_failed"})
            await asyncio.sleep(self._every_s)

    async def write(self) -> None:
        """Now. Raises StaleClaim, Canceled, StoreUnavailable."""
        await self.files.keep_findings(Findings(**{name: getattr(self.audit, name) for name in Findings.model_fields}))


def fault(error: Exception) -> AuditFault:
    """What a person and a program are told of it."""
    if isinstance(error, FluxFillError):
        return AuditFault(code=error.code, message=error.message)
    return AuditFault(code=FluxFillError.code, message=f"{type(error).__name__}: {error}")
