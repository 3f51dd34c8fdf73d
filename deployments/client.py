"""A publisher's side of the service: put a session's photo there, ask for the edit, follow it, fetch the result."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve_app import adapters, jobs
from serve_app.edit import INPUTS, session_path
from serve_app.jobs import Job
from serve_app.messages import EditMessage
from serve_app.settings import Settings
from serve_app.worker import utc_now

#: Seconds between two looks at a job.
POLL_S = 0.2


class Client:
    """Talks to the stores and the broker that the settings name; needs no HTTP and no Ray."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._blobs = adapters.blob_store(settings.blobs)
        self._jobs = adapters.job_store(settings.jobs)
        self._publisher = adapters.publisher(settings.messages)

    async def submit(self, message: EditMessage, original: Path, mask: Path) -> str:
        """Upload both files and publish; the id of the job that the message becomes.

        Raises OSError for a file that cannot be read; StoreUnavailable; BrokerUnavailable.
        """
        versions = []
        for role, source in (("original", original), ("mask", mask)):
            path = session_path(message.user_id, message.session_id, INPUTS[role])
            content_type = "image/png" if role == "mask" else "image/jpeg"
            stored = await self._blobs.put(path, source.read_bytes(), content_type=content_type)
            versions.append(stored.version)
        data = message.model_dump_json(by_alias=True, exclude_none=True).encode()
        await self._publisher.publish("sessions", data, {})
        return jobs.edit_job_id(message, versions=versions, idempotency_key=None)

    async def follow(self, job_id: str, on_change: Callable[[Job], None], *, timeout_s: float) -> Job:
        """The job once it is over. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                job = await self._jobs.get(job_id)
                if job is not None:
                    on_change(job)
                    if job.status.is_final:
                        return job
                await asyncio.sleep(POLL_S)

    async def fetch(self, job: Job, folder: Path) -> list[Path]:
        """Write the job's artifacts into `folder`."""
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        written = []
        for path in job.artifacts.values():
            # An edit of the largest photo, stored at quality 95, can be larger than the photo was.
            data, _ = await self._blobs.get(path, max_bytes=8 * self._settings.limits.image_bytes)
            to = folder / Path(path).name
            await asyncio.to_thread(to.write_bytes, data)
            written.append(to)
        return written

    async def get(self, job_id: str) -> Job | None:
        return await self._jobs.get(job_id)

    async def list(self, **query: Any) -> list[Job]:
        return list(await self._jobs.list(**query))

    async def cancel(self, job: Job) -> Job:
        """Raises IllegalTransition for a job that is over."""
        return await self._jobs.update(job.id, job.session_key, jobs.cancel(now=utc_now()))
