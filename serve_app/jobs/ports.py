"""What the application asks of the world outside. Adapters and deployments answer; nothing here knows who.

Guarantees stand in the docstrings and are held by the contract tests, one suite per port, every backend in it.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol, TypedDict, Unpack

from ..models import Progress
from ..parameters import JobType
from .claims import Change, Claim, Quota
from .record import Job, Notification, State

#: Jobs that are listed, unless it is said how many.
LISTED = 50


class JobQuery(TypedDict, total=False):
    """Which jobs; what is None or left out says nothing. See `JobStore.list`."""

    type: JobType | None
    status: State | None
    lock_key: str | None
    owner: str | None
    before: tuple[datetime, str] | None
    owes_by: datetime | None
    notification: Notification | None
    receiver: str | None
    limit: int


class JobStore(Protocol):
    """Job records, cancellations, and the clock that they are dated by: all who use the store see the same time,
    whatever their own clocks say. Every method raises StoreUnavailable while the store cannot be reached."""

    async def now(self) -> datetime:
        """The store's present time."""

    async def get(self, job_id: str) -> Job | None:
        """The record with its latest reported progress."""

    async def update(self, job_id: str, lock_key: str, change: Change) -> Job:
        """Run `change` on the stored record, the session's other jobs that are not over and the store's present time,
        and store what it returns.

        Atomic: no other update of these records happens in between; what `change` raises passes through and nothing
        is stored. `change` may be run more than once. Returns the record stored under `job_id` afterwards; raises
        UnknownJob where there is none.
        """

    async def create(self, new: Job, quota: Quota | None = None) -> tuple[Job, bool]:
        """Store `claims.posted(new)`, unless a record is stored under its id: that one, and whether it is the new one.

        Exact, however many create at once: `quota.check` passes for what is stored of the same owner, not over and
        created within 24 hours, before the new one is. Raises QuotaExceeded, and nothing is stored.
        """

    async def ahead(self, job: Job) -> int:
        """Queued jobs of the same variant that were created before it."""

    async def report(self, claim: Claim, progress: Progress) -> None:
        """Note progress beside the record. Ignored for a claim older than one that has reported, or an unknown job."""

    async def list(self, **query: Unpack[JobQuery]) -> Sequence[Job]:
        """Newest first by `created_at`, and by id where that is the same; those after `before`, such a pair, in
        this order.

        With `owes_by`, and then nothing of the above, those that owe something due by then, earliest due first; with
        `notification` too, those that owe this by then; with a `receiver` (`Job.receiver`) beside the notification
        `webhook`, those that owe it to this one."""

    async def delete(self, job_id: str) -> None:
        """Deleting what is not there is no error."""

    async def cancel_until(self, lock_key: str, moment: datetime) -> None:
        """The session's messages published up to `moment` are canceled: those that wait are not to be started. An
        earlier moment than the stored one changes nothing."""

    async def canceled_until(self, lock_key: str) -> datetime | None: ...


class SessionMirror(Protocol):
    """The session document the publisher watches. Raises StoreUnavailable while it cannot be reached."""

    async def write_session(self, job: Job, document: Mapping[str, Any]) -> None:
        """Merge `document` into the session's, top-level field by field. Ignored where a newer claim of the same job,
        or a job that was claimed later, has written already, and where this claim has written how the job ended."""

    async def read_session(self, user_id: str, session_id: str) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One message as it arrived."""

    data: bytes
    attributes: Mapping[str, str]
    message_id: str
    publish_time: datetime | None = None
    #: Why it is no message, where that is known already; `data` is then the raw body.
    fault: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What becomes of the message: acknowledged, or deferred for `delay_s` seconds; 0 returns it at once."""

    action: Literal["ack", "defer"]
    delay_s: float = 0.0
    #: Why, in a word, for the log and for the answer to a push: an outcome or an error code.
    reason: str = ""


Handler = Callable[[Delivery], Awaitable[Verdict]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceStatus:
    connected: bool
    #: Why not, for a person.
    error: str = ""
    #: Messages in flight.
    held: int = 0
    #: How long pulls that had room have brought nothing, in seconds; 0 while they bring messages, or fail.
    empty_s: float = 0.0


class MessageSource(Protocol):
    """One or several subscriptions. Those of higher priority are drained first, and none is starved for ever."""

    async def run(self, handle: Handler) -> None:
        """Deliver messages to `handle`, several at a time, and carry out its verdicts, until `close`.

        At least once: what is not acknowledged comes again, also after a crash. A held-back message does not come
        before its delay is over (which the broker may cap). The lease on a message is extended while it is handled.
        An exception from `handle` holds the message back. A subscription that cannot be pulled from is tried again.
        """

    async def close(self, *, grace_s: float) -> None:
        """Stop taking messages, wait up to `grace_s` for those in flight, cancel the rest and return them."""

    def status(self) -> Mapping[str, SourceStatus]:
        """By subscription."""


#: `completed` is the topic that says what became of sessions; it exists where the settings name one.
Topic = Literal["sessions", "dead", "completed"]


class Publisher(Protocol):
    async def publish(self, topic: Topic, data: bytes, attributes: Mapping[str, str]) -> str:
        """The message id. Stored by the broker when this returns.

        Raises ValueError for `completed` where the settings name no such topic; BrokerUnavailable; MessageRefused
        where the broker will never take it.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """A message of the dead-letter topic, leased until it is acknowledged or returned."""

    #: The original message: its data and attributes, the reasons (`deadLetter…`) among them.
    delivery: Delivery
    #: What the broker knows it by.
    ack_id: str


class DeadLetters(Protocol):
    """The subscription that keeps the dead letters. Every method raises BrokerUnavailable."""

    async def pull(self, limit: int) -> Sequence[DeadLetter]:
        """Up to `limit`, leased for a minute; none where there are none."""

    async def acknowledge(self, letters: Sequence[DeadLetter]) -> None: ...

    async def give_back(self, letters: Sequence[DeadLetter]) -> None: ...

    async def close(self) -> None: ...
