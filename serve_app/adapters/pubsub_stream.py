"""A stream of one subscription's messages: the library's, and whether it delivers.

The library opens a call that broke again by itself, says nothing and may pause for 10 s. Here a stream is over with its
first call, and says why; whoever wants messages opens another one.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.api_core.exceptions import RetryError, ServiceUnavailable
from google.cloud.pubsub_v1.types import FlowControl

from ..ports import Delivery
from ..settings import MessagesSettings
from .pubsub_connection import RETRY, connect, subscriber_client
from .pubsub_names import subscription_path

#: What the library extends a lease to, in seconds: the shortest it can, so that a crash is noticed soonest.
LEASE_S = 10
#: A call that has gone on for so long is a good one, in seconds; a message proves it sooner.
PROVEN_S = 1.0
#: How long a closed stream may take to give back what it had not delivered, and one extension of leases; seconds.
CLOSE_S = 5.0

_SENTENCES = {
    grpc.StatusCode.NOT_FOUND: "the subscription {name} does not exist",
    grpc.StatusCode.PERMISSION_DENIED: "this service may not pull from {name}: it needs the role Pub/Sub Subscriber",
    grpc.StatusCode.UNAUTHENTICATED: "Pub/Sub does not take this service's credentials for {name}",
}


class Stream:
    """Open one with `opened`. It has a channel of its own, so that nothing waits for another's pause."""

    def __init__(self, client: Any, name: str, width: int) -> None:
        #: Messages that the server sends it at most, before some are settled.
        self.width = width
        #: Why it is over.
        self.broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.opened_at = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._pulling: Any = None
        self._name = name
        self._has_delivered = False
        #: When each held-back message will come again, on the monotonic clock.
        self._held_until: list[float] = []

    @classmethod
    async def opened(cls, settings: MessagesSettings, subscription: str, width: int) -> "Stream":
        """Connected, and receiving nothing yet.

        Raises BrokerUnavailable; SettingsError where there are no credentials.
        """
        # In a thread, because finding Google's credentials may take a call.
        client = await asyncio.to_thread(subscriber_client, settings)
        try:
            await connect(client.transport.grpc_channel)
        except BaseException:
            client.close()
            raise
        return cls(client, subscription_path(settings, subscription), width)

    @property
    def is_proven(self) -> bool:
        """Whether it delivers, as far as can be known."""
        is_old = time.monotonic() - self.opened_at >= PROVEN_S
        return not self.broken.done() and (self._has_delivered or is_old)

    def receive(self, take: Callable[["Stream", Any], None], max_lease_s: float) -> None:
        """Have `take` called with each message, on this event loop; its lease is kept for `max_lease_s` at most."""

        def deliver(message: Any) -> None:
            self._has_delivered = True
            take(self, message)

        # The library asks the client for each call, and tells nobody of those that broke.
        self._client.streaming_pull = self._watched(self._client.streaming_pull)
        self._client.modify_ack_deadline = _brief(self._client.modify_ack_deadline)
        self._pulling = self._client.subscribe(
            self._name,
            lambda message: self._tell(deliver, message),
            flow_control=FlowControl(
                max_messages=self.width, max_lease_duration=max_lease_s, max_duration_per_lease_extension=LEASE_S
            ),
        )
        self._closed = asyncio.wrap_future(self._pulling)
        self._closed.add_done_callback(self._library_gave_up)
        # Not before the library has given back what it did not deliver.
        self._pulling.add_done_callback(lambda _: self._client.close())

    def close(self) -> None:
        """What it delivered stays in hand, what it did not is given back."""
        if self._pulling is None:
            self._client.close()
        else:
            self._pulling.cancel()

    async def wait_closed(self) -> None:
        await asyncio.wait({self._closed}, timeout=CLOSE_S)

    def hold_place(self, seconds: float) -> None:
        """A message is held back: until it comes again the server counts it as in this stream's hands."""
        self._held_until.append(time.monotonic() + seconds)

    def places_held(self) -> int:
        now = time.monotonic()
        self._held_until = [until for until in self._held_until if until > now]
        return len(self._held_until)

    def _watched(self, pull: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            call = pull(*arguments, **options)

            def ended() -> None:
                self._tell(self._break, self._reason(call.code(), call.details()))

            if not call.add_callback(ended):
                ended()
            return call

        return watched

    def _reason(self, code: grpc.StatusCode, details: str) -> str:
        broke = f"the stream of {self._name} broke"
        return f"{_SENTENCES.get(code, broke).format(name=self._name)} ({code.name}: {details})"

    def _library_gave_up(self, closed: "asyncio.Future[Any]") -> None:
        error = None if closed.cancelled() else closed.exception()
        self._break(f"the stream of {self._name} broke: {error}")

    def _break(self, reason: str) -> None:
        if not self.broken.done():
            self.broken.set_result(reason)

    def _tell(self, callback: Callable[[Any], None], what: Any) -> None:
        """From a thread of the library's."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, what)


def _brief(call: Callable[..., Any]) -> Callable[..., Any]:
    """Tried for `CLOSE_S`: the library tries for a minute, cannot be closed meanwhile, and then its thread fails."""

    def called(**arguments: Any) -> Any:
        try:
            return call(**arguments, retry=RETRY.with_timeout(CLOSE_S), timeout=CLOSE_S)
        except RetryError as e:
            # One that the library takes as a call that was lost.
            raise ServiceUnavailable(str(e)) from e

    return called


def delivery_of(message: Any) -> Delivery:
    """A message of the library's."""
    return Delivery(
        data=message.data,
        attributes=dict(message.attributes),
        message_id=message.message_id,
        publish_time=message.publish_time,
    )
