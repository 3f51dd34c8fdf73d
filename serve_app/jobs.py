"""Jobs: their record, their states, and the rules by which a claim is taken, kept and given up.

The rules are pure functions from the stored records to the records to store. A job store runs one of them
inside an atomic read-modify-write (`ports.JobStore.update`), so every backend keeps the same rules. The store passes
its own present time, so the rules compare moments of one clock only, and no host's clock matters.

    queued ──claimed──► running ──succeeded──► succeeded
       ▲                  ├──rejected, exhausted──► failed
       │                  ├──canceled──► canceled
       └─lease_lost,──────┤
         retried,         └──expired──► expired
         given_back
    queued ──exhausted──► failed, queued ──canceled, superseded──► canceled, queued ──expired──► expired
    failed ──replayed, asked_again──► queued, canceled ──asked_again──► queued, expired ──asked_again──► queued
    failed ──resumed──► queued, canceled ──resumed──► queued, succeeded ──resumed──► queued

A job that is over owes what others must be told (`Job.owed`), from the same write that ended it. One that is not over
owes its message (`dispatch`), should the broker have lost it. `outbox.py` pays.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from .audits import AuditRequest
from .errors import Busy, IllegalTransition, MalformedMessage, OtherVariant, StaleClaim, UnknownJob
from .messages import CropStrategy


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


class Cause(StrEnum):
    """Why a job changes state."""

    #: A worker took it.
    CLAIMED = "claimed"
    #: Its result is stored.
    SUCCEEDED = "succeeded"
    #: Its input is bad.
    REJECTED = "rejected"
    #: Its attempts are used up.
    EXHAUSTED = "exhausted"
    #: A user asked.
    CANCELED = "canceled"
    #: Its photo or mask was replaced before it ran again: its message is a newer job now.
    SUPERSEDED = "superseded"
    #: Its deadline passed.
    EXPIRED = "expired"
    #: Its worker stopped renewing the lease: it died, or lost the store.
    LEASE_LOST = "lease_lost"
    #: Painting failed for a reason that may pass.
    RETRIED = "retried"
    #: Its worker shut down, or something outside was down: nothing wrong with the job.
    GIVEN_BACK = "given_back"
    #: An operator sent its dead letter again.
    REPLAYED = "replayed"
    #: A message asked for it once more: published after it failed or was canceled, or with a later deadline.
    ASKED_AGAIN = "asked_again"
    #: A user asked for what an audit lacks.
    RESUMED = "resumed"


#: Every legal edge. What is not here raises IllegalTransition.
TRANSITIONS: Mapping[tuple[State, Cause], State] = {
    (State.QUEUED, Cause.CLAIMED): State.RUNNING,
    (State.QUEUED, Cause.EXHAUSTED): State.FAILED,
    (State.QUEUED, Cause.CANCELED): State.CANCELED,
    (State.QUEUED, Cause.SUPERSEDED): State.CANCELED,
    (State.QUEUED, Cause.EXPIRED): State.EXPIRED,
    (State.RUNNING, Cause.SUCCEEDED): State.SUCCEEDED,
    (State.RUNNING, Cause.REJECTED): State.FAILED,
    (State.RUNNING, Cause.EXHAUSTED): State.FAILED,
    (State.RUNNING, Cause.CANCELED): State.CANCELED,
    (State.RUNNING, Cause.EXPIRED): State.EXPIRED,
    (State.RUNNING, Cause.LEASE_LOST): State.QUEUED,
    (State.RUNNING, Cause.RETRIED): State.QUEUED,
    (State.RUNNING, Cause.GIVEN_BACK): State.QUEUED,
    (State.FAILED, Cause.REPLAYED): State.QUEUED,
    (State.FAILED, Cause.ASKED_AGAIN): State.QUEUED,
    (State.CANCELED, Cause.ASKED_AGAIN): State.QUEUED,
    (State.EXPIRED, Cause.ASKED_AGAIN): State.QUEUED,
    (State.FAILED, Cause.RESUMED): State.QUEUED,
    (State.CANCELED, Cause.RESUMED): State.QUEUED,
    (State.SUCCEEDED, Cause.RESUMED): State.QUEUED,
}

JobType = Literal["inpaint", "generate", "audit"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EditParameters(_Value):
    """How to paint an edit, resolved at the first claim and the same for every attempt."""

    type: Literal["inpaint"] = "inpaint"
    prompt: str
    guidance_scale: float
    #: Denoising steps.
    steps: int
    crop_strategy: CropStrategy


#: What a job is to do, by its type.
Parameters = Annotated[EditParameters | AuditRequest, Field(discriminator="type")]


class Artifact(_Value):
    """A blob that a job wrote."""

    #: `edited`, `preview`.
    role: str
    path: str
    #: As written: a later job of the session may write to the same path. Empty in records that kept none.
    version: str = ""
    content_type: str = ""
    #: None in records that kept none.
    size_bytes: int | None = None


class Progress(_Value):
    #: Steps done, over all windows.
    step: int = 0
    #: Steps in all; 0 while unknown.
    steps: int = 0

    @property
    def fraction(self) -> float:
        """0..1."""
        return self.step / self.steps if self.steps else 0.0


class JobError(_Value):
    code: str
    message: str


class Timings(_Value):
    """Seconds by stage of the attempt that ended the job; None where a stage did not run."""

    queued_s: float | None = None
    download_s: float | None = None
    #: Decode, plan windows, crop, and get the prompt's embeddings.
    prepare_s: float | None = None
    #: Waiting for a replica: queued behind other jobs, or while one starts.
    wait_s: float | None = None
    #: The engine at work.
    engine_s: float | None = None
    #: Device time of the painting in milliseconds; None where there is no GPU.
    gpu_ms: float | None = None
    #: Paste and encode.
    encode_s: float | None = None
    upload_s: float | None = None
    total_s: float | None = None


#: Who is told that a job is over: the session document, the completion topic, the publisher's own URL. `dispatch` is
#: what a job that is not over owes: its message, published again.
Debt = Literal["session", "completion", "webhook", "dispatch"]

#: The process that ended a job tells the others at once; should it die first, anybody may after this. Longer than
#: telling may take, in seconds.
HEAD_START_S: Mapping[Debt, float] = {"session": 15.0, "completion": 15.0, "webhook": 35.0}
#: A URL of these schemes need not name the port.
_PORTS = {"https": 443, "http": 80}


_NOT_YET = datetime.fromtimestamp(0, UTC)


class Owed(_Value):
    """Something a job still has to tell."""

    #: Not to be told before.
    due_at: AwareDatetime
    #: How often telling was begun by somebody who found it due.
    attempts: int = 0
    #: Who began last.
    taken_by: str = ""


class Message(_Value):
    """What asked for a job, to be published again should the broker lose it."""

    #: JSON, as `messages.EditMessage` reads it.
    data: str
    attributes: dict[str, str]


class Job(_Value):
    """One stored record. Records are immutable: `evolve` makes the next one."""

    id: str
    status: State = State.QUEUED
    #: Whose photo, and which session; empty for jobs that have none.
    user_id: str = ""
    session_id: str = ""
    #: Jobs of one key run one at a time; empty: beside any other.
    lock_key: str = ""
    #: Empty for jobs of several variants.
    variant: str = ""
    parameters: Parameters
    seed: int = 0
    #: What was asked for, whatever photo was stored then; empty where the job's id depends on no stored versions.
    request: str = ""
    #: Attempts used, the running one included.
    attempt: int = 0
    #: The fencing number: grows with every claim and every cancellation.
    fence: int = 0
    #: Who claimed it last, or came to claim it and ended it: a name used for one claim.
    claimed_by: str = ""
    #: Not to be claimed before: the backoff after a failed attempt.
    not_before: AwareDatetime | None = None
    #: Since when its attempts have been given back for want of something: weights, a replica, a store.
    waiting_since: AwareDatetime | None = None
    #: While running: until when its worker may be silent. While an audit is queued: until when its driver may be.
    lease_until: AwareDatetime | None = None
    progress: Progress = Progress()
    error: JobError | None = None
    timings: Timings = Timings()
    artifacts: tuple[Artifact, ...] = ()
    #: Whether its message was copied to the dead-letter topic.
    dead_lettered: bool = False
    #: What is still to be told.
    owed: dict[Debt, Owed] = Field(default_factory=dict)
    #: Where the publisher wants to be called when the job is over; empty: nowhere.
    callback_url: str = ""
    #: W3C trace context of the message that asked; empty where there is none.
    traceparent: str = ""
    deadline: AwareDatetime | None = None
    #: The newest message that asked for it; None in records of a version that kept none.
    message: Message | None = None
    #: The message is published again when nothing was heard of the job for so long, in seconds.
    redispatch_s: float = 3600.0
    #: When the newest message that asked for it was published, by the broker's clock.
    asked_at: AwareDatetime | None = None
    #: This and the moments below are the job store's time. A new job has its own from its first claim.
    created_at: AwareDatetime = _NOT_YET
    started_at: AwareDatetime | None = None
    finished_at: AwareDatetime | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_older_record(cls, record: Any) -> Any:
        """Records of version 0.1 have the type beside the parameters, paths and versions of artifacts in two mappings,
        and no lock key."""
        match record:
            case {"type": str(of), "parameters": dict(parameters), "user_id": user, "session_id": session, **rest}:
                ids = {"user_id": user, "session_id": session, "lock_key": f"{user}/{session}" if session else ""}
                paths, versions = rest.get("artifacts", {}), rest.get("versions", {})
                if isinstance(paths, dict) and isinstance(versions, dict):
                    rest.pop("versions", None)
                    rest["artifacts"] = [
                        {"role": role, "path": path, "version": versions.get(role, "")} for role, path in paths.items()
                    ]
                return {**rest, **ids, "parameters": {**parameters, "type": of}}
        return record

    @property
    def type(self) -> JobType:
        return self.parameters.type

    @property
    def paths(self) -> Mapping[str, str]:
        """Blob paths of its artifacts, by role."""
        return {artifact.role: artifact.path for artifact in self.artifacts}

    @property
    def owes_at(self) -> datetime | None:
        """When the first thing it owes is due; None where it owes nothing."""
        return min((owed.due_at for owed in self.owed.values()), default=None)

    @property
    def receiver(self) -> str:
        """Whom a webhook of it calls, as `receiver_of` has it; empty where it calls nobody."""
        return receiver_of(self.callback_url)

    def evolve(self, **changes: Any) -> "Job":
        return type(self).model_validate({**self.__dict__, **changes})

    def after(self, cause: Cause, now: datetime, **changes: Any) -> "Job":
        """The record after the edge that `cause` names.

        Raises IllegalTransition where the state machine has no such edge.
        """
        to = TRANSITIONS.get((self.status, cause))
        if to is None:
            raise IllegalTransition(f"job {self.id} is {self.status} and cannot be {cause}", status=self.status)
        lease_until = self.lease_until if to == State.RUNNING else None
        finished_at = now if to.is_final else None
        after = self.evolve(status=to, lease_until=lease_until, finished_at=finished_at, **changes)
        return after.evolve(owed=_debts(after, now))

    def log_context(self) -> dict[str, Any]:
        return {
            "job_id": self.id,
            "lock_key": self.lock_key,
            "variant": self.variant,
            "attempt": self.attempt,
            "fence": self.fence,
        }


def receiver_of(url: str) -> str:
    """The host that the URL is of, and the port where it is not the scheme's own, however both are spelt; empty where
    there is none."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
        host = host.encode("idna").decode()
    except ValueError:
        # What is no URL is never called either; UnicodeError is one.
        return ""
    return f"{host}:{port}" if port and port != _PORTS.get(parts.scheme) else host


def _debts(job: Job, now: datetime) -> dict[Debt, Owed]:
    if job.type == "audit":
        # It has no message, and whoever asked looks.
        return {}
    if not job.status.is_final:
        return {"dispatch": Owed(due_at=now + timedelta(seconds=job.redispatch_s))}
    wanted: dict[Debt, bool] = {
        "session": bool(job.session_id),
        "completion": True,
        "webhook": bool(job.callback_url),
    }
    return {
        debt: Owed(due_at=now + timedelta(seconds=HEAD_START_S[debt]))
        for debt, is_wanted in wanted.items()
        if is_wanted
    }


class Claim(_Value):
    """The right to work on a job, as long as its fencing number is the job's and its lease is renewed."""

    job_id: str
    lock_key: str
    fence: int


def claim_of(job: Job) -> Claim:
    return Claim(job_id=job.id, lock_key=job.lock_key, fence=job.fence)


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
    OtherVariant where the stored record is of another variant than `new`; MalformedMessage where it is of another type.
    """

    def change(stored: Job | None, rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
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


def disown(claimer: str) -> Change:
    """Give a claim back of which `claimer` never heard that it was stored, and the attempt with it."""

    def change(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if job is None or job.status != State.RUNNING or job.claimed_by != claimer:
            return ()
        return (job.after(Cause.GIVEN_BACK, now, attempt=job.attempt - 1),)

    return change


def renew(claim: Claim, *, lease_s: float) -> Change:
    """Extend the lease. Raises StaleClaim where the claim no longer holds."""
    return _held(claim, lambda job, now: job.evolve(lease_until=now + timedelta(seconds=lease_s)))


def finish(claim: Claim, cause: Cause, **changes: Any) -> Change:
    """End the job by `cause`. Raises StaleClaim where the claim no longer holds."""
    return _held(claim, lambda job, now: job.after(cause, now, **changes))


def retry(claim: Claim, *, error: JobError, backoff_s: float) -> Change:
    """Put the job back after an attempt that failed, not to be claimed for `backoff_s` seconds, whichever of its
    messages comes. Raises StaleClaim where the claim no longer holds."""

    def after(job: Job, now: datetime) -> Job:
        not_before = now + timedelta(seconds=backoff_s)
        return job.after(Cause.RETRIED, now, error=error, not_before=not_before, waiting_since=None)

    return _held(claim, after)


def give_back(claim: Claim) -> Change:
    """Put the job back, with the attempt uncounted. Raises StaleClaim where the claim no longer holds."""
    return _held(claim, lambda job, now: job.after(Cause.GIVEN_BACK, now, attempt=job.attempt - 1))


def wait(claim: Claim, *, error: JobError, limit_s: float) -> Change:
    """As `give_back`, for want of what `error` names; the job fails with it once it has waited for `limit_s` seconds.

    Raises StaleClaim where the claim no longer holds.
    """

    def after(job: Job, now: datetime) -> Job:
        since = job.waiting_since or now
        if (now - since).total_seconds() >= limit_s:
            return job.after(Cause.EXHAUSTED, now, error=error)
        return job.after(Cause.GIVEN_BACK, now, attempt=job.attempt - 1, error=error, waiting_since=since)

    return _held(claim, after)


def cancel(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
    """Stop the job, waiting or running. Raises IllegalTransition where it is over, UnknownJob where there is none."""
    if job is None:
        raise UnknownJob("there is no such job")
    error = JobError(code="canceled", message="canceled by a user")
    return (job.after(Cause.CANCELED, now, fence=job.fence + 1, error=error),)


def replay(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
    """Have a failed job run again, with all its attempts, when its message comes again. Others stay as they are.

    Raises UnknownJob where there is none.
    """
    if job is None:
        raise UnknownJob("there is no such job")
    if job.status != State.FAILED:
        return ()
    fresh = {"attempt": 0, "error": None, "dead_lettered": False, "waiting_since": None}
    return (job.after(Cause.REPLAYED, now, **fresh, fence=job.fence + 1),)


def take_debts(taker: str, debts: Collection[Debt], *, wait_s: Callable[[Debt, int], float]) -> Change:
    """Take on telling those of `debts` that are due: each is due again `wait_s(debt, attempts)` later, so that nobody
    else tells meanwhile. What is then `taken_by` the taker, a name used once, is the taker's to tell.

    A job under a live lease is heard of, though renewals leave its debts alone: its message is put off until then."""

    def after(job: Job, debt: Debt, now: datetime) -> Owed:
        if debt == "dispatch" and job.lease_until is not None and job.lease_until > now:
            return Owed(due_at=job.lease_until + timedelta(seconds=job.redispatch_s))
        attempts = job.owed[debt].attempts + 1
        return Owed(attempts=attempts, due_at=now + timedelta(seconds=wait_s(debt, attempts)), taken_by=taker)

    def change(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        if job is None:
            return ()
        due = {debt: after(job, debt, now) for debt in debts if debt in job.owed and job.owed[debt].due_at <= now}
        return (job.evolve(owed=job.owed | due),) if due else ()

    return change


def pay(told: Job, debts: Collection[Debt]) -> Change:
    """Note that `debts` were told as of `told`. A job that has changed state since owes them still."""

    def change(job: Job | None, _rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
        if job is None or (job.fence, job.status) != (told.fence, told.status) or not job.owed.keys() & set(debts):
            return ()
        return (job.evolve(owed={debt: owed for debt, owed in job.owed.items() if debt not in debts}),)

    return change


def lose(found: Job, message: str) -> Change:
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
    if job is None or job.status != State.RUNNING or job.fence != claim.fence:
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
