"""A Pub/Sub server for one machine, inside the app: google-cloud-pubsub's own client talks to it over gRPC.

It keeps everything in memory, listens on loopback only and authenticates no client. What it can do is in
`pubsub_calls`, its queues are in `pubsub_broker`.
"""

import asyncio
import ipaddress
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import grpc.aio

from ...errors import BrokerUnavailable, SettingsError
from ...jobs.backlog import Reading
from ...settings import MessagesSettings
from .broker import Bounds, Broker, SubscriptionConfig
from .calls import Calls
from .client import address_of, subscription_path, topic_path

log = logging.getLogger(__name__)

T = TypeVar("T")

_OPTIONS = (
    # Otherwise two servers may share a port, each with half of the messages.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 20_000_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Clients may ping as often as ours do, without being told off.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class EmbeddedPubSub:
    """Start it from the event loop it is to run in, or use it as a context manager, which gives it a thread."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        topics: Sequence[str] = (),
        subscriptions: Sequence[SubscriptionConfig] = (),
        bounds: Bounds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`topics` are full names (`projects/p/topics/t`); port 0 takes any.

        Raises SettingsError where `host` is not a loopback address.
        """
        if not _is_loopback(host):
            raise SettingsError(f"the embedded Pub/Sub server listens on loopback only, not on {host}", host=host)
        self._host = host
        self._port = port
        self._broker = Broker(bounds or Bounds(), clock, time.time)
        self._broker.topics.update(topics)
        for subscription in subscriptions:
            self._broker.subscribe(subscription)
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._thread: _LoopThread | None = None

    @classmethod
    def of(cls, settings: MessagesSettings) -> "EmbeddedPubSub":
        """With `wanted`. Raises as it does, and SettingsError for a name that two subscriptions have."""
        host, port = address_of(settings.url)
        subscriptions = {config.name: config for config in wanted(settings)}
        for name, times in Counter(config.name for config in wanted(settings)).items():
            if times > 1:
                short = name.rpartition("/")[2]
                raise SettingsError(f"messages: two subscriptions are named {short}", subscription=short)
        topics = {config.topic for config in subscriptions.values()}
        return cls(host, port, topics=tuple(topics), subscriptions=tuple(subscriptions.values()))

    @property
    def address(self) -> str:
        """`host:port`, with the port that was taken."""
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    async def start(self) -> None:
        """Raises BrokerUnavailable where the port is taken."""
        self._server = grpc.aio.server(options=_OPTIONS)
        calls = Calls(self._broker)
        self._server.add_generic_rpc_handlers(calls.handlers())
        try:
            self._port = self._server.add_insecure_port(self.address)
        except RuntimeError as e:
            raise BrokerUnavailable(
                f"the embedded Pub/Sub server cannot listen on {self.address}: another program has the port (8085 is "
                "also that of Google's emulator); stop it, or name another port in messages.url",
                address=self.address,
            ) from e
        await self._server.start()
        self._ticker = asyncio.create_task(calls.keep_ticking())
        log.info("The embedded Pub/Sub server listens on %s", self.address, extra={"action": "pubsub_started"})

    async def stop(self) -> None:
        """End every call and stop. What was held is lost with this object."""
        if self._ticker is not None:
            self._ticker.cancel()
        if self._server is not None:
            await self._server.stop(grace=None)

    def backlog(self, names: Sequence[str]) -> Reading:
        """Of the subscriptions of these full names together, exact. Raises BrokerUnavailable while it is not running in
        a thread."""
        if self._thread is None:
            raise BrokerUnavailable("the embedded Pub/Sub server does not run")

        async def count() -> Reading:
            return self._broker.backlog(names)

        return self._thread.call(count())

    def __enter__(self) -> "EmbeddedPubSub":
        thread = _LoopThread()
        try:
            thread.call(self.start())
        except BaseException:
            thread.end()
            raise
        self._thread = thread
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.call(self.stop())
            self._thread.end()


def wanted(settings: MessagesSettings) -> Iterator[SubscriptionConfig]:
    """The settings' subscriptions, and one that keeps the completion messages, named as their topic.

    Raises SettingsError for a filter that is not understood.
    """
    rows = [(name, settings.topic, sub.filter) for name, sub in settings.subscriptions.items()]
    rows.append((settings.dead_letter_subscription, settings.dead_letter_topic, ""))
    if settings.completion_topic:
        rows.append((settings.completion_topic, settings.completion_topic, ""))
    for name, topic, filter in rows:
        try:
            yield SubscriptionConfig(
                name=subscription_path(settings, name), topic=topic_path(settings, topic), filter=filter
            )
        except ValueError as e:
            raise SettingsError(f"messages.subscriptions.{name}: {e}", subscription=name) from e


class _LoopThread:
    """An event loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedded-pubsub", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
