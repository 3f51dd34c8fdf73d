"""google-cloud-pubsub's clients, for Google's service or for a server at an address: connecting, and single calls."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from google.api_core.exceptions import Aborted, GoogleAPIError, ServiceUnavailable
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import GoogleAuthError
from google.cloud import pubsub_v1
from google.pubsub_v1.services.publisher import PublisherClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from ..errors import BrokerUnavailable, SettingsError
from ..settings import MessagesSettings, Secrets
from .pubsub_names import address_of
from .unforeseen import unforeseen

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
    return _with_credentials(settings, pubsub_v1.SubscriberClient)


def publisher_client(settings: MessagesSettings) -> PublisherClient:
    """The plain client, whose publish is one call, unlike the batching one's. Raises as `subscriber_client`."""
    if not settings.is_google:
        return PublisherClient(transport=PublisherGrpcTransport(channel=_channel(settings)))
    # The batching one alone knows Google's environment, an emulator's address included.
    return PublisherClient(transport=_with_credentials(settings, pubsub_v1.PublisherClient).transport)


def _with_credentials(settings: MessagesSettings, client: Callable[..., Any]) -> Any:
    """Ambient credentials first; where there are none, those of FIREBASE_CREDENTIALS."""
    try:
        return client()
    except Exception as e:
        # Google documents one error; a file that cannot be read, or is of another form, has others.
        if Secrets.from_environment().firebase_credentials is None:
            raise SettingsError(f"messages.url {settings.url!r}: no credentials: {e or type(e).__name__}") from e
    try:
        from .firebase_app import firebase_app
    except ModuleNotFoundError as e:
        raise SettingsError("FIREBASE_CREDENTIALS needs the package firebase-admin: the extra `google`") from e
    return client(credentials=firebase_app().credential.get_credential())


def _channel(settings: MessagesSettings) -> grpc.Channel:
    host, port = address_of(settings.url)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # A channel without credentials: nothing is looked up, nothing is sent.
    return grpc.insecure_channel(address, options=_OPTIONS)


async def check_speaks(settings: MessagesSettings, limit_s: float) -> None:
    """Raises BrokerUnavailable where what listens at the address in `messages.url` is no Pub/Sub server."""
    channel = _channel(settings)
    try:
        await connect(channel, limit_s)
    except BrokerUnavailable as e:
        what = "is no Pub/Sub server: another program has the port; see GET /ready, or name another in messages.url"
        raise BrokerUnavailable(f"what listens at {settings.url} {what}", url=settings.url) from e
    finally:
        channel.close()


async def connect(channel: grpc.Channel, limit_s: float = CONNECT_S) -> None:
    """Wait for a channel's first connection; once only, or a thread of gRPC's fails when the channel is closed.

    Raises BrokerUnavailable where there is none after `limit_s`.
    """
    loop, ready = asyncio.get_running_loop(), asyncio.Event()

    def note(state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY and not loop.is_closed():
            loop.call_soon_threadsafe(ready.set)

    channel.subscribe(note, try_to_connect=True)
    try:
        async with asyncio.timeout(limit_s):
            await ready.wait()
    except TimeoutError as e:
        raise BrokerUnavailable(f"no connection to Pub/Sub within {limit_s:g} s") from e
    finally:
        channel.unsubscribe(note)


class Caller:
    """Makes single calls in threads of its own: those to a broker that is away must not keep the stores' calls
    waiting for a thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pubsub")

    async def call(self, method: Callable[..., Any], *, timeout_s: float = CALL_TIMEOUT_S, **arguments: Any) -> Any:
        """`timeout_s` limits the call, retries included. Raises one of FAILURES."""
        call = partial(method, retry=RETRY.with_timeout(timeout_s), timeout=timeout_s, **arguments)
        # Outside of the block: threads that are gone are no outage.
        calling = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await calling
        except FAILURES:
            raise
        except Exception as e:
            raise unforeseen(GoogleAPIError, "Pub/Sub", e) from e

    def close(self) -> None:
        """Calls under way go on; those that wait for a thread are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
