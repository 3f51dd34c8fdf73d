"""A job's events as a stream (https://html.spec.whatwg.org/multipage/server-sent-events.html), replayed from any of
them on any replica, because they are read from the job's record.

A stored event becomes one message or several, `number.k` with `k` from 0: what happened, what a log says of it, and the
state. Progress has no id, so that a client that comes back names what is stored.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel

from ..errors import FluxFillError, RateLimited, StoreUnavailable, Unavailable
from ..jobs.kinds import Caller
from ..jobs.record import Cause, Event, Job, JobError, State
from ..settings import ApiSettings
from .views import ArtifactView, JobView, LogLine, ProgressView, artifact_view, job_view, log_lines, progress_view

#: Between two looks at a watched job, in seconds.
POLL_S = 1.0
#: A stream in which nothing happens says so after so long, so that no proxy takes it for dead, in seconds.
PING_S = 15.0
#: After which a client comes back, in milliseconds, and in seconds after it was refused.
RETRY_MS = 2000
RETRY_S = 5

#: The id of a message: its event's number, and its own within the event.
Position = tuple[int, int]
START: Position = (0, 0)


class StateMessage(BaseModel):
    job_id: str
    status: State
    cause: Cause | None
    at: datetime


#: By its name, what a message's data are.
MESSAGES: Mapping[str, type[BaseModel]] = {
    "state": StateMessage,
    "artifact": ArtifactView,
    "log": LogLine,
    "error": JobError,
    "progress": ProgressView,
    "snapshot": JobView,
}


class Told(NamedTuple):
    """A message of a stored event."""

    position: Position
    at: datetime
    name: str
    data: BaseModel


def told(job: Job) -> Iterator[Told]:
    """All messages of the events that the record has kept."""
    for event in job.events:
        for k, (name, data) in enumerate(_messages(job, event)):
            yield Told((event.number, k), event.at, name, data)


def _messages(job: Job, event: Event) -> Iterator[tuple[str, BaseModel]]:
    if event.error is not None and event.status.is_final:
        yield "error", event.error
    if event.artifact is not None and event.artifact < len(job.artifacts):
        yield "artifact", artifact_view(job, event.artifact)
    for line in log_lines(job, event):
        yield "log", line
    if event.artifact is None:
        # Last, because with the last one a client may hang up.
        yield "state", StateMessage(job_id=job.id, status=event.status, cause=event.cause, at=event.at)


def last(job: Job) -> Position:
    return max((one.position for one in told(job)), default=START)


def parse(text: str) -> Position | None:
    """A position as `Last-Event-ID` says it; None for what is none."""
    found = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", text)
    return (int(found[1]), int(found[2])) if found else None


def _is_kept(job: Job, after: Position | None) -> bool:
    """Whether all that follows `after` is in the record."""
    if after == START:
        return job.events[0].number == 1 if job.events else not job.status.is_final
    return any(one.position == after for one in told(job))


@dataclass(eq=False)
class Feed:
    """A job as this process saw it last."""

    #: None once it is deleted.
    job: Job | None
    readers: int = 0
    seen: asyncio.Event = field(default_factory=asyncio.Event)
    polling: "asyncio.Task[None] | None" = None

    async def poll(self, look: Callable[[], Awaitable[Job]], poll_s: float) -> None:
        while self.job is not None:
            await asyncio.sleep(poll_s)
            try:
                self.job = await look()
            except StoreUnavailable:
                continue
            except FluxFillError:
                # It is gone, or its record is damaged: whoever comes back is told.
                self.job = None
            self.seen.set()
            self.seen = asyncio.Event()

    async def next_look(self, timeout_s: float) -> None:
        """Returns when the store was looked at again, or the time is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.seen.wait(), timeout_s)


class Streams:
    """Those of this process: so many in all and of a client, and one look at the store for all that watch a job."""

    def __init__(self, *, poll_s: float = POLL_S) -> None:
        self._poll_s = poll_s
        self._feeds: dict[str, Feed] = {}
        self._open: Counter[str] = Counter()

    def check(self, caller: Caller, api: ApiSettings) -> None:
        """Whether there is room for one more. Raises Unavailable, or RateLimited for a client with too many streams."""
        if self._open.total() >= api.streams:
            raise Unavailable(f"{api.streams} event streams are open here; try again", retry_after_s=RETRY_S)
        if caller.id and self._open[caller.id] >= api.streams_per_key:
            raise RateLimited(f"this key has {api.streams_per_key} event streams already", retry_after_s=RETRY_S)

    @asynccontextmanager
    async def watch(
        self, job: Job, caller: Caller, api: ApiSettings, look: Callable[[], Awaitable[Job]]
    ) -> AsyncIterator[Feed]:
        """`look` gives the job anew. Raises as `check`."""
        self.check(caller, api)
        feed = self._feeds.setdefault(job.id, Feed(job))
        feed.readers += 1
        # A client that comes from another replica may have seen more than this one has.
        if feed.job is not None and last(job) > last(feed.job):
            feed.job = job
        self._open[caller.id] += 1
        if feed.polling is None:
            # In a context of its own: it goes on for those who come later.
            feed.polling = asyncio.create_task(feed.poll(look, self._poll_s), context=Context())
        try:
            yield feed
        finally:
            self._open[caller.id] -= 1
            feed.readers -= 1
            if not feed.readers:
                feed.polling.cancel()
                self._feeds.pop(job.id, None)


async def stream(
    feed: Feed, after: Position | None, since: datetime | None, *, lasts_s: float, is_stopping: Callable[[], bool]
) -> AsyncGenerator[bytes]:
    """What has happened after `after`, what happens, and progress between, until the job is over, for `lasts_s` at
    most. A client that names what the record has not kept gets the whole job first."""
    time = asyncio.get_running_loop().time
    ends_at, pings_at, shown, seen = time() + lasts_s, time() + PING_S, None, -1
    yield format_sse_event(retry=RETRY_MS)
    while (job := feed.job) is not None:
        newest, messages = job.events[-1].number if job.events else 0, list[bytes]()
        if newest != seen:
            seen = newest
            after, messages = _news(job, after, since)
        if (present := progress_view(job)) != shown:
            # Before the last message, after which a client may hang up.
            messages.insert(len(messages) - job.status.is_final, _encoded("progress", present))
            shown = present
        if not messages and time() >= pings_at:
            messages.append(KEEPALIVE_COMMENT)
        for message in messages:
            yield message
            pings_at = time() + PING_S
        if job.status.is_final or is_stopping() or time() >= ends_at:
            return
        await feed.next_look(min(ends_at, pings_at) - time())


def _news(job: Job, after: Position | None, since: datetime | None) -> tuple[Position, list[bytes]]:
    """What follows `after`, and up to where that is."""
    if after is None or not _is_kept(job, after):
        return last(job), [_encoded("snapshot", job_view(job), last(job))]
    fresh = [one for one in told(job) if one.position > after]
    messages = [_encoded(one.name, one.data, one.position) for one in fresh if since is None or one.at >= since]
    return fresh[-1].position if fresh else after, messages


def _encoded(name: str, data: BaseModel, position: Position | None = None) -> bytes:
    return format_sse_event(
        event=name, data_str=data.model_dump_json(), id="{}.{}".format(*position) if position else None
    )
