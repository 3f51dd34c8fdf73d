"""An audit's cell in a replica: one request painted several times, each painting timed stage by stage."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from ..audits import Trial
from ..images import Pixels
from ..jobs import Progress
from ..ports import Measured, Painted, PaintRequest
from . import Engine, JobEngine, Window
from .canvas import at_seat, clock_s, nobody_counts, paint_canvas
from .seat import Seat, Sitting

STAGES = ("prepare_s", "denoise_s", "decode_s")


def split(began_s: float, steps_s: Sequence[float], ended_s: float) -> dict[str, float]:
    """Seconds of a window's STAGES, from the moments at which it began, each of its steps ended, and it was painted.

    The first step is taken to be as long as the median of the others; what comes before it is preparing. Where there is
    one step, that cannot be told from preparing, and both are denoising; where there is none, everything is.
    """
    steps_s = steps_s or [ended_s]
    step_s = median(after - before for before, after in pairwise(steps_s)) if len(steps_s) > 1 else np.inf
    prepared_s = max(began_s, steps_s[0] - step_s)
    return dict(zip(STAGES, (prepared_s - began_s, steps_s[-1] - prepared_s, ended_s - steps_s[-1]), strict=True))


async def measuring(
    engine: Engine,
    request: PaintRequest,
    seat: Seat,
    trials: int,
    places: int,
    on_out_of_memory: Callable[[], None] = nobody_counts,
) -> AsyncGenerator[Progress | Measured, None]:
    """Paint the request `trials` times, 1 or more, each as `at_seat` runs it: yields the progress over all of them, and
    at last the one Measured. It does not count in the seat's usage. The first painting is what a cold replica's first
    one with these parameters is, where nothing painted with them before.

    All paintings that are no audit's go first. The place is given back between two trials, so that a job waits for one
    of them at most. The trial after a job came may be colder than those before: the first such one of a cell is painted
    once more, and later ones count, so that the cell ends under any load. A trial in which a window was begun again
    after it ran out of memory has both in its `wall_s`, and the one that was painted in its stages.

    Raises ReplicaTaken, at once, where as many audit cells are in hand at the seat as may be, `places` at most;
    otherwise as `paint_canvas`. Stopped as `at_seat` is.
    """
    cell = _Cell(trials)

    async def take() -> Sitting:
        sitting = await seat.take_behind()
        cell.begin(seat.jobs_seated)
        return sitting

    def work(one: JobEngine, sitting: Sitting) -> tuple[Painted, Trial, int]:
        return *_trial(one, request, sitting.report, on_out_of_memory), seat.jobs_seated

    async with seat.audited(places):
        while not cell.is_over:
            async with aclosing(at_seat(engine, request, seat, take, work)) as events:
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
        self._last: Painted | None = None
        self._repeats = True
        self._jobs_seated = 0
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
            canvas=self._last.canvas,
            trials=self._done,
            repeats=self._repeats,
            where=self._last.where,
            windows=self._last.windows,
        )

    def begin(self, jobs_seated: int) -> None:
        """The next painting, when so many jobs have been given a place."""
        # The engine keeps what it worked out for the steps of the job before, such as modulation's rows.
        is_colder = bool(self._done) and jobs_seated > self._jobs_seated
        self._counts = self._was_colder or not is_colder
        self._was_colder = self._was_colder or is_colder

    def progress(self, one: Progress) -> Progress:
        """Over all trials, from that of the painting that has begun. One that does not count stands still."""
        step = len(self._done) * one.steps + (one.step if self._counts else 0)
        return Progress(step=step, steps=self._wanted * one.steps)

    def add(self, painted: Painted, timed: Trial, jobs_seated: int) -> None:
        """What was painted, and how many jobs had been given a place by then."""
        self._jobs_seated = jobs_seated
        self._repeats = self._repeats and (self._last is None or np.array_equal(painted.canvas, self._last.canvas))
        self._last = painted
        if self._counts:
            self._done.append(timed)


def _trial(
    engine: JobEngine,
    request: PaintRequest,
    on_step: Callable[[Progress], None],
    on_out_of_memory: Callable[[], None],
) -> tuple[Painted, Trial]:
    timed = _Timed(engine)
    # Earlier peaks are not this trial's.
    engine.peak_memory()
    painted = paint_canvas(timed, request, on_step, on_out_of_memory)
    peak_bytes, reserved_bytes = engine.peak_memory() or (None, None)
    return painted, Trial(
        wall_s=painted.busy_s,
        gpu_ms=painted.gpu_ms,
        stages=timed.stages,
        peak_bytes=peak_bytes,
        reserved_bytes=reserved_bytes,
    )


class _Timed:
    """An engine that takes the time of what it paints."""

    def __init__(self, engine: JobEngine) -> None:
        self._engine = engine
        self._windows: list[Mapping[str, float]] = []

    @property
    def stages(self) -> dict[str, float]:
        """Of all windows that were painted."""
        return {stage: sum(window[stage] for window in self._windows) for stage in STAGES}

    def paint(self, window: Window) -> Pixels:
        steps_s: list[float] = []

        def on_step(step: int) -> None:
            steps_s.append(time.perf_counter())
            window.on_step(step)

        began_s, began_clock_s = time.perf_counter(), clock_s(self._engine)
        painted = self._engine.paint(replace(window, on_step=on_step))
        ended_s = time.perf_counter()
        # The turn comes before the first step: what was waited for it is no stage.
        waited_s = max(0.0, ended_s - began_s - (clock_s(self._engine) - began_clock_s))
        self._windows.append(split(began_s + waited_s, steps_s, ended_s))
        return painted

    def free_memory(self) -> None:
        self._engine.free_memory()

    def device_ms(self) -> float | None:
        return self._engine.device_ms()

    def peak_memory(self) -> tuple[int, int] | None:
        return self._engine.peak_memory()

    def clock_s(self) -> float:
        return clock_s(self._engine)

    def describe(self) -> Mapping[str, Any]:
        return self._engine.describe()
