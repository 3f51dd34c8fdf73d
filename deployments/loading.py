"""Something slow to load, which may fail: it says why, tries again, and never takes its replica down."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from tenacity import AsyncRetrying, retry_if_result, wait_random_exponential

from serve_app import adapters
from serve_app.engine.origins import Mirror
from serve_app.engine.weights import Sources
from serve_app.errors import VariantLoadFailed
from serve_app.settings import Secrets, Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT_S = 5
LONGEST_WAIT_S = 300


def sources(settings: Settings) -> Sources:
    """Where weights come from. Raises SettingsError for a lock file or a mirror URL that is none."""
    where = settings.weights
    mirror = mirror_at(where.mirror) if where.mirror else None
    return Sources.of(where, Secrets.from_environment(), mirror)


def mirror_at(url: str) -> Mirror:
    """Raises SettingsError for a URL that names no blob store."""
    return Mirror(adapters.blob_store(url), adapters.blob_files(url))


class Loading(Generic[T]):
    """Runs `load` once at construction, and again in the background for as long as it fails: weights that are missing
    now may be there in a minute. Wants a running event loop."""

    def __init__(self, what: str, load: Callable[[], T]) -> None:
        self._what, self._load = what, load
        self._value: T | None = None
        #: Why the last try failed; empty once one has worked.
        self.error = ""
        # Waited for here, so that Serve counts the replica as running only afterwards. In a thread of its own, because
        # `load` may run an event loop, and this one is running already.
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(self._try).result()
        self._again = asyncio.create_task(self._until_loaded())

    @property
    def value(self) -> T:
        """What `load` returned. Raises VariantLoadFailed with the reason where it has not."""
        if self._value is None:
            raise VariantLoadFailed(f"{self._what} did not load: {self.error}")
        return self._value

    async def close(self, close: Callable[[T], None]) -> None:
        """Stop trying; hand what was loaded to `close`."""
        self._again.cancel()
        if self._value is not None:
            await asyncio.to_thread(close, self._value)

    def _try(self) -> bool:
        try:
            self._value, self.error = self._load(), ""
        except Exception as e:
            # Whatever it was, its reason must be readable in /ready, and the other variants must go on.
            self.error = f"{type(e).__name__}: {e}"
            log.exception("%s did not load: %s", self._what, self.error, extra={"action": "load_failed"})
            return False
        log.info("Loaded %s", self._what, extra={"action": "loaded"})
        return True

    async def _until_loaded(self) -> None:
        waits = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
        if self._value is None:
            # tenacity would try at once; the first try has just failed.
            await asyncio.sleep(FIRST_WAIT_S)
            await AsyncRetrying(wait=waits, retry=retry_if_result(lambda loaded: not loaded))(
                asyncio.to_thread, self._try
            )
