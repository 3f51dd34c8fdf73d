import asyncio
import itertools
import json
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from serve_app.edit.paste import cut
from serve_app.edit.windows import plan
from serve_app.engine import Window
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.painting import LocalModel, load, paint_canvas
from serve_app.engine.pause import Pause
from serve_app.engine.telea import Telea
from serve_app.errors import Canceled, CorruptWeights, OutOfMemory, ReplicaLost, VariantLoadFailed
from serve_app.models import Box, Images, Pixels, Progress, Variant
from serve_app.parameters import CropStrategy
from serve_app.settings import VariantSettings, WindowSettings
from serve_app.telemetry import JsonFormatter

from .engine_fixtures import SIDE, flux_fill, photo, request, square_mask

WHOLE = Box(x0=0, y0=0, x1=SIDE, y1=SIDE)
LEFT, RIGHT = Box(x0=0, y0=0, x1=80, y1=SIDE), Box(x0=48, y0=0, x1=SIDE, y1=SIDE)


def pause() -> Pause:
    return Pause(Variant(family="pause", pause_s=0), None, VariantSettings())


class Recorder(Pause):
    """Keeps what it was given; paints the mask white, and may fail to load or block between steps."""

    def __init__(self, on_paint: Callable[[], None] = lambda: None) -> None:
        super().__init__(Variant(family="pause", pause_s=0), None, VariantSettings())
        self.seen: list[tuple[Pixels, Pixels, int]] = []
        self.steps_begun = 0
        self.times_freed = 0
        self.load_errors: list[Exception] = []
        self._on_paint = on_paint

    def load(self) -> None:
        if self.load_errors:
            raise self.load_errors.pop()

    def free_memory(self) -> None:
        self.times_freed += 1

    def paint(self, window: Window) -> Pixels:
        self.seen.append((window.pixels.copy(), window.mask.copy(), window.seed))
        for step in range(window.steps):
            self.steps_begun += 1
            self._on_paint()
            window.on_step(step + 1)
        return np.where(window.mask[..., None] > 0, np.uint8(255), window.pixels)


async def nothing(progress: Progress) -> None:
    """An on_progress that nobody follows."""


def test_each_window_sees_what_the_ones_before_painted() -> None:
    engine = Recorder()
    painted = paint_canvas(engine, request(windows=[LEFT, RIGHT], seed=5), lambda progress: None)
    (first, first_mask, first_seed), (second, second_mask, second_seed) = engine.seen
    assert np.array_equal(first, photo()[LEFT.slices])
    assert np.array_equal(first_mask, square_mask()[LEFT.slices])
    # The overlap, columns 48 to 80, is the first's up to its middle.
    own_of_first, own_of_second = np.s_[32:96, :16], np.s_[32:96, 16:48]
    assert (second[own_of_first] == 255).all()
    assert (second_mask[own_of_first] == 0).all()
    assert np.array_equal(second[own_of_second], photo()[RIGHT.slices][own_of_second])
    assert (second_mask[own_of_second] == 255).all()
    assert first_seed != second_seed
    assert (painted.images[0][square_mask() > 0] == 255).all()
    assert np.array_equal(painted.images[0][square_mask() == 0], photo()[square_mask() == 0])


def test_the_request_is_not_written_to() -> None:
    given = request()
    paint_canvas(Recorder(), given, lambda progress: None)
    assert np.array_equal(given.canvas, photo())
    assert np.array_equal(given.mask, square_mask())


def test_progress_counts_over_all_windows() -> None:
    told: list[tuple[int, int]] = []
    painted = paint_canvas(pause(), request(windows=[LEFT, RIGHT], steps=2), lambda p: told.append((p.step, p.steps)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert painted.busy_s > 0
    assert painted.gpu_ms is None
    assert painted.where["compute_capability"] == "N/A"
    assert painted.windows == [LEFT, RIGHT]


class Numbering(Recorder):
    """Paints the first window in grey level 1, the next one in 2, and so on."""

    def paint(self, window: Window) -> Pixels:
        super().paint(window)
        return np.full_like(window.pixels, len(self.seen))


@pytest.mark.parametrize("seed", [2, 13, 35])
def test_every_window_that_is_painted_is_seen_in_the_picture(seed: int) -> None:
    mask, random = np.zeros((3000, 4000), np.uint8), np.random.default_rng(seed)
    for x, y in zip(random.integers(0, 3900, 12), random.integers(0, 2900, 12), strict=True):
        mask[y : y + 60, x : x + 60] = 255
    planned = plan(mask, CropStrategy.ORIGINAL, WindowSettings())
    assert planned is not None
    canvas, canvas_mask = cut(np.zeros((*mask.shape, 3), np.uint8), mask, planned, WindowSettings().feather_px)
    engine, told = Numbering(), list[Progress]()
    given = request(canvas=canvas, mask=canvas_mask, windows=planned.windows, seed=5)
    result = paint_canvas(engine, given, told.append)
    painted = result.images[0]

    numbers = range(1, len(engine.seen) + 1)
    # Of these spots' four windows, one shows only what lies deeper in others.
    assert (len(planned.windows), len(result.windows), len(numbers)) == (4, 3, 3)
    assert [canvas[box.slices].shape for box in result.windows] == [pixels.shape for pixels, _, _ in engine.seen]
    assert set(numbers) <= set(np.unique(painted).tolist())
    assert (painted[canvas_mask > 0] > 0).all() and not painted[canvas_mask == 0].any()
    assert [seed for _, _, seed in engine.seen] == [5, 6, 7]
    assert told[-1] == Progress(step=given.steps * 3, steps=given.steps * 3)


def out_of_memory_at(*steps: int) -> Recorder:
    """Runs out of memory at these of the steps that it begins."""

    def fail() -> None:
        if engine.steps_begun in steps:
            raise OutOfMemory("cuda failed: out of memory")

    engine = Recorder(fail)
    return engine


def test_a_window_that_runs_out_of_memory_is_begun_again_once() -> None:
    engine, told, counted = out_of_memory_at(4), list[int](), list[str]()
    given = request(windows=[LEFT, RIGHT], steps=2)
    painted = paint_canvas(engine, given, lambda p: told.append(p.step), lambda: counted.append("once"))
    assert told == [0, 1, 2, 3, 3, 4]
    assert (engine.times_freed, counted) == (1, ["once"])
    _, second, again = engine.seen
    assert all(np.array_equal(before, after) for before, after in ((second[0], again[0]), (second[1], again[1])))
    assert second[2] == again[2]
    assert np.array_equal(painted.images[0], paint_canvas(Recorder(), given, lambda p: None).images[0])


def test_a_window_that_runs_out_of_memory_twice_is_given_up() -> None:
    engine, counted = out_of_memory_at(2, 4), list[str]()
    with pytest.raises(OutOfMemory, match=r"^cuda failed: out of memory$"):
        paint_canvas(engine, request(steps=2), lambda p: None, lambda: counted.append("once"))
    assert (engine.times_freed, len(engine.seen), counted) == (1, 2, ["once"])


@pytest.mark.slow
@pytest.mark.parametrize("failures", [1, 2])
def test_the_real_pipeline_out_of_memory(
    tiny: TinyWeights, embeddings: bytes, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """Its transformer fails in the middle of the first run, or of both."""
    import torch
    from diffusers import FluxTransformer2DModel

    engine, forward, calls = flux_fill(tiny), FluxTransformer2DModel.forward, itertools.count(1)
    engine.load()
    given = request(embeddings=embeddings, steps=3)
    expected = paint_canvas(engine, given, lambda p: None).images[0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) in (2, 4)[:failures]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", fail)
    if failures == 1:
        assert np.array_equal(paint_canvas(engine, given, lambda p: None).images[0], expected)
    else:
        with pytest.raises(OutOfMemory, match="Tried to allocate"):
            paint_canvas(engine, given, lambda p: None)
    engine.close()


def test_what_filled_the_memory_is_let_go_before_it_is_freed() -> None:
    class Large:
        pass

    held: list[weakref.ref[Large]] = []
    held_when_freed: list[Large | None] = []

    class Full(Recorder):
        def paint(self, window: Window) -> Pixels:
            large = Large()
            held.append(weakref.ref(large))
            if len(held) == 1:
                raise OutOfMemory("no memory left")
            return super().paint(window)

        def free_memory(self) -> None:
            held_when_freed.append(held[0]())

    paint_canvas(Full(), request(), lambda p: None)
    assert held_when_freed == [None]


async def test_what_the_painting_thread_logs_carries_the_job_and_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="serve_app")
    lines: list[dict[str, Any]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    kept = Kept()
    logging.getLogger("serve_app").addHandler(kept)
    trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
    await LocalModel("v", out_of_memory_at(1)).run(request(job_id="job-7", traceparent=trace), nothing)
    await LocalModel("v", pause()).run(request(job_id="job-8"), nothing)
    logging.getLogger("serve_app").removeHandler(kept)
    told = [(line["action"], line["job_id"], line.get("trace_id")) for line in lines]
    assert told == [
        ("out_of_memory", "job-7", "ab" * 16),
        ("painted", "job-7", "ab" * 16),
        ("painted", "job-8", None),
    ]


async def test_the_real_pipeline_through_the_model(tiny: TinyWeights, embeddings: bytes) -> None:
    model = LocalModel("tiny-Q4_0", flux_fill(tiny))
    told: list[Progress] = []

    async def tell(progress: Progress) -> None:
        told.append(progress)

    painted = await model.run(request(embeddings=embeddings), tell)
    assert [progress.step for progress in told] == [0, 1, 2]
    assert np.array_equal(painted.images[0][square_mask() == 0], photo()[square_mask() == 0])
    assert not np.array_equal(painted.images[0][square_mask() > 0], photo()[square_mask() > 0])
    await model.close()


@pytest.mark.slow
async def test_jobs_at_once_on_one_pipeline_do_not_mix(tiny: TinyWeights, embeddings: bytes) -> None:
    model = LocalModel("tiny-Q4_0", flux_fill(tiny))
    requests = [request(embeddings=embeddings, seed=seed) for seed in (1, 2, 3)]
    alone = [(await model.run(one, nothing)).images[0] for one in requests]
    together = await asyncio.gather(
        *(model.run(one, nothing) for one in requests), LocalModel("pause", pause()).run(request(), nothing)
    )
    for expected, painted in zip(alone, together, strict=False):
        assert np.array_equal(painted.images[0], expected)
    await model.close()


async def test_canceling_stops_within_a_step_and_waits_for_the_thread() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        assert go_on.wait(30)

    engine = Recorder(block)
    model = LocalModel("v", engine)
    task = asyncio.create_task(model.run(request(steps=8), nothing))
    assert await asyncio.to_thread(begun.wait, 30)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.steps_begun == 1
    assert isinstance(await model.run(request(), nothing), Images)


@pytest.mark.slow
async def test_canceling_the_real_pipeline_leaves_it_usable(tiny: TinyWeights, embeddings: bytes) -> None:
    model = LocalModel("v", flux_fill(tiny))
    first = await model.run(request(embeddings=embeddings), nothing)
    task: asyncio.Task[Images]

    async def cancel_at_two(progress: Progress) -> None:
        if progress.step >= 2:
            task.cancel()

    task = asyncio.create_task(model.run(request(embeddings=embeddings, steps=50), cancel_at_two))
    with pytest.raises(asyncio.CancelledError):
        await task
    again = await model.run(request(embeddings=embeddings), nothing)
    assert np.array_equal(again.images[0], first.images[0])
    await model.close()


@pytest.mark.parametrize("error", [Canceled("a user asked"), ReplicaLost("the process ends")])
async def test_what_on_progress_raises_stops_the_engine(error: Exception) -> None:
    engine = Recorder()

    async def refuse(progress: Progress) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await LocalModel("v", engine).run(request(steps=10_000), refuse)
    assert caught.value is error
    assert engine.steps_begun < 10_000


async def test_progress_is_told_in_the_event_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def tell(progress: Progress) -> None:
        loops.append(asyncio.get_running_loop())

    await LocalModel("v", pause()).run(request(), tell)
    assert set(loops) == {asyncio.get_running_loop()}


async def test_what_the_engine_raises_passes_through() -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        await LocalModel("v", Recorder(fail)).run(request(), nothing)


async def test_a_failed_load_gives_its_reason_and_is_tried_again() -> None:
    engine = Recorder()
    engine.load_errors = [CorruptWeights("the file is cut short")]
    model = LocalModel("v", engine)
    with pytest.raises(VariantLoadFailed, match="variant v did not load: corrupt_weights: the file is cut short"):
        await model.run(request(), nothing)
    assert isinstance(await model.run(request(), nothing), Images)


def test_whatever_a_loader_raises_is_a_failed_load() -> None:
    engine = Recorder()
    engine.load_errors = [KeyError("weight"), VariantLoadFailed("no GPU")]
    with pytest.raises(VariantLoadFailed, match=r"^no GPU$"):
        load("v", engine)
    with pytest.raises(VariantLoadFailed, match="variant v did not load: KeyError: 'weight'") as caught:
        load("v", engine)
    assert caught.value.details == {"variant": "v", "reason": "KeyError"}


async def test_telea_through_the_model() -> None:
    engine = Telea(Variant(family="telea"), None, VariantSettings())
    painted = await LocalModel("telea", engine).run(request(windows=[LEFT, RIGHT]), nothing)
    assert np.array_equal(painted.images[0][square_mask() == 0], photo()[square_mask() == 0])
