"""What holds of the stores beyond this machine: links, outages, and servers that do not keep to what they said."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from serve_app import adapters
from serve_app.adapters.blobs.firebase import CONCURRENCY, FirebaseBlobStore
from serve_app.adapters.blobs.s3 import S3BlobStore
from serve_app.adapters.blobs.transfers import Bounds
from serve_app.blobs import BlobInfo
from serve_app.errors import (
    BlobNotFound,
    BlobTooLarge,
    FluxFillError,
    SettingsError,
    StoreDenied,
    StoreUnavailable,
    UnsafePath,
)

from .backends import until
from .blob_servers import Line, answering, bucket_url, new_bucket

JPEG = "image/jpeg"
PATH = "users/u/sessions/s/original.jpg"
#: Shorter than an app's, so that tests need not wait as long.
BOUNDS = Bounds(connect_s=1.0, silence_s=2.0, retry_s=1.0)
#: Much longer than any store may take to say that it is unavailable; seconds.
FOREVER_S = 60
#: Sent slowly enough, this may take longer than FOREVER_S.
LARGE = bytes(20_000_000)


def bounded(url: str, bounds: Bounds = BOUNDS) -> S3BlobStore | FirebaseBlobStore:
    return S3BlobStore(url, bounds) if url.startswith("s3:") else FirebaseBlobStore(url, bounds)


async def test_a_link_reads_the_blob(line: Line) -> None:
    path = "ä/ö ü+1?.jpg"
    links = adapters.blob_store(line.url)
    await links.put(path, b"photo", content_type=JPEG)
    async with httpx.AsyncClient() as client:
        answer = await client.get(await links.link(path, expires_s=60))
    assert (answer.content, answer.headers["content-type"]) == (b"photo", JPEG)
    await links.link("not/there", expires_s=604_800)
    for expires_s in (0, -1, 604_801):
        with pytest.raises(ValueError, match="604800"):
            await links.link(path, expires_s=expires_s)
    with pytest.raises(UnsafePath):
        await links.link("../x", expires_s=60)


async def test_a_link_to_s3_is_presigned_with_its_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket_url("s3", 1, "photos", monkeypatch)
    link = urlsplit(await S3BlobStore(url).link("a/b.jpg", expires_s=77))
    query = {name: values[0] for name, values in parse_qs(link.query).items()}
    assert link.path == "/photos/some/prefix/a/b.jpg"
    assert query["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256"
    assert query["X-Amz-Expires"] == "77"
    assert query["X-Amz-Credential"].startswith("key/")


@pytest.mark.emulator
async def test_a_link_to_s3_is_for_the_public_endpoint(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket_url("s3", s3_port, new_bucket("s3", s3_port), monkeypatch)
    await S3BlobStore(url).put("a/ü b.jpg", b"photo", content_type=JPEG)
    for public_url in ("", f"http://localhost:{s3_port}"):
        store = S3BlobStore(f"{url}&public_endpoint={public_url}" if public_url else url)
        link = await store.link("a/ü b.jpg", expires_s=60)
        assert link.startswith(f"{public_url or f'http://127.0.0.1:{s3_port}'}/b-")
        upload = await store.upload_link("a/new", size=5, expires_s=60)
        async with httpx.AsyncClient() as client:
            assert (await client.get(link)).content == b"photo"
            assert (await client.get(link.replace("b.jpg", "c.jpg"))).status_code == 403
            assert (await client.put(upload.url, content=b"photo", headers=upload.headers)).status_code == 200
            assert (await client.put(upload.url.replace("new", "old"), content=b"photo")).status_code == 403


@pytest.mark.emulator
async def test_only_links_are_for_the_public_endpoint(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket_url("s3", s3_port, new_bucket("s3", s3_port), monkeypatch)
    store = bounded(f"{url}&public_endpoint=https://pictures.example")
    await store.put(PATH, b"photo", content_type=JPEG)
    assert (await store.get(PATH, max_bytes=9))[0] == b"photo"
    assert [blob.path async for blob in store.list("users")] == [PATH]
    assert (await store.link(PATH, expires_s=60)).startswith("https://pictures.example/b-")
    await store.delete(PATH)


@pytest.mark.parametrize("token", ["", "session"])
async def test_an_uploads_length_is_signed_for_s3(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    url = bucket_url("s3", 1, "photos", monkeypatch).replace("us-east-1", "eu-central-1")
    made = await S3BlobStore(f"{url}&public_endpoint=https://pictures.example").upload_link(
        "ä b/c?", size=77, expires_s=60
    )
    assert made.headers == {"Content-Length": "77"}
    link, query = urlsplit(made.url), parse_qs(urlsplit(made.url).query)
    assert f"{link.scheme}://{link.netloc}{link.path}" == (
        "https://pictures.example/photos/some/prefix/%C3%A4%20b/c%3F"
    )
    assert query["X-Amz-SignedHeaders"] == ["content-length;host"]
    assert query["X-Amz-Credential"][0].split("/")[0::2] == ["key", "eu-central-1", "aws4_request"]
    assert query.get("X-Amz-Security-Token", [""]) == [token]


async def test_an_instances_role_signs_for_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both object_store and botocore ask the instance, and neither a file of somebody's own."""
    role = {"Code": "Success", "AccessKeyId": "its-key", "SecretAccessKey": "secret", "Token": "its-token"}
    role |= {"Type": "AWS-HMAC", "LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2099-01-01T00:00:00Z"}

    async def instance(line: str, writer: asyncio.StreamWriter) -> None:
        path = line.split()[1]
        answers = {"/latest/api/token": "t", "/latest/meta-data/iam/security-credentials/": "app"}
        body = answers.get(path, json.dumps(role)).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)

    url = bucket_url("s3", 1, "photos", monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    async with answering(instance) as port:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{port}")
        store = S3BlobStore(url)
        for link in (await store.link("a", expires_s=60), (await store.upload_link("a", size=1, expires_s=60)).url):
            query = parse_qs(urlsplit(link).query)
            assert query["X-Amz-Credential"][0].startswith("its-key/")
            assert query["X-Amz-Security-Token"] == ["its-token"]


async def test_without_credentials_nothing_is_signed_for_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket_url("s3", 1, "photos", monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable):
        await bounded(url).upload_link("a", size=1, expires_s=60)


@pytest.mark.parametrize("public_endpoint", ["", "pictures.example", "ftp://pictures.example"])
def test_a_public_endpoint_is_a_url(public_endpoint: str) -> None:
    with pytest.raises(SettingsError, match="public_endpoint=URL"):
        S3BlobStore(f"s3://photos?public_endpoint={public_endpoint}")


#: Which of the calls it is.
LISTING = 4


def calls(url: str, folder: Path) -> list[Awaitable[object]]:
    """Every method of the store, on a blob that is there."""
    store = bounded(url)
    (folder / "source").write_bytes(b"weights")

    async def listed() -> list[BlobInfo]:
        return [info async for info in store.list("users")]

    return [
        store.head(PATH),
        store.get(PATH, max_bytes=100),
        store.put("users/new", b"x", content_type=JPEG),
        store.delete("users/nobody"),
        listed(),
        store.download(PATH, folder / "to"),
        store.upload("users/w", folder / "source"),
    ]


async def test_a_store_that_is_down_is_unavailable_until_it_is_back(line: Line, tmp_path: Path) -> None:
    await adapters.blob_store(line.url).put(PATH, b"photo", content_type=JPEG)
    await asyncio.gather(*calls(line.url, tmp_path))
    (tmp_path / "to").unlink()
    await line.relay.close()
    async with asyncio.timeout(FOREVER_S):
        results = await asyncio.gather(*calls(line.url, tmp_path), return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 7
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "a failed download left something"
    await line.relay.open()
    await asyncio.gather(*calls(line.url, tmp_path))


async def test_one_store_outlives_an_outage(line: Line) -> None:
    store = bounded(line.url)
    before = await store.put(PATH, b"photo", content_type=JPEG)
    await line.relay.close()
    with pytest.raises(StoreUnavailable):
        await store.head(PATH)
    await line.relay.open()
    assert await store.head(PATH) == before


async def test_a_silent_server_is_unavailable(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def nothing(_line: str, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(FOREVER_S), answering(nothing) as port:
        url = bucket_url(kind, port, "bucket", monkeypatch)
        large = bounded(url).put("users/large", LARGE, content_type=JPEG)
        results = await asyncio.gather(large, *calls(url, tmp_path), return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 8


@pytest.mark.parametrize("line", [2_000_000], indirect=True)
async def test_a_slow_line_takes_a_large_body_all_the_same(line: Line, tmp_path: Path) -> None:
    """Slowly enough that each body takes longer than a silence that is borne."""
    store = bounded(line.url)
    one_request, several = random.randbytes(8_000_000), random.randbytes(10_000_000)
    (tmp_path / "source").write_bytes(several)
    put, _ = await asyncio.gather(
        store.put(PATH, one_request, content_type=JPEG, if_version=""), store.upload("w", tmp_path / "source")
    )
    assert await store.get(PATH, max_bytes=len(one_request)) == (one_request, put)
    assert (await store.get("w", max_bytes=len(several)))[0] == several


async def test_a_server_that_stops_taking_a_body_is_unavailable(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(line: str, writer: asyncio.StreamWriter) -> None:
        if not line.startswith("HEAD"):
            await asyncio.Event().wait()
        writer.write(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    async with asyncio.timeout(FOREVER_S), answering(stop) as port:
        store = bounded(bucket_url(kind, port, "bucket", monkeypatch), replace(BOUNDS, slowest_bytes_per_s=4_000_000))
        # As much as Google's client sends in one request.
        with pytest.raises(StoreUnavailable):
            await store.put(PATH, LARGE[: 8 * 1024 * 1024], content_type=JPEG)


class Trickling:
    """A server that says that a blob has a megabyte, and sends a few bytes of it now and then."""

    def __init__(self) -> None:
        self.reading = 0

    async def __call__(self, line: str, writer: asyncio.StreamWriter) -> None:
        if "/storage/v1/" in line and "alt=media" not in line:
            about = b'{"name": "x", "size": "1000000", "generation": "1", "contentType": "image/jpeg"}'
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(about)}"
            writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + about)
            return
        head = 'HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nETag: "e"\r\nX-Goog-Generation: 1'
        writer.write(f"{head}\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n".encode())
        self.reading += 1
        try:
            while True:
                writer.write(b"xxxx")
                await writer.drain()
                await asyncio.sleep(0.02)
        finally:
            self.reading -= 1


async def test_a_body_that_trickles_in_has_an_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = replace(BOUNDS, slowest_bytes_per_s=1_000_000)
    async with asyncio.timeout(FOREVER_S), answering(Trickling()) as port:
        store = bounded(bucket_url(kind, port, "bucket", monkeypatch), bounds)
        with pytest.raises(StoreUnavailable, match=r"x was not read within 4 s"):
            await store.get("x", max_bytes=1_000_000)


async def test_those_who_leave_a_body_that_trickles_in_keep_no_others_waiting(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Trickling()
    async with asyncio.timeout(FOREVER_S), answering(server) as port:
        store = bounded(bucket_url(kind, port, "bucket", monkeypatch), replace(BOUNDS, slowest_bytes_per_s=1000))
        reading = [asyncio.create_task(store.get("x", max_bytes=1_000_000)) for _ in range(CONCURRENCY)]
        await until(lambda: server.reading == CONCURRENCY)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        await until(lambda: server.reading == 0)
        # It has a thread, or a connection: it begins.
        last = asyncio.create_task(store.get("x", max_bytes=1_000_000))
        await until(lambda: server.reading == 1)
        last.cancel()


@pytest.mark.parametrize(("status", "raised"), [(403, StoreDenied), (503, StoreUnavailable)])
async def test_a_refusal_is_an_unavailable_store(
    kind: str, status: int, raised: type[StoreUnavailable], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def refuse(_line: str, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno".encode())

    async with asyncio.timeout(FOREVER_S), answering(refuse) as port:
        url = bucket_url(kind, port, "bucket", monkeypatch)
        results = await asyncio.gather(*calls(url, tmp_path), return_exceptions=True)
    if kind == "s3":
        # object_store does not say why there is no listing.
        assert type(results.pop(LISTING)) is StoreUnavailable
    assert {type(result) for result in results} == {raised}


NO_BUCKET = {
    "s3": b"<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>",
    "firebase": b'{"error": {"code": 404, "message": "The specified bucket does not exist."}}',
}


async def test_a_missing_bucket_is_not_a_missing_blob(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_bucket(_line: str, writer: asyncio.StreamWriter) -> None:
        body = NO_BUCKET[kind]
        writer.write(b"HTTP/1.1 404 No\r\nContent-Type: application/json\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async with answering(no_bucket) as port:
        store = adapters.blob_store(bucket_url(kind, port, "bucket", monkeypatch))
        with pytest.raises(StoreUnavailable, match="bucket"):
            await store.get(PATH, max_bytes=10)


class Liar:
    """Says that a blob has 5 bytes, and sends without end."""

    def __init__(self, framing: str) -> None:
        self._framing = framing
        self.sent = 0
        self.hung_up = asyncio.Event()

    async def __call__(self, line: str, writer: asyncio.StreamWriter) -> None:
        # Google's client asks for the metadata first.
        if "/storage/v1/" in line and "/download/" not in line:
            self._metadata(writer)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nX-Goog-Generation: 1\r\nLast-Modified: Fri, 20 Nov 2026 12:00:00 GMT\r\n")
        writer.write(b'ETag: "1"\r\n' + self._framing.encode() + b"\r\n\r\n")
        try:
            async for chunk in self._chunks():
                writer.write(chunk)
                await writer.drain()
                self.sent += len(chunk)
        finally:
            self.hung_up.set()

    def _metadata(self, writer: asyncio.StreamWriter) -> None:
        body = json.dumps({"name": PATH, "size": "5", "generation": "1"}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async def _chunks(self) -> AsyncIterator[bytes]:
        data = b"x" * 65_536
        while True:
            yield b"%x\r\n%s\r\n" % (len(data), data) if "chunked" in self._framing else data


async def failure_of(call: Awaitable[object]) -> type[Exception]:
    """Only the error's type: its traceback would keep the connection open."""
    try:
        await call
    except FluxFillError as e:
        return type(e)
    raise AssertionError("nothing was raised")


#: What the sockets' buffers take before the server notices that nobody reads.
BUFFERS = 20_000_000


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", f"Content-Length: {10**12}", "Connection: close"])
async def test_no_more_is_read_than_is_allowed(kind: str, framing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    liar = Liar(framing)
    async with asyncio.timeout(FOREVER_S), answering(liar) as port:
        store = adapters.blob_store(bucket_url(kind, port, "bucket", monkeypatch))
        failure = await failure_of(store.get(PATH, max_bytes=1000))
        await liar.hung_up.wait()
    assert liar.sent < BUFFERS
    # object_store takes no answer that does not say its length.
    says_its_length = kind == "firebase" or framing.startswith("Content-Length")
    assert failure is (BlobTooLarge if says_its_length else StoreUnavailable)


@pytest.mark.parametrize(
    "url",
    ["s3:", "s3://", "s3://b?endpoint=ftp://h", "s3://b?endpoint=h:9000", "s3://b?key=x", "firebase:", "firebase:b/c"],
)
def test_a_url_that_names_no_bucket_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="should be"):
        adapters.blob_store(url)


@pytest.mark.emulator
async def test_http_is_spoken_only_where_the_endpoint_says_so(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket_url("s3", s3_port, new_bucket("s3", s3_port), monkeypatch)
    with pytest.raises(StoreUnavailable):
        await bounded(url.replace("endpoint=http://", "endpoint=https://")).head(PATH)
    with pytest.raises(BlobNotFound):
        await adapters.blob_store(url).head(PATH)


async def test_more_calls_than_connections_are_all_answered(line: Line) -> None:
    store = adapters.blob_store(line.url)
    await asyncio.gather(*(store.put(f"many/{i}", b"%d" % i, content_type=JPEG) for i in range(50)))
    got = await asyncio.gather(*(store.get(f"many/{i}", max_bytes=10) for i in range(50)))
    assert [data for data, _ in got] == [b"%d" % i for i in range(50)]
