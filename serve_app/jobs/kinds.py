"""What a kind of job supplies. The worker claims, keeps, ends and reports jobs of every kind, and knows none."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from ..errors import NotSupported
from ..models import OnProgress
from ..parameters import GuidanceScale, JobType, Steps, VariantName
from .record import Artifact, Job, Quality, Timings


class Owned(Protocol):
    @property
    def owner(self) -> str:
        """The id of the API key that posted it; empty where none did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks, and which jobs are shown to it."""

    #: Of its API key; empty where the app has no keys.
    id: str = ""
    sees_all: bool = True
    #: Jobs that no key has posted, and blobs of the store by their paths.
    sees_messages: bool = True

    def sees(self, owned: Owned) -> bool:
        return self.sees_all or (owned.owner == self.id if owned.owner else self.sees_messages)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A message that was understood."""

    #: The kind's own.
    message: Any
    #: The variant that it names, or the present default.
    variant: str
    #: The first few names of fields that the kind does not know.
    unknown_fields: Sequence[str] = ()
    #: The stored job that it names, whose record says the rest; empty for a message that says all itself.
    job_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What an attempt may use while its claim holds. When the claim ends, the attempt is canceled."""

    on_progress: OnProgress
    #: Awaited before each write that only the claim's holder may do. Raises StaleClaim, Canceled, StoreUnavailable.
    confirm: Callable[[], Awaitable[None]]
    #: Notes an artifact that is stored, while the job goes on: a later attempt finds it in `Job.artifacts`. Raises as
    #: `confirm` does.
    record: Callable[[Artifact], Awaitable[None]]
    #: Seconds until the job's deadline, as far as is known; infinite without one.
    left_s: Callable[[], float]
    #: For work that keeps a CPU busy: as many at a time as this process has memory for.
    pool: Executor


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    artifacts: tuple[Artifact, ...]
    timings: Timings
    quality: Quality | None = None


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


class PostedKind(Kind, Protocol):
    """One whose jobs are asked for over HTTP, too."""

    async def post(self, body: Mapping[str, Any], caller: Caller, *, job_id: str) -> Job:
        """The record of the job that `body`, a request's, asks for. What the job takes is stored first.

        Raises ValidationError and InputError, which name the field at fault; Unavailable.
        """

    def inputs(self, job: Job) -> Sequence[str]:
        """Paths of the blobs that `post` stored for it: they are deleted with the job."""

    def outputs(self, job: Job) -> Sequence[str]:
        """Paths that are its own and that its attempts write to, also those that a canceled one never recorded: they
        are deleted with the job."""


class PostedBody(BaseModel):
    """What requests for jobs of all kinds have. Raises NotSupported for a job of several stages: ignoring what follows
    would leave its client waiting."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    #: Denoising steps.
    steps: Steps | None = None
    guidance: GuidanceScale | None = Field(None, validation_alias=AliasChoices("guidance", "guidance_scale"))
    model_id: VariantName | None = Field(None, validation_alias=AliasChoices("model_id", "model"))

    @model_validator(mode="before")
    @classmethod
    def _no_chain(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("chain") is not None:
            raise NotSupported("chain: jobs of several stages are not done here", field="chain")
        return given
