"""Who is given the next slot."""

import asyncio

import pytest

from serve_app.adapters.pubsub.flow import TURN, FlowControl, PriorityTurns

HIGH, NORMAL, LOW = 0, 1, 2


def test_one_priority_alone_is_served_in_order() -> None:
    turns = PriorityTurns()
    assert [turns.choose([LOW, LOW]) for _ in range(2 * TURN)] == [0] * 2 * TURN


def test_the_highest_goes_first_and_every_eighth_is_the_longest_waiting_of_the_others() -> None:
    turns = PriorityTurns()
    chosen = [turns.choose([LOW, NORMAL, HIGH, HIGH]) for _ in range(2 * TURN)]
    assert chosen == 2 * ([2] * (TURN - 1) + [0])


def test_turns_are_counted_only_while_a_lower_priority_waits() -> None:
    turns = PriorityTurns()
    for _ in range(3 * TURN - 1):
        turns.choose([HIGH])
    assert [turns.choose([LOW, HIGH]) for _ in range(TURN)] == [1] * (TURN - 1) + [0]


class Users:
    """Tasks that take slots and note the order they are given them in."""

    def __init__(self, pool: FlowControl) -> None:
        self._pool = pool
        self.given: list[str] = []
        self.leave = asyncio.Event()

    async def start(self, name: str, rank: int) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._use(name, rank))
        await asyncio.sleep(0)
        return task

    async def _use(self, name: str, rank: int) -> None:
        async with self._pool.slot(rank):
            self.given.append(name)
            await self.leave.wait()


async def test_flow_are_given_by_priority_then_by_arrival() -> None:
    users = Users(FlowControl(1))
    tasks = [await users.start(name, rank) for name, rank in (("a", LOW), ("b", LOW), ("c", HIGH), ("d", NORMAL))]
    tasks.append(await users.start("e", HIGH))
    users.leave.set()
    await asyncio.gather(*tasks)
    assert users.given == ["a", "c", "e", "d", "b"]


async def test_a_place_whose_taker_is_cancelled_is_passed_on() -> None:
    pool = FlowControl(1)
    users = Users(pool)
    first, gone, last = [await users.start(name, NORMAL) for name in ("first", "gone", "last")]
    waiting = await users.start("waiting, then gone", NORMAL)
    waiting.cancel()
    # `gone` is given the slot, and cancelled before it knows.
    first.cancel()
    await asyncio.sleep(0)
    gone.cancel()
    users.leave.set()
    await asyncio.gather(last)
    assert (users.given, pool.free) == (["first", "last"], 1)


@pytest.mark.parametrize(("count", "share"), [(1, 1), (2, 2), (8, 2), (9, 3), (30, 5)])
def test_what_a_subscription_may_have_waiting(count: int, share: int) -> None:
    assert FlowControl(count).share == share
