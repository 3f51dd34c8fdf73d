"""Requests that wait until a job is over. Each counts as an event stream, and looks at the store together with them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from fastapi import Request

from ..errors import StoreUnavailable, Unavailable, UnknownJob
from ..jobs.kinds import Caller
from ..jobs.record import Job
from .service import Service

#: Between two moves of an attended job's deadline, in seconds. One that fails is followed by others in time.
ATTEND_EVERY_S = 5.0


async def looks(
    request: Request, job: Job, caller: Caller, *, limit_s: float, attends: bool = False
) -> AsyncGenerator[Job]:
    """The job at each look, until it is over, the client has left, or `limit_s` have passed: the last one may be of a
    job that goes on. With `attends`, it does not go on for long once all who attend it have left (`JobApi.attend`).

    Raises Unavailable when this replica stops, so that the client asks another one; UnknownJob where the job was
    deleted; before the first look, what `Streams.watch` raises.
    """
    service: Service = request.app.state.service()
    jobs, time = service.jobs, asyncio.get_running_loop().time
    # A replica that stops gets no new requests: one that comes now is on another.
    stops, ends_at, attend_at = not service.is_stopping, time() + limit_s, 0.0
    # For all who watch it, whoever they are: each may see the job.
    watching = request.app.state.streams.watch(job, caller, jobs.settings.api, lambda: jobs.get(job.id, Caller()))
    async with watching as feed:
        while (seen := feed.job) is not None:
            if attends and not seen.status.is_final and time() >= attend_at:
                attend_at = time() + ATTEND_EVERY_S
                with suppress(StoreUnavailable):
                    await jobs.attend(seen)
            yield seen
            if seen.status.is_final or time() >= ends_at or await request.is_disconnected():
                return
            if stops and service.is_stopping:
                raise Unavailable("this replica is stopping; ask again", retry_after_s=1)
            await feed.next_look(min(ATTEND_EVERY_S, ends_at - time()))
    raise UnknownJob(f"job {job.id} was deleted")


async def waited(request: Request, job: Job, caller: Caller, *, limit_s: float, attends: bool = False) -> Job:
    """The last of its `looks`."""
    async with aclosing(looks(request, job, caller, limit_s=limit_s, attends=attends)) as seen:
        async for one in seen:
            job = one
    return job
