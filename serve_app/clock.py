"""The present time, as an argument."""

from collections.abc import Callable
from datetime import UTC, datetime

#: The present, with a time zone.
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """By this machine's clock."""
    return datetime.now(UTC)
