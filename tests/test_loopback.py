"""A proxy in the environment that knows nothing of this machine: loopback is reached all the same."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from deployments import own_ray
from deployments.audit_job import RayJobs
from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.adapters.loopback import NAMES, bypass_proxies
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.errors import BlobNotFound
from serve_app.jobs.ports import Delivery, Verdict
from serve_app.settings import MessagesSettings

from .backends import until
from .blob_servers import answering, bucket_url
from .job_servers import Opened

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
BYPASSES = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
#: Nobody listens there.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, NOWHERE)
        monkeypatch.setenv(name.upper(), NOWHERE)
    for name in BYPASSES:
        # First, so that what is there after the test is what was there before.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_the_embedded_broker_is_reached(host: str) -> None:
    settings = MessagesSettings(url=f"embedded://{host}:{free_port()}")
    got: list[bytes] = []

    async def handle(delivery: Delivery) -> Verdict:
        got.append(delivery.data)
        return Verdict(action="ack")

    with EmbeddedPubSub.of(settings):
        source = adapters.message_source(settings, 1)
        running = asyncio.create_task(source.run(handle))
        async with asyncio.timeout(10):
            await adapters.publisher(settings).publish("sessions", b"x", {})
            await until(lambda: got == [b"x"])
        letters = adapters.dead_letters(settings)
        assert await letters.pull(1) == []
        await letters.close()
        await source.close(grace_s=0)
        await running


async def test_a_bucket_on_this_machine_is_reached(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def absent(_line: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    async with answering(absent) as port:
        store = adapters.blob_store(bucket_url(kind, port, "bucket", monkeypatch))
        with pytest.raises(BlobNotFound):
            await store.head("x")


@pytest.mark.emulator
async def test_firestores_emulator_is_reached(firestore_url: str, opened: Opened) -> None:
    assert await opened(adapters.job_store(firestore_url)).get("edit-1") is None


class Yes(BaseHTTPRequestHandler):
    """Answers as the app, and as Ray's job server."""

    def do_GET(self) -> None:
        body = b'{"version": "4", "ray_version": "2", "ray_commit": "c", "session_name": "s"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def http_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_the_app_on_this_machine_is_asked_whether_it_is_ready(http_url: str, tmp_path: Path) -> None:
    app = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        own_ray._wait_ready(app, http_url, tmp_path / "log")
    finally:
        app.communicate()


@pytest.mark.slow
def test_rays_job_server_is_reached(http_url: str) -> None:
    assert RayJobs(http_url)._connected().get_address() == http_url


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, dict.fromkeys(BYPASSES, "localhost,127.0.0.1,::1")),
        ({"no_proxy": "corp,::1"}, dict.fromkeys(BYPASSES, "corp,::1,localhost,127.0.0.1")),
        ({"NO_PROXY": "corp"}, dict.fromkeys(BYPASSES, "corp,localhost,127.0.0.1,::1")),
        ({"NO_PROXY": "*"}, {"NO_PROXY": "*", "no_grpc_proxy": "*,localhost,127.0.0.1,::1"}),
        (
            {"NO_PROXY": "a", "no_proxy": "b", "no_grpc_proxy": "c"},
            {name: f"{own},{','.join(NAMES)}" for name, own in zip(BYPASSES, "bac", strict=True)},
        ),
    ],
)
def test_what_goes_without_a_proxy_already_goes_on_so(
    given: Mapping[str, str], then: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        bypass_proxies()
        assert {name: os.environ[name] for name in BYPASSES if name in os.environ} == then
