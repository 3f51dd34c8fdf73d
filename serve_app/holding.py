"""When a message is held back although nothing is wrong with it, and how often each has been."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import VariantNotReady
from .ports import Painter
from .settings import Settings


class Shares:
    """Keeps a variant that cannot paint now from holding every place of this process: it has what its own replicas
    could use, and its other messages wait with the broker. A variant that paints may use every place there is."""

    def __init__(self, painter: Painter, settings: Settings) -> None:
        self._painter, self._settings = painter, settings
        self._in_hand: Counter[str] = Counter()

    @contextmanager
    def taken(self, variant: str) -> Iterator[None]:
        """Raises VariantNotReady where the share is used up."""
        served = self._settings.variants.get(variant)
        is_full = served is not None and self._in_hand[variant] >= served.share
        if is_full and not self._painter.is_ready(variant):
            raise VariantNotReady(f"variant {variant} cannot paint yet, and its share of messages is in hand")
        self._in_hand[variant] += 1
        try:
            yield
        finally:
            self._in_hand[variant] -= 1


class Waits:
    """How often each message was held back without using an attempt. Per process, and bounded: it only spaces out."""

    def __init__(self, at_most: int = 10_000) -> None:
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._at_most = at_most

    def count(self, message_id: str) -> int:
        self._counts[message_id] = self._counts.pop(message_id, 0) + 1
        if len(self._counts) > self._at_most:
            self._counts.popitem(last=False)
        return self._counts[message_id]

    def forget(self, message_id: str) -> None:
        self._counts.pop(message_id, None)
