"""Servers that answer what they never should: whatever an SDK makes of it reaches callers as one of our errors."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from serve_app import adapters
from serve_app.blobs import BlobInfo
from serve_app.errors import BlobTooLarge, BrokerUnavailable, MessageRefused, StoreDenied, StoreUnavailable
from serve_app.jobs.claims import claim_of
from serve_app.jobs.ports import DeadLetter, Delivery, Verdict
from serve_app.models import Progress
from serve_app.settings import MessagesSettings

from .backends import at, make_job
from .blob_servers import Listener, answering, bucket_url, forget_firebase_app
from .job_servers import Opened
from .rig import delivery
from .test_buckets import LARGE, calls
from .test_job_stores import KEY, put

JSON = "Content-Type: application/json\r\n"
#: What an object's metadata say, as Google tells them.
METADATA = {"name": "users/u", "bucket": "bucket", "generation": "1", "size": "5", "contentType": "image/jpeg"}


def reply(status: str, headers: str = "", body: bytes = b"") -> bytes:
    head = f"HTTP/1.1 {status}\r\n{headers}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def metadata(**changes: object) -> bytes:
    """An answer for a single object and for a list alike."""
    fields = {name: value for name, value in (METADATA | changes).items() if value is not None}
    return reply("200 OK", JSON, json.dumps({**fields, "items": [fields]}).encode())


#: To any request.
NONSENSE = {
    "a page": reply("200 OK", "Content-Type: text/html\r\n", b"<html>maintenance</html>"),
    "nothing": reply("200 OK"),
    "no content": b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    "a list": reply("200 OK", JSON, b"[1, 2]"),
    "null": reply("200 OK", JSON, b"null"),
    "no fields": reply("200 OK", JSON, b"{}"),
    "no name": metadata(name=None),
    "no size": metadata(size=None),
    "a size in words": metadata(size="five"),
    "no generation": metadata(generation=None),
    "a redirect to nowhere": reply("302 Found", "Location: http://[::bad\r\n"),
    "not modified": b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n",
    "a tag and no date": reply("200 OK", 'ETag: "1"\r\n', b"hello"),
    "a tag and a wrong date": reply("200 OK", 'ETag: "1"\r\nLast-Modified: yesterday\r\n', b"hello"),
    "a date and no tag": reply("200 OK", "Last-Modified: Fri, 20 Nov 2026 12:00:00 GMT\r\n", b"hello"),
    "an XML cut short": reply("200 OK", "Content-Type: application/xml\r\n", b"<ListBucketResult><Contents>"),
    "gzip that is none": reply("200 OK", 'ETag: "1"\r\nX-Goog-Generation: 1\r\nContent-Encoding: gzip\r\n', b"hello"),
}


@asynccontextmanager
async def saying(answer: bytes) -> AsyncIterator[int]:
    async def say(_line: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with answering(say) as port:
        yield port


def is_usable(result: object) -> bool:
    """Whether a caller can go on with what a store returned."""
    if isinstance(result, BlobInfo):
        return isinstance(result.size, int) and result.version not in ("", "None") and not result.version[:1].isspace()
    parts = result if isinstance(result, list | tuple) else []
    return all(is_usable(part) for part in parts)


@pytest.mark.parametrize("what", NONSENSE)
async def test_a_blob_store_that_answers_nonsense_is_unavailable(
    kind: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with saying(NONSENSE[what]) as port:
        url = bucket_url(kind, port, "bucket", monkeypatch)
        results = await asyncio.gather(*calls(url, tmp_path), return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    # Some are longer than they say.
    assert {type(failure) for failure in failures} <= {StoreUnavailable, BlobTooLarge}
    assert [result for result in results if result not in failures and not is_usable(result)] == []


async def test_a_blob_store_that_refuses_is_no_outage(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with answering_whole(lambda _line, _port: reply("403 Forbidden")) as port:
        url = bucket_url(kind, port, "bucket", monkeypatch)
        results = await asyncio.gather(*calls(url, tmp_path), return_exceptions=True)
    listed = results.pop(4)
    assert {type(result) for result in results} == {StoreDenied}
    # obstore does not say why S3 lists nothing.
    assert isinstance(listed, StoreUnavailable)


@asynccontextmanager
async def answering_whole(answer: Callable[[str, int], bytes]) -> AsyncIterator[int]:
    """As `answering`, but of requests whose body was taken: `answer` has the first line and the server's port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"(?i)^content-length: (\d+)", head, re.MULTILINE)
        await reader.readexactly(int(length[1]) if length else 0)
        writer.write(answer(head.partition("\r\n")[0], listener.port))

    listener = Listener(serve)
    await listener.open()
    try:
        yield listener.port
    finally:
        await listener.close()


BEGUN_ON_S3 = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"


@pytest.mark.parametrize("status", ["404 Not Found", "410 Gone"])
async def test_an_upload_that_the_store_lost_is_to_begin_again(
    kind: str, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A blob that is not there would be the request's fault, and the job would fail for good."""

    def forget(line: str, port: int) -> bytes:
        if line.startswith("POST") and ("uploadType=resumable" in line or "uploads" in line):
            session = f"Location: http://127.0.0.1:{port}/session\r\n"
            return reply("200 OK", f"Content-Type: application/xml\r\n{session}", BEGUN_ON_S3)
        return reply("404 Not Found" if line.startswith("HEAD") else status)

    (tmp_path / "source").write_bytes(LARGE)
    async with answering_whole(forget) as port:
        url = bucket_url(kind, port, "bucket", monkeypatch)
        put = adapters.blob_store(url).put("users/u", LARGE, content_type="image/jpeg")
        upload = adapters.blob_store(url).upload("users/u", tmp_path / "source")
        results = await asyncio.gather(put, upload, return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 2


# What speaks gRPC


class Nonsense(grpc.GenericRpcHandler):  # type: ignore[misc] # publishes no types
    """Any method answers with the same bytes, as often as it is told; or fails."""

    def __init__(self, answers: Sequence[bytes], code: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        self._answers, self._code = answers, code
        self.port = 0
        self.pulls = 0

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        self.pulls += call.method.endswith("/Pull")
        streams = any(name in call.method for name in ("RunQuery", "BatchGetDocuments"))
        return grpc.unary_stream_rpc_method_handler(self._many) if streams else _unary(self._one)

    def _one(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_code(self._code)
        return self._answers[0] if self._answers else b""

    def _many(self, _request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.set_code(self._code)
        yield from self._answers


_unary = grpc.unary_unary_rpc_method_handler
#: Outages, which clients try again for seconds; other tests have them.
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.OK)
#: The answers of every call: none, an empty message, what is no message, a message of another kind, and two of them.
GRPC_NONSENSE = {
    "nothing": ([],),
    "empty": ([b""],),
    "no message": ([b"\xff\xff\xff"],),
    "another message": ([b"\x0a\x05hello"],),
    "twice": ([b"\x0a\x05hello", b""],),
    **{code.name: ([], code) for code in grpc.StatusCode if code not in RETRIED},
}


@pytest.fixture(params=GRPC_NONSENSE)
def nonsense(request: pytest.FixtureRequest) -> Iterator[Nonsense]:
    """As a server on its `port`."""
    server, handler = grpc.server(ThreadPoolExecutor(8)), Nonsense(*GRPC_NONSENSE[request.param])
    server.add_generic_rpc_handlers((handler,))
    handler.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield handler
    server.stop(grace=None).wait()


async def test_firestore_that_answers_nonsense_is_unavailable(
    nonsense: Nonsense, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", f"127.0.0.1:{nonsense.port}")
    store = opened(adapters.job_store("firestore:p"))
    results = await asyncio.gather(
        store.get("edit-1"),
        store.list(),
        store.list(owes_by=at(1)),
        store.update("edit-1", KEY, put(make_job())),
        store.report(claim_of(make_job()), Progress(step=1, steps=2)),
        store.delete("edit-1"),
        store.cancel_until(KEY, at(1)),
        store.canceled_until(KEY),
        store.write_session(make_job(), {"a": 1}),
        store.read_session("u", "s"),
        return_exceptions=True,
    )
    forget_firebase_app()
    failures = [result for result in results if isinstance(result, BaseException)]
    assert [type(failure) for failure in failures] == [StoreUnavailable] * len(failures)


async def test_pubsub_that_answers_nonsense_is_unavailable(nonsense: Nonsense) -> None:
    settings = MessagesSettings(url=f"pubsub://127.0.0.1:{nonsense.port}")
    publisher, letters = adapters.publisher(settings), adapters.dead_letters(settings)
    results = await asyncio.gather(
        publisher.publish("sessions", b"x", {}),
        letters.pull(1),
        letters.acknowledge([DeadLetter(delivery=delivery(), ack_id="1")]),
        return_exceptions=True,
    )
    await letters.close()
    failures = [result for result in results if isinstance(result, BaseException)]
    assert {type(failure) for failure in failures} <= {BrokerUnavailable, MessageRefused}
    assert isinstance(results[0], BaseException) or results[0]


@pytest.mark.slow
async def test_pulling_goes_on_after_nonsense(nonsense: Nonsense) -> None:
    async def handle(_delivery: Delivery) -> Verdict:
        return Verdict(action="ack")

    source = adapters.message_source(MessagesSettings(url=f"pubsub://127.0.0.1:{nonsense.port}"), 1)
    running = asyncio.create_task(source.run(handle))
    async with asyncio.timeout(10):
        while nonsense.pulls < 2:
            assert not running.done()
            await asyncio.sleep(0.01)
    await source.close(grace_s=0)
    await running
