"""Jobs, cancellations and session documents in a SQL database: SQLite or PostgreSQL, see `sql_database`."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Unpack

import sqlalchemy as sa

from ...clock import Clock, utc_now
from ...errors import UnknownJob
from ...jobs.claims import QUOTA_WINDOW, Change, Claim, Quota, posted
from ...jobs.ports import LISTED, JobQuery
from ...jobs.record import Job, State
from ...models import Progress
from ..calls import current_call
from .records import read_all, read_record, read_stored, with_progress
from .session_documents import SessionDocument, written
from .sql_database import Database, lock, server_time
from .sql_tables import CANCELLATIONS, JOBS, PROGRESS, SESSIONS, UNFINISHED, added_columns, seconds


class SqlJobStore:
    """Its clock is the server's; SQLite's is the machine's, which all its processes run on."""

    def __init__(self, url: str, clock: Clock = utc_now) -> None:
        """See `Database`. `clock` stands for the machine's."""
        self._database, self._clock = Database(url), clock

    async def now(self) -> datetime:
        return await self._database.read(lambda c: server_time(c) or self._clock())

    async def get(self, job_id: str) -> Job | None:
        return await self._database.read(lambda c: _get(c, job_id))

    async def update(self, job_id: str, lock_key: str, change: Change) -> Job:
        return await self._database.write(lambda c: _update(c, job_id, lock_key, change, self._clock))

    async def create(self, new: Job, quota: Quota | None = None) -> tuple[Job, bool]:
        return await self._database.write(lambda c: _create(c, new, quota, self._clock))

    async def ahead(self, job: Job) -> int:
        older = JOBS.c.created_at < seconds(job.created_at)
        where = (JOBS.c.variant == job.variant, JOBS.c.status == State.QUEUED, older)
        return await self._database.read(lambda c: _count(c, *where))

    async def report(self, claim: Claim, progress: Progress) -> None:
        await self._database.write(lambda c: _report(c, claim, progress))

    async def list(self, **query: Unpack[JobQuery]) -> Sequence[Job]:
        limit, notification = query.get("limit", LISTED), query.get("notification")
        named = ("receiver",) if (owes_by := query.get("owes_by")) else ("type", "status", "lock_key", "owner")
        wanted = {JOBS.c[name]: query.get(name) for name in named}
        jobs = _JOBS.where(*(column == value for column, value in wanted.items() if value is not None))
        if owes_by is not None:
            due_at = JOBS.c[f"owes_{notification}_at" if notification else "owes_at"]
            jobs = jobs.where(due_at <= seconds(owes_by)).order_by(due_at)
        else:
            jobs = jobs.order_by(JOBS.c.created_at.desc(), JOBS.c.id.desc())
            if before := query.get("before"):
                created_at, job_id = before
                jobs = jobs.where(sa.tuple_(JOBS.c.created_at, JOBS.c.id) < (seconds(created_at), job_id))
        return await self._database.read(lambda c: _list(c, jobs.limit(limit), limit))

    async def delete(self, job_id: str) -> None:
        def both(connection: sa.Connection) -> None:
            connection.execute(JOBS.delete().where(JOBS.c.id == job_id))
            connection.execute(PROGRESS.delete().where(PROGRESS.c.job_id == job_id))

        await self._database.write(both)

    async def cancel_until(self, lock_key: str, moment: datetime) -> None:
        def later(connection: sa.Connection) -> None:
            lock(connection, f"cancellations/{lock_key}")
            stored = connection.scalar(_until(lock_key))
            if stored is None or stored < moment.timestamp():
                _put(connection, CANCELLATIONS, {"lock_key": lock_key}, {"until": seconds(moment)})

        await self._database.write(later)

    async def canceled_until(self, lock_key: str) -> datetime | None:
        def read(connection: sa.Connection) -> datetime | None:
            until = connection.scalar(_until(lock_key))
            return None if until is None else datetime.fromtimestamp(until, UTC)

        return await self._database.read(read)

    async def write_session(self, job: Job, document: Mapping[str, Any]) -> None:
        await self._database.write(lambda c: _mirror(c, job, document))

    async def read_session(self, user_id: str, session_id: str) -> Mapping[str, Any] | None:
        document = await self._database.read(lambda c: _mirrored(c, _document(user_id, session_id)))
        return document.fields if document else None

    def close(self) -> None:
        self._database.close()


#: Records, with the progress reported under their present fencing number.
_JOBS = sa.select(JOBS.c.id, JOBS.c.record, PROGRESS.c.step, PROGRESS.c.steps).select_from(
    JOBS.outerjoin(PROGRESS, sa.and_(PROGRESS.c.job_id == JOBS.c.id, PROGRESS.c.fence == JOBS.c.fence))
)


def _get(connection: sa.Connection, job_id: str) -> Job | None:
    row = connection.execute(_JOBS.where(JOBS.c.id == job_id)).first()
    return None if row is None else _job(row)


def _list(connection: sa.Connection, query: sa.Select[Any], limit: int) -> Sequence[Job]:
    return read_all(lambda offset: connection.execute(query.offset(offset)).all(), _job, limit)


def _job(row: Any) -> Job:
    job = read_record(row.id, row.record)
    return job if row.step is None else with_progress(job, {"step": row.step, "steps": row.steps})


def _update(connection: sa.Connection, job_id: str, lock_key: str, change: Change, clock: Clock) -> Job:
    # Rows that are not there yet cannot be locked: two new jobs of one session would not see each other.
    now = lock(connection, f"jobs/{lock_key or job_id}") or clock()
    stored, rivals = _record(connection, job_id), _rivals(connection, job_id, lock_key)
    for job in current_call().callers(lambda: change(stored, rivals, now)):
        _put(connection, JOBS, {"id": job.id}, _columns(job))
    after = _record(connection, job_id)
    if after is None:
        raise UnknownJob(f"there is no job {job_id}")
    return after


def _create(connection: sa.Connection, new: Job, quota: Quota | None, clock: Clock) -> tuple[Job, bool]:
    is_limited = quota is not None and bool(new.owner)
    # What another transaction of this owner stores is seen once it has freed the lock.
    now = lock(connection, f"owners/{new.owner}") if is_limited else server_time(connection)
    if stored := _get(connection, new.id):
        return stored, False
    now = now or clock()
    if quota is not None and is_limited:
        own, today = JOBS.c.owner == new.owner, JOBS.c.created_at > seconds(now - QUOTA_WINDOW)
        unfinished = _count(connection, own, JOBS.c.status.in_(UNFINISHED))
        quota.check(unfinished=unfinished, of_today=_count(connection, own, today))
    job = posted(new, now)
    # If another transaction has stored this id meanwhile, the database refuses it, and this one is run again.
    connection.execute(JOBS.insert().values(id=job.id, **_columns(job)))
    return job, True


def _count(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(JOBS).where(*where)) or 0


def _columns(job: Job) -> Mapping[str, Any]:
    return {
        "type": job.type,
        "status": job.status,
        "lock_key": job.lock_key,
        "created_at": job.created_at.timestamp(),
        **added_columns(job),
        "fence": job.fence,
        "record": job.model_dump_json(),
    }


def _record(connection: sa.Connection, job_id: str) -> Job | None:
    record = connection.scalar(sa.select(JOBS.c.record).where(JOBS.c.id == job_id).with_for_update())
    return None if record is None else read_record(job_id, record)


def _rivals(connection: sa.Connection, job_id: str, lock_key: str) -> Sequence[Job]:
    if not lock_key:
        return ()
    where = (JOBS.c.lock_key == lock_key, JOBS.c.status.in_(UNFINISHED), JOBS.c.id != job_id)
    query = sa.select(JOBS.c.id, JOBS.c.record).where(*where).order_by(JOBS.c.id).with_for_update()
    return tuple(read_record(row.id, row.record) for row in connection.execute(query))


def _report(connection: sa.Connection, claim: Claim, progress: Progress) -> None:
    lock(connection, f"progress/{claim.job_id}")
    reported = sa.select(PROGRESS.c.fence).where(PROGRESS.c.job_id == claim.job_id)
    # The job itself is not locked: a claim is never kept from being renewed.
    known = connection.scalar(sa.select(JOBS.c.id).where(JOBS.c.id == claim.job_id))
    if known is not None and claim.fence >= (connection.scalar(reported) or 0):
        _put(connection, PROGRESS, {"job_id": claim.job_id}, {"fence": claim.fence, **progress.model_dump()})


def _until(lock_key: str) -> sa.Select[float]:
    return sa.select(CANCELLATIONS.c.until).where(CANCELLATIONS.c.lock_key == lock_key)


def _document(user_id: str, session_id: str) -> sa.Select[str]:
    return sa.select(SESSIONS.c.document).where(SESSIONS.c.user_id == user_id, SESSIONS.c.session_id == session_id)


def _mirrored(connection: sa.Connection, query: sa.Select[str]) -> SessionDocument | None:
    stored = connection.scalar(query)
    return None if stored is None else read_stored(SessionDocument, "a session document", stored)


def _mirror(connection: sa.Connection, job: Job, document: Mapping[str, Any]) -> None:
    lock(connection, f"sessions/{job.lock_key}")
    stored = _mirrored(connection, _document(job.user_id, job.session_id))
    after = written(stored, job, document)
    if after is not None:
        key = {"user_id": job.user_id, "session_id": job.session_id}
        columns = {"job_id": after.job_id, "fence": after.fence, "document": after.model_dump_json()}
        _put(connection, SESSIONS, key, columns)


def _put(connection: sa.Connection, table: sa.Table, key: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    where = [table.c[name] == value for name, value in key.items()]
    if connection.execute(table.update().where(*where).values(**columns)).rowcount == 0:
        connection.execute(table.insert().values(**key, **columns))
