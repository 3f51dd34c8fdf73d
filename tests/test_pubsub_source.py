"""One subscription's source: messages that arrive at a bad moment, leases that are its own to keep, and its end."""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from google.api_core.exceptions import ServiceUnavailable

from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.adapters import pubsub, pubsub_stream
from serve_app.adapters.places import Places
from serve_app.adapters.pubsub import PubSubSource
from serve_app.adapters.pubsub_connection import Caller, subscriber_client
from serve_app.adapters.pubsub_embedded import EmbeddedPubSub
from serve_app.adapters.pubsub_stream import Stream
from serve_app.ports import Delivery, Verdict
from serve_app.settings import MessagesSettings

from .backends import Broker, Recorder, status_of, until

NAME = "session-processing"


class Held:
    """A handler that keeps what it is given until it is told to let go."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.at_work = 0

    async def __call__(self, _delivery: Delivery) -> Verdict:
        self.at_work += 1
        await self.go_on.wait()
        return Verdict(action="ack")


@dataclass
class Parts:
    """What a source is made of."""

    settings: MessagesSettings
    caller: Caller = field(default_factory=Caller)

    def __post_init__(self) -> None:
        self.client = subscriber_client(self.settings)

    def source(self, **options: Any) -> PubSubSource:
        return PubSubSource(self.settings, NAME, Places(5), self.client, self.caller, **options)


@pytest.fixture
async def parts(embedded: Broker) -> AsyncIterator[Parts]:
    made = Parts(embedded.settings)
    yield made
    made.caller.close()
    made.client.close()


@pytest.mark.parametrize("is_late", [True, False])
async def test_a_message_is_given_back_that_comes_while_those_that_wait_are(
    parts: Parts, embedded: Broker, is_late: bool
) -> None:
    """In one turn of the loop: its task has not begun when it would be cancelled."""
    source, taken = parts.source(), list[bytes]()

    def take(stream: Stream, message: Any) -> None:
        taken.append(message.data)
        source._take(Held(), stream, message)
        source._give_back_waiting()

    stream = await Stream.opened(parts.settings, NAME, 1)
    source._stream = None if is_late else stream
    stream.receive(take, 3600.0)
    await embedded.publish(b"x")
    await until(lambda: len(taken) >= 2, patience_s=8)
    stream.close()
    await source.close(grace_s=0)
    assert source.status().held == 0


async def test_leases_are_not_kept_for_ever(parts: Parts, embedded: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pubsub, "ORPHAN_LEASE_S", 1)
    stuck, other = Held(), Recorder()
    source = parts.source(max_lease_s=2.0)
    running = asyncio.create_task(source.run(stuck))
    await embedded.publish(b"x")
    await until(lambda: stuck.at_work == 1)
    closing = asyncio.create_task(source.close(grace_s=60))
    async with embedded.source(other):
        await until(lambda: other.bodies == [b"x"], patience_s=15)
    stuck.go_on.set()
    await asyncio.gather(closing, running)


async def test_a_source_that_cannot_keep_leases_any_more_fails_loudly() -> None:
    settings = MessagesSettings(url=f"embedded://127.0.0.1:{free_port()}")
    handle = Held()
    with EmbeddedPubSub.of(settings):
        parts = Parts(settings)
        source = parts.source()
        running = asyncio.create_task(source.run(handle))
        await Broker("embedded", settings).publish(b"x")
        await until(lambda: handle.at_work == 1)
        parts.caller.close()
    # The stream is over now, and its message's lease is the source's to keep.
    with pytest.raises(ExceptionGroup) as failed:
        await asyncio.wait_for(running, 30)
    assert failed.group_contains(RuntimeError, match="shutdown")
    assert not source.status().connected
    parts.client.close()


async def test_the_library_is_told_soon_that_an_extension_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends its thread where its own retries do, after a minute."""
    monkeypatch.setattr(pubsub_stream, "CLOSE_S", 0.3)
    settings = MessagesSettings(url=f"embedded://127.0.0.1:{free_port()}")
    with EmbeddedPubSub.of(settings):
        stream = await Stream.opened(settings, NAME, 1)
        stream.receive(lambda *_: None, 3600.0)
    extend = partial(stream._client.modify_ack_deadline, ack_ids=["x"], ack_deadline_seconds=10)
    with pytest.raises(ServiceUnavailable):
        await asyncio.to_thread(extend, subscription="projects/local/subscriptions/s")
    stream.close()
    await stream.wait_closed()


SERVER = """
    import sys, time
    from serve_app.adapters.pubsub_embedded import EmbeddedPubSub
    from serve_app.settings import MessagesSettings

    with EmbeddedPubSub.of(MessagesSettings(url=sys.argv[1])):
        print("ready", flush=True)
        time.sleep(600)
"""


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
