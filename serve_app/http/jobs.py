"""HTTP routes of jobs. They know no store."""

import re
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse
from pydantic import AfterValidator, ValidationError

from ..clock import utc_now
from ..jobs.api import Caller, JobApi
from ..jobs.record import Job, State
from ..parameters import ID_PATTERN, RUN_ID_PATTERN, JobType
from . import views
from .auth import caller_with
from .events import START, Feed, Position, Streams, last, parse, stream
from .forms import JOB_BODY, read_job
from .problems import Bodies, invalid, problems, wrong

if TYPE_CHECKING:
    from .app import Services

#: What of a job's log is answered, in lines.
TAIL, MAX_TAIL = 500, 2000
#: Links to artifacts live so long, in seconds.
MIN_LINK_S, MAX_LINK_S = 300, 86_400
#: More names no request of a client's.
_MAX_KEY_CHARS = 255

_Id = Annotated[str, Path(alias="id", pattern=ID_PATTERN)]
_Since = Annotated[
    datetime | None,
    Query(description="Only what happened since then: ISO 8601, or seconds of Unix."),
    AfterValidator(lambda at: at.replace(tzinfo=at.tzinfo or UTC) if at else None),
]
_Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="A request that is sent again with its key is answered with the job of the first; quoted or bare.",
    ),
]

_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')

#: A watched job, and after what; None where there is nothing more to come.
_Watched = tuple[Feed, Position | None] | None


def routes(service: "Services", bodies: Bodies, streams: Streams) -> APIRouter:
    made = APIRouter(prefix="/v1/jobs", responses=problems(401, 403, 422, 429, 503))
    _write(made, service, bodies)
    read = Annotated[Caller, Depends(caller_with(lambda: service().access, "read"))]
    _look(made, service, read)
    _fetch(made, service, read)
    _follow(made, service, read, streams)
    return made


def _write(made: APIRouter, service: "Services", bodies: Bodies) -> None:
    submit = Annotated[Caller, Depends(caller_with(lambda: service().access, "submit"))]
    posting: dict[str, Any] = {
        "status_code": 202,
        "responses": problems(400, 404, 408, 409, 413, 415),
        "openapi_extra": {"requestBody": JOB_BODY},
    }

    async def posted(request: Request, caller: Caller, response: Response, **by: str | None) -> views.PostedJob:
        body = await read_job(request, bodies, service().limits)
        try:
            job, _ = await service().jobs.post(body, caller, **by)
        except ValidationError as e:
            raise invalid(e) from None
        response.headers["Location"] = f"{request.scope.get('root_path', '')}/v1/jobs/{job.id}"
        return views.PostedJob(job=await _view(service().jobs, job))

    @made.post("", **posting)
    async def post_job(request: Request, response: Response, caller: submit, key: _Key = None) -> views.PostedJob:
        """Ask for a job. With an Idempotency-Key, a request that is sent again is answered with the same job."""
        return await posted(request, caller, response, idempotency_key=_bare(key))

    @made.put("/{id}", **posting)
    async def put_job(
        job_id: Annotated[str, Path(alias="id", pattern=RUN_ID_PATTERN)],
        request: Request,
        response: Response,
        caller: submit,
    ) -> views.PostedJob:
        """Ask for a job under an id of one's own. Sent again, it is answered with the same job."""
        return await posted(request, caller, response, job_id=job_id)

    @made.post("/{id}/cancel", responses=problems(404, 409))
    async def cancel_job(job_id: _Id, caller: submit) -> views.JobView:
        """Cancel a job: a waiting one never starts, a running one stops within a step. 409 if it has ended."""
        return views.job_view(await service().jobs.cancel(job_id, caller))

    @made.delete("/{id}", status_code=204, responses=problems(404, 409))
    async def delete_job(job_id: _Id, caller: submit) -> None:
        """Delete a job and what it made. 409 if it has not ended."""
        await service().jobs.delete(job_id, caller)


def _look(made: APIRouter, service: "Services", read: Any) -> None:
    @made.get("")
    async def list_jobs(
        caller: read,
        job_type: Annotated[JobType | None, Query(alias="type")] = None,
        status: State | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 20,
        cursor: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
    ) -> views.JobList:
        """Jobs, newest first."""
        found = await service().jobs.list(caller, type=job_type, status=status, after=cursor, limit=limit + 1)
        page = found[:limit]
        following = page[-1].id if len(found) > limit else None
        return views.JobList(jobs=[views.job_view(job) for job in page], next_cursor=following)

    @made.get("/{id}", responses=problems(404))
    async def get_job(job_id: _Id, caller: read) -> views.JobView:
        """A job."""
        return await _view(service().jobs, await service().jobs.get(job_id, caller))

    @made.get("/{id}/progress", responses=problems(404))
    async def get_progress(job_id: _Id, caller: read) -> views.ProgressView:
        """How far a job is, and each of its pictures."""
        return views.progress_view(await service().jobs.get(job_id, caller))


def _fetch(made: APIRouter, service: "Services", read: Any) -> None:
    @made.get("/{id}/artifacts", responses=problems(404))
    async def list_artifacts(
        job_id: _Id,
        caller: read,
        expires_s: Annotated[int | None, Query(description="Of the links, in seconds; 300 to 86400.")] = None,
    ) -> views.ArtifactList:
        """What a job has made so far, each with a link."""
        jobs = service().jobs
        job = await jobs.get(job_id, caller)
        lasts_s = max(MIN_LINK_S, min(MAX_LINK_S, jobs.settings.api.link_s if expires_s is None else expires_s))
        until = utc_now() + timedelta(seconds=lasts_s)
        artifacts = [
            views.LinkedArtifact(
                **views.row(job, position).model_dump(), url=await jobs.link(artifact, lasts_s), expires_at=until
            )
            for position, artifact in enumerate(job.artifacts)
        ]
        return views.ArtifactList(artifacts=sorted(artifacts, key=lambda one: one.item_index))

    line = {"schema": {"$ref": "#/components/schemas/LogLine"}}
    lines: dict[int | str, Any] = {
        200: {"description": "One JSON object a line.", "content": {"application/x-ndjson": line}}
    }

    @made.get("/{id}/logs", response_class=Response, responses={**lines, **problems(404)})
    async def get_logs(
        job_id: _Id,
        caller: read,
        tail: Annotated[int, Query(ge=1, le=MAX_TAIL)] = TAIL,
        since_ts: _Since = None,
    ) -> Response:
        """The newest lines of a job's log, oldest first."""
        job = await service().jobs.get(job_id, caller)
        events = [event for event in job.events if not since_ts or event.at >= since_ts]
        found = [line for event in events for line in views.log_lines(job, event)]
        text = "".join(line.model_dump_json(exclude_none=True) + "\n" for line in found[-tail:])
        return Response(text, media_type="application/x-ndjson")


def _follow(made: APIRouter, service: "Services", read: Any, streams: Streams) -> None:
    async def watched(
        job_id: _Id,
        caller: read,
        header: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
        query: Annotated[str | None, Query(alias="last_event_id")] = None,
    ) -> AsyncGenerator[_Watched]:
        jobs = service().jobs
        job = await jobs.get(job_id, caller)
        named = header or query
        after = parse(named) if named else START
        if named and job.status.is_final and after == last(job):
            yield None
            return
        # For all who watch it, whoever they are: each was shown the job before.
        async with streams.watch(job, caller, jobs.settings.api, lambda: jobs.get(job_id, Caller())) as feed:
            yield feed, after

    async def follow(watched: Annotated[_Watched, Depends(watched)], since_ts: _Since = None) -> Response:
        """What happens to a job, as server-sent events: `state`, `artifact`, `log`, `error`, which are replayed after
        Last-Event-ID; `progress`; and `snapshot`, the whole job, where what follows Last-Event-ID is not kept. 204 when
        there is nothing more to come."""
        if watched is None:
            return Response(status_code=204)
        feed, after = watched
        lasts_s = service().jobs.settings.api.stream_s
        content = stream(feed, after=after, since=since_ts, lasts_s=lasts_s, is_stopping=lambda: service().is_stopping)
        return EventSourceResponse(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    answers: dict[int | str, Any] = {
        200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}},
        204: {"description": "The job is over, and Last-Event-ID is its last event."},
        **problems(404),
    }
    for path in ("/events", "/progress/stream"):
        options: dict[str, Any] = {"response_class": Response, "responses": answers}
        made.get("/{id}" + path, operation_id="follow" + path.replace("/", "_"), **options)(follow)


async def _view(jobs: JobApi, job: Job) -> views.JobView:
    return views.job_view(job, await jobs.ahead(job) if job.status == State.QUEUED else None)


def _bare(key: str | None) -> str | None:
    """The value of an Idempotency-Key, which is a string of structured fields (RFC 9651), or bare."""
    if key is None:
        return None
    bare = key.strip()
    if quoted := _QUOTED.fullmatch(bare):
        bare = re.sub(r'\\(["\\])', r"\1", quoted[1])
    if not 1 <= len(bare) <= _MAX_KEY_CHARS:
        raise wrong("Idempotency-Key", f"it must have 1 to {_MAX_KEY_CHARS} characters", where="header")
    return bare
