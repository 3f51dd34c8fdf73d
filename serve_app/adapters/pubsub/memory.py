"""A message broker in the memory of this process, for tests: the embedded server's queues without its network.

Sources, publishers and dead letters of one `memory:NAME` meet, whichever thread or event loop they are used from.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import ClassVar, TypeVar

from ...jobs.backlog import Reading
from ...jobs.ports import Delivery, Topic
from ...settings import MessagesSettings
from .broker import MIN_ACK_DEADLINE_S, Bounds, Broker, Lease, Subscription
from .client import PubSubDeadLetters, Received, subscription_path, topic_names, topic_path
from .embedded import wanted
from .source import PubSubSource

T = TypeVar("T")

#: How often a pull looks for messages, in seconds.
_LOOK_S = 0.01


class Queues:
    """What all who name one `memory:NAME` share. It has the topics and subscriptions of their settings."""

    _named: ClassVar[dict[str, "Queues"]] = {}

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._broker = Broker(Bounds(), time.monotonic, time.time)

    @classmethod
    def of(cls, settings: MessagesSettings) -> "Queues":
        queues = cls._named.setdefault(settings.url, cls())
        queues.do(lambda broker: _add(broker, settings))
        return queues

    def do(self, work: Callable[[Broker], T]) -> T:
        with self._lock:
            return work(self._broker)


def _add(broker: Broker, settings: MessagesSettings) -> None:
    for config in wanted(settings):
        broker.topics.add(config.topic)
        if config.name not in broker.subscriptions:
            broker.subscribe(config)


class QueueSubscriber:
    """`pubsub_client.Subscriber`."""

    def __init__(self, settings: MessagesSettings) -> None:
        self._queues, self._settings = Queues.of(settings), settings

    async def pull(self, subscription: str, most: int, wait_s: float) -> Sequence[Received]:
        ends_at = time.monotonic() + wait_s
        while not (leases := self._of(subscription, lambda queue: _taken(queue, most))):
            if time.monotonic() >= ends_at:
                return ()
            await asyncio.sleep(_LOOK_S)
        return [Received(lease.ack_id, _delivery(lease)) for lease in leases]

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> None:
        self._of(subscription, lambda queue: queue.acknowledge(ack_ids))

    async def set_deadline(
        self, subscription: str, ack_ids: Sequence[str], seconds: int, *, limit_s: float = 0.0
    ) -> None:
        self._of(subscription, lambda queue: queue.modify_deadline(ack_ids, seconds))

    def lease_s(self, _subscription: str) -> int:
        return MIN_ACK_DEADLINE_S

    async def close(self) -> None: ...

    def _of(self, subscription: str, work: Callable[[Subscription], T]) -> T:
        name = subscription_path(self._settings, subscription)
        return self._queues.do(lambda broker: work(broker.subscriptions[name]))


def _taken(queue: Subscription, most: int) -> list[Lease]:
    queue.expire()
    return queue.take(most, None)


def _delivery(lease: Lease) -> Delivery:
    message = lease.queued.message
    return Delivery(
        data=message.data,
        attributes=dict(message.attributes),
        message_id=message.id,
        publish_time=datetime.fromtimestamp(message.published_at, UTC),
    )


class MemorySource(PubSubSource):
    def __init__(self, settings: MessagesSettings, in_flight: int) -> None:
        super().__init__(settings, in_flight, subscriber=QueueSubscriber(settings))


class MemoryBacklog:
    def __init__(self, settings: MessagesSettings) -> None:
        self._queues = Queues.of(settings)
        self._names = [subscription_path(settings, name) for name in settings.subscriptions]

    async def read(self) -> Reading:
        return self._queues.do(lambda broker: broker.backlog(self._names))


class MemoryDeadLetters(PubSubDeadLetters):
    def __init__(self, settings: MessagesSettings) -> None:
        super().__init__(settings, QueueSubscriber(settings))


class MemoryPublisher:
    def __init__(self, settings: MessagesSettings) -> None:
        self._queues = Queues.of(settings)
        self._topics = {topic: topic_path(settings, name) for topic, name in topic_names(settings).items()}

    async def publish(self, topic: Topic, data: bytes, attributes: Mapping[str, str]) -> str:
        """Raises ValueError for a topic that the settings do not name."""
        if topic not in self._topics:
            raise ValueError(f"the settings name no topic for {topic!r} messages")
        contents = [(bytes(data), dict(attributes))]
        (message_id,) = self._queues.do(lambda broker: broker.publish(self._topics[topic], contents))
        return message_id
