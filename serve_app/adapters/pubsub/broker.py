"""The queues of a Pub/Sub server: topics, subscriptions, and leases on messages. No network, no clock of its own.

A message is leased to the stream it is sent on until its ack deadline; acknowledged it is gone, otherwise it comes
again. Used from one thread.

A stream that dies gives its leases back at once. A lease whose deadline was set to less than 10 s, or to more than
its stream's own ack deadline, was put aside on purpose (a client that keeps a message alive asks for neither): it
outlives its stream.
"""

import heapq
import itertools
import math
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...jobs.backlog import Reading
from . import filters

#: The shortest ack deadline that Pub/Sub gives a subscription, and its default; seconds.
MIN_ACK_DEADLINE_S = 10
#: Pub/Sub's longest, in seconds.
MAX_ACK_DEADLINE_S = 600


class BrokerFull(Exception):
    """The named bound would be passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What a server keeps in memory at most."""

    #: Of one message; Pub/Sub's own limit.
    message_bytes: int = 10_000_000
    #: In one subscription, delivered or not.
    stored_messages: int = 100_000
    stored_bytes: int = 256_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class SubscriptionConfig:
    """Names are full ones, like `projects/p/topics/t`."""

    name: str
    topic: str
    ack_deadline_s: int = MIN_ACK_DEADLINE_S
    #: See `pubsub_filters`; empty takes every message.
    filter: str = ""
    dead_letter_topic: str = ""
    max_delivery_attempts: int = 5
    #: Redelivery is delayed by `min_backoff_s`, doubling with each attempt up to `max_backoff_s`.
    min_backoff_s: float = 0.0
    max_backoff_s: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a filter that is not understood."""
        filters.parsed(self.filter)

    def wants(self, attributes: Mapping[str, str]) -> bool:
        return filters.parsed(self.filter).matches(attributes)

    def backoff_s(self, attempts: int) -> float:
        return float(min(self.max_backoff_s, self.min_backoff_s * 2.0 ** (attempts - 1)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    data: bytes
    attributes: Mapping[str, str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    #: Seconds since 1970.
    published_at: float = 0.0

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data) + sum(len(name) + len(value) for name, value in self.attributes.items())


@dataclass(slots=True)
class Stream:
    """A subscriber's stream, and what it has been sent and not settled."""

    ack_deadline_s: int = MIN_ACK_DEADLINE_S
    #: 0 is no limit, here and below.
    max_messages: int = 0
    max_bytes: int = 0
    messages: int = 0
    bytes: int = 0

    @property
    def has_room(self) -> bool:
        return not (self.max_messages and self.messages >= self.max_messages) and not (
            self.max_bytes and self.bytes >= self.max_bytes
        )


@dataclass(slots=True)
class Queued:
    message: Message
    attempts: int = 0


@dataclass(slots=True)
class Lease:
    ack_id: str
    queued: Queued
    #: On the broker's clock.
    deadline: float
    stream: Stream | None
    is_put_aside: bool = False


class Subscription:
    def __init__(
        self, config: SubscriptionConfig, clock: Callable[[], float], dead_letter: Callable[[Queued], None]
    ) -> None:
        """`dead_letter` forwards a message to the dead-letter topic."""
        self.config = config
        self._clock = clock
        self._dead_letter = dead_letter
        self._ready: deque[Queued] = deque()
        self._delayed: list[tuple[float, int, Queued]] = []
        self._order = itertools.count()
        self._leases: dict[str, Lease] = {}
        self._bytes = 0

    def check_room(self, bounds: Bounds, messages: Sequence[Message]) -> None:
        """Raises BrokerFull where `messages` do not fit."""
        if len(self._ready) + len(self._delayed) + len(self._leases) + len(messages) > bounds.stored_messages:
            raise BrokerFull(f"{self.config.name} holds at most {bounds.stored_messages} messages")
        if self._bytes + sum(message.size for message in messages) > bounds.stored_bytes:
            raise BrokerFull(f"{self.config.name} holds at most {bounds.stored_bytes} bytes")

    def add(self, message: Message) -> None:
        if self.config.wants(message.attributes):
            self._bytes += message.size
            self._ready.append(Queued(message))

    def backlog(self) -> tuple[int, float]:
        """Messages that are not acknowledged, and when the oldest was published, in seconds since 1970."""
        delayed, leased = [queued for _, _, queued in self._delayed], [one.queued for one in self._leases.values()]
        published = [queued.message.published_at for queued in (*self._ready, *delayed, *leased)]
        return len(published), min(published, default=math.inf)

    def take(self, most: int, stream: Stream | None) -> list[Lease]:
        """Up to `most` due messages, leased to `stream` as far as it has room, or to no stream."""
        self._promote()
        leases: list[Lease] = []
        while self._ready and len(leases) < most and (stream is None or stream.has_room):
            leases.append(self._lease(self._ready.popleft(), stream))
        return leases

    def acknowledge(self, ack_ids: Sequence[str]) -> None:
        for lease in self._known(ack_ids):
            self._end(lease)
            self._bytes -= lease.queued.message.size

    def modify_deadline(self, ack_ids: Sequence[str], seconds: int) -> None:
        """Set the deadline to `seconds` from now; 0 gives the messages back."""
        for lease in self._known(ack_ids):
            if seconds == 0:
                self._give_back(lease)
                continue
            own_s = lease.stream.ack_deadline_s if lease.stream else self.config.ack_deadline_s
            lease.deadline = self._clock() + seconds
            lease.is_put_aside = not MIN_ACK_DEADLINE_S <= seconds <= own_s

    def expire(self) -> bool:
        """Give back what is past its deadline. Says whether a message is due now."""
        now = self._clock()
        for lease in [lease for lease in self._leases.values() if lease.deadline <= now]:
            self._give_back(lease)
        self._promote()
        return bool(self._ready)

    def abandon(self, stream: Stream) -> None:
        """The stream ended: give back what it had, unless it was put aside."""
        for lease in [lease for lease in self._leases.values() if lease.stream is stream]:
            if not lease.is_put_aside:
                self._give_back(lease)

    def _known(self, ack_ids: Sequence[str]) -> Iterator[Lease]:
        return (self._leases[ack_id] for ack_id in ack_ids if ack_id in self._leases)

    def _lease(self, queued: Queued, stream: Stream | None) -> Lease:
        queued.attempts += 1
        deadline_s = stream.ack_deadline_s if stream else self.config.ack_deadline_s
        lease = Lease(uuid.uuid4().hex, queued, self._clock() + deadline_s, stream)
        self._leases[lease.ack_id] = lease
        if stream is not None:
            stream.messages += 1
            stream.bytes += queued.message.size
        return lease

    def _end(self, lease: Lease) -> None:
        del self._leases[lease.ack_id]
        if lease.stream is not None:
            lease.stream.messages -= 1
            lease.stream.bytes -= lease.queued.message.size

    def _give_back(self, lease: Lease) -> None:
        self._end(lease)
        if self.config.dead_letter_topic and lease.queued.attempts >= self.config.max_delivery_attempts:
            self._bytes -= lease.queued.message.size
            self._dead_letter(lease.queued)
            return
        due = self._clock() + self.config.backoff_s(lease.queued.attempts)
        heapq.heappush(self._delayed, (due, next(self._order), lease.queued))

    def _promote(self) -> None:
        now = self._clock()
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])


class Broker:
    """Topics and their subscriptions, by full name. What it is asked for and does not have raises KeyError."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self._bounds = bounds
        self._clock = clock
        self._wall_clock = wall_clock
        self.topics: set[str] = set()
        self.subscriptions: dict[str, Subscription] = {}

    def subscribe(self, config: SubscriptionConfig) -> None:
        """Raises KeyError where there is no such topic."""
        if config.topic not in self.topics:
            raise KeyError(config.topic)

        def dead_letter(queued: Queued) -> None:
            attributes = {
                **queued.message.attributes,
                "CloudPubSubDeadLetterSourceDeliveryCount": str(queued.attempts),
                "CloudPubSubDeadLetterSourceSubscription": config.name.rpartition("/")[2],
            }
            self._fan_out(config.dead_letter_topic, [Message(data=queued.message.data, attributes=attributes)])

        self.subscriptions[config.name] = Subscription(config, self._clock, dead_letter)

    def backlog(self, names: Iterable[str]) -> Reading:
        """Of these subscriptions together."""
        now = self._wall_clock()
        counts = [self.subscriptions[name].backlog() for name in names]
        oldest = min(published_at for _, published_at in counts)
        messages = sum(count for count, _ in counts)
        return Reading(messages=messages, oldest_age_s=max(0.0, now - oldest), taken_at=now)

    def publish(self, topic: str, contents: Sequence[tuple[bytes, Mapping[str, str]]]) -> list[str]:
        """The message ids. Raises KeyError where there is no such topic; BrokerFull, and then stores none."""
        if topic not in self.topics:
            raise KeyError(topic)
        now = self._wall_clock()
        messages = [Message(data=data, attributes=attributes, published_at=now) for data, attributes in contents]
        for message in messages:
            if message.size > self._bounds.message_bytes:
                raise ValueError(f"a message has {message.size} bytes; {self._bounds.message_bytes} are allowed")
        for subscription in self._subscribed(topic):
            subscription.check_room(self._bounds, messages)
        self._fan_out(topic, messages)
        return [message.id for message in messages]

    def _fan_out(self, topic: str, messages: Sequence[Message]) -> None:
        for subscription in self._subscribed(topic):
            for message in messages:
                subscription.add(message)

    def _subscribed(self, topic: str) -> list[Subscription]:
        return [subscription for subscription in self.subscriptions.values() if subscription.config.topic == topic]
