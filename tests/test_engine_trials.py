"""What an audit's cell is measured to take: on engines that work by a clock of the test's own, and on the real one."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine import Engine, Window
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.painting import not_counted, paint_canvas, painting
from serve_app.engine.pause import Pause
from serve_app.engine.slot import Slot
from serve_app.engine.stages import STAGES, split
from serve_app.engine.telea import Telea
from serve_app.engine.trials import measuring
from serve_app.errors import OutOfMemory, ReplicaTaken
from serve_app.models import Box, EditRequest, Measured, Pixels, Progress, Variant
from serve_app.settings import VariantSettings

from .backends import until
from .engine_fixtures import SIDE, flux_fill, request

LEFT, RIGHT = Box(x0=0, y0=0, x1=80, y1=SIDE), Box(x0=48, y0=0, x1=SIDE, y1=SIDE)
CORNER = Box(x0=0, y0=0, x1=16, y1=16)
QUICK = Variant(family="pause", pause_s=0)


def stages(*seconds: float) -> dict[str, float]:
    return dict(zip(STAGES, seconds, strict=True))


# -- a window's stages


def test_what_comes_before_a_first_step_as_long_as_the_others_is_preparing() -> None:
    assert split(100.0, [107.0, 109.0, 111.0, 113.0], 116.0) == stages(5.0, 8.0, 3.0)
    # The median: one step that was held up tells nothing of the first.
    assert split(100.0, [107.0, 109.0, 119.0, 121.0], 121.0) == stages(5.0, 16.0, 0.0)


def test_a_first_step_shorter_than_the_others_leaves_nothing_to_preparing() -> None:
    assert split(100.0, [101.0, 104.0, 107.0], 108.0) == stages(0.0, 7.0, 1.0)


def test_one_step_cannot_be_told_from_preparing_and_none_from_anything() -> None:
    assert split(100.0, [107.0], 109.0) == stages(0.0, 7.0, 2.0)
    assert split(100.0, [], 109.0) == stages(0.0, 9.0, 0.0)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12).map(sorted))
def test_stages_are_never_negative_and_add_up(moments: list[int]) -> None:
    began_s, *steps_s, ended_s = moments
    found = split(began_s, steps_s, ended_s)
    assert min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx(ended_s - began_s)


# -- trials by the clock


def events(
    engine: Engine, request: EditRequest, trials: int, on_out_of_memory: Callable[[], None] = not_counted
) -> list[Any]:
    """All that a cell at a slot of its own tells."""

    async def run() -> list[Any]:
        return await all_of(measuring(engine, request, Slot(), trials, 1, on_out_of_memory))

    return asyncio.run(run())


def measure(
    engine: Engine, request: EditRequest, trials: int, on_out_of_memory: Callable[[], None] = not_counted
) -> Measured:
    measured: Measured = events(engine, request, trials, on_out_of_memory)[-1]
    return measured


class Clockwork(Pause):
    """Takes 3 s to prepare a window, 2 s for a step, 1 s to decode, and 50 s more the first time; its device is at work
    for the steps. Says that it is a GPU of which every window takes more memory than the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(Variant(family="pause", pause_s=0), None, VariantSettings())
        self.now_s, self.ms, self.painted, self.peak_bytes = 1000.0, 0.0, 0, 7_000
        self.script: Callable[[int], None] = lambda step: None
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)

    def device_ms(self) -> float:  # type: ignore[override]  # Pause has none.
        return self.ms

    def peak_memory(self) -> tuple[int, int]:  # type: ignore[override]  # Pause has none.
        peak, self.peak_bytes = self.peak_bytes, 0
        return peak, 2 * peak

    def paint(self, window: Window) -> Pixels:
        self.painted += 1
        self.now_s += 3 if self.painted > 1 else 53
        for step in range(1, window.steps + 1):
            self.now_s += 2
            self.ms += 2000
            self.script(step)
            window.on_step(step)
        self.now_s += 1
        self.peak_bytes = max(self.peak_bytes, 100 * self.painted)
        return np.full_like(window.pixels, 9)


def test_each_trial_has_its_own_times_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    *told, measured = events(Clockwork(monkeypatch), request(windows=[LEFT, RIGHT, CORNER], steps=4), 3)
    assert [one.wall_s for one in measured.trials] == [74.0, 24.0, 24.0]
    assert [one.gpu_ms for one in measured.trials] == [16_000.0] * 3
    assert [one.stages for one in measured.trials] == [stages(56, 16, 2), stages(6, 16, 2), stages(6, 16, 2)]
    assert [(one.peak_bytes, one.reserved_bytes) for one in measured.trials] == [(200, 400), (400, 800), (600, 1200)]
    # The newest only, where the reader is slow.
    assert told == sorted(told, key=lambda progress: progress.step) and told[-1] == Progress(step=24, steps=24)
    assert {progress.steps for progress in told} == {24}
    # Nothing of the corner is to be painted.
    assert measured.windows == [LEFT, RIGHT]
    assert measured.repeats and measured.where["compute_capability"] == "N/A"


def test_one_trial_is_a_measurement_too(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure(Clockwork(monkeypatch), request(steps=4), 1)
    assert [one.wall_s for one in measured.trials] == [62.0] and measured.repeats


def test_a_window_begun_again_for_want_of_memory_counts_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, counted = Clockwork(monkeypatch), list[str]()

    def fail_once(step: int) -> None:
        if engine.painted == 2 and step == 2:
            raise OutOfMemory("no memory left")

    engine.script = fail_once
    measured = measure(engine, request(steps=4), 2, lambda: counted.append("once"))
    assert counted == ["once"]
    assert measured.trials[1].wall_s == 3 + 2 * 2 + 12
    assert measured.trials[1].stages == stages(3, 8, 1)


def test_pictures_that_differ_do_not_repeat() -> None:
    class Drifting(Pause):
        painted = 0

        def paint(self, window: Window) -> Pixels:
            self.painted += 1
            return np.full_like(window.pixels, min(self.painted, 2))

    engine = Drifting(Variant(family="pause"), None, VariantSettings())
    measured = measure(engine, request(), 3)
    assert not measured.repeats
    # The last one's, which is like the one before it.
    assert np.array_equal(measured.canvas, paint_canvas(engine, request(), lambda progress: None).images[0])


def test_without_a_gpu_and_without_steps_nothing_is_invented() -> None:
    engine = Telea(Variant(family="telea"), None, VariantSettings())
    *told, measured = events(engine, request(windows=[LEFT, RIGHT], steps=5), 2)
    for one in measured.trials:
        assert one.gpu_ms is one.peak_bytes is one.reserved_bytes is None
        assert one.stages["prepare_s"] == 0 and 0 < one.stages["denoise_s"] <= one.wall_s
    assert told[-1] == Progress(step=20, steps=20) and measured.repeats


def test_the_real_pipeline_is_measured_and_repeats(tiny: TinyWeights, embeddings: bytes) -> None:
    engine = flux_fill(tiny)
    engine.load()
    given = request(embeddings=embeddings, steps=3)
    measured = measure(engine, given, 2)
    engine.close()
    assert measured.repeats and len(measured.trials) == 2
    for one in measured.trials:
        assert one.gpu_ms is one.peak_bytes is None
        # Preparing is told from the first step by the other steps' median, which a busy machine may stretch beyond it.
        assert min(one.stages["denoise_s"], one.stages["decode_s"]) > 0 <= one.stages["prepare_s"]
        assert sum(one.stages.values()) <= one.wall_s
    assert measured.where["versions"]["torch"]


def test_peak_memory_begins_anew_each_time_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from serve_app.engine.device import Device

    device, calls = Device(wants_gpu=False), list[str]()
    assert device.peak_memory() is None
    device.is_gpu = True
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 8)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    assert device.peak_memory() == (5, 8) and calls == ["reset"]


# -- at a slot, with others


class Stopped(Pause):
    """Stops before each step until the test lets it go on; notes whose windows it begins with, by their seed."""

    def __init__(self) -> None:
        super().__init__(Variant(family="pause", pause_s=0), None, VariantSettings())
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.begun: list[int] = []
        self.steps = 0

    def paint(self, window: Window) -> Pixels:
        self.begun.append(window.seed)
        for step in range(1, window.steps + 1):
            self.steps += 1
            self.entered.set()
            assert self.let_go.wait(30)
            window.on_step(step)
        return window.pixels


async def all_of(events: AsyncGenerator[Any, None]) -> list[Any]:
    async with aclosing(events):
        return [event async for event in events]


def task_of(events: AsyncGenerator[Any, None]) -> "asyncio.Task[list[Any]]":
    return asyncio.create_task(all_of(events))


async def test_paintings_go_between_the_cells_and_only_they_are_usage() -> None:
    engine, slot = Stopped(), Slot()
    cells = [task_of(measuring(engine, request(seed=seed), slot, 2, 2)) for seed in (1, 2)]
    await until(engine.entered.is_set)
    jobs = [task_of(painting(engine, request(seed=seed), slot)) for seed in (8, 9)]
    await until(lambda: len(slot._lock._ahead) == 2)
    engine.let_go.set()
    told = await asyncio.gather(*cells, *jobs)
    # One painting more of the first cell, whose second one is the first after the jobs.
    assert engine.begun == [1, 8, 9, 1, 1, 2, 2]
    assert [isinstance(events[-1], Measured) for events in told] == [True, True, False, False]
    assert slot.usage.as_dict()["jobs"] == 2


class Crowded(Stopped):
    """While it paints for a cell a job comes each time, up to so many. Peaks are the cell's paintings so far."""

    def __init__(self, jobs: int) -> None:
        super().__init__()
        self.let_go.set()
        self.slot, self.jobs, self._left = Slot(), list[asyncio.Task[list[Any]]](), jobs
        self._loop = asyncio.get_running_loop()

    def paint(self, window: Window) -> Pixels:
        if window.seed == 1 and self._left:
            self._left -= 1
            asyncio.run_coroutine_threadsafe(self._come(), self._loop).result(30)
        return super().paint(window)

    async def _come(self) -> None:
        self.jobs.append(task_of(painting(self, request(seed=8), self.slot)))
        await until(lambda: bool(self.slot._lock._ahead))

    def peak_memory(self) -> tuple[int, int]:  # type: ignore[override]  # Pause has none.
        return self.begun.count(1), 0


@pytest.mark.parametrize(
    ("jobs", "order", "counted"),
    [(0, [1, 1, 1], [1, 2, 3]), (1, [1, 8, 1, 1, 1], [1, 3, 4]), (9, [1, 8, 1, 8, 1, 8, 1, 8], [1, 3, 4])],
)
async def test_a_job_waits_for_one_painting_of_a_cell_and_the_next_one_is_painted_once_more(
    jobs: int, order: list[int], counted: list[int]
) -> None:
    engine = Crowded(jobs)
    told = await all_of(measuring(engine, request(seed=1), engine.slot, 3, 1))
    await asyncio.gather(*engine.jobs)
    assert engine.begun == order
    assert [one.peak_bytes for one in told[-1].trials] == counted and told[-1].repeats
    steps = [one.step for one in told[:-1]]
    assert steps == sorted(steps) and told[-2] == Progress(step=6, steps=6)


async def test_a_cell_that_waits_for_its_next_painting_is_in_hand_until_it_is_canceled() -> None:
    job_goes_on, slot = threading.Event(), Slot()

    class Gated(Stopped):
        def paint(self, window: Window) -> Pixels:
            if window.seed == 8:
                self.begun.append(8)
                assert job_goes_on.wait(30)
                return window.pixels
            return super().paint(window)

    engine = Gated()
    cell = task_of(measuring(engine, request(seed=1), slot, 3, 2))
    await until(engine.entered.is_set)
    job = task_of(painting(engine, request(seed=8), slot))
    await until(lambda: bool(slot._lock._ahead))
    engine.let_go.set()
    await until(lambda: engine.begun == [1, 8] and bool(slot._lock._behind))
    assert slot.audits == 1 and not cell.done()
    with pytest.raises(ReplicaTaken):
        await all_of(measuring(engine, request(seed=2), slot, 1, 2))
    cell.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cell
    assert slot.audits == 0
    job_goes_on.set()
    await job
    assert engine.begun == [1, 8] and await is_empty(slot)


async def is_empty(slot: Slot) -> bool:
    async with asyncio.timeout(10), slot.drained():
        return not (slot.audits or slot.jobs or slot._occupancy or slot._audit_turn.locked())


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_nothing_leaks_whoever_is_canceled_whenever(seed: int) -> None:
    async def run() -> None:
        chance, slot, engine = random.Random(seed), Slot(), Pause(QUICK, None, VariantSettings())
        tasks = list[asyncio.Task[list[Any]]]()
        for _ in range(12):
            is_cell = chance.random() < 0.5
            events = measuring(engine, request(), slot, 3, 2) if is_cell else painting(engine, request(), slot)
            tasks.append(task_of(events))
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if chance.random() < 0.6:
                chance.choice(tasks).cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, (list, asyncio.CancelledError, ReplicaTaken))
        assert await is_empty(slot)

    asyncio.run(run())


async def test_each_painting_of_a_cell_has_begun_by_itself() -> None:
    slot, begun = Slot(), list[float | None]()

    class Looking(Stopped):
        def paint(self, window: Window) -> Pixels:
            begun.append(slot.taken_since)
            return super().paint(window)

    engine = Looking()
    engine.let_go.set()
    await all_of(measuring(engine, request(), slot, 3, 1))
    assert all(begun) and len(set(begun)) == 3 and slot.taken_since is None


async def test_a_cell_that_nobody_wants_any_more_ends_within_a_step() -> None:
    engine, slot = Stopped(), Slot()
    cell = task_of(measuring(engine, request(steps=50), slot, 20, 1))
    await until(engine.entered.is_set)
    cell.cancel()
    await until(lambda: slot.stopping_since is not None)
    engine.let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await cell
    assert (engine.steps, slot.audits) == (1, 0)
