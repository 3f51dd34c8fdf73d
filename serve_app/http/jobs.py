"""HTTP routes of jobs. They know no store."""

import re
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from ..clock import utc_now
from ..jobs.kinds import Caller
from ..jobs.record import Job, State
from ..parameters import ID_PATTERN, RUN_ID_PATTERN
from . import views
from .events import START, Feed, Position, last, parse, stream
from .forms import JOB_BODY, read_job
from .problems import invalid, problems
from .service import Served, Service, caller_with

#: What of a job's log is answered, in lines.
TAIL, MAX_TAIL = 500, 2000
#: Links to artifacts live so long, in seconds.
MIN_LINK_S, MAX_LINK_S = 300, 86_400

_CURSOR = r"\A[0-9]{1,16}-[A-Za-z0-9_-]{1,128}\z"
_EPOCH = datetime.fromtimestamp(0, UTC)

_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')


def _bare(key: str) -> str:
    """The value of an Idempotency-Key, which is a string of structured fields (RFC 9651), or bare."""
    quoted = _QUOTED.fullmatch(key.strip())
    return re.sub(r'\\(["\\])', r"\1", quoted[1]) if quoted else key.strip()


_Key = Annotated[
    Annotated[str, BeforeValidator(_bare), Field(min_length=1, max_length=255)] | None,
    Header(
        alias="Idempotency-Key",
        description="A request that is sent again with its key is answered with the job of the first; quoted or bare.",
    ),
]
_Since = Annotated[
    datetime | None,
    Query(description="Only what happened since then: ISO 8601, or seconds of Unix."),
    AfterValidator(lambda at: at.replace(tzinfo=at.tzinfo or UTC) if at else None),
]
JobId = Annotated[str, Path(alias="id", pattern=ID_PATTERN)]
Cursor = Annotated[str | None, Query(pattern=_CURSOR)]
Reader = Annotated[Caller, caller_with("read")]
Submitter = Annotated[Caller, caller_with("submit")]
Operator = Annotated[Caller, caller_with("admin")]


async def _shown(job_id: JobId, caller: Reader, service: Served) -> Job:
    return await service.jobs.get(job_id, caller)


#: The job that a path names. Raises UnknownJob.
Shown = Annotated[Job, Depends(_shown)]

router = APIRouter(prefix="/v1/jobs", responses=problems(401, 403, 422, 429, 503))
_POSTING: dict[str, Any] = {
    "status_code": 202,
    "responses": problems(400, 404, 408, 409, 413, 415),
    "openapi_extra": {"requestBody": JOB_BODY},
}


@router.post("", **_POSTING)
async def post_job(
    request: Request, response: Response, service: Served, caller: Submitter, key: _Key = None
) -> views.PostedJob:
    """Ask for a job. With an Idempotency-Key, a request that is sent again is answered with the same job."""
    return await _posted(request, response, service, caller, idempotency_key=key)


@router.put("/{id}", **_POSTING)
async def put_job(
    job_id: Annotated[str, Path(alias="id", pattern=RUN_ID_PATTERN)],
    request: Request,
    response: Response,
    service: Served,
    caller: Submitter,
) -> views.PostedJob:
    """Ask for a job under an id of one's own. Sent again, it is answered with the same job."""
    return await _posted(request, response, service, caller, job_id=job_id)


async def _posted(
    request: Request, response: Response, service: Service, caller: Caller, **by: str | None
) -> views.PostedJob:
    body = await read_job(request, service.limits)
    try:
        job, _ = await service.jobs.post(body, caller, **by)
    except ValidationError as e:
        raise invalid(e) from None
    response.headers["Location"] = f"{request.scope.get('root_path', '')}/v1/jobs/{job.id}"
    return views.PostedJob(job=await get_job(job, service))


@router.get("")
async def list_jobs(
    service: Served,
    caller: Reader,
    job_type: Annotated[views.PostedType | None, Query(alias="type")] = None,
    status: State | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
    cursor: Cursor = None,
) -> views.JobList:
    """Jobs, newest first."""
    found, following = await page(service, caller, cursor, limit, type=job_type, status=status)
    return views.JobList(jobs=[views.job_view(job) for job in found], next_cursor=following)


async def page(
    service: Service, caller: Caller, cursor: str | None, limit: int, **query: Any
) -> tuple[Sequence[Job], str | None]:
    """Posted jobs behind `cursor`, newest first, and the next page's cursor."""
    before = _place(cursor) if cursor else None
    found = await service.jobs.list(caller, before=before, limit=limit + 1, **query)
    following = _cursor(found[limit - 1]) if len(found) > limit else None
    return [job for job in found[:limit] if job.type in views.POSTED], following


def _cursor(job: Job) -> str:
    """A job's place in a list, which it keeps when it is deleted: microseconds of Unix, and its id."""
    return f"{(job.created_at - _EPOCH) // timedelta(microseconds=1)}-{job.id}"


def _place(cursor: str) -> tuple[datetime, str]:
    microseconds, _, job_id = cursor.partition("-")
    return _EPOCH + timedelta(microseconds=int(microseconds)), job_id


@router.get("/{id}", responses=problems(404))
async def get_job(job: Shown, service: Served) -> views.JobView:
    """A job."""
    return views.job_view(job, await service.jobs.ahead(job) if job.status == State.QUEUED else None)


@router.delete("/{id}", status_code=204, responses=problems(404, 409))
async def delete_job(job_id: JobId, service: Served, caller: Submitter) -> None:
    """Delete a job and what it made. 409 if it has not ended."""
    await service.jobs.delete(job_id, caller)


@router.post("/{id}/cancel", responses=problems(404, 409))
async def cancel_job(job_id: JobId, service: Served, caller: Submitter) -> views.JobView:
    """Cancel a job: a waiting one never starts, a running one stops within a step. 409 if it has ended."""
    return views.job_view(await service.jobs.cancel(job_id, caller))


@router.post("/{id}/replay", responses=problems(404, 409))
async def replay_job(job_id: JobId, service: Served, caller: Operator) -> views.JobView:
    """Run a failed job again, with all its attempts, as replaying its dead letter does. 409 if it has not failed."""
    return views.job_view(await service.jobs.replay(job_id, caller))


@router.get("/{id}/progress", responses=problems(404))
async def get_progress(job: Shown) -> views.ProgressView:
    """How far a job is, and each of its pictures."""
    return views.progress_view(job)


@router.get("/{id}/artifacts", responses=problems(404))
async def list_artifacts(
    job: Shown,
    service: Served,
    expires_s: Annotated[int | None, Query(description="Of the links, in seconds; 300 to 86400.")] = None,
) -> views.ArtifactList:
    """What a job has made so far, each with a link."""
    jobs = service.jobs
    lasts_s = max(MIN_LINK_S, min(MAX_LINK_S, jobs.settings.api.link_s if expires_s is None else expires_s))
    until = utc_now() + timedelta(seconds=lasts_s)
    artifacts = [
        views.artifact_view(job, position, url=await jobs.link(artifact, lasts_s), expires_at=until)
        for position, artifact in enumerate(job.artifacts)
    ]
    return views.ArtifactList(artifacts=sorted(artifacts, key=lambda one: one.item_index))


_LINES = {"application/x-ndjson": {"schema": {"$ref": "#/components/schemas/LogLine"}}}


@router.get(
    "/{id}/logs",
    response_class=Response,
    responses={200: {"description": "One JSON object a line.", "content": _LINES}, **problems(404)},
)
async def get_logs(
    job: Shown, tail: Annotated[int, Query(ge=1, le=MAX_TAIL)] = TAIL, since_ts: _Since = None
) -> Response:
    """The newest lines of a job's log, oldest first."""
    events = [event for event in job.events if not since_ts or event.at >= since_ts]
    found = [line for event in events for line in views.log_lines(job, event)]
    text = "".join(line.model_dump_json() + "\n" for line in found[-tail:])
    return Response(text, media_type="application/x-ndjson")


async def _watched(
    request: Request,
    job: Shown,
    caller: Reader,
    service: Served,
    header: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
    query: Annotated[str | None, Query(alias="last_event_id")] = None,
) -> AsyncGenerator[tuple[Feed, Position | None]]:
    """A job, and after which of its messages it is watched."""
    named, jobs, streams = header or query, service.jobs, request.app.state.streams
    after = parse(named) if named else START
    if named and job.status.is_final and after == last(job):
        raise HTTPException(204)
    # For all who watch it, whoever they are: each was shown the job before.
    watching = streams.watch(job, caller, jobs.settings.api, lambda: jobs.get(job.id, Caller()))
    async with watching as feed:
        yield feed, after


_FOLLOWING: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}},
        204: {"description": "The job is over, and Last-Event-ID is its last event."},
        **problems(404),
    },
}


@router.get("/{id}/progress/stream", operation_id="follow_progress_stream", **_FOLLOWING)
@router.get("/{id}/events", operation_id="follow_events", **_FOLLOWING)
async def follow(
    watched: Annotated[tuple[Feed, Position | None], Depends(_watched)], service: Served, since_ts: _Since = None
) -> Response:
    """What happens to a job, as server-sent events: `state`, `artifact`, `log`, `error`, which are replayed after
    Last-Event-ID; `progress`; and `snapshot`, the whole job, where what follows Last-Event-ID is not kept. 204 when
    there is nothing more to come."""
    lasts_s = service.jobs.settings.api.stream_s
    content = stream(*watched, since_ts, lasts_s=lasts_s, is_stopping=lambda: service.is_stopping)
    return EventSourceResponse(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
