"""Requests that wait until a job is over."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import httpx
import pytest
from fastapi import Request

from serve_app.errors import FluxFillError, RateLimited, Unavailable, UnknownJob
from serve_app.http import waiting
from serve_app.http.app import create_app
from serve_app.http.events import Streams
from serve_app.http.waiting import waited
from serve_app.jobs.api import LEFT_S
from serve_app.jobs.kinds import Caller
from serve_app.jobs.record import Job, State

from .http_service import Process
from .rig import wait_for
from .serving import App
from .test_events import settled
from .test_generate import Studio

ONE = Caller(id="one", sees_all=False, sees_messages=False)


class Replica:
    def __init__(self, studio: Studio) -> None:
        self.studio, self.process, self.streams = studio, Process(studio), Streams(poll_s=0.01)
        self.app = create_app(lambda: self.process, streams=self.streams)

    def request(self) -> tuple[Request, asyncio.Event]:
        """And what is set when its client hangs up."""
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        return Request({"type": "http", "app": self.app}, receive), gone

    def wait(self, job: Job, **options: Any) -> tuple["asyncio.Task[Job]", asyncio.Event]:
        request, gone = self.request()
        given: dict[str, Any] = {"limit_s": 60, "attends": True, **options}
        waits: Coroutine[Any, Any, Job] = waited(request, job, ONE, **given)
        return asyncio.create_task(waits), gone


@pytest.fixture
async def replica(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replica]:
    monkeypatch.setattr(waiting, "ATTEND_EVERY_S", 0.02)
    async with asyncio.timeout(30):
        yield Replica(Studio(api={"streams": 2}))


async def ended(replica: Replica, job: Job) -> Job:
    """As a worker that comes by now leaves it."""
    await replica.studio.work()
    found = await replica.studio.jobs.get(job.id)
    assert found is not None
    return found


async def test_it_ends_with_the_job(replica: Replica) -> None:
    job = await replica.studio.post(ONE)
    task, _ = replica.wait(job)
    await settled(lambda: replica.streams._open.total() == 1)
    assert (await ended(replica, job)).status == State.SUCCEEDED
    assert (await task).status == State.SUCCEEDED
    again, _ = replica.wait(job)
    assert len((await again).artifacts) == 1
    assert not replica.streams._open.total()


async def test_a_job_goes_on_while_one_of_those_who_wait_is_left(replica: Replica) -> None:
    """On whichever replica. 30 s later there is no other trace of the first."""
    job = await replica.studio.post(ONE)
    other = Replica(replica.studio.beside())
    (first, gone), (second, _) = replica.wait(job), other.wait(job)
    await settled(lambda: replica.streams._open.total() + other.streams._open.total() == 2)
    gone.set()
    assert (await first).status == State.QUEUED
    for _ in range(3):
        replica.studio.clock.advance(15)
        deadline = await _deadline(replica, job)
        while await _deadline(replica, job) == deadline:
            await asyncio.sleep(0.01)
    assert (await ended(replica, job)).status == State.SUCCEEDED
    assert (await second).status == State.SUCCEEDED


async def test_a_job_that_nobody_waits_for_any_more_is_not_painted(replica: Replica) -> None:
    job = await replica.studio.post(ONE)
    task, gone = replica.wait(job)
    await settled(lambda: replica.streams._open.total() == 1)
    gone.set()
    await task
    replica.studio.clock.advance(30)
    assert (await ended(replica, job)).status == State.EXPIRED
    assert not replica.studio.painter.requests


async def test_one_whose_request_is_canceled_has_left(replica: Replica) -> None:
    """As Serve does it when a client hangs up."""
    job = await replica.studio.post(ONE)
    task, _ = replica.wait(job)
    await settled(lambda: replica.streams._open.total() == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not replica.streams._open.total() and not replica.streams._feeds


async def test_a_job_that_was_left_says_so_at_once(replica: Replica) -> None:
    """So that the client that comes again finds it; also if there was no room to wait for it."""
    job = await replica.studio.post(ONE)
    task, gone = replica.wait(job)
    await settled(lambda: replica.streams._open.total() == 1)
    gone.set()
    await task
    while await _left_s(replica, job) != LEFT_S:
        await asyncio.sleep(0.01)
    others = [replica.wait(await replica.studio.post(ONE))[0] for _ in range(2)]
    await settled(lambda: replica.streams._open.total() == 2)
    refused = await replica.studio.post(ONE)
    with pytest.raises(Unavailable):
        await replica.wait(refused)[0]
    while await _left_s(replica, refused) != LEFT_S:
        await asyncio.sleep(0.01)
    for other in others:
        other.cancel()


async def test_without_attending_the_job_goes_on_after_the_limit(replica: Replica) -> None:
    job = await replica.studio.post(ONE)
    task, _ = replica.wait(job, limit_s=0.05, attends=False)
    assert (await task).status == State.QUEUED
    replica.studio.clock.advance(3600)
    assert (await ended(replica, job)).status == State.SUCCEEDED


async def test_a_replica_that_stops_sends_its_clients_away_but_not_those_that_come(replica: Replica) -> None:
    """`is_stopping` may be of another replica: this one, which gets new requests, goes on."""
    job = await replica.studio.post(ONE)
    before, _ = replica.wait(job)
    await settled(lambda: replica.streams._open.total() == 1)
    replica.process.is_stopping = True
    after, _ = replica.wait(job)
    with pytest.raises(Unavailable) as refusal:
        await before
    assert refusal.value.details["retry_after_s"] == 1
    await ended(replica, job)
    assert (await after).status == State.SUCCEEDED


async def test_those_who_wait_are_counted_as_streams(replica: Replica) -> None:
    replica.process.jobs.settings = replica.studio.settings.model_copy(
        update={"api": replica.studio.settings.api.model_copy(update={"streams": 3, "streams_per_key": 2})}
    )
    job = await replica.studio.post(ONE)
    held = [replica.wait(job)[0] for _ in range(2)]
    await settled(lambda: replica.streams._open.total() == 2)
    with pytest.raises(RateLimited):
        await replica.wait(job)[0]
    await ended(replica, job)
    assert {(await one).status for one in held} == {State.SUCCEEDED}


async def test_a_deleted_job_and_a_store_that_is_down(replica: Replica) -> None:
    job = await replica.studio.post(ONE)
    task, _ = replica.wait(job)
    await settled(lambda: replica.streams._open.total() == 1)
    replica.studio.jobs.is_down = True
    calls = replica.studio.jobs.calls["update"]
    await settled(lambda: replica.studio.jobs.calls["update"] > calls + 1)
    assert not task.done()
    replica.studio.jobs.is_down = False
    await replica.studio.jobs.delete(job.id)
    with pytest.raises(UnknownJob) as gone:
        await task
    assert isinstance(gone.value, FluxFillError) and not replica.streams._open.total()


async def _left_s(replica: Replica, job: Job) -> float:
    deadline = await _deadline(replica, job)
    return 0 if deadline is None else (deadline - replica.studio.clock.now).total_seconds()


async def _deadline(replica: Replica, job: Job) -> Any:
    found = await replica.studio.jobs.get(job.id)
    assert found is not None
    return found.deadline


@pytest.mark.serve
def test_on_serve_a_job_is_left_by_the_client_that_hangs_up(app: App) -> None:
    """Serve cancels its request. One that comes again takes the job over; it ends when that one has left, too."""
    slow = {"prompt": "a slow cat", "model": "tiny-flux-dev", "n": 10, "steps": 100}

    def newest() -> Any:
        (job,) = httpx.get(f"{app.http}/v1/jobs?limit=1").json()["jobs"]
        return job

    with socket.create_connection(("127.0.0.1", int(app.http.rpartition(":")[2]))) as first:
        body = json.dumps(slow).encode()
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        first.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: newest()["parameters"]["prompt"] == slow["prompt"])
    job = newest()
    url = f"{app.http}/v1/images/generations"
    again = {"json": slow | {"stream": True}, "headers": {"X-Stainless-Retry-Count": "1"}, "timeout": 60}
    with httpx.stream("POST", url, **again) as answer:
        next(line for line in answer.iter_lines() if line.startswith(":"))
    assert newest()["id"] == job["id"]
    wait_for(lambda: newest()["status"] == "expired", 40)
