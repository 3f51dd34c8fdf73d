"""Blobs in a bucket of Firebase Storage, which is Google Cloud Storage, through firebase-admin.

A blob's version is its generation. Google's client blocks, so it runs in threads: as many as there are connections.
`firebase_app.py` says whose credentials are used; links are signed with their key, or, where Workload Identity has
none, by Google's signBlob: the service account then needs roles/iam.serviceAccountTokenCreator on itself.

A conditional write that is tried again after a lost answer may find its own first try: BlobConflict, and stored.
"""

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import requests
from firebase_admin import storage
from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, PreconditionFailed, Unauthorized
from google.auth import iam
from google.auth.credentials import AnonymousCredentials, Signing
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import Request
from google.cloud.storage import Blob, Bucket
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY
from google.oauth2 import service_account
from requests.adapters import HTTPAdapter

from ...blobs import ANY_VERSION, BlobInfo, UploadLink
from ...errors import BlobConflict, BlobNotFound, FluxFillError, SettingsError, StoreDenied, StoreUnavailable
from ..calls import Call, current_call
from ..google import firebase_app
from ..unforeseen import unforeseen
from .links import check_expiry
from .paths import check_path
from .transfers import BOUNDS, Bounds, Limited, check_size, whole_file

T = TypeVar("T")

#: Requests at a time, over all stores of this process.
CONCURRENCY = 32
#: No new try of a download that has begun after this, in seconds.
RETRY_FILE_S = 600.0
#: What each request may take that a signature costs, in seconds.
SIGN_S = 5.0

_POOL = ThreadPoolExecutor(CONCURRENCY, "firebase-storage")
_RETRY = DEFAULT_RETRY.with_delay(initial=0.1, maximum=2.0)
#: Bytes of a chunk of an upload that resumes, held in memory and sent again as a whole; a multiple of 256 KiB. Google's
#: client sends up to 8 MiB in one request, and would otherwise make chunks of 100 MiB.
_CHUNK = 8 * 1024 * 1024
#: Of a request of Google's client: its time-outs and tries.
_Options = dict[str, Any]
_BINARY = "application/octet-stream"
#: In Google's words, where no blob is missing but the bucket.
_NO_BUCKET = "bucket does not exist"


class FirebaseBlobStore:
    def __init__(self, url: str, bounds: Bounds = BOUNDS) -> None:
        """`firebase:BUCKET`. Nothing is connected, nor credentials looked for, before the first use.

        Raises SettingsError where no bucket is named. Every method may raise InvalidCredentials.
        """
        self._name = url.removeprefix("firebase:")
        if not self._name or "/" in self._name:
            raise SettingsError(f"blob store {url!r} should be firebase:BUCKET", url=url)
        self._bounds, retry = bounds, _RETRY.with_timeout(bounds.retry_s)
        self._asking: _Options = {"timeout": (bounds.connect_s, bounds.silence_s), "retry": retry}
        # While it sends, urllib3 minds the first time-out only.
        self._sending: _Options = {"timeout": (bounds.silence_s, bounds.silence_s), "retry": retry}
        self._lock = threading.Lock()
        self._bucket: Bucket | None = None

    async def head(self, path: str) -> BlobInfo:
        return await self._run(path, lambda bucket: _head(bucket, path, self._asking))

    async def get(self, path: str, *, max_bytes: int) -> tuple[bytes, BlobInfo]:
        async with self._bounds.reading(path, max_bytes):
            return await self._run(path, lambda bucket: _get(bucket, path, max_bytes, self._asking))

    async def put(self, path: str, data: bytes, *, content_type: str, if_version: str = ANY_VERSION) -> BlobInfo:
        def work(bucket: Bucket) -> BlobInfo:
            return _put(bucket, path, data, content_type, if_version, self._sending)

        return await self._run(path, work)

    async def delete(self, path: str) -> None:
        with suppress(BlobNotFound):
            await self._run(path, lambda bucket: bucket.blob(path).delete(**self._asking))

    async def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        pages = await self._run(prefix, lambda bucket: bucket.list_blobs(prefix=f"{prefix}/", **self._asking).pages)
        while (page := await self._run(prefix, lambda _: _next_page(pages))) is not None:
            for info in page:
                yield info

    async def download(self, path: str, to: Path) -> BlobInfo:
        return await self._run(path, lambda bucket: _download(bucket, path, to, self._asking))

    async def upload(self, path: str, source: Path) -> BlobInfo:
        return await self._run(path, lambda bucket: _upload(bucket, path, source, self._sending))

    async def link(self, path: str, *, expires_s: int) -> str:
        check_expiry(expires_s)
        return await self._run(path, lambda bucket: _link(bucket.blob(path), expires_s))

    async def upload_link(self, path: str, *, size: int, expires_s: int) -> UploadLink:
        check_expiry(expires_s)
        return await self._run(path, lambda bucket: _upload_link(bucket.blob(path), size, expires_s, self._asking))

    async def _run(self, path: str, work: Callable[[Bucket], T]) -> T:
        check_path(path)
        running, call = asyncio.get_running_loop(), Call()
        try:
            return await running.run_in_executor(
                _POOL, call.run, lambda: _translated(path, lambda: work(self._connected()))
            )
        finally:
            call.abandon()

    def _connected(self) -> Bucket:
        with self._lock:
            if self._bucket is None:
                self._bucket = _bucket(self._name)
            return self._bucket


class _InBlocks(HTTPAdapter):
    """Sends a body in blocks of 16 KiB, each with its own time limit. urllib3 sends bytes at once, all in one limit."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        # Google's client tries again what was broken off for a caller who left.
        current_call().check()
        if isinstance(request.body, bytes):
            request.body = io.BytesIO(request.body)
        response = super().send(request, *args, **kwargs)
        # A body may trickle in for ever: a caller who leaves ends it.
        current_call().interrupt_by(partial(_end, response.raw))
        return response


def _end(raw: Any) -> None:
    """Whoever reads this response fails at once. urllib3 refuses where it was read to its end, and its connection is
    free for others or closed."""
    with suppress(RuntimeError, ValueError, OSError):
        raw.shutdown()


def _bucket(name: str) -> Bucket:
    bucket = storage.bucket(name, firebase_app())
    # As Google's documentation has it; requests' own adapter keeps ten connections.
    for scheme in ("https://", "http://"):
        bucket.client._http.mount(scheme, _InBlocks(pool_maxsize=CONCURRENCY))
    return bucket


def _translated(path: str, work: Callable[[], T]) -> T:
    """`work()`, with the errors of Google's client in our words."""
    try:
        return work()
    except FluxFillError:
        raise
    except NotFound as e:
        if _NO_BUCKET in e.message:
            raise StoreUnavailable("the bucket does not exist", path=path) from e
        raise BlobNotFound(f"blob {path} does not exist", path=path) from e
    except PreconditionFailed as e:
        raise BlobConflict(f"blob {path} is not at the expected version", path=path) from e
    except (Forbidden, Unauthorized) as e:
        raise StoreDenied(f"blob {path}: {e}", path=path) from e
    except (GoogleAPIError, GoogleAuthError, DataCorruption, requests.RequestException) as e:
        raise StoreUnavailable(f"blob {path}: {e}", path=path) from e
    except Exception as e:
        raise unforeseen(StoreUnavailable, f"blob {path}", e) from e


def _info(blob: Blob, size: int | None = None) -> BlobInfo:
    size = blob.size if size is None else size
    if size is None or blob.generation is None:
        raise StoreUnavailable(f"blob {blob.name}: the answer has no size or no generation", path=blob.name)
    return BlobInfo(
        path=blob.name,
        size=size,
        version=str(blob.generation),
        content_type=blob.content_type or _BINARY,
    )


def _next_page(pages: Iterator[Any]) -> list[BlobInfo] | None:
    page = next(pages, None)
    # Google's console makes empty blobs with such names to show folders.
    return None if page is None else [_info(blob) for blob in page if not blob.name.endswith("/")]


def _head(bucket: Bucket, path: str, asking: _Options) -> BlobInfo:
    blob = bucket.blob(path)
    blob.reload(**asking)
    return _info(blob)


def _get(bucket: Bucket, path: str, max_bytes: int, asking: _Options) -> tuple[bytes, BlobInfo]:
    check_size(path, _head(bucket, path, asking).size, max_bytes)
    held = Limited(path, max_bytes)
    # The answer itself says which generation it is, should somebody have written since.
    blob = bucket.blob(path)
    blob.download_to_file(held, **asking)
    return held.getvalue(), _info(blob, size=held.tell())


def _put(bucket: Bucket, path: str, data: bytes, content_type: str, if_version: str, sending: _Options) -> BlobInfo:
    blob = bucket.blob(path, chunk_size=_CHUNK)
    generation = None if if_version == ANY_VERSION else int(if_version or 0)
    with _sending(path):
        blob.upload_from_string(data, content_type=content_type, if_generation_match=generation, **sending)
    return _info(blob)


def _download(bucket: Bucket, path: str, to: Path, asking: _Options) -> BlobInfo:
    # First, because a store that is down is told sooner than a download that broke is given up.
    _head(bucket, path, asking)
    blob = bucket.blob(path)
    with whole_file(to) as file:
        blob.download_to_file(file, **asking | {"retry": _RETRY.with_timeout(RETRY_FILE_S)})
        return _info(blob, size=file.tell())


def _upload(bucket: Bucket, path: str, source: Path, sending: _Options) -> BlobInfo:
    blob = bucket.blob(path, chunk_size=_CHUNK)
    with _sending(path):
        blob.upload_from_filename(source, content_type=_BINARY, **sending)
    return _info(blob)


@contextmanager
def _sending(path: str) -> Iterator[None]:
    """A body has no blob to be missing: 404 is a session that Google lost, and the upload is to begin again.

    https://docs.cloud.google.com/storage/docs/resumable-uploads#handling_errors
    """
    try:
        yield
    except NotFound as e:
        if _NO_BUCKET in e.message:
            raise
        raise StoreUnavailable(f"blob {path}: its upload was lost, and has to begin again", path=path) from e


def _link(blob: Blob, expires_s: int) -> str:
    signer = _signer()
    if signer is None:
        return f"{blob.client.api_endpoint}/storage/v1{blob.path}?alt=media"
    link: str = blob.generate_signed_url(
        version="v4", method="GET", expiration=timedelta(seconds=expires_s), credentials=signer
    )
    return link


def _upload_link(blob: Blob, size: int, expires_s: int, asking: _Options) -> UploadLink:
    headers, signer = {"Content-Length": str(size)}, _signer()
    if signer is None:
        # Emulators sign nothing; a session of an upload that resumes takes one PUT from anyone.
        session = blob.create_resumable_upload_session(content_type=_BINARY, size=size, **asking)
        return UploadLink(url=session, headers=headers)
    # Of a body's bytes, the least and the most: https://docs.cloud.google.com/storage/docs/xml-api/reference-headers
    signed, expires = {"x-goog-content-length-range": f"{size},{size}"}, timedelta(seconds=expires_s)
    # Google's client adds to its headers.
    url = blob.generate_signed_url(
        version="v4", method="PUT", expiration=expires, headers=dict(signed), credentials=signer
    )
    return UploadLink(url=url, headers=headers | signed)


def _signer() -> Any:
    """Credentials that sign; None where an emulator asks for no signature. Raises StoreUnavailable for none that can.

    Google's Blob would ask signBlob itself, given the e-mail and a token, but would wait two minutes for it.
    """
    who = firebase_app().credential.get_credential()
    if isinstance(who, AnonymousCredentials):
        return None
    if isinstance(who, Signing):
        return who
    if not getattr(who, "service_account_email", None):
        raise StoreUnavailable("these credentials cannot sign links: they do not belong to a service account")
    request: Any = partial(Request(), timeout=SIGN_S)
    if not who.valid:
        # Until then Workload Identity's e-mail is "default".
        who.refresh(request)
    email = who.service_account_email
    return service_account.Credentials(iam.Signer(request, who, email), email, token_uri="")
