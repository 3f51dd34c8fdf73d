"""The publisher's side: upload a session's photo, publish its message, some of them twice."""

import asyncio
import random
from collections.abc import Callable, Sequence

from serve_app import adapters
from serve_app.edit.session import session_path
from serve_app.settings import Settings

from .sessions import USER, Session

#: How much later a message comes again that is not sent twice at once, in seconds.
LATER_S = (5.0, 60.0)


def schedule(sessions: Sequence[Session], twice: int, over_s: float) -> list[tuple[float, Session]]:
    """When each message is sent, in seconds from the start: evenly over `over_s`. Of `twice` sessions, drawn by chance,
    another follows, for every second one at once and for the others within LATER_S."""
    times = [(number * over_s / len(sessions), session) for number, session in enumerate(sessions)]
    again = [
        (at + (random.uniform(*LATER_S) if number % 2 else 0.0), session)
        for number, (at, session) in enumerate(random.sample(times, twice))
    ]
    return sorted(times + again, key=lambda sending: sending[0])


async def publish(sendings: Sequence[tuple[float, Session]], settings: Settings, on_sent: Callable[[], None]) -> None:
    """Carry out a schedule. What a session needs is uploaded before its first message."""
    publisher, loop = adapters.publisher(settings.messages), asyncio.get_running_loop()
    started, uploaded = loop.time(), set[str]()
    for at, session in sendings:
        await asyncio.sleep(started + at - loop.time())
        if session.id not in uploaded:
            await _upload(session, settings)
            uploaded.add(session.id)
        await publisher.publish("sessions", session.data, {})
        on_sent()


async def _upload(session: Session, settings: Settings) -> None:
    store = adapters.blob_store(settings.blobs)
    contents = {"original.jpg": (session.original, "image/jpeg"), "mask_auto.png": (session.mask, "image/png")}
    for name, (make, content_type) in contents.items():
        data = await asyncio.to_thread(make)
        if data is not None:
            await store.put(session_path(USER, session.id, name), data, content_type=content_type)
