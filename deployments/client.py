"""A publisher's view of the service: upload a session's photo, ask for the edit, follow it, fetch the result."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from serve_app import adapters, tracing
from serve_app.adapters.pubsub.client import address_of, check_speaks
from serve_app.blobs import BlobInfo
from serve_app.edit.containers import content_type
from serve_app.edit.job import edit_job_id
from serve_app.edit.session import INPUTS, session_document, session_path
from serve_app.errors import BlobNotFound, BlobTooLarge, BrokerUnavailable, ResultReplaced, StoreUnavailable, UnknownJob
from serve_app.jobs import claims, record
from serve_app.jobs.cancel import cancel_session
from serve_app.jobs.messages import EditMessage, traceparent_of
from serve_app.jobs.record import Artifact, Cause, Job
from serve_app.settings import MessagesSettings, Settings

#: Seconds between two looks at a job.
POLL_S = 0.2
#: How long the embedded server may take for its greeting, in seconds.
SPEAKS_S = 2.0


class Submitted(NamedTuple):
    #: That the message becomes.
    job_id: str
    #: When the job last ended, where the message has it run again.
    ended_before: datetime | None = None


class Client:
    """Talks to the stores and the broker that the settings name; needs no HTTP and no Ray."""

    def __init__(self, settings: Settings) -> None:
        tracing.configure_tracing("fluxfill-client")
        self._settings = settings
        self._blobs = adapters.blob_store(settings.blobs, settings.public_url)
        self._jobs = adapters.job_store(settings.jobs)
        self._publisher = adapters.publisher(settings.messages)
        self._looking, self._has_spoken = asyncio.Lock(), False

    async def submit(
        self, message: EditMessage, original: Path, mask: Path, *, attributes: Mapping[str, str] | None = None
    ) -> Submitted:
        """Upload both files and publish, with Pub/Sub `attributes`.

        Raises OSError for a file that cannot be read; StoreUnavailable; BrokerUnavailable, before anything is
        uploaded if nothing listens at the embedded server's address.
        """
        if self._settings.messages.is_embedded:
            # One look at a time: many submitters at once would open a channel each, and take each other's time.
            async with self._looking:
                if not self._has_spoken:
                    await _check_listens(self._settings.messages)
                    self._has_spoken = True
        versions = []
        for role, source in (("original", original), ("mask", mask)):
            path = session_path(message.user_id, message.session_id, INPUTS[role])
            data = source.read_bytes()
            versions.append(await self._put(path, data, content_type(data) or "application/octet-stream"))
        given = dict(attributes or {})
        job_id = edit_job_id(message, versions=versions, idempotency_key=given.get("idempotencyKey"))
        ended_before = await self._last_end(job_id)
        published = message.model_dump_json(by_alias=True, exclude_none=True).encode()
        parent = traceparent_of(given)
        with tracing.span("publish", parent, kind="PRODUCER"):
            tracing.attribute("fluxfill.job_id", job_id)
            if traced := tracing.traceparent(parent):
                given["traceparent"] = traced
            await self._publisher.publish("sessions", published, given)
        return Submitted(job_id, ended_before)

    async def _last_end(self, job_id: str) -> datetime | None:
        """When the job ended, if a message published after this returns has it run again."""
        job = await self._jobs.get(job_id)
        if job is None or (job.status, Cause.ASKED_AGAIN) not in record.TRANSITIONS:
            return None
        return job.finished_at

    async def _put(self, path: str, data: bytes, content_type: str) -> str:
        """The version under which `data` is stored. Bytes that are there already are left alone, because writing them
        again would make a new version, and new work, of the same photo."""
        with suppress(BlobNotFound, BlobTooLarge):
            stored, info = await self._blobs.get(path, max_bytes=len(data))
            if stored == data:
                return info.version
        return (await self._blobs.put(path, data, content_type=content_type)).version

    async def follow(self, submitted: Submitted, on_change: Callable[[Job], None], *, timeout_s: float) -> Job:
        """The job once it is over. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                job = await self._jobs.get(submitted.job_id)
                if job is not None and (job.finished_at is None or job.finished_at != submitted.ended_before):
                    on_change(job)
                    if job.status.is_final:
                        return job
                await asyncio.sleep(POLL_S)

    async def fetch(self, job: Job, folder: Path) -> list[Path]:
        """Write the job's artifacts into `folder`. Raises ResultReplaced, and then nothing is written."""
        files = {}
        for artifact in job.artifacts:
            data, info = await self._blobs.get(artifact.path, max_bytes=self._settings.limits.stored_bytes)
            _check_own(job, artifact, info)
            files[folder / Path(artifact.path).name] = data
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        for to, data in files.items():
            await asyncio.to_thread(to.write_bytes, data)
        return list(files)

    async def get(self, job_id: str) -> Job | None:
        job = await self._jobs.get(job_id)
        return None if job is None or job.type == "audit" else job

    async def list(self, *, limit: int = 50, **query: Any) -> list[Job]:
        """The newest, audits left out: `fluxfill audit list` has them. They are left out here, because records of older
        versions have no type that Firestore could be asked for."""
        asked = limit
        while True:
            found = await self._jobs.list(limit=asked, **query)
            edits = [job for job in found if job.type != "audit"]
            if len(edits) >= limit or len(found) < asked:
                return edits[:limit]
            asked *= 2

    async def cancel(self, job_id: str) -> Job:
        """Raises UnknownJob; IllegalTransition for a job that is over."""
        job = await self.get(job_id)
        if job is None:
            raise UnknownJob(f"there is no job {job_id}")
        canceled = await self._jobs.update(job_id, job.lock_key, claims.cancel)
        await self._show([canceled])
        return canceled

    async def cancel_session(self, user_id: str, session_id: str) -> Sequence[Job]:
        """Also the session's messages that wait. The jobs that were stopped."""
        canceled = await cancel_session(self._jobs, user_id, session_id)
        await self._show(canceled)
        return canceled

    async def _show(self, canceled: Sequence[Job]) -> None:
        """Have the sessions say so at once: the app's notifiers do, too, but it may be stopped."""
        mirror = adapters.session_mirror(self._settings, self._jobs)
        for job in canceled:
            with suppress(StoreUnavailable):
                await mirror.write_session(job, session_document(job))

    async def links(self, job: Job, *, expires_s: int) -> Sequence[str]:
        """Signed links to the job's artifacts, in their order; a later edit replaces what they show. Raises
        ResultReplaced."""
        for artifact in job.artifacts:
            _check_own(job, artifact, await self._blobs.head(artifact.path))
        return [await self._blobs.link(artifact.path, expires_s=expires_s) for artifact in job.artifacts]


def _check_own(job: Job, artifact: Artifact, stored: BlobInfo) -> None:
    """Raises ResultReplaced where `stored` is not what the job wrote."""
    if artifact.version != stored.version:
        raise ResultReplaced(
            f"{stored.path} was overwritten by a later edit of the session, and the picture of job {job.id} is gone: "
            "`fluxfill submit --again`, or a new idempotency key, does the edit again",
            path=stored.path,
        )


async def _check_listens(settings: MessagesSettings) -> None:
    """The publisher would try for ten seconds, because a broker elsewhere may come back; this one is the app's own."""
    try:
        _, writer = await asyncio.open_connection(*address_of(settings.url))
    except OSError as e:
        what = f"nothing listens at {settings.url}; start the app first: `serve run` with this config"
        raise BrokerUnavailable(what, url=settings.url) from e
    writer.close()
    await check_speaks(settings, SPEAKS_S)
