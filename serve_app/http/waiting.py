"""Requests that wait until a job is over. Each counts as an event stream, and looks at the store together with them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from contextvars import Context

from fastapi import Request

from ..errors import StoreUnavailable, Unavailable, UnknownJob
from ..jobs.kinds import Caller
from ..jobs.record import Job
from .service import Service

#: Between two moves of an attended job's deadline, in seconds. One that fails is followed by others in time.
ATTEND_EVERY_S = 5.0

#: Jobs that are being left.
_LEAVING = set["asyncio.Task[None]"]()


async def looks(
    request: Request, job: Job, caller: Caller, *, limit_s: float, attends: bool = False
) -> AsyncGenerator[Job]:
    """The job at each look, until it is over or `limit_s` have passed: the last one may be of a job that goes on. With
    `attends`, it goes on for `LEFT_S` only once this has ended (`JobApi.leave`), unless others attend it, too.

    Raises Unavailable when this replica stops, so that the client asks another one; UnknownJob where the job was
    deleted; before the first look, what `Streams.watch` raises.
    """
    service: Service = request.app.state.service()
    jobs, time = service.jobs, asyncio.get_running_loop().time
    # A replica that stops gets no new requests: one that comes now is on another.
    stops, ends_at, attend_at = not service.is_stopping, time() + limit_s, 0.0
    # For all who watch it, whoever they are: each may see the job.
    watching = request.app.state.streams.watch(job, caller, jobs.settings.api, lambda: jobs.get(job.id, Caller()))
    try:
        async with watching as feed:
            while feed.job is not None:
                job = feed.job
                if attends and not job.status.is_final and time() >= attend_at:
                    attend_at = time() + ATTEND_EVERY_S
                    with suppress(StoreUnavailable):
                        await jobs.attend(job)
                yield job
                if job.status.is_final or time() >= ends_at:
                    return
                if stops and service.is_stopping:
                    raise Unavailable("this replica is stopping; ask again", retry_after_s=1)
                await feed.next_look(min(ATTEND_EVERY_S, ends_at - time()))
        raise UnknownJob(f"job {job.id} was deleted")
    finally:
        if attends and not job.status.is_final:
            # Not awaited: a request that was canceled may be so at every step.
            leaving = asyncio.create_task(jobs.leave(job, answered=False), context=Context())
            _LEAVING.add(leaving)
            leaving.add_done_callback(_LEAVING.discard)


async def waited(request: Request, job: Job, caller: Caller, *, limit_s: float, attends: bool = False) -> Job:
    """The last of its `looks`, which end at once when the client hangs up. Serve cancels a request then, other servers
    only say so."""

    async def last() -> Job:
        seen = job
        async for one in looks(request, job, caller, limit_s=limit_s, attends=attends):
            seen = one
        return seen

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    both = waiting, leaving = asyncio.create_task(last()), asyncio.create_task(hung_up())
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else job
    finally:
        waiting.cancel()
        leaving.cancel()
        await asyncio.gather(*both, return_exceptions=True)
