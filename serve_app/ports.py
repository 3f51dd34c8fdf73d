"""What the application asks of the world outside. Adapters and deployments answer; nothing here knows who.

Guarantees stand in the docstrings and are held by the contract tests, one suite per port, every backend in it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from .audits import Audit, Trial
from .images import Pixels
from .jobs import Change, Claim, Debt, Job, JobType, Progress, State
from .windows import Box

#: The present, with a time zone.
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """By this machine's clock."""
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobInfo:
    path: str
    #: Bytes.
    size: int
    #: Opaque; differs whenever the blob was written again, on S3 (where it has no finer clock than a second) at least
    #: whenever with other bytes.
    version: str
    content_type: str = "application/octet-stream"


#: `if_version` for "whatever is there"; an empty string means "nothing may be there".
ANY_VERSION = "*"


class BlobStore(Protocol):
    """Whole blobs under relative paths like `users/u/sessions/s/original.jpg`.

    Every method raises UnsafePath for a path that is empty, absolute, longer than 1,024 bytes, or has an empty,
    `.` or `..` part, a backslash or a control character; StoreUnavailable while the store cannot be reached.
    """

    async def head(self, path: str) -> BlobInfo:
        """Raises BlobNotFound."""

    async def get(self, path: str, *, max_bytes: int) -> tuple[bytes, BlobInfo]:
        """The blob and the version these bytes are of. Never holds more than `max_bytes` of it.

        Raises BlobNotFound; BlobTooLarge.
        """

    async def put(self, path: str, data: bytes, *, content_type: str, if_version: str = ANY_VERSION) -> BlobInfo:
        """Store all of `data` or nothing: no reader ever sees a part.

        Raises BlobConflict where the stored version is not `if_version`.
        """

    async def delete(self, path: str) -> None:
        """Deleting what is not there is no error."""

    def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        """The blobs whose path starts with the folder `prefix`, in path order."""

    async def download(self, path: str, to: Path) -> BlobInfo:
        """Write the blob, which may be too large for memory, to `to`, whole or not at all. Raises BlobNotFound."""

    async def upload(self, path: str, source: Path) -> BlobInfo:
        """Store the file, whole or not at all."""

    async def link(self, path: str, *, expires_s: int) -> str:
        """A URL for people and programs without credentials of the store: it reads the blob with GET for `expires_s`
        seconds, 1 to 604,800 (seven days, V4's limit).

        It is not looked whether the blob is there. The URL is a secret: never log it.
        Raises ValueError for another `expires_s`; StoreUnavailable where nothing can be signed now.
        """


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

    async def report(self, claim: Claim, progress: Progress) -> None:
        """Note progress beside the record. Ignored for a claim older than one that has reported, or an unknown job."""

    async def list(
        self,
        *,
        type: JobType | None = None,
        status: State | None = None,
        lock_key: str | None = None,
        owes_by: datetime | None = None,
        debt: Debt | None = None,
        receiver: str | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """Newest first by `created_at`. With `owes_by` (and then none of `type`, `status` and `lock_key`) those that
        owe something due by then, earliest due first; with `debt` too, those that owe this by then; with a `receiver`
        (`Job.receiver`) beside the debt `webhook`, those that owe it to this one."""

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
    #: Why it is no message, where that is known already; `data` is then whatever came.
    fault: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What becomes of the message: acknowledged, or held back for `delay_s` seconds; 0 gives it back at once."""

    action: Literal["ack", "hold"]
    delay_s: float = 0.0
    #: Why, in a word, for the log and for the answer to a push: an outcome or an error code.
    reason: str = ""


Handler = Callable[[Delivery], Awaitable[Verdict]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceStatus:
    connected: bool
    #: Why not, for a person.
    error: str = ""
    #: Messages in hand.
    held: int = 0


class MessageSource(Protocol):
    """One or several subscriptions. Those of higher priority are drained first, and none is starved for ever."""

    async def run(self, handle: Handler) -> None:
        """Deliver messages to `handle`, several at a time, and carry out its verdicts, until `close`.

        At least once: what is not acknowledged comes again, also after a crash. A held-back message does not come
        before its delay is over (which the broker may cap). The lease on a message is extended while it is handled.
        An exception from `handle` holds the message back. A subscription that cannot be pulled from is tried again.
        """

    async def close(self, *, grace_s: float) -> None:
        """Stop taking messages, wait up to `grace_s` for those in hand, cancel the rest and give them back."""

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
    """A message of the dead-letter topic, in hand until it is acknowledged or given back."""

    #: The original message: its data and attributes, the reasons (`deadLetter…`) among them.
    delivery: Delivery
    #: What the broker knows it by.
    ack_id: str


class DeadLetters(Protocol):
    """The subscription that keeps the dead letters. Every method raises BrokerUnavailable."""

    async def pull(self, limit: int) -> Sequence[DeadLetter]:
        """Up to `limit`, in hand for a minute; none where there are none."""

    async def acknowledge(self, letters: Sequence[DeadLetter]) -> None: ...

    async def give_back(self, letters: Sequence[DeadLetter]) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PaintRequest:
    """What a replica needs for one job, and nothing about whose it is but the id."""

    job_id: str
    #: uint8 RGB, `[height, width, 3]`, at working scale.
    canvas: Pixels
    #: uint8, `[height, width]`; 255 is painted, 0 is kept.
    mask: Pixels
    #: In painting order, in canvas pixels; each is a bucket size.
    windows: Sequence[Box]
    steps: int
    guidance_scale: float
    seed: int
    #: W3C trace context of the message that asked, for the replica's log; empty where there is none.
    traceparent: str = ""
    #: safetensors bytes with `prompt_embeds` `[1, tokens, d]` and `pooled_prompt_embeds` `[1, d]`; None where the
    #: variant takes no prompt.
    embeddings: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Painted:
    #: uint8 RGB, the request's canvas size.
    canvas: Pixels
    #: Seconds the engine was at work.
    busy_s: float
    #: Device milliseconds; None where there is no GPU.
    gpu_ms: float | None = None
    #: Seconds: `prepare_s` (up to the first step: the photo is encoded), `denoise_s` (the steps), `decode_s` (what
    #: follows the last step). Summed over the windows; of one that was begun again, the second time's.
    stages: Mapping[str, float] = field(default_factory=dict)
    #: Bytes of device memory, allocated at most and reserved at most meanwhile; None where there is no GPU.
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    #: Where it ran: device, compute capability, replica, node.
    where: Mapping[str, Any] = field(default_factory=dict)
    #: Those of the request that were painted: of the others nothing would have been kept.
    windows: Sequence[Box] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One request painted several times for an audit."""

    #: uint8 RGB, the request's canvas size: the last painting's.
    canvas: Pixels
    #: The first painting, then the warm ones.
    trials: Sequence[Trial]
    #: Whether all gave the same bytes.
    repeats: bool
    #: As in Painted, with `replica`, `node` and `pid`.
    where: Mapping[str, Any]
    #: As in Painted.
    windows: Sequence[Box]


OnProgress = Callable[[Progress], Awaitable[None]]


class Painter(Protocol):
    def is_ready(self, variant: str) -> bool:
        """Whether a painting would begin without waiting for a replica to start or to load."""

    async def paint(self, variant: str, request: PaintRequest, on_progress: OnProgress) -> Painted:
        """Paint the windows in order. Cancelling the call stops the engine within one step.

        Raises UnknownVariant, VariantNotReady, VariantLoadFailed, ReplicaLost, GpuLost, OutOfMemory, PaintError.
        """


class PromptEncoder(Protocol):
    async def encode(self, variant: str, prompt: str) -> bytes | None:
        """Embeddings as PaintRequest wants them; None where the variant takes no prompt.

        Raises UnknownVariant, VariantLoadFailed, ReplicaLost, StoreUnavailable.
        """


#: `gone`: nobody knows such a job.
LaunchState = Literal["pending", "running", "stopped", "succeeded", "failed", "gone"]


class AuditLauncher(Protocol):
    """Starts the job that works on a stored audit. Every method raises JobsUnavailable while jobs cannot be started."""

    #: Whether its jobs are processes of their own, which see nothing of this one's memory.
    is_apart: bool

    async def launch(self, audit: Audit) -> None:
        """Submit the audit's job under `audit.job_name`. Launching it twice is no error, and starts one job."""

    async def stop(self, audit: Audit) -> None:
        """End the audit's job: it is told first, then killed. Stopping what does not run is no error."""

    async def state(self, audit: Audit) -> LaunchState: ...
