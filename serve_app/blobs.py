"""Blobs: whole files under paths, with versions."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobInfo:
    path: str
    #: Bytes.
    size: int
    #: Opaque; differs whenever the blob was written again, on S3 (where it has no finer clock than a second) at least
    #: whenever with other bytes.
    version: str
    content_type: str = "application/octet-stream"


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadLink:
    """Where one blob can be written with PUT, once or again, by programs without credentials of the store."""

    #: A secret: never log it.
    url: str
    #: The signature holds for requests with just these headers, the exact `Content-Length` among them.
    headers: Mapping[str, str]


#: `if_version` for "whatever is there"; an empty string means "nothing may be there".
ANY_VERSION = "*"


class BlobStore(Protocol):
    """Whole blobs under relative paths like `users/u/sessions/s/original.jpg`.

    Every method raises UnsafePath for a path that is empty, absolute, longer than 1,024 bytes, or has an empty,
    `.` or `..` part, a backslash or a control character; StoreUnavailable while the store cannot be reached.
    """

    async def head(self, path: str) -> BlobInfo:
        """Raises BlobNotFound."""

    async def get(self, path: str, *, max_bytes: int) -> tuple[bytes, BlobInfo]:
        """The blob and the version these bytes are of. Never holds more than `max_bytes` of it.

        Raises BlobNotFound; BlobTooLarge.
        """

    async def put(self, path: str, data: bytes, *, content_type: str, if_version: str = ANY_VERSION) -> BlobInfo:
        """Store all of `data` or nothing: no reader ever sees a part.

        Raises BlobConflict where the stored version is not `if_version`.
        """

    async def delete(self, path: str) -> None:
        """Deleting what is not there is no error."""

    def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        """The blobs whose path starts with the folder `prefix`, in path order."""

    async def download(self, path: str, to: Path) -> BlobInfo:
        """Write the blob, which may be too large for memory, to `to`, whole or not at all. Raises BlobNotFound."""

    async def upload(self, path: str, source: Path) -> BlobInfo:
        """Store the file, whole or not at all."""

    async def link(self, path: str, *, expires_s: int) -> str:
        """A URL for people and programs without credentials of the store: it reads the blob with GET for `expires_s`
        seconds, 1 to 604,800 (seven days, V4's limit).

        It is not looked whether the blob is there. The URL is a secret: never log it.
        Raises ValueError for another `expires_s`; StoreUnavailable where nothing can be signed now.
        """

    async def upload_link(self, path: str, *, size: int, expires_s: int) -> UploadLink:
        """A signed URL that takes one PUT of exactly `size` bytes to `path`, for `expires_s` seconds; a body of another
        length is refused by the store. Raises as `link`."""
