"""Cancelling all that a session has, its waiting messages included."""

from collections.abc import Sequence
from contextlib import suppress

from ..errors import IllegalTransition
from . import claims
from .ports import JobStore
from .record import Job


async def cancel_session(jobs: JobStore, user_id: str, session_id: str) -> Sequence[Job]:
    """Stop every job of the session that is not over, and have its messages published up to now end canceled when they
    come. The jobs that were stopped; none may have begun yet. Raises StoreUnavailable."""
    key = f"{user_id}/{session_id}"
    # First: a worker claims first and looks here then, so one of the two sees the other.
    await jobs.cancel_until(key, await jobs.now())
    canceled = []
    for job in await jobs.list(lock_key=key):
        if not job.status.is_final:
            with suppress(IllegalTransition):
                canceled.append(await jobs.update(job.id, key, claims.cancel))
    return canceled
