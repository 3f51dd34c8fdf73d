"""The committed description of the API: as the code has it, complete, and kept to by what the app answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.http import openapi

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
    if method in ("post", "put"):
        assert {"403", "415"} <= answers.keys()
    for status, answer in answers.items():
        if int(status) >= 400 and (path, status) != ("/ready", "503"):
            assert answer == {"$ref": f"#/components/responses/{status}"}
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    assert all(one["content"] == problem for one in SCHEMA["components"]["responses"].values())


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
    assert takes == {("/v1/jobs", "post"), ("/v1/jobs/{id}", "put"), ("/audit", "post"), ("/inpaint", "post")}
    job = SCHEMA["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
    assert job.keys() == {"application/json", "multipart/form-data"} and job["application/json"]["examples"]
