"""A message broker in the memory of this process, for tests: topics, one subscription on each, and holding back.

Held to the same contract tests as Pub/Sub. Sources and publishers of one `memory:NAME` meet, whichever thread or event
loop they are used from.
"""

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import ClassVar

from ..ports import Delivery, Handler, SourceStatus, Topic, Verdict
from ..settings import MessagesSettings

log = logging.getLogger(__name__)

#: How long a message is held back whose handler raised, in seconds.
ERROR_HOLD_S = 1.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    delivery: Delivery
    #: On the monotonic clock; not to be delivered before.
    not_before: float


@dataclass
class _Queue:
    """The messages of one topic that nobody has in hand."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: list[_Waiting] = field(default_factory=list)
    #: Called after each new message, from whatever thread brought it.
    listeners: list[Callable[[], object]] = field(default_factory=list)

    _named: ClassVar[dict[tuple[str, str], "_Queue"]] = {}

    @classmethod
    def of(cls, url: str, topic: str) -> "_Queue":
        return cls._named.setdefault((url, topic), cls())

    def put(self, delivery: Delivery, delay_s: float = 0.0) -> None:
        with self.lock:
            self.waiting.append(_Waiting(delivery, time.monotonic() + delay_s))
            listeners = tuple(self.listeners)
        for listener in listeners:
            listener()

    def take(self) -> Delivery | None:
        """The first message that is due."""
        now = time.monotonic()
        with self.lock:
            for i, waiting in enumerate(self.waiting):
                if waiting.not_before <= now:
                    return self.waiting.pop(i).delivery
        return None

    def until_due_s(self) -> float | None:
        """Seconds until a message will be due; None while there is none."""
        with self.lock:
            due = min((waiting.not_before for waiting in self.waiting), default=None)
        return None if due is None else max(0.0, due - time.monotonic())


class MemorySource:
    def __init__(self, settings: MessagesSettings, in_flight: int) -> None:
        self._queue = _Queue.of(settings.url, settings.topic)
        self._in_flight = in_flight
        self._tasks: set[asyncio.Task[Verdict]] = set()
        self._wake = asyncio.Event()
        self._closing = False
        self._running = False

    async def run(self, handle: Handler) -> None:
        loop = asyncio.get_running_loop()

        def listener() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._wake.set)

        self._queue.listeners.append(listener)
        self._running = True
        try:
            while not self._closing:
                self._start_due(handle)
                await self._until_woken()
        finally:
            self._running = False
            self._queue.listeners.remove(listener)
            await self._cancel_tasks()

    async def close(self, *, grace_s: float) -> None:
        self._closing = True
        self._wake.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        await self._cancel_tasks()

    def status(self) -> SourceStatus:
        return SourceStatus(connected=self._running and not self._closing, held=len(self._tasks))

    def _start_due(self, handle: Handler) -> None:
        self._wake.clear()
        while not self._closing and len(self._tasks) < self._in_flight and (delivery := self._queue.take()):
            task = asyncio.create_task(self._deliver(delivery, handle))
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, delivery))

    def _ended(self, delivery: Delivery, task: asyncio.Task[Verdict]) -> None:
        self._tasks.discard(task)
        verdict = Verdict(action="nack", reason="interrupted") if task.cancelled() else task.result()
        if verdict.action != "ack":
            self._queue.put(delivery, verdict.delay_s)
        self._wake.set()

    async def _until_woken(self) -> None:
        is_full = len(self._tasks) >= self._in_flight
        try:
            async with asyncio.timeout(None if is_full else self._queue.until_due_s()):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _deliver(self, delivery: Delivery, handle: Handler) -> Verdict:
        try:
            return await handle(delivery)
        except Exception:
            log.exception("The handler of message %s failed", delivery.message_id, extra={"action": "handler_failed"})
            return Verdict(action="hold", delay_s=ERROR_HOLD_S, reason="handler_failed")

    async def _cancel_tasks(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class MemoryPublisher:
    def __init__(self, settings: MessagesSettings) -> None:
        self._url = settings.url
        self._names: Mapping[Topic, str] = {"sessions": settings.topic, "dead": settings.dead_letter_topic}

    async def publish(self, topic: Topic, data: bytes, attributes: Mapping[str, str]) -> str:
        message_id = uuid.uuid4().hex
        delivery = Delivery(
            data=bytes(data), attributes=dict(attributes), message_id=message_id, publish_time=datetime.now(UTC)
        )
        _Queue.of(self._url, self._names[topic]).put(delivery)
        return message_id
