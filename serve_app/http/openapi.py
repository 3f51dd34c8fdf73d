"""The API's description for machines: what FastAPI says of the routes, and what it cannot know.

python -m serve_app.http.openapi docs/openapi/openapi.v1.json
"""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..edit.posted import InpaintBody
from ..generate.loras import LoraBody
from ..generate.request import GenerateBody
from ..jobs.messages import PushEnvelope
from ..jobs.record import Job
from ..parameters import GenerateParameters
from .audits import AuditBody
from .events import MESSAGES
from .openai_images import ImagesBody, ImagesEdit
from .problems import CORRELATION_ID, Problem, problem, problems
from .studio import StudioBody
from .views import job_view

#: Bodies that routes read themselves, lines and messages of streams, and the error of all.
_MODELS: Sequence[type[BaseModel]] = (
    AuditBody,
    GenerateBody,
    ImagesBody,
    ImagesEdit,
    InpaintBody,
    LoraBody,
    PushEnvelope,
    StudioBody,
    Problem,
    *MESSAGES.values(),
)
_CORRELATED = {CORRELATION_ID: {"schema": {"type": "string"}, "description": "By which the log names the request."}}
_PARAMETERS = GenerateParameters(
    prompt="an old-growth forest at dawn", width=1024, height=1024, steps=24, guidance_scale=7
)
_JOB = Job(
    id="forest-1", variant="sdxl", parameters=_PARAMETERS, seed=7, created_at=datetime(2026, 11, 30, 12, tzinfo=UTC)
)


def described(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's description, with the rest: models that no route names, examples, and the errors of any route."""
    schemas, answers = schema["components"]["schemas"], dict[str, Any]()
    schema["components"] |= {"headers": _CORRELATED, "responses": answers}
    for model in _MODELS:
        made = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**made.pop("$defs", {}), model.__name__: made}
    schemas["JobView"]["examples"] = [job_view(_JOB, ahead=0).model_dump(mode="json")]
    example = json.loads(bytes(problem(404, "unknown_job", "there is no job forest-2").body))
    schemas["Problem"]["examples"] = [example | {"correlation_id": "order-7"}]
    for methods in schema["paths"].values():
        for method, operation in methods.items():
            if "security" in operation:
                # Neither, where the app has no keys.
                operation["security"].append({})
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
            invalid = (422,) if operation.get("parameters") else ()
            # Of the page that a request comes from.
            for status, answer in problems(*invalid, *(() if method == "get" else (403, 415))).items():
                operation["responses"].setdefault(str(status), answer)
            for status, answer in operation["responses"].items():
                answer["headers"] = {CORRELATION_ID: {"$ref": f"#/components/headers/{CORRELATION_ID}"}}
                if "application/problem+json" in answer.get("content", {}):
                    answers[status] = answer
                    operation["responses"][status] = {"$ref": f"#/components/responses/{status}"}
    # FastAPI's own error, which is never answered.
    del schemas["HTTPValidationError"], schemas["ValidationError"]
    return dict(portable(schema))


def portable(value: Any) -> Any:
    """JSON Schema as any tool reads it: patterns are ECMAScript's, and limits are not by pydantic's own names."""
    if isinstance(value, str):
        return value.replace(r"\A", "^").replace(r"\z", "$")
    if isinstance(value, dict):
        return {{"ge": "minimum", "le": "maximum"}.get(name, name): portable(part) for name, part in value.items()}
    return [portable(part) for part in value] if isinstance(value, list) else value


def text() -> str:
    """The description as it is committed."""
    # It needs this module.
    from .app import create_app

    no_service: Any = None
    return json.dumps(create_app(no_service).openapi(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text())
