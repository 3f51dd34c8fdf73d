"""Stored job records, JSON, of which a newer version of this service may have written some."""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

from pydantic import ValidationError

from ..errors import StoreUnavailable
from ..jobs import Job

log = logging.getLogger(__name__)

Row = TypeVar("Row")


def read_record(job_id: str, record: str) -> Job:
    """Raises StoreUnavailable for a record that this version cannot read: one that can will."""
    try:
        return Job.model_validate_json(record)
    except ValidationError as e:
        fields = sorted({".".join(map(str, error["loc"])) or "its JSON" for error in e.errors()})
    raise StoreUnavailable(
        f"the record of job {job_id} was written by another version of this service: cannot read {', '.join(fields)}",
        job_id=job_id,
    )


def read_all(page: Callable[[int], Sequence[Row]], read: Callable[[Row], Job], limit: int) -> Sequence[Job]:
    """The first `limit` jobs that can be read. `page` gives up to `limit` rows after as many as it is told; `read`
    raises as `read_record`."""
    jobs: list[Job] = []
    offset = 0
    while len(jobs) < limit:
        rows = page(offset)
        for row in rows:
            try:
                jobs.append(read(row))
            except StoreUnavailable as e:
                _log_unreadable(e.details["job_id"], e.message)
        offset += len(rows)
        if len(rows) < limit:
            break
    return jobs[:limit]


@lru_cache(1024)
def _log_unreadable(job_id: str, reason: str) -> None:
    # Once in a process: what is owed is listed every other second.
    log.warning("A job is left out: %s", reason, extra={"action": "record_unreadable", "job_id": job_id})
