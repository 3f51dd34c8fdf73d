"""Jobs that are asked for over HTTP, of any kind: posted, looked at, canceled, deleted by those who may see them.

A posted job is a row first: its message is published afterwards, and again where that failed (`Notifier`).
"""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Unpack

from .. import tracing
from ..blobs import BlobStore
from ..errors import (
    BlobNotFound,
    Busy,
    Forbidden,
    IllegalTransition,
    InputError,
    KeyReused,
    PostInFlight,
    QuotaExceeded,
    StoreUnavailable,
    Unavailable,
    UnknownJob,
)
from ..settings import Settings
from . import claims
from .cancel import cancel_session
from .kinds import Caller, PostedKind
from .notifications import Notifier
from .ports import JobQuery, JobStore
from .record import Artifact, Job, Message, State

#: How long a job goes on after it was attended, and after its last client has left. Clients that come again do so
#: within about 10 s. Between the two, and `waiting.ATTEND_EVERY_S`, there is time for a store that is slow.
ATTEND_S, LEFT_S = 20.0, 12.0
#: Of a caller's jobs, how many are looked at for one that is asked for again; and between the looks, in seconds: a job
#: whose ingress died is known to be left ATTEND_S - LEFT_S after it was attended.
AGAIN_AMONG, AGAIN_WAITS_S = 200, (0.0, 1.0, 1.0, 2.0, 4.5)
#: Requests that wait between those looks: each holds its body, which may have two pictures.
AGAIN_AT_ONCE = 16
#: States in which a job is of use to a client that comes again.
_OF_USE = (State.QUEUED, State.RUNNING, State.SUCCEEDED)


class JobApi:
    def __init__(
        self,
        *,
        kinds: Sequence[PostedKind],
        job_store: JobStore,
        blobs: BlobStore,
        notifier: Notifier,
        settings: Settings,
    ) -> None:
        self._kinds: Mapping[str, PostedKind] = {kind.type: kind for kind in kinds}
        self._jobs, self._blobs, self._notifier, self.settings = job_store, blobs, notifier, settings
        #: Ids of jobs that are being posted in this process.
        self._in_flight: set[str] = set()
        #: Requests in `again`.
        self._look_again = 0

    async def post(
        self, body: Mapping[str, Any], caller: Caller, *, job_id: str | None = None, idempotency_key: str | None = None
    ) -> tuple[Job, bool]:
        """The job that `body` asks for, and whether it is new. With an `idempotency_key`, of which no more than a hash
        is kept, or a `job_id`, the job that the same request made before is given again.

        Raises ValidationError and InputError, which name the field at fault; Forbidden for the session of a user whose
        jobs the caller does not see; KeyReused where the key or the id came with another payload; PostInFlight while a
        request with it is being answered here; QuotaExceeded; Unavailable.
        """
        kind = self._kinds.get(str(body.get("type", "")))
        if kind is None:
            raise InputError(f"type: it must be one of {', '.join(self._kinds)}", field="type")
        if body.get("session") is not None and not caller.sees_messages:
            # Its result shows the user's photo.
            raise Forbidden("session: the API key does not have the scope jobs", field="session")
        if job_id is None and idempotency_key is not None:
            # One for each key of each caller.
            job_id = hashlib.sha256(json.dumps([caller.id, idempotency_key]).encode()).hexdigest()[:32]
        job_id = job_id or uuid.uuid4().hex
        if job_id in self._in_flight:
            raise PostInFlight("a request with this key is being answered", retry_after_s=1)
        self._in_flight.add(job_id)
        try:
            return await self._post(kind, body, caller, job_id)
        finally:
            self._in_flight.discard(job_id)

    async def _post(self, kind: PostedKind, body: Mapping[str, Any], caller: Caller, job_id: str) -> tuple[Job, bool]:
        fingerprint = _fingerprint(_payload(body), job_id)
        # Before what it takes is fetched and stored for it.
        stored = await self._jobs.get(job_id)
        if stored is None:
            new = await kind.post(body, caller, job_id=job_id)
            about = {"jobType": new.type, "jobId": new.id, "variant": new.variant}
            with tracing.span("publish", kind="PRODUCER"):
                tracing.attribute("fluxfill.job_id", job_id)
                traced = {"traceparent": parent} if (parent := tracing.traceparent("")) else {}
            message = Message(data=json.dumps(about), attributes={**about, **traced})
            redispatch_s, api = self.settings.work.redispatch_after_s, self.settings.api
            new = new.evolve(owner=caller.id, request=fingerprint, message=message, redispatch_s=redispatch_s, **traced)
            quota = claims.Quota(unfinished=api.unfinished_jobs, per_day=api.jobs_per_day) if caller.id else None
            try:
                stored, is_new = await self._jobs.create(new, quota)
            except QuotaExceeded:
                for path in kind.inputs(new):
                    await self._blobs.delete(path)
                raise
            if is_new:
                self._notifier.dispatch(stored)
                return stored, True
        if not caller.sees(stored) or stored.request != fingerprint:
            raise KeyReused("a request with another payload came with this key or id before")
        return stored, False

    async def again(self, body: Mapping[str, Any], caller: Caller) -> Job | None:
        """A job of the caller's that the same `body` asked for, and that its clients have left without an answer; it is
        attended now, for this request alone. None if there is none among the caller's newest ones.

        For clients that send a request again without saying which. Others may have asked for just the same, and wait:
        their jobs are not given. Raises StoreUnavailable; Unavailable where too many requests do so.
        """
        payload = _payload(body)
        for wait_s in AGAIN_WAITS_S:
            if wait_s and self._look_again >= AGAIN_AT_ONCE:
                raise Unavailable("too many requests are being sent again; try again", retry_after_s=2)
            self._look_again += 1
            try:
                await asyncio.sleep(wait_s)
                listed = await self._jobs.list(owner=caller.id, limit=AGAIN_AMONG)
            finally:
                self._look_again -= 1
            found = [
                job
                for job in listed
                if job.owner == caller.id and job.deadline is not None and job.status in _OF_USE
                if job.request == _fingerprint(payload, job.id)
            ]
            for job in found:
                with suppress(Busy, UnknownJob):
                    return await self._jobs.update(job.id, job.lock_key, claims.take_over(ATTEND_S, left_s=LEFT_S))
            if not found:
                break
        return None

    async def attend(self, job: Job) -> None:
        """Keep the job for `ATTEND_S` seconds more: one that somebody waits for ends when all who wait have left,
        whichever ingress they asked. Raises StoreUnavailable."""
        await self._jobs.update(job.id, job.lock_key, claims.attend(ATTEND_S))

    async def leave(self, job: Job, *, answered: bool) -> None:
        """Attend the job no longer: see `claims.leave`. It would be the same a little later, without this: a store that
        is down is no error."""
        with suppress(StoreUnavailable, UnknownJob):
            await self._jobs.update(job.id, job.lock_key, claims.leave(None if answered else LEFT_S))

    async def get(self, job_id: str, caller: Caller) -> Job:
        """Raises UnknownJob, also for a job that the caller does not see; StoreUnavailable."""
        job = await self._jobs.get(job_id)
        if job is None or job.type not in self._kinds or not caller.sees(job):
            raise UnknownJob(f"there is no job {job_id}")
        return job

    async def list(self, caller: Caller, **query: Unpack[JobQuery]) -> Sequence[Job]:
        """The caller's jobs, or all where it sees all; as `JobStore.list`. Raises StoreUnavailable."""
        query["owner"] = None if caller.sees_all else caller.id
        return await self._jobs.list(**query)

    async def cancel(self, job_id: str, caller: Caller) -> Job:
        """A waiting job never starts, a running one stops within a step. Raises as `get`; IllegalTransition where it is
        over."""
        job = await self.get(job_id, caller)
        canceled = await self._jobs.update(job_id, job.lock_key, claims.cancel)
        self._notifier.notify(canceled)
        return canceled

    async def replay(self, job_id: str, caller: Caller) -> Job:
        """Run a failed job again, with all its attempts: its message is published again. Raises as `get`;
        IllegalTransition where it has not failed."""
        job = await self.get(job_id, caller)
        replayed = await self._jobs.update(job_id, job.lock_key, claims.resend)
        self._notifier.dispatch(replayed)
        return replayed

    async def cancel_session(self, user_id: str, session_id: str) -> Sequence[Job]:
        """See `cancel.cancel_session`."""
        canceled = await cancel_session(self._jobs, user_id, session_id)
        for job in canceled:
            self._notifier.notify(job)
        return canceled

    async def delete(self, job_id: str, caller: Caller) -> None:
        """With its artifacts, but for one that a later job of the session wrote over. Raises as `get`;
        IllegalTransition where it is not over; StoreUnavailable."""
        job = await self.get(job_id, caller)
        if not job.status.is_final:
            raise IllegalTransition(f"job {job_id} is {job.status}: cancel it first", status=job.status)
        kind = self._kinds[job.type]
        own = (*kind.inputs(job), *kind.outputs(job))
        for artifact in job.artifacts:
            with suppress(BlobNotFound):
                if artifact.path not in own and (await self._blobs.head(artifact.path)).version == artifact.version:
                    await self._blobs.delete(artifact.path)
        for path in own:
            await self._blobs.delete(path)
        await self._jobs.delete(job_id)

    async def ahead(self, job: Job) -> int:
        """Jobs that wait for the same model and were posted before it. Raises StoreUnavailable."""
        return await self._jobs.ahead(job)

    async def data(self, artifact: Artifact) -> bytes:
        """Raises BlobNotFound, BlobTooLarge, StoreUnavailable."""
        data, _ = await self._blobs.get(artifact.path, max_bytes=self.settings.limits.stored_bytes)
        return data

    async def link(self, artifact: Artifact, expires_s: int) -> str:
        """A signed URL. Raises StoreUnavailable."""
        return await self._blobs.link(artifact.path, expires_s=expires_s)


def _payload(body: Mapping[str, Any]) -> str:
    """What is asked for, with a hash of each file; the order of its fields says nothing."""

    def plain(value: object) -> str:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)

    try:
        return json.dumps(body, sort_keys=True, default=plain)
    except RecursionError:
        raise InputError("the body is nested too deeply") from None


def _fingerprint(payload: str, job_id: str) -> str:
    """No other job has it: who asks for the same edit twice, asks for two."""
    return hashlib.sha256(f"[{json.dumps(job_id)}, {payload}]".encode()).hexdigest()
