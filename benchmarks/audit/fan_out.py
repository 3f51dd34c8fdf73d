"""The cells of a wave over the replicas: how many are asked for at once, where they may queue, and asking again."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from serve_app.errors import FluxFillError, ReplicaTaken
from serve_app.ports import Measured, OnProgress, PaintRequest

from .replicas import Replicas
from .waves import Wave

log = logging.getLogger(__name__)

#: Cells that ask although every replica has one: the next is there when a replica is free. Serve counts it as load, so
#: there is none where that would start a replica too many.
SPARE = 1
COUNT_S = 1.0
#: Full jitter, so that several that ask do not meet again.
_WAIT = wait_random_exponential(multiplier=0.01, min=0.01, max=0.1)


class FanOut:
    """Made by `fan_out`."""

    def __init__(self, replicas: Replicas, wave: Wave, max_in_flight: int | None) -> None:
        self._replicas, self._wanted = replicas, wave.wanted
        asking = {name: count + SPARE * (name not in wave.growing) for name, count in wave.wanted.items()}
        self._asking = {name: asyncio.Semaphore(count) for name, count in asking.items()}
        self._all = asyncio.Semaphore(max_in_flight or sum(asking.values()))
        self._running: Mapping[str, int] = dict.fromkeys(wave.wanted, 0)

    async def measure(self, variant: str, request: PaintRequest, on_progress: OnProgress, *, trials: int) -> Measured:
        """As `Replicas.measure`, but that it waits for its turn, and asks again until a replica takes it."""
        async with self._asking[variant], self._all:
            async for attempt in AsyncRetrying(retry=retry_if_exception_type(ReplicaTaken), wait=_WAIT):
                with attempt:
                    return await self._replicas.measure(
                        variant, request, on_progress, trials=trials, places=self._places(variant)
                    )
        raise AssertionError("it is asked for until there is an answer")

    def _places(self, variant: str) -> int:
        """A second cell that waits at a replica is what has another one started, and only until all are there: then it
        would wait where another replica is free."""
        return 2 if self._running[variant] < self._wanted[variant] else 1

    async def count(self) -> None:
        counts = await self._replicas.counts()
        self._running = {name: counts[name].running if name in counts else 0 for name in self._wanted}

    async def keep_counting(self) -> None:
        while True:
            await asyncio.sleep(COUNT_S)
            try:
                await self.count()
            except FluxFillError as e:
                log.warning("Replicas could not be counted: %s", e, extra={"action": "audit_count_failed"})


@asynccontextmanager
async def fan_out(replicas: Replicas, wave: Wave, max_in_flight: int | None = None) -> AsyncIterator[FanOut]:
    """Over the replicas of the wave's variants; at most `max_in_flight` cells ask at once, over all of them."""
    fan = FanOut(replicas, wave, max_in_flight)
    await fan.count()
    census = asyncio.create_task(fan.keep_counting())
    try:
        yield fan
    finally:
        census.cancel()
        await asyncio.wait({census})
    if not census.cancelled():
        census.result()
