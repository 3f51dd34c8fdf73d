"""The cells of a wave over the replicas: how many are asked for at once, where they may queue, and asking again."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random, wait_random_exponential

from serve_app.errors import FluxFillError, ReplicaTaken
from serve_app.ports import Measured, OnProgress, PaintRequest

from .replicas import Replicas
from .waves import Wave

log = logging.getLogger(__name__)

#: Cells in a replica's hands at most: one is painted, and the next one is there when that ends.
_IN_HAND = 2
COUNT_S = 1.0
#: Before a cell that no replica took asks again, in seconds; at random, so that several that ask do not meet again.
_AGAIN_S = wait_random_exponential(multiplier=0.01, min=0.01, max=0.1)
#: While replicas are still starting, which takes minutes.
_LATER_S = wait_random(min=0.5, max=1.5)


class FanOut:
    """Made by `fan_out`."""

    def __init__(self, replicas: Replicas, wave: Wave, max_in_flight: int | None) -> None:
        self._replicas, self._wave = replicas, wave
        # Serve counts what is in hand as load: twice as much would start more replicas where there can be more.
        asking = {name: count * (1 if name in wave.growing else _IN_HAND) for name, count in wave.wanted.items()}
        self._asking = {name: asyncio.Semaphore(count) for name, count in asking.items()}
        self._all = asyncio.Semaphore(max_in_flight or sum(asking.values()))
        self._running: Mapping[str, int] = dict.fromkeys(wave.wanted, 0)
        #: Cells asked for and not finished.
        self._left: Counter[str] = Counter()

    async def measure(self, variant: str, request: PaintRequest, on_progress: OnProgress, *, trials: int) -> Measured:
        """As `Replicas.measure`, but that it waits for its turn, and asks again until a replica takes it."""

        def pause(state: RetryCallState) -> float:
            return (_LATER_S if self._is_starting(variant) else _AGAIN_S)(state)

        self._left[variant] += 1
        try:
            async with self._asking[variant], self._all:
                async for attempt in AsyncRetrying(retry=retry_if_exception_type(ReplicaTaken), wait=pause):
                    with attempt:
                        return await self._replicas.measure(
                            variant, request, on_progress, trials=trials, places=self._places(variant)
                        )
        finally:
            self._left[variant] -= 1
        raise AssertionError("it is asked for until there is an answer")

    def _places(self, variant: str) -> int:
        """A second cell that waits at a replica is what has another one started. When all are there it may wait while
        there is one for each: then the last ones go to whichever replica is free."""
        has_enough = self._left[variant] >= _IN_HAND * self._running[variant]
        is_plenty = variant not in self._wave.growing and has_enough
        return _IN_HAND if self._is_starting(variant) or is_plenty else 1

    def _is_starting(self, variant: str) -> bool:
        return self._running[variant] < self._wave.wanted[variant]

    async def count(self) -> None:
        try:
            counts = await self._replicas.counts()
        except FluxFillError as e:
            log.warning("Replicas could not be counted: %s", e, extra={"action": "audit_count_failed"})
            return
        self._running = {name: counts[name].running if name in counts else 0 for name in self._wave.wanted}

    async def keep_counting(self) -> None:
        while True:
            await asyncio.sleep(COUNT_S)
            await self.count()


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
