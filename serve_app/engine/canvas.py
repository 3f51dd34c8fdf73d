"""Painting one request: its windows in order on its own canvas, in a thread, stopped within a step.

`paint_canvas` is the work, `painting` runs it from an event loop, `LocalPainter` is the Painter port over both without
Ray. An engine is held by one request at a time.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from ..errors import Canceled, FluxFillError, UnknownVariant, VariantLoadFailed
from ..images import Pixels
from ..jobs import Progress
from ..paste import paste_window
from ..ports import OnProgress, Painted, PaintRequest
from . import Engine

#: Seeds are below this.
_SEEDS = 2**63


def paint_canvas(engine: Engine, request: PaintRequest, on_step: Callable[[Progress], None]) -> Painted:
    """Paint the windows in order on a copy of the canvas; each sees what the ones before it left.

    `on_step` gets the progress over all windows: once before the first step, then after each. What it raises ends the
    painting and passes through. Raises as `Engine.paint` does.
    """
    canvas, unpainted = request.canvas.copy(), request.mask.copy()
    started_s, started_ms = time.perf_counter(), engine.device_ms()
    total = request.steps * len(request.windows)
    on_step(Progress(step=0, steps=total))
    for number, box in enumerate(request.windows):
        before = number * request.steps

        def advance(step: int, before: int = before) -> None:
            on_step(Progress(step=before + step, steps=total))

        painted = _paint_window(engine, request, number, canvas[box.slices], unpainted[box.slices], advance)
        paste_window(canvas, painted, box, unpainted)
        unpainted[box.slices] = 0
    ended_ms = engine.device_ms()
    return Painted(
        canvas=canvas,
        busy_s=time.perf_counter() - started_s,
        gpu_ms=None if started_ms is None or ended_ms is None else ended_ms - started_ms,
        where=engine.describe(),
    )


def _paint_window(
    engine: Engine, request: PaintRequest, number: int, pixels: Pixels, mask: Pixels, on_step: Callable[[int], None]
) -> Pixels:
    return engine.paint(
        pixels,
        mask,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        # The same noise in every window would show as a pattern.
        seed=(request.seed + number) % _SEEDS,
        embeddings=request.embeddings,
        on_step=on_step,
    )


async def painting(engine: Engine, request: PaintRequest) -> AsyncGenerator[Progress | Painted, None]:
    """Run `paint_canvas` in a thread: yields its progress, and at last what it painted.

    Closing the generator, or cancelling the task that iterates it, stops the engine within one step, and returns only
    when the thread has stopped. Raises as `paint_canvas` does.
    """
    loop, stop = asyncio.get_running_loop(), threading.Event()
    steps: asyncio.Queue[Progress | None] = asyncio.Queue()

    def on_step(progress: Progress) -> None:
        if stop.is_set():
            raise Canceled(f"painting of job {request.job_id} was stopped")
        loop.call_soon_threadsafe(steps.put_nowait, progress)

    work = asyncio.create_task(asyncio.to_thread(paint_canvas, engine, request, on_step))
    work.add_done_callback(lambda _: steps.put_nowait(None))
    try:
        while (progress := await steps.get()) is not None:
            yield progress
        yield work.result()
    finally:
        stop.set()
        await _ended(work)


async def _ended(work: asyncio.Task[Painted]) -> None:
    """Wait for the thread through any number of cancellations: its engine is not free before."""
    canceled = False
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            canceled = True
    # Asked for here, so that asyncio does not report it as never looked at.
    work.exception()
    if canceled:
        raise asyncio.CancelledError


def load(name: str, engine: Engine) -> None:
    """Load the engine of the variant called `name`. Raises VariantLoadFailed with the reason, whatever it is."""
    try:
        engine.load()
    except VariantLoadFailed:
        raise
    except Exception as e:
        # The loaders of torch's world raise anything; all of it means that this variant cannot serve.
        code = e.code if isinstance(e, FluxFillError) else type(e).__name__
        raise VariantLoadFailed(f"variant {name} did not load: {code}: {e}", variant=name, reason=code) from e


class LocalPainter:
    """The Painter port in this process. An engine is loaded when first asked for; a failed load is tried again."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines
        self._locks = {name: asyncio.Lock() for name in engines}
        self._loaded: set[str] = set()

    async def paint(self, variant: str, request: PaintRequest, on_progress: OnProgress) -> Painted:
        if variant not in self._engines:
            raise UnknownVariant(f"no variant {variant} here; there are {', '.join(self._engines) or 'none'}")
        engine = self._engines[variant]
        async with self._locks[variant]:
            await self._ready(variant, engine)
            async with aclosing(painting(engine, request)) as events:
                async for event in events:
                    if isinstance(event, Painted):
                        return event
                    await on_progress(event)
        raise AssertionError("painting ends with what was painted, or raises")

    async def _ready(self, variant: str, engine: Engine) -> None:
        if variant not in self._loaded:
            await asyncio.to_thread(load, variant, engine)
            self._loaded.add(variant)

    async def close(self) -> None:
        """Free every engine, each when its job has ended. Painting again loads it again."""
        for name, engine in self._engines.items():
            async with self._locks[name]:
                engine.close()
                self._loaded.discard(name)
