"""Flow control: slots for messages in flight, and which message is given the next one.

While messages of several priorities wait, a slot goes to the longest-waiting of the highest priority. Every `TURN`th
slot goes to the longest-waiting of the others instead, so that none starves.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ...settings import Priority

#: One in so many slots goes to a lower priority while a higher one waits.
TURN = 8
#: The lower, the sooner served.
RANKS: Mapping[Priority, int] = {"high": 0, "normal": 1, "low": 2}


class PriorityTurns:
    def __init__(self) -> None:
        self._given = 0

    def choose(self, ranks: Sequence[int]) -> int:
        """Whose turn it is: an index into the ranks of those who wait, the longest-waiting first."""
        best = min(ranks)
        lower = [i for i, rank in enumerate(ranks) if rank > best]
        if not lower:
            return 0
        self._given += 1
        return ranks.index(best) if self._given % TURN else lower[0]


@dataclass(eq=False, slots=True)
class _Waiter:
    rank: int
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FlowControl:
    """`count` slots. For one event loop."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = count
        self._waiting: list[_Waiter] = []
        self._turns = PriorityTurns()

    @property
    def share(self) -> int:
        """What each of several subscriptions may have waiting here while all slots are taken, so that a slot that is
        free again finds the next message of each priority: a lower one's turns, and one more."""
        return min(self.count, -(-self.count // TURN) + 1)

    @asynccontextmanager
    async def slot(self, rank: int) -> AsyncIterator[None]:
        """One slot, as soon as it is given."""
        if self.free:
            self.free -= 1
        else:
            await self._wait(_Waiter(rank))
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, waiter: _Waiter) -> None:
        self._waiting.append(waiter)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if not waiter.turn.cancelled():
                # It was given a slot in the same moment.
                self._pass_on()
            raise
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def _pass_on(self) -> None:
        waiting = [waiter for waiter in self._waiting if not waiter.turn.done()]
        if not waiting:
            self.free += 1
            return
        chosen = waiting[self._turns.choose([waiter.rank for waiter in waiting])]
        self._waiting.remove(chosen)
        chosen.turn.set_result(None)
