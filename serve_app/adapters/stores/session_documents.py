"""Which write to a session's document counts. Pure; the same rule for every mirror.

A session's jobs run one at a time, so their claims have an order, told by the time of the claim (`started_at`).
A write is ignored where the document was written for the same job under a higher fencing number, or for another job
that was claimed later; and where it says that a claim runs of which the document says how it ended. A job that was
never claimed counts by `created_at` and leaves the order as it is.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict

from ...jobs.record import Job


class SessionDocument(BaseModel):
    """A stored document and whose it is."""

    model_config = ConfigDict(frozen=True)

    job_id: str
    fence: int
    #: When the latest claim that wrote here was taken; None while none has.
    claimed_at: AwareDatetime | None
    #: Whether it says how the job ended.
    is_final: bool = False
    fields: dict[str, Any]


def written(stored: SessionDocument | None, job: Job, fields: Mapping[str, Any]) -> SessionDocument | None:
    """The document after `job` wrote `fields` into it, top-level field by field; None where the write is ignored."""
    if stored is not None and _is_stale(stored, job):
        return None
    claims = (stored.claimed_at if stored else None, job.started_at)
    return SessionDocument(
        job_id=job.id,
        fence=job.fence,
        claimed_at=max((at for at in claims if at is not None), default=None),
        is_final=job.status.is_final,
        fields={**(stored.fields if stored else {}), **fields},
    )


def _is_stale(stored: SessionDocument, job: Job) -> bool:
    if stored.job_id == job.id:
        return stored.fence > job.fence or (stored.fence == job.fence and stored.is_final and not job.status.is_final)
    return stored.claimed_at is not None and (job.started_at or job.created_at) < stored.claimed_at
