"""A session: where its files lie in the blob store, and what its document says of a job."""

from typing import Any

from ..blobs import BlobInfo, BlobStore
from ..errors import BlobNotFound, BlobTooLarge, ImageTooLarge, MissingInput
from ..jobs.record import Job, State
from ..settings import Limits

#: Roles of what an edit writes, and their file names; see docs/architecture.md.
OUTPUTS = {"edited": "edited.jpg", "preview": "preview.jpg"}

INPUTS = {"original": "original.jpg", "mask": "mask_auto.png"}


def lock_key(user_id: str, session_id: str) -> str:
    """A session's jobs run one at a time: they write the same blobs."""
    return f"{user_id}/{session_id}"


def session_path(user_id: str, session_id: str, name: str) -> str:
    """Both ids must have passed `messages.ID_PATTERN`."""
    return f"users/{user_id}/sessions/{session_id}/{name}"


async def read_input(
    blobs: BlobStore, user_id: str, session_id: str, role: str, limits: Limits
) -> tuple[bytes, BlobInfo]:
    """The session's `original` or `mask`. Raises MissingInput, ImageTooLarge, StoreUnavailable."""
    path = session_path(user_id, session_id, INPUTS[role])
    try:
        return await blobs.get(path, max_bytes=limits.image_bytes)
    except BlobNotFound as e:
        raise MissingInput(f"{path} is not in the blob store", path=path) from e
    except BlobTooLarge as e:
        raise ImageTooLarge(f"{e.message} (limits.image_bytes)", path=path) from e


def session_document(job: Job) -> dict[str, Any]:
    """What the session document says of `job`: camelCase fields as the app reads them."""
    status = {
        State.SUCCEEDED: "completed",
        State.FAILED: "failed",
        State.EXPIRED: "failed",
        State.CANCELED: "canceled",
    }.get(job.status, "processing")
    failed = status == "failed" and job.error is not None
    document: dict[str, Any] = {
        "jobId": job.id,
        "processingStatus": status,
        "processingError": job.error.model_dump() if failed and job.error else None,
    }
    if job.status == State.SUCCEEDED:
        document |= {
            "processingProgress": 1.0,
            "editedPath": job.paths.get("edited"),
            "previewPath": job.paths.get("preview"),
            "quality": job.quality.verdict if job.quality else None,
            "editedAt": job.finished_at.isoformat() if job.finished_at else None,
        }
    elif not job.status.is_final:
        document["processingProgress"] = round(job.progress.fraction, 3)
    return document
