"""Blobs in a bucket of Amazon S3, or of a server that speaks its protocol, such as MinIO.

The credentials are the ambient ones that object_store finds: AWS_* variables, a web identity (EKS), a container's or
an instance's role. botocore looks for them in the same places, and signs links for uploads: object_store signs no
headers. Listings carry no content types. A link dies with the credentials that signed it, where those expire earlier.

A blob's version is its ETag, a hash of the bytes, and the second it was written: the same bytes written twice within a
second have one version. S3 compares ETags alone, so a write over a version also passes where others have put the very
same bytes back since.

A conditional write that is tried again after a lost answer may find its own first try: BlobConflict, and stored.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, urlsplit

import botocore.session
import obstore
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import CredentialResolver, create_credential_resolver
from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from ...blobs import ANY_VERSION, BlobInfo, UploadLink
from ...errors import BlobConflict, BlobNotFound, FluxFillError, SettingsError, StoreDenied, StoreUnavailable
from ..unforeseen import unforeseen
from .links import check_expiry
from .paths import check_path
from .transfers import BOUNDS, Bounds, Limited, check_size, whole_file

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta, PutMode
    from obstore.store import ClientConfig, RetryConfig, S3Config

#: Bytes taken from a response at a time.
_CHUNK = 256 * 1024
#: Bytes of a part of a large upload. S3 takes 10,000 parts.
_PART = 8 * 1024 * 1024
_PARTS_AT_A_TIME = 4
_BINARY = "application/octet-stream"
#: Where object_store looks for credentials, by botocore's names.
_SOURCES = ("env", "assume-role-with-web-identity", "container-role", "iam-role")
#: In S3's words, where no blob is missing but the bucket.
_NO_BUCKET = "NoSuchBucket"


class S3BlobStore:
    def __init__(self, url: str, bounds: Bounds = BOUNDS) -> None:
        """`s3://BUCKET/PREFIX?endpoint=URL&public_endpoint=URL&region=NAME`; all but the bucket may be left out.

        Links are for the public endpoint, where there is one, and nothing else is. TLS is used unless an endpoint says
        `http://`. Raises SettingsError for another URL.
        """
        self._url, self._bounds = url, bounds
        self._store, self._signer = _store(url, bounds), _store(url, bounds, is_public=True)
        #: For larger bodies, by how often the silence that is borne is doubled.
        self._patient: dict[int, S3Store] = {}
        #: botocore's, once they are found.
        self._credentials: Any = None

    async def head(self, path: str) -> BlobInfo:
        check_path(path)
        with _translated(path):
            return _read_info(path, await self._store.get_async(path, options={"head": True}))

    async def get(self, path: str, *, max_bytes: int) -> tuple[bytes, BlobInfo]:
        check_path(path)
        async with self._bounds.reading(path, max_bytes):
            return await self._get(path, max_bytes)

    async def _get(self, path: str, max_bytes: int) -> tuple[bytes, BlobInfo]:
        with _translated(path):
            result = await self._store.get_async(path)
            info = _read_info(path, result)
            check_size(path, info.size, max_bytes)
            held = Limited(path, max_bytes)
            async for chunk in result.stream(min_chunk_size=_CHUNK):
                held.write(chunk)
            return held.getvalue(), info

    async def put(self, path: str, data: bytes, *, content_type: str, if_version: str = ANY_VERSION) -> BlobInfo:
        check_path(path)
        store = await self._sending(path, len(data))
        with _translated(path), _sending(path):
            stored = await store.put_async(
                path, data, mode=_mode(if_version), attributes={"Content-Type": content_type}, use_multipart=False
            )
        e_tag = _present(path, stored["e_tag"])
        # Only a head says when it was written.
        with suppress(BlobNotFound):
            info = await self.head(path)
            if _e_tag(info.version) == e_tag:
                return info
        # Written again or deleted by others since; a version that no blob has.
        return BlobInfo(path=path, size=len(data), version=e_tag, content_type=content_type)

    async def delete(self, path: str) -> None:
        check_path(path)
        with suppress(BlobNotFound), _translated(path):
            await self._store.delete_async(path)

    async def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        check_path(prefix)
        with _translated(prefix):
            async for batch in self._store.list(prefix):
                for meta in batch:
                    yield _info(meta["path"], meta, _BINARY)

    async def download(self, path: str, to: Path) -> BlobInfo:
        check_path(path)
        with whole_file(to) as file, _translated(path):
            result = await self._store.get_async(path)
            async for chunk in result.stream():
                await asyncio.to_thread(file.write, chunk)
            return _read_info(path, result)

    async def upload(self, path: str, source: Path) -> BlobInfo:
        check_path(path)
        store = await self._sending(path, _PART * _PARTS_AT_A_TIME)
        with _translated(path), _sending(path):
            await store.put_async(
                path,
                source,
                attributes={"Content-Type": _BINARY},
                chunk_size=_PART,
                max_concurrency=_PARTS_AT_A_TIME,
            )
        return await self.head(path)

    async def link(self, path: str, *, expires_s: int) -> str:
        check_path(path)
        check_expiry(expires_s)
        with _translated(path):
            return await obstore.sign_async(self._signer, "GET", path, timedelta(seconds=expires_s))

    async def upload_link(self, path: str, *, size: int, expires_s: int) -> UploadLink:
        # It has the blob's address, and the region.
        link = urlsplit(await self.link(path, expires_s=expires_s))
        region = dict(parse_qsl(link.query))["X-Amz-Credential"].split("/")[2]
        headers = {"Content-Length": str(size)}
        request = AWSRequest("PUT", link._replace(query="").geturl(), headers=headers)
        with _translated(path):
            credentials = await asyncio.to_thread(self._frozen_credentials, region)
            S3SigV4QueryAuth(credentials, "s3", region, expires=expires_s).add_auth(request)
        return UploadLink(url=request.url, headers=headers)

    def _frozen_credentials(self, region: str) -> Any:
        if self._credentials is None:
            session, bounds = botocore.session.get_session(), self._bounds
            session.set_config_variable("region", region)
            times = {"connect_timeout": bounds.connect_s, "read_timeout": bounds.silence_s}
            session.set_default_client_config(Config(**times, retries={"total_max_attempts": 1}))
            known = create_credential_resolver(session, region_name=region).providers
            self._credentials = CredentialResolver([one for one in known if one.METHOD in _SOURCES]).load_credentials()
        if self._credentials is None:
            raise StoreUnavailable("there are no credentials that sign links")
        return self._credentials.get_frozen_credentials()

    async def _sending(self, path: str, size: int) -> S3Store:
        """The store that gives `size` bytes on the line at a time the time they need.

        Raises StoreUnavailable soon where the server is silent: a request with a large body would notice late.
        """
        # object_store has no limit of its own for sending.
        silence_s = self._bounds.silence_s
        doublings = int(size / (silence_s * self._bounds.slowest_bytes_per_s)).bit_length()
        if not doublings:
            return self._store
        with suppress(BlobNotFound):
            await self.head(path)
        # Kept, because each has connections and credentials of its own.
        if doublings not in self._patient:
            patient = replace(self._bounds, silence_s=silence_s * 2**doublings)
            self._patient[doublings] = _store(self._url, patient)
        return self._patient[doublings]


def _store(url: str, bounds: Bounds, *, is_public: bool = False) -> S3Store:
    parts = urlsplit(url)
    config = dict(parse_qsl(parts.query, keep_blank_values=True))
    public_endpoint = config.pop("public_endpoint", None)
    if is_public and public_endpoint is not None:
        config["endpoint"] = public_endpoint
    endpoint = config.get("endpoint", "https:")
    unknown = config.keys() - {"endpoint", "region"}
    if not parts.hostname or unknown or urlsplit(endpoint).scheme not in ("http", "https"):
        form = "s3://BUCKET/PREFIX?endpoint=URL&public_endpoint=URL&region=NAME"
        raise SettingsError(f"blob store {url!r} should be {form}", url=url)
    client: ClientConfig = {
        "allow_http": endpoint.startswith("http:"),
        "connect_timeout": timedelta(seconds=bounds.connect_s),
        "read_timeout": timedelta(seconds=bounds.silence_s),
        # Weights take minutes; silence is what ends a request.
        "timeout": timedelta(hours=1),
    }
    first, longest = timedelta(seconds=0.1), timedelta(seconds=2)
    retry: RetryConfig = {
        "retry_timeout": timedelta(seconds=bounds.retry_s),
        "backoff": {"init_backoff": first, "max_backoff": longest, "base": 2},
    }
    prefix = parts.path.strip("/") or None
    try:
        return S3Store(
            parts.netloc,
            prefix=prefix,
            config=cast("S3Config", config),
            client_options=client,
            retry_config=retry,
        )
    except BaseError as e:
        raise SettingsError(f"blob store {url!r}: {_sentence(e)}", url=url) from e


def _read_info(path: str, result: "GetResult") -> BlobInfo:
    return _info(path, result.meta, result.attributes.get("Content-Type", _BINARY))


def _info(path: str, meta: "ObjectMeta", content_type: str) -> BlobInfo:
    # Listings of some servers tell milliseconds, which heads never do.
    version = f"{_present(path, meta['e_tag'])} {int(meta['last_modified'].timestamp())}"
    return BlobInfo(path=path, size=meta["size"], version=version, content_type=content_type)


def _present(path: str, e_tag: str | None) -> str:
    """Raises StoreUnavailable for an answer without one, which is not S3's: a proxy's page, say."""
    if not e_tag:
        raise StoreUnavailable(f"blob {path}: the answer has no ETag", path=path)
    return e_tag


def _e_tag(version: str) -> str:
    return version.partition(" ")[0]


def _mode(if_version: str) -> "PutMode":
    if if_version in (ANY_VERSION, ""):
        return "overwrite" if if_version else "create"
    return {"e_tag": _e_tag(if_version)}


@contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except FluxFillError:
        raise
    except FileNotFoundError as e:
        if _NO_BUCKET in str(e):
            raise StoreUnavailable("the bucket does not exist", path=path) from e
        raise BlobNotFound(f"blob {path} does not exist", path=path) from e
    except (AlreadyExistsError, PreconditionError) as e:
        raise BlobConflict(f"blob {path} is not at the expected version", path=path) from e
    except (PermissionDeniedError, UnauthenticatedError) as e:
        raise StoreDenied(f"blob {path}: {_sentence(e)}", path=path) from e
    except (BaseError, BotoCoreError, ClientError) as e:
        raise StoreUnavailable(f"blob {path}: {_sentence(e)}", path=path) from e
    except OSError:
        # The disk's, of a download: `whole_file` says which file.
        raise
    except Exception as e:
        raise unforeseen(StoreUnavailable, f"blob {path}", e) from e


@contextmanager
def _sending(path: str) -> Iterator[None]:
    """A body has no blob to be missing: 404 is a multipart upload that the server dropped."""
    try:
        yield
    except FileNotFoundError as e:
        if _NO_BUCKET in str(e):
            raise
        raise StoreUnavailable(f"blob {path}: its upload was lost, and has to begin again", path=path) from e


def _sentence(error: Exception) -> str:
    """What went wrong, without the dump of the request that follows it."""
    return str(error).partition("\n")[0]
