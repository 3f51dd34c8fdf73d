"""Blobs, jobs and session documents in the memory of this process: for tests and for trying things out.

Held to the same contract tests as the other stores. Nothing outlives the process. Stores of one name share their
content, whichever thread or event loop they are used from.
"""

import itertools
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Unpack

from ..blobs import ANY_VERSION, BlobInfo, UploadLink
from ..clock import Clock, utc_now
from ..errors import BlobConflict, BlobNotFound, UnknownJob
from ..jobs.claims import QUOTA_WINDOW, Change, Claim, Quota, posted
from ..jobs.ports import LISTED, JobQuery
from ..jobs.record import Job, Notification, State
from ..models import Progress
from .blobs.links import LocalLinks
from .blobs.paths import check_path
from .blobs.transfers import check_size, whole_file
from .stores.session_documents import SessionDocument, written


@dataclass(frozen=True, slots=True)
class _Blob:
    data: bytes
    info: BlobInfo


@dataclass
class _Content:
    """What the stores of one name share."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    versions: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    blobs: dict[str, _Blob] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    progress: dict[str, tuple[int, Progress]] = field(default_factory=dict)
    cancellations: dict[str, datetime] = field(default_factory=dict)
    sessions: dict[tuple[str, str], SessionDocument] = field(default_factory=dict)
    clock: Clock = utc_now

    _named: ClassVar[dict[str, "_Content"]] = {}

    @classmethod
    def of(cls, name: str) -> "_Content":
        return cls._named.setdefault(name, cls())


class MemoryBlobStore:
    def __init__(self, url: str = "memory:", public_url: str = "") -> None:
        """`public_url`: see LocalLinks."""
        self._links = LocalLinks(url, public_url)
        self._content = _Content.of(url)

    async def head(self, path: str) -> BlobInfo:
        return self._blob(path).info

    async def get(self, path: str, *, max_bytes: int) -> tuple[bytes, BlobInfo]:
        blob = self._blob(path)
        check_size(path, blob.info.size, max_bytes)
        return blob.data, blob.info

    async def put(self, path: str, data: bytes, *, content_type: str, if_version: str = ANY_VERSION) -> BlobInfo:
        check_path(path)
        with self._content.lock:
            stored = self._content.blobs.get(path)
            if if_version not in (ANY_VERSION, stored.info.version if stored else ""):
                raise BlobConflict(f"blob {path} is not at version {if_version or 'none'}", path=path)
            version = str(next(self._content.versions))
            info = BlobInfo(path=path, size=len(data), version=version, content_type=content_type)
            self._content.blobs[path] = _Blob(bytes(data), info)
        return info

    async def delete(self, path: str) -> None:
        self._content.blobs.pop(check_path(path), None)

    async def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        folder = check_path(prefix) + "/"
        with self._content.lock:
            found = sorted(path for path in self._content.blobs if path.startswith(folder))
            infos = [self._content.blobs[path].info for path in found]
        for info in infos:
            yield info

    async def download(self, path: str, to: Path) -> BlobInfo:
        blob = self._blob(path)
        with whole_file(to) as file:
            file.write(blob.data)
        return blob.info

    async def link(self, path: str, *, expires_s: int) -> str:
        return await self._links.link(path, expires_s=expires_s)

    async def upload_link(self, path: str, *, size: int, expires_s: int) -> UploadLink:
        return await self._links.upload_link(path, size=size, expires_s=expires_s)

    async def upload(self, path: str, source: Path) -> BlobInfo:
        return await self.put(path, source.read_bytes(), content_type="application/octet-stream")

    def _blob(self, path: str) -> _Blob:
        blob = self._content.blobs.get(check_path(path))
        if blob is None:
            raise BlobNotFound(f"blob {path} does not exist", path=path)
        return blob


class MemoryJobStore:
    def __init__(self, url: str = "memory:", clock: Clock | None = None) -> None:
        """`clock` becomes that of all stores of this name; it is the machine's where none was given."""
        self._content = _Content.of(url)
        if clock is not None:
            self._content.clock = clock

    async def now(self) -> datetime:
        return self._content.clock()

    async def get(self, job_id: str) -> Job | None:
        with self._content.lock:
            job = self._content.jobs.get(job_id)
            return self._with_progress(job) if job else None

    async def update(self, job_id: str, lock_key: str, change: Change) -> Job:
        with self._content.lock:
            jobs = self._content.jobs
            for job in change(jobs.get(job_id), self._rivals(job_id, lock_key), self._content.clock()):
                jobs[job.id] = job
            if job_id not in jobs:
                raise UnknownJob(f"there is no job {job_id}")
            return jobs[job_id]

    async def create(self, new: Job, quota: Quota | None = None) -> tuple[Job, bool]:
        with self._content.lock:
            stored = self._content.jobs.get(new.id)
            if stored is not None:
                return self._with_progress(stored), False
            now = self._content.clock()
            if quota is not None and new.owner:
                own = [job for job in self._content.jobs.values() if job.owner == new.owner]
                quota.check(
                    unfinished=sum(not job.status.is_final for job in own),
                    of_today=sum(job.created_at > now - QUOTA_WINDOW for job in own),
                )
            job = self._content.jobs[new.id] = posted(new, now)
            return job, True

    async def ahead(self, job: Job) -> int:
        with self._content.lock:
            return sum(
                other.status == State.QUEUED and other.variant == job.variant and other.created_at < job.created_at
                for other in self._content.jobs.values()
            )

    async def report(self, claim: Claim, progress: Progress) -> None:
        with self._content.lock:
            reported_fence, _ = self._content.progress.get(claim.job_id, (0, None))
            if claim.job_id in self._content.jobs and claim.fence >= reported_fence:
                self._content.progress[claim.job_id] = (claim.fence, progress)

    async def list(self, **query: Unpack[JobQuery]) -> Sequence[Job]:
        limit, before = query.get("limit", LISTED), query.get("before")
        if (owes_by := query.get("owes_by")) is not None:
            return self._owing(owes_by, query.get("notification"), query.get("receiver"))[:limit]
        wanted = {name: query.get(name) for name in ("type", "status", "lock_key", "owner")}
        with self._content.lock:
            found = [
                self._with_progress(job)
                for job in self._content.jobs.values()
                if all(value in (None, getattr(job, name)) for name, value in wanted.items())
                and (before is None or _age(job) < before)
            ]
        return sorted(found, key=_age, reverse=True)[:limit]

    async def delete(self, job_id: str) -> None:
        with self._content.lock:
            self._content.jobs.pop(job_id, None)
            self._content.progress.pop(job_id, None)

    async def cancel_until(self, lock_key: str, moment: datetime) -> None:
        with self._content.lock:
            stored = self._content.cancellations.get(lock_key, moment)
            self._content.cancellations[lock_key] = max(stored, moment)

    async def canceled_until(self, lock_key: str) -> datetime | None:
        return self._content.cancellations.get(lock_key)

    async def write_session(self, job: Job, document: Mapping[str, Any]) -> None:
        with self._content.lock:
            key = (job.user_id, job.session_id)
            after = written(self._content.sessions.get(key), job, document)
            if after is not None:
                self._content.sessions[key] = after

    async def read_session(self, user_id: str, session_id: str) -> Mapping[str, Any] | None:
        stored = self._content.sessions.get((user_id, session_id))
        return dict(stored.fields) if stored else None

    def _owing(self, by: datetime, notification: Notification | None, receiver: str | None) -> Sequence[Job]:
        with self._content.lock:
            jobs = list(self._content.jobs.values())
        owing = [
            (min(owed[name].due_at for name in owed), job)
            for job in jobs
            if receiver in (None, job.receiver)
            and (owed := {name: owed for name, owed in job.owed.items() if notification in (None, name)})
        ]
        return [job for due_at, job in sorted(owing, key=lambda pair: pair[0]) if due_at <= by]

    def _rivals(self, job_id: str, lock_key: str) -> Sequence[Job]:
        return [
            job
            for job in self._content.jobs.values()
            if lock_key and job.lock_key == lock_key and not job.status.is_final and job.id != job_id
        ]

    def _with_progress(self, job: Job) -> Job:
        fence, progress = self._content.progress.get(job.id, (None, job.progress))
        return job.evolve(progress=progress) if fence == job.fence else job


def _age(job: Job) -> tuple[datetime, str]:
    return job.created_at, job.id
