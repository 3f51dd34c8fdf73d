"""Cancelling: one job, or all that a session has, its waiting messages included."""

from collections.abc import Sequence
from contextlib import suppress

from ..errors import IllegalTransition, UnknownJob
from . import claims
from .ports import JobStore
from .record import Job


class Canceler:
    def __init__(self, job_store: JobStore) -> None:
        self._jobs = job_store

    async def job(self, job_id: str) -> Job:
        """Stop one job, which is no audit. A waiting one never starts, a running one stops within a step.

        Raises UnknownJob; IllegalTransition where it is over; StoreUnavailable.
        """
        stored = await self._jobs.get(job_id)
        if stored is None or stored.type == "audit":
            raise UnknownJob(f"there is no job {job_id}")
        return await self._jobs.update(job_id, stored.lock_key, claims.cancel)

    async def session(self, user_id: str, session_id: str) -> Sequence[Job]:
        """Stop every job of the session that is not over, and have its messages published up to now end canceled when
        they come. The jobs that were stopped; none may have begun yet. Raises StoreUnavailable."""
        key = f"{user_id}/{session_id}"
        # First: a worker claims first and looks here then, so one of the two sees the other.
        await self._jobs.cancel_until(key, await self._jobs.now())
        canceled = []
        for job in await self._jobs.list(lock_key=key):
            if not job.status.is_final:
                with suppress(IllegalTransition):
                    canceled.append(await self._jobs.update(job.id, key, claims.cancel))
        return canceled
