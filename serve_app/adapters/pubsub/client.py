"""google-cloud-pubsub's own asyncio clients, for Google's service or for a server at an address.

`Subscriber` is what sources and dead letters ask of a server; `GrpcSubscriber` asks one over the network, and
`memory_messages.QueueSubscriber` the queues of this process.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import google.auth
import grpc
import grpc.aio
from google.api_core.exceptions import (
    Aborted,
    DeadlineExceeded,
    GoogleAPICallError,
    GoogleAPIError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    RetryError,
    ServiceUnavailable,
    Unauthenticated,
)
from google.api_core.retry import AsyncRetry
from google.auth.exceptions import GoogleAuthError
from google.pubsub_v1 import types
from google.pubsub_v1.services.publisher import PublisherAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber import SubscriberAsyncClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

from ...errors import BrokerUnavailable, MessageRefused, SettingsError
from ...jobs.ports import DeadLetter, Delivery, Topic
from ...settings import MessagesSettings, Secrets
from ..unforeseen import unforeseen

T = TypeVar("T")

#: Limit on one call to the broker, retries included, in seconds.
CALL_TIMEOUT_S = 10.0
#: What a lease is extended to, in seconds: Pub/Sub's shortest, so that a crash is noticed soonest.
LEASE_S = 10
#: The same where a subscription delivers exactly once: Pub/Sub takes no shorter extension there, and an acknowledgment
#: counts only while the lease lasts.
EXACTLY_ONCE_LEASE_S = 60
#: How long Google's Pub/Sub may look for dead letters, in seconds: asked to answer at once, it may say that there are
#: none although there are. Other servers know.
PATIENCE_S = 3.0
#: The lease of a dead letter that was pulled, in seconds.
IN_HAND_S = 60
#: Messages in one pull, acknowledgments in one call.
MOST_AT_ONCE = 1000
_SCOPES = ("https://www.googleapis.com/auth/pubsub",)
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    # gRPC would wait up to two minutes between attempts; a server on this machine is back in seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_REASONS: Mapping[type[Exception], str] = {
    NotFound: "it does not exist",
    PermissionDenied: "this service needs the role Pub/Sub Subscriber",
    Unauthenticated: "Pub/Sub does not take this service's credentials",
}


# -- names


def topic_names(settings: MessagesSettings) -> Mapping[Topic, str]:
    """The short names of the topics that the settings name."""
    names: dict[Topic, str] = {"sessions": settings.topic, "dead": settings.dead_letter_topic}
    return names | ({"completed": settings.completion_topic} if settings.completion_topic else {})


def topic_path(settings: MessagesSettings, topic: str) -> str:
    return f"projects/{settings.project}/topics/{topic}"


def subscription_path(settings: MessagesSettings, subscription: str) -> str:
    return f"projects/{settings.project}/subscriptions/{subscription}"


def address_of(url: str) -> tuple[str, int]:
    """Host and port. Raises SettingsError where one is missing or wrong."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise SettingsError(f"messages.url {url!r}: {e}", url=url) from e
    if not host or port is None:
        raise SettingsError(f"messages.url {url!r} is not embedded://HOST:PORT", url=url)
    return host, port


# -- connections


class Connection:
    """How to reach the server of `settings.url`. Channels are opened on the event loop that first uses them."""

    def __init__(self, settings: MessagesSettings) -> None:
        """Raises SettingsError where Google's service has no credentials, or an address is wrong."""
        self._address, self._credentials = "", None
        if not settings.is_google:
            host, port = address_of(settings.url)
            self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        elif emulator := os.environ.get("PUBSUB_EMULATOR_HOST"):
            self._address = emulator
        else:
            self._credentials = credentials(settings, _SCOPES)

    def channel(self) -> grpc.aio.Channel:
        """Without credentials: nothing is looked up, nothing is sent. Only where there is an address."""
        return grpc.aio.insecure_channel(self._address, options=_OPTIONS)

    def transport(self, kind: Callable[..., T]) -> T:
        """A gRPC transport of the library's."""
        if self._address:
            return kind(channel=self.channel())
        return kind(credentials=self._credentials)


def credentials(settings: MessagesSettings, scopes: Sequence[str]) -> Any:
    """Ambient credentials first; where there are none, those of FIREBASE_CREDENTIALS. Raises SettingsError."""
    try:
        return google.auth.default(scopes=scopes)[0]
    except Exception as e:
        # Google documents one error; a file that cannot be read, or is of another form, has others.
        if Secrets.from_environment().firebase_credentials is None:
            raise SettingsError(f"messages.url {settings.url!r}: no credentials: {e or type(e).__name__}") from e
    try:
        from ..google import firebase_app
    except ModuleNotFoundError as e:
        raise SettingsError("FIREBASE_CREDENTIALS needs the package firebase-admin: the extra `google`") from e
    return firebase_app().credential.get_credential()


async def check_speaks(settings: MessagesSettings, limit_s: float) -> None:
    """Raises BrokerUnavailable where what listens at the address in `messages.url` is no Pub/Sub server."""
    async with Connection(settings).channel() as channel:
        try:
            async with asyncio.timeout(limit_s):
                await channel.channel_ready()
        except TimeoutError as e:
            what = "is no Pub/Sub server: another program has the port; see GET /ready, or name another in messages.url"
            raise BrokerUnavailable(f"the server at {settings.url} {what}", url=settings.url) from e


def _passes(error: Exception) -> bool:
    """Whether it is worth another try. Where messages are delivered exactly once, Pub/Sub says so of each answer."""
    if isinstance(error, (ServiceUnavailable, Aborted)):
        return True
    said = (error.metadata or {}).values() if isinstance(error, GoogleAPICallError) else ()
    return any(str(one).startswith("TRANSIENT_FAILURE") for one in said)


async def _called(
    call: Callable[..., Awaitable[T]], timeout_s: float, *, is_repeated: bool = True, **arguments: Any
) -> T:
    """`timeout_s` limits the call, retries included. Raises GoogleAPIError, GoogleAuthError. What cannot be read as an
    answer is None."""
    retry = AsyncRetry(_passes, initial=0.1, maximum=1.0, multiplier=2.0, timeout=timeout_s) if is_repeated else None
    try:
        return await call(retry=retry, timeout=timeout_s, **arguments)
    except RetryError as e:
        # `from e` would close a circle: its own cause is this.
        raise e.cause from None
    except (GoogleAPIError, GoogleAuthError):
        raise
    except Exception as e:
        raise unforeseen(GoogleAPIError, "Pub/Sub", e) from e


# -- subscriptions


@dataclass(frozen=True, slots=True)
class Received:
    ack_id: str
    delivery: Delivery


class Subscriber(Protocol):
    """Pub/Sub's subscriptions, by their short names. All but `lease_s` and `close` raise BrokerUnavailable."""

    async def pull(self, subscription: str, most: int, wait_s: float) -> Sequence[Received]:
        """Up to `most` messages, as soon as there are some, for `wait_s` at most; 0 answers at once."""

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> None: ...

    async def set_deadline(
        self, subscription: str, ack_ids: Sequence[str], seconds: int, *, limit_s: float = CALL_TIMEOUT_S
    ) -> None:
        """The leases end in so many seconds; 0 gives the messages back. The call itself takes `limit_s` at most."""

    def lease_s(self, subscription: str) -> int:
        """What to extend leases to."""

    async def close(self) -> None: ...


class GrpcSubscriber:
    def __init__(self, settings: MessagesSettings) -> None:
        """Raises as Connection does."""
        self._settings = settings
        self._connection = Connection(settings)
        self._opened: SubscriberAsyncClient | None = None
        self._exactly_once: dict[str, bool] = {}

    @property
    def _client(self) -> SubscriberAsyncClient:
        if self._opened is None:
            self._opened = SubscriberAsyncClient(transport=self._connection.transport(SubscriberGrpcAsyncIOTransport))
        return self._opened

    async def pull(self, subscription: str, most: int, wait_s: float) -> Sequence[Received]:
        limit_s = wait_s or CALL_TIMEOUT_S / 2
        try:
            # Not repeated here: the source says why, and pulls again.
            asked = {"max_messages": min(most, MOST_AT_ONCE), "return_immediately": not wait_s, "is_repeated": False}
            response = await self._call("pull", subscription, limit_s, **asked)
        except BrokerUnavailable as e:
            if not (wait_s and isinstance(e.__cause__, DeadlineExceeded)):
                raise
            # A pull's time is over where there are no messages, and where Pub/Sub does not answer: tell them apart.
            return await self.pull(subscription, most, 0)
        if response is None:
            raise BrokerUnavailable(f"Pub/Sub's answer to a pull of {subscription} cannot be read")
        # Now, before any lease is extended.
        await self._look(subscription)
        return [Received(one.ack_id, _delivery(one.message)) for one in response.received_messages]

    async def acknowledge(self, subscription: str, ack_ids: Sequence[str]) -> None:
        for some in _batches(ack_ids):
            await self._call("acknowledge", subscription, ack_ids=some)

    async def set_deadline(
        self, subscription: str, ack_ids: Sequence[str], seconds: int, *, limit_s: float = CALL_TIMEOUT_S
    ) -> None:
        for some in _batches(ack_ids):
            arguments = {"ack_ids": some, "ack_deadline_seconds": seconds}
            await self._call("modify_ack_deadline", subscription, limit_s, **arguments)

    def lease_s(self, subscription: str) -> int:
        return EXACTLY_ONCE_LEASE_S if self._exactly_once.get(subscription) else LEASE_S

    async def close(self) -> None:
        if self._opened is not None:
            transport: Any = self._opened.transport
            await transport.close()

    async def _look(self, subscription: str) -> None:
        """Find out, once, whether the subscription delivers exactly once."""
        if subscription in self._exactly_once:
            return
        try:
            found = await self._call("get_subscription", subscription, PATIENCE_S)
            self._exactly_once[subscription] = found is not None and found.enable_exactly_once_delivery
        except BrokerUnavailable as e:
            # The role Pub/Sub Subscriber may pull and may not look.
            if isinstance(e.__cause__, PermissionDenied):
                self._exactly_once[subscription] = False

    async def _call(self, method: str, subscription: str, limit_s: float = CALL_TIMEOUT_S, **arguments: Any) -> Any:
        path = subscription_path(self._settings, subscription)
        try:
            return await _called(getattr(self._client, method), limit_s, subscription=path, **arguments)
        except (GoogleAPIError, GoogleAuthError) as e:
            reason = _REASONS.get(type(e), "no connection to Pub/Sub" if isinstance(e, ServiceUnavailable) else "")
            said = f"{reason} ({e})" if reason else str(e)
            raise BrokerUnavailable(f"Pub/Sub's {method} on {path} failed: {said}", subscription=subscription) from e


def _delivery(message: types.PubsubMessage) -> Delivery:
    try:
        publish_time = message.publish_time
    except (ValueError, OverflowError):
        # A moment that Python does not know.
        publish_time = None
    return Delivery(
        data=message.data,
        attributes=dict(message.attributes),
        message_id=message.message_id,
        publish_time=publish_time,
    )


def _batches(ack_ids: Sequence[str]) -> list[Sequence[str]]:
    return [ack_ids[i : i + MOST_AT_ONCE] for i in range(0, len(ack_ids), MOST_AT_ONCE)]


class PubSubDeadLetters:
    def __init__(self, settings: MessagesSettings, subscriber: Subscriber | None = None) -> None:
        """`subscriber` is the server's at `settings.url` unless given."""
        self._subscriber = subscriber or GrpcSubscriber(settings)
        self._name = settings.dead_letter_subscription
        self._wait_s = PATIENCE_S if settings.is_google else 0.0

    async def pull(self, limit: int) -> Sequence[DeadLetter]:
        received = await self._subscriber.pull(self._name, limit, self._wait_s)
        letters = [DeadLetter(delivery=one.delivery, ack_id=one.ack_id) for one in received]
        await self._subscriber.set_deadline(self._name, _ack_ids(letters), IN_HAND_S)
        return letters

    async def acknowledge(self, letters: Sequence[DeadLetter]) -> None:
        await self._subscriber.acknowledge(self._name, _ack_ids(letters))

    async def give_back(self, letters: Sequence[DeadLetter]) -> None:
        await self._subscriber.set_deadline(self._name, _ack_ids(letters), 0)

    async def close(self) -> None:
        await self._subscriber.close()


def _ack_ids(letters: Sequence[DeadLetter]) -> list[str]:
    return [letter.ack_id for letter in letters]


# -- topics


class PubSubPublisher:
    def __init__(self, settings: MessagesSettings, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """`timeout_s` limits one publication, retries included. Raises as Connection does."""
        self._connection = Connection(settings)
        self._opened: PublisherAsyncClient | None = None
        self._timeout_s = timeout_s
        self._topics = {topic: topic_path(settings, name) for topic, name in topic_names(settings).items()}

    async def publish(self, topic: Topic, data: bytes, attributes: Mapping[str, str]) -> str:
        """Raises ValueError for a topic that the settings do not name."""
        if topic not in self._topics:
            raise ValueError(f"the settings name no topic for {topic!r} messages")
        if self._opened is None:
            self._opened = PublisherAsyncClient(transport=self._connection.transport(PublisherGrpcAsyncIOTransport))
        name = self._topics[topic]
        message = types.PubsubMessage(data=data, attributes=dict(attributes))
        try:
            response = await _called(self._opened.publish, self._timeout_s, topic=name, messages=[message])
        except InvalidArgument as e:
            raise MessageRefused(f"{name} refuses the message: {e}", topic=name) from e
        except (GoogleAPIError, GoogleAuthError) as e:
            raise BrokerUnavailable(f"publishing to {name} failed: {e}", topic=name) from e
        if response is None or not response.message_ids:
            raise BrokerUnavailable(f"publishing to {name} failed: the answer has no message id", topic=name)
        message_id: str = response.message_ids[0]
        return message_id
