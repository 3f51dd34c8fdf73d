"""The use case: one delivery in, one stored result out.

Whatever brings a message, pulled or pushed, it ends here, over the same claim:

    parse ► identify ► claim ► attempt (edit.py, under lease.py) ► finish ► session document ► verdict
"""

import asyncio
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from . import jobs
from .edit import INPUTS, Editor, Result, session_path
from .errors import (
    BlobNotFound,
    Busy,
    Canceled,
    Disposition,
    FluxFillError,
    MalformedMessage,
    MessageRefused,
    StaleClaim,
    Unavailable,
    UnknownVariant,
    VariantNotReady,
)
from .holding import Shares, Waits
from .jobs import Cause, Change, Job, JobError, Parameters
from .lease import Clock, Lease, insist
from .messages import Attributes, EditMessage, parse_attributes, parse_edit
from .ports import BlobStore, Delivery, JobStore, Painter, PromptEncoder, Publisher, SessionMirror, Verdict
from .settings import Inference, Settings

log = logging.getLogger(__name__)

#: A variant that starts is ready in a minute: its messages must not be away for much longer.
LONGEST_WAIT_FOR_A_VARIANT_S = 10.0

#: How a job ends that is not tried again, by its error's disposition.
_ENDS_BY = {
    Disposition.DEAD_LETTER: Cause.REJECTED,
    Disposition.RETRY: Cause.EXHAUSTED,
    Disposition.ACK: Cause.EXPIRED,
}


def utc_now() -> datetime:
    return datetime.now(UTC)


class Worker:
    """Works on deliveries, many at a time. `defaults` is asked at each first claim, so it may change meanwhile."""

    def __init__(
        self,
        *,
        blobs: BlobStore,
        job_store: JobStore,
        mirror: SessionMirror,
        publisher: Publisher,
        painter: Painter,
        prompts: PromptEncoder,
        settings: Settings,
        defaults: Callable[[], Inference],
        clock: Clock = utc_now,
    ) -> None:
        self._blobs, self._jobs, self._mirror, self._publisher = blobs, job_store, mirror, publisher
        self._settings, self._defaults, self._clock = settings, defaults, clock
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pixels")
        self._editor = Editor(blobs=blobs, painter=painter, prompts=prompts, settings=settings, pool=self._pool)
        self._waits = Waits()
        self._shares = Shares(painter, settings)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def work(self, delivery: Delivery) -> Verdict:
        """Do what `delivery` asks and say what becomes of the message.

        Raises nothing but CancelledError, and that after the job has been put back.
        """
        try:
            verdict = await self._work(delivery)
        except Busy as e:
            return self._held_back(delivery, e, at_most_s=e.details["retry_after_s"])
        except VariantNotReady as e:
            return self._held_back(delivery, e, at_most_s=LONGEST_WAIT_FOR_A_VARIANT_S)
        except (Unavailable, StaleClaim) as e:
            return self._held_back(delivery, e)
        except Exception as e:
            log.exception("Working on message %s failed", delivery.message_id, extra={"action": "work_failed"})
            return self._held_back(delivery, e)
        if verdict.action == "ack":
            self._waits.forget(delivery.message_id)
        return verdict

    async def _work(self, delivery: Delivery) -> Verdict:
        try:
            message, unknown = parse_edit(delivery.data, max_bytes=self._settings.limits.message_bytes)
            attributes = parse_attributes(delivery.attributes)
        except MalformedMessage as e:
            await self._dead_letter(delivery, e.code, e.message)
            return Verdict(action="ack", reason=e.code)
        if unknown:
            extra = {"action": "unknown_fields", "message_id": delivery.message_id}
            log.warning("Ignored fields nobody here knows: %s", ", ".join(unknown), extra=extra)
        new = await self._new_job(message, attributes)
        with self._shares.taken(new.variant):
            job = await self._claim(new)
            if job.status.is_final:
                return await self._settle(job, delivery)
            extra = {"action": "claimed", "message_id": delivery.message_id, **job.log_context()}
            log.info("Claimed a job", extra=extra)
            return await self._run(job, delivery)

    # -- claiming

    async def _new_job(self, message: EditMessage, attributes: Attributes) -> Job:
        versions = await asyncio.gather(*(self._version(message, name) for name in INPUTS.values()))
        job_id = jobs.edit_job_id(message, versions=versions, idempotency_key=attributes.idempotency_key)
        defaults = self._defaults()
        explicit = message.explicit()
        return Job(
            id=job_id,
            type="inpaint",
            user_id=message.user_id,
            session_id=message.session_id,
            variant=explicit.pop("variant", defaults.variant),
            seed=explicit.pop("seed", jobs.seed_of(job_id)),
            request=jobs.edit_request(message, idempotency_key=attributes.idempotency_key),
            parameters=Parameters(**(defaults.model_dump(exclude={"variant"}) | explicit)),
            deadline=message.deadline,
            created_at=self._clock(),
        )

    async def _version(self, message: EditMessage, name: str) -> str:
        try:
            return (await self._blobs.head(session_path(message.user_id, message.session_id, name))).version
        except BlobNotFound:
            return ""

    async def _claim(self, new: Job) -> Job:
        work = self._settings.work
        change = jobs.claim(new, now=self._clock(), lease_s=work.lease_s, max_attempts=work.max_attempts)
        claiming = asyncio.ensure_future(self._jobs.update(new.id, new.session_key, change))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The store may commit the claim after all; then it is ours to give back.
            await asyncio.wait({claiming})
            if not claiming.cancelled() and claiming.exception() is None and not claiming.result().status.is_final:
                await self._give_back(claiming.result())
            raise

    # -- running

    async def _run(self, job: Job, delivery: Delivery) -> Verdict:
        try:
            return await self._to_the_end(job, delivery)
        except asyncio.CancelledError:
            await self._give_back(job)
            raise

    async def _to_the_end(self, job: Job, delivery: Delivery) -> Verdict:
        try:
            result = await self._attempt(job, delivery)
            done = {"artifacts": result.artifacts, "timings": result.timings}
            change = jobs.finish(jobs.claim_of(job), Cause.SUCCEEDED, now=self._clock(), **done)
            return await self._settle(await self._update(job, change), delivery)
        except (StaleClaim, Canceled):
            return await self._lost(job, delivery)
        except Exception as e:
            try:
                return await self._failed(job, delivery, e)
            except StaleClaim:
                return await self._lost(job, delivery)

    async def _give_back(self, job: Job) -> None:
        """On shutdown. A claim that is over, or a store that stays down, leaves the job to others."""
        with suppress(FluxFillError):
            await asyncio.shield(self._update(job, jobs.requeue(jobs.claim_of(job), Cause.GIVEN_BACK)))
            log.info("Gave a job back on shutdown", extra={"action": "given_back", **job.log_context()})

    async def _attempt(self, job: Job, delivery: Delivery) -> Result:
        started = self._clock()
        await self._mirror.write(job, jobs.session_document(job))
        lease = Lease(job, store=self._jobs, mirror=self._mirror, work=self._settings.work, clock=self._clock)
        if job.variant not in self._settings.variants:
            known = ", ".join(self._settings.variants)
            raise UnknownVariant(f"variant {job.variant!r} is not served here; there are {known}")
        result = await lease.hold(self._editor.run(job, on_progress=lease.note, confirm=lease.confirm))
        since = min(delivery.publish_time or job.created_at, started)
        timings = result.timings.model_copy(
            update={
                "queued_s": (started - since).total_seconds(),
                "total_s": (self._clock() - started).total_seconds(),
            }
        )
        return Result(artifacts=result.artifacts, timings=timings)

    async def _failed(self, job: Job, delivery: Delivery, cause: Exception) -> Verdict:
        """What errors.py's disposition says of `cause`."""
        e = cause if isinstance(cause, FluxFillError) else FluxFillError(f"{type(cause).__name__}: {cause}")
        extra = {"action": "attempt_failed", "code": e.code, **job.log_context()}
        log.warning("An attempt failed: %s", e.message, extra=extra, exc_info=cause if e is not cause else None)
        claim, error = jobs.claim_of(job), JobError(code=e.code, message=e.message)
        if e.disposition in (Disposition.WAIT, Disposition.NACK):
            await self._update(job, jobs.requeue(claim, Cause.GIVEN_BACK))
            return self._held_back(delivery, e) if e.disposition == Disposition.WAIT else Verdict(action="nack")
        if e.disposition == Disposition.RETRY and job.attempt < self._settings.work.max_attempts:
            await self._update(job, jobs.requeue(claim, Cause.RETRIED, error=error))
            return Verdict(action="hold", delay_s=self._backoff_s(job.attempt), reason=e.code)
        change = jobs.finish(claim, _ENDS_BY[e.disposition], now=self._clock(), error=error)
        return await self._settle(await self._update(job, change), delivery)

    async def _lost(self, job: Job, delivery: Delivery) -> Verdict:
        """The claim is over: somebody canceled the job, or another worker has it or ended it."""
        log.info("Lost a claim", extra={"action": "claim_lost", **job.log_context()})
        stored = await self._jobs.get(job.id)
        if stored is not None and stored.status.is_final:
            return await self._settle(stored, delivery)
        return self._held_back(delivery, StaleClaim("another worker has the job"))

    async def _update(self, job: Job, change: Change) -> Job:
        """A write that must not be lost to a hiccup: tried again for as long as the lease can last."""
        return await insist(partial(self._jobs.update, job.id, job.session_key, change), self._settings.work.lease_s)

    # -- after the end

    async def _settle(self, job: Job, delivery: Delivery) -> Verdict:
        """Tell the session, and the dead-letter topic of a failure. Done again for every duplicate, so that a crash
        between the job's last write and these loses neither."""
        await self._mirror.write(job, jobs.session_document(job))
        if job.status == jobs.State.FAILED and not job.dead_lettered:
            error = job.error or JobError(code="internal_error", message="")
            await self._dead_letter(delivery, error.code, error.message, job)
            await self._jobs.update(job.id, job.session_key, jobs.mark_dead_lettered)
        log.info("A job is over: %s", job.status, extra={"action": "over", "status": job.status, **job.log_context()})
        return Verdict(action="ack", reason=job.error.code if job.error else job.status)

    async def _dead_letter(self, delivery: Delivery, code: str, message: str, job: Job | None = None) -> None:
        reason = {
            "deadLetterReason": code,
            # Pub/Sub takes attribute values up to 1,024 bytes.
            "deadLetterError": message.encode()[:1024].decode(errors="ignore"),
            "deadLetterAttempts": str(job.attempt if job else 0),
            "deadLetterJobId": job.id if job else "",
            "deadLetterMessageId": delivery.message_id,
        }
        try:
            await self._publisher.publish("dead", delivery.data, {**delivery.attributes, **reason})
        except MessageRefused:
            # At the broker's limit on size or attributes, the reason no longer fits: the message's beginning goes.
            beginning = delivery.data[: self._settings.limits.message_bytes]
            await self._publisher.publish("dead", beginning, {**reason, "deadLetterTruncated": "true"})
        log.warning(
            "Sent a message to the dead-letter topic: %s", message, extra={"action": "dead_lettered", "code": code}
        )

    # -- holding back

    def _held_back(self, delivery: Delivery, e: Exception, at_most_s: float = float("inf")) -> Verdict:
        delay_s = min(self._backoff_s(self._waits.count(delivery.message_id)), at_most_s)
        code = e.code if isinstance(e, FluxFillError) else FluxFillError.code
        extra = {"action": "held_back", "code": code, "delay_s": delay_s, "message_id": delivery.message_id}
        log.info("Held a message back: %s", e, extra=extra)
        return Verdict(action="hold", delay_s=delay_s, reason=code)

    def _backoff_s(self, times: int) -> float:
        work = self._settings.work
        return min(work.backoff_max_s, work.backoff_s * 2.0 ** min(times - 1, 30)) * random.uniform(0.8, 1.2)
