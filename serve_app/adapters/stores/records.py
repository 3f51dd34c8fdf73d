"""Stored job records, JSON, of which a newer version of this service may have written some."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ...errors import StoreUnavailable
from ...jobs.record import Job
from ...models import Progress

log = logging.getLogger(__name__)

Row = TypeVar("Row")
M = TypeVar("M", bound=BaseModel)


def read_record(job_id: str, record: str) -> Job:
    """Raises StoreUnavailable for a record that this version cannot read: one that can will."""
    return read_stored(Job, f"the record of job {job_id}", record, job_id=job_id)


def read_stored(model: type[M], what: str, text: str, **details: str) -> M:
    """`text` as JSON of `model`. Raises StoreUnavailable, with `details`, where it is none."""
    try:
        return model.model_validate_json(text)
    except ValidationError as e:
        fields = sorted({".".join(map(str, error["loc"])) or "its JSON" for error in e.errors()})
    raise StoreUnavailable(
        f"{what} was written by another version of this service: cannot read {', '.join(fields)}", **details
    )


def with_progress(job: Job, reported: Mapping[str, Any]) -> Job:
    """The job with the progress that was reported; without it where that cannot be read."""
    try:
        return job.evolve(progress=Progress.model_validate(reported))
    except ValidationError:
        return job


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
    log.warning("Skipped an unreadable job record: %s", reason, extra={"action": "record_unreadable", "job_id": job_id})
