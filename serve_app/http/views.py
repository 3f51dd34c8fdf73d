"""How jobs look over HTTP: the shapes, made from records. Knows no store."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field

from ..jobs.record import Artifact, Cause, Event, Job, Quality, State
from ..models import LoraUse
from ..parameters import JobType

#: Types of jobs that may be posted: audits have routes of their own.
PostedType = Literal["inpaint", "generate"]
POSTED = get_args(PostedType)
#: Why a job waits again, where its event has no error.
_WHY = {Cause.LEASE_LOST: "its worker is gone, or lost the job store"}
#: By content type.
_FORMATS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
#: Of a field that is left out where it has nothing to say.
_SPARSE = Field(exclude_if=lambda value: value is None)


class Stage(BaseModel):
    name: str
    status: State


class Summary(BaseModel):
    #: Pictures that are asked for, and those that are stored.
    count: int
    completed: int


class JobView(BaseModel):
    """A job."""

    id: str
    type: JobType
    status: State
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    #: Its stages. How many denoising steps a picture takes is `parameters.steps`.
    steps: Sequence[Stage]
    summary: Summary
    #: 0..1; 1 only for a job that has succeeded.
    progress: float
    #: What was asked for, and the model's own values for all else.
    parameters: Mapping[str, Any]
    #: Of the pictures that are stored, in their order.
    seeds: Sequence[int]
    #: Seconds by stage, once the job is over.
    timings: Mapping[str, float]
    #: Of the engine seconds in `timings`, in the currency of the configured price; null where there is none, and for a
    #: job that has not succeeded.
    cost: float | None
    #: Of an edit that has succeeded: how much of what was to be removed is there again, and whether it is suspect; null
    #: where it cannot be told.
    quality: Quality | None
    #: 1 for the job that its model takes next; null in lists, and for a job that does not wait.
    queue_position: int | None
    #: Attempts used, the running one included.
    attempt: int
    error_code: str | None
    error_message: str | None
    #: Whether the message of a job that failed is in the dead-letter topic.
    dead_lettered: bool


class PostedJob(BaseModel):
    job: JobView


class JobList(BaseModel):
    jobs: Sequence[JobView]
    #: For the next page's `cursor`; null on the last one.
    next_cursor: str | None


class ArtifactView(BaseModel):
    id: str
    #: `image` of a job of pictures; `edited` and `preview` of an edit.
    role: str
    format: str
    width: int | None
    height: int | None
    seed: int
    #: Which picture of the job, from 0.
    item_index: int
    bytes: int | None
    content_type: str
    #: Where the blob store has it.
    s3_key: str
    #: A link that is signed anew in each answer, and its end; not in events.
    url: Annotated[str | None, _SPARSE] = None
    expires_at: Annotated[datetime | None, _SPARSE] = None


class ArtifactList(BaseModel):
    artifacts: Sequence[ArtifactView]


class ItemProgress(BaseModel):
    item_index: int
    progress: float


class StageWeight(BaseModel):
    name: str
    weight: float


class ProgressView(BaseModel):
    """From 0 to 1."""

    progress: float
    items: Sequence[ItemProgress]
    stages: Sequence[StageWeight]


class LogLine(BaseModel):
    ts: datetime
    level: Literal["info", "warning", "error"]
    code: Literal["step.start", "model.selected", "artifact.written", "error", "step.finish", "job.finish"]
    message: str
    job_id: str
    step_id: Annotated[str | None, _SPARSE] = None
    item_index: Annotated[int | None, _SPARSE] = None


def job_view(job: Job, ahead: int | None = None) -> JobView:
    """`ahead`: how many jobs wait before it."""
    given = job.parameters.model_dump(mode="json", exclude={"type"})
    guidance = given.pop("guidance_scale", None)
    moments = (job.events[-1].at if job.events else None, job.finished_at, job.started_at, job.created_at)
    pictures = _pictures(job)
    return JobView(
        **job.model_dump(
            include={"id", "status", "created_at", "started_at", "finished_at", "attempt", "cost", "dead_lettered"}
        ),
        quality=job.quality,
        type=job.type,
        updated_at=max(moment for moment in moments if moment),
        steps=[Stage(name=job.type, status=job.status)],
        summary=Summary(count=_count(job), completed=len(pictures)),
        progress=_progress(job),
        parameters={**given, "guidance": guidance, "model_id": job.variant, "seed": job.seed},
        seeds=[job.seed if one.seed is None else one.seed for one in pictures.values()],
        timings={name: round(value, 4) for name, value in job.timings.model_dump(exclude_none=True).items()},
        queue_position=None if ahead is None else ahead + 1,
        error_code=job.error and job.error.code,
        error_message=job.error and job.error.message,
    )


def progress_view(job: Job) -> ProgressView:
    """Pictures are made one by one: all before the one that is being made are whole."""
    whole, done = _pictures(job), _progress(job) * _count(job)
    items = [
        ItemProgress(item_index=i, progress=1.0 if i in whole else round(min(1.0, max(0.0, done - i)), 4))
        for i in range(_count(job))
    ]
    return ProgressView(progress=_progress(job), items=items, stages=[StageWeight(name=job.type, weight=1.0)])


def artifact_view(job: Job, position: int, **link: Any) -> ArtifactView:
    """The job's artifact at `position`."""
    artifact = job.artifacts[position]
    return ArtifactView(
        id=f"{job.id}-{position}",
        role=artifact.role,
        format=_FORMATS.get(artifact.content_type) or artifact.path.rpartition(".")[2],
        width=artifact.width,
        height=artifact.height,
        seed=job.seed if artifact.seed is None else artifact.seed,
        item_index=position if artifact.index is None else artifact.index,
        bytes=artifact.size_bytes,
        content_type=artifact.content_type,
        s3_key=artifact.path,
        **link,
    )


def log_lines(job: Job, event: Event) -> Iterator[LogLine]:
    """What a log says of an event."""

    def line(code: Any, message: str, level: Any = "info", **more: Any) -> LogLine:
        more = {"step_id": job.type, **more}
        return LogLine(ts=event.at, level=level, code=code, message=message, job_id=job.id, **more)

    if event.artifact is not None:
        if event.artifact < len(job.artifacts):
            one = artifact_view(job, event.artifact)
            yield line("artifact.written", f"Stored {one.s3_key}", item_index=one.item_index)
    elif event.cause == Cause.CLAIMED:
        yield line("step.start", f"Began {job.type}")
        yield line("model.selected", " and ".join([f"Works with {job.variant}", *map(_used, _loras(job))]))
    elif event.error is not None and event.status.is_final:
        yield line("error", f"{event.error.code}: {event.error.message}", "error")
    elif event.cause in (Cause.LEASE_LOST, Cause.RETRIED, Cause.REQUEUED):
        why = event.error.message if event.error else _WHY.get(event.cause, event.cause)
        yield line("step.finish", f"Waits for another attempt: {why}", "warning")
    elif event.cause == Cause.SUCCEEDED:
        yield line("step.finish", f"Finished {job.type}")
    if event.status.is_final:
        yield line("job.finish", f"The job ended: {event.status}", step_id=None)


def _loras(job: Job) -> Sequence[LoraUse]:
    return getattr(job.parameters, "loras", ())


def _used(lora: LoraUse) -> str:
    ignored = " (its text encoder layers have no effect)" if lora.ignores_text_encoder else ""
    return f"the LoRA {lora.name} at {lora.scale:g}{ignored}"


def _count(job: Job) -> int:
    """Pictures that it asks for."""
    return int(getattr(job.parameters, "count", 1))


def _pictures(job: Job) -> Mapping[int, Artifact]:
    """Those that are stored, by number; one without a number is its job's only one."""
    return dict(sorted({one.index or 0: one for one in reversed(job.artifacts)}.items()))


def _progress(job: Job) -> float:
    if job.status == State.SUCCEEDED:
        return 1.0
    return round(min(0.9999, max(job.progress.fraction, len(_pictures(job)) / _count(job))), 4)
