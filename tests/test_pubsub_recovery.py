"""A subscription that cannot be pulled from says why, holds up no other, and recovers by itself."""

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc.aio
import pytest
from google.pubsub_v1 import types

from deployments.own_ray import free_port
from serve_app.adapters.pubsub import client
from serve_app.adapters.pubsub import source as pubsub
from serve_app.adapters.pubsub.broker import Bounds
from serve_app.adapters.pubsub.broker import Broker as Queues
from serve_app.adapters.pubsub.calls import Calls
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.settings import MessagesSettings

from .backends import PRIORITIES, Broker, Recorder, administer, status_of, until


@pytest.mark.slow
async def test_pulling_goes_on_after_the_server_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.4)
    settings = MessagesSettings(url=f"embedded://127.0.0.1:{free_port()}")
    broker, handle = Broker("embedded", settings), Recorder()
    async with broker.source(handle) as source:
        await until(lambda: "no connection" in status_of(source).error)
        assert not status_of(source).connected
        for body in (b"first server", b"second server"):
            with EmbeddedPubSub.of(settings):
                await until(lambda: status_of(source).connected)
                await broker.publish(body)
                await until(partial(handle.has, body))
            await until(lambda: not status_of(source).connected)
        assert status_of(source).error


async def test_a_subscription_that_is_missing_is_waited_for() -> None:
    with EmbeddedPubSub("127.0.0.1", 0) as server:
        settings = MessagesSettings(url=f"embedded://{server.address}")
        handle = Recorder()
        async with Broker("embedded", settings).source(handle) as source:
            await until(lambda: "subscriptions/session-processing" in status_of(source).error)
            assert not status_of(source).connected
            administer(settings)
            await Broker("embedded", settings).publish(b"x")
            await until(lambda: handle.bodies == [b"x"] and status_of(source).connected)


async def test_a_missing_subscription_holds_up_no_other() -> None:
    with EmbeddedPubSub("127.0.0.1", 0) as server:
        settings = MessagesSettings(url=f"embedded://{server.address}", subscriptions=PRIORITIES)
        present = settings.model_copy(update={"subscriptions": {"high": PRIORITIES["high"]}})
        administer(present)
        handle = Recorder()
        async with Broker("embedded", settings).source(handle) as source:
            await until(lambda: "subscriptions/low failed: it does not exist" in status_of(source, "low").error)
            await publish_all_priorities(settings)
            await until(lambda: handle.bodies == [b"high"])
            assert status_of(source, "high").connected and not status_of(source, "high").error
            assert not status_of(source, "low").connected


class Guarded(Calls):
    """Lets nobody pull from one subscription for a while."""

    refused = ""
    code = grpc.StatusCode.PERMISSION_DENIED

    async def pull(self, request: types.PullRequest, context: Any) -> types.PullResponse:
        if self.refused and request.subscription.endswith(self.refused):
            await context.abort(self.code, "User not authorized to perform this action.")
        return await super().pull(request, context)


@pytest.fixture
async def guarded() -> AsyncIterator[tuple[Guarded, MessagesSettings]]:
    calls, server = Guarded(Queues(Bounds(), time.monotonic, time.time)), grpc.aio.server()
    server.add_generic_rpc_handlers(calls.handlers())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    settings = MessagesSettings(url=f"pubsub://127.0.0.1:{port}", subscriptions=PRIORITIES)
    await asyncio.to_thread(administer, settings)
    yield calls, settings
    await server.stop(grace=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "subscriptions/low failed: this service needs the role Pub/Sub Subscriber"),
        (grpc.StatusCode.UNAUTHENTICATED, "does not take this service's credentials"),
        (grpc.StatusCode.UNAVAILABLE, "subscriptions/low failed: no connection to Pub/Sub"),
    ],
)
async def test_a_refused_subscription_says_so_and_recovers(
    guarded: tuple[Guarded, MessagesSettings], code: grpc.StatusCode, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub, "RETRY_MAX_S", 1.0)
    calls, settings = guarded
    calls.refused, calls.code = "low", code
    handle = Recorder()
    async with Broker("guarded", settings).source(handle) as source:
        await until(lambda: said in status_of(source, "low").error)
        await publish_all_priorities(settings)
        await until(lambda: set(handle.bodies) == {b"high", b"normal"})
        assert not status_of(source, "low").connected
        assert status_of(source, "high").connected and status_of(source, "normal").connected
        calls.refused = ""
        await until(lambda: b"low" in handle.bodies and status_of(source, "low").connected)
        assert not status_of(source, "low").error


async def publish_all_priorities(settings: MessagesSettings) -> None:
    for priority in PRIORITIES:
        await Broker("", settings).publish(priority.encode(), priority=priority)
