"""Paints windows of several jobs in one batch, where that is cheaper. A job sees an engine of its own: its `Place`.

One thread paints. It begins when every job that has a place waits for it: a job that does not is pasting its last
window, which takes milliseconds, and its next one may be a partner. The oldest job's window goes next, and with it
those of other jobs that are alike, in as large a batch as pays. Jobs that are not in hand yet are not waited for. Those
that are painted alone, an audit's cells, go behind all others.

Each window's picture goes to the future that its own job waits for, and to nothing else.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from ..errors import GpuLost, OutOfMemory
from ..images import Pixels
from ..settings import Levers
from ..variants import Variant
from . import Engine, Window, batch_cost

log = logging.getLogger(__name__)


@runtime_checkable
class Batching(Protocol):
    """An engine that can paint several windows in one batch."""

    def paint_together(self, windows: Sequence[Window]) -> list[Pixels]:
        """Windows of one size, steps, guidance scale and prompt length, painted in their order. Raises as
        `Engine.paint` does; what any `on_step` raises ends all."""

    def warm_up_batch(self, width: int, height: int, windows: int) -> None:
        """As `Engine.warm_up`, for a batch of so many windows of one size. Also raises OutOfMemory."""


class _NobodyWants(Exception):
    """Ends a batch none of whose jobs wait any more."""


class Place:
    """One job's engine: what `Engine` says of these methods holds. For the job's own thread."""

    def __init__(
        self,
        together: "Together",
        check: Callable[[], None],
        begin: Callable[[], None],
        rest: Callable[[], None],
        *,
        alone: bool,
    ) -> None:
        self._together = together
        self.check, self.begin, self._rest = check, begin, rest
        #: Whether its windows are never painted in a batch, and go behind all that others wait for.
        self.is_alone = alone
        self.waiting: _Waiting | None = None
        #: Whether memory is to be freed before its next window, which then has it to itself.
        self.is_short_of_memory = False
        self._device_ms = self._waited_s = 0.0

    def paint(self, window: Window) -> Pixels:
        """Waits for its turn; raises what `check` raises meanwhile, at the latest after a step of those that paint."""
        self._rest()
        waiting = _Waiting(self, window)
        self._together.offer(waiting)
        return waiting.painted.result()

    def free_memory(self) -> None:
        """At the turn of the job's next window, which is painted by itself. Returns at once: others are painted now,
        and a job that waited for them here could not be canceled."""
        self.is_short_of_memory = True

    def device_ms(self) -> float | None:
        """The job's part of its batches' device time, which they share equally."""
        return None if self._together.device_ms() is None else self._device_ms

    def peak_memory(self) -> tuple[int, int] | None:
        """Of all jobs in hand."""
        return self._together.peak_memory()

    def clock_s(self) -> float:
        return time.perf_counter() - self._waited_s

    def describe(self) -> Mapping[str, Any]:
        return self._together.describe()

    def add(self, *, waited_s: float, device_ms: float) -> None:
        self._waited_s += waited_s
        self._device_ms += device_ms


class _Waiting:
    """A window that waits to be painted, then is."""

    def __init__(self, place: Place, window: Window) -> None:
        self.place, self.window = place, window
        self.painted: Future[Pixels] = Future()
        #: Since when it has not been painted.
        self.since_s = time.perf_counter()

    def is_like(self, other: "_Waiting") -> bool:
        return self._kind == other._kind

    @property
    def size_px(self) -> tuple[int, int]:
        """Width, height."""
        height, width = self.window.mask.shape
        return width, height

    @property
    def _kind(self) -> tuple[object, ...]:
        # Embeddings of as many bytes are of as many tokens.
        prompt_bytes = None if self.window.embeddings is None else len(self.window.embeddings)
        only = self if self.place.is_short_of_memory or self.place.is_alone else None
        return self.size_px, self.window.steps, self.window.guidance_scale, prompt_bytes, only

    def ask(self, call: Callable[[], None]) -> None:
        """What `call` raises is the job's end, at once, and nobody else's."""
        if self.painted.done():
            return
        try:
            call()
        except Exception as e:
            self.painted.set_exception(e)

    def fail(self, error: Exception) -> None:
        if not self.painted.done():
            self.painted.set_exception(error)

    def succeed(self, pixels: Pixels) -> None:
        if not self.painted.done():
            self.painted.set_result(pixels)


class Together:
    """An Engine in front of one that can batch (any other paints window by window), for as many callers at once as
    there are: each in a `place` of its own."""

    def __init__(self, engine: Engine, variant: Variant, levers: Levers) -> None:
        self._engine, self._variant, self._levers = engine, variant, levers
        #: Jobs that it is worth having in hand at once.
        self.places = levers.max_batch
        self._device = ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._lock = threading.Lock()
        #: Oldest first.
        self._places: list[Place] = []
        self._is_painting = False
        #: By size, of those that ran out of memory in a batch: the windows that may still be tried together.
        self._most_windows: dict[tuple[int, int], int] = {}
        self._batches, self._windows = 0, 0

    def load(self) -> None:
        self._engine.load()
        self._device = str(self._engine.describe()["device"])
        if not batch_cost.is_known(self._device):
            extra = {"action": "batching_off", "device": self._device}
            log.warning("Nothing is painted together: nobody knows what %s costs", self._device, extra=extra)

    def warm_up(self, buckets: Sequence[tuple[int, int]]) -> None:
        """Also each batch that pays, where each is compiled by itself."""
        self._engine.warm_up(buckets)
        if self._levers.compile and isinstance(self._engine, Batching):
            for size_px in buckets:
                self._warm_up_batches(self._engine, size_px)

    @contextmanager
    def place(
        self,
        check: Callable[[], None] = lambda: None,
        begin: Callable[[], None] = lambda: None,
        rest: Callable[[], None] = lambda: None,
        *,
        alone: bool = False,
    ) -> Iterator[Place]:
        """For one job. `check` raises once nobody wants it; `begin` is called when its first turn has come, and may be
        again. Both are called in the engine's thread, and must be quick. `rest` is called in the job's own, before it
        waits for a turn. `alone`: in no batch with others, and behind them."""
        place = Place(self, check, begin, rest, alone=alone)
        with self._lock:
            self._places.append(place)
        try:
            yield place
        finally:
            with self._lock:
                self._places.remove(place)
                self._go_on()

    def paint(self, window: Window) -> Pixels:
        with self.place() as place:
            return place.paint(window)

    def free_memory(self) -> None:
        """Between two paintings. Not for the engine's thread, which it waits for."""
        self._thread.submit(self._engine.free_memory).result()

    def device_ms(self) -> float | None:
        return self._engine.device_ms()

    def peak_memory(self) -> tuple[int, int] | None:
        return self._engine.peak_memory()

    def describe(self) -> Mapping[str, Any]:
        """The engine's, and `together`: how many `batches` of several windows there were, and the `windows` in them."""
        return {**self._engine.describe(), "together": {"batches": self._batches, "windows": self._windows}}

    def close(self) -> None:
        """As `free_memory`: a job that was canceled has left before its painting ends."""
        self._thread.submit(self._engine.close).result()

    def offer(self, waiting: _Waiting) -> None:
        """From the place's own job: paint this when its turn has come."""
        with self._lock:
            waiting.place.waiting = waiting
            self._go_on()

    def _go_on(self) -> None:
        if not self._is_painting and self._places and all(place.waiting for place in self._places):
            self._is_painting = True
            self._thread.submit(self._paint_next)

    def _paint_next(self) -> None:
        with self._lock:
            batch = self._take()
        try:
            self._paint(batch)
        finally:
            with self._lock:
                self._is_painting = False
                self._go_on()

    def _take(self) -> list[_Waiting]:
        """The oldest job's window and its partners."""
        queue = self._queue()
        alike = [one for one in queue if one.is_like(queue[0])]
        batch = alike[: self._most(queue[0].size_px, len(alike))]
        for one in batch:
            one.place.waiting = None
        return batch

    def _most(self, size_px: tuple[int, int], there_are: int) -> int:
        if not isinstance(self._engine, Batching):
            return 1
        most = min(there_are, self._most_windows.get(size_px, there_are))
        return max((size for size in self._paying(size_px) if size <= most), default=1)

    def _paying(self, size_px: tuple[int, int]) -> Sequence[int]:
        return batch_cost.sizes(*size_px, self._variant, self._levers, self._device)

    def _warm_up_batches(self, engine: Batching, size_px: tuple[int, int]) -> None:
        for windows in self._paying(size_px):
            try:
                engine.warm_up_batch(*size_px, windows)
            except OutOfMemory:
                self._halve(size_px, windows)
                self.free_memory()
                return

    def _queue(self) -> list[_Waiting]:
        waiting = [place.waiting for place in self._places if place.waiting]
        return sorted(waiting, key=lambda one: one.place.is_alone)

    def _paint(self, batch: Sequence[_Waiting]) -> None:
        try:
            self._begin(batch)
            with self._shared(batch):
                self._free_if_short(batch)
                pictures = self._run(batch)
        except _NobodyWants:
            return
        except Exception as e:
            self._fail(batch, e)
            return
        for one, picture in zip(batch, pictures, strict=True):
            one.succeed(picture)

    def _fail(self, batch: Sequence[_Waiting], error: Exception) -> None:
        if len(batch) > 1 and not isinstance(error, (OutOfMemory, GpuLost)):
            # One job's prompt may be at fault, and the others are not to pay for it.
            for one in batch:
                self._paint([one])
            return
        if len(batch) > 1 and isinstance(error, OutOfMemory):
            self._halve(batch[0].size_px, len(batch))
        for one in batch:
            one.fail(error)

    def _halve(self, size_px: tuple[int, int], windows: int) -> None:
        """So many windows of this size did not fit: from now on, half of them at most."""
        most = self._most_windows[size_px] = windows // 2
        extra = {"action": "batch_too_large", "size": f"{size_px[0]}x{size_px[1]}", "windows": windows, "most": most}
        log.warning("%d windows of %dx%d do not fit together: now %d at most", windows, *size_px, most, extra=extra)

    def _begin(self, batch: Sequence[_Waiting]) -> None:
        for one in batch:
            one.ask(one.place.check)
            one.place.begin()
        _stop_unless_wanted(batch)

    def _free_if_short(self, batch: Sequence[_Waiting]) -> None:
        if batch[0].place.is_short_of_memory:
            batch[0].place.is_short_of_memory = False
            self._engine.free_memory()

    def _run(self, batch: Sequence[_Waiting]) -> Sequence[Pixels]:
        if isinstance(self._engine, Batching):
            return self._engine.paint_together(
                [replace(one.window, on_step=partial(self._step, batch, one)) for one in batch]
            )
        (only,) = batch
        return [self._engine.paint(replace(only.window, on_step=partial(self._step, batch, only)))]

    def _step(self, batch: Sequence[_Waiting], one: _Waiting, step: int) -> None:
        """One window's `on_step`. Also the moment at which those that wait may leave."""
        one.ask(partial(one.window.on_step, step))
        with self._lock:
            for other in self._queue():
                other.ask(other.place.check)
                if other.painted.done():
                    other.place.waiting = None
        _stop_unless_wanted(batch)

    @contextmanager
    def _shared(self, batch: Sequence[_Waiting]) -> Iterator[None]:
        """Counts what is painted inside towards its jobs."""
        started_s, started_ms = time.perf_counter(), self._engine.device_ms() or 0.0
        try:
            yield
        finally:
            used_ms = (self._engine.device_ms() or 0.0) - started_ms
            for one in batch:
                one.place.add(waited_s=started_s - one.since_s, device_ms=used_ms / len(batch))
                one.since_s = time.perf_counter()
            if len(batch) > 1:
                self._batches, self._windows = self._batches + 1, self._windows + len(batch)


def _stop_unless_wanted(batch: Sequence[_Waiting]) -> None:
    if all(one.painted.done() for one in batch):
        raise _NobodyWants
