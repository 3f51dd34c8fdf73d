"""The body of a request for a job: JSON, or a form with files."""

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ..errors import MalformedMessage, UnsupportedMediaType
from ..settings import Limits
from .problems import wrong

JSON, FORM = "application/json", "multipart/form-data"

#: Commas and brackets that a JSON body may have. Its values take more memory and time by their number than by its size.
_MAX_MARKS = 10_000

#: Parts of a form that are files; the part `job` is the JSON.
FILES = ("image", "mask")

_FILE = {"type": "string", "format": "binary"}
_JOB = {"oneOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("GenerateBody", "InpaintBody")]}
_PARTS = {"job": _JOB, **dict.fromkeys(FILES, _FILE)}
_FORM = {"type": "object", "required": ["job"], "properties": _PARTS, "additionalProperties": False}
#: For the description of routes that read one file.
FILE_BODY: Mapping[str, Any] = {
    "required": True,
    "content": {FORM: {"schema": {"type": "object", "required": ["content"], "properties": {"content": _FILE}}}},
}
#: For the description of routes that read one.
JOB_BODY: Mapping[str, Any] = {
    "required": True,
    "content": {
        JSON: {"schema": _JOB},
        FORM: {"schema": _FORM, "encoding": {"job": {"contentType": JSON}}},
    },
}


#: The same, where a form alone will do.
PLAN_BODY: Mapping[str, Any] = {"required": True, "content": {FORM: JOB_BODY["content"][FORM]}}


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """A small JSON object. Raises as `read_job`."""
    if _media_type(request) != JSON:
        raise UnsupportedMediaType(f"a body must be {JSON}")
    data: bytes = await request.app.state.bodies.read(request, limits.message_bytes)
    return json_object(data)


async def read_job(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON, and a form's files as bytes beside it.

    Raises UnsupportedMediaType; MalformedMessage for what is no such body; RequestValidationError for a form with other
    parts; and what `Bodies.read` raises.
    """
    media_type = _media_type(request)
    if media_type not in (JSON, FORM):
        raise UnsupportedMediaType(f"a body must be {JSON} or {FORM}")
    # In JSON, pictures are data: URIs, in base64.
    max_bytes = len(FILES) * limits.image_bytes * 4 // 3 + limits.message_bytes
    data: bytes = await request.app.state.bodies.read(request, max_bytes)
    if media_type == JSON:
        return json_object(data)
    parts = await _parts(request, data, limits.message_bytes)
    files = {name: part for name, part in parts if name in FILES and isinstance(part, bytes)}
    if unknown := next((name for name, _ in parts if name != "job" and name not in files), None):
        raise wrong(unknown, f"a form has a part job, and files {' and '.join(FILES)}")
    if len(dict(parts)) < len(parts):
        raise wrong("", "a part is there twice")
    if "job" not in dict(parts):
        raise wrong("job", "the form lacks this part, which is the JSON")
    body = json_object(dict(parts)["job"])
    if twice := min(body.keys() & files.keys(), default=None):
        raise wrong(twice, "it is in the part job already")
    return body | files


async def read_file(request: Request, name: str, limits: Limits) -> bytes:
    """The file that is a form's part `name`. Raises as `read_job`."""
    if _media_type(request) != FORM:
        raise UnsupportedMediaType(f"a body must be {FORM}")
    data: bytes = await request.app.state.bodies.read(request, limits.image_bytes + limits.message_bytes)
    file = dict(await _parts(request, data, limits.message_bytes)).get(name)
    if not isinstance(file, bytes):
        raise wrong(name, "the form lacks this part, which is the file")
    return file


async def read_form(request: Request, limits: Limits, *, max_fields: int) -> list[tuple[str, str | bytes]]:
    """Name and content of each part, which is bytes for a file: a photo, a mask, and one more, to be refused by name.

    Raises as `read_job`.
    """
    if _media_type(request) != FORM:
        raise UnsupportedMediaType(f"a body must be {FORM}")
    max_bytes = len(FILES) * limits.image_bytes + limits.message_bytes
    data: bytes = await request.app.state.bodies.read(request, max_bytes)
    return await _parts(request, data, limits.message_bytes, max_files=len(FILES) + 1, max_fields=max_fields)


async def _parts(
    request: Request, data: bytes, max_part_size: int, *, max_files: int = len(FILES), max_fields: int = 1
) -> list[tuple[str, str | bytes]]:
    """Name and content, which is bytes for a file."""

    async def whole() -> AsyncGenerator[bytes, None]:
        yield data

    parser = MultiPartParser(
        request.headers, whole(), max_files=max_files, max_fields=max_fields, max_part_size=max_part_size
    )
    # Never in a file of the server's.
    parser.spool_max_size = len(data) + 1
    try:
        form = await parser.parse()
    except MultiPartException as e:
        raise MalformedMessage(f"the body is no form: {e.message}") from None
    try:
        return [(n, await part.read() if isinstance(part, UploadFile) else part) for n, part in form.multi_items()]
    finally:
        await form.close()


def _media_type(request: Request) -> str:
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def json_object(data: str | bytes) -> dict[str, Any]:
    """Raises MalformedMessage for what is none, or has more values than any request has."""
    marks: Any = (",", "[", "{") if isinstance(data, str) else (b",", b"[", b"{")
    if sum(map(data.count, marks)) > _MAX_MARKS:
        raise MalformedMessage("the body is no job's: it has too many values")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise MalformedMessage("the body is no JSON") from None
    if not isinstance(body, dict):
        raise MalformedMessage("the body is no JSON object")
    return body
