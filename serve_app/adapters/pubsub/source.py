"""Messages from the subscriptions of Google Cloud Pub/Sub, or of a server that speaks its protocol, by unary pulls.

A pull asks for no more messages than can be handled now, so that the others stay with Pub/Sub, for any replica that is
free. Where there are several subscriptions, each may have a few messages more (`FlowControl.share`) that wait here:
when a slot is free again it goes to the highest priority, and every so often to a lower one (`flow`).

One task for each subscription extends the leases of its messages in flight, well before they end.
"""

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from ... import tracing
from ...errors import BrokerUnavailable
from ...jobs.messages import traceparent_of
from ...jobs.ports import Handler, SourceStatus, Verdict
from ...settings import MessagesSettings
from .client import GrpcSubscriber, Received, Subscriber
from .flow import RANKS, FlowControl

log = logging.getLogger(__name__)

#: How often the leases of messages in flight are extended, as a share of a lease.
EXTENSIONS_PER_LEASE = 4
#: Pub/Sub holds a message back for no longer, in seconds.
MAX_DEFER_S = 600
#: How long a message is deferred whose handler raised, in seconds.
ERROR_DEFER_S = 5.0
#: How long a pull waits for messages, in seconds.
PULL_S = 20.0
#: How long a source that closes waits for the answer to its last pull, in seconds.
LAST_ANSWER_S = 0.2
#: The pause after a pull that brought nothing, should the server not wait for messages; seconds.
EMPTY_S = 0.1
#: The longest pause after a pull that failed, in seconds.
RETRY_MAX_S = 30.0
#: What closing may take beyond its grace, in seconds.
CLOSING_S = 10.0

_INTERRUPTED = Verdict(action="defer", reason="interrupted")


@dataclass(eq=False, slots=True)
class _InFlight:
    subscription: str
    received: Received
    task: "asyncio.Task[None]" = field(init=False)
    #: On the monotonic clock.
    pulled_at: float = field(default_factory=time.monotonic)
    #: Its task has begun: canceled, it settles the message itself.
    is_begun: bool = False
    #: It has a place: its handler has it.
    is_placed: bool = False
    #: It is to be given back, and its task has not come to that yet.
    is_leaving: bool = False
    #: What becomes of it is decided and being told.
    is_settling: bool = False
    #: What is being told is that it is done.
    is_done: bool = False


class PubSubSource:
    def __init__(
        self,
        settings: MessagesSettings,
        in_flight: int,
        *,
        subscriber: Subscriber | None = None,
        max_lease_s: float = 3600.0,
    ) -> None:
        """At most `in_flight` messages are handled at a time, over all subscriptions. One that is handled for longer
        than `max_lease_s` may come again meanwhile. `subscriber` is the server's at `settings.url` unless given.

        Raises SettingsError where there are no credentials.
        """
        self._subscriber = subscriber or GrpcSubscriber(settings)
        self._flow = FlowControl(in_flight)
        self._ranks = {name: RANKS[subscription.priority] for name, subscription in settings.subscriptions.items()}
        self._ahead = self._flow.share if len(self._ranks) > 1 else 0
        self._max_lease_s = max_lease_s
        self._in_flight: dict[str, _InFlight] = {}
        #: Of the last pull, and of the last extension of leases; empty where it went well.
        self._errors = dict.fromkeys(self._ranks, "not connected yet")
        self._lease_errors = dict.fromkeys(self._ranks, "")
        #: When the first began of the latest pulls, none of which brought a message; on the monotonic clock.
        self._empty_since: dict[str, float | None] = dict.fromkeys(self._ranks)
        #: Set, and replaced, when there may be room for more messages.
        self._room_changed = asyncio.Event()
        #: Held while a subscription's leases are extended: what is decided meanwhile is told after it.
        self._extending = {name: asyncio.Lock() for name in self._ranks}
        self._closing = asyncio.Event()
        self._closed = asyncio.Event()

    async def run(self, handle: Handler) -> None:
        try:
            # Together: where leases are no longer extended, nothing more is to be pulled.
            async with asyncio.TaskGroup() as group:
                extending = [group.create_task(self._extend_leases(name)) for name in self._ranks]
                for name in self._ranks:
                    group.create_task(self._keep_pulling(name, handle))
                await self._closed.wait()
                for task in extending:
                    task.cancel()
        finally:
            await self._give_back_all(CLOSING_S)
            self._errors = dict.fromkeys(self._ranks, "not running")
            await self._subscriber.close()

    async def close(self, *, grace_s: float) -> None:
        """Ends within `grace_s` and `CLOSING_S`, whatever the broker does: what it was not told of comes again."""
        ends_at = time.monotonic() + grace_s + CLOSING_S
        self._closing.set()
        self._announce_room()
        self._errors = dict.fromkeys(self._ranks, "closing")
        self._give_back([held for held in self._in_flight.values() if not held.is_placed])
        if self._in_flight:
            await asyncio.wait([held.task for held in self._in_flight.values()], timeout=grace_s)
        await self._give_back_all(ends_at - time.monotonic())
        self._closed.set()

    def status(self) -> Mapping[str, SourceStatus]:
        held = [held.subscription for held in self._in_flight.values()]
        errors = {name: self._errors[name] or self._lease_errors[name] for name in self._ranks}
        now = time.monotonic()
        empty_s = {name: 0.0 if since is None else now - since for name, since in self._empty_since.items()}
        return {
            name: SourceStatus(connected=not error, error=error, held=held.count(name), empty_s=empty_s[name])
            for name, error in errors.items()
        }

    async def _keep_pulling(self, name: str, handle: Handler) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(BrokerUnavailable),
            wait=wait_random_exponential(multiplier=0.2, max=RETRY_MAX_S),
            stop=lambda _: self._closing.is_set(),
            sleep=self._sleep,
            before_sleep=partial(self._note, name),
            retry_error_callback=lambda _: None,
        )
        while not self._closing.is_set():
            await retrying(self._pull, name, handle)

    async def _pull(self, name: str, handle: Handler) -> None:
        """Take what there is room for. Raises BrokerUnavailable."""
        while not (room := self._room(name)) and not self._closing.is_set():
            await self._room_changed.wait()
        if self._closing.is_set():
            return
        # The first answer, at once, says whether the subscription can be pulled from.
        wait_s, began_at = 0.0 if self._errors[name] else PULL_S, time.monotonic()
        pulled = await self._unless_closing(name, room, wait_s)
        for received in pulled:
            self._take(name, received, handle)
        if self._closing.is_set():
            return
        self._errors[name] = ""
        self._empty_since[name] = None if pulled else self._empty_since[name] or began_at
        if not pulled:
            await self._sleep(EMPTY_S)
        # Those that find a place have it after this; of the others, which other pulls were quicker than, few may wait.
        await asyncio.sleep(0)
        self._give_back(self._waiting(name)[self._ahead :])

    async def _unless_closing(self, name: str, most: int, wait_s: float) -> Sequence[Received]:
        pull = asyncio.create_task(self._subscriber.pull(name, most, wait_s))
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({pull, closing}, return_when=asyncio.FIRST_COMPLETED)
            # What an answer brings that is on its way would come again only when its leases end.
            await asyncio.wait({pull}, timeout=LAST_ANSWER_S)
        finally:
            closing.cancel()
            pull.cancel()
        with suppress(asyncio.CancelledError):
            return await pull
        return ()

    def _room(self, name: str) -> int:
        """Messages that may be pulled now."""
        waiting = len(self._waiting(name))
        return max(0, max(self._flow.free, self._ahead) - waiting)

    def _waiting(self, name: str) -> list[_InFlight]:
        """What has no place yet, the longest-waiting first."""
        in_flight = (held for held in self._in_flight.values() if held.subscription == name)
        return [held for held in in_flight if not (held.is_placed or held.is_leaving or held.is_settling)]

    def _note(self, name: str, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._errors[name], self._empty_since[name] = str(error), None
        extra = {"action": "pull_failed", "subscription": name}
        log.warning("Could not pull, trying again: %s", error, extra=extra)

    async def _sleep(self, delay_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._closing.wait()

    def _take(self, name: str, received: Received, handle: Handler) -> None:
        held = _InFlight(name, received)
        self._in_flight[received.ack_id] = held
        if self._closing.is_set():
            held.is_settling = True
            held.task = asyncio.create_task(self._settle(held, _INTERRUPTED))
        else:
            held.task = asyncio.create_task(self._deliver(held, handle))

    async def _deliver(self, held: _InFlight, handle: Handler) -> None:
        held.is_begun = True
        delivery = held.received.delivery
        try:
            async with self._flow.slot(self._ranks[held.subscription]):
                held.is_placed = True
                self._announce_room()
                verdict = _INTERRUPTED if self._closing.is_set() else await handle(delivery)
        except asyncio.CancelledError:
            verdict = _INTERRUPTED
        except Exception:
            log.exception("The handler of message %s failed", delivery.message_id, extra={"action": "handler_failed"})
            verdict = Verdict(action="defer", delay_s=ERROR_DEFER_S, reason="handler_failed")
        self._announce_room()
        await self._settle(held, verdict)

    def _announce_room(self) -> None:
        self._room_changed.set()
        self._room_changed = asyncio.Event()

    async def _settle(self, held: _InFlight, verdict: Verdict) -> None:
        held.is_settling, held.is_done = True, verdict.action == "ack"
        try:
            if held.is_done:
                with tracing.span("acknowledge", traceparent_of(held.received.delivery.attributes)):
                    await self._subscriber.acknowledge(held.subscription, [held.received.ack_id])
                return
            async with self._extending[held.subscription]:
                pass
            seconds = min(MAX_DEFER_S, math.ceil(verdict.delay_s))
            await self._subscriber.set_deadline(held.subscription, [held.received.ack_id], seconds)
        except BrokerUnavailable as e:
            # Nothing is lost: a message that is not settled comes again when its lease ends.
            log.warning(
                "Could not acknowledge or defer a message, which is delivered again: %s",
                e,
                extra={"action": "ack_lost"},
            )
        finally:
            self._in_flight.pop(held.received.ack_id, None)

    async def _extend_leases(self, name: str) -> None:
        while True:
            period_s = self._subscriber.lease_s(name) / EXTENSIONS_PER_LEASE
            await asyncio.sleep(period_s)
            async with self._extending[name]:
                # Another try comes before the leases end.
                await self._extend(name, limit_s=period_s)

    async def _extend(self, name: str, limit_s: float) -> None:
        oldest = time.monotonic() - self._max_lease_s
        in_flight = [held for held in self._in_flight.values() if held.subscription == name]
        # Where a lease ends before the acknowledgment arrives, the message comes again.
        kept = [held for held in in_flight if held.pulled_at > oldest and (held.is_done or not held.is_settling)]
        if not kept:
            self._lease_errors[name] = ""
            return
        try:
            ack_ids = [held.received.ack_id for held in kept]
            await self._subscriber.set_deadline(name, ack_ids, self._subscriber.lease_s(name), limit_s=limit_s)
            self._lease_errors[name] = ""
        except BrokerUnavailable as e:
            self._lease_errors[name] = str(e)
            log.warning("Could not extend leases: %s", e, extra={"action": "leases_not_extended"})

    def _give_back(self, unplaced: Sequence[_InFlight]) -> None:
        for held in unplaced:
            if not (held.is_leaving or held.is_settling):
                self._interrupt(held)

    def _interrupt(self, held: _InFlight) -> None:
        """Have it given back, unless its handler answers the cancellation with another verdict."""
        held.is_leaving = True
        held.task.cancel()
        if not held.is_begun:
            # A task that is canceled before its first step settles nothing.
            held.is_settling = True
            held.task = asyncio.create_task(self._settle(held, _INTERRUPTED))

    async def _give_back_all(self, timeout_s: float) -> None:
        self._give_back(tuple(self._in_flight.values()))
        if self._in_flight:
            _, late = await asyncio.wait([held.task for held in self._in_flight.values()], timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                log.warning(
                    "Stopped with %d messages neither acknowledged nor deferred",
                    len(late),
                    extra={"action": "ack_lost"},
                )
        self._in_flight.clear()
