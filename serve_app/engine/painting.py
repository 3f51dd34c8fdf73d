"""Painting one request: its windows in order on its own canvas, in a thread, stopped within a step.

`paint_canvas` is the work, `painting` runs it from an event loop (`in_slot` does so with any work), `LocalModel` is
the ImageModel port over both without Ray. An engine is held by one request at a time.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from contextvars import copy_context
from functools import partial
from typing import Generic, TypeVar

from .. import tracing
from ..edit.paste import paste_window, share_out
from ..errors import FluxFillError, OutOfMemory, VariantLoadFailed
from ..models import EditRequest, GenerateRequest, Images, OnProgress, Pixels, Progress
from ..telemetry import logged_with, trace_ids
from . import AnyEngine, Engine, Window
from .slot import Occupancy, Slot
from .stages import STAGES, split

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R", bound=EditRequest | GenerateRequest)

#: Progress is yielded this often at most, in seconds: each one is a message through Ray, which costs the thread that
#: paints some of its time.
PROGRESS_S = 0.1
#: Seeds are below this.
_SEEDS = 2**63


def not_counted() -> None:
    """An `on_out_of_memory` for those who do not."""


def paint_canvas(
    engine: Engine,
    request: EditRequest,
    on_step: Callable[[Progress], None],
    on_out_of_memory: Callable[[], None] = not_counted,
) -> Images:
    """Paint the windows in order on a copy of the canvas; each sees what the ones before it left, and keeps its share.
    Windows of which nothing would be kept are left out.

    `on_step` gets the progress over all windows: once before the first step, then after each. What it raises ends the
    painting and passes through. A window that runs out of memory is begun again, once, after `on_out_of_memory` was
    called and the engine has freed what it can. Raises as `Engine.paint` does.
    """
    canvas, shares = request.canvas.copy(), share_out(request.mask, request.windows)
    windows = [(box, share) for box, share in zip(request.windows, shares, strict=True) if not share.is_empty]
    # Earlier peaks are not this painting's.
    engine.peak_memory()
    started_s, started_ms = time.perf_counter(), engine.device_ms()
    total, stages = request.steps_run * len(windows), Counter(dict.fromkeys(STAGES, 0.0))
    on_step(Progress(step=0, steps=total))
    for number, (box, share) in enumerate(windows):
        done = 0

        def advance(step: int, before: int = number * request.steps_run) -> None:
            nonlocal done
            done = step
            on_step(Progress(step=before + step, steps=total))

        paint = partial(_paint_window, engine, request, number, canvas[box.slices], share.unpainted, advance)
        painted, seconds = twice_at_most(paint, engine, on_out_of_memory)
        if done < request.steps_run:
            # A family that knows fewer steps than were asked for has done all of them.
            advance(request.steps_run)
        stages.update(seconds)
        paste_window(canvas, painted, box, share)
    ended_ms, busy_s = engine.device_ms(), time.perf_counter() - started_s
    extra = {"action": "painted", "windows": len(windows), "busy_s": round(busy_s, 3)}
    peak_bytes, reserved_bytes = engine.peak_memory() or (None, None)
    log.info("Painted %d windows in %.2f s", len(windows), busy_s, extra=extra)
    return Images(
        images=[canvas],
        busy_s=busy_s,
        gpu_ms=None if started_ms is None or ended_ms is None else ended_ms - started_ms,
        stages=dict(stages),
        peak_bytes=peak_bytes,
        reserved_bytes=reserved_bytes,
        where=engine.describe(),
        windows=[box for box, _ in windows],
    )


def _paint_window(
    engine: Engine,
    request: EditRequest,
    number: int,
    pixels: Pixels,
    mask: Pixels,
    on_step: Callable[[int], None],
) -> tuple[Pixels, Mapping[str, float]]:
    """What was painted, and the seconds of its stages."""
    steps_s: list[float] = []

    def timed(step: int) -> None:
        steps_s.append(time.perf_counter())
        on_step(step)

    began_s = time.perf_counter()
    painted = engine.paint(
        Window(
            pixels=pixels,
            mask=mask,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            # The same noise in every window would show as a pattern.
            seed=(request.seed + number) % _SEEDS,
            embeddings=request.embeddings,
            on_step=timed,
            strength=request.strength,
        )
    )
    return painted, split(began_s, steps_s, time.perf_counter())


def twice_at_most(paint: Callable[[], T], engine: AnyEngine, on_out_of_memory: Callable[[], None]) -> T:
    """What `paint` returns. Where it runs out of memory it is called again, once, when the engine has freed what it
    can."""
    try:
        return paint()
    except OutOfMemory as e:
        log.warning("Freed memory, painting again: %s", e.message, extra={"action": "out_of_memory"})
    # Outside the handler: the error held what was painted so far.
    on_out_of_memory()
    engine.free_memory()
    return paint()


def painting(
    engine: Engine, request: EditRequest, slot: Slot, on_out_of_memory: Callable[[], None] = not_counted
) -> AsyncGenerator[Progress | Images, None]:
    """`paint_canvas` as `in_slot` runs it. It counts in the slot's usage."""

    def paint(occupancy: Occupancy) -> Images:
        with slot.usage.painting():
            return paint_canvas(engine, request, occupancy.report, on_out_of_memory)

    return in_slot(request, slot, slot.acquire, paint)


async def in_slot(
    request: EditRequest | GenerateRequest,
    slot: Slot,
    take: Callable[[], Awaitable[Occupancy]],
    work: Callable[[Occupancy], T],
) -> AsyncGenerator[Progress | T, None]:
    """Run `work` in a thread at the engine's slot, where `take` gives it a place: yields the latest progress that it
    reports, and at last what it returns. Nothing is yielded before the engine begins with it.

    The place is free the moment the thread ends, however slowly the caller takes what is yielded.
    Closing the generator, or cancelling the task that iterates it, stops the engine within one step, and returns only
    when the thread has stopped. The thread's log lines carry the request's job id and its trace. Raises as `take` and
    `work` do.
    """
    occupancy = await take()

    def traced() -> T:
        with tracing.span("paint", request.traceparent):
            ids = trace_ids(tracing.traceparent(request.traceparent))
            with logged_with(job_id=request.job_id, **ids):
                return work(occupancy)

    thread = partial(copy_context().run, traced)
    future = asyncio.get_running_loop().run_in_executor(slot.thread, thread)
    future.add_done_callback(lambda _: slot.release())
    future.add_done_callback(lambda _: occupancy.end())
    try:
        is_over = False
        while not is_over:
            await occupancy.changed()
            is_over = occupancy.is_over
            if (progress := occupancy.take()) is not None:
                yield progress
                await occupancy.ends_within(PROGRESS_S)
        yield future.result()
    finally:
        await _ended(future, occupancy)


async def _ended(work: asyncio.Future[T], occupancy: Occupancy) -> None:
    """Wait for the thread through any number of cancellations: its place is not free before."""
    canceled = False
    if not work.done():
        occupancy.stop()
    while not occupancy.is_over:
        try:
            await occupancy.changed()
        except asyncio.CancelledError:
            canceled = True
    # Asked for here, so that asyncio does not report it as never looked at.
    work.exception()
    if canceled:
        raise asyncio.CancelledError


def load(name: str, engine: AnyEngine) -> None:
    """Load the engine of the variant called `name`. Raises VariantLoadFailed with the reason, whatever it is."""
    try:
        engine.load()
    except VariantLoadFailed:
        raise
    except Exception as e:
        # The loaders of torch's world raise anything; all of it means that this variant cannot serve.
        code = e.code if isinstance(e, FluxFillError) else type(e).__name__
        raise VariantLoadFailed(f"variant {name} did not load: {code}: {e}", variant=name, reason=code) from e


class Local(Generic[R]):
    """The ImageModel port in this process. Its engine is loaded when first asked for; a failed load is tried again."""

    is_ready = True

    def __init__(
        self, name: str, engine: AnyEngine, events: Callable[[R, Slot], AsyncGenerator[Progress | Images, None]]
    ) -> None:
        self._name, self._engine, self._events, self._slot = name, engine, events, Slot()
        self._loading, self._is_loaded = asyncio.Lock(), False

    async def run(self, request: R, on_progress: OnProgress) -> Images:
        async with self._loading:
            if not self._is_loaded:
                await asyncio.to_thread(load, self._name, self._engine)
                self._is_loaded = True
        async with aclosing(self._events(request, self._slot)) as events:
            async for event in events:
                if isinstance(event, Images):
                    return event
                await on_progress(event)
        raise AssertionError("painting ends with what was painted, or raises")

    async def close(self) -> None:
        """Free the engine when its job has ended. Painting again loads it again."""
        async with self._loading, self._slot.drained():
            self._engine.close()
            self._is_loaded = False


class LocalModel(Local[EditRequest]):
    """One that edits photos."""

    def __init__(self, name: str, engine: Engine) -> None:
        super().__init__(name, engine, partial(painting, engine))
