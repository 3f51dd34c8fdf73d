"""What the parts of a cold start took: seconds, and bytes where they moved some.

Whoever wants to know records; the parts say what they do, whether or not somebody records.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter


@dataclass(slots=True)
class Part:
    seconds: float = 0.0
    #: Fetched, hashed or read; 0 for a part that moves none.
    bytes: int = 0

    def as_dict(self) -> dict[str, float]:
        """`seconds`; for what moved bytes also `gb` and `gb_per_s`, in 10^9 bytes."""
        if not self.bytes or self.seconds <= 0:
            return {"seconds": round(self.seconds, 3)}
        gb = self.bytes / 1e9
        return {"seconds": round(self.seconds, 3), "gb": round(gb, 3), "gb_per_s": round(gb / self.seconds, 3)}


#: Parts by name, in the order in which they first ended.
Parts = dict[str, Part]

_RECORDED: ContextVar[Parts | None] = ContextVar("cold_start_parts", default=None)


@contextmanager
def recorded() -> Iterator[Parts]:
    """Fills the parts it gives with what is `timed` inside, also in what asyncio runs or sends to threads there."""
    parts: Parts = {}
    token = _RECORDED.set(parts)
    try:
        yield parts
    finally:
        _RECORDED.reset(token)


@contextmanager
def timed(name: str, bytes: int = 0) -> Iterator[Part]:
    """Adds what runs inside to the part called `name`; more bytes may be added to the part it gives.

    What is timed within it counts for its own part alone, so that the parts add up to the whole.
    """
    recording = _RECORDED.get()
    parts: Parts = {} if recording is None else recording
    part, before_s, start_s = Part(bytes=bytes), _total_s(parts), perf_counter()
    try:
        yield part
    finally:
        inside_s = _total_s(parts) - before_s
        sum_so_far = parts.setdefault(name, Part())
        sum_so_far.seconds += perf_counter() - start_s - inside_s
        sum_so_far.bytes += part.bytes


def as_dict(parts: Mapping[str, Part]) -> dict[str, dict[str, float]]:
    """For a log line, and for people."""
    return {name: part.as_dict() for name, part in parts.items()}


def _total_s(parts: Mapping[str, Part]) -> float:
    return sum(part.seconds for part in parts.values())
