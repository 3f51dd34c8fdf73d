"""The places at an engine: which jobs are in its hands, since when, and how busy they have kept it.

A job is a painting for somebody, or a cell of an audit, which goes behind all of those.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager

from ..errors import Canceled, ReplicaTaken
from ..jobs import Progress


class Usage:
    """How busy an engine has been since its first painting began. Paintings at once count once. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs, self._in_hand, self._busy_s = 0, 0, 0.0
        self._busy_since = self._last_end = 0.0
        self._first_start: float | None = None

    @contextmanager
    def painting(self) -> Iterator[None]:
        """A job is painted inside; it counts among `jobs` where that raises nothing."""
        self._begin()
        done = 0
        try:
            yield
            done = 1
        finally:
            self._end(done)

    def as_dict(self) -> dict[str, float]:
        """`jobs` painted; `busy_s`, in which at least one was; `wall_s`, from the first's beginning to the last end."""
        with self._lock:
            began = self._last_end if self._first_start is None else self._first_start
            return {"jobs": self._jobs, "busy_s": self._busy_s, "wall_s": max(0.0, self._last_end - began)}

    def _begin(self) -> None:
        with self._lock:
            if not self._in_hand:
                self._busy_since = time.monotonic()
            if self._first_start is None:
                self._first_start = self._busy_since
            self._in_hand += 1

    def _end(self, done: int) -> None:
        with self._lock:
            self._last_end = time.monotonic()
            # What is busy still counts from here on, so that `busy_s` and `wall_s` end at the same moment.
            self._busy_s += self._last_end - self._busy_since
            self._busy_since = self._last_end
            self._in_hand, self._jobs = self._in_hand - 1, self._jobs + done


class Sitting:
    """One job at an engine: its latest progress on the way from the painting thread to the event loop (a slow reader
    sees the newest only), and whether anybody still wants it. Times are on the monotonic clock."""

    def __init__(self, *, is_audit: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self.is_audit = is_audit
        self._progress: Progress | None = None
        #: Since when it has been painted; None while it waits for its turn. Nothing is told before that.
        self.begun_at: float | None = None
        #: Since when it is to stop; None where it is not.
        self.stopping_since: float | None = None
        #: Whether the thread has ended and the place is somebody else's.
        self.is_over = False

    def begin(self) -> None:
        """For the thread: its turn has come, if it had not before."""
        if self.begun_at is None:
            self.begun_at = time.monotonic()
            self._loop.call_soon_threadsafe(self.wake)

    def rest(self) -> None:
        """For the thread: it waits for its turn. A cell's wait has no end while jobs come, and is no painting."""
        if self.is_audit:
            self.begun_at = None

    def check(self) -> None:
        """For the thread. Raises Canceled once nobody wants the painting any more."""
        if self.stopping_since is not None:
            raise Canceled("the painting was stopped")

    def report(self, progress: Progress) -> None:
        """For the thread. Raises as `check` does."""
        self.check()
        self._progress = progress
        self._loop.call_soon_threadsafe(self.wake)

    def stop(self) -> None:
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()

    def end(self) -> None:
        self.is_over = True
        self.wake()

    def wake(self) -> None:
        self._news.set()

    async def changed(self) -> None:
        await self._news.wait()
        self._news.clear()

    def take(self) -> Progress | None:
        if self.begun_at is None:
            return None
        progress, self._progress = self._progress, None
        return progress


class Places:
    """Given to those ahead before those behind, and among equals in the order in which they ask. For one event loop."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._ahead: deque[asyncio.Future[None]] = deque()
        self._behind: deque[asyncio.Future[None]] = deque()

    async def take(self, *, behind: bool = False) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        (self._behind if behind else self._ahead).append(turn)
        try:
            await turn
        except BaseException:
            # What cannot be canceled, and was not, has been given a place in this very moment.
            if not turn.cancel() and not turn.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        for waiting in (self._ahead, self._behind):
            while waiting:
                turn = waiting.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._free += 1


class Seat:
    """As many places as jobs may be in the engine's hands at once. Audit cells get one that nobody else waits for, for
    one painting, and one cell at a time is painted: each would slow the other's timed steps."""

    def __init__(self, places: int = 1) -> None:
        self._at_once, self._places = places, Places(places)
        self._audit_turn = asyncio.Lock()
        #: With what is to be undone when it leaves.
        self._sittings: dict[Sitting, ExitStack] = {}
        #: In hand: painted, or waiting to be.
        self.jobs = self.audits = 0
        #: Jobs that have been given a place, ever.
        self.jobs_seated = 0
        #: One for each place: asyncio's own threads may be fewer.
        self.threads = ThreadPoolExecutor(places, thread_name_prefix="painting")
        self.usage = Usage()

    @property
    def taken_since(self) -> float | None:
        """Since when the oldest of the paintings goes on; None while there is none. On the monotonic clock."""
        return min((one.begun_at for one in self._sittings if one.begun_at is not None), default=None)

    @property
    def stopping_since(self) -> float | None:
        """Since when a painting that was told to stop goes on; None while none does. On the monotonic clock."""
        return min((one.stopping_since for one in self._sittings if one.stopping_since is not None), default=None)

    async def take(self) -> Sitting:
        with ExitStack() as undo:
            self._count(jobs=1)
            undo.callback(self._count, jobs=-1)
            await self._places.take()
            undo.callback(self._places.give_back)
            self.jobs_seated += 1
            return self._sit(Sitting(), undo)

    @asynccontextmanager
    async def audited(self, most: int) -> AsyncIterator[None]:
        """An audit cell is in hand inside, from when no other is painted. Raises ReplicaTaken, at once, where as many
        are in hand as may be: up to `most` of what jobs leave of the places and one beside them, and one whatever jobs
        there are."""
        if self.audits >= min(most, max(1, self._at_once + 1 - self.jobs)):
            raise ReplicaTaken(f"audit cells in hand here: {self.audits}")
        with ExitStack() as undo:
            self._count(audits=1)
            undo.callback(self._count, audits=-1)
            async with self._audit_turn:
                yield

    async def take_behind(self) -> Sitting:
        """For one painting of the cell that is `audited`: behind all jobs that wait."""
        with ExitStack() as undo:
            await self._places.take(behind=True)
            undo.callback(self._places.give_back)
            return self._sit(Sitting(is_audit=True), undo)

    def leave(self, sitting: Sitting) -> None:
        self._sittings.pop(sitting).close()

    @asynccontextmanager
    async def emptied(self) -> AsyncIterator[None]:
        """When all jobs in hand have ended, and until this is left none begins. For one caller at a time."""
        with ExitStack() as undo:
            for _ in range(self._at_once):
                await self._places.take()
                undo.callback(self._places.give_back)
            yield

    def _sit(self, sitting: Sitting, undo: ExitStack) -> Sitting:
        self._sittings[sitting] = undo.pop_all()
        return sitting

    def _count(self, *, jobs: int = 0, audits: int = 0) -> None:
        self.jobs, self.audits = self.jobs + jobs, self.audits + audits
