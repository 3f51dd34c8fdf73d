"""The API's description for machines: what FastAPI says of the routes, and what it cannot know.

python -m serve_app.http.openapi docs/openapi/openapi.v1.json
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..edit.posted import InpaintBody
from ..generate.request import GenerateBody
from ..jobs.messages import PushEnvelope
from . import events
from .audits import AuditBody
from .problems import CORRELATION_ID, Problem, problems

#: Bodies that routes read themselves, lines and messages of streams, and the error of all.
_MODELS: tuple[type[BaseModel], ...] = (
    AuditBody,
    GenerateBody,
    InpaintBody,
    Problem,
    PushEnvelope,
    *events.DATA.values(),
)
_CREDENTIALS = ("authorization", "x-api-key")
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
#: The last: where the app has no keys.
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"key": []}, {}]
#: Any request may be refused for its host, and any fail.
_ALWAYS = problems(421, 500)
#: In place of FastAPI's own.
_INVALID = problems(422)
#: What changes something may be refused for the page that it comes from.
_REFUSALS = problems(403, 415)


def described(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's description, with the rest."""
    components = schema["components"]
    for model in _MODELS:
        made = model.model_json_schema(ref_template="#/components/schemas/{model}")
        components["schemas"] |= {**made.pop("$defs", {}), model.__name__: made}
    components["securitySchemes"] = _SCHEMES
    components["headers"] = {
        CORRELATION_ID: {"schema": {"type": "string"}, "description": "The request's, in the log."}
    }
    components["responses"] = {}
    for method, operation in _operations(schema):
        parameters = operation.get("parameters", [])
        operation["parameters"] = [one for one in parameters if one["name"] not in _CREDENTIALS]
        if len(operation["parameters"]) < len(parameters):
            operation["security"] = _SECURITY
        answers = operation["responses"]
        is_invalid = "HTTPValidationError" in str(answers.get("422"))
        answers |= {str(status): problem for status, problem in (_INVALID if is_invalid else {}).items()}
        for status, problem in {**_ALWAYS, **({} if method == "get" else _REFUSALS)}.items():
            answers.setdefault(str(status), problem)
        for status, answer in answers.items():
            answer["headers"] = {CORRELATION_ID: {"$ref": f"#/components/headers/{CORRELATION_ID}"}}
            if "application/problem+json" in answer.get("content", {}):
                components["responses"][status] = answer
                answers[status] = {"$ref": f"#/components/responses/{status}"}
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    return dict(portable(schema))


#: Limits of numbers that pydantic writes by its own names.
_LIMITS = {"ge": "minimum", "le": "maximum"}


def portable(value: Any) -> Any:
    """JSON Schema as any tool reads it: patterns are ECMAScript's."""
    if isinstance(value, Mapping):
        return {
            _LIMITS.get(name, name): part.replace(r"\A", "^").replace(r"\z", "$")
            if name == "pattern"
            else portable(part)
            for name, part in value.items()
        }
    return [portable(part) for part in value] if isinstance(value, list) else value


def _operations(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in schema["paths"].values():
        yield from path.items()


def text() -> str:
    """The description as it is committed."""
    from .app import create_app

    def no_service() -> Any:
        raise AssertionError("no route is asked")

    return json.dumps(create_app(no_service).openapi(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text())
