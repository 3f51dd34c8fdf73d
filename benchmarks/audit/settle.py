"""Between waves: waiting until the GPUs of the variants that were painted are free again.

Nothing is woken or asked of a replica meanwhile: Serve's own counts, and the devices' used memory.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

from serve_app.audits import MemoryReading
from serve_app.errors import AuditImpossible, FluxFillError
from serve_app.settings import Settings

from .replicas import Replicas

log = logging.getLogger(__name__)

#: What else may take memory meanwhile: a CUDA context of a monitor, a few buffers of the driver.
TOLERANCE_BYTES = 256 * 2**20
POLL_S = 1.0


class Settling:
    """For the variants of one matrix that want a GPU."""

    def __init__(self, replicas: Replicas, variants: Sequence[str], settings: Settings, poll_s: float = POLL_S) -> None:
        self._replicas, self._poll_s = replicas, poll_s
        self._limit_s = settings.audit.settle_s
        self._kept = {
            name: settings.variants[name].min_replicas for name in variants if settings.variant(name).num_gpus
        }
        #: By device. One that comes later is nobody's whom an audit waits for.
        self._floor_bytes: Mapping[str, int] | None = None
        #: By device, at the last look; one that is gone is free.
        self._used_bytes: Mapping[str, int] = {}
        self._left: list[str] = []

    async def wait(self, after: str) -> tuple[MemoryReading, AuditImpossible | None]:
        """Until no variant has more replicas than it always has, and each device's used memory is at its floor
        again. The floor is what is used when this returns for the first time. `after` names the variants painted last.

        With the reading comes, where it has taken `audit.settle_s`, why it is not to be waited for any longer.
        """
        started_s = time.monotonic()
        error = None
        timeout = asyncio.timeout(self._limit_s)
        try:
            async with timeout:
                while not await self._is_settled():
                    await asyncio.sleep(self._poll_s)
        except TimeoutError:
            if not timeout.expired():
                raise
            error = self._too_long(after)
        if self._floor_bytes is None and error is None:
            self._floor_bytes = self._used_bytes
        waited_s = time.monotonic() - started_s
        reading = MemoryReading(after=after, used_bytes=self._used, floor_bytes=self._floor, waited_s=waited_s)
        self._log(reading)
        return reading, error

    async def _is_settled(self) -> bool:
        try:
            counts = await self._replicas.counts()
        except FluxFillError as e:
            log.warning("Replicas could not be counted: %s", e, extra={"action": "audit_count_failed"})
            self._left = ["nobody knows which"]
            return False
        self._left = [
            f"{name} has {there} of its {kept}"
            for name, kept in self._kept.items()
            if (one := counts.get(name)) and (there := one.running + one.starting + one.stopping) > kept
        ]
        self._used_bytes = await self._replicas.memory_used_bytes()
        return not self._left and not self._is_above_floor

    @property
    def _is_above_floor(self) -> bool:
        floor = self._floor_bytes or {}
        return any(self._used_bytes.get(device, 0) > size + TOLERANCE_BYTES for device, size in floor.items())

    @property
    def _used(self) -> int | None:
        """On the devices that were there at the floor."""
        devices = self._used_bytes if self._floor_bytes is None else self._floor_bytes
        return sum(self._used_bytes.get(device, 0) for device in devices) if devices else None

    @property
    def _floor(self) -> int | None:
        return sum(self._floor_bytes.values()) if self._floor_bytes else None

    def _too_long(self, after: str) -> AuditImpossible:
        why = f"replicas are left: {', '.join(self._left)}" if self._left else "no replica is left"
        if self._is_above_floor:
            why += f"; the devices use {_mib(self._used)}, before the audit {_mib(self._floor)}"
        what = f"the GPUs did not become free in {self._limit_s:g} s{f' after {after}' if after else ''}: {why}"
        return AuditImpossible(what, used_bytes=self._used, floor_bytes=self._floor)

    def _log(self, reading: MemoryReading) -> None:
        extra = {"action": "audit_settled", **reading.model_dump()}
        log.info("GPUs after %s: waited %.1f s", reading.after or "nothing", reading.waited_s, extra=extra)


def _mib(size: int | None) -> str:
    return "an unknown amount" if size is None else f"{size / 2**20:,.0f} MiB"
