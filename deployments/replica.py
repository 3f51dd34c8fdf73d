"""One replica of one variant or generator: a loaded engine, and one job at once on it. What it is asked for, its
subclasses know."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from ray import serve

from serve_app import tracing
from serve_app.engine import AnyEngine, families
from serve_app.engine.cold_start import timed
from serve_app.engine.slot import Slot
from serve_app.engine.weights import fetch
from serve_app.errors import FluxFillError, GpuLost
from serve_app.models import EditRequest, GenerateRequest, Images
from serve_app.settings import Settings
from serve_app.telemetry import Metrics, configure_logging, logged_with, trace_ids

from .loading import Loading, sources
from .metrics import RayMetrics

log = logging.getLogger(__name__)

E = TypeVar("E", bound=AnyEngine)
T = TypeVar("T")


class Status(NamedTuple):
    """What a replica says of itself."""

    #: Why it cannot work; empty where it can.
    error: str
    #: `replica`, `node` and `pid`; `device` where it can work.
    where: dict[str, Any]


def open_engine(name: str, settings: Settings) -> Any:
    """The loaded and warmed engine of a served variant or generator. Raises WeightsError, and what torch raises."""
    variant = settings.variant(name)
    files = asyncio.run(fetch.fetch(variant, sources(settings))) if variant.file else None
    with timed("import"):
        engine: AnyEngine = families.create(name, variant, files, settings.served[name])
    try:
        engine.load()
        with timed("warm_up"):
            _warm_up(engine, name, settings)
    except BaseException:
        # The next try must not meet this one's weights on the device.
        try:
            engine.close()
        except (FluxFillError, RuntimeError) as e:
            # The error that is under way stays the one that is told.
            extra = {"action": "engine_not_closed", "variant": name}
            log.warning("Could not close the engine of %s after it failed to load: %s", name, e, extra=extra)
        raise
    return engine


def _warm_up(engine: AnyEngine, name: str, settings: Settings) -> None:
    """Where blocks are compiled: with what replicas like this one compiled before."""
    variant, served = settings.variant(name), settings.served[name]
    made = variant.generation
    buckets = ((made.defaults.width, made.defaults.height),) if made else settings.windows.buckets
    if variant.file is None or not served.optimizations.compile:
        engine.warm_up(buckets)
        return
    # It imports torch, which variants without weights run without.
    from serve_app.engine.flux import compile_cache

    kept = compile_cache.of(variant, served, buckets, sources(settings), engine.describe())
    kept.warm_up(lambda: engine.warm_up(buckets))


class Replica(Generic[E]):
    """Has the engine, its slot and its metrics. One that does not load says why."""

    def __init__(self, name: str, settings: Settings, metrics: Metrics | None = None) -> None:
        configure_logging()
        tracing.configure_tracing("fluxfill-replica")
        self._name, self._work = name, settings.work
        self._counts_steps = settings.variant(name).counts_steps
        self._metrics = metrics or RayMetrics()
        self._loading: Loading[E] = Loading(
            f"variant {name}", lambda: open_engine(name, settings), lambda engine: engine.close(), self._metrics
        )
        self._cost = partial(settings.cost, name)
        self._slot = Slot(self._painted)

    async def _streamed(
        self, request: EditRequest | GenerateRequest, events: AsyncGenerator[T, None]
    ) -> AsyncGenerator[T, None]:
        """`events`, and what the metrics are told of them."""
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Images):
                        self._note(request, event)
                    yield event
        except GpuLost as e:
            # A second job, which waited for the first one to end, meets the same GPU.
            if self._loading.lose(e):
                self._metrics.add("fluxfill_gpu_lost_total", variant=self._name)
                with logged_with(job_id=request.job_id, **trace_ids(request.traceparent)):
                    log.error("The GPU of %s failed for good: %s", self._name, e, extra={"action": "gpu_lost"})
            raise

    def _note(self, request: EditRequest | GenerateRequest, made: Images) -> None:
        if (used_bytes := made.where.get("memory_used_bytes")) is not None:
            self._metrics.put("fluxfill_gpu_memory_bytes", used_bytes, variant=self._name)
        if self._counts_steps:
            steps = request.steps_run * len(made.windows) if isinstance(request, EditRequest) else request.steps
            self._metrics.observe("fluxfill_steps_per_second", steps / made.busy_s, variant=self._name)

    def _painted(self, seconds: float) -> None:
        self._metrics.add("fluxfill_gpu_seconds_total", seconds, variant=self._name)
        if (cost := self._cost(seconds)) is not None:
            self._metrics.add("fluxfill_cost_total", cost, variant=self._name)

    def _out_of_memory(self) -> None:
        self._metrics.add("fluxfill_out_of_memory_total", variant=self._name)

    def check_health(self) -> None:
        """Raises when Serve is to replace the replica, so that jobs go elsewhere: GpuLost when its GPU failed for good;
        RuntimeError when its engine does not stop, or has painted for longer than any worker waits."""
        self._loading.check_health()
        stop_s = self._work.engine_stop_timeout_s
        # A worker that died tells no replica to stop. An audit's cell has each painting's own beginning.
        for since, limit_s, what in (
            (self._slot.stopping_since, stop_s, "was told to stop"),
            (self._slot.taken_since, self._work.inference_timeout_s + stop_s, "began to paint"),
        ):
            if since is not None and time.monotonic() - since > limit_s:
                what = f"{what} more than {limit_s:g} s ago and is still running"
                raise RuntimeError(f"the engine of {self._name} {what}")

    async def status(self) -> Status:
        try:
            device = await asyncio.to_thread(self._loading.value.describe)
        except FluxFillError as e:
            return Status(self._loading.error or str(e), self._here())
        return Status("", {"device": device["device"], **self._here()})

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
        await asyncio.to_thread(tracing.flush)
