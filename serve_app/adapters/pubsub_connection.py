"""google-cloud-pubsub's clients, for Google's service or for a server at an address, and whether they are connected."""

import asyncio
from typing import Any

import grpc
from google.api_core.exceptions import Aborted, GoogleAPIError, ServiceUnavailable
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud import pubsub_v1
from google.pubsub_v1.services.publisher import PublisherClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from ..errors import BrokerUnavailable, SettingsError
from ..settings import MessagesSettings
from .pubsub_names import address_of

#: How long to wait for a connection before saying that there is none, in seconds.
CONNECT_S = 5.0
#: Limit on one call to the broker, retries included, in seconds.
CALL_TIMEOUT_S = 10.0
RETRY = Retry(
    if_exception_type(ServiceUnavailable, Aborted), initial=0.1, maximum=1.0, multiplier=2.0, timeout=CALL_TIMEOUT_S
)
#: What a call that failed raises.
FAILURES = (GoogleAPIError, GoogleAuthError)
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    # gRPC would wait up to two minutes between attempts; a server on this machine is back in seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def subscriber_client(settings: MessagesSettings) -> Any:
    """The streaming client. Raises SettingsError where Google's has no credentials."""
    if not settings.is_google:
        return pubsub_v1.SubscriberClient(transport=SubscriberGrpcTransport(channel=_channel(settings)))
    try:
        return pubsub_v1.SubscriberClient()
    except DefaultCredentialsError as e:
        raise SettingsError(f"messages.url {settings.url!r}: {e}") from e


def publisher_client(settings: MessagesSettings) -> PublisherClient:
    """The plain client, whose publish is one call, unlike the batching one's. Raises as `subscriber_client`."""
    if not settings.is_google:
        return PublisherClient(transport=PublisherGrpcTransport(channel=_channel(settings)))
    try:
        # It alone knows Google's environment, an emulator's address included.
        batching = pubsub_v1.PublisherClient()
    except DefaultCredentialsError as e:
        raise SettingsError(f"messages.url {settings.url!r}: {e}") from e
    return PublisherClient(transport=batching.transport)


def _channel(settings: MessagesSettings) -> grpc.Channel:
    host, port = address_of(settings.url)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # A channel without credentials: nothing is looked up, nothing is sent.
    return grpc.insecure_channel(address, options=_OPTIONS)


class Connection:
    """What a channel says of itself, from its own threads, as events of one event loop."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        #: The server cannot be reached; set until it can.
        self.lost = asyncio.Event()

    async def open(self) -> None:
        """Raises BrokerUnavailable where there is no connection after `CONNECT_S`."""
        self._channel.subscribe(self._on_change, try_to_connect=True)
        try:
            async with asyncio.timeout(CONNECT_S):
                await self.ready.wait()
        except TimeoutError as e:
            raise BrokerUnavailable(f"no connection to Pub/Sub within {CONNECT_S:g} s") from e

    def _on_change(self, state: grpc.ChannelConnectivity) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed, state)

    def _changed(self, state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            self.ready.set()
            self.lost.clear()
            return
        self.ready.clear()
        if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            self.lost.set()
