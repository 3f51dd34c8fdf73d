"""A source: messages that arrive at a bad moment, leases, subscriptions that deliver exactly once, and its end."""

import asyncio
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
import pytest
from google.pubsub_v1 import types
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.adapters.pubsub import client
from serve_app.adapters.pubsub import source as pubsub
from serve_app.adapters.pubsub.broker import Bounds
from serve_app.adapters.pubsub.broker import Broker as Queues
from serve_app.adapters.pubsub.calls import Calls
from serve_app.adapters.pubsub.client import Connection, GrpcSubscriber, Received
from serve_app.adapters.pubsub.source import PubSubSource
from serve_app.errors import BrokerUnavailable
from serve_app.jobs.ports import Delivery, Verdict
from serve_app.settings import MessagesSettings

from .backends import Broker, Recorder, administer, status_of, until

NAME = "projects/local/subscriptions/session-processing"


class Held:
    """A handler that keeps what it is given until it is told to let go."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.at_work = 0

    async def __call__(self, _delivery: Delivery) -> Verdict:
        self.at_work += 1
        await self.go_on.wait()
        return Verdict(action="ack")


async def test_a_message_is_given_back_that_comes_while_the_source_closes(embedded: Broker) -> None:
    """Its pull was under way."""

    class Late(GrpcSubscriber):
        is_waiting = False

        async def pull(self, subscription: str, most: int, wait_s: float) -> Sequence[Received]:
            self.is_waiting = wait_s > 0
            try:
                return await super().pull(subscription, most, wait_s)
            except asyncio.CancelledError:
                await embedded.publish(b"x")
                return await super().pull(subscription, most, 0)

    handle, after = Held(), Recorder()
    late = Late(embedded.settings)
    source = PubSubSource(embedded.settings, 5, subscriber=late)
    running = asyncio.create_task(source.run(handle))
    await until(lambda: late.is_waiting)
    await source.close(grace_s=0)
    await running
    async with embedded.source(after):
        # Before its lease ends.
        await until(lambda: after.bodies == [b"x"], patience_s=5)
    assert handle.at_work == 0


@pytest.mark.slow
async def test_leases_are_not_kept_for_ever(embedded: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LEASE_S", 1)
    stuck, other = Held(), Recorder()
    source = PubSubSource(embedded.settings, 1, max_lease_s=2.0)
    running = asyncio.create_task(source.run(stuck))
    await embedded.publish(b"x")
    await until(lambda: stuck.at_work == 1)
    async with embedded.source(other):
        await until(lambda: other.bodies == [b"x"], patience_s=15)
    stuck.go_on.set()
    await source.close(grace_s=60)
    await running


async def test_a_source_that_cannot_keep_leases_any_more_fails_loudly(embedded: Broker) -> None:
    class Broken(GrpcSubscriber):
        async def set_deadline(self, subscription: str, ack_ids: Sequence[str], seconds: int, **_: float) -> None:
            raise RuntimeError("a bug")

        def lease_s(self, subscription: str) -> int:
            return 1

    handle = Held()
    source = PubSubSource(embedded.settings, 5, subscriber=Broken(embedded.settings))
    running = asyncio.create_task(source.run(handle))
    await embedded.publish(b"x")
    await until(lambda: handle.at_work == 1)
    with pytest.raises(ExceptionGroup) as failed:
        await asyncio.wait_for(running, 30)
    assert failed.group_contains(RuntimeError, match="a bug")
    assert not status_of(source).connected


@pytest.mark.slow
async def test_a_backlog_of_each_priority_is_worked_on_without_a_pause(embedded_priorities: Broker) -> None:
    """What two pulls bring beyond the free places goes back, and is asked for again at once."""
    for priority in ("high", "low"):
        await embedded_priorities.publish(*(b"%d" % i for i in range(8)), priority=priority)
    handle = Recorder(slowly)
    async with embedded_priorities.source(handle, in_flight=4):
        # Well before a pull that waits for messages would end.
        await until(lambda: len(set(zip(handle.bodies, priorities_of(handle), strict=True))) == 16, patience_s=8)


async def slowly(_delivery: Delivery) -> Verdict:
    await asyncio.sleep(0.1)
    return Verdict(action="ack")


def priorities_of(handle: Recorder) -> list[str]:
    return [delivery.attributes["priority"] for delivery in handle.deliveries]


@pytest.mark.parametrize("most", [0, -1])
async def test_nothing_can_be_asked_for_that_is_less_than_a_message(embedded: Broker, most: int) -> None:
    subscriber = GrpcSubscriber(embedded.settings)
    with pytest.raises(BrokerUnavailable, match="at least 1"):
        await subscriber.pull("session-processing", most, 0)
    await subscriber.close()


@pytest.mark.slow
async def test_leases_of_one_subscription_do_not_wait_for_another_ones(
    embedded_priorities: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does an extension that hangs keep the next one from being tried before the lease ends."""
    monkeypatch.setattr(client, "LEASE_S", 2)
    tries = Counter[str]()

    class Hanging(GrpcSubscriber):
        async def set_deadline(
            self, subscription: str, ack_ids: Sequence[str], seconds: int, *, limit_s: float = 10.0
        ) -> None:
            tries[subscription] += bool(seconds)
            if subscription == "high":
                await asyncio.sleep(limit_s)
                raise BrokerUnavailable("it hangs")
            await super().set_deadline(subscription, ack_ids, seconds, limit_s=limit_s)

    stuck, source = (
        Held(),
        PubSubSource(embedded_priorities.settings, 4, subscriber=Hanging(embedded_priorities.settings)),
    )
    running = asyncio.create_task(source.run(stuck))
    for priority in ("high", "low"):
        await embedded_priorities.publish(b"x", priority=priority)
    await until(lambda: tries["low"] >= 6)
    assert tries["high"] >= 3
    assert "it hangs" in status_of(source, "high").error and status_of(source, "low").connected
    stuck.go_on.set()
    await source.close(grace_s=10)
    await running


@pytest.mark.slow
async def test_a_thousand_messages_that_are_held_back_open_one_channel(
    embedded: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[Connection]()
    transport = Connection.transport

    def noted(connection: Connection, kind: Any) -> Any:
        opened.append(connection)
        return transport(connection, kind)

    publisher = embedded.publisher
    await asyncio.gather(*(publisher.publish("sessions", b"%d" % i, {}) for i in range(1000)))
    monkeypatch.setattr(Connection, "transport", noted)

    async def hold(_delivery: Delivery) -> Verdict:
        return Verdict(action="defer", delay_s=60)

    handle = Recorder(hold)
    async with embedded.source(handle, in_flight=20) as source:
        await until(lambda: len(handle.deliveries) == 1000 and not status_of(source).held)
    assert len(opened) == 1


class ExactlyOnce(Calls):
    """A subscription that delivers exactly once. Each answer fails first, as Pub/Sub says that it may."""

    def __init__(self) -> None:
        super().__init__(Queues(Bounds(), time.monotonic, time.time))
        self.deadlines, self.refusals = list[int](), 0

    async def get_subscription(self, request: types.GetSubscriptionRequest, context: Any) -> types.Subscription:
        found = await super().get_subscription(request, context)
        found.enable_exactly_once_delivery = True
        return found

    async def acknowledge(self, request: types.AcknowledgeRequest, context: Any) -> bytes:
        if not self.refusals:
            self.refusals += 1
            info = ErrorInfo(metadata={one: "TRANSIENT_FAILURE_UNORDERED_ACK_ID" for one in request.ack_ids})
            status = Status(code=grpc.StatusCode.FAILED_PRECONDITION.value[0], message="later")
            status.details.add().Pack(info)
            metadata = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "later", trailing_metadata=metadata)
        return await super().acknowledge(request, context)

    async def modify_ack_deadline(self, request: types.ModifyAckDeadlineRequest, context: Any) -> bytes:
        self.deadlines.append(request.ack_deadline_seconds)
        return await super().modify_ack_deadline(request, context)


async def test_a_subscription_that_delivers_exactly_once_has_long_leases_and_answers_that_are_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pubsub, "EXTENSIONS_PER_LEASE", 100)
    calls, server, handle = ExactlyOnce(), grpc.aio.server(), Held()
    server.add_generic_rpc_handlers(calls.handlers())
    settings = MessagesSettings(url=f"pubsub://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    await asyncio.to_thread(administer, settings)
    await Broker("exactly once", settings).publish(b"x")
    async with Broker("exactly once", settings).source(handle) as source:
        await until(lambda: handle.at_work and calls.deadlines)
        handle.go_on.set()
        await until(lambda: status_of(source).held == 0)
    assert set(calls.deadlines) == {client.EXACTLY_ONCE_LEASE_S}
    assert calls.refusals == 1 and not calls._broker.subscriptions[NAME].take(1, None), "it was acknowledged"
    await server.stop(grace=None)


SERVER = """
    import sys, time
    from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
    from serve_app.settings import MessagesSettings

    with EmbeddedPubSub.of(MessagesSettings(url=sys.argv[1])):
        print("ready", flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hangs", "is gone"])
async def test_closing_does_not_wait_for_a_broker_that(
    fault: str, processes: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub, "CLOSING_S", 1.0)
    settings, handle = MessagesSettings(url=f"embedded://127.0.0.1:{free_port()}"), Held()
    server = processes(SERVER, settings.url)
    assert server.stdout and (await asyncio.to_thread(server.stdout.readline)) == "ready\n"
    source = adapters.message_source(settings, 20)
    running = asyncio.create_task(source.run(handle))
    await Broker("embedded", settings).publish(*(b"%d" % i for i in range(20)))
    await until(lambda: handle.at_work == 20)
    server.send_signal(signal.SIGSTOP if fault == "hangs" else signal.SIGKILL)
    async with asyncio.timeout(8):
        await source.close(grace_s=0.5)
    assert status_of(source).held == 0
    async with asyncio.timeout(15):
        await running
