"""Before a wave: waiting until the GPUs are free that the variants painted last had, or something else of the app.

Nothing is woken or asked of a replica meanwhile: Serve counts them. The devices' used memory is noted for the report.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from ..errors import AuditImpossible, FluxFillError
from ..settings import Settings
from .record import MemoryReading
from .replicas import ReplicaCounts, Replicas
from .waves import Wave, gpu_holders

log = logging.getLogger(__name__)

POLL_S = 1.0


class GpuHandover:
    """For the audited `variants`, on a cluster that can have `gpus`."""

    def __init__(
        self, replicas: Replicas, variants: Sequence[str], settings: Settings, gpus: int, poll_s: float = POLL_S
    ) -> None:
        self._replicas, self._variants, self._gpus, self._poll_s = replicas, variants, gpus, poll_s
        self._limit_s = settings.audit.replica_wait_s
        #: Replicas that it always has, by its name in `Replicas.counts`, of all that takes a GPU.
        self._kept = {name: one.min_replicas for name, one in gpu_holders(settings).items()}
        #: By device. Devices that come later are not counted.
        self._floor_bytes: Mapping[str, int] = {}
        # Of the last look.
        self._in_the_way: Mapping[str, int] = {}

    async def note_floor(self) -> None:
        """To be read before anything of the app is asked for."""
        self._floor_bytes = await self._replicas.memory_used_bytes()

    async def wait(
        self, after: str, wave: Wave, tell: Callable[[str], None]
    ) -> tuple[MemoryReading, AuditImpossible | None]:
        """Until the other audited variants have no more replicas than they always have, and whatever else of the app
        has left enough GPUs; or until all of the wave have a replica. `after` names the variants painted last; `tell`
        is told, in words, what is waited for.

        With the reading comes, where it has taken `audit.replica_wait_s`, why it is not to be waited for any longer.
        """
        started_s = time.monotonic()
        error = None
        timeout = asyncio.timeout(self._limit_s)
        try:
            async with timeout:
                while not await self._is_settled(wave):
                    what = "its GPU" if len(self._in_the_way.keys() & self._kept) == 1 else "their GPUs"
                    tell(f"waiting for {', '.join(self._in_the_way)} to give {what} back")
                    await asyncio.sleep(self._poll_s)
        except TimeoutError:
            if not timeout.expired():
                raise
            left = (f"{name} has {n}, and keeps {self._kept.get(name, 0)}" for name, n in self._in_the_way.items())
            what = f"the GPUs did not become free in {self._limit_s:g} s{f' after {after}' if after else ''}"
            error = AuditImpossible(f"{what}: replicas are left: {'; '.join(left)}")
        waited_s = time.monotonic() - started_s
        used = await self._replicas.memory_used_bytes()
        # On the devices that were there at the floor. One that is gone is free.
        used_bytes = sum(used.get(device, 0) for device in self._floor_bytes) if self._floor_bytes else None
        floor_bytes = sum(self._floor_bytes.values()) if self._floor_bytes else None
        reading = MemoryReading(after=after, used_bytes=used_bytes, floor_bytes=floor_bytes, waited_s=waited_s)
        extra = {"action": "audit_gpus_free", **reading.model_dump()}
        log.info("GPUs after %s: waited %.1f s", after or "nothing", waited_s, extra=extra)
        return reading, error

    async def _is_settled(self, wave: Wave) -> bool:
        try:
            counts = await self._replicas.counts()
        except FluxFillError as e:
            log.warning("Replicas could not be counted: %s", e, extra={"action": "replica_count_failed"})
            self._in_the_way = {"replicas that nobody can count": 0}
            return False
        self._in_the_way = {}
        if all(counts[name].running for name in wave.wanted):
            return True
        held = {name: max(kept, counts.get(name, ReplicaCounts()).total) for name, kept in self._kept.items()}
        # Who has more replicas than always, and stands in the wave's way.
        more = {name: count for name, count in held.items() if count > max(self._kept[name], name in wave.wanted)}
        is_short = sum(held.values()) + sum(not held[name] for name in wave.wanted) > self._gpus
        self._in_the_way = {name: count for name, count in more.items() if is_short or name in self._variants}
        return not self._in_the_way
