"""The embedded Pub/Sub server: its queues under a clock of the test's, and its wire through Google's clients."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.api_core import exceptions
from google.pubsub_v1 import types
from google.pubsub_v1.services.publisher import PublisherClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber import SubscriberClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from serve_app.adapters.pubsub.broker import Bounds, Broker, BrokerFull, Lease, Stream, SubscriptionConfig
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.errors import BrokerUnavailable, SettingsError
from serve_app.settings import MessagesSettings, SubscriptionSettings

TOPIC, DEAD, NAME = "projects/p/topics/t", "projects/p/topics/dead", "projects/p/subscriptions/s"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Queues:
    """A broker with one subscription, in a test's hands."""

    def __init__(self, bounds: Bounds | None = None, **config: Any) -> None:
        self.clock = Clock()
        self.broker = Broker(bounds or Bounds(), self.clock, lambda: 0.0)
        self.broker.topics |= {TOPIC, DEAD}
        self.broker.subscribe(SubscriptionConfig(name=NAME, topic=TOPIC, **config))
        self.broker.subscribe(SubscriptionConfig(name=NAME + "-dead", topic=DEAD))
        self.subscription = self.broker.subscriptions[NAME]
        self.dead = self.broker.subscriptions[NAME + "-dead"]

    def publish(self, *bodies: bytes, **attributes: str) -> list[str]:
        return self.broker.publish(TOPIC, [(body, attributes) for body in bodies])

    def take(self, stream: Stream | None = None, most: int = 100) -> list[Lease]:
        return self.subscription.take(most, stream)

    def pass_time(self, seconds: float) -> bool:
        self.clock.now += seconds
        return self.subscription.expire()


def bodies(leases: list[Lease]) -> list[bytes]:
    return [lease.queued.message.data for lease in leases]


def test_messages_come_in_order_and_once() -> None:
    queues = Queues()
    queues.publish(b"1", b"2", b"3")
    leases = queues.take(most=2)
    assert bodies(leases) == [b"1", b"2"] and bodies(queues.take()) == [b"3"]
    queues.subscription.acknowledge([lease.ack_id for lease in leases] + ["unknown"])
    assert queues.pass_time(10) and bodies(queues.take()) == [b"3"]


def test_a_lease_ends_at_its_deadline_and_no_earlier() -> None:
    queues = Queues(ack_deadline_s=20)
    queues.publish(b"x")
    [lease] = queues.take()
    assert not queues.pass_time(19.5)
    queues.subscription.modify_deadline([lease.ack_id], 15)
    assert not queues.pass_time(14.5)
    assert queues.pass_time(0.5)
    queues.subscription.acknowledge([lease.ack_id])
    [again] = queues.take()
    assert again.ack_id != lease.ack_id, "the old lease settles nothing any more"


def test_a_nacked_message_is_due_at_once() -> None:
    queues = Queues()
    queues.publish(b"x")
    queues.subscription.modify_deadline([queues.take()[0].ack_id], 0)
    assert bodies(queues.take()) == [b"x"]


def test_a_stream_is_sent_no_more_than_it_has_room_for() -> None:
    queues, stream = Queues(), Stream(max_messages=2)
    queues.publish(b"1", b"2", b"3", b"4")
    first, second = queues.take(stream)
    assert not queues.take(stream)
    queues.subscription.acknowledge([first.ack_id])
    queues.subscription.modify_deadline([second.ack_id], 0)
    assert bodies(queues.take(stream)) == [b"3", b"4"]


def test_a_stream_is_sent_no_more_bytes_than_it_has_room_for() -> None:
    queues, stream = Queues(), Stream(max_bytes=15)
    queues.publish(b"x" * 10, b"x" * 10, b"x" * 10)
    assert len(queues.take(stream)) == 2, "the limit may be passed by one message, or large ones would never come"
    assert not queues.take(stream)


def test_what_a_stream_had_comes_back_when_it_ends() -> None:
    queues, one, other = Queues(), Stream(), Stream()
    queues.publish(b"1", b"2")
    queues.take(one, most=1)
    [kept] = queues.take(other)
    queues.subscription.modify_deadline([kept.ack_id], 10)
    queues.subscription.abandon(one)
    assert bodies(queues.take(other)) == [b"1"]
    queues.subscription.abandon(other)
    assert sorted(bodies(queues.take())) == [b"1", b"2"]


@pytest.mark.parametrize("seconds", [1, 9, 11, 600])
def test_what_was_put_aside_outlives_its_stream(seconds: int) -> None:
    queues, stream = Queues(), Stream(ack_deadline_s=10)
    queues.publish(b"x")
    queues.subscription.modify_deadline([queues.take(stream)[0].ack_id], seconds)
    queues.subscription.abandon(stream)
    assert not queues.pass_time(seconds - 0.5)
    assert queues.pass_time(0.5)


def test_redelivery_backs_off() -> None:
    queues = Queues(min_backoff_s=10, max_backoff_s=25)
    queues.publish(b"x")
    for delay_s in (10, 20, 25, 25):
        queues.subscription.modify_deadline([queues.take()[0].ack_id], 0)
        assert not queues.pass_time(delay_s - 0.5)
        assert queues.pass_time(0.5)


def test_used_up_messages_go_to_the_dead_letter_topic() -> None:
    queues = Queues(dead_letter_topic=DEAD, max_delivery_attempts=2)
    queues.publish(b"x", reason="r")
    for _ in range(2):
        queues.subscription.modify_deadline([queues.take()[0].ack_id], 0)
    assert queues.take() == []
    [dead] = queues.dead.take(10, None)
    assert dead.queued.message.data == b"x"
    assert dict(dead.queued.message.attributes) == {
        "reason": "r",
        "CloudPubSubDeadLetterSourceDeliveryCount": "2",
        "CloudPubSubDeadLetterSourceSubscription": "s",
    }


def test_a_filter_lets_through_what_it_names() -> None:
    queues = Queues(filter='attributes.kind = "a"')
    queues.publish(b"1", kind="a")
    queues.publish(b"2", kind="b")
    queues.publish(b"3")
    assert bodies(queues.take()) == [b"1"]


def test_every_subscription_of_a_topic_gets_a_message_of_its_own() -> None:
    queues = Queues()
    queues.broker.subscribe(SubscriptionConfig(name="other", topic=TOPIC))
    queues.publish(b"x")
    queues.subscription.acknowledge([queues.take()[0].ack_id])
    assert bodies(queues.broker.subscriptions["other"].take(1, None)) == [b"x"]


@pytest.mark.parametrize("bounds", [Bounds(stored_messages=2), Bounds(stored_bytes=2)])
def test_what_is_stored_is_bounded(bounds: Bounds) -> None:
    queues = Queues(bounds)
    queues.publish(b"1")
    with pytest.raises(BrokerFull, match="holds at most 2"):
        queues.publish(b"2", b"3")
    queues.publish(b"2")
    leases = queues.take()
    with pytest.raises(BrokerFull):
        queues.publish(b"3")
    queues.subscription.acknowledge([leases[0].ack_id])
    queues.publish(b"3")


def test_ids_are_not_used_again() -> None:
    ids = [Queues().publish(b"x")[0] for _ in range(10)]
    assert len(set(ids)) == 10


# The wire


@pytest.fixture
def server() -> Iterator[EmbeddedPubSub]:
    bounds = Bounds(message_bytes=5_000_000, stored_messages=3)
    subscriptions = [SubscriptionConfig(name=NAME, topic=TOPIC)]
    with EmbeddedPubSub("127.0.0.1", 0, topics=[TOPIC, DEAD], subscriptions=subscriptions, bounds=bounds) as server:
        yield server


@pytest.fixture
def publisher(server: EmbeddedPubSub) -> Iterator[PublisherClient]:
    with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        yield PublisherClient(transport=PublisherGrpcTransport(channel=channel))


@pytest.fixture
def subscriber(server: EmbeddedPubSub) -> Iterator[SubscriberClient]:
    with grpc.insecure_channel(server.address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))


def publish(publisher: PublisherClient, *bodies: bytes, topic: str = TOPIC, **attributes: str) -> None:
    messages = [{"data": body, "attributes": attributes} for body in bodies]
    publisher.publish(topic=topic, messages=messages, retry=None)


def pull(subscriber: SubscriberClient, timeout_s: float = 5.0, subscription: str = NAME) -> list[Any]:
    return list(subscriber.pull(subscription=subscription, max_messages=10, timeout=timeout_s).received_messages)


def test_pulling(publisher: PublisherClient, subscriber: SubscriberClient) -> None:
    publish(publisher, b"x", a="b")
    [received] = pull(subscriber)
    assert (received.message.data, dict(received.message.attributes)) == (b"x", {"a": "b"})
    subscriber.modify_ack_deadline(subscription=NAME, ack_ids=[received.ack_id], ack_deadline_seconds=0)
    [again] = pull(subscriber)
    assert again.message.message_id == received.message.message_id
    subscriber.acknowledge(subscription=NAME, ack_ids=[again.ack_id])
    assert pull(subscriber, timeout_s=0.4) == []


def test_policies_arrive(publisher: PublisherClient, subscriber: SubscriberClient) -> None:
    name = "projects/p/subscriptions/strict"
    subscriber.create_subscription(
        request={
            "name": name,
            "topic": TOPIC,
            "ack_deadline_seconds": 30,
            "filter": 'attributes.kind = "a"',
            "dead_letter_policy": {"dead_letter_topic": DEAD, "max_delivery_attempts": 5},
            "retry_policy": {"minimum_backoff": {"seconds": 0}, "maximum_backoff": {"seconds": 1}},
        }
    )
    subscriber.create_subscription(request={"name": "projects/p/subscriptions/dead", "topic": DEAD})
    assert subscriber.get_subscription(subscription=name).ack_deadline_seconds == 30
    publish(publisher, b"b", kind="b")
    publish(publisher, b"a", kind="a")
    for attempt in range(1, 6):
        [received] = pull(subscriber, subscription=name)
        assert (received.message.data, received.delivery_attempt) == (b"a", attempt)
        subscriber.modify_ack_deadline(subscription=name, ack_ids=[received.ack_id], ack_deadline_seconds=0)
    [dead] = pull(subscriber, subscription="projects/p/subscriptions/dead")
    assert dead.message.attributes["CloudPubSubDeadLetterSourceDeliveryCount"] == "5"


def test_topics_and_subscriptions_are_administered(publisher: PublisherClient, subscriber: SubscriberClient) -> None:
    assert [topic.name for topic in publisher.list_topics(project="projects/p")] == [DEAD, TOPIC]
    assert publisher.get_topic(topic=TOPIC).name == TOPIC
    for again in (
        lambda: publisher.create_topic(name=TOPIC),
        lambda: subscriber.create_subscription(name=NAME, topic=TOPIC),
    ):
        with pytest.raises(exceptions.AlreadyExists):
            again()
    subscriber.delete_subscription(subscription=NAME)
    publisher.delete_topic(topic=TOPIC)
    for missing in (
        lambda: publisher.get_topic(topic=TOPIC),
        lambda: publisher.delete_topic(topic=TOPIC),
        lambda: publish(publisher, b"x"),
        lambda: subscriber.create_subscription(name=NAME, topic=TOPIC),
        lambda: subscriber.get_subscription(subscription=NAME),
        lambda: subscriber.delete_subscription(subscription=NAME),
        lambda: subscriber.acknowledge(subscription=NAME, ack_ids=["x"]),
        lambda: pull(subscriber),
        lambda: list(subscriber.streaming_pull(iter([types.StreamingPullRequest(subscription=NAME)]))),
    ):
        with pytest.raises(exceptions.NotFound, match=r"there is no projects/p/(topics/t|subscriptions/s)"):
            missing()


def test_a_stream_ends_when_its_subscription_is_deleted(subscriber: SubscriberClient) -> None:
    ended = threading.Event()

    def requests() -> Iterator[types.StreamingPullRequest]:
        yield types.StreamingPullRequest(subscription=NAME)
        ended.wait()

    stream = iter(subscriber.streaming_pull(requests()))
    assert not next(stream).received_messages
    subscriber.delete_subscription(subscription=NAME)
    with pytest.raises(exceptions.NotFound, match="deleted"):
        next(stream)
    ended.set()


def test_bounds_are_named(publisher: PublisherClient, subscriber: SubscriberClient) -> None:
    publish(publisher, b"x" * 4_900_000)
    with pytest.raises(exceptions.InvalidArgument, match="5100000 bytes; 5000000 are allowed"):
        publish(publisher, b"x" * 5_100_000)
    publish(publisher, b"2", b"3")
    with pytest.raises(exceptions.ResourceExhausted, match="subscriptions/s holds at most 3 messages"):
        publish(publisher, b"4")
    publish(publisher, b"4", topic=DEAD)
    assert len(pull(subscriber)) == 3


def test_what_is_not_understood_is_refused(subscriber: SubscriberClient) -> None:
    with pytest.raises(exceptions.InvalidArgument, match="filter"):
        subscriber.create_subscription(
            request={"name": NAME + "2", "topic": TOPIC, "filter": "hasPrefix(attributes.a, 'x')"}
        )
    with pytest.raises(exceptions.InvalidArgument, match="601"):
        subscriber.modify_ack_deadline(subscription=NAME, ack_ids=["x"], ack_deadline_seconds=601)
    with pytest.raises(exceptions.MethodNotImplemented):
        subscriber.seek(request={"subscription": NAME})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", "example.org", ""])
def test_it_listens_on_loopback_only(host: str) -> None:
    with pytest.raises(SettingsError, match="loopback"):
        EmbeddedPubSub(host, 0)


def test_a_port_that_is_taken_is_said_to_be() -> None:
    with EmbeddedPubSub("127.0.0.1", 0) as other:
        late = EmbeddedPubSub("127.0.0.1", int(other.address.rpartition(":")[2]))
        with pytest.raises(BrokerUnavailable, match=rf"{late.address}: another program .*messages\.url"), late:
            pass
    with late:
        assert late.address == other.address, "it starts once the port is free"


def test_it_has_every_topic_and_subscription_that_the_settings_name() -> None:
    settings = MessagesSettings(
        url="embedded://127.0.0.1:0",
        topic="jobs",
        subscriptions={
            "urgent": SubscriptionSettings(priority="high", filter='attributes.priority = "high"'),
            "others": SubscriptionSettings(filter='attributes.priority != "high"'),
        },
        dead_letter_topic="jobs-dead",
        dead_letter_subscription="graveyard",
        completion_topic="jobs-done",
    )
    with (
        EmbeddedPubSub.of(settings) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        publisher = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        for topic, attributes in (("jobs", {"priority": "high"}), ("jobs", {}), ("jobs-dead", {}), ("jobs-done", {})):
            publish(publisher, str(attributes).encode(), topic=f"projects/local/topics/{topic}", **attributes)
        for subscription in ("urgent", "others", "graveyard", "jobs-done"):
            [received] = pull(subscriber, subscription=f"projects/local/subscriptions/{subscription}")
            assert (received.message.data == b"{}") == (subscription != "urgent")


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ({"subscriptions": {"urgent": {"filter": "priority = high"}}}, "subscriptions.urgent: filter"),
        (
            {"topic": "jobs", "completion_topic": "session-processing"},
            "two subscriptions are named session-processing",
        ),
        ({"dead_letter_subscription": "done", "completion_topic": "done"}, "two subscriptions are named done"),
    ],
)
def test_settings_it_cannot_follow_are_refused(messages: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        EmbeddedPubSub.of(MessagesSettings(**messages))


async def test_it_runs_on_a_given_loop_and_its_settings_name_what_it_has() -> None:
    server = EmbeddedPubSub.of(MessagesSettings(url="embedded://localhost:0"))
    await server.start()
    try:
        assert server.address.startswith("localhost:") and not server.address.endswith(":0")
    finally:
        await server.stop()
