"""Bytes on their way from a store: never more than the caller allows, and never half a file."""

import asyncio
import io
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from ...errors import BlobTooLarge, StoreUnavailable


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How long a store beyond this machine is waited for."""

    connect_s: float = 3.0
    #: The longest silence of the server: until it takes another block of a body, or sends some of its answer.
    silence_s: float = 10.0
    #: No new try after this.
    retry_s: float = 5.0
    #: Of a body, on average.
    slowest_bytes_per_s: int = 250_000

    @asynccontextmanager
    async def reading(self, path: str, max_bytes: int) -> AsyncIterator[None]:
        """Time for `max_bytes` at the slowest speed. Raises StoreUnavailable when it is over."""
        limit_s = self.silence_s + self.retry_s + max_bytes / self.slowest_bytes_per_s
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError as e:
            raise StoreUnavailable(f"blob {path} was not read within {limit_s:.0f} s", path=path) from e


BOUNDS = Bounds()


def check_size(path: str, size: int, max_bytes: int) -> None:
    """Raises BlobTooLarge."""
    if size > max_bytes:
        raise BlobTooLarge(f"blob {path} has {size} bytes; at most {max_bytes} are read", path=path)


class Limited(io.BytesIO):
    """Takes what a store sends, up to `max_bytes`, whatever size the store said. Raises BlobTooLarge."""

    def __init__(self, path: str, max_bytes: int) -> None:
        super().__init__()
        self._path, self._max_bytes = path, max_bytes

    def write(self, chunk: Any) -> int:
        size = self.tell() + len(chunk)
        if size > self._max_bytes:
            # The store's own figure was within the limit, so this is all that is known.
            raise BlobTooLarge(
                f"blob {self._path} has {size} bytes or more; at most {self._max_bytes} are read", path=self._path
            )
        return super().write(chunk)


@contextmanager
def whole_file(to: Path) -> Iterator[BinaryIO]:
    """A new file that becomes `to` when the block ends, and is gone where it fails.

    Raises StoreUnavailable where this machine's disk does not take it.
    """
    part = to.with_name(f".part-{uuid4().hex}")
    try:
        try:
            with part.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(to)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        raise StoreUnavailable(f"{to} cannot be written: {e.strerror or e}", path=str(to)) from e
