"""One replica of one variant: a loaded engine, and one job at once on it. Audit cells are measured behind jobs."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from ray import serve

from serve_app.engine import Engine, families
from serve_app.engine.cold_start import timed
from serve_app.engine.painting import painting
from serve_app.engine.slot import Slot
from serve_app.engine.trials import measuring
from serve_app.engine.weights import fetch
from serve_app.errors import FluxFillError, GpuLost, ReplicaTaken
from serve_app.models import EditRequest, Images, Measured, Progress
from serve_app.settings import Settings
from serve_app.telemetry import Metrics, configure_logging, logged_with, trace_id

from .loading import Loading, sources
from .metrics import RayMetrics

log = logging.getLogger(__name__)


def open_engine(name: str, settings: Settings) -> Engine:
    """The loaded and warmed engine of a served variant. Raises WeightsError, and what torch raises."""
    variant = settings.variant(name)
    files = asyncio.run(fetch.fetch(variant, sources(settings))) if variant.file else None
    with timed("import"):
        engine: Engine = families.create(name, variant, files, settings.variants[name])
    try:
        engine.load()
        with timed("warm_up"):
            _warm_up(engine, name, settings)
    except BaseException:
        # The next try must not meet this one's weights on the device.
        _abandon(engine, name)
        raise
    return engine


def _abandon(engine: Engine, name: str) -> None:
    """Close it, while the error that is under way stays the one that is told."""
    try:
        engine.close()
    except (FluxFillError, RuntimeError) as e:
        extra = {"action": "engine_not_closed", "variant": name}
        log.warning("Could not close the engine of %s after it failed to load: %s", name, e, extra=extra)


def _warm_up(engine: Engine, name: str, settings: Settings) -> None:
    """Where blocks are compiled: with what replicas like this one compiled before."""
    variant, served, buckets = settings.variant(name), settings.variants[name], settings.windows.buckets
    if variant.file is None or not served.optimizations.compile:
        engine.warm_up(buckets)
        return
    # It imports torch, which variants without weights run without.
    from serve_app.engine.flux import compile_cache

    kept = compile_cache.of(variant, served, buckets, sources(settings), engine.describe())
    kept.warm_up(lambda: engine.warm_up(buckets))


class Inpainter:
    """Answers `paint` and `measure` with progress and then the result. A variant that does not load says why."""

    def __init__(self, name: str, settings: Settings, metrics: Metrics | None = None) -> None:
        configure_logging()
        self._name, self._work = name, settings.work
        self._counts_steps = settings.variant(name).counts_steps
        self._metrics = metrics or RayMetrics()
        self._loading: Loading[Engine] = Loading(
            f"variant {name}", lambda: open_engine(name, settings), Engine.close, self._metrics
        )
        self._slot = Slot()

    async def paint(self, request: EditRequest) -> AsyncGenerator[Progress | Images, None]:
        """Progress as it comes, then the Images. Closing the stream stops the engine within one step.

        Raises VariantLoadFailed with the reason; VariantNotReady at once where the GPU failed before; what the engine
        raises.
        """
        engine = self._loading.value
        with self._watched(request):
            async with aclosing(painting(engine, request, self._slot, self._out_of_memory)) as events:
                async for event in events:
                    if isinstance(event, Images):
                        self._note(request, event)
                    yield event

    async def measure(
        self, request: EditRequest, trials: int, places: int
    ) -> AsyncGenerator[Progress | Measured | ReplicaTaken, None]:
        """As `paint`, for an audit's cell: painted `trials` times, 1 or more, behind all paintings; at last the one
        Measured. Its times and steps are in no metric and in no usage: they are no user's. Where whoever asks is killed
        the cell goes on to its end: Serve notices no caller's death.

        Where as many cells are in flight here as may be (`Slot.audit_cell`), `places` at most, the only item is
        ReplicaTaken, at once. It is not raised, because Serve would log each with its traceback.
        """
        engine = self._loading.value
        cell = measuring(engine, request, self._slot, trials, places, self._out_of_memory)
        try:
            with self._watched(request):
                async with aclosing(cell) as events:
                    async for event in events:
                        if isinstance(event, Measured):
                            event = replace(event, where={**event.where, **self._here()})
                        yield event
        except ReplicaTaken as e:
            yield e

    @contextmanager
    def _watched(self, request: EditRequest) -> Iterator[None]:
        try:
            yield
        except GpuLost as e:
            self._lose(request, e)
            raise

    def _out_of_memory(self) -> None:
        self._metrics.add("fluxfill_out_of_memory_total", variant=self._name)

    def _note(self, request: EditRequest, painted: Images) -> None:
        used_bytes = painted.where.get("memory_used_bytes")
        if used_bytes is not None:
            self._metrics.put("fluxfill_gpu_memory_bytes", used_bytes, variant=self._name)
        if self._counts_steps:
            per_s = request.steps * len(painted.windows) / painted.busy_s
            self._metrics.observe("fluxfill_steps_per_second", per_s, variant=self._name)

    def _lose(self, request: EditRequest, error: GpuLost) -> None:
        # A second job, which waited for the first one to end, meets the same GPU.
        if self._loading.lose(error):
            self._metrics.add("fluxfill_gpu_lost_total", variant=self._name)
            with logged_with(job_id=request.job_id, trace_id=trace_id(request.traceparent)):
                log.error("The GPU of %s failed for good: %s", self._name, error, extra={"action": "gpu_lost"})

    def check_health(self) -> None:
        """Raises when Serve is to replace the replica, so that jobs go elsewhere: GpuLost when its GPU failed for good;
        RuntimeError when its engine does not stop, or has painted for longer than any worker waits."""
        self._loading.check_health()
        self._check(self._slot.stopping_since, self._work.engine_stop_timeout_s, "was told to stop")
        # A worker that died tells no replica to stop. An audit's cell has each painting's own beginning.
        self._check(
            self._slot.taken_since, self._work.inference_timeout_s + self._work.engine_stop_timeout_s, "began to paint"
        )

    def _check(self, since: float | None, limit_s: float, what: str) -> None:
        if since is not None and time.monotonic() - since > limit_s:
            raise RuntimeError(f"the engine of {self._name} {what} more than {limit_s:g} s ago and is still running")

    async def status(self) -> str:
        """Why the variant cannot paint here; empty when it can."""
        return self._loading.error

    async def describe(self) -> dict[str, Any]:
        """Device, memory, process: for audits, benchmarks and people."""
        engine = self._loading.value
        device = await asyncio.to_thread(engine.describe)
        return {**device, **self._here(), "usage": self._slot.usage.as_dict(), "cold_start": self._loading.parts}

    def _here(self) -> dict[str, Any]:
        replica = serve.get_replica_context().replica_id.unique_id
        return {"replica": replica, "node": socket.gethostname(), "pid": os.getpid()}

    async def __del__(self) -> None:
        await self._loading.close()
