"""What a kind of job supplies. The worker claims, keeps, ends and reports jobs of every kind, and knows none."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

from ..models import OnProgress
from .record import Artifact, Job, JobType, Timings


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A message that was understood."""

    #: The kind's own.
    message: Any
    #: The variant that it names, or the present default.
    variant: str
    #: The first few names of fields that the kind does not know.
    unknown_fields: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What an attempt may use while its claim holds. When the claim ends, the attempt is canceled."""

    on_progress: OnProgress
    #: Awaited before each write that only the claim's holder may do. Raises StaleClaim, Canceled, StoreUnavailable.
    confirm: Callable[[], Awaitable[None]]
    #: For work that keeps a CPU busy: as many at a time as this process has memory for.
    pool: Executor


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    artifacts: tuple[Artifact, ...]
    timings: Timings


class Kind(Protocol):
    """One type of job. Holds no state of any job, so many run at once."""

    @property
    def type(self) -> JobType: ...

    @property
    def event(self) -> str:
        """What begins the names of its webhooks' events: `edit` of `edit.succeeded`."""

    def read(self, data: bytes) -> Asked:
        """Raises MalformedMessage, which names the first field at fault."""

    async def new_job(self, asked: Asked, *, variant: str, idempotency_key: str | None) -> Job:
        """The record of a job that was not claimed yet: its identity, its parameters, resolved, and what it excludes.
        Where a record of this identity is stored, that one's parameters stay. Raises StoreUnavailable."""

    async def run(self, job: Job, attempt: Attempt) -> Result:
        """One attempt. What it raises, the error's disposition decides about."""

    def document(self, job: Job) -> Mapping[str, Any]:
        """The job as those see it who are told of it: fields in camelCase, `jobId` among them."""
