"""A message broker in the memory of this process, for tests: the settings' topics and subscriptions, and holding back.

Held to the same contract tests as Pub/Sub. Sources and publishers of one `memory:NAME` meet, whichever thread or event
loop they are used from.
"""

import asyncio
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import ClassVar

from ..ports import DeadLetter, Delivery, Handler, SourceStatus, Topic, Verdict
from ..settings import MessagesSettings
from .places import RANKS, Turns
from .pubsub_filters import parsed
from .pubsub_names import topic_names

log = logging.getLogger(__name__)

#: How long a message is held back whose handler raised, in seconds.
ERROR_HOLD_S = 1.0
#: How long dead letters are in hand, in seconds.
IN_HAND_S = 60.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    delivery: Delivery
    #: On the monotonic clock; not to be delivered before.
    not_before: float


@dataclass
class _Queue:
    """The messages of one subscription that nobody has in hand."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: list[_Waiting] = field(default_factory=list)
    #: Called after each new message, from whatever thread brought it.
    listeners: list[Callable[[], object]] = field(default_factory=list)

    _named: ClassVar[dict[tuple[str, str], "_Queue"]] = {}

    @classmethod
    def of(cls, url: str, subscription: str) -> "_Queue":
        return cls._named.setdefault((url, subscription), cls())

    def put(self, delivery: Delivery, delay_s: float = 0.0) -> None:
        with self.lock:
            self.waiting.append(_Waiting(delivery, time.monotonic() + delay_s))
            listeners = tuple(self.listeners)
        for listener in listeners:
            listener()

    def take(self) -> Delivery | None:
        """The first message that is due."""
        now = time.monotonic()
        with self.lock:
            for i, waiting in enumerate(self.waiting):
                if waiting.not_before <= now:
                    return self.waiting.pop(i).delivery
        return None

    def lend(self, delay_s: float) -> Delivery | None:
        """The first message that is due; it comes again after `delay_s`, unless it is removed."""
        delivery = self.take()
        if delivery is not None:
            self.put(delivery, delay_s)
        return delivery

    def remove(self, delivery: Delivery) -> bool:
        """Whether it was there."""
        with self.lock:
            left = [waiting for waiting in self.waiting if waiting.delivery is not delivery]
            was_there, self.waiting = len(left) < len(self.waiting), left
        return was_there

    def due_since(self) -> float:
        """Since when the first message that is due is so, on the monotonic clock; infinity where none is."""
        with self.lock:
            since = next((w.not_before for w in self.waiting if w.not_before <= time.monotonic()), math.inf)
        return since

    def until_due_s(self) -> float:
        """Seconds until a message will be due; infinity while there is none."""
        with self.lock:
            due = min((waiting.not_before for waiting in self.waiting), default=math.inf)
        return max(0.0, due - time.monotonic())


class MemorySource:
    def __init__(self, settings: MessagesSettings, in_flight: int) -> None:
        self._subscriptions = {
            name: _Subscribed(_Queue.of(settings.url, name), RANKS[subscription.priority])
            for name, subscription in settings.subscriptions.items()
        }
        self._in_flight = in_flight
        self._turns = Turns()
        self._wake = asyncio.Event()
        self._closing = False
        self._running = False

    async def run(self, handle: Handler) -> None:
        loop = asyncio.get_running_loop()

        def listener() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._wake.set)

        for subscription in self._subscriptions.values():
            subscription.queue.listeners.append(listener)
        self._running = True
        try:
            while not self._closing:
                self._start_due(handle)
                await self._until_woken()
        finally:
            self._running = False
            for subscription in self._subscriptions.values():
                subscription.queue.listeners.remove(listener)
            await self._cancel_tasks()

    async def close(self, *, grace_s: float) -> None:
        self._closing = True
        self._wake.set()
        if tasks := self._tasks():
            await asyncio.wait(tasks, timeout=grace_s)
        await self._cancel_tasks()

    def status(self) -> Mapping[str, SourceStatus]:
        connected = self._running and not self._closing
        return {
            name: SourceStatus(
                connected=connected, error="" if connected else "not running", held=len(subscribed.tasks)
            )
            for name, subscribed in self._subscriptions.items()
        }

    def _tasks(self) -> list[asyncio.Task[Verdict]]:
        return [task for subscribed in self._subscriptions.values() for task in subscribed.tasks]

    def _start_due(self, handle: Handler) -> None:
        self._wake.clear()
        while not self._closing and len(self._tasks()) < self._in_flight and (subscribed := self._next()):
            # Somebody else may have been quicker.
            if delivery := subscribed.queue.take():
                task = asyncio.create_task(self._deliver(delivery, handle))
                subscribed.tasks.add(task)
                task.add_done_callback(partial(self._ended, subscribed, delivery))

    def _next(self) -> "_Subscribed | None":
        """Whose message is to be handled next."""
        since = {subscribed: subscribed.queue.due_since() for subscribed in self._subscriptions.values()}
        waiting = sorted((s for s in since if since[s] < math.inf), key=since.__getitem__)
        return waiting[self._turns.choose([subscribed.rank for subscribed in waiting])] if waiting else None

    def _ended(self, subscribed: "_Subscribed", delivery: Delivery, task: asyncio.Task[Verdict]) -> None:
        subscribed.tasks.discard(task)
        verdict = Verdict(action="nack", reason="interrupted") if task.cancelled() else task.result()
        if verdict.action != "ack":
            subscribed.queue.put(delivery, verdict.delay_s)
        self._wake.set()

    async def _until_woken(self) -> None:
        is_full = len(self._tasks()) >= self._in_flight
        due_s = min(subscribed.queue.until_due_s() for subscribed in self._subscriptions.values())
        try:
            async with asyncio.timeout(None if is_full or due_s == math.inf else due_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _deliver(self, delivery: Delivery, handle: Handler) -> Verdict:
        try:
            return await handle(delivery)
        except Exception:
            log.exception("The handler of message %s failed", delivery.message_id, extra={"action": "handler_failed"})
            return Verdict(action="hold", delay_s=ERROR_HOLD_S, reason="handler_failed")

    async def _cancel_tasks(self) -> None:
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(eq=False)
class _Subscribed:
    queue: _Queue
    rank: int
    #: Its messages in hand.
    tasks: set[asyncio.Task[Verdict]] = field(default_factory=set)


class MemoryPublisher:
    def __init__(self, settings: MessagesSettings) -> None:
        self._settings = settings
        self._topics = topic_names(settings)

    async def publish(self, topic: Topic, data: bytes, attributes: Mapping[str, str]) -> str:
        """Raises ValueError for a topic that the settings do not name."""
        if topic not in self._topics:
            raise ValueError(f"the settings name no topic for {topic!r} messages")
        message_id = uuid.uuid4().hex
        for subscription in self._subscribed(topic, attributes):
            delivery = Delivery(
                data=bytes(data), attributes=dict(attributes), message_id=message_id, publish_time=datetime.now(UTC)
            )
            _Queue.of(self._settings.url, subscription).put(delivery)
        return message_id

    def _subscribed(self, topic: Topic, attributes: Mapping[str, str]) -> list[str]:
        if topic == "dead":
            return [self._settings.dead_letter_subscription]
        if topic == "completed":
            return [self._topics[topic]]
        subscriptions = self._settings.subscriptions.items()
        return [name for name, subscription in subscriptions if parsed(subscription.filter).matches(attributes)]


class MemoryDeadLetters:
    def __init__(self, settings: MessagesSettings) -> None:
        self._queue = _Queue.of(settings.url, settings.dead_letter_subscription)

    async def pull(self, limit: int) -> Sequence[DeadLetter]:
        letters: list[DeadLetter] = []
        while len(letters) < limit and (delivery := self._queue.lend(IN_HAND_S)):
            letters.append(DeadLetter(delivery=delivery, ack_id=delivery.message_id))
        return letters

    async def acknowledge(self, letters: Sequence[DeadLetter]) -> None:
        for letter in letters:
            self._queue.remove(letter.delivery)

    async def give_back(self, letters: Sequence[DeadLetter]) -> None:
        for letter in letters:
            if self._queue.remove(letter.delivery):
                self._queue.put(letter.delivery)

    async def close(self) -> None: ...
