"""What is on record of each session: its jobs, its document, its dead letters, its stored results."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import boto3

from serve_app import adapters
from serve_app.edit.session import OUTPUTS, session_path
from serve_app.errors import BlobNotFound
from serve_app.settings import Settings

from . import app
from .sessions import USER, Session, has_color
from .verdict import Evidence

#: More jobs than there ever are.
_ALL = 10_000
_AT_A_TIME = 100


class Records:
    """Looks at the stores and the broker directly, whatever the app can reach."""

    def __init__(self, settings: Settings, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self._jobs = adapters.job_store(settings.jobs)
        self._mirror = adapters.session_mirror(settings, self._jobs)
        self._blobs = adapters.blob_store(settings.blobs)
        self._dead_letters = adapters.dead_letters(settings.messages)
        self._letters: dict[bytes, list[Mapping[str, str]]] = defaultdict(list)
        self._documents: dict[str, str] = {}

    async def collect_dead_letters(self) -> None:
        """Take them out of the topic as they come, for ever."""
        try:
            while True:
                letters = await self._dead_letters.pull(_AT_A_TIME)
                for letter in letters:
                    self._letters[letter.delivery.data].append(letter.delivery.attributes)
                await self._dead_letters.acknowledge(letters)
                if not letters:
                    # The app needs the CPU.
                    await asyncio.sleep(0.2)
        finally:
            await self._dead_letters.close()

    async def look(self) -> dict[str, Evidence]:
        """By session id, without the pictures."""
        jobs = defaultdict(list)
        for job in await self._jobs.list(limit=_ALL):
            jobs[job.session_id].append(job)
        return {
            session.id: Evidence(
                jobs=jobs[session.id],
                letters=tuple(self._letters[session.data]),
                document=await self._document(session) if jobs[session.id] else "",
            )
            for session in self._sessions
        }

    async def _document(self, session: Session) -> str:
        """Its status. One that says how the session ended is not read again."""
        known = self._documents.get(session.id, "")
        if known in ("", "processing"):
            document = await self._mirror.read_session(USER, session.id) or {}
            self._documents[session.id] = known = str(document.get("processingStatus", ""))
        return known

    async def has_right_picture(self, session: Session) -> bool:
        if session.color is None:
            return False
        try:
            path = session_path(USER, session.id, OUTPUTS["edited"])
            data, _ = await self._blobs.get(path, max_bytes=10**8)
        except BlobNotFound:
            return False
        return await asyncio.to_thread(has_color, data, session.color)


def bucket(s3_port: int) -> Any:
    """boto3's client of the server itself."""
    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}", region_name="us-east-1")


def make_bucket(s3_port: int) -> None:
    client = bucket(s3_port)
    client.create_bucket(Bucket=app.BUCKET)
    client.put_bucket_versioning(Bucket=app.BUCKET, VersioningConfiguration={"Status": "Enabled"})


def stored_results(s3_port: int) -> dict[str, list[str]]:
    """By path, the ETag (of one upload: the content's MD5) of every version of a result that was ever stored."""
    etags = defaultdict(list)
    pages = bucket(s3_port).get_paginator("list_object_versions").paginate(Bucket=app.BUCKET)
    for page in pages:
        for version in page.get("Versions", ()):
            if version["Key"].endswith(OUTPUTS["edited"]):
                etags[version["Key"]].append(version["ETag"])
    return dict(etags)
