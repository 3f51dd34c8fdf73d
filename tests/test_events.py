"""Event streams: replayed after any message, on any replica, each event once and in order."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from serve_app.errors import FluxFillError
from serve_app.http.events import START, Feed, Streams, last, parse, stream, told
from serve_app.jobs.kinds import Caller
from serve_app.jobs.record import MAX_EVENTS, Artifact, Cause, Job, JobError, State
from serve_app.models import Progress
from serve_app.parameters import GenerateParameters
from serve_app.settings import ApiSettings

from .test_generate import Studio
from .test_job_api import BODY, Site, refused

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PARAMETERS = GenerateParameters(prompt="a cat", width=64, height=64, steps=2, guidance_scale=7.0, count=3)


@dataclass(frozen=True)
class Message:
    event: str
    data: Any
    id: str


def parsed(text: str) -> Iterator[Message]:
    """As EventSource reads them; comments and `retry` alone are none."""
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if "data" in fields:
            yield Message(fields["event"], json.loads(fields["data"]), fields.get("id", ""))


class Replica(Site):
    """One of several over the same stores, which can be cut off in the middle of a stream."""

    def __init__(self, studio: Studio) -> None:
        self.streams = Streams(poll_s=0.01)
        super().__init__(studio, streams=self.streams)

    async def follow(self, job_id: str, after: str = "", tail: str = "events") -> AsyncGenerator[Message]:
        """Chunk by chunk: httpx' ASGI transport would wait for the end."""
        chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        headers = [(b"host", b"127.0.0.1"), *([(b"last-event-id", after.encode())] if after else [])]
        scope = {"type": "http", "method": "GET", "path": f"/v1/jobs/{job_id}/{tail}", "query_string": b""}
        scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 8000)}
        gone = asyncio.Event()

        async def receive() -> Any:
            if not (begun := scope.setdefault("begun", [])):
                begun.append(True)
                return {"type": "http.request", "body": b"", "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert message["status"] == 200
            else:
                await chunks.put(message["body"])

        app = asyncio.create_task(self.http._transport.app(scope, receive, send))  # type: ignore[attr-defined]
        app.add_done_callback(lambda _: chunks.put_nowait(None))
        try:
            while (chunk := await chunks.get()) is not None:
                for message in parsed(chunk.decode()):
                    yield message
        finally:
            gone.set()
            await app


@pytest.fixture
async def replicas() -> AsyncIterator[list[Replica]]:
    studio = Studio()
    made = [Replica(studio), Replica(studio.beside())]
    yield made
    for one in made:
        await one.http.aclose()


async def whole(messages: AsyncGenerator[Message]) -> list[Message]:
    async with asyncio.timeout(10):
        return [message async for message in messages]


def stored(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message.event != "progress"]


# A client


@pytest.mark.parametrize("seed", range(5))
async def test_a_client_that_is_cut_again_and_again_sees_each_event_once_in_order(
    replicas: list[Replica], seed: int
) -> None:
    """Each time it lands on the other replica."""
    cuts, site = random.Random(seed), replicas[0]

    async def slowly(_: Any) -> None:
        await asyncio.sleep(0.02)

    site.studio.painter.before = slowly
    job = await site.post(count=6)
    working = asyncio.create_task(site.studio.work())
    seen: list[Message] = []
    connections = 0
    async with asyncio.timeout(20):
        while not (seen and seen[-1].data.get("status") == "succeeded"):
            replica = replicas[connections % 2]
            connections += 1
            left = cuts.randint(1, 3)
            async with aclosing(replica.follow(job["id"], seen[-1].id if seen else "")) as messages:
                async for message in messages:
                    if message.event != "progress":
                        seen.append(message)
                        left -= 1
                    if not left:
                        break
    await working
    assert connections > 5
    assert seen == stored(await whole(replicas[1].follow(job["id"])))
    ids = [parse(message.id) for message in seen]
    assert ids == sorted(set(ids), key=lambda one: one or START) and None not in ids
    assert [one.data["item_index"] for one in seen if one.event == "artifact"] == list(range(6))
    assert [one.data["status"] for one in seen if one.event == "state"] == ["queued", "running", "succeeded"]


async def test_both_paths_give_the_same(replicas: list[Replica]) -> None:
    job = await replicas[0].done(count=2)
    events = await whole(replicas[0].follow(job["id"]))
    assert await whole(replicas[1].follow(job["id"], tail="progress/stream")) == events
    assert {one.event for one in events} == {"state", "artifact", "log", "progress"}
    assert events[-1].data.items() >= {"job_id": job["id"], "status": "succeeded"}.items()


async def test_after_the_last_event_there_is_nothing_more(replicas: list[Replica]) -> None:
    site = replicas[0]
    job = await site.done()
    path, end = f"/v1/jobs/{job['id']}/events", (await whole(site.follow(job["id"])))[-1].id
    for request in ({"headers": {"Last-Event-ID": end}}, {"params": {"last_event_id": end}}):
        answer = await site.http.get(path, **request)
        assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("after", ["99.0", "1.9", "0.1", "none", "1", "-1.0", "1.0.0", "9" * 5000, "\u0661.\u0660"])
async def test_an_unknown_id_is_answered_with_the_whole_job(replicas: list[Replica], after: str) -> None:
    site = replicas[0]
    job = await site.done(count=2)
    answer = await site.http.get(f"/v1/jobs/{job['id']}/events", params={"last_event_id": after})
    progress, snapshot = parsed(answer.text)
    assert (progress.event, snapshot.event) == ("progress", "snapshot")
    assert snapshot.data == await site.get(f"/v1/jobs/{job['id']}")
    again = await site.http.get(f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": snapshot.id})
    assert again.status_code == 204


async def test_headers_keep_proxies_from_holding_a_stream(replicas: list[Replica]) -> None:
    job = await replicas[0].done()
    answer = await replicas[0].http.get(f"/v1/jobs/{job['id']}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert answer.text.startswith("retry: 2000\n\n")


async def test_since_ts_leaves_out_what_is_older(replicas: list[Replica]) -> None:
    site = replicas[0]
    job = await site.post()
    site.studio.clock.advance(60)
    await site.studio.work()
    since = (NOW + timedelta(seconds=30)).isoformat().replace("+00:00", "Z")
    answer = await site.http.get(f"/v1/jobs/{job['id']}/progress/stream", params={"since_ts": since})
    states = [one.data["status"] for one in parsed(answer.text) if one.event == "state"]
    assert states == ["running", "succeeded"]


async def test_a_job_that_fails_says_why(replicas: list[Replica]) -> None:
    site = replicas[0]
    job = await site.post()
    await site.http.post(f"/v1/jobs/{job['id']}/cancel")
    messages = stored(await whole(site.follow(job["id"])))
    assert [one.event for one in messages] == ["state", "error", "log", "log", "state"]
    assert messages[1].data == {"code": "canceled", "message": "canceled by a user"}


def test_why_a_job_waits_is_in_its_log_and_no_error() -> None:
    why = JobError(code="replica_lost", message="the replica died")
    job = job_of(2).after(Cause.RETRIED, NOW, error=why)
    *_, log, state = told(job)
    assert (log.name, log.data.level, log.data.code) == ("log", "warning", "step.finish")
    assert log.data.message.endswith("the replica died")
    assert (state.name, state.data.status) == ("state", "queued")
    assert "error" not in {one.name for one in told(job)}
    *_, lost, _ = told(job_of(2).after(Cause.LEASE_LOST, NOW))
    assert lost.data.message == "Waits for another attempt: its worker is gone, or lost the job store"


async def test_a_deleted_job_ends_its_streams(replicas: list[Replica]) -> None:
    site = replicas[0]
    job = await site.post()
    async with asyncio.timeout(10), aclosing(site.follow(job["id"])) as messages:
        await anext(messages)
        await site.studio.jobs.delete(job["id"])
        assert {message.event async for message in messages} <= {"state", "progress"}


async def test_a_damaged_record_ends_its_streams(replicas: list[Replica]) -> None:
    site = replicas[0]
    job = await site.post()
    async with asyncio.timeout(10), aclosing(site.follow(job["id"])) as messages:
        await anext(messages)

        async def damaged() -> None:
            raise RecordDamaged

        site.studio.jobs.before["get"] = damaged
        assert {message.event async for message in messages} <= {"progress"}


class RecordDamaged(FluxFillError):
    def __init__(self) -> None:
        super().__init__("it cannot be read")


# Caps, polls, ends


async def test_streams_are_capped_in_all_and_for_each_key() -> None:
    site = Replica(Studio(api={"streams": 3, "streams_per_key": 2}))
    site.process.guard(api_keys="one:submit+read,two:submit+read")
    async with site.http:
        paths = {}
        for key in ("one", "two"):
            answer = await site.http.post("/v1/jobs", json=BODY, headers={"X-API-Key": key})
            paths[key] = f"/v1/jobs/{answer.json()['job']['id']}/events"

        async def ask(key: str) -> Any:
            return await site.http.get(paths[key], headers={"X-API-Key": key})

        held = [asyncio.create_task(ask("one")) for _ in range(2)]
        feeds = site.process.jobs
        await settled(lambda: open_streams(site) == 2)
        answer = await ask("one")
        assert refused(answer) == (429, "rate_limited") and int(answer.headers["Retry-After"]) >= 1
        held.append(asyncio.create_task(ask("two")))
        await settled(lambda: open_streams(site) == 3)
        answer = await ask("two")
        assert refused(answer) == (503, "unavailable") and int(answer.headers["Retry-After"]) >= 1
        for job in await feeds.list(Caller(), limit=9):
            await feeds.cancel(job.id, Caller())
        assert [(await one).status_code for one in held] == [200] * 3
        assert open_streams(site) == 0
        assert (await ask("two")).status_code == 200


def open_streams(site: Replica) -> int:
    return site.streams._open.total()


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_client_that_hangs_up_gives_its_place_back(replicas: list[Replica]) -> None:
    site = replicas[0]
    job = await site.post()
    for _ in range(3):
        async with aclosing(site.follow(job["id"])) as messages:
            await anext(messages)
            assert open_streams(site) == 1
        await settled(lambda: open_streams(site) == 0)
    assert not site.streams._feeds
    looks = site.studio.jobs.calls["get"]
    await asyncio.sleep(0.1)
    assert site.studio.jobs.calls["get"] == looks


async def test_a_job_is_looked_at_once_however_many_watch_it(replicas: list[Replica]) -> None:
    site = replicas[0]
    job = await site.post()
    watched = [asyncio.create_task(whole(site.follow(job["id"]))) for _ in range(10)]
    await settled(lambda: open_streams(site) == 10)
    before = site.studio.jobs.calls["get"]
    news = next(iter(site.streams._feeds.values()))
    for _ in range(5):
        await news.next_look(10)
    assert site.studio.jobs.calls["get"] - before <= 6
    await site.http.post(f"/v1/jobs/{job['id']}/cancel")
    streams = await asyncio.gather(*watched)
    assert all(stored(one) == stored(streams[0]) for one in streams)


async def test_a_stream_outlives_a_store_that_is_down(replicas: list[Replica]) -> None:
    site = replicas[0]
    job = await site.post()
    async with asyncio.timeout(10), aclosing(site.follow(job["id"])) as messages:
        await anext(messages)
        site.studio.jobs.is_down = True
        calls = site.studio.jobs.calls["get"]
        await settled(lambda: site.studio.jobs.calls["get"] > calls + 1)
        site.studio.jobs.is_down = False
        await site.studio.work()
        assert [one.data["status"] async for one in messages if one.event == "state"] == ["running", "succeeded"]


async def test_a_stream_ends_when_its_time_is_over_or_the_process_stops(replicas: list[Replica]) -> None:
    site = replicas[0]
    job = await site.post()
    site.process.is_stopping = True
    messages = await whole(site.follow(job["id"]))
    assert [one.event for one in messages] == ["state", "progress"]
    site.process.is_stopping = False
    site.studio.settings = site.studio.settings.model_copy(update={"api": ApiSettings(stream_s=0.05)})
    site.process.jobs.settings = site.studio.settings
    assert await whole(site.follow(job["id"])) == messages
    assert await whole(site.follow(job["id"], messages[0].id)) == messages[1:]


# The messages of a record


def job_of(events: int, **changes: Any) -> Job:
    """One that was claimed and given back again and again."""
    job = Job(id="j", variant="sdxl", parameters=PARAMETERS, created_at=NOW).noted(NOW)
    for number in range(2, events + 1):
        job = job.after(Cause.REQUEUED if number % 2 else Cause.CLAIMED, NOW + timedelta(seconds=number))
    return job.evolve(**changes)


async def messages_of(feed: Feed, **options: Any) -> list[Message]:
    given = {"after": START, "since": None, "lasts_s": 0.0, "is_stopping": lambda: False, **options}
    return [message async for message in heard(feed, **given)]


async def heard(feed: Feed, after: Any, since: Any = None, **options: Any) -> AsyncGenerator[Message]:
    async for chunk in stream(feed, after, since, **options):
        for message in parsed(chunk.decode()):
            yield message


async def test_what_is_trimmed_is_replaced_by_the_whole_job() -> None:
    job = job_of(MAX_EVENTS + 10)
    assert len(job.events) == MAX_EVENTS
    for after in (START, (10, 0)):
        messages = await messages_of(Feed(job), after=after)
        assert [one.event for one in messages] == ["snapshot", "progress"]
        assert parse(messages[0].id) == last(job)
    kept = await messages_of(Feed(job), after=(11, 0))
    assert "snapshot" not in {one.event for one in kept}


@pytest.mark.parametrize("status", [State.QUEUED, State.SUCCEEDED])
async def test_a_record_without_events_is_told_whole_once_it_is_over(status: State) -> None:
    """Older versions kept none; a job that came as a message has none before its claim."""
    job = Job(id="j", status=status, variant="sdxl", parameters=PARAMETERS, created_at=NOW)
    told_ = [one.event for one in await messages_of(Feed(job))]
    assert told_ == (["progress"] if status == State.QUEUED else ["progress", "snapshot"])


def test_an_artifact_that_the_record_has_lost_is_no_message() -> None:
    job = job_of(2).noted(NOW, artifact=0)
    assert [one.name for one in told(job)][-1] == "state"
    whole = job.evolve(artifacts=[Artifact(role="image", path="p/0.png", content_type="image/png", index=0, seed=7)])
    assert [one.name for one in told(whole)][-2:] == ["artifact", "log"]


async def test_progress_is_told_only_when_it_changes_and_has_no_id() -> None:
    job = job_of(2)
    feed = Feed(job)
    told_: list[Message] = []

    async def listen() -> None:
        async for message in heard(feed, last(job), lasts_s=9, is_stopping=lambda: False):
            told_.append(message)

    listening = asyncio.create_task(listen())

    async def look(now: Job) -> None:
        feed.job = now
        feed.seen.set()
        feed.seen = asyncio.Event()
        for _ in range(5):
            await asyncio.sleep(0)

    await asyncio.sleep(0)
    for step in (0, 3, 3, 3, 4):
        await look(job.evolve(progress=Progress(step=step, steps=6)))
    await look(job.after(Cause.SUCCEEDED, NOW))
    await listening
    assert [one.data["progress"] for one in told_ if one.event == "progress"] == [0.0, 0.5, 0.6667, 1.0]
    assert not any(one.id for one in told_ if one.event == "progress")
    assert told_[-1].event == "state"


async def test_a_client_that_has_seen_more_than_this_replica_gets_nothing_twice() -> None:
    streams, old, new = Streams(poll_s=60), job_of(2), job_of(3)

    async def look() -> Job:
        return new

    async with streams.watch(old, Caller(), ApiSettings(), look) as feed:
        assert feed.job == old
        async with streams.watch(new, Caller(), ApiSettings(), look) as same:
            assert same is feed and feed.job == new
            assert [one.event for one in await messages_of(feed, after=last(new))] == ["progress"]
        async with streams.watch(old, Caller(), ApiSettings(), look):
            assert feed.job == new
