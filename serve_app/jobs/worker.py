"""The use case: one delivery in, one stored result out.

Whatever brings a message, pulled or pushed, it ends here, over the same claim:

    read ► identify ► claim ► attempt (by the kind of job, under lease.py) ► finish ► verdict

What others are told of a job's end is owed from the write that ended it, and told by notifications.py.
"""

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial

from .. import tracing
from ..errors import (
    Busy,
    Canceled,
    Disposition,
    FluxFillError,
    MalformedMessage,
    MessageRefused,
    OtherVariant,
    StaleClaim,
    StoreUnavailable,
    Unavailable,
    UnknownJob,
    UnknownVariant,
    VariantLoadFailed,
    VariantNotReady,
)
from ..models import Model
from ..parameters import JobType
from ..settings import Settings
from ..telemetry import Metrics, NoMetrics, logged_with, trace_ids
from . import claims
from .admission import Admission, Deferrals
from .backlog import Recent
from .claims import Change
from .kinds import Asked, Attempt, Kind, Result
from .lease import Lease, Pace, UnconfirmedClaims, retry_unavailable
from .messages import Attributes, parse_attributes, traceparent_of, without_reasons
from .notifications import Notifier, Webhooks
from .ports import Delivery, JobStore, Publisher, SessionMirror, Verdict
from .record import Artifact, Cause, Job, JobError, Quality, State, Timings

log = logging.getLogger(__name__)

#: A variant that starts is ready in a minute: its messages must not be away for much longer.
LONGEST_WAIT_FOR_A_VARIANT_S = 10.0

#: Of an error in a record, which may have it in each of its events. The log has all of it.
MAX_ERROR_CHARS = 1000

#: How a job ends that is not tried again, by its error's disposition.
_ENDS_BY = {
    Disposition.DEAD_LETTER: Cause.REJECTED,
    Disposition.RETRY: Cause.EXHAUSTED,
    Disposition.ACK: Cause.EXPIRED,
}


def pixel_pool() -> ThreadPoolExecutor:
    """Decodes and encodes: as many photos at a time as one process has memory for."""
    return ThreadPoolExecutor(max_workers=2, thread_name_prefix="pixels")


class Worker:
    """Works on deliveries, many at a time."""

    def __init__(
        self,
        *,
        kinds: Sequence[Kind],
        job_store: JobStore,
        mirror: SessionMirror,
        publisher: Publisher,
        notifier: Notifier,
        webhooks: Webhooks,
        models: Mapping[str, Model],
        settings: Settings,
        metrics: Metrics | None = None,
        pace: Pace | None = None,
    ) -> None:
        """`models`, by variant, say which can paint now; jobs of each of `kinds` are worked on."""
        self._kinds: Mapping[JobType, Kind] = {kind.type: kind for kind in kinds}
        self._jobs, self._mirror, self._publisher = job_store, mirror, publisher
        self._notifier, self._webhooks = notifier, webhooks
        self._metrics = metrics or NoMetrics()
        self._settings, self._pace = settings, pace
        self._pool = pixel_pool()
        self._unconfirmed = UnconfirmedClaims(job_store)
        self._deferrals = Deferrals()
        self._admission = Admission(models, settings)
        self.recent = Recent()

    @property
    def in_flight(self) -> Mapping[str, int]:
        """Messages, by variant."""
        return self._admission.in_flight

    def close(self) -> None:
        self._unconfirmed.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def work(self, delivery: Delivery) -> Verdict:
        """Do what `delivery` asks and say what becomes of the message.

        Raises nothing but CancelledError, and that after the job has been put back.
        """
        parent = traceparent_of(delivery.attributes)
        with (
            tracing.delivery(delivery.message_id, parent),
            logged_with(message_id=delivery.message_id, **trace_ids(tracing.traceparent(parent))),
        ):
            verdict = await self._decided(delivery)
            tracing.attribute("fluxfill.verdict", f"{verdict.action}: {verdict.reason}")
            return verdict

    async def _decided(self, delivery: Delivery) -> Verdict:
        try:
            verdict = await self._work(delivery)
        except Busy as e:
            return self._deferred(delivery, e, at_most_s=e.details["retry_after_s"])
        except (VariantNotReady, VariantLoadFailed) as e:
            at_most_s = e.details.get("retry_after_s", LONGEST_WAIT_FOR_A_VARIANT_S)
            return self._deferred(delivery, e, at_most_s=at_most_s)
        except (Unavailable, StaleClaim) as e:
            return self._deferred(delivery, e)
        except Exception as e:
            log.exception("Working on message %s failed", delivery.message_id, extra={"action": "work_failed"})
            return self._deferred(delivery, e)
        if verdict.action == "ack":
            self._deferrals.forget(delivery.message_id)
        return verdict

    async def _work(self, delivery: Delivery) -> Verdict:
        try:
            if delivery.fault:
                raise MalformedMessage(delivery.fault)
            attributes = parse_attributes(delivery.attributes)
            kind = self._kind(attributes.job_type)
            asked = _posted(attributes) or kind.read(delivery.data)
            if asked.unknown_fields:
                names = ", ".join(asked.unknown_fields)
                log.warning("Ignored unknown fields: %s", names, extra={"action": "unknown_fields"})
            return await self._shared(kind, asked, attributes, delivery)
        except MalformedMessage as e:
            await self._dead_letter(delivery, e.code, e.message)
            return Verdict(action="ack", reason=e.code)
        except UnknownJob as e:
            # Of a posted job that was deleted since.
            log.info("Dropped a message: %s", e, extra={"action": "job_deleted"})
            return Verdict(action="ack", reason=e.code)

    def _kind(self, job_type: str | None) -> Kind:
        found = [kind for kind in self._kinds.values() if kind.type == (job_type or "inpaint")]
        if not found:
            known = ", ".join(self._kinds)
            raise MalformedMessage(f"attributes.jobType: {job_type!r} is none of {known}", field="attributes.jobType")
        return found[0]

    async def _shared(self, kind: Kind, asked: Asked, attributes: Attributes, delivery: Delivery) -> Verdict:
        """Work on it within the share of its job's variant, which need not be the one it names today."""
        variant = asked.variant
        new_job = partial(self._new_job, kind, asked, attributes, delivery)
        self.recent.message(self._settings.variant_label(variant))
        while True:
            try:
                # Before the stores are asked anything: what is over its share comes again.
                with self._admission.admitted(variant):
                    return await self._work_on(await new_job(variant), delivery)
            except OtherVariant as e:
                variant = e.details["variant"]
            except VariantNotReady as e:
                if self._deferrals.waited_s(delivery.message_id) < self._settings.work.wait_limit_s:
                    raise
                return await self._given_up(await new_job(variant), delivery, e)

    async def _given_up(self, new: Job, delivery: Delivery, error: VariantNotReady) -> Verdict:
        """The end of a message that has waited for its share for too long."""
        job = await self._claim(new, _claimer())
        if not job.status.is_final:
            change = claims.finish(claims.claim_of(job), Cause.EXHAUSTED, error=_job_error(error))
            job = await self._update(job, change)
        return await self._conclude(job, delivery)

    async def _work_on(self, new: Job, delivery: Delivery) -> Verdict:
        with logged_with(job_id=new.id, lock_key=new.lock_key):
            claimer, claimed_at = _claimer(), time.monotonic()
            job = await self._claim(new, claimer)
            if job.status.is_final:
                if job.claimed_by != claimer:
                    self._metrics.add("fluxfill_duplicate_messages_total")
                return await self._conclude(job, delivery)
            log.info("Claimed a job", extra={"action": "claimed", **job.log_context()})
            tracing.attribute("fluxfill.job_id", job.id)
            tracing.attribute("fluxfill.variant", self._label(job))
            tracing.ended("queue", delivery.publish_time.timestamp() if delivery.publish_time else None)
            self._metrics.observe(
                "fluxfill_queue_wait_seconds", self._queued_s(job, delivery), variant=self._label(job)
            )
            return await self._run(job, delivery, claimed_at)

    # -- claiming

    async def _new_job(self, kind: Kind, asked: Asked, attributes: Attributes, delivery: Delivery, variant: str) -> Job:
        """The kind's, with what all kinds have of their message."""
        if asked.job_id:
            return await self._posted(asked.job_id, variant)
        job = await kind.new_job(asked, variant=variant, idempotency_key=attributes.idempotency_key)
        message = job.message and job.message.model_copy(update={"attributes": without_reasons(delivery.attributes)})
        return job.evolve(
            traceparent=attributes.traceparent,
            asked_at=_asked_at(attributes, delivery),
            message=message,
            redispatch_s=self._settings.work.redispatch_after_s,
        )

    async def _posted(self, job_id: str, variant: str) -> Job:
        """The stored record, of which its message says no more than where it is. Raises UnknownJob."""
        stored = await self._jobs.get(job_id)
        if stored is None:
            raise UnknownJob(f"job {job_id} was deleted")
        if stored.variant != variant:
            raise OtherVariant(f"job {job_id} is of variant {stored.variant}", variant=stored.variant)
        return stored

    async def _claim(self, new: Job, claimer: str) -> Job:
        work = self._settings.work
        change = claims.claim(new, lease_s=work.lease_s, max_attempts=work.max_attempts, claimer=claimer)
        claiming = asyncio.ensure_future(self._jobs.update(new.id, new.lock_key, change))
        try:
            return await asyncio.shield(claiming)
        except StoreUnavailable:
            self._unconfirmed.add(new, claimer)
            raise
        except asyncio.CancelledError:
            # The store may commit the claim after all; then it is ours to give back.
            await asyncio.wait({claiming})
            if not claiming.cancelled() and claiming.exception() is None and not claiming.result().status.is_final:
                await self._requeue(claiming.result())
            raise

    # -- running

    async def _run(self, job: Job, delivery: Delivery, claimed_at: float) -> Verdict:
        try:
            return await self._to_the_end(job, delivery, claimed_at)
        except asyncio.CancelledError:
            await self._requeue(job)
            raise

    async def _to_the_end(self, job: Job, delivery: Delivery, claimed_at: float) -> Verdict:
        try:
            if await self._is_canceled(job):
                error = JobError(code=Canceled.code, message="its session was canceled before it began")
                change = claims.finish(claims.claim_of(job), Cause.CANCELED, error=error)
                return await self._conclude(await self._update(job, change), delivery)
            result = await self._attempt(job, delivery, claimed_at)
            cost = self._settings.cost(job.variant, result.timings.engine_s or 0.0)
            found = {"artifacts": result.artifacts, "timings": result.timings, "quality": result.quality}
            change = claims.finish(claims.claim_of(job), Cause.SUCCEEDED, cost=cost, **found)
            return await self._conclude(await self._update(job, change), delivery)
        except (StaleClaim, Canceled):
            return await self._lost(job, delivery)
        except Exception as e:
            try:
                return await self._failed(job, delivery, e)
            except StaleClaim:
                return await self._lost(job, delivery)

    async def _requeue(self, job: Job) -> None:
        """On shutdown. A claim that is over, or a store that stays down, leaves the job to others."""
        with suppress(FluxFillError):
            await asyncio.shield(self._update(job, claims.requeue(claims.claim_of(job))))
            log.info("Requeued a job on shutdown", extra={"action": "requeued", **job.log_context()})

    async def _is_canceled(self, job: Job) -> bool:
        """Whether the session was canceled after the job was last asked for. Asked after the claim: see cancel.py."""
        until = await self._jobs.canceled_until(job.lock_key) if job.session_id else None
        return until is not None and job.asked_at is not None and job.asked_at <= until

    def _queued_s(self, job: Job, delivery: Delivery) -> float:
        started = job.started_at or job.created_at
        return (started - min(delivery.publish_time or job.created_at, started)).total_seconds()

    async def _attempt(self, job: Job, delivery: Delivery, claimed_at: float) -> Result:
        kind, work, pace = self._kinds[job.type], self._settings.work, self._pace
        show = partial(self._mirrored, kind) if job.session_id else None
        lease = Lease(job, store=self._jobs, show=show, work=work, claimed_at=claimed_at, pace=pace)
        if job.variant not in self._settings.served:
            known = ", ".join(self._settings.served)
            raise UnknownVariant(f"variant {job.variant!r} is not served here; there are {known}")
        if job.callback_url:
            self._webhooks.check(job.callback_url)
        attempt = Attempt(
            on_progress=lease.note,
            confirm=lease.confirm,
            record=partial(self._record, job),
            left_s=lease.left_s,
            pool=self._pool,
        )
        result = await lease.guard(kind.run(job, attempt))
        timings = result.timings.model_copy(
            update={
                "queued_s": self._queued_s(job, delivery),
                "total_s": time.monotonic() - claimed_at,
            }
        )
        self._measure(job, timings, result.quality)
        return replace(result, timings=timings)

    async def _record(self, job: Job, artifact: Artifact) -> None:
        await self._update(job, claims.record(claims.claim_of(job), artifact))

    async def _mirrored(self, kind: Kind, job: Job) -> None:
        await self._mirror.write_session(job, kind.document(job))

    def _measure(self, job: Job, timings: Timings, quality: Quality | None) -> None:
        variant = self._label(job)
        if timings.engine_s is not None:
            self.recent.job(variant, timings.engine_s)
        for stage, seconds in timings.model_dump(exclude={"gpu_ms"}, exclude_none=True).items():
            self._metrics.observe("fluxfill_stage_seconds", seconds, stage=stage.removesuffix("_s"), variant=variant)
        if quality is not None:
            # A sum that falls is no histogram's.
            self._metrics.observe("fluxfill_put_back", max(0.0, quality.put_back), variant=variant)
            if quality.verdict == "suspect":
                self._metrics.add("fluxfill_suspect_edits_total", variant=variant)

    def _label(self, job: Job) -> str:
        return self._settings.variant_label(job.variant)

    async def _failed(self, job: Job, delivery: Delivery, cause: Exception) -> Verdict:
        """What errors.py's disposition says of `cause`."""
        e = cause if isinstance(cause, FluxFillError) else FluxFillError(f"{type(cause).__name__}: {cause}")
        extra = {"action": "attempt_failed", "code": e.code, **job.log_context()}
        log.warning("An attempt failed: %s", e.message, extra=extra, exc_info=cause if e is not cause else None)
        self._metrics.add("fluxfill_attempts_failed_total", variant=self._label(job), code=e.code)
        claim, error, work = claims.claim_of(job), _job_error(e), self._settings.work
        if e.disposition == Disposition.WAIT:
            try:
                after = await self._update(job, claims.wait(claim, error=error, limit_s=work.wait_limit_s))
            except StoreUnavailable:
                self._unconfirmed.add(job, job.claimed_by)
                raise
            if after.status.is_final:
                return await self._conclude(after, delivery)
            raise e
        if e.disposition == Disposition.RETRY and job.attempt < work.max_attempts:
            backoff_s = self._backoff_s(job.attempt)
            await self._update(job, claims.retry(claim, error=error, backoff_s=backoff_s))
            return self._hold(e, backoff_s)
        change = claims.finish(claim, _ENDS_BY[e.disposition], error=error)
        return await self._conclude(await self._update(job, change), delivery)

    async def _lost(self, job: Job, delivery: Delivery) -> Verdict:
        """The claim is over: the job was canceled, or another worker has it or ended it."""
        stored = await self._jobs.get(job.id)
        if stored is not None and stored.status == State.CANCELED:
            return await self._conclude(stored, delivery)
        log.warning("Lost a claim", extra={"action": "claim_lost", **job.log_context()})
        self._metrics.add("fluxfill_leases_lost_total")
        if stored is not None and stored.status.is_final:
            return await self._conclude(stored, delivery)
        return self._deferred(delivery, StaleClaim("another worker has the job"))

    async def _update(self, job: Job, change: Change) -> Job:
        """A write that must not be lost to a hiccup: tried again for as long as the lease can last."""
        return await retry_unavailable(
            partial(self._jobs.update, job.id, job.lock_key, change), self._settings.work.lease_s
        )

    # -- after the end

    async def _conclude(self, job: Job, delivery: Delivery) -> Verdict:
        """Tell others, and the dead-letter topic of a failure. The dead letter is sent again for every duplicate until
        the record says that it was, so that a crash between the job's last write and this loses none."""
        self._notifier.notify(job)
        if job.status == State.FAILED and not job.dead_lettered:
            error = job.error or JobError(code="internal_error", message="")
            await self._dead_letter(delivery, error.code, error.message, job)
            await self._jobs.update(job.id, job.lock_key, claims.mark_dead_lettered(job))
        log.info("A job ended: %s", job.status, extra={"action": "ended", "status": job.status, **job.log_context()})
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
            await self._publisher.publish("dead", delivery.data, {**without_reasons(delivery.attributes), **reason})
        except MessageRefused:
            # At the broker's limit on size or attributes, the reason no longer fits: the message's beginning goes.
            beginning = delivery.data[: self._settings.limits.message_bytes]
            await self._publisher.publish("dead", beginning, {**reason, "deadLetterTruncated": "true"})
        self._metrics.add("fluxfill_dead_letters_total", code=code)
        log.warning(
            "Sent a message to the dead-letter topic: %s", message, extra={"action": "dead_lettered", "code": code}
        )

    # -- holding back

    def _deferred(self, delivery: Delivery, e: Exception, at_most_s: float = float("inf")) -> Verdict:
        return self._hold(e, min(self._backoff_s(self._deferrals.count(delivery.message_id)), at_most_s))

    def _hold(self, e: Exception, delay_s: float) -> Verdict:
        code = e.code if isinstance(e, FluxFillError) else FluxFillError.code
        self._metrics.add("fluxfill_messages_deferred_total", code=code)
        log.info("Deferred a message: %s", e, extra={"action": "deferred", "code": code, "delay_s": delay_s})
        return Verdict(action="defer", delay_s=delay_s, reason=code)

    def _backoff_s(self, times: int) -> float:
        work = self._settings.work
        return min(work.backoff_max_s, work.backoff_s * 2.0 ** min(times - 1, 30)) * random.uniform(0.8, 1.2)


def _posted(attributes: Attributes) -> Asked | None:
    """What a message asks for that names a stored job."""
    if attributes.job_id is None:
        return None
    return Asked(message=None, variant=attributes.variant or "", job_id=attributes.job_id)


def _asked_at(attributes: Attributes, delivery: Delivery) -> datetime | None:
    """When the message was first published: a copy that the outbox published asks no later than it."""
    published = [moment for moment in (attributes.asked_at, delivery.publish_time) if moment is not None]
    return min(published, default=None)


def _claimer() -> str:
    return uuid.uuid4().hex


def _job_error(e: FluxFillError) -> JobError:
    return JobError(code=e.code, message=e.message[:MAX_ERROR_CHARS])
