"""An audit's cell in a replica: one request painted several times, each painting timed stage by stage."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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


def measure(
    engine: JobEngine,
    request: PaintRequest,
    trials: int,
    on_step: Callable[[Progress], None],
    on_out_of_memory: Callable[[], None] = nobody_counts,
    on_trial: Callable[[], None] = lambda: None,
) -> Measured:
    """Paint the request `trials` times, 1 or more, with `on_trial` called before each. The first one is what a cold
    replica's first painting with these parameters is, where nothing painted with them before.

    `on_step` gets the progress over all trials, else as in `paint_canvas`. A trial in which a window was begun again
    after it ran out of memory has both in its `wall_s`, and the one that was painted in its stages. Raises as
    `paint_canvas` does.
    """

    def trial(number: int) -> tuple[Painted, Trial]:
        def advance(one: Progress) -> None:
            on_step(Progress(step=number * one.steps + one.step, steps=trials * one.steps))

        on_trial()
        return _trial(engine, request, advance, on_out_of_memory)

    last, first = trial(0)
    done, repeats = [first], True
    for number in range(1, trials):
        painted, timed = trial(number)
        repeats = repeats and np.array_equal(painted.canvas, last.canvas)
        last = painted
        done.append(timed)
    return Measured(canvas=last.canvas, trials=done, repeats=repeats, where=last.where, windows=last.windows)


def measuring(
    engine: Engine,
    request: PaintRequest,
    seat: Seat,
    trials: int,
    places: int,
    on_out_of_memory: Callable[[], None] = nobody_counts,
) -> AsyncGenerator[Progress | Measured, None]:
    """`measure` as `at_seat` runs it, behind all paintings. It does not count in the seat's usage.

    Also raises ReplicaTaken, at once, where `places` audit cells are in hand at the seat already.
    """

    def work(one: JobEngine, sitting: Sitting) -> Measured:
        return measure(one, request, trials, sitting.report, on_out_of_memory, sitting.begin_another)

    return at_seat(engine, request, seat, partial(seat.take_behind, places), work)


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
