"""The HTTP routes over a real worker, in process."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_app.api import MAX_ENVELOPE_BYTES, Readiness, VariantReadiness, VariantState, create_app
from serve_app.ports import Delivery, Verdict

from .rig import SESSION, USER, Rig


class Process:
    """The service a route sees: a real worker, and a readiness that the test sets."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.state: VariantState = "ready"
        self.default = "telea"

    async def work(self, delivery: Delivery) -> Verdict:
        return await self.rig.worker.work(delivery)

    def readiness(self) -> Readiness:
        telea = VariantReadiness(state=self.state, error="no such file" if self.state == "failed" else "")
        variants = {"telea": telea, "Q8_0": VariantReadiness(state="starting")}
        return Readiness(ready=variants[self.default].can_serve, default_variant=self.default, variants=variants)


@pytest.fixture
async def process() -> Process:
    rig = Rig()
    await rig.put_session()
    return Process(rig)


@pytest.fixture
def client(process: Process) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: process)) as client:
        yield client


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
    response = client.post("/inpaint", content=b"x" * (MAX_ENVELOPE_BYTES + 1))
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def test_what_is_not_there_is_a_problem_too(client: TestClient) -> None:
    assert client.get("/nope").json()["code"] == "not_found"
    assert client.get("/inpaint").json()["code"] == "method_not_allowed"
    assert client.get("/docs").status_code == 404
