"""An audit's cell in a replica: one request painted several times."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import numpy as np

from ..models import EditRequest, Images, Measured, Progress, Trial
from . import Engine
from .painting import in_slot, not_counted, paint_canvas
from .slot import Occupancy, Slot


async def measuring(
    engine: Engine,
    request: EditRequest,
    slot: Slot,
    trials: int,
    places: int,
    on_out_of_memory: Callable[[], None] = not_counted,
) -> AsyncGenerator[Progress | Measured, None]:
    """Paint the request `trials` times, 1 or more, each as `in_slot` runs it: yields the progress over all of them, and
    at last the one Measured. It does not count in the slot's usage. The first painting is what a cold replica's first
    one with these parameters is, where nothing painted with them before.

    All paintings that are no audit's go first. The place is given back between two trials, so that a job waits for one
    of them at most. The trial after a job came may be colder than those before: the first such one of a cell is painted
    once more, and later ones count, so that the cell ends under any load. A trial in which a window was begun again
    after it ran out of memory has both in its `wall_s`, and the one that was painted in its stages.

    Raises ReplicaTaken, at once, where as many audit cells are in flight at the slot as may be, `places` at most;
    otherwise as `paint_canvas`. Stopped as `in_slot` is.
    """
    cell = _Cell(trials)

    async def take() -> Occupancy:
        occupancy = await slot.acquire_behind()
        cell.begin(slot.jobs_begun)
        return occupancy

    def work(occupancy: Occupancy) -> tuple[Images, int]:
        return paint_canvas(engine, request, occupancy.report, on_out_of_memory), slot.jobs_begun

    async with slot.audit_cell(places):
        while not cell.is_over:
            async with aclosing(in_slot(request, slot, take, work)) as events:
                async for event in events:
                    if isinstance(event, Progress):
                        yield cell.progress(event)
                    else:
                        cell.add(*event)
    yield cell.measured


class _Cell:
    """What its paintings have come to so far."""

    def __init__(self, trials: int) -> None:
        self._wanted, self._done = trials, list[Trial]()
        self._last: Images | None = None
        self._repeats = True
        self._jobs_begun = 0
        #: Whether the painting that has begun is a trial, and whether one was not.
        self._counts, self._was_colder = True, False

    @property
    def is_over(self) -> bool:
        return len(self._done) == self._wanted

    @property
    def measured(self) -> Measured:
        """Once it is over."""
        assert self._last is not None
        return Measured(
            canvas=self._last.images[0],
            trials=self._done,
            repeats=self._repeats,
            where=self._last.where,
            windows=self._last.windows,
        )

    def begin(self, jobs_begun: int) -> None:
        """The next painting, when so many jobs have been given a place."""
        # The engine keeps what it worked out for the steps of the job before, such as modulation's rows.
        is_colder = bool(self._done) and jobs_begun > self._jobs_begun
        self._counts = self._was_colder or not is_colder
        self._was_colder = self._was_colder or is_colder

    def progress(self, one: Progress) -> Progress:
        """Over all trials, from that of the painting that has begun. One that does not count stands still."""
        step = len(self._done) * one.steps + (one.step if self._counts else 0)
        return Progress(step=step, steps=self._wanted * one.steps)

    def add(self, painted: Images, jobs_begun: int) -> None:
        """What was painted, and how many jobs had been given a place by then."""
        self._jobs_begun = jobs_begun
        self._repeats = self._repeats and (self._last is None or np.array_equal(painted.images, self._last.images))
        self._last = painted
        if self._counts:
            self._done.append(
                Trial(
                    wall_s=painted.busy_s,
                    gpu_ms=painted.gpu_ms,
                    stages=painted.stages,
                    peak_bytes=painted.peak_bytes,
                    reserved_bytes=painted.reserved_bytes,
                )
            )
