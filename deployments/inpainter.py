"""One replica of one variant: a loaded engine, one job at a time on it."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ray import serve

from serve_app.engine import Engine, families, weights
from serve_app.engine.canvas import Seat, painting
from serve_app.jobs import Progress
from serve_app.ports import Painted, PaintRequest
from serve_app.settings import Settings
from serve_app.telemetry import configure_logging

from .loading import Loading, sources

#: How long an engine may go on after it was told to stop: one step of the largest window takes seconds on an L4.
STUCK_S = 60.0


def open_engine(name: str, settings: Settings) -> Engine:
    """The loaded and warmed engine of a served variant. Raises WeightsError, and what torch raises."""
    variant = settings.variant(name)
    files = asyncio.run(weights.fetch(variant, sources(settings))) if variant.file else None
    engine = families.create(name, variant, files, threads=settings.variants[name].threads)
    engine.load()
    engine.warm_up(settings.windows.buckets)
    return engine


class Usage:
    """How busy this replica has been since its first painting began."""

    def __init__(self) -> None:
        self._jobs, self._busy_s = 0, 0.0
        self._first_start = self._last_end = time.monotonic()

    def add(self, busy_s: float) -> None:
        """Note a painting that has just ended."""
        self._last_end = time.monotonic()
        if not self._jobs:
            self._first_start = self._last_end - busy_s
        self._jobs, self._busy_s = self._jobs + 1, self._busy_s + busy_s

    def as_dict(self) -> dict[str, float]:
        return {"jobs": self._jobs, "busy_s": self._busy_s, "wall_s": self._last_end - self._first_start}


class Inpainter:
    """Answers `paint` with progress and then the result. A variant that does not load says why."""

    def __init__(self, name: str, settings: Settings) -> None:
        configure_logging()
        self._name = name
        self._loading = Loading(f"variant {name}", lambda: open_engine(name, settings))
        # A pipeline keeps state between steps: two jobs must never be on it at once.
        self._seat = Seat()
        self._usage = Usage()

    async def paint(self, request: PaintRequest) -> AsyncIterator[Progress | Painted]:
        """Progress as it comes, then the one Painted. Closing the stream stops the engine within one step.

        Raises VariantLoadFailed with the reason; what the engine raises.
        """
        engine = self._loading.value
        async with aclosing(painting(engine, request, self._seat)) as events:
            async for event in events:
                if isinstance(event, Painted):
                    self._usage.add(event.busy_s)
                yield event

    def check_health(self) -> None:
        """Raises RuntimeError when an engine that was told to stop has not: Serve then replaces the replica, and the
        jobs that wait for its engine go elsewhere."""
        since = self._seat.stopping_since
        if since is not None and time.monotonic() - since > STUCK_S:
            raise RuntimeError(f"the engine of {self._name} was told to stop more than {STUCK_S:g} s ago")

    async def status(self) -> str:
        """Why the variant did not load; empty when it did."""
        return self._loading.error

    async def describe(self) -> dict[str, Any]:
        """Device, memory, process: for audits, benchmarks and people."""
        engine = self._loading.value
        replica = serve.get_replica_context().replica_id.unique_id
        device = await asyncio.to_thread(engine.describe)
        where = {"replica": replica, "node": socket.gethostname(), "pid": os.getpid()}
        return {**device, **where, "usage": self._usage.as_dict()}

    async def __del__(self) -> None:
        await self._loading.close(lambda engine: engine.close())
