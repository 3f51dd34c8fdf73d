"""Who is given the place at an engine next: jobs in their order, audit cells behind them, and nobody who has left."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.slot import Slot
from serve_app.errors import ReplicaTaken

# If the place is lost, it is waited for in vain.
pytestmark = pytest.mark.timeout(30)


class Crowd:
    """Tasks that take the place at one slot and note the order in which they are given it."""

    def __init__(self) -> None:
        self.slot = Slot()
        self.given: list[str] = []
        self.leave = asyncio.Event()
        self.painting = self.audits_painting = 0

    async def start(self, name: str, *, audits: int | None = None) -> "asyncio.Task[None]":
        """`audits`: a cell, where fewer than so many are in hand."""
        task = asyncio.create_task(self.use(name, audits))
        await asyncio.sleep(0)
        return task

    async def use(self, name: str, audits: int | None = None) -> None:
        async with self._seated(audits):
            self.given.append(name)
            await self.leave.wait()

    @asynccontextmanager
    async def _seated(self, audits: int | None) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if audits is not None:
                await stack.enter_async_context(self.slot.audit_cell(audits))
            await (self.slot.acquire() if audits is None else self.slot.acquire_behind())
            stack.callback(self.slot.release)
            yield

    async def place_is_free(self) -> bool:
        async with asyncio.timeout(10), self.slot.drained():
            return self.slot.audits == 0


async def test_jobs_go_before_audit_cells_and_each_in_their_order() -> None:
    crowd = Crowd()
    tasks = [await crowd.start("first"), await crowd.start("cell", audits=1)]
    tasks += [await crowd.start(name) for name in ("second", "third")]
    crowd.leave.set()
    await asyncio.gather(*tasks)
    assert crowd.given == ["first", "second", "third", "cell"]
    assert await crowd.place_is_free()


async def test_a_job_that_comes_while_a_cell_is_painted_is_next_whatever_cells_wait() -> None:
    crowd = Crowd()
    tasks = [await crowd.start(name, audits=2) for name in ("cell 1", "cell 2")]
    tasks.append(await crowd.start("job"))
    crowd.leave.set()
    await asyncio.gather(*tasks)
    assert crowd.given == ["cell 1", "job", "cell 2"]


@pytest.mark.parametrize("most", [1, 2])
async def test_no_more_audit_cells_are_in_hand_than_may_be(most: int) -> None:
    crowd = Crowd()
    tasks = [await crowd.start(str(number), audits=most) for number in range(most)]
    assert crowd.slot.audits == most
    with pytest.raises(ReplicaTaken, match=f"^audit cells in flight here: {most}$"):
        await crowd.use("too many", most)
    tasks.pop().cancel()
    await asyncio.sleep(0)
    tasks.append(await crowd.start("instead", audits=most))
    crowd.leave.set()
    await asyncio.gather(*tasks)
    assert "instead" in crowd.given and await crowd.place_is_free()


@pytest.mark.parametrize(("jobs", "cells"), [(0, 2), (1, 1), (2, 1)])
async def test_the_slot_that_the_next_job_comes_into_is_given_to_no_cell(jobs: int, cells: int) -> None:
    crowd = Crowd()
    tasks = [await crowd.start(f"job {number}") for number in range(jobs)]
    tasks += [await crowd.start(f"cell {number}", audits=3) for number in range(cells)]
    with pytest.raises(ReplicaTaken, match=f"^audit cells in flight here: {cells}$"):
        await crowd.use("too many", 3)
    # A replica has a slot for the job that is painted, one for the next job, and one for a cell.
    assert jobs + cells <= 2 or jobs > 1
    crowd.leave.set()
    await asyncio.gather(*tasks)
    assert crowd.slot.jobs == 0 and await crowd.place_is_free()


async def test_a_place_is_not_lost_with_whom_it_was_just_given_to() -> None:
    crowd = Crowd()
    first, gone, last = await crowd.start("first"), await crowd.start("gone"), await crowd.start("last")
    first.cancel()
    await asyncio.sleep(0)
    # It has been given the place by now, and has not run since.
    gone.cancel()
    crowd.leave.set()
    await last
    assert crowd.given == ["first", "last"] and await crowd.place_is_free()


async def test_nobody_is_given_a_place_while_the_seat_is_emptied() -> None:
    crowd = Crowd()
    tasks = [await crowd.start("a")]
    emptied = asyncio.create_task(crowd.place_is_free())
    await asyncio.sleep(0)
    tasks.append(await crowd.start("b"))
    assert not emptied.done() and crowd.given == ["a"]
    crowd.leave.set()
    assert await emptied
    await asyncio.gather(*tasks)
    assert crowd.given == ["a", "b"]


async def test_who_gives_up_emptying_leaves_the_place() -> None:
    crowd = Crowd()
    job = await crowd.start("job")
    emptied = asyncio.create_task(crowd.place_is_free())
    await asyncio.sleep(0)
    emptied.cancel()
    crowd.leave.set()
    await job
    assert await crowd.place_is_free()


class Restless(Crowd):
    """Jobs and cells that stay for some turns of the event loop. The one that holds the place is watched."""

    async def visit(self, audits: int | None, turns: int) -> None:
        is_audit = audits is not None
        async with self._seated(audits):
            self.painting, self.audits_painting = self.painting + 1, self.audits_painting + is_audit
            assert self.painting <= 1 and self.audits_painting <= 1 and self.slot.audits <= 2
            try:
                for _ in range(turns):
                    await asyncio.sleep(0)
            finally:
                self.painting, self.audits_painting = self.painting - 1, self.audits_painting - is_audit


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_the_place_is_not_lost_whoever_is_canceled_whenever(seed: int) -> None:
    async def run() -> None:
        chance, crowd, tasks = random.Random(seed), Restless(), list[asyncio.Task[None]]()
        for _ in range(60):
            cell = chance.choice([None, 1, 2])
            tasks.append(asyncio.create_task(crowd.visit(cell, chance.randrange(4))))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                chance.choice(tasks).cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, (asyncio.CancelledError, ReplicaTaken))
        assert (crowd.painting, crowd.audits_painting) == (0, 0)
        assert await crowd.place_is_free()

    asyncio.run(run())
