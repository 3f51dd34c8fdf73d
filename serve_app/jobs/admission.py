"""Which messages are deferred because their variant has its share, and how often each message has been deferred."""

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import VariantNotReady
from ..models import Model
from ..settings import Settings

#: The longest deferral of a message whose variant paints and has its share, in seconds.
RETRY_S = 1.0


class Admission:
    """Keeps one variant's messages from taking every slot of this process: one that cannot paint now has what its own
    replicas could use, one that paints leaves a slot to each of the others. What is over waits with the broker."""

    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        self._models, self._settings = models, settings
        #: Messages, by variant.
        self.in_flight: Counter[str] = Counter()

    @contextmanager
    def admitted(self, variant: str) -> Iterator[None]:
        """Raises VariantNotReady where the share is used up."""
        if variant not in self._settings.served:
            # It fails at once, and made-up names are not kept.
            yield
            return
        share = self._share(variant)
        if share is not None and self.in_flight[variant] >= share:
            # One that paints has room again soon, and must not wait for a message then.
            soon = {"retry_after_s": RETRY_S} if self._models[variant].is_ready else {}
            raise VariantNotReady(f"variant {variant} has its share of messages in flight", **soon)
        self.in_flight[variant] += 1
        try:
            yield
        finally:
            self.in_flight[variant] -= 1

    def _share(self, variant: str) -> int | None:
        variants, slots = self._settings.served, self._settings.in_flight()
        if self._models[variant].is_ready:
            return max(1, slots - (len(variants) - 1)) if len(variants) > 1 else None
        # No more than an equal part, where the settings allow fewer slots than all variants could use.
        return min(self._settings.share(variant), max(1, slots // len(variants)))


class Deferrals:
    """How often, and for how long, each message was deferred without using an attempt. Per process, and bounded."""

    def __init__(self, at_most: int = 10_000) -> None:
        #: Times and the first one's moment on the monotonic clock, the least recently deferred first.
        self._deferred: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._at_most = at_most

    def count(self, message_id: str) -> int:
        """How often, this time included."""
        times, since = self._deferred.pop(message_id, (0, time.monotonic()))
        self._deferred[message_id] = times + 1, since
        if len(self._deferred) > self._at_most:
            self._deferred.popitem(last=False)
        return times + 1

    def waited_s(self, message_id: str) -> float:
        """Seconds since it was first deferred."""
        now = time.monotonic()
        return now - self._deferred.get(message_id, (0, now))[1]

    def forget(self, message_id: str) -> None:
        self._deferred.pop(message_id, None)
