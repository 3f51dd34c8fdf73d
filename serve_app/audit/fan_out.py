"""The cells of a wave over the replicas: how many are asked for at once, where they may queue, and asking again."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random, wait_random_exponential

from ..errors import AuditImpossible, FluxFillError, ReplicaTaken
from ..models import EditRequest, Measured, OnProgress, Progress
from ..settings import AuditSettings
from .replicas import Replicas
from .waves import Wave

log = logging.getLogger(__name__)

#: Cells in a replica's hands at most: one is painted, and the next one is there when that ends.
_IN_HAND = 2
COUNT_S = 1.0
#: Before a cell that no replica took asks again, in seconds; at random, so that several that ask do not meet again.
#: Quick at first, while a free replica is looked for among many; then rare, for those that are all painting.
_AGAIN_S = wait_random_exponential(multiplier=0.005, exp_base=1.2, min=0.005, max=0.2)
#: While replicas are still starting, which takes minutes.
_LATER_S = wait_random(min=0.5, max=1.5)


class FanOut:
    """Made by `fan_out`."""

    def __init__(self, replicas: Replicas, wave: Wave, settings: AuditSettings) -> None:
        self._replicas, self._wave, self._limit_s = replicas, wave, settings.replica_wait_s
        # Serve counts what is in flight as load: twice as much would start more replicas where there can be more.
        asking = {name: count * (1 if name in wave.growing else _IN_HAND) for name, count in wave.wanted.items()}
        self._asking = {name: asyncio.Semaphore(count) for name, count in asking.items()}
        self._all = asyncio.Semaphore(settings.max_in_flight or sum(asking.values()))
        self._running: dict[str, int] = dict.fromkeys(wave.wanted, 0)
        #: Cells asked for and not finished.
        self._left: Counter[str] = Counter()
        #: By variant of which cells are asked for and no replica runs: when that is too long, by the loop's clock.
        self._until_s: dict[str, float] = {}
        #: Of the cells that are asked for.
        self._timeouts: defaultdict[str, set[asyncio.Timeout]] = defaultdict(set)

    async def measure(self, variant: str, request: EditRequest, on_progress: OnProgress, *, trials: int) -> Measured:
        """As `Replicas.measure`, but that it waits for its turn, and asks again until a replica takes it.

        Raises AuditImpossible when the variant has had no running replica for `audit.replica_wait_s`."""
        self._left[variant] += 1
        try:
            async with self._asking[variant], self._all, self._while_there_may_be_one(variant):
                return await self._asked(variant, request, on_progress, trials)
        finally:
            self._left[variant] -= 1

    async def _asked(self, variant: str, request: EditRequest, on_progress: OnProgress, trials: int) -> Measured:
        def pause(state: RetryCallState) -> float:
            return (_LATER_S if self._is_starting(variant) else _AGAIN_S)(state)

        async def noted(progress: Progress) -> None:
            self._note(variant, max(1, self._running[variant]))
            await on_progress(progress)

        async for attempt in AsyncRetrying(retry=retry_if_exception_type(ReplicaTaken), wait=pause):
            with attempt:
                places = self._places(variant)
                return await self._replicas.measure(variant, request, noted, trials=trials, places=places)
        raise AssertionError("it is asked for until there is an answer")

    @asynccontextmanager
    async def _while_there_may_be_one(self, variant: str) -> AsyncIterator[None]:
        timeouts = self._timeouts[variant]
        timeout = asyncio.timeout(None)
        try:
            async with timeout:
                timeouts.add(timeout)
                self._watch(variant)
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            what = f"no replica of {variant} has run for {self._limit_s:g} s"
            raise AuditImpossible(f"{what}: something else has the GPU, or none starts", variant=variant) from None
        finally:
            timeouts.discard(timeout)

    def _note(self, variant: str, running: int) -> None:
        self._running[variant] = running
        self._watch(variant)

    def _watch(self, variant: str) -> None:
        """Time runs out from when a cell is asked for, or the last replica goes, until one runs."""
        if self._running[variant] or not self._timeouts[variant]:
            self._until_s.pop(variant, None)
        else:
            self._until_s.setdefault(variant, asyncio.get_running_loop().time() + self._limit_s)
        for timeout in self._timeouts[variant]:
            if not timeout.expired():
                timeout.reschedule(self._until_s.get(variant))

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
            log.warning("Replicas could not be counted: %s", e, extra={"action": "replica_count_failed"})
            return
        for name in self._wave.wanted:
            self._note(name, counts[name].running if name in counts else 0)

    async def keep_counting(self) -> None:
        while True:
            await asyncio.sleep(COUNT_S)
            await self.count()


@asynccontextmanager
async def fan_out(replicas: Replicas, wave: Wave, settings: AuditSettings) -> AsyncIterator[FanOut]:
    """Over the replicas of the wave's variants; at most `max_in_flight` cells ask at once, over all of them."""
    fan = FanOut(replicas, wave, settings)
    await fan.count()
    census = asyncio.create_task(fan.keep_counting())
    try:
        yield fan
    finally:
        census.cancel()
        await asyncio.wait({census})
    if not census.cancelled():
        census.result()
