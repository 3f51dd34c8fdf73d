"""The HTTP routes over a real worker, in process."""

import base64
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Message

from serve_app.errors import ReplicaLost
from serve_app.http.app import MAX_ENVELOPE_BYTES, create_app
from serve_app.http.service import VariantState
from serve_app.jobs.record import State

from . import jwks_server
from .http_service import LINKS, Process, long
from .jwks_server import SigningKey
from .rig import SESSION, USER, Rig


@pytest.fixture
async def process() -> Process:
    rig = Rig()
    await rig.put_session()
    return Process(rig)


@pytest.fixture
def client(process: Process) -> Iterator[TestClient]:
    app = create_app(lambda: process)
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


JSON = {"Content-Type": "application/json"}


def envelope(data: bytes | None = None, **message: Any) -> dict[str, Any]:
    body = json.dumps({"userId": USER, "sessionId": SESSION}).encode() if data is None else data
    return {"message": {"data": base64.b64encode(body).decode(), "messageId": "7", **message}, "subscription": "s"}


def test_health_says_that_the_process_answers(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("state", "status"), [("ready", 200), ("scaled_to_zero", 200), ("starting", 503), ("failed", 503)]
)
def test_ready_tells_each_variants_state(
    client: TestClient, process: Process, state: VariantState, status: int
) -> None:
    process.state = state
    response = client.get("/ready")
    assert response.status_code == status
    variant = response.json()["variants"]["telea"]
    assert variant["state"] == state
    assert variant["error"] == ("no such file" if state == "failed" else "")


def test_a_push_is_answered_when_its_result_is_stored(client: TestClient, process: Process) -> None:
    response = client.post("/inpaint", json=envelope())
    assert (response.status_code, response.json()) == (200, {"outcome": "succeeded"})
    assert process.rig.engine.painted == 1


def test_a_push_of_bad_input_is_acknowledged_and_dead_lettered(client: TestClient, process: Process) -> None:
    response = client.post("/inpaint", json=envelope(b"{}"))
    assert (response.status_code, response.json()) == (200, {"outcome": "malformed_message"})
    assert len(process.rig.topics.dead) == 1


def test_a_push_that_must_come_again_is_not_acknowledged(client: TestClient, process: Process) -> None:
    process.rig.blobs.is_down = True
    response = client.post("/inpaint", json=envelope())
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert response.headers["content-type"] == "application/problem+json"
    assert "store_unavailable" in response.json()["detail"]


@pytest.mark.parametrize("state", ["starting", "failed"])
def test_a_push_before_its_variant_is_ready_is_refused(
    client: TestClient, process: Process, state: VariantState
) -> None:
    process.state = state
    response = client.post("/inpaint", json=envelope())
    assert (response.status_code, response.json()["code"]) == (503, "variant_not_ready")
    assert process.rig.engine.painted == 0


def test_a_push_for_another_variant_does_not_wait_for_the_default_one(client: TestClient, process: Process) -> None:
    process.default = "Q8_0"
    body = json.dumps({"userId": USER, "sessionId": SESSION, "variant": "telea"}).encode()
    assert client.get("/ready").status_code == 503
    assert client.post("/inpaint", json=envelope(body)).json() == {"outcome": "succeeded"}


def test_an_unreadable_push_is_dead_lettered_whatever_is_ready(client: TestClient, process: Process) -> None:
    process.state = "failed"
    assert client.post("/inpaint", json=envelope(b"{}")).json() == {"outcome": "malformed_message"}


def test_a_push_of_another_encoder_is_worked_on(client: TestClient, process: Process) -> None:
    body = envelope(attributes=None, publishTime=None)
    body["message"]["data"] = body["message"]["data"].rstrip("=").translate(str.maketrans("+/", "-_"))
    assert client.post("/inpaint", json=body).json() == {"outcome": "succeeded"}


@pytest.fixture
def from_pubsub(process: Process) -> Iterator[dict[str, str]]:
    """Headers of a verified push."""
    key = SigningKey("key-1")
    with jwks_server.serve() as server:
        server.keys = [key]
        process.guard(is_production=True, jwks_url=server.url)
        yield {"Authorization": f"Bearer {key.token()}"}


#: Bodies of pushes that are no messages, and what is said of them. One is what comes without Pub/Sub's envelope.
UNREADABLE = [
    (b'{"message": {"data": "?", "messageId": "1"}}', "message.data: not base64"),
    (b'{"message": {"data": "e30="}}', "message.messageId: "),
    (json.dumps(envelope(attributes={f"a{i}": "" for i in range(101)})).encode(), "message.attributes: "),
    (json.dumps(envelope(publishTime="20300101")).encode(), "message.publishTime: "),
    (json.dumps({"userId": USER, "sessionId": SESSION}).encode(), "message: "),
    (b"{" * 200_000, "the body has more values"),
    (b"", "the message: "),
    (b"\xff", "the message: "),
]


@pytest.mark.parametrize(("body", "told"), UNREADABLE)
def test_what_pubsub_sends_and_cannot_be_read_is_dead_lettered_as_it_came(
    client: TestClient, process: Process, from_pubsub: dict[str, str], body: bytes, told: str
) -> None:
    # Whatever is ready, because it would come again for ever.
    process.state = "failed"
    response = client.post("/inpaint", content=body, headers=from_pubsub)
    assert (response.status_code, response.json()) == (200, {"outcome": "malformed_message"})
    ((data, why),) = process.rig.topics.dead
    assert data == body and why["deadLetterError"].startswith(told)
    assert (why["deadLetterReason"], process.rig.engine.painted) == ("malformed_message", 0)
    assert process.rig.metrics.total("fluxfill_dead_letters_total", "malformed_message") == 1


@pytest.mark.parametrize(("body", "told"), UNREADABLE)
def test_what_nobody_verified_and_cannot_be_read_is_refused(
    client: TestClient, process: Process, body: bytes, told: str
) -> None:
    response = client.post("/inpaint", content=body, headers=JSON)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_message")
    assert response.json()["detail"].startswith(told)
    assert process.rig.topics.dead == []


def test_what_cannot_be_read_comes_again_while_the_broker_takes_no_dead_letter(
    client: TestClient, process: Process, from_pubsub: dict[str, str]
) -> None:
    process.rig.broker.is_down = True
    assert client.post("/inpaint", content=b"?", headers=from_pubsub).status_code == 503


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "message"),
        ({"message": {"data": "e30="}}, "message.messageId"),
        ({"message": {"data": "?", "messageId": "1"}}, "message.data"),
        ({"message": {"data": 3, "messageId": "1"}}, "message.data"),
    ],
)
def test_a_malformed_envelope_names_the_field(client: TestClient, body: dict[str, Any], named: str) -> None:
    response = client.post("/inpaint", json=body)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_message")
    assert response.json()["detail"].startswith(named)


def test_a_push_over_our_limit_is_dead_lettered_like_a_pulled_one(client: TestClient, process: Process) -> None:
    response = client.post("/inpaint", json=envelope(b"x" * 200_000))
    assert (response.status_code, response.json()) == (200, {"outcome": "malformed_message"})
    assert len(process.rig.topics.dead) == 1


def test_a_body_over_pubsubs_limit_is_refused_while_it_is_read(client: TestClient) -> None:
    response = client.post("/inpaint", content=b"x" * (MAX_ENVELOPE_BYTES + 1), headers=JSON)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def test_a_refused_push_is_counted_by_its_code(client: TestClient, process: Process) -> None:
    client.post("/inpaint", json={})
    client.post("/inpaint", json=envelope())
    assert process.rig.metrics.total("fluxfill_pushes_refused_total", "malformed_message") == 1


def test_where_pushes_are_switched_off_there_is_no_such_route(client: TestClient, process: Process) -> None:
    process.guard(enabled=False)
    response = client.post("/inpaint", json=envelope())
    assert (response.status_code, problem_code(response)) == (404, "not_found")
    assert process.worked == 0


# Problems


def problem_code(response: Any) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == response.status_code and problem["detail"]
    code: str = problem["code"]
    return code


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/inpaint", 405, "method_not_allowed"),
        ("GET", "/v1/jobs/j/cancel", 405, "method_not_allowed"),
        ("POST", "/v1/jobs/a.b/cancel", 422, "invalid_request"),
        ("GET", "/blobs/broken.token", 500, "internal_error"),
    ],
)
def test_whatever_is_wrong_is_a_problem_with_a_code(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path)
    assert (response.status_code, problem_code(response)) == (status, code)
    assert "fault of our own" not in response.text


# Cancellation


async def waiting_job(process: Process) -> str:
    """A job whose first attempt failed, and which is to be tried again."""

    def fail() -> None:
        raise ReplicaLost("gone")

    process.rig.engine.on_paint = fail
    await process.rig.work()
    return (await process.rig.job()).id


async def test_a_waiting_job_is_canceled_by_its_id(client: TestClient, process: Process) -> None:
    job_id = await waiting_job(process)
    response = client.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 200
    assert response.json().items() >= {"id": job_id, "status": "canceled", "error_code": "canceled"}.items()
    assert (await process.rig.job()).status == State.CANCELED
    again = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (again.status_code, problem_code(again)) == (409, "illegal_transition")


def test_a_job_that_nobody_knows_cannot_be_canceled(client: TestClient) -> None:
    response = client.post("/v1/jobs/edit-0123/cancel")
    assert (response.status_code, problem_code(response)) == (404, "unknown_job")


async def test_a_session_is_canceled_with_its_jobs(client: TestClient, process: Process) -> None:
    job_id = await waiting_job(process)
    response = client.post(f"/v1/sessions/{USER}/{SESSION}/cancel")
    assert (response.status_code, response.json()) == (200, {"jobs": [{"id": job_id, "status": "canceled"}]})


async def test_a_posted_jobs_own_session_is_canceled_by_the_job_alone(client: TestClient, process: Process) -> None:
    response = client.post("/v1/sessions/api/job-1/cancel")
    assert (response.status_code, problem_code(response)) == (403, "forbidden")
    assert await process.rig.jobs.canceled_until("api/job-1") is None


async def test_a_session_without_jobs_is_canceled_for_its_waiting_messages(
    client: TestClient, process: Process
) -> None:
    response = client.post(f"/v1/sessions/{USER}/{SESSION}/cancel")
    assert (response.status_code, response.json()) == (200, {"jobs": []})
    assert await process.rig.jobs.canceled_until(f"{USER}/{SESSION}") is not None


def test_a_store_that_is_down_is_said_to_be(client: TestClient, process: Process) -> None:
    process.rig.jobs.is_down = True
    for path in ("/v1/jobs/edit-0123/cancel", f"/v1/sessions/{USER}/{SESSION}/cancel"):
        response = client.post(path)
        assert (response.status_code, problem_code(response)) == (503, "store_unavailable")


#: As they stand in a request line; `..` also as it is, because only clients take it out.
HOSTILE_IDS = ["..", "%2e%2e", "a%2Fb", "..%2F..%2Fetc", "a%5Cb", "a%00", "%00", "a%0A", "a%20b", "%C3%A9", "%FF"]
HOSTILE_IDS += ["a.b", "%252e%252e", "~", "x" * 129, "x" * 10_000]


@pytest.mark.parametrize("hostile", HOSTILE_IDS, ids=lambda hostile: hostile[:12])
@pytest.mark.parametrize("path", ["/v1/jobs/{}/cancel", "/v1/sessions/{}/s/cancel", "/v1/sessions/u/{}/cancel"])
async def test_ids_that_could_escape_a_path_are_refused(process: Process, path: str, hostile: str) -> None:
    process.rig.jobs.is_down = True  # So that whatever reached the service would answer 503.
    status, body = await raw(create_app(lambda: process), "POST", path.format(hostile))
    assert (status, body["code"]) in [(422, "invalid_request"), (404, "not_found")]
    assert hostile not in body["detail"] or len(hostile) < 3


async def raw(app: FastAPI, method: str, path: str) -> tuple[int, dict[str, Any]]:
    """The answer to a path as it stands, which httpx would tidy up."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "headers": [(b"host", b"localhost")],
    }
    await app({**scope, "query_string": b"", "root_path": "", "scheme": "http"}, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


# API keys


@pytest.mark.parametrize("path", ["/v1/jobs/edit-0123/cancel", "/v1/sessions/u/s/cancel", "/v1/jobs/a.b/cancel"])
class TestApiKeys:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Authorization": f"Bearer {long('two')}"},
            {"authorization": f"bearer {long('one')}"},
            {"X-API-Key": long("two")},
        ],
    )
    def test_each_key_opens(self, client: TestClient, process: Process, path: str, headers: dict[str, str]) -> None:
        process.guard(api_keys=long("one, two,"), is_production=True)
        assert client.post(path, headers=headers).status_code in (200, 404, 422)

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Authorization": "Bearer three"},
            {"Authorization": "Bearer "},
            {"Authorization": "Bearer one, two"},
            {"Authorization": "Basic b25lOnR3bw=="},
            {"Authorization": "one"},
            {"X-API-Key": ""},
            {"X-API-Key": "on"},
            {"X-API-Key": "onee"},
            {"X-API-Key": "three", "Authorization": "Bearer one"},
            {"Authorization": "Bearer " + "x" * 10_000},
        ],
        ids=lambda headers: str(headers)[:40],
    )
    def test_nothing_else_does(self, client: TestClient, process: Process, path: str, headers: dict[str, str]) -> None:
        process.guard(api_keys="one, two,")
        response = client.post(path, headers=headers)
        assert (response.status_code, problem_code(response)) == (401, "unauthorized")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert "three" not in response.text

    def test_without_keys_they_are_open_on_a_machine_of_ones_own(self, client: TestClient, path: str) -> None:
        assert client.post(path).status_code in (200, 404, 422)

    @pytest.mark.parametrize(("api_keys", "is_production"), [(None, True), (" , ", True), (",", False)])
    def test_without_keys_they_are_shut_in_production(
        self, client: TestClient, process: Process, path: str, api_keys: str | None, is_production: bool
    ) -> None:
        process.guard(api_keys=api_keys, is_production=is_production)
        response = client.post(path, headers={"X-API-Key": ""})
        assert (response.status_code, problem_code(response)) == (403, "forbidden")


# Signed links


async def test_a_signed_link_reads_its_blob(client: TestClient, process: Process) -> None:
    response = client.get("/blobs/good.token")
    assert (response.status_code, response.content) == (200, await process.rig.blob("original.jpg"))
    assert response.headers["content-type"] == "image/jpeg"
    assert response.headers["content-disposition"] == 'inline; filename="original.jpg"'
    assert response.headers["cache-control"] == "private, no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in response.headers["content-security-policy"]


async def test_an_odd_name_is_made_safe(client: TestClient, process: Process) -> None:
    await process.rig.blobs.put(LINKS["odd.token"], b"<svg/>", content_type="image/svg+xml")
    response = client.get("/blobs/odd.token")
    assert response.headers["content-disposition"] == 'inline; filename="a__b___.svg"'


async def test_an_edit_is_named_after_its_format(client: TestClient, process: Process) -> None:
    await process.rig.blobs.put(LINKS["good.token"], b"png", content_type="image/png")
    response = client.get("/blobs/good.token")
    assert response.headers["content-disposition"] == 'inline; filename="original.png"'


async def test_an_audits_page_runs_what_it_brings_and_fetches_nothing(client: TestClient, process: Process) -> None:
    await process.rig.blobs.put(LINKS["page.token"], b"<html>", content_type="text/html; charset=utf-8")
    response = client.get("/blobs/page.token")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": "'unsafe-inline'",
        "sandbox": "allow-scripts allow-popups allow-popups-to-escape-sandbox",
    }
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "private, no-store"


@pytest.mark.parametrize("token", ["user.token", "deep.token", "above.token", "good.token"])
async def test_whatever_else_says_that_it_is_a_page_runs_nothing(
    client: TestClient, process: Process, token: str
) -> None:
    await process.rig.blobs.put(LINKS[token], b"<script>", content_type="text/html")
    response = client.get(f"/blobs/{token}")
    assert response.headers["content-security-policy"] == "default-src 'none'; sandbox"


async def test_in_a_pages_place_only_a_page_runs(client: TestClient, process: Process) -> None:
    await process.rig.blobs.put(LINKS["page.token"], b"<svg/>", content_type="image/svg+xml")
    response = client.get("/blobs/page.token")
    assert response.headers["content-security-policy"] == "default-src 'none'; sandbox"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "status", "code"),
    [
        ("none.of.ours", 403, "invalid_link"),
        ("gone.token", 404, "blob_not_found"),
        ("a%2F..%2Fb", 404, "not_found"),
        ("%00secret", 422, "invalid_request"),
        ("secret" * 1000, 422, "invalid_request"),
    ],
)
async def test_what_is_no_link_is_refused_and_not_repeated(
    process: Process, caplog: pytest.LogCaptureFixture, token: str, status: int, code: str
) -> None:
    answered, body = await raw(create_app(lambda: process), "GET", f"/blobs/{token}")
    assert (answered, body["code"]) == (status, code)
    assert "secret" not in str(body) + caplog.text
