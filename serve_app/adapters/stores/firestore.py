"""Jobs, cancellations and session documents in Firestore; see `firestore_database`.

    jobs/{jobId}                            the record as JSON, and the fields that queries need
    jobProgress/{jobId}                     apart from the record, which progress never touches
    cancellations/{sessionKey}
    owners/{owner}                          counts creations within a quota, none of which misses another
    users/{userId}/sessions/{sessionId}     the app's own document, of which only our fields are written

Queries need the indexes in k8s/firestore.indexes.json: `firebase deploy --only firestore:indexes`.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Unpack
from urllib.parse import unquote

from google.cloud.firestore import FieldFilter, Increment, Query
from pydantic import ValidationError

from ...errors import StoreUnavailable, UnknownJob
from ...jobs.claims import QUOTA_WINDOW, Change, Claim, Quota, posted
from ...jobs.ports import LISTED, JobQuery
from ...jobs.record import Job, Notification, State
from ...models import Progress
from ..calls import current_call
from .firestore_database import ONCE, Firestore, Transaction, document_name
from .records import read_all, read_record, with_progress
from .session_documents import SessionDocument, written

#: The map in a session document that says whose it is.
CLAIM = "processingClaim"
_UNFINISHED = [state for state in State if not state.is_final]


class FirestoreJobStore:
    def __init__(self, url: str) -> None:
        """See `Firestore`."""
        self._database = Firestore(url)

    async def now(self) -> datetime:
        return await self._database.run(lambda: _read_at(self._document("clock", "now").get()))

    async def get(self, job_id: str) -> Job | None:
        return await self._database.run(lambda: self._get(job_id))

    async def update(self, job_id: str, lock_key: str, change: Change) -> Job:
        return await self._database.transact(lambda t: self._update(t, job_id, lock_key, change))

    async def create(self, new: Job, quota: Quota | None = None) -> tuple[Job, bool]:
        return await self._database.contend(lambda: self._create(new, quota))

    async def ahead(self, job: Job) -> int:
        def count() -> int:
            older = self._where("variant", "==", job.variant).where(filter=FieldFilter("status", "==", State.QUEUED))
            return _count(_newest(older.where(filter=FieldFilter("createdAt", "<", job.created_at))))

        return await self._database.run(count)

    async def report(self, claim: Claim, progress: Progress) -> None:
        await self._database.transact(lambda t: self._report(t, claim, progress))

    async def list(self, **query: Unpack[JobQuery]) -> Sequence[Job]:
        def found() -> Sequence[Job]:
            limit = query.get("limit", LISTED)
            if (owes_by := query.get("owes_by")) is not None:
                return self._owing(owes_by, query.get("notification"), query.get("receiver"), limit)
            wanted = {"type": query.get("type"), "status": query.get("status"), "owner": query.get("owner")}
            return self._newest(wanted | {"sessionKey": query.get("lock_key")}, query.get("before"), limit)

        return await self._database.run(found)

    async def delete(self, job_id: str) -> None:
        def both(transaction: Transaction) -> None:
            for collection in ("jobs", "jobProgress"):
                transaction.delete(self._document(collection, job_id))

        await self._database.transact(both)

    async def cancel_until(self, lock_key: str, moment: datetime) -> None:
        def later(transaction: Transaction) -> None:
            document = self._document("cancellations", lock_key)
            until = _until(document.get(transaction=transaction))
            if until is None or until < moment:
                transaction.set(document, {"until": moment})

        await self._database.transact(later)

    async def canceled_until(self, lock_key: str) -> datetime | None:
        return await self._database.run(lambda: _until(self._document("cancellations", lock_key).get()))

    async def write_session(self, job: Job, document: Mapping[str, Any]) -> None:
        await self._database.transact(lambda t: self._write_session(t, job, document))

    async def read_session(self, user_id: str, session_id: str) -> Mapping[str, Any] | None:
        """The whole document, fields that are not ours included."""
        fields = await self._database.run(lambda: self._session(user_id, session_id).get().to_dict())
        return None if fields is None else {name: value for name, value in fields.items() if name != CLAIM}

    def close(self) -> None:
        self._database.close()

    def _document(self, collection: str, key: str) -> Any:
        return self._database.client.collection(collection).document(document_name(key))

    def _get(self, job_id: str) -> Job | None:
        stored = self._document("jobs", job_id).get()
        return next(self._with_progress([_record(stored)])) if stored.exists else None

    def _update(self, transaction: Transaction, job_id: str, lock_key: str, change: Change) -> Job:
        stored = self._document("jobs", job_id).get(transaction=transaction)
        job = _record(stored) if stored.exists else None
        rivals = self._rivals(transaction, job_id, lock_key)
        now = _read_at(stored)
        changed = {after.id: after for after in current_call().callers(lambda: change(job, rivals, now))}
        for after in changed.values():
            transaction.set(self._document("jobs", after.id), _columns(after))
        job = changed.get(job_id, job)
        if job is None:
            raise UnknownJob(f"there is no job {job_id}")
        return job

    def _create(self, new: Job, quota: Quota | None) -> tuple[Job, bool]:
        document, batch = self._document("jobs", new.id), self._database.client.batch()
        stored = document.get()
        if stored.exists:
            return next(self._with_progress([_record(stored)])), False
        now = _read_at(stored)
        if quota is not None and new.owner:
            # Whoever creates a job of this owner while this counts writes the document that was read before.
            owner, own = self._document("owners", new.owner).get(), self._where("owner", "==", new.owner)
            unfinished = own.where(filter=FieldFilter("status", "in", _UNFINISHED))
            of_today = _newest(own.where(filter=FieldFilter("createdAt", ">", now - QUOTA_WINDOW)))
            quota.check(unfinished=_count(unfinished), of_today=_count(of_today))
            self._database.change(batch, owner, {"created": Increment(1)})
        job = posted(new, now)
        batch.create(document, _columns(job))
        self._database.commit(batch)
        return job, True

    def _rivals(self, transaction: Transaction, job_id: str, lock_key: str) -> Sequence[Job]:
        if not lock_key:
            return ()
        session = self._where("sessionKey", "==", lock_key).where(filter=FieldFilter("status", "in", _UNFINISHED))
        found = map(_record, session.get(transaction=transaction, **ONCE))
        return tuple(job for job in found if job.id != job_id)

    def _report(self, transaction: Transaction, claim: Claim, progress: Progress) -> None:
        # The job is read outside of the transaction, which would lock it.
        known = self._document("jobs", claim.job_id).get(["status"]).exists
        document = self._document("jobProgress", claim.job_id)
        reported = (document.get(transaction=transaction).to_dict() or {}).get("fence")
        if known and claim.fence >= (reported if isinstance(reported, int) else 0):
            transaction.set(document, {"fence": claim.fence, **progress.model_dump()})

    def _newest(
        self, wanted: Mapping[str, str | None], before: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Job]:
        query = self._database.client.collection("jobs")
        for field, value in wanted.items():
            if value is not None:
                query = query.where(filter=FieldFilter(field, "==", value))
        query = _newest(query).order_by("__name__", direction=Query.DESCENDING)
        if before is not None:
            created_at, job_id = before
            query = query.start_after({"createdAt": created_at, "__name__": document_name(job_id)})
        return self._listed(query, limit)

    def _owing(
        self, by: datetime, notification: Notification | None, receiver: str | None, limit: int
    ) -> Sequence[Job]:
        due_at = f"owes.{notification}" if notification else "owesAt"
        query = self._where(due_at, "<=", by).order_by(due_at)
        if receiver is not None:
            query = query.where(filter=FieldFilter("receiver", "==", receiver))
        return self._listed(query, limit)

    def _where(self, field: str, comparison: str, value: object) -> Any:
        return self._database.client.collection("jobs").where(filter=FieldFilter(field, comparison, value))

    def _listed(self, query: Any, limit: int) -> Sequence[Job]:
        found = read_all(lambda offset: query.limit(limit).offset(offset).get(**ONCE), _record, limit)
        return tuple(self._with_progress(found))

    def _with_progress(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """The jobs with what was reported under their present fencing number."""
        documents = {job.id: self._document("jobProgress", job.id) for job in jobs}
        stored = self._database.client.get_all(documents.values()) if jobs else ()
        reports = {found.id: found.to_dict() for found in stored}
        for job in jobs:
            reported = reports.get(documents[job.id].id) or {}
            is_current = reported.pop("fence", None) == job.fence
            yield with_progress(job, reported) if is_current else job

    def _session(self, user_id: str, session_id: str) -> Any:
        user = self._database.client.collection("users").document(document_name(user_id))
        return user.collection("sessions").document(document_name(session_id))

    def _write_session(self, transaction: Transaction, job: Job, document: Mapping[str, Any]) -> None:
        session = self._session(job.user_id, job.session_id)
        claim = (session.get([CLAIM], transaction=transaction).to_dict() or {}).get(CLAIM)
        after = written(_claimed(claim), job, document)
        if after is not None:
            fields = {**document, CLAIM: _claim(after)}
            # A field named here is replaced whole, and no other is touched.
            transaction.set(session, fields, merge=[self._database.client.field_path(name) for name in fields])


def _newest(query: Any) -> Any:
    return query.order_by("createdAt", direction=Query.DESCENDING)


def _count(query: Any) -> int:
    ((count,),) = query.count().get(**ONCE)
    return int(count.value)


def _columns(job: Job) -> Mapping[str, Any]:
    return {
        "type": job.type,
        "status": job.status,
        "sessionKey": job.lock_key,
        "owner": job.owner,
        "variant": job.variant,
        "createdAt": job.created_at,
        "owesAt": job.owes_at,
        "owes": {notification: owed.due_at for notification, owed in job.owed.items()},
        "receiver": job.receiver if "webhook" in job.owed else None,
        "record": job.model_dump_json(),
    }


def _record(stored: Any) -> Job:
    return read_record(unquote(stored.id), stored.to_dict().get("record", ""))


def _read_at(stored: Any) -> datetime:
    """The server's time when it read `stored`, which need not be there."""
    read_at: datetime = stored.read_time
    return datetime.fromtimestamp(read_at.timestamp(), UTC)


def _until(stored: Any) -> datetime | None:
    if not stored.exists:
        return None
    until = stored.to_dict().get("until")
    if not isinstance(until, datetime):
        raise StoreUnavailable(f"the cancellation of {unquote(stored.id)} cannot be read")
    return until


def _claim(document: SessionDocument) -> Mapping[str, Any]:
    return {
        "jobId": document.job_id,
        "fence": document.fence,
        "claimedAt": document.claimed_at,
        "isFinal": document.is_final,
    }


def _claimed(claim: Any) -> SessionDocument | None:
    """The part of a stored document that says whose it is. Others may write there: what cannot be read says nothing,
    like what was removed."""
    fields = claim if isinstance(claim, dict) else {}
    try:
        return SessionDocument(
            job_id=fields.get("jobId"),
            fence=fields.get("fence"),
            claimed_at=fields.get("claimedAt"),
            is_final=fields.get("isFinal"),
            fields={},
        )
    except ValidationError:
        return None
