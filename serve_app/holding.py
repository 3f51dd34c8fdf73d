"""When a message is held back although nothing is wrong with it, and how often each has been."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import VariantNotReady
from .ports import Painter
from .settings import Settings


class Shares:
    """Keeps one variant's messages from holding every place of this process: one that cannot paint now has what its own
    replicas could use, one that paints leaves a place to each of the others. What is over waits with the broker."""

    def __init__(self, painter: Painter, settings: Settings) -> None:
        self._painter, self._settings = painter, settings
        self._in_hand: Counter[str] = Counter()

    @contextmanager
    def taken(self, variant: str) -> Iterator[None]:
        """Raises VariantNotReady where the share is used up."""
        if variant not in self._settings.variants:
            # It fails at once, and names that anybody may make up are not kept.
            yield
            return
        share = self._share(variant)
        if share is not None and self._in_hand[variant] >= share:
            raise VariantNotReady(f"variant {variant} has its share of messages in hand")
        self._in_hand[variant] += 1
        try:
            yield
        finally:
            self._in_hand[variant] -= 1

    def _share(self, variant: str) -> int | None:
        variants, places = self._settings.variants, self._settings.in_flight()
        if self._painter.is_ready(variant):
            return max(1, places - (len(variants) - 1)) if len(variants) > 1 else None
        # No more than an equal part, where the settings allow fewer places than all variants could use.
        return min(variants[variant].share, max(1, places // len(variants)))


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
