"""Messages from one subscription of Google Cloud Pub/Sub, or of the embedded server, which speaks the same protocol.

The library's streaming client receives, keeps leases alive and limits what is in hand. What becomes of a message is
told in calls of our own: the library sends such answers through its stream's threads, where they are lost without a
word once the stream is closed.

Three things the library does not do. It stops keeping leases when a stream ends, though the messages are still in hand:
here they are kept until they are settled. A message that is held back still counts, at the server, towards what its
stream may have outstanding: when half of a stream's places are taken so, another stream replaces it. And a stream
cannot be made narrower: while higher priorities want the places, one that has more in hand than its share is replaced
by one of that width, and what waits beyond it goes back to Pub/Sub; when places are free again, by a wide one.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from ..errors import BrokerUnavailable
from ..ports import Handler, SourceStatus, Verdict
from ..settings import MessagesSettings
from .places import RANKS, Places
from .pubsub_connection import FAILURES, Caller
from .pubsub_names import subscription_path
from .pubsub_stream import LEASE_S, Stream, delivery_of

log = logging.getLogger(__name__)

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
#: What closing may take beyond its grace, in seconds; half of it for the end of the stream.
CLOSING_S = 10.0

_INTERRUPTED = Verdict(action="nack", reason="interrupted")


@dataclass(eq=False, slots=True)
class _InHand:
    message: Any
    stream: Stream
    task: "asyncio.Task[None]" = field(init=False)
    #: On the monotonic clock.
    taken_at: float = field(default_factory=time.monotonic)
    #: When we last extended its lease, on the monotonic clock; its stream does as long as it lives.
    extended_at: float = -math.inf
    #: Its task has begun: cancelled, it settles the message itself.
    is_begun: bool = False
    #: It has a place: its handler has it.
    is_placed: bool = False
    #: What becomes of it is decided and being told.
    is_settling: bool = False
    #: What is being told is that it is done.
    is_done: bool = False

    def is_due(self, now: float, max_lease_s: float) -> bool:
        """Whether its lease is to be extended, if that is left to us."""
        # Where a lease ends before the acknowledgment arrives, the message comes again.
        is_kept = self.is_done or not self.is_settling
        return is_kept and now - self.taken_at < max_lease_s and now - self.extended_at >= ORPHAN_LEASE_S / 4


class PubSubSource:
    def __init__(
        self,
        settings: MessagesSettings,
        subscription: str,
        places: Places,
        client: Any,
        caller: Caller,
        *,
        max_lease_s: float = 3600.0,
    ) -> None:
        """`places` are shared with the other subscriptions, and so are `client` and `caller`, which carry the answers.
        A message handled for longer than `max_lease_s` may come again meanwhile."""
        self._settings = settings
        self._subscription = subscription
        self._path = subscription_path(settings, subscription)
        ranks = {name: RANKS[other.priority] for name, other in settings.subscriptions.items()}
        self._rank = ranks[subscription]
        self._places = places
        self._widest = places.width(self._rank, ranks.values())
        self._client = client
        self._caller = caller
        self._max_lease_s = max_lease_s
        #: Of the next stream.
        self._width = self._widest
        self._in_hand: dict[str, _InHand] = {}
        self._stream: Stream | None = None
        self._error = ""
        self._closing = asyncio.Event()
        self._closed = asyncio.Event()

    async def run(self, handle: Handler) -> None:
        try:
            # Together: where leases are no longer kept, nothing more is to be pulled.
            async with asyncio.TaskGroup() as group:
                tending = group.create_task(self._tend())
                await self._keep_pulling(handle)
                tending.cancel()
        finally:
            await self._give_back_all(CLOSING_S)

    async def _keep_pulling(self, handle: Handler) -> None:
        retrying = AsyncRetrying(
            # The library documents no list of errors.
            retry=retry_if_exception_type(Exception),
            wait=wait_random_exponential(multiplier=0.2, max=REOPEN_MAX_S),
            stop=lambda _: self._closing.is_set(),
            sleep=self._sleep,
            before_sleep=self._note_break,
            retry_error_callback=lambda _: None,
        )
        while not self._closing.is_set():
            await retrying(self._pull, handle)
        await self._closed.wait()

    async def close(self, *, grace_s: float) -> None:
        """Ends within `grace_s` and `CLOSING_S`, whatever the broker does: what it was not told of comes again."""
        ends_at = time.monotonic() + grace_s + CLOSING_S
        self._closing.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_S / 2):
                await self._retire()
        self._give_back_waiting()
        if self._in_hand:
            await asyncio.wait([held.task for held in self._in_hand.values()], timeout=grace_s)
        await self._give_back_all(ends_at - time.monotonic())
        self._closed.set()

    def status(self) -> SourceStatus:
        connected = self._stream is not None and self._stream.is_proven
        error = "" if connected else self._error or "not connected yet"
        return SourceStatus(connected=connected, error=error, held=len(self._in_hand))

    async def _pull(self, handle: Handler) -> None:
        """Receive on one stream until it is retired. Raises BrokerUnavailable where it breaks young."""
        stream = await Stream.opened(self._settings, self._subscription, self._width)
        try:
            if self._closing.is_set():
                return
            stream.receive(partial(self._take, handle), self._max_lease_s)
            self._stream = stream
            await asyncio.wait({stream.broken})
            self._raise_break(stream)
        finally:
            stream.close()
            if self._stream is stream:
                self._stream = None

    def _raise_break(self, stream: Stream) -> None:
        if self._stream is not stream:
            return
        error = BrokerUnavailable(stream.broken.result(), subscription=self._subscription)
        if time.monotonic() - stream.opened_at < REOPEN_MAX_S:
            raise error
        self._note(error)

    def _note_break(self, state: RetryCallState) -> None:
        if state.outcome is not None:
            self._note(state.outcome.exception())

    def _note(self, error: BaseException | None) -> None:
        self._error = str(error)
        extra = {"action": "stream_broken", "subscription": self._subscription}
        log.warning("Opening the stream again: %s", error, extra=extra)

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
        try:
            # Before the end: the embedded server gives back at once what an ended stream had.
            await self._extend_orphans()
        finally:
            stream.close()
        await stream.wait_closed()

    def _take(self, handle: Handler, stream: Stream, message: Any) -> None:
        # The embedded server sends again what comes after a stream was retired: nobody extended its lease before.
        is_late = stream is not self._stream
        held = _InHand(message, stream, is_settling=is_late)
        self._in_hand[message.ack_id] = held
        held.task = asyncio.create_task(self._settle(held, _INTERRUPTED) if is_late else self._deliver(held, handle))

    async def _deliver(self, held: _InHand, handle: Handler) -> None:
        held.is_begun = True
        message = held.message
        try:
            async with self._places.taken(self._rank):
                held.is_placed = True
                verdict = _INTERRUPTED if self._closing.is_set() else await handle(delivery_of(message))
        except asyncio.CancelledError:
            verdict = _INTERRUPTED
        except Exception:
            log.exception("The handler of message %s failed", message.message_id, extra={"action": "handler_failed"})
            verdict = Verdict(action="hold", delay_s=ERROR_HOLD_S, reason="handler_failed")
        await self._settle(held, verdict)

    async def _settle(self, held: _InHand, verdict: Verdict) -> None:
        ack_id = held.message.ack_id
        held.is_settling, held.is_done = True, verdict.action == "ack"
        # Ends the library's lease keeping and frees its place; sends nothing.
        held.message.drop()
        try:
            if verdict.action == "ack":
                await self._answer(self._client.acknowledge, ack_ids=[ack_id])
            elif verdict.action == "nack":
                await self._set_deadline([ack_id], 0)
            else:
                await self._hold(held, verdict.delay_s)
        finally:
            self._in_hand.pop(ack_id, None)

    async def _hold(self, held: _InHand, delay_s: float) -> None:
        seconds = min(MAX_HOLD_S, max(1, math.ceil(delay_s)))
        # The embedded server takes exactly this for a lease that is kept, which ends with its stream.
        seconds += seconds == LEASE_S
        held.stream.hold_place(seconds)
        await asyncio.sleep(HOLD_PAUSE_S)
        await self._set_deadline([held.message.ack_id], seconds)

    async def _set_deadline(self, ack_ids: Sequence[str], seconds: int) -> None:
        await self._answer(self._client.modify_ack_deadline, ack_ids=ack_ids, ack_deadline_seconds=seconds)

    async def _answer(self, method: Any, **arguments: Any) -> None:
        try:
            await self._caller.call(method, subscription=self._path, **arguments)
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
            if stream.is_proven:
                self._error = ""
            if stream.places_held() * 2 >= stream.width:
                await self._retire()
            else:
                await self._fit(stream)

    async def _fit(self, stream: Stream) -> None:
        """Replace a stream that is too wide while higher priorities want the places, or too narrow afterwards."""
        share = self._places.share
        if self._places.is_contended(self._rank):
            if stream.width > share and len(self._waiting()) > share:
                self._width = share
                await self._retire()
                self._give_back_waiting()
        elif stream.width < self._widest and self._places.free:
            self._width = self._widest
            await self._retire()

    def _waiting(self) -> list[_InHand]:
        """What is in hand and has no place yet."""
        return [held for held in self._in_hand.values() if not held.is_placed and not held.is_settling]

    def _give_back_waiting(self) -> None:
        for held in self._waiting():
            self._interrupt(held)

    def _interrupt(self, held: _InHand) -> None:
        """Have it given back, unless its handler answers the cancellation with another verdict."""
        held.task.cancel()
        if not held.is_begun:
            # A task that is cancelled before its first step settles nothing.
            held.is_settling = True
            held.task = asyncio.create_task(self._settle(held, _INTERRUPTED))

    async def _extend_orphans(self) -> None:
        now = time.monotonic()
        orphans = [held for held in self._in_hand.values() if held.stream is not self._stream]
        due = [held for held in orphans if held.is_due(now, self._max_lease_s)]
        for held in due:
            held.extended_at = now
        if due:
            await self._set_deadline([held.message.ack_id for held in due], ORPHAN_LEASE_S)

    async def _give_back_all(self, timeout_s: float) -> None:
        for held in tuple(self._in_hand.values()):
            if not held.is_settling:
                self._interrupt(held)
        if self._in_hand:
            _, late = await asyncio.wait([held.task for held in self._in_hand.values()], timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                log.warning("Ended with %d messages that were not answered", len(late), extra={"action": "answer_lost"})
        self._in_hand.clear()
