"""Notifications: what others are told of a job. The session document, the completion topic and the publisher's own URL
hear how it ended; `dispatch` publishes the message of a job again that is not over and has been silent for long,
because the broker may have lost it.

A job owes its notifications from the write that ended it (`Job.owed`), so none is lost with a process. The process that
ended the job sends them at once; what is still owed when its head start is over, any process's notifier takes and
sends, again and again with backoff. What finds no free slot waits in the store, not here. None of it holds up a
message, a worker or another notification: each lane has slots of its own, and is looked for apart.
At least once: a notifier that dies between sending and noting it sends again.
"""

import asyncio
import json
import logging
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from ..errors import FluxFillError, InputError, MessageRefused, Unavailable, UnknownJob, WebhookFailed
from ..parameters import JobType
from ..settings import Settings
from ..telemetry import Metrics, NoMetrics, logged_with, trace_ids
from . import claims
from .kinds import Kind
from .messages import ASKED_AT
from .ports import JobStore, Publisher, SessionMirror
from .record import Job, Notification, State, receiver_of

log = logging.getLogger(__name__)

#: How long sending may take, in seconds; no other process sends it meanwhile. Shorter than record.HEAD_START_S.
SEND_TIMEOUT_S: Mapping[Notification, float] = {"session": 12.0, "completion": 12.0, "webhook": 30.0, "dispatch": 12.0}
#: The longest waits between two attempts, in seconds. The stores and the broker are ours, a receiver is a stranger's.
LONGEST_WAIT_S: Mapping[Notification, float] = {
    "session": 60.0,
    "completion": 60.0,
    "webhook": 3 * 3600.0,
    "dispatch": 24 * 3600.0,
}
#: Sent at a time: session documents, completions, webhooks to each receiver, messages.
AT_ONCE: Mapping[Notification, int] = {"session": 32, "completion": 32, "webhook": 4, "dispatch": 32}
#: Jobs of a state whose messages are published again when a broker starts: the newest.
RECALLED = 1000
#: Between two looks for what is due, in seconds.
POLL_S = 2.0
#: Those sent within this are noted by one write; one that takes longer, by its own.
BATCH_WINDOW_S = 0.5
#: Jobs looked at beyond those that a lane has slots for: of receivers that the settings name no longer.
BATCH = 100


class Webhooks(Protocol):
    def check(self, url: str) -> None:
        """Raises CallbackRefused for a URL that may not be called."""

    async def call(self, job: Job, event: str, document: Mapping[str, Any]) -> None:
        """Send `document` to `job.callback_url` as an event of the type `event`. Raises WebhookFailed, which is worth
        another try; CallbackRefused."""


class Notifier:
    def __init__(
        self,
        *,
        kinds: Sequence[Kind],
        job_store: JobStore,
        mirror: SessionMirror,
        publisher: Publisher,
        webhooks: Webhooks,
        settings: Settings,
        metrics: Metrics | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self._kinds: Mapping[JobType, Kind] = {kind.type: kind for kind in kinds}
        self._jobs, self._mirror, self._publisher, self._webhooks = job_store, mirror, publisher, webhooks
        self._settings, self._metrics, self._poll_s = settings, metrics or NoMetrics(), poll_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = _InFlight()
        hosts = {receiver_of(f"https://{host}") for host in settings.webhooks.hosts}
        self._lanes = [
            _Lane("session"),
            _Lane("completion"),
            _Lane("dispatch"),
            *(_Lane("webhook", host) for host in sorted(hosts)),
        ]
        self._ways: Mapping[Notification, Callable[[Job], Awaitable[None]]] = {
            "session": self._write_session,
            "completion": self._publish_completion,
            "webhook": self._call_webhook,
            "dispatch": self._dispatch,
        }

    def notify(self, job: Job) -> None:
        """Send in the background what `job`, as it was just stored, owes. What finds no free slot stays owed. Needs a
        running event loop."""
        begun: list[Notification] = [
            kind for kind in job.owed if kind != "dispatch" and self._in_flight.start(job, kind)
        ]
        if begun:
            self._spawn(self._send(job, begun))

    def dispatch(self, job: Job) -> None:
        """Publish in the background the message of `job`, which was just posted. Needs a running event loop."""
        if self._in_flight.start(job, "dispatch"):
            self._spawn(self._send(job, ["dispatch"]))

    async def recall(self) -> None:
        """Have the messages of all jobs that are not over published again. Raises StoreUnavailable."""
        for status in (State.QUEUED, State.RUNNING):
            for job in await self._jobs.list(status=status, limit=RECALLED):
                with suppress(UnknownJob):
                    await self._jobs.update(job.id, "", claims.recall)

    async def run(self) -> None:
        """Send what is due, for ever."""
        while True:
            try:
                await self.send_due()
            except Unavailable as e:
                log.warning("Could not list due notifications: %s", e, extra={"action": "notifications_unavailable"})
            except Exception:
                # A record that cannot be read must not end the sending of all others.
                log.exception("Could not list due notifications", extra={"action": "notifications_failed"})
            await asyncio.sleep(self._poll_s * random.uniform(0.8, 1.2))

    async def send_due(self) -> None:
        """Take what is due now, as far as there are slots, and begin to send it. Raises StoreUnavailable."""
        now = await self._jobs.now()
        overdue_s = [0.0]
        # Each lane's own, and no more than it has slots for: what is owed to a dead receiver may be any number.
        for lane in self._lanes:
            if free := self._in_flight.free(lane):
                overdue_s.append(await self._look(now, free, notification=lane.kind, receiver=lane.receiver))
        overdue_s.append(await self._look(now, BATCH))
        self._metrics.put("fluxfill_notifications_overdue_seconds", max(overdue_s))

    async def _look(self, now: datetime, limit: int, **whose: Any) -> float:
        """Seconds since the first of these jobs ended whose end is due to be told; webhooks, which depend on strangers'
        receivers, are not counted."""
        overdue_s = 0.0
        for job in await self._jobs.list(owes_by=now, limit=limit, **whose):
            due = [kind for kind, owed in job.owed.items() if owed.due_at <= now]
            if job.finished_at and not {"session", "completion"}.isdisjoint(due):
                overdue_s = max(overdue_s, (now - job.finished_at).total_seconds())
            reserved = [kind for kind in due if self._in_flight.start(job, kind)]
            if not reserved:
                continue
            mine: list[Notification] = []
            try:
                taken, mine = await self._take_on(job, reserved)
            except UnknownJob:
                continue
            finally:
                for kind in set(reserved) - set(mine):
                    self._in_flight.end(job, kind)
            if mine:
                self._spawn(self._send(taken, mine))
        return overdue_s

    async def _take_on(self, job: Job, kinds: list[Notification]) -> tuple[Job, list[Notification]]:
        """The present record, and those of `kinds` that are ours to send."""
        taker = uuid.uuid4().hex
        change = claims.take_notifications(taker, kinds, wait_s=self._wait_s)
        # Without the session's other jobs, which notifications have nothing to do with.
        taken = await self._jobs.update(job.id, "", change)
        return taken, [kind for kind, owed in taken.owed.items() if owed.taken_by == taker]

    async def drained(self) -> None:
        """Wait until everything begun has ended, told or not."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, *, grace_s: float) -> None:
        """Wait for what is being told; what is not done by then stays owed."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, job: Job, kinds: list[Notification]) -> None:
        with logged_with(job_id=job.id, lock_key=job.lock_key, **trace_ids(job.traceparent)):
            sending = {asyncio.create_task(self._is_sent(job, kind)): kind for kind in kinds}
        try:
            await asyncio.wait(sending, timeout=BATCH_WINDOW_S)
            while sending:
                done, _ = await asyncio.wait(sending, return_when=asyncio.FIRST_COMPLETED)
                ended = {sending.pop(task): task.result() for task in done}
                # One that was published before is due again by when it was taken on.
                again = {kind for kind in ended if kind == "dispatch" and job.owed[kind].attempts}
                await self._mark_sent(job, [kind for kind, is_told in ended.items() if is_told and kind not in again])
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

    async def _mark_sent(self, job: Job, kinds: list[Notification]) -> None:
        if not kinds:
            return
        try:
            await self._jobs.update(job.id, "", claims.mark_sent(job, kinds))
        except FluxFillError as e:
            log.info(
                "Could not record a sent notification, which is sent again: %s",
                e,
                extra={"action": "notification_not_recorded", "job_id": job.id},
            )

    async def _is_sent(self, job: Job, kind: Notification) -> bool:
        """Whether `kind` is done with: sent, or given up."""
        try:
            outcome = await self._outcome(job, kind)
        finally:
            self._in_flight.end(job, kind)
        self._metrics.add("fluxfill_notifications_total", kind=kind, outcome=outcome)
        if outcome != "failed" and kind == "completion":
            # Every job that ends comes by here, whoever ended it; twice only where its payment was lost.
            variant = self._settings.variant_label(job.variant)
            self._metrics.add("fluxfill_jobs_total", type=job.type, variant=variant, outcome=job.status)
            self._metrics.observe("fluxfill_job_attempts", job.attempt, variant=variant)
        return outcome != "failed"

    async def _outcome(self, job: Job, kind: Notification) -> str:
        try:
            await self._in_time(job, kind)
            return "sent"
        except (InputError, MessageRefused) as e:
            log.error("Gave up a %s notification: %s", kind, e, extra={"action": "notification_given_up", "kind": kind})
            return "given_up"
        except WebhookFailed as e:
            # The first call, by the process that ended the job, is not counted among the attempts.
            if job.owed[kind].attempts + 1 >= self._settings.webhooks.max_attempts:
                log.error(
                    "Gave up a %s notification: %s", kind, e, extra={"action": "notification_given_up", "kind": kind}
                )
                return "given_up"
            log.warning(
                "Could not send a %s notification: %s", kind, e, extra={"action": "notification_failed", "kind": kind}
            )
        except FluxFillError as e:
            log.warning(
                "Could not send a %s notification: %s", kind, e, extra={"action": "notification_failed", "kind": kind}
            )
        except Exception:
            # A fault of ours, but of this notification's only: it is seen, and the notification stays owed.
            log.exception(
                "Could not send a %s notification", kind, extra={"action": "notification_failed", "kind": kind}
            )
        return "failed"

    async def _in_time(self, job: Job, kind: Notification) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S[kind]):
                await self._ways[kind](job)
        except TimeoutError as e:
            late = WebhookFailed if kind == "webhook" else Unavailable
            raise late(f"no answer within {SEND_TIMEOUT_S[kind]:g} s") from e

    async def _write_session(self, job: Job) -> None:
        await self._mirror.write_session(job, self._kinds[job.type].document(job))

    async def _publish_completion(self, job: Job) -> None:
        if not self._settings.messages.completion_topic:
            return
        ids = {"userId": job.user_id, "sessionId": job.session_id}
        body = {**ids, "type": job.type, "variant": job.variant, **self._kinds[job.type].document(job)}
        attributes = {"jobId": job.id, **ids, "status": job.status.value, "traceparent": job.traceparent}
        named = {name: value for name, value in attributes.items() if value}
        await self._publisher.publish("completed", json.dumps(body).encode(), named)

    async def _call_webhook(self, job: Job) -> None:
        kind = self._kinds[job.type]
        await self._webhooks.call(job, f"{kind.event}.{job.status}", kind.document(job))

    async def _dispatch(self, job: Job) -> None:
        """The copy is the same message to the rules of asking again: it carries the moment of the first."""
        if job.message is None:
            await self._fail_lost(job, "its message is lost, and its record has no copy")
            return
        asked_at = {ASKED_AT: job.asked_at.isoformat()} if job.asked_at else {}
        try:
            await self._publisher.publish("sessions", job.message.data.encode(), {**job.message.attributes, **asked_at})
        except MessageRefused as e:
            await self._fail_lost(job, f"its message is lost, and the broker refuses its copy: {e}")
            return
        if job.owed["dispatch"].attempts:
            log.warning("Published a job's message again", extra={"action": "redispatched", **job.log_context()})

    async def _fail_lost(self, job: Job, why: str) -> None:
        self.notify(await self._jobs.update(job.id, "", claims.fail_lost(job, why)))

    def _wait_s(self, kind: Notification, attempts: int) -> float:
        firsts_s = {"webhook": self._settings.webhooks.backoff_s, "dispatch": self._settings.work.redispatch_after_s}
        first_s = firsts_s.get(kind, self._settings.work.backoff_s)
        backoff_s = min(LONGEST_WAIT_S[kind], first_s * 2.0 ** min(attempts - 1, 30))
        return SEND_TIMEOUT_S[kind] + backoff_s * random.uniform(0.8, 1.2)


class _Lane(NamedTuple):
    """Those that are told of the same place, and wait for each other only."""

    kind: Notification
    #: Of webhooks.
    receiver: str | None = None

    @classmethod
    def of(cls, job: Job, kind: Notification) -> "_Lane":
        return cls(kind, job.receiver if kind == "webhook" else None)


class _InFlight:
    """What is being sent. No notification twice at a time, and no lane more than its share."""

    def __init__(self) -> None:
        self._sending: set[tuple[str, Notification]] = set()
        self._taken: Counter[_Lane] = Counter()

    def free(self, lane: _Lane) -> int:
        return AT_ONCE[lane.kind] - self._taken[lane]

    def start(self, job: Job, kind: Notification) -> bool:
        """Whether there was a place; it is then to be left."""
        lane = _Lane.of(job, kind)
        if (job.id, kind) in self._sending or not self.free(lane):
            return False
        self._sending.add((job.id, kind))
        self._taken[lane] += 1
        return True

    def end(self, job: Job, kind: Notification) -> None:
        self._sending.discard((job.id, kind))
        self._taken[_Lane.of(job, kind)] -= 1
        # Nothing is kept of a receiver that is not called.
        self._taken = +self._taken
