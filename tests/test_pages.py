"""What a web page of another site may ask of the app on its reader's machine, and bodies that never come whole."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from serve_app.errors import ForeignHost, ForeignOrigin, UnsupportedMediaType
from serve_app.http.app import create_app
from serve_app.http.pages import check_page
from serve_app.http.problems import Bodies
from serve_app.http.service import WITHHELD

from .http_service import Process, long
from .rig import Rig

OWN = "http://127.0.0.1:8000"
#: What changes something, or tells a stranger something; no key is asked for.
CHANGES = ["/inpaint", "/audit", "/audits/run-1/cancel", "/v1/jobs/edit-1/cancel", "/v1/sessions/u/s/cancel"]
READS = ["/ready", "/health", "/audits", "/audits/run-1", "/blobs/good.token"]


@pytest.fixture
async def process() -> Process:
    rig = Rig()
    await rig.put_session()
    return Process(rig)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def client(process: Process) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: process), base_url=OWN, raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, method: str, path: str, **headers: str) -> tuple[int, str]:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    response = client.request(method, path, content=b"{}" if method == "POST" else b"", headers=given)
    return response.status_code, response.json().get("code", "") if response.status_code >= 400 else ""


JSON = {"content_type": "application/json"}


# A name that points here


@pytest.mark.parametrize(
    ("method", "path"), [*(("POST", path) for path in CHANGES), *(("GET", path) for path in READS)]
)
def test_a_rebound_name_reaches_nothing(client: TestClient, process: Process, method: str, path: str) -> None:
    assert ask(client, method, path, host="rebind.evil.example", **JSON) == (421, "foreign_host")
    assert ask(client, method, path, host="rebind.evil.example:8000", **JSON) == (421, "foreign_host")
    assert process.worked == 0


FOREIGN_HOSTS = [
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evil.example:127.0.0.1",
    "0.0.0.0",
]
FOREIGN_HOSTS += ["10.0.0.7:8000", "[::]", "[::1", "::1", "evil@127.0.0.1", "127.0.0.1/evil", "127.1", "2130706433", ""]
FOREIGN_HOSTS += ["localhost.", "127.0.0.1, evil.example", "[::ffff:10.0.0.1]:8000", "localhost:port"]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_host_that_is_not_loopback_is_foreign(client: TestClient, host: str) -> None:
    assert ask(client, "GET", "/health", host=host) == (421, "foreign_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1", "127.9.9.9:8000", "[::1]", "[::1]:8000"])
def test_a_host_that_is_loopback_is_ours(client: TestClient, host: str) -> None:
    assert ask(client, "GET", "/health", host=host) == (200, "")


def test_without_a_host_nothing_is_answered() -> None:
    with pytest.raises(Exception, match="loopback addresses only"):
        check_page("GET", "/health", {})


@pytest.mark.parametrize("host", ["10.0.0.7:8000", "fluxfill.default.svc:8000", "app.example.org"])
def test_in_production_probes_and_proxies_call_it_by_any_name(client: TestClient, process: Process, host: str) -> None:
    process.guard(is_production=True, api_keys=long("one"))
    assert ask(client, "GET", "/health", host=host) == (200, "")
    assert ask(client, "GET", "/ready", host=host) == (200, "")
    for path in ("/v1/jobs/edit-1/cancel", "/audit", "/inpaint"):
        assert ask(client, "POST", path, host=host, origin="https://app.example.org") == (401, "unauthorized")


# A page of another site


FOREIGN_ORIGINS = [
    "https://evil.example",
    "null",
    "",
    "http://127.0.0.1:3000",
    "http://localhost:8000",
    "https://127.0.0.1",
]
FOREIGN_ORIGINS += ["http://127.0.0.1:8000.evil.example", "http://evil.example/127.0.0.1:8000", "http://[", "file://"]


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_page_of_another_origin_changes_nothing(client: TestClient, process: Process, path: str, origin: str) -> None:
    assert ask(client, "POST", path, origin=origin, **JSON) == (403, "foreign_origin")
    assert process.worked == 0


@pytest.mark.parametrize("site", ["cross-site", "same-site", "something-new", ""])
def test_a_page_that_its_browser_says_is_foreign_changes_nothing(client: TestClient, site: str) -> None:
    for path in CHANGES:
        assert ask(client, "POST", path, sec_fetch_site=site, **JSON) == (403, "foreign_origin")


@pytest.mark.parametrize("given", ["text/plain", "multipart/form-data; boundary=x", "application/jsonx", "", ";"])
@pytest.mark.parametrize("path", CHANGES)
def test_what_a_page_may_send_without_asking_is_not_read(
    client: TestClient, process: Process, path: str, given: str
) -> None:
    assert ask(client, "POST", path, content_type=given) == (415, "unsupported_media_type")
    assert ask(client, "POST", path) == (415, "unsupported_media_type"), "no type at all"
    assert process.worked == 0


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/mine", "/mounted/v1/jobs"])
def test_a_job_with_uploads_is_a_form_but_not_that_of_another_site(path: str) -> None:
    form = {"host": "localhost", "content-type": "multipart/form-data; boundary=x", "content-length": "9"}
    for headers in ({}, {"origin": "http://localhost"}, {"sec-fetch-site": "same-origin"}):
        check_page("POST", path, {**form, **headers})
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        with pytest.raises(ForeignOrigin):
            check_page("POST", path, {**form, **headers})
    with pytest.raises(ForeignHost):
        check_page("POST", path, {**form, "host": "rebind.evil.example"})
    for given in ("text/plain", "application/x-www-form-urlencoded", ""):
        with pytest.raises(UnsupportedMediaType, match="a body must be application/json or multipart/form-data"):
            check_page("POST", path, {**form, "content-type": given})
    for elsewhere in ("/audit", "/v1/jobs/mine/cancel", "/v1/sessions/u/s/cancel"):
        with pytest.raises(UnsupportedMediaType):
            check_page("POST", elsewhere, form)


def test_the_audits_that_a_page_would_start_are_not(client: TestClient, process: Process) -> None:
    foreign = {"host": "rebind.evil.example", "origin": "https://evil.example", "sec_fetch_site": "cross-site"}
    assert ask(client, "POST", "/audit", content_type="text/plain", **foreign)[0] == 421
    assert not process.audit_jobs.tasks


@pytest.mark.parametrize("given", ["application/json", "Application/JSON", "application/json; charset=utf-8"])
def test_a_page_of_the_app_s_own_and_what_is_no_page_are_let_in(client: TestClient, given: str) -> None:
    for headers in ({}, {"origin": OWN}, {"origin": OWN, "sec_fetch_site": "same-origin"}, {"sec_fetch_site": "none"}):
        assert ask(client, "POST", "/inpaint", content_type=given, **headers) == (400, "malformed_message")
        assert client.post("/v1/sessions/u/s/cancel", headers=headers).status_code in (200, 403)


def test_a_link_is_followed_from_any_page(client: TestClient) -> None:
    for headers in ({"sec_fetch_site": "cross-site"}, {"origin": "null"}, {"origin": "https://mail.example"}):
        assert ask(client, "GET", "/blobs/good.token", **headers) == (200, "")


async def test_a_file_of_any_type_is_uploaded_but_by_no_page_of_another_site(
    client: TestClient, process: Process
) -> None:
    link = (await process.blobs.upload_link("x/y", size=2, expires_s=60)).url.removeprefix("http://app.example.org")
    for headers in (
        {"origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"host": "rebind.evil.example"},
    ):
        refused = client.put(link, content=b"hi", headers={"content-type": "text/plain", **headers})
        assert refused.status_code in (403, 421)
    # What a browser asks before it lets a page of another site send a PUT.
    asked = {"origin": "https://evil.example", "access-control-request-method": "PUT"}
    assert "access-control-allow-origin" not in client.options(link, headers=asked).headers
    assert [blob async for blob in process.blobs.list("x")] == []
    for given in ({}, {"content-type": "application/octet-stream"}, {"content-type": "text/plain"}):
        assert client.put(link, content=b"hi", headers=given).status_code == 204
    assert (await process.blobs.get("x/y", max_bytes=9))[0] == b"hi"


# Bodies that never come whole


class Slow:
    """An app with few places for bodies, and clients that send the half of one."""

    def __init__(self, process: Process, bodies: Bodies) -> None:
        transport = httpx.ASGITransport(create_app(lambda: process, bodies), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url=OWN, timeout=None)
        self.rest = asyncio.Event()
        self.begun = asyncio.Semaphore(0)

    async def _half(self) -> AsyncIterator[bytes]:
        yield b"{"
        self.begun.release()
        await self.rest.wait()
        yield b"}"

    async def post(self, path: str, method: str = "POST") -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return await self.client.request(method, path, content=self._half(), headers=headers)


@pytest.mark.parametrize("path", ["/inpaint", "/audit"])
async def test_a_body_that_does_not_come_whole_is_answered(process: Process, path: str) -> None:
    slow = Slow(process, Bodies(at_once=1, timeout_s=0.05))
    for _ in range(3):
        response = await slow.post(path)
        assert (response.status_code, response.json()["code"]) == (408, "body_timeout"), "its place is free again"
        assert response.headers["Connection"] == "close"
    slow.rest.set()
    assert (await slow.post(path)).status_code in (400, 422)


async def test_bodies_that_are_slow_leave_places_for_all_else(process: Process) -> None:
    slow = Slow(process, Bodies(at_once=2, timeout_s=60))
    held = [asyncio.create_task(slow.post(path)) for path in ("/inpaint", "/audit")]
    for _ in held:
        await slow.begun.acquire()
    for path in ("/inpaint", "/audit"):
        response = await slow.post(path)
        assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert (await slow.client.get("/health")).status_code == 200
    slow.rest.set()
    assert [(await task).status_code for task in held] == [400, 422]
    assert (await slow.post("/inpaint")).status_code == 400


async def upload_link(process: Process, size: int) -> str:
    link = await process.blobs.upload_link("models/m/lora", size=size, expires_s=60)
    return str(link.url).removeprefix("http://app.example.org")


async def uploaded(process: Process) -> list[int]:
    return [blob.size async for blob in process.blobs.list("models")]


@pytest.mark.parametrize("body", [b"", b"shor", b"too long", bytes(1_000_000)])
@pytest.mark.parametrize("says_its_length", [True, False])
async def test_an_upload_of_another_length_stores_nothing(
    process: Process, body: bytes, says_its_length: bool, temporary: Path
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 65_536):
            yield body[at : at + 65_536]

    client, link = Slow(process, Bodies()).client, await upload_link(process, 5)
    refused = await client.put(link, content=body if says_its_length else chunks())
    assert (refused.status_code, refused.json()["code"]) == (400, "malformed_message")
    assert (await uploaded(process), list(temporary.iterdir())) == ([], [])
    assert (await client.put(link, content=b"right")).status_code == 204
    assert (await uploaded(process), list(temporary.iterdir())) == ([5], [])


async def test_an_upload_whose_length_is_wrong_is_refused_before_it_is_read(process: Process) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("it was read")
        yield b""

    client, link = Slow(process, Bodies()).client, await upload_link(process, 5)
    refused = await client.put(link, content=never(), headers={"Content-Length": "6"})
    assert (refused.status_code, refused.json()["code"]) == (400, "malformed_message")


async def test_an_upload_that_stalls_ends_and_one_that_does_not_may_take_longer(
    process: Process, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    bodies = Bodies(uploads_at_once=1, timeout_s=0.05)
    slow, link = Slow(process, bodies), await upload_link(process, 2)
    for _ in range(2):
        response = await slow.post(link, "PUT")
        assert (response.status_code, response.json()["code"]) == (408, "body_timeout"), "its place is free again"
    assert (await uploaded(process), list(temporary.iterdir())) == ([], [])

    async def trickling() -> AsyncIterator[bytes]:
        for _ in range(15):
            yield bytes(50_000)
            await asyncio.sleep(0.1)

    slow, link = Slow(process, Bodies(timeout_s=1.0)), await upload_link(process, 15 * 50_000)
    assert (await slow.client.put(link, content=trickling())).status_code == 204, "longer than the time-out"
    monkeypatch.setattr("serve_app.http.problems.SLOWEST_BYTES_PER_S", 10_000_000)
    assert (await slow.client.put(link, content=trickling())).status_code == 408


async def test_uploads_that_are_slow_leave_places_for_all_else(process: Process) -> None:
    slow = Slow(process, Bodies(uploads_at_once=2, at_once=1, timeout_s=60))
    links = [await upload_link(process, 2) for _ in range(3)]
    held = [asyncio.create_task(slow.post(link, "PUT")) for link in links[:2]]
    for _ in held:
        await slow.begun.acquire()
    response = await slow.post(links[2], "PUT")
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert (await slow.client.post("/inpaint", content=b"{}", headers={"Content-Type": "application/json"})).is_error
    slow.rest.set()
    assert [(await task).status_code for task in held] == [204, 204]
    assert (await slow.post(links[2], "PUT")).status_code == 204


async def test_an_upload_ends_when_the_process_stops(process: Process) -> None:
    process.is_stopping = True
    response = await Slow(process, Bodies()).client.put(await upload_link(process, 2), content=b"hi")
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert await uploaded(process) == []


# What /ready says


REASONS: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({}, {}, "no such file"),
    ({"api_keys": "one"}, {}, WITHHELD),
    ({"api_keys": "one"}, {"X-API-Key": "another"}, WITHHELD),
    ({"api_keys": "one"}, {"X-API-Key": "one"}, "no such file"),
    ({"api_keys": "one:audit"}, {"Authorization": "Bearer one"}, "no such file"),
    ({"is_production": True}, {}, WITHHELD),
    ({"is_production": True, "api_keys": long("one")}, {"X-API-Key": long("one")}, "no such file"),
]


@pytest.mark.parametrize(("guard", "headers", "error"), REASONS)
def test_why_a_variant_failed_is_for_clients(
    client: TestClient, process: Process, guard: dict[str, Any], headers: dict[str, str], error: str
) -> None:
    process.guard(**guard)
    process.state = "failed"
    process.messages = {"s": {"connected": False, "error": "no such file", "held": 0}}
    answer = client.get("/ready", headers=headers)
    assert answer.status_code == 503
    assert answer.json()["variants"]["telea"] == {"state": "failed", "error": error, "where": {}}
    assert answer.json()["messages"] == {"s": {"connected": False, "error": error, "held": 0}}
    assert answer.json()["variants"]["Q8_0"] == {"state": "starting", "error": "", "where": {}}
