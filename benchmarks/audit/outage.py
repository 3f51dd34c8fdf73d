"""A store that cannot be reached is waited for."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_exponential

from serve_app.errors import StoreUnavailable

T = TypeVar("T")

#: How long, in seconds.
LIMIT_S = 60.0


async def waited_out(call: Callable[[], Awaitable[T]], limit_s: float = LIMIT_S) -> T:
    """What `call` returns. Raises StoreUnavailable where it still does after `limit_s` seconds, all else at once."""
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(StoreUnavailable),
        stop=stop_after_delay(limit_s),
        wait=wait_exponential(multiplier=0.5, max=10),
        reraise=True,
    )
    return await retrying(call)
