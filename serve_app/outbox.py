"""Tells others what became of jobs: the session document, the completion topic, the publisher's own URL.

A job owes these from the write that ended it (`Job.owed`), so nothing is lost with a process. The process that ended
the job tells at once; what is still owed when its head start is over, anybody's courier takes on and tells, again and
again with backoff. None of it holds up a message, a worker or another debt: a receiver that is down only waits longer.
At least once: a courier that dies between telling and noting it leaves the debt.
"""

import asyncio
import json
import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Protocol

from . import jobs
from .errors import FluxFillError, InputError, MessageRefused, StoreUnavailable, Unavailable, WebhookFailed
from .jobs import Debt, Job
from .ports import Clock, JobStore, Publisher, SessionMirror
from .settings import Settings
from .telemetry import Metrics, NoMetrics, logged_with, trace_id

log = logging.getLogger(__name__)

#: How long telling one thing may take, in seconds; nobody else tells it meanwhile.
TELL_S = 30.0
#: The longest waits between two attempts, in seconds. The stores and the broker are ours, a receiver is a stranger's.
LONGEST_WAIT_S = 60.0
LONGEST_WEBHOOK_WAIT_S = 3 * 3600.0
#: Jobs that are told of at a time, and URLs that are called at a time.
AT_ONCE = 32
#: Jobs taken on at each look.
BATCH = 100


class Webhooks(Protocol):
    def check(self, url: str) -> None:
        """Raises CallbackRefused for a URL that may not be called."""

    async def call(self, job: Job) -> None:
        """Tell `job.callback_url`. Raises WebhookFailed, which is worth another try; CallbackRefused."""


class Courier:
    def __init__(
        self,
        *,
        job_store: JobStore,
        mirror: SessionMirror,
        publisher: Publisher,
        webhooks: Webhooks,
        settings: Settings,
        clock: Clock,
        metrics: Metrics | None = None,
    ) -> None:
        self._jobs, self._mirror, self._publisher, self._webhooks = job_store, mirror, publisher, webhooks
        self._settings, self._clock, self._metrics = settings, clock, metrics or NoMetrics()
        self._tasks: set[asyncio.Task[None]] = set()
        # Of their own: callers of dead receivers must not keep session documents waiting.
        self._places: Mapping[Debt, asyncio.Semaphore] = {
            "session": asyncio.Semaphore(AT_ONCE),
            "completion": asyncio.Semaphore(AT_ONCE),
            "webhook": asyncio.Semaphore(AT_ONCE),
        }
        self._ways: Mapping[Debt, Callable[[Job], Awaitable[None]]] = {
            "session": self._write_session,
            "completion": self._publish_completion,
            "webhook": webhooks.call,
        }

    def tell(self, job: Job) -> None:
        """Tell in the background what `job`, as it was just stored, owes. Wants a running event loop."""
        if job.owed:
            self._spawn(self._tell(job, job.owed.keys()))

    async def run(self) -> None:
        """Look for debts that are due, for ever."""
        while True:
            try:
                await self.look()
            except StoreUnavailable as e:
                log.warning("Could not look for what is owed: %s", e, extra={"action": "outbox_unavailable"})
            await asyncio.sleep(self._settings.work.outbox_poll_s * random.uniform(0.8, 1.2))

    async def look(self) -> None:
        """Take on what is due now and begin to tell it. Raises StoreUnavailable."""
        now = self._clock()
        for job in await self._jobs.list(owes_by=now, limit=BATCH):
            taker = uuid.uuid4().hex
            taken = await self._jobs.update(
                job.id, job.session_key, jobs.take_debts(taker, now=now, wait_s=self._wait_s)
            )
            if mine := [debt for debt, owed in taken.owed.items() if owed.taken_by == taker]:
                self._spawn(self._tell(taken, mine))

    async def settled(self) -> None:
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

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, job: Job, debts: Collection[Debt]) -> None:
        with logged_with(job_id=job.id, session_key=job.session_key, trace_id=trace_id(job.traceparent)):
            # A slow receiver must not keep the others' debts unpaid.
            await asyncio.gather(
                self._settle(job, [debt for debt in debts if debt != "webhook"]),
                self._settle(job, [debt for debt in debts if debt == "webhook"]),
            )

    async def _settle(self, job: Job, debts: list[Debt]) -> None:
        told = await asyncio.gather(*(self._is_told(job, debt) for debt in debts))
        if paid := [debt for debt, is_told in zip(debts, told, strict=True) if is_told]:
            try:
                await self._jobs.update(job.id, job.session_key, jobs.pay(job, paid))
            except FluxFillError as e:
                log.info("What was told stays owed: %s", e, extra={"action": "debt_stays"})

    async def _is_told(self, job: Job, debt: Debt) -> bool:
        """Whether `debt` is done with: told, or given up."""
        outcome = await self._outcome(job, debt)
        self._metrics.add("fluxfill_told_total", debt=debt, outcome=outcome)
        if outcome != "failed" and debt == "completion":
            # Every job that ends comes by here once, whoever ended it.
            self._metrics.add("fluxfill_jobs_total", type=job.type, variant=job.variant, outcome=job.status)
        return outcome != "failed"

    async def _outcome(self, job: Job, debt: Debt) -> str:
        try:
            async with self._places[debt]:
                await self._in_time(job, debt)
            return "told"
        except (InputError, MessageRefused) as e:
            log.error("Gave up telling the %s: %s", debt, e, extra={"action": "told_never", "debt": debt})
            return "given_up"
        except WebhookFailed as e:
            # The first call, by the process that ended the job, is not counted among the attempts.
            if job.owed[debt].attempts + 1 >= self._settings.webhooks.max_attempts:
                log.error("Gave up telling the %s: %s", debt, e, extra={"action": "told_never", "debt": debt})
                return "given_up"
            log.warning("Could not tell the %s: %s", debt, e, extra={"action": "told_later", "debt": debt})
        except FluxFillError as e:
            log.warning("Could not tell the %s: %s", debt, e, extra={"action": "told_later", "debt": debt})
        except Exception:
            # A fault of ours, but of this debt's only: it is seen, and the debt stays.
            log.exception("Could not tell the %s", debt, extra={"action": "told_later", "debt": debt})
        return "failed"

    async def _in_time(self, job: Job, debt: Debt) -> None:
        try:
            async with asyncio.timeout(TELL_S):
                await self._ways[debt](job)
        except TimeoutError as e:
            late = WebhookFailed if debt == "webhook" else Unavailable
            raise late(f"no answer within {TELL_S:g} s") from e

    async def _write_session(self, job: Job) -> None:
        await self._mirror.write(job, jobs.session_document(job))

    async def _publish_completion(self, job: Job) -> None:
        if not self._settings.messages.completion_topic:
            return
        ids = {"userId": job.user_id, "sessionId": job.session_id}
        body = {**ids, "type": job.type, "variant": job.variant, **jobs.session_document(job)}
        attributes = {"jobId": job.id, **ids, "status": job.status.value, "traceparent": job.traceparent}
        named = {name: value for name, value in attributes.items() if value}
        await self._publisher.publish("completed", json.dumps(body).encode(), named)

    def _wait_s(self, debt: Debt, attempts: int) -> float:
        first_s = self._settings.webhooks.backoff_s if debt == "webhook" else self._settings.work.backoff_s
        longest_s = LONGEST_WEBHOOK_WAIT_S if debt == "webhook" else LONGEST_WAIT_S
        backoff_s = min(longest_s, first_s * 2.0 ** min(attempts - 1, 30))
        return TELL_S + backoff_s * random.uniform(0.8, 1.2)
