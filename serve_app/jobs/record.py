"""A job's record, and its states. `claims.py` has the rules that change it.

    queued ──claimed──► running ──succeeded──► succeeded
       ▲                  ├──rejected, exhausted──► failed
       │                  ├──canceled──► canceled
       └─lease_lost,──────┤
         retried,         └──expired──► expired
         requeued
    queued ──exhausted──► failed, queued ──canceled, superseded──► canceled, queued ──expired──► expired
    failed ──replayed, asked_again──► queued, canceled ──asked_again──► queued, expired ──asked_again──► queued
    failed ──resumed──► queued, canceled ──resumed──► queued, succeeded ──resumed──► queued

A job that is over owes what others must be told (`Job.owed`), from the same write that ended it. One that is not over
owes its message (`dispatch`), should the broker have lost it. `notifications.py` sends them.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from ..errors import IllegalTransition
from ..models import Progress
from ..parameters import JobType, Parameters


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
    REQUEUED = "requeued"
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
    (State.RUNNING, Cause.REQUEUED): State.QUEUED,
    (State.FAILED, Cause.REPLAYED): State.QUEUED,
    (State.FAILED, Cause.ASKED_AGAIN): State.QUEUED,
    (State.CANCELED, Cause.ASKED_AGAIN): State.QUEUED,
    (State.EXPIRED, Cause.ASKED_AGAIN): State.QUEUED,
    (State.FAILED, Cause.RESUMED): State.QUEUED,
    (State.CANCELED, Cause.RESUMED): State.QUEUED,
    (State.SUCCEEDED, Cause.RESUMED): State.QUEUED,
}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Artifact(_Value):
    """A blob that a job wrote."""

    #: What it is to its job: `edited`, `preview`, `image`.
    role: str
    path: str
    #: As written: a later job of the session may write to the same path. Empty in records that kept none.
    version: str = ""
    content_type: str = ""
    #: None in records that kept none.
    size_bytes: int | None = None
    #: Of a job that makes several pictures: which one, from 0, and the seed it was made with.
    index: int | None = None
    seed: int | None = None
    #: Pixels; None in records that kept none.
    width: int | None = None
    height: int | None = None


class JobError(_Value):
    code: str
    message: str


class Quality(_Value):
    """What a check of an edit's picture found; see `serve_app.edit.quality`."""

    #: -1..1: how much of what was to be removed is there again.
    put_back: float
    #: The seed of the picture that was kept.
    seed: int
    #: Paintings that were checked.
    tries: int
    verdict: Literal["ok", "suspect"]


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
Notification = Literal["session", "completion", "webhook", "dispatch"]

#: The process that ended a job tells the others at once; should it die first, anybody may after this. Longer than
#: telling may take, in seconds.
HEAD_START_S: Mapping[Notification, float] = {"session": 15.0, "completion": 15.0, "webhook": 35.0, "dispatch": 15.0}

#: A URL of these schemes need not name the port.
_PORTS = {"https": 443, "http": 80}

_NOT_YET = datetime.fromtimestamp(0, UTC)


class Due(_Value):
    """When a notification that a job owes is to be sent."""

    #: Not before.
    due_at: AwareDatetime
    #: How often sending was begun by a process that found it due.
    attempts: int = 0
    #: The process that began last, by a name used once.
    taken_by: str = ""


#: The newest events that a record keeps: Firestore's documents end at 1 MiB.
MAX_EVENTS = 250


class Event(_Value):
    """Something that became of a job, for those who follow it: a change of state, or an artifact that was stored."""

    #: From 1, without gaps.
    number: int
    at: AwareDatetime
    #: The job's after it.
    status: State
    #: None for an artifact, and for a job that was posted.
    cause: Cause | None = None
    #: The position of the artifact among the job's.
    artifact: int | None = None
    #: Why it ended, or why it waits.
    error: JobError | None = None


class Message(_Value):
    """What asked for a job, to be published again should the broker lose it."""

    #: JSON, as the job's kind reads it; of a job that was posted, for people.
    data: str
    attributes: dict[str, str]


class Job(_Value):
    """One stored record. Records are immutable: `evolve` makes the next one."""

    id: str
    status: State = State.QUEUED
    #: The id of the API key that posted it; empty for jobs that came as a message.
    owner: str = ""
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
    #: Of the engine seconds in `timings`, at the price set when the job succeeded, in that price's currency. None for
    #: a job that has not succeeded, and where no price was set.
    cost: float | None = None
    #: None for a job that has not succeeded, or of which it cannot be told. Left out of the record then, which older
    #: versions can read.
    quality: Annotated[Quality | None, Field(exclude_if=lambda value: value is None)] = None
    artifacts: tuple[Artifact, ...] = ()
    #: The newest, oldest first.
    events: tuple[Event, ...] = ()
    #: Whether its message was copied to the dead-letter topic.
    dead_lettered: bool = False
    #: What is still to be told.
    owed: dict[Notification, Due] = Field(default_factory=dict)
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
        return after.noted(now, cause=cause, error=after.error).evolve(owed=_notifications(after, now))

    def noted(self, now: datetime, **what: Any) -> "Job":
        """The record with one event more, which `what` says."""
        number = self.events[-1].number + 1 if self.events else 1
        event = Event(number=number, at=now, status=self.status, **what)
        return self.evolve(events=(*self.events, event)[-MAX_EVENTS:])

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


def _notifications(job: Job, now: datetime) -> dict[Notification, Due]:
    if job.type == "audit":
        # It has no message, and whoever asked looks.
        return {}
    if not job.status.is_final:
        return {"dispatch": Due(due_at=now + timedelta(seconds=job.redispatch_s))}
    wanted: dict[Notification, bool] = {
        "session": bool(job.session_id),
        "completion": True,
        "webhook": bool(job.callback_url),
    }
    return {
        kind: Due(due_at=now + timedelta(seconds=HEAD_START_S[kind])) for kind, is_wanted in wanted.items() if is_wanted
    }
