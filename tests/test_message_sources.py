"""What every message source and publisher guarantees, and what those over Pub/Sub add."""

import asyncio
import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.adapters.pubsub import client
from serve_app.adapters.pubsub import source as pubsub
from serve_app.adapters.pubsub.client import PubSubPublisher
from serve_app.errors import BrokerUnavailable, SettingsError
from serve_app.jobs.ports import Delivery, Verdict
from serve_app.settings import MessagesSettings, SubscriptionSettings

from .backends import Broker, Recorder, status_of, until

ACK = Verdict(action="ack")


async def publish(broker: Broker, *bodies: bytes) -> list[str]:
    return await broker.publish(*bodies)


class Held:
    """A handler that keeps what it is given until it is told to let go."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.at_work = 0
        self.most_at_work = 0
        self.canceled = 0

    async def __call__(self, _delivery: Delivery) -> Verdict:
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.canceled += 1
            raise
        finally:
            self.at_work -= 1
        return ACK


def once(first: Verdict) -> Callable[[Delivery], Awaitable[Verdict]]:
    """Answer each message's first delivery with `first`, and acknowledge the next."""
    seen: set[bytes] = set()

    async def decide(delivery: Delivery) -> Verdict:
        is_first = delivery.data not in seen
        seen.add(delivery.data)
        return first if is_first else ACK

    return decide


async def test_pulls_that_bring_nothing_prove_an_empty_queue_until_one_brings_a_message(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub, "PULL_S", 0.2)
    handle = Recorder()
    async with broker.source(handle) as source:
        await until(lambda: status_of(source).empty_s > 0.5)
        published_at = time.monotonic()
        await publish(broker, b"1")
        await until(lambda: handle.deliveries)
        assert status_of(source).empty_s < time.monotonic() - published_at
        await until(lambda: status_of(source).empty_s > 0)


async def test_a_message_arrives_as_it_was_published(broker: Broker) -> None:
    before = datetime.now(UTC) - timedelta(seconds=5)
    attributes = {"traceparent": "00-1", "topic": "t", "data": "d", "ü": "ö"}
    message_id = await broker.publisher.publish("sessions", b'{"userId":"\xc3\xbc"}', attributes)
    handle = Recorder()
    async with broker.source(handle):
        await until(lambda: handle.deliveries)
    [delivery] = handle.deliveries
    assert (delivery.data, delivery.attributes) == (b'{"userId":"\xc3\xbc"}', attributes)
    assert delivery.message_id == message_id
    assert delivery.publish_time and before < delivery.publish_time < datetime.now(UTC) + timedelta(seconds=5)


async def test_what_is_acknowledged_does_not_come_again(forgetting_broker: Broker) -> None:
    bodies = [b"%d" % i for i in range(20)]
    ids = await publish(forgetting_broker, *bodies)
    assert len(set(ids)) == 20
    handle = Recorder()
    async with forgetting_broker.source(handle):
        await until(lambda: len(handle.deliveries) == 20)
    async with forgetting_broker.source(handle):
        await publish(forgetting_broker, b"last")
        await until(lambda: b"last" in handle.bodies)
    assert sorted(handle.bodies) == sorted([*bodies, b"last"])


async def test_a_message_that_is_held_back_for_no_time_comes_again(broker: Broker) -> None:
    handle = Recorder(once(Verdict(action="defer")))
    async with broker.source(handle):
        await publish(broker, b"x")
        await until(lambda: len(handle.deliveries) == 2)


@pytest.mark.slow
async def test_a_held_message_comes_after_its_delay_and_no_earlier(broker: Broker) -> None:
    async def decide(delivery: Delivery) -> Verdict:
        is_first = handle.bodies.count(delivery.data) == 1
        return Verdict(action="defer", delay_s=1) if is_first and delivery.data == b"held" else ACK

    handle = Recorder(decide)
    async with broker.source(handle):
        await publish(broker, b"held", b"other")
        await until(lambda: handle.bodies.count(b"held") == 2)
    first, second = (time for time, body in zip(handle.times, handle.bodies, strict=True) if body == b"held")
    assert second - first >= 0.99
    assert b"other" in handle.bodies[:2], "what is held back does not stand in the way"


async def test_held_messages_take_no_place(broker: Broker) -> None:
    async def decide(delivery: Delivery) -> Verdict:
        return Verdict(action="defer", delay_s=60) if delivery.data.startswith(b"held") else ACK

    handle = Recorder(decide)
    async with broker.source(handle, in_flight=2) as source:
        await publish(broker, *(b"held%d" % i for i in range(4)))
        await until(lambda: len(handle.deliveries) == 4)
        await publish(broker, b"1", b"2", b"3")
        await until(lambda: {b"1", b"2", b"3"} <= set(handle.bodies))
        await until(lambda: status_of(source).held == 0)
    assert len(handle.deliveries) == 7


async def test_no_more_than_in_flight_are_handled_at_a_time(broker: Broker) -> None:
    handle = Held()
    async with broker.source(handle, in_flight=3) as source:
        await publish(broker, *(b"%d" % i for i in range(8)))
        await until(lambda: handle.at_work == 3)
        assert status_of(source).connected and status_of(source).held >= 3
        handle.go_on.set()
        await until(lambda: status_of(source).held == 0 and handle.at_work == 0)
    assert handle.most_at_work == 3


@pytest.mark.slow
async def test_a_handler_that_fails_gets_the_message_again(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pubsub, "ERROR_DEFER_S", 1.0)

    async def fail_once(_delivery: Delivery) -> Verdict:
        if len(handle.deliveries) == 1:
            raise RuntimeError("a bug")
        return ACK

    handle = Recorder(fail_once)
    async with broker.source(handle):
        await publish(broker, b"x")
        await until(lambda: len(handle.deliveries) == 2)
    assert handle.times[1] - handle.times[0] >= 0.9


async def test_close_waits_for_what_is_in_hand(forgetting_broker: Broker) -> None:
    handle = Held()
    source = adapters.message_source(forgetting_broker.settings, 5)
    running = asyncio.create_task(source.run(handle))
    await publish(forgetting_broker, b"x")
    await until(lambda: handle.at_work == 1)
    closing = asyncio.create_task(source.close(grace_s=30))
    await publish(forgetting_broker, b"late")
    handle.go_on.set()
    await asyncio.gather(closing, running)
    assert handle.canceled == 0
    assert status_of(source).held == 0 and not status_of(source).connected

    after = Recorder()
    async with forgetting_broker.source(after):
        await until(lambda: b"late" in after.bodies)
    assert after.bodies == [b"late"], "the other was acknowledged although the stream was closed"


async def test_no_acknowledgment_is_lost_by_closing(forgetting_broker: Broker) -> None:
    handle = Recorder()
    await publish(forgetting_broker, *(b"%d" % i for i in range(100)))
    while len(handle.deliveries) < 100:
        before = len(handle.deliveries)
        source = adapters.message_source(forgetting_broker.settings, 5)
        running = asyncio.create_task(source.run(handle))
        await until(partial(handle.has_more_than, before))
        await source.close(grace_s=30)
        await running
    async with forgetting_broker.source(handle):
        await publish(forgetting_broker, b"last")
        await until(partial(handle.has, b"last"))
    assert sorted(handle.bodies) == sorted([b"last", *(b"%d" % i for i in range(100))])


async def test_close_gives_back_what_is_not_done_in_time(forgetting_broker: Broker) -> None:
    handle = Held()
    async with forgetting_broker.source(handle, in_flight=2):
        await publish(forgetting_broker, b"1", b"2", b"3")
        await until(lambda: handle.at_work == 2)
    assert handle.canceled == 2
    after = Recorder()
    async with forgetting_broker.source(after):
        await until(lambda: len(after.bodies) == 3, patience_s=8)
    assert sorted(after.bodies) == [b"1", b"2", b"3"]


async def test_a_handler_may_answer_its_cancellation(forgetting_broker: Broker) -> None:
    async def acknowledge_when_cancelled(_delivery: Delivery) -> Verdict:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return ACK
        raise AssertionError

    handle = Recorder(acknowledge_when_cancelled)
    async with forgetting_broker.source(handle):
        await publish(forgetting_broker, b"x")
        await until(lambda: handle.deliveries)
    after = Recorder()
    async with forgetting_broker.source(after):
        await publish(forgetting_broker, b"y")
        await until(lambda: after.bodies)
    assert after.bodies == [b"y"]


async def test_a_source_whose_run_is_cancelled_gives_back(forgetting_broker: Broker) -> None:
    handle = Held()
    source = adapters.message_source(forgetting_broker.settings, 5)
    running = asyncio.create_task(source.run(handle))
    await publish(forgetting_broker, b"x")
    await until(lambda: handle.at_work == 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await source.close(grace_s=0)
    after = Recorder()
    async with forgetting_broker.source(after):
        await until(lambda: after.bodies == [b"x"], patience_s=8)


async def test_closing_a_source_that_never_ran(broker: Broker) -> None:
    source = adapters.message_source(broker.settings, 1)
    assert not status_of(source).connected
    await source.close(grace_s=1)


async def test_dead_letters_go_to_a_topic_of_their_own(broker: Broker) -> None:
    sessions = broker.settings
    handle, dead = Recorder(), Recorder()
    subscriptions = {sessions.dead_letter_subscription: SubscriptionSettings()}
    dead_settings = sessions.model_copy(update={"subscriptions": subscriptions})
    async with broker.source(handle), Broker(broker.kind, dead_settings).source(dead):
        await broker.publisher.publish("dead", b"bad", {"reason": "invalid_image"})
        await until(lambda: dead.bodies)
    assert dead.deliveries[0].attributes == {"reason": "invalid_image"}
    assert handle.bodies == []


async def test_a_topic_that_the_settings_do_not_name_is_refused(broker: Broker) -> None:
    with pytest.raises(ValueError, match="completed"):
        await broker.publisher.publish("completed", b"x", {})


async def test_completion_messages_go_to_a_topic_of_their_own(completing: Broker) -> None:
    handle, told = Recorder(), Recorder()
    reader = completing.settings.model_copy(update={"subscriptions": {"session-completed": SubscriptionSettings()}})
    async with completing.source(handle), Broker(completing.kind, reader).source(told):
        await completing.publisher.publish("completed", b"done", {"status": "succeeded"})
        await until(lambda: told.bodies)
    assert (told.bodies, dict(told.deliveries[0].attributes)) == ([b"done"], {"status": "succeeded"})
    assert handle.bodies == []


# Priorities


@pytest.mark.slow
async def test_a_higher_priority_is_drained_first(priorities: Broker) -> None:
    """Low ones were there before, and would all come first."""
    blocked = asyncio.Event()

    async def decide(delivery: Delivery) -> Verdict:
        if delivery.data == b"first":
            await blocked.wait()
        await asyncio.sleep(0.02)
        return ACK

    handle = Recorder(decide)
    async with priorities.source(handle, in_flight=1) as source:
        await priorities.publish(b"first", priority="normal")
        await until(lambda: handle.bodies)
        await priorities.publish(*(b"low" for _ in range(12)), priority="low")
        await priorities.publish(*(b"high" for _ in range(12)), priority="high")
        await until(lambda: status_of(source, "high").held and status_of(source, "low").held)
        blocked.set()
        await until(lambda: len(handle.bodies) == 25)
    assert handle.bodies[1:13].count(b"low") <= 4


async def test_a_lower_priority_does_not_starve(priorities: Broker) -> None:
    async def another(delivery: Delivery) -> Verdict:
        if delivery.data == b"high":
            await priorities.publish(b"high", priority="high")
        return ACK

    handle = Recorder(another)
    async with priorities.source(handle, in_flight=2):
        await priorities.publish(*(b"high" for _ in range(8)), priority="high")
        await until(lambda: len(handle.bodies) > 8)
        await priorities.publish(b"low", priority="low")
        await priorities.publish(b"normal", priority="normal")
        await until(lambda: {b"low", b"normal"} <= set(handle.bodies))


async def test_one_priority_alone_has_every_place(priorities: Broker) -> None:
    handle = Held()
    async with priorities.source(handle, in_flight=5) as source:
        await priorities.publish(*(b"%d" % i for i in range(7)), priority="low")
        await until(lambda: handle.at_work == 5)
        assert status_of(source, "low").held >= 5 and status_of(source, "high").held == 0
        handle.go_on.set()
        await until(lambda: status_of(source, "low").held == 0)
    assert handle.most_at_work == 5


async def test_what_must_wait_for_a_higher_priority_is_left_to_others(embedded_priorities: Broker) -> None:
    busy, free = Held(), Recorder()
    low = [b"low%d" % i for i in range(8)]
    async with embedded_priorities.source(busy, in_flight=8) as source:
        await embedded_priorities.publish(*(b"high%d" % i for i in range(10)), priority="high")
        await until(lambda: status_of(source, "high").held == 10)
        await embedded_priorities.publish(*low, priority="low")
        await until(lambda: status_of(source, "low").held == 2)
        async with embedded_priorities.source(free):
            await until(lambda: len(set(free.bodies)) == 6)
        busy.go_on.set()
        await until(lambda: status_of(source, "low").held == 0)
        busy.go_on.clear()
        # Nobody wants the places any more.
        await embedded_priorities.publish(*low, priority="low")
        await until(lambda: busy.at_work == 8)


# Over Pub/Sub


@pytest.mark.emulator
@pytest.mark.parametrize("kind", ["embedded", "emulator"])
async def test_leases_are_kept_while_a_message_is_handled_and_another_waits(
    kind: str, request: pytest.FixtureRequest
) -> None:
    async def first_longer_than_the_deadline(delivery: Delivery) -> Verdict:
        # The shortest that Pub/Sub has is 10 s.
        await asyncio.sleep(13 if delivery.data == b"high" else 0)
        return ACK

    handle = Recorder(first_longer_than_the_deadline)
    broker: Broker = request.getfixturevalue(f"{kind}_priorities")
    async with broker.source(handle, in_flight=1) as source:
        await broker.publish(b"high", priority="high")
        await until(lambda: handle.deliveries)
        await broker.publish(b"low", priority="low")
        await until(lambda: len(handle.deliveries) == 2 and not any(status.held for status in source.status().values()))
    assert handle.bodies == [b"high", b"low"]


@pytest.mark.slow
async def test_the_lease_is_kept_through_the_grace_of_closing(
    embedded: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LEASE_S", 1)
    handle, other = Held(), Recorder()
    source = adapters.message_source(embedded.settings, 1)
    running = asyncio.create_task(source.run(handle))
    await publish(embedded, b"x")
    await until(lambda: handle.at_work == 1)
    async with embedded.source(other):
        closing = asyncio.create_task(source.close(grace_s=30))
        await asyncio.wait({closing}, timeout=1.5)
        handle.go_on.set()
        await asyncio.gather(closing, running)
        await publish(embedded, b"y")
        await until(lambda: other.bodies)
    assert other.bodies == [b"y"]


async def test_a_busy_source_leaves_messages_to_others(embedded: Broker) -> None:
    busy, free = Held(), Recorder()
    async with embedded.source(busy, in_flight=1):
        await publish(embedded, b"0")
        await until(lambda: busy.at_work == 1)
        await publish(embedded, *(b"%d" % i for i in range(1, 10)))
        async with embedded.source(free):
            await until(lambda: len(free.bodies) == 9)
        assert busy.most_at_work == 1


HOLD_FOR_EVER = """
    import asyncio, sys
    from serve_app import adapters
    from serve_app.settings import MessagesSettings, SubscriptionSettings

    async def handle(delivery):
        print(delivery.data.decode(), flush=True)
        await asyncio.Event().wait()

    asyncio.run(adapters.message_source(MessagesSettings(url=sys.argv[1]), 5).run(handle))
"""


@pytest.mark.slow
async def test_messages_of_a_process_that_was_killed_come_again(
    embedded: Broker, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    await publish(embedded, b"1", b"2")
    holder = processes(HOLD_FOR_EVER, embedded.settings.url)
    assert holder.stdout is not None
    assert {(await asyncio.to_thread(holder.stdout.readline)).strip() for _ in range(2)} == {"1", "2"}
    holder.kill()
    handle = Recorder()
    async with embedded.source(handle):
        # When their leases end.
        await until(lambda: sorted(handle.bodies) == [b"1", b"2"], patience_s=15)


async def test_publishing_fails_clearly(embedded: Broker) -> None:
    elsewhere = MessagesSettings(url=f"embedded://127.0.0.1:{free_port()}")
    with pytest.raises(BrokerUnavailable, match="session-processing"):
        await PubSubPublisher(elsewhere, timeout_s=0.5).publish("sessions", b"x", {})
    no_topic = embedded.settings.model_copy(update={"topic": "nowhere"})
    with pytest.raises(BrokerUnavailable, match="there is no projects/local/topics/nowhere"):
        await PubSubPublisher(no_topic).publish("sessions", b"x", {})


@pytest.mark.parametrize(
    "url", ["embedded:", "embedded://", "embedded://127.0.0.1", "embedded://h:70000", "embedded://h:x"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="embedded:"):
        adapters.message_source(MessagesSettings(url=url), 1)


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="embedded:, pubsub:, memory:"):
        adapters.message_source(MessagesSettings(url="amqp://x"), 1)
    with pytest.raises(SettingsError, match="embedded:, pubsub:, memory:"):
        adapters.publisher(MessagesSettings(url="amqp://x"))


async def test_googles_own_environment_is_honoured(embedded: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", embedded.settings.url.removeprefix("embedded://"))
    google = Broker("pubsub", embedded.settings.model_copy(update={"url": "pubsub:"}))
    handle = Recorder()
    async with google.source(handle):
        await publish(google, b"x")
        await until(lambda: handle.bodies == [b"x"])


def test_google_without_credentials_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", f"/nowhere/{uuid.uuid4().hex}.json")
    monkeypatch.delenv("PUBSUB_EMULATOR_HOST", raising=False)
    for make in (lambda s: adapters.message_source(s, 1), adapters.publisher):
        with pytest.raises(SettingsError, match="pubsub:"):
            make(MessagesSettings(url="pubsub:"))
