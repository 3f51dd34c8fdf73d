"""An engine's one slot: which painting has it, since when, and how busy jobs have kept it.

A painting is a job's, or an audit cell's, which goes behind those of all jobs.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

from .. import tracing
from ..errors import Canceled, ReplicaTaken
from ..models import Progress


class Usage:
    """How busy an engine has been since its first painting began. For any thread."""

    def __init__(self, on_painted: Callable[[float], None] | None = None) -> None:
        """`on_painted` is called after each painting, in its thread, with the seconds that it took."""
        self._jobs, self._busy_s = 0, 0.0
        self._on_painted = on_painted
        self._first_start: float | None = None
        self._last_end = 0.0

    @contextmanager
    def painting(self) -> Iterator[None]:
        """A job is painted inside; it counts among `jobs` where that raises nothing."""
        began = time.monotonic()
        if self._first_start is None:
            self._first_start = began
        done = 0
        try:
            yield
            done = 1
        finally:
            self._last_end = time.monotonic()
            self._busy_s += self._last_end - began
            self._jobs += done
            if self._on_painted:
                self._on_painted(self._last_end - began)

    def as_dict(self) -> dict[str, float]:
        """`jobs` painted; `busy_s`, spent on them; `wall_s`, from the first's beginning to the last end."""
        began = self._last_end if self._first_start is None else self._first_start
        return {"jobs": self._jobs, "busy_s": self._busy_s, "wall_s": max(0.0, self._last_end - began)}


class Occupancy:
    """One painting at an engine: its latest progress on the way from the painting thread to the event loop (a slow
    reader sees the newest only), and whether it is still wanted. Times are on the monotonic clock."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._progress: Progress | None = None
        self.begun_at = time.monotonic()
        #: Since when it is to stop; None where it is not.
        self.stopping_since: float | None = None
        self._over = asyncio.Event()

    def report(self, progress: Progress) -> None:
        """For the thread. Raises Canceled once the painting is to stop."""
        if self.stopping_since is not None:
            raise Canceled("the painting was stopped")
        tracing.step(progress.step, progress.steps)
        self._progress = progress
        self._loop.call_soon_threadsafe(self.wake)

    def stop(self) -> None:
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the thread has ended and the slot is free."""
        return self._over.is_set()

    def end(self) -> None:
        self._over.set()
        self.wake()

    async def ends_within(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()

    def wake(self) -> None:
        self._news.set()

    async def changed(self) -> None:
        await self._news.wait()
        self._news.clear()

    def take(self) -> Progress | None:
        progress, self._progress = self._progress, None
        return progress


class PriorityLock:
    """A lock that is given to those ahead before those behind, and among equals in the order in which they ask. For one
    event loop."""

    def __init__(self) -> None:
        self._is_free = True
        self._ahead: deque[asyncio.Future[None]] = deque()
        self._behind: deque[asyncio.Future[None]] = deque()

    async def acquire(self, *, behind: bool = False) -> None:
        if self._is_free:
            self._is_free = False
            return
        turn = asyncio.get_running_loop().create_future()
        (self._behind if behind else self._ahead).append(turn)
        try:
            await turn
        except BaseException:
            # What cannot be canceled, and was not, has been given the lock in this very moment.
            if not turn.cancel() and not turn.cancelled():
                self.release()
            raise

    def release(self) -> None:
        for waiting in (self._ahead, self._behind):
            while waiting:
                turn = waiting.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._is_free = True


class Slot:
    """One painting at a time, because a pipeline keeps state between steps. Audit cells acquire it behind all jobs, one
    cell after the other, and each for one painting at a time."""

    def __init__(self, on_painted: Callable[[float], None] | None = None) -> None:
        """`on_painted`: as in Usage."""
        self._lock = PriorityLock()
        self._audit_turn = asyncio.Lock()
        self._occupancy: Occupancy | None = None
        #: What is undone when it leaves.
        self._undo = ExitStack()
        #: In flight: painted, or waiting to be.
        self.jobs = self.audits = 0
        #: Jobs that have ever been given the slot.
        self.jobs_begun = 0
        #: Its own: asyncio's threads may all be taken.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="painting")
        self.usage = Usage(on_painted)

    @property
    def taken_since(self) -> float | None:
        """Since when the painting goes on; None while there is none. On the monotonic clock."""
        return self._occupancy.begun_at if self._occupancy else None

    @property
    def stopping_since(self) -> float | None:
        """Since when a painting that was told to stop goes on; None while none does. On the monotonic clock."""
        return self._occupancy.stopping_since if self._occupancy else None

    async def acquire(self) -> Occupancy:
        with ExitStack() as undo:
            self._count(jobs=1)
            undo.callback(self._count, jobs=-1)
            await self._lock.acquire()
            undo.callback(self._lock.release)
            self.jobs_begun += 1
            return self._occupy(undo)

    @asynccontextmanager
    async def audit_cell(self, most: int) -> AsyncIterator[None]:
        """An audit cell is in flight inside, from when no other is painted. Raises ReplicaTaken, at once, where as many
        are in flight as may be: up to `most` of what jobs leave of the slot and one beside it, and one however many
        jobs there are."""
        if self.audits >= min(most, max(1, 2 - self.jobs)):
            raise ReplicaTaken(f"audit cells in flight here: {self.audits}")
        with ExitStack() as undo:
            self._count(audits=1)
            undo.callback(self._count, audits=-1)
            async with self._audit_turn:
                yield

    async def acquire_behind(self) -> Occupancy:
        """For one painting of an `audit_cell`: behind all jobs that wait."""
        with ExitStack() as undo:
            await self._lock.acquire(behind=True)
            undo.callback(self._lock.release)
            return self._occupy(undo)

    def release(self) -> None:
        self._occupancy = None
        self._undo.close()

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Entered when the painting has ended; none begins inside."""
        await self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _occupy(self, undo: ExitStack) -> Occupancy:
        self._occupancy, self._undo = Occupancy(), undo.pop_all()
        return self._occupancy

    def _count(self, *, jobs: int = 0, audits: int = 0) -> None:
        self.jobs, self.audits = self.jobs + jobs, self.audits + audits
