"""How jobs look over HTTP: the shapes, made from records. Knows no store."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..jobs.record import Artifact, Cause, Event, Job, State
from ..parameters import JobType

#: Names that parameters have over HTTP, where those differ from the record's.
_NAMES = {"guidance_scale": "guidance"}
#: By content type.
_FORMATS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True)


class Stage(_Shape):
    name: str
    status: State


class Summary(_Shape):
    #: Pictures that are asked for, and those that are stored.
    count: int
    completed: int


class JobLine(_Shape):
    """A job in the list of all."""

    id: str
    type: JobType
    status: State
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    summary: Summary
    #: 0..1.
    progress: float
    error_code: str | None
    error_message: str | None


class JobView(JobLine):
    """A job."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "5b3fd13c5d8f4d6d8a4c5a8e8d0c9b11",
                    "type": "generate",
                    "status": "running",
                    "created_at": "2026-11-30T12:00:00Z",
                    "updated_at": "2026-11-30T12:00:02Z",
                    "started_at": "2026-11-30T12:00:02Z",
                    "finished_at": None,
                    "summary": {"count": 2, "completed": 1},
                    "progress": 0.75,
                    "error_code": None,
                    "error_message": None,
                    "steps": [{"name": "generate", "status": "running"}],
                    "parameters": {
                        "prompt": "an old-growth forest at dawn",
                        "steps": 24,
                        "model_id": "sdxl",
                        "seed": 7,
                    },
                    "seeds": [7],
                    "timings": {},
                    "queue_position": None,
                    "attempt": 1,
                }
            ]
        }
    )

    #: Its stages. How many denoising steps a picture takes is `parameters.steps`.
    steps: Sequence[Stage]
    #: What the pictures are made with: what was asked for, and the model's own values for all else.
    parameters: Mapping[str, Any]
    #: Of the pictures that are stored, in their order.
    seeds: Sequence[int]
    #: Seconds by stage, once the job is over.
    timings: Mapping[str, float]
    #: 1 for the job that its model takes next; null for a job that does not wait.
    queue_position: int | None
    #: Attempts used, the running one included.
    attempt: int


class PostedJob(_Shape):
    job: JobView


class JobList(_Shape):
    jobs: Sequence[JobLine]
    #: For the next page's `cursor`; null on the last one.
    next_cursor: str | None


class ArtifactRow(_Shape):
    id: str
    format: str
    width: int | None
    height: int | None
    seed: int | None
    #: Which picture of the job, from 0.
    item_index: int
    bytes: int | None
    content_type: str
    #: Where the blob store has it.
    s3_key: str


class LinkedArtifact(ArtifactRow):
    #: Signed anew in each answer, and valid until `expires_at`.
    url: str
    expires_at: datetime


class ArtifactList(_Shape):
    artifacts: Sequence[LinkedArtifact]


class ItemProgress(_Shape):
    item_index: int
    #: 0..1.
    progress: float


class StageWeight(_Shape):
    name: str
    #: Its share of the whole.
    weight: float


class ProgressView(_Shape):
    #: 0..1.
    progress: float
    items: Sequence[ItemProgress]
    stages: Sequence[StageWeight]


class LogLine(_Shape):
    ts: datetime
    level: Literal["info", "warning", "error"]
    code: Literal["step.start", "model.selected", "artifact.written", "error", "step.finish", "job.finish"]
    message: str
    job_id: str
    step_id: str | None = None
    item_index: int | None = None


def job_line(job: Job) -> JobLine:
    return JobLine(**_line(job))


def job_view(job: Job, ahead: int | None = None) -> JobView:
    """`ahead`: how many jobs wait before it."""
    return JobView(
        **_line(job),
        steps=[Stage(name=job.type, status=job.status)],
        parameters=_parameters(job),
        seeds=[job.seed if one.seed is None else one.seed for _, one in _completed(job)],
        timings=job.timings.model_dump(exclude_none=True),
        queue_position=None if ahead is None else ahead + 1,
        attempt=job.attempt,
    )


def progress_view(job: Job) -> ProgressView:
    """Pictures are made one by one: all before the one that is being made are whole."""
    whole, done = {index for index, _ in _completed(job)}, progress(job) * count(job)
    items = [
        ItemProgress(item_index=i, progress=1.0 if i in whole else round(min(1.0, max(0.0, done - i)), 4))
        for i in range(count(job))
    ]
    return ProgressView(progress=progress(job), items=items, stages=[StageWeight(name=job.type, weight=1.0)])


def _line(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "type": job.type,
        "status": job.status,
        "created_at": job.created_at,
        "updated_at": updated_at(job),
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "summary": Summary(count=count(job), completed=len(_completed(job))),
        "progress": progress(job),
        "error_code": job.error.code if job.error else None,
        "error_message": job.error.message if job.error else None,
    }


def count(job: Job) -> int:
    """Pictures that it asks for."""
    return int(getattr(job.parameters, "count", 1))


def progress(job: Job) -> float:
    """0..1; 1 only for a job that has succeeded."""
    if job.status == State.SUCCEEDED:
        return 1.0
    return round(min(0.9999, max(job.progress.fraction, len(_completed(job)) / count(job))), 4)


def updated_at(job: Job) -> datetime:
    moments = (job.events[-1].at if job.events else None, job.finished_at, job.started_at)
    return max((moment for moment in moments if moment), default=job.created_at)


def rows(job: Job) -> Sequence[tuple[ArtifactRow, Artifact]]:
    """Ordered by the picture they are of."""
    found = [(row(job, position), artifact) for position, artifact in enumerate(job.artifacts)]
    return sorted(found, key=lambda pair: pair[0].item_index)


def row(job: Job, position: int) -> ArtifactRow:
    """The job's artifact at `position`."""
    artifact = job.artifacts[position]
    return ArtifactRow(
        id=f"{job.id}-{position}",
        format=_FORMATS.get(artifact.content_type) or artifact.path.rpartition(".")[2],
        width=artifact.width,
        height=artifact.height,
        seed=job.seed if artifact.seed is None else artifact.seed,
        item_index=position if artifact.index is None else artifact.index,
        bytes=artifact.size_bytes,
        content_type=artifact.content_type,
        s3_key=artifact.path,
    )


def log_lines(job: Job, event: Event) -> Iterator[LogLine]:
    """What a log says of an event."""

    def line(code: Any, message: str, level: Any = "info", **more: Any) -> LogLine:
        return LogLine(ts=event.at, level=level, code=code, message=message, job_id=job.id, **more)

    stage = {"step_id": job.type}
    if event.artifact is not None:
        if event.artifact < len(job.artifacts):
            one = row(job, event.artifact)
            yield line("artifact.written", f"Stored {one.s3_key}", **stage, item_index=one.item_index)
    elif event.cause == Cause.CLAIMED:
        yield line("step.start", f"Began {job.type}", **stage)
        yield line("model.selected", f"Works with {job.variant}", **stage)
    elif event.error is not None:
        yield line("error", f"{event.error.code}: {event.error.message}", "error", **stage)
    elif event.cause in (Cause.LEASE_LOST, Cause.RETRIED, Cause.REQUEUED):
        yield line("step.finish", f"Waits for another attempt: {event.cause}", "warning", **stage)
    elif event.cause == Cause.SUCCEEDED:
        yield line("step.finish", f"Finished {job.type}", **stage)
    if event.status.is_final:
        yield line("job.finish", f"The job has {_ENDS[event.status]}")


_ENDS = {
    State.SUCCEEDED: "succeeded",
    State.FAILED: "failed",
    State.CANCELED: "been canceled",
    State.EXPIRED: "expired",
}


def _completed(job: Job) -> Sequence[tuple[int, Artifact]]:
    """The pictures that are stored, each with its number; of a job that makes one, that one's."""
    if count(job) == 1 and job.type != "generate":
        return [(0, job.artifacts[0])] if job.status == State.SUCCEEDED and job.artifacts else []
    return sorted(((one.index, one) for one in job.artifacts if one.index is not None), key=lambda pair: pair[0])


def _parameters(job: Job) -> Mapping[str, Any]:
    given = job.parameters.model_dump(mode="json", exclude={"type"})
    named = {_NAMES.get(name, name): value for name, value in given.items()}
    return {**named, "model_id": job.variant, "seed": job.seed}
