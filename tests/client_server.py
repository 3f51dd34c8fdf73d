"""A real server in a thread, with a worker behind it: for programs that know another system's shapes and nothing of
this one."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from ray.serve._private.http_util import RequestIdMiddleware

from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.http.app import create_app
from serve_app.http.events import Streams

from .http_service import Process
from .test_generate import Studio


class Served(Process):
    """A process that works on what is posted to it, and serves its blobs."""

    async def blob(self, token: str) -> Any:
        links = adapters.local_links(self.rig.settings)
        assert links is not None
        return await self.rig.blobs.get(links.path_of(token), max_bytes=10**7)

    async def work_on(self) -> None:
        """On several jobs at once."""
        done, working = 0, set[asyncio.Task[Any]]()
        try:
            while True:
                for message in self.rig.topics.sessions[done:]:
                    done += 1
                    working.add(asyncio.create_task(self.rig.worker.work(message)))
                for task in [task for task in working if task.done()]:
                    working.remove(task)
                    task.result()
                await asyncio.sleep(0.01)
        finally:
            for task in working:
                task.cancel()


@contextmanager
def in_thread(make: Callable[[str], Studio], *, api_keys: str | None = None) -> Iterator[tuple[str, Studio]]:
    """Its URL, and what `make` has made, in the thread: engines belong to one event loop. Without keys, any client may
    call."""
    url, ready = f"http://127.0.0.1:{(port := free_port())}", threading.Event()
    made: list[tuple[uvicorn.Server, Studio]] = []

    async def serve() -> None:
        process = Served(studio := make(url))
        studio.served = process
        process.guard(api_keys=api_keys)
        # Serve adds it before each app.
        app = create_app(lambda: process, streams=Streams(poll_s=0.02))
        server = uvicorn.Server(uvicorn.Config(RequestIdMiddleware(app), port=port, lifespan="off", log_config=None))
        working, serving = asyncio.create_task(process.work_on()), asyncio.create_task(server.serve())
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        made.append((server, studio))
        ready.set()
        await asyncio.wait([working, serving], return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
        working.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(60), "the server did not start"
        yield url, made[0][1]
    finally:
        if made:
            made[0][0].should_exit = True
        thread.join(30)
