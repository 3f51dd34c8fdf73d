"""Something slow to load, which may fail: it says why, tries again, and never takes its replica down."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Generic, TypeVar

from tenacity import AsyncRetrying, retry_if_result, wait_random_exponential

from serve_app import adapters
from serve_app.engine import cold_start
from serve_app.engine.weights.fetch import Sources
from serve_app.engine.weights.origins import Mirror
from serve_app.errors import FluxFillError, GpuLost, VariantLoadFailed, VariantNotReady
from serve_app.settings import Secrets, Settings
from serve_app.telemetry import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT_S = 5
LONGEST_WAIT_S = 300


def sources(settings: Settings) -> Sources:
    """Where weights come from. Raises SettingsError for a lock file or a mirror URL that is none."""
    where = settings.weights
    mirror = mirror_at(where.mirror) if where.mirror else None
    return Sources.of(where, Secrets.from_environment(), mirror, partial(adapters.blob_store, settings.blobs))


def mirror_at(url: str) -> Mirror:
    """Raises SettingsError for a URL that names no blob store."""
    return Mirror(adapters.blob_store(url))


class Loading(Generic[T]):
    """Runs `load` once at construction, and again in the background for as long as it fails: weights that are missing
    now may be there in a minute. `free` ends what was loaded. Wants a running event loop."""

    def __init__(self, what: str, load: Callable[[], T], free: Callable[[T], None], metrics: Metrics) -> None:
        self._what, self._load, self._free, self._metrics = what, load, free, metrics
        self._value: T | None = None
        #: Why it cannot be used; empty where it can.
        self.error = ""
        #: What the last load took, part by part: see `cold_start.as_dict`.
        self.parts: dict[str, dict[str, float]] = {}
        self._lost_gpu = ""
        self._closed = False
        #: Of `_value` and `_closed`: a load may end while `close` runs.
        self._lock = Lock()
        # Waited for here, so that Serve counts the replica as running only afterwards. In a thread of its own, because
        # `load` may run an event loop, and this one is running already.
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(self._try).result()
        self._again = asyncio.create_task(self._until_loaded())

    @property
    def value(self) -> T:
        """What `load` returned. Raises VariantLoadFailed with the reason where it has not; VariantNotReady where a lost
        GPU has this replica replaced: a job that never met that GPU is not to lose an attempt by it."""
        if self._lost_gpu:
            raise VariantNotReady(f"{self._what} is being replaced: {self._lost_gpu}")
        if self._value is None:
            raise VariantLoadFailed(f"{self._what} did not load: {self.error}")
        return self._value

    def check_health(self) -> None:
        """Raises GpuLost where nothing that this process loads can work any more."""
        if self._lost_gpu:
            raise GpuLost(self._lost_gpu)

    def lose(self, error: GpuLost) -> bool:
        """What was loaded works no more. Whether that is news."""
        is_news = not self._lost_gpu
        self._value = None
        self._fail(error)
        return is_news

    async def close(self) -> None:
        """Stop trying; free what was loaded, or still will be."""
        self._again.cancel()
        with self._lock:
            self._closed, value = True, self._value
        if value is not None:
            await asyncio.to_thread(self._free, value)

    def _try(self) -> bool:
        try:
            with cold_start.recorded() as parts:
                value = self._load()
        except Exception as e:
            # Whatever it was, its reason must be readable in /ready, and the other variants must go on.
            self._fail(e)
            code = e.code if isinstance(e, FluxFillError) else type(e).__name__
            self._metrics.add("fluxfill_load_failures_total", component=self._what, code=code)
            extra = {"action": "load_failed", "component": self._what, "code": code}
            log.exception("%s did not load: %s", self._what, self.error, extra=extra)
            return False
        self._report(parts)
        self._keep(value)
        return True

    def _report(self, parts: cold_start.Parts) -> None:
        self.parts = cold_start.as_dict(parts)
        for name, part in parts.items():
            self._metrics.observe("fluxfill_load_seconds", part.seconds, component=self._what, part=name)
        log.info("Loaded %s", self._what, extra={"action": "loaded", "component": self._what, "parts": self.parts})

    def _fail(self, error: Exception) -> None:
        # In words: the error itself would keep alive what was loaded when it was raised.
        self.error = f"{type(error).__name__}: {error}"
        if isinstance(error, GpuLost):
            self._lost_gpu = error.message

    def _keep(self, value: T) -> None:
        with self._lock:
            self._value, self.error = value, ""
            is_late = self._closed
        if is_late:
            self._free(value)

    async def _until_loaded(self) -> None:
        waits = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
        if self._value is None:
            # tenacity would try at once; the first try has just failed.
            await asyncio.sleep(FIRST_WAIT_S)
            await AsyncRetrying(wait=waits, retry=retry_if_result(lambda loaded: not loaded))(
                asyncio.to_thread, self._try
            )
