"""The committed description of the API: as the code has it, complete, and kept to by what the app answers."""

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve_app.http import openapi
from serve_app.http.app import create_app
from serve_app.http.auth import Access
from serve_app.jobs.kinds import Caller
from serve_app.settings import ApiSettings, Secrets

from .http_service import Process, long
from .http_service import settings as service_settings
from .test_generate import Studio

COMMITTED = Path("docs/openapi/openapi.v1.json")


def test_the_committed_description_is_the_codes() -> None:
    assert COMMITTED.read_text() == openapi.text(), f"python -m serve_app.http.openapi {COMMITTED}"


SCHEMA: dict[str, Any] = json.loads(COMMITTED.read_text())
OPERATIONS = [(path, method) for path, methods in SCHEMA["paths"].items() for method in methods]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_route_describes_its_answers_and_errors(path: str, method: str) -> None:
    operation = SCHEMA["paths"][path][method]
    answers = operation["responses"]
    assert operation["description"]
    assert {"421", "500"} <= answers.keys()
    if operation.get("security") and path != "/ready":
        assert {"401", "403", "429"} <= answers.keys()
    # A file that is uploaded is of any type.
    if method in ("post", "put") and path != "/blobs/{token}":
        assert {"403", "415"} <= answers.keys()
    for status, answer in answers.items():
        if int(status) >= 400 and (path, status) != ("/ready", "503"):
            assert answer == {"$ref": f"#/components/responses/{status}"}
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    assert all(one["content"] == problem for one in SCHEMA["components"]["responses"].values())


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [SCHEMA["paths"][path][method]["operationId"] for path, method in OPERATIONS]
    assert len(set(names)) == len(names) and {"post_job", "get_job", "follow_events", "list_models"} <= set(names)


def test_every_reference_leads_somewhere() -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, list):
            return [found for part in value for found in references(part)]
        if isinstance(value, dict):
            own = [value["$ref"]] if "$ref" in value else []
            return own + [found for part in value.values() for found in references(part)]
        return []

    for reference in references(SCHEMA):
        found = SCHEMA
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]


def test_bodies_that_routes_read_themselves_are_described() -> None:
    bodies = {(path, method): "requestBody" in SCHEMA["paths"][path][method] for path, method in OPERATIONS}
    takes = {key for key, has_body in bodies.items() if has_body}
    posts = {
        (path, "post")
        for path in (
            "/v1/jobs",
            "/v1/jobs/plan",
            "/v1/photos",
            "/v1/models",
            "/audit",
            "/inpaint",
            "/api/generate/image",
        )
    }
    posts |= {(f"/v1/images/{path}", "post") for path in ("generations", "edits")}
    of_clients = ("models/{owner}/{name}/predictions", "predictions", "files")
    posts |= {("/v1/flux-pro-1.0-fill", "post"), *((f"/replicate/v1/{path}", "post") for path in of_clients)}
    assert takes == posts | {("/v1/jobs/{id}", "put"), ("/blobs/{token}", "put")}
    job = SCHEMA["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
    assert job.keys() == {"application/json", "multipart/form-data"}


@pytest.mark.parametrize("name", ["GenerateBody", "InpaintBody", "JobView", "Problem"])
def test_the_shapes_that_a_client_begins_with_have_examples_that_are_valid(name: str) -> None:
    schema = {**SCHEMA["components"]["schemas"][name], "components": SCHEMA["components"]}
    (example,) = schema["examples"]
    jsonschema.validate(example, schema)


# What the app answers


KEY = long("boss")
#: By most values of these a body is refused.
CHOSEN = ("model_id", "engine", "scheduler", "width", "height", "chain")


@pytest.fixture(scope="module")
def described() -> Any:
    """An app in production, where every host name is let in, with a job that is over: `mine`."""
    studio = Studio(api={"stream_s": 0.01, "wait_s": 0.01, "jobs_per_day": 10**6, "unfinished_jobs": 10**6})
    process = Process(studio)
    unhurried = service_settings(is_production=True).model_copy(update={"api": ApiSettings(requests_per_minute=10**6)})
    process.access = Access(unhurried, Secrets(api_keys=f"{KEY}:admin+audit"))

    async def begin() -> None:
        body = {"type": "generate", "prompt": "a cat", "width": 64, "height": 64, "steps": 2, "count": 2}
        await process.jobs.post(body, Caller(), job_id="mine")
        await studio.notifier.drained()
        await studio.work()

    asyncio.run(begin())
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(lambda: process))


# Made by no import: a selection without this test does not wait for it.
schema = schemathesis.pytest.from_fixture("described")


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_is_answered_as_described(case: schemathesis.Case) -> None:
    checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
    # Nothing is painted here: who waits for a picture is told to come again.
    waits = case.path.startswith("/v1/images/")

    def call() -> None:
        more = [] if waits else [not_a_server_error]
        answer = case.call_and_validate(headers={"X-API-Key": KEY}, checks=[*checks, *more])
        assert answer.status_code < 500 or (waits and answer.status_code == 503)

    call()
    if "/v1/jobs/{id}" in case.path and case.method not in ("DELETE", "PUT"):
        case.path_parameters = {"id": "mine"}
        call()
    if isinstance(case.body, dict):
        case.body = {name: value for name, value in case.body.items() if name not in CHOSEN}
        call()
