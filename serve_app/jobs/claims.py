"""The rules by which a claim on a job is taken, kept and given up.

Pure functions from the stored records to the records to store. A job store runs one of them inside an atomic
read-modify-write (`ports.JobStore.update`), so every backend keeps the same rules. The store passes its own present
time, so the rules compare moments of one clock only, and no host's clock matters.
"""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from ..errors import Busy, MalformedMessage, OtherVariant, QuotaExceeded, StaleClaim, UnknownJob
from .record import HEAD_START_S, Artifact, Cause, Due, Job, JobError, Notification, State, _Value

#: What a quota per day counts in.
QUOTA_WINDOW = timedelta(hours=24)


class Quota(_Value):
    """How many jobs one API key may have."""

    #: Queued and running.
    unfinished: int
    #: Created within QUOTA_WINDOW.
    per_day: int

    def check(self, *, unfinished: int, of_today: int) -> None:
        """Raises QuotaExceeded for a key that has so many jobs already."""
        if unfinished >= self.unfinished:
            raise QuotaExceeded(f"this key has {unfinished} jobs that are not over, of {self.unfinished} that it may")
        if of_today >= self.per_day:
            what = f"this key has posted {of_today} jobs within 24 hours, of {self.per_day} that it may"
            raise QuotaExceeded(what, retry_after_s=LONGEST_RETRY_AFTER_S)


def posted(new: Job, now: datetime) -> Job:
    """The record of a job that is stored before its message is published: it owes its message, and asks nothing by it
    that the record does not say."""
    owed: dict[Notification, Due] = {"dispatch": Due(due_at=now + timedelta(seconds=HEAD_START_S["dispatch"]))}
    return new.evolve(created_at=now, asked_at=now, owed=owed).noted(now)


class Claim(_Value):
    """The right to work on a job, as long as its fencing number is the job's and its lease is renewed."""

    job_id: str
    lock_key: str
    fence: int
    #: As in `Job.claimed_by`: a job that was deleted and asked for again under its id counts its fences anew.
    claimer: str = ""


def claim_of(job: Job) -> Claim:
    return Claim(job_id=job.id, lock_key=job.lock_key, fence=job.fence, claimer=job.claimed_by)


#: The official client of OpenAI gives up where it is asked to wait for longer.
LONGEST_RETRY_AFTER_S = 120

#: From the job's stored record (None: no such job), the session's other jobs that are not over, and the store's present
#: time, the records to store.
Change = Callable[[Job | None, Sequence[Job], datetime], Sequence[Job]]


def claim(new: Job, *, lease_s: float, max_attempts: int, claimer: str = "") -> Change:
    """Take `new`, or the record already stored under its id, and run it. `claimer` is a name used for this claim only.

    The stored record wins over `new`: parameters and seed are those of the first claim; deadline, callback and trace
    are the newest message's. A final record is left as it is, unless a newer message asks for it again: `_asked_again`.
    A record past its deadline becomes expired, one whose attempts are used up failed. Another job of the session that
    waits for the same request, on a photo or mask since replaced, is superseded.

    Raises Busy (from the change) while a live lease holds the job or another job of its session, or its backoff lasts;
    OtherVariant where the stored record is of another variant than `new`; MalformedMessage where it is of another type;
    UnknownJob where `new` is a stored record that was deleted meanwhile.
    """

    def change(stored: Job | None, rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if stored is None and new.events:
            raise UnknownJob(f"job {new.id} was deleted")
        if stored is not None and stored.type != new.type:
            raise MalformedMessage(f"its job's id, {new.id}, is of type {stored.type}")
        job = _asked_again(stored, new, now) if stored else new.evolve(created_at=now)
        if job.status.is_final:
            return tuple(_superseded(rival, job, now) for rival in rivals if _is_replaced(rival, job))
        _refuse_live(job, now)
        if job.attempt >= max_attempts:
            return (_exhausted(job, now, claimed_by=claimer),)
        if job.variant != new.variant:
            raise OtherVariant(f"job {job.id} is of variant {job.variant}", variant=job.variant)
        if job.status == State.RUNNING:
            job = job.after(Cause.LEASE_LOST, now)
        for rival in rivals:
            _refuse_live(rival, now)
        if job.deadline is not None and now >= job.deadline:
            late = {"error": _too_late(job), "fence": job.fence + 1, "claimed_by": claimer}
            return (job.after(Cause.EXPIRED, now, **late),)
        _refuse_early(job, now)
        others = tuple(after for rival in rivals if (after := _beside(rival, job, now, max_attempts)) is not None)
        job = job.after(
            Cause.CLAIMED,
            now,
            attempt=job.attempt + 1,
            fence=job.fence + 1,
            claimed_by=claimer,
            started_at=now,
            not_before=None,
            error=None,
        ).evolve(lease_until=now + timedelta(seconds=lease_s))
        return (job, *others)

    return change


def record(claim: Claim, artifact: Artifact) -> Change:
    """Note that `artifact` is stored, while the job goes on; once, however often a store that does not answer is asked.
    Raises StaleClaim where the claim no longer holds."""

    def after(job: Job, now: datetime) -> Job:
        if artifact in job.artifacts:
            return job
        position = len(job.artifacts)
        return job.evolve(artifacts=(*job.artifacts, artifact)).noted(now, artifact=position)

    return _held(claim, after)


def release(claimer: str) -> Change:
    """Give a claim back of which `claimer` never heard that it was stored, and the attempt with it."""

    def change(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if job is None or job.status != State.RUNNING or job.claimed_by != claimer:
            return ()
        return (job.after(Cause.REQUEUED, now, attempt=job.attempt - 1),)

    return change


def renew(claim: Claim, *, lease_s: float) -> Change:
    """Extend the lease. Raises StaleClaim where the claim no longer holds."""
    return _held(claim, lambda job, now: job.evolve(lease_until=now + timedelta(seconds=lease_s)))


def finish(claim: Claim, cause: Cause, **changes: Any) -> Change:
    """End the job by `cause`; its events tell of `artifacts` that were not recorded before, too. Raises StaleClaim
    where the claim no longer holds."""

    def after(job: Job, now: datetime) -> Job:
        artifacts: Sequence[Artifact] = changes.get("artifacts", ())
        for position in range(len(job.artifacts), len(artifacts)):
            job = job.noted(now, artifact=position)
        return job.after(cause, now, **changes)

    return _held(claim, after)


def retry(claim: Claim, *, error: JobError, backoff_s: float) -> Change:
    """Put the job back after an attempt that failed, not to be claimed for `backoff_s` seconds, whichever of its
    messages comes. Raises StaleClaim where the claim no longer holds."""

    def after(job: Job, now: datetime) -> Job:
        not_before = now + timedelta(seconds=backoff_s)
        return job.after(Cause.RETRIED, now, error=error, not_before=not_before, waiting_since=None)

    return _held(claim, after)


def requeue(claim: Claim) -> Change:
    """Put the job back, with the attempt uncounted. Raises StaleClaim where the claim no longer holds."""
    return _held(claim, lambda job, now: job.after(Cause.REQUEUED, now, attempt=job.attempt - 1))


def wait(claim: Claim, *, error: JobError, limit_s: float) -> Change:
    """As `requeue`, for want of what `error` names; the job fails with it once it has waited for `limit_s` seconds.

    Raises StaleClaim where the claim no longer holds.
    """

    def after(job: Job, now: datetime) -> Job:
        since = job.waiting_since or now
        if (now - since).total_seconds() >= limit_s:
            return job.after(Cause.EXHAUSTED, now, error=error)
        return job.after(Cause.REQUEUED, now, attempt=job.attempt - 1, error=error, waiting_since=since)

    return _held(claim, after)


def cancel(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
    """Stop the job, waiting or running. Raises IllegalTransition where it is over, UnknownJob where there is none."""
    if job is None:
        raise UnknownJob("there is no such job")
    error = JobError(code="canceled", message="canceled by a user")
    return (job.after(Cause.CANCELED, now, fence=job.fence + 1, error=error),)


def attend(for_s: float) -> Change:
    """Move the deadline of a job that is not over to `for_s` seconds from now."""

    def change(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if job is None or job.status.is_final:
            return ()
        return (job.evolve(deadline=now + timedelta(seconds=for_s)),)

    return change


def leave(for_s: float | None) -> Change:
    """Whoever attended the job does so no longer: without an answer, and it goes on for `for_s` seconds; or with one,
    None. A job that is over, too."""

    def change(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if job is None:
            return ()
        return (job.evolve(deadline=None if for_s is None else now + timedelta(seconds=for_s)),)

    return change


def take_over(for_s: float, *, left_s: float) -> Change:
    """Attend a job in place of those who have left, over or not. Raises Busy where it was answered, or where its
    deadline is more than `left_s` seconds away: another attends it."""

    def change(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if job is None or job.deadline is None or job.deadline > now + timedelta(seconds=left_s):
            raise Busy("the job is answered, or another waits for it")
        return (job.evolve(deadline=now + timedelta(seconds=for_s)),)

    return change


def replay(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
    """Have a failed job run again, with all its attempts, when its message comes again. Others stay as they are.

    Raises UnknownJob where there is none.
    """
    if job is None:
        raise UnknownJob("there is no such job")
    return (_replayed(job, now),) if job.status == State.FAILED else ()


def resend(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
    """As `replay`, and the job owes its message, which no one else sends. Raises IllegalTransition where the job has
    not failed."""
    if job is None:
        raise UnknownJob("there is no such job")
    owed: dict[Notification, Due] = {"dispatch": Due(due_at=now + timedelta(seconds=HEAD_START_S["dispatch"]))}
    return (_replayed(job, now).evolve(owed=owed),)


def _replayed(job: Job, now: datetime) -> Job:
    fresh = {"attempt": 0, "error": None, "dead_lettered": False, "waiting_since": None}
    return job.after(Cause.REPLAYED, now, **fresh, fence=job.fence + 1)


def take_notifications(
    taker: str, kinds: Collection[Notification], *, wait_s: Callable[[Notification, int], float]
) -> Change:
    """Take those notifications of `kinds` that are due, to send them: each is due again `wait_s(kind, attempts)` later,
    so that no other process sends it meanwhile. Those then `taken_by` the taker, a name used once, are the taker's.

    A job under a live lease is heard of, though renewals leave its notifications alone: its message is put off until
    then."""

    def after(job: Job, kind: Notification, now: datetime) -> Due:
        if kind == "dispatch" and job.lease_until is not None and job.lease_until > now:
            return Due(due_at=job.lease_until + timedelta(seconds=job.redispatch_s))
        attempts = job.owed[kind].attempts + 1
        return Due(attempts=attempts, due_at=now + timedelta(seconds=wait_s(kind, attempts)), taken_by=taker)

    def change(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if job is None:
            return ()
        due = {kind: after(job, kind, now) for kind in kinds if kind in job.owed and job.owed[kind].due_at <= now}
        return (job.evolve(owed=job.owed | due),) if due else ()

    return change


def recall(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
    """Have the message of a job that is not over published again, once no live lease holds it: its broker is empty."""
    if job is None or "dispatch" not in job.owed:
        return ()
    return (job.evolve(owed=job.owed | {"dispatch": Due(due_at=max(now, job.lease_until or now))}),)


def mark_sent(told: Job, kinds: Collection[Notification]) -> Change:
    """Note that `kinds` were sent as of `told`. A job that has changed state since owes them still. A message that was
    sent for the first time is owed again in `redispatch_s` seconds, should the broker lose it."""

    def change(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if job is None or (job.fence, job.status) != (told.fence, told.status) or not job.owed.keys() & set(kinds):
            return ()
        owed = {kind: due for kind, due in job.owed.items() if kind not in kinds}
        if "dispatch" in kinds:
            owed["dispatch"] = Due(due_at=now + timedelta(seconds=job.redispatch_s))
        return (job.evolve(owed=owed),)

    return change


def fail_lost(found: Job, message: str) -> Change:
    """End the job, as it was `found`, because it waits for a message that will not come; `message` says why."""

    def change(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if job is None or (job.fence, job.status) != (found.fence, found.status):
            return ()
        error = JobError(code="message_lost", message=message)
        return (job.after(Cause.EXHAUSTED, now, error=error, fence=job.fence + 1),)

    return change


def mark_dead_lettered(told: Job) -> Change:
    """Note that the message of the job, failed as in `told`, is in the dead-letter topic. One that was sent again since
    may fail again, and then wants a letter of its own."""

    def change(job: Job | None, _rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
        if job is None or (job.fence, job.status) != (told.fence, told.status):
            return ()
        return (job.evolve(dead_lettered=True),)

    return change


def check_held(job: Job | None, claim: Claim) -> Job:
    """`job`, where `claim` still holds it. Raises StaleClaim, with the job's status in `details`, where it does not."""
    if job is None or job.status != State.RUNNING or (job.fence, job.claimed_by) != (claim.fence, claim.claimer):
        status = job.status if job else None
        raise StaleClaim(f"the claim {claim.fence} on job {claim.job_id} is over", status=status)
    return job


def _held(claim: Claim, to: Callable[[Job, datetime], Job]) -> Change:
    return lambda job, _rivals, now: (to(check_held(job, claim), now),)


def _refuse_live(job: Job, now: datetime) -> None:
    if job.status == State.RUNNING and job.lease_until is not None and job.lease_until > now:
        left_s = (job.lease_until - now).total_seconds()
        raise Busy(f"job {job.id} is running until {job.lease_until.isoformat()}", retry_after_s=left_s)


def _refuse_early(job: Job, now: datetime) -> None:
    if job.not_before is not None and job.not_before > now:
        left_s = (job.not_before - now).total_seconds()
        raise Busy(f"job {job.id} is not tried before {job.not_before.isoformat()}", retry_after_s=left_s)


def _asked_again(stored: Job, new: Job, now: datetime) -> Job:
    """The stored record with the wishes of a newer message whose deadline is not over; queued again where the job
    failed or was canceled before that message was published, or expired. A message that comes again asks nothing."""
    asked_at = new.asked_at
    if stored.message is None:
        stored = stored.evolve(message=new.message)
    if asked_at is None or (stored.asked_at is not None and asked_at <= stored.asked_at):
        return stored
    if new.deadline is not None and new.deadline <= now:
        return stored
    wishes = {name: getattr(new, name) for name in ("asked_at", "message", "deadline", "callback_url", "traceparent")}
    if not stored.status.is_final:
        return stored.evolve(**wishes)
    is_after_the_end = stored.finished_at is not None and asked_at > stored.finished_at
    if stored.status == State.SUCCEEDED or not (is_after_the_end or stored.status == State.EXPIRED):
        return stored
    fresh = {"attempt": 0, "error": None, "dead_lettered": False}
    return stored.after(Cause.ASKED_AGAIN, now, **fresh, not_before=None, waiting_since=None, **wishes)


def _beside(rival: Job, claimed: Job, now: datetime, max_attempts: int) -> Job | None:
    """What becomes of the session's other job; None where it stays as it is."""
    after = _lost(rival, now, max_attempts) if rival.status == State.RUNNING else rival
    if _is_replaced(after, claimed):
        return _superseded(after, claimed, now)
    return after if after is not rival else None


def _is_replaced(rival: Job, by: Job) -> bool:
    return rival.status == State.QUEUED and bool(rival.request) and rival.request == by.request


def _superseded(rival: Job, by: Job, now: datetime) -> Job:
    error = JobError(code="superseded", message=f"its photo or mask was replaced; see job {by.id}")
    return rival.after(Cause.SUPERSEDED, now, error=error, fence=rival.fence + 1)


def _lost(rival: Job, now: datetime, max_attempts: int) -> Job:
    """A rival whose lease ran out: queued again, or failed, with its number raised so that its worker cannot write."""
    if rival.attempt >= max_attempts:
        return _exhausted(rival, now)
    return rival.after(Cause.LEASE_LOST, now, fence=rival.fence + 1)


def _exhausted(job: Job, now: datetime, **changes: Any) -> Job:
    error = JobError(code="attempts_exhausted", message=f"all {job.attempt} attempts are used up")
    return job.after(Cause.EXHAUSTED, now, error=error, fence=job.fence + 1, **changes)


def _too_late(job: Job) -> JobError:
    return JobError(code="deadline_exceeded", message=f"its deadline {job.deadline} passed before it was painted")
