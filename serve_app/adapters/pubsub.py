"""Messages from Google Cloud Pub/Sub, or from the embedded server, which speaks the same protocol.

The library's streaming client receives, keeps leases alive and limits what is in hand. What becomes of a message is
told in calls of our own: the library sends such answers through its stream's threads, where they are lost without a
word once the stream is closed.

Two things the library does not do. It stops keeping leases when a stream ends, though the messages are still in hand:
here they are kept until they are settled. And a message that is held back still counts, at the server, towards what
its stream may have outstanding: when half of a stream's places are taken so, another stream replaces it.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from google.cloud.pubsub_v1.types import FlowControl
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from ..errors import BrokerUnavailable, SettingsError
from ..ports import Delivery, Handler, SourceStatus, Verdict
from ..settings import MessagesSettings
from .pubsub_connection import CALL_TIMEOUT_S, FAILURES, RETRY, Connection, subscriber_client
from .pubsub_names import subscription_path

log = logging.getLogger(__name__)

#: What the library extends a lease to, in seconds: the shortest it can, so that a crash is noticed soonest.
LEASE_S = 10
#: What the lease of a message is extended to whose stream has ended.
ORPHAN_LEASE_S = 20
#: How often orphans and held-back messages are looked after, in seconds.
TEND_S = 0.25
#: Pub/Sub holds a message back for no longer, in seconds.
MAX_HOLD_S = 600
#: How long a message is held back whose handler raised, in seconds.
ERROR_HOLD_S = 5.0
#: Before a message is held back, so that a lease extension under way does not arrive after that.
HOLD_PAUSE_S = 0.1
#: The longest pause between two attempts to open a stream; one that lived as long starts anew with the shortest.
REOPEN_MAX_S = 30.0
#: How long a closed stream may take to give back what it had not delivered.
STREAM_CLOSE_S = 5.0

_INTERRUPTED = Verdict(action="nack", reason="interrupted")


@dataclass(eq=False, slots=True)
class _Stream:
    """One subscription to the library's messages.

    It has a channel of its own: the library opens a broken stream again by itself, and while it pauses for that, up to
    10 s, nothing else moves on its channel.
    """

    client: Any
    connection: Connection
    pulling: "Future[Any]" = field(init=False)
    #: `pulling`, for the event loop.
    ended: "asyncio.Future[Any]" = field(init=False)
    opened_at: float = field(default_factory=time.monotonic)
    #: When each held-back message will come again, on the monotonic clock.
    held_until: list[float] = field(default_factory=list)

    def places_held(self) -> int:
        now = time.monotonic()
        self.held_until = [until for until in self.held_until if until > now]
        return len(self.held_until)


@dataclass(eq=False, slots=True)
class _InHand:
    message: Any
    stream: _Stream
    task: "asyncio.Task[None]" = field(init=False)
    #: When we last extended its lease, on the monotonic clock; its stream does as long as it lives.
    extended_at: float = -math.inf
    #: What becomes of it is decided and being told.
    is_settling: bool = False

    def is_due(self, now: float) -> bool:
        """Whether its lease is to be extended, if that is left to us."""
        return not self.is_settling and now - self.extended_at >= ORPHAN_LEASE_S / 4


class PubSubSource:
    def __init__(self, settings: MessagesSettings, in_flight: int, *, max_lease_s: float = 3600.0) -> None:
        """A message handled for longer than `max_lease_s` may come again meanwhile."""
        self._settings = settings
        self._client = subscriber_client(settings)
        self._subscription = subscription_path(settings, next(iter(settings.subscriptions)))
        self._in_flight = in_flight
        self._flow_control = FlowControl(
            max_messages=in_flight, max_lease_duration=max_lease_s, max_duration_per_lease_extension=LEASE_S
        )
        # A replaced stream's messages may still be in hand when the next one delivers.
        self._places = asyncio.Semaphore(in_flight)
        self._in_hand: dict[str, _InHand] = {}
        self._stream: _Stream | None = None
        self._error = ""
        # Of its own: calls to a broker that is away must not keep the stores' calls waiting for a thread.
        self._callers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pubsub")
        self._closing = asyncio.Event()
        self._closed = asyncio.Event()

    async def run(self, handle: Handler) -> None:
        tending = asyncio.create_task(self._tend())
        retrying = AsyncRetrying(
            # The constructor found credentials, so a SettingsError here is a look-up that failed.
            retry=retry_if_exception_type((BrokerUnavailable, SettingsError, *FAILURES)),
            wait=wait_random_exponential(multiplier=0.2, max=REOPEN_MAX_S),
            stop=lambda _: self._closing.is_set(),
            sleep=self._sleep,
            before_sleep=self._note_break,
            retry_error_callback=lambda _: None,
        )
        try:
            while not self._closing.is_set():
                await retrying(self._pull, handle)
            await self._closed.wait()
        finally:
            tending.cancel()
            await self._give_back_all()

    async def close(self, *, grace_s: float) -> None:
        self._closing.set()
        await self._retire()
        if self._in_hand:
            await asyncio.wait([held.task for held in self._in_hand.values()], timeout=grace_s)
        await self._give_back_all()
        self._closed.set()
        await asyncio.to_thread(self._client.close)
        self._callers.shutdown(wait=False)

    def status(self) -> SourceStatus:
        connected = self._stream is not None and self._stream.connection.ready.is_set() and not self._error
        error = self._error or ("" if connected else "not connected yet")
        return SourceStatus(connected=connected, error=error, held=len(self._in_hand))

    async def _pull(self, handle: Handler) -> None:
        """Receive on one stream until it is retired. Raises BrokerUnavailable where it breaks young."""
        stream = await self._connected()
        if self._closing.is_set():
            stream.client.close()
            return
        self._subscribe(stream, handle)
        lost = asyncio.create_task(stream.connection.lost.wait())
        try:
            await asyncio.wait({stream.ended, lost}, return_when=asyncio.FIRST_COMPLETED)
            self._raise_break(stream)
        finally:
            lost.cancel()
            stream.pulling.cancel()
            if self._stream is stream:
                self._stream = None

    async def _connected(self) -> _Stream:
        # In a thread, because finding Google's credentials may take a call.
        client = await asyncio.to_thread(subscriber_client, self._settings)
        connection = Connection(client.transport.grpc_channel)
        try:
            await connection.open()
        except BaseException:
            client.close()
            raise
        return _Stream(client, connection)

    def _subscribe(self, stream: _Stream, handle: Handler) -> None:
        loop = asyncio.get_running_loop()

        def take(message: Any) -> None:
            loop.call_soon_threadsafe(self._take, handle, stream, message)

        stream.pulling = stream.client.subscribe(self._subscription, take, flow_control=self._flow_control)
        # Not before the library has given back what it did not deliver.
        stream.pulling.add_done_callback(lambda _: stream.client.close())
        stream.ended = asyncio.wrap_future(stream.pulling)
        stream.ended.add_done_callback(_retrieve)
        self._stream = stream

    def _raise_break(self, stream: _Stream) -> None:
        if self._stream is not stream:
            return
        reason = (stream.ended.exception() if stream.ended.done() else None) or "the connection was lost"
        error = BrokerUnavailable(f"the stream of {self._subscription} broke: {reason}")
        if time.monotonic() - stream.opened_at < REOPEN_MAX_S:
            raise error
        self._note(error)

    def _note_break(self, state: RetryCallState) -> None:
        if state.outcome is not None:
            self._note(state.outcome.exception())

    def _note(self, error: BaseException | None) -> None:
        self._error = str(error)
        log.warning("Opening the stream again: %s", error, extra={"action": "stream_broken"})

    async def _sleep(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._closing.wait()
        except TimeoutError:
            pass

    async def _retire(self) -> None:
        """End the present stream. What it delivered stays in hand, what it did not is given back."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        # Before the end: the embedded server gives back at once what an ended stream had.
        await self._extend_orphans()
        stream.pulling.cancel()
        await asyncio.wait({stream.ended}, timeout=STREAM_CLOSE_S)

    def _take(self, handle: Handler, stream: _Stream, message: Any) -> None:
        held = _InHand(message, stream)
        self._in_hand[message.ack_id] = held
        held.task = asyncio.create_task(self._deliver(held, handle))

    async def _deliver(self, held: _InHand, handle: Handler) -> None:
        message = held.message
        try:
            async with self._places:
                verdict = _INTERRUPTED if self._closing.is_set() else await handle(_delivery(message))
        except asyncio.CancelledError:
            verdict = _INTERRUPTED
        except Exception:
            log.exception("The handler of message %s failed", message.message_id, extra={"action": "handler_failed"})
            verdict = Verdict(action="hold", delay_s=ERROR_HOLD_S, reason="handler_failed")
        await self._settle(held, verdict)

    async def _settle(self, held: _InHand, verdict: Verdict) -> None:
        ack_id = held.message.ack_id
        held.is_settling = True
        # Ends the library's lease keeping and frees its place; sends nothing.
        held.message.drop()
        if verdict.action == "ack":
            await self._call(self._client.acknowledge, ack_ids=[ack_id])
        elif verdict.action == "nack":
            await self._set_deadline([ack_id], 0)
        else:
            await self._hold(held, verdict.delay_s)
        self._in_hand.pop(ack_id, None)

    async def _hold(self, held: _InHand, delay_s: float) -> None:
        seconds = min(MAX_HOLD_S, max(1, math.ceil(delay_s)))
        # The embedded server takes exactly this for a lease that is kept, which ends with its stream.
        seconds += seconds == LEASE_S
        held.stream.held_until.append(time.monotonic() + seconds)
        await asyncio.sleep(HOLD_PAUSE_S)
        await self._set_deadline([held.message.ack_id], seconds)

    async def _set_deadline(self, ack_ids: Sequence[str], seconds: int) -> None:
        await self._call(self._client.modify_ack_deadline, ack_ids=ack_ids, ack_deadline_seconds=seconds)

    async def _call(self, method: Any, **arguments: Any) -> None:
        call = partial(method, subscription=self._subscription, retry=RETRY, timeout=CALL_TIMEOUT_S, **arguments)
        try:
            await asyncio.get_running_loop().run_in_executor(self._callers, call)
        except FAILURES as e:
            # Nothing is lost: unsettled messages come again when their lease runs out.
            log.warning("Pub/Sub did not take an answer: %s", e, extra={"action": "answer_lost"})

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(TEND_S)
            await self._extend_orphans()
            stream = self._stream
            if stream is None:
                continue
            self._error = ""
            if stream.places_held() * 2 >= self._in_flight:
                await self._retire()

    async def _extend_orphans(self) -> None:
        now = time.monotonic()
        orphans = [held for held in self._in_hand.values() if held.stream is not self._stream and held.is_due(now)]
        for held in orphans:
            held.extended_at = now
        if orphans:
            await self._set_deadline([held.message.ack_id for held in orphans], ORPHAN_LEASE_S)

    async def _give_back_all(self) -> None:
        in_hand = tuple(self._in_hand.values())
        for held in in_hand:
            if not held.is_settling:
                held.task.cancel()
        await asyncio.gather(*(held.task for held in in_hand), return_exceptions=True)
        # A task that is cancelled before its first step settles nothing.
        if self._in_hand:
            await self._set_deadline(tuple(self._in_hand), 0)
            self._in_hand.clear()


def _delivery(message: Any) -> Delivery:
    return Delivery(
        data=message.data,
        attributes=dict(message.attributes),
        message_id=message.message_id,
        publish_time=message.publish_time,
    )


def _retrieve(ended: "asyncio.Future[Any]") -> None:
    """Have the error of a stream that nobody waits for any more count as seen."""
    if not ended.cancelled():
        ended.exception()
