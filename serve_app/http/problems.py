"""Shared by all HTTP routes: bodies are read up to a limit, every error is answered as a problem with a code, and every
answer has the request's correlation id."""

import asyncio
import http
import json
import math
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import tracing
from ..errors import BodyTimeout, BodyTooLarge, FluxFillError, MalformedMessage, Unauthorized, Unavailable
from ..telemetry import logged_with

#: Places for bodies that are being read, and the size of one: a larger body takes several.
BODIES_AT_ONCE = 32
PLACE_BYTES = 14_000_000
#: Files that are being uploaded: they take room on the disk, and a connection for long.
UPLOADS_AT_ONCE = 4
#: Of a file that is being uploaded, on average.
SLOWEST_BYTES_PER_S = 100_000
#: Of a field's name that a sender made up, in errors.
_NAME_CHARS = 100

#: By which a client and the log name a request: the client's own, or one that is made up. Serve answers with the header
#: `X-Request-ID`, which OpenAI's clients read, and passes its value in here.
CORRELATION_ID = "X-Correlation-ID"
#: OpenAI's clients send a request again after many an error, unless it says this.
NO_RETRY: Mapping[str, str] = {"X-Should-Retry": "false"}
_GIVEN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_CORRELATION_ID: ContextVar[str] = ContextVar("correlation_id", default="")


class ErrorObject(BaseModel):
    """The same error, as clients of OpenAI's read it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    #: The field at fault.
    param: str | None
    code: str


#: Codes of theirs that programs look for.
_THEIR_CODES: Mapping[str, str] = {
    **dict.fromkeys(("invalid_image", "image_too_large", "mask_mismatch", "mask_unclear"), "invalid_image_file"),
    "unauthorized": "invalid_api_key",
}


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    #: For programs; it stays as it is from version to version.
    code: str
    #: For people.
    detail: str
    #: The same as `detail`.
    message: str
    details: dict[str, Any]
    #: Also in the answer's header `X-Correlation-ID`, and in the log.
    correlation_id: str
    error: ErrorObject


class Gate:
    """ASGI middleware: a request for which `check` raises is answered with that problem, without reading its body; and
    every answer says the request's correlation id."""

    def __init__(self, app: ASGIApp, check: Callable[[Request], None]) -> None:
        self._app, self._check = app, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(CORRELATION_ID) or headers.get("X-Request-ID") or ""
        # What cannot stand in a log is no id.
        correlation_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        # Not reset: what answers a fault that nobody expected stands outside of this.
        _CORRELATION_ID.set(correlation_id)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[CORRELATION_ID] = correlation_id
            await send(message)

        with logged_with(correlation_id=correlation_id), tracing.within(headers.get("traceparent", "")):
            app, request = self._app, Request(scope)
            try:
                self._check(request)
            except FluxFillError as e:
                app = await _problem(request, e)
            await app(scope, receive, answer)


class Bodies:
    """Reads bodies, each up to its limit and in time, and so few at once that slow ones do not block other requests."""

    def __init__(
        self, *, at_once: int = BODIES_AT_ONCE, timeout_s: float = 15.0, uploads_at_once: int = UPLOADS_AT_ONCE
    ) -> None:
        self._places = self._at_once = at_once
        self._uploads = uploads_at_once
        self._timeout_s = timeout_s

    async def read(self, request: Request, max_bytes: int) -> bytes:
        """Reads no more than `max_bytes`, whatever the Content-Length says. Raises BodyTooLarge; BodyTimeout;
        Unavailable while too many others are being read."""
        # A Content-Length that is there is kept to: the server cuts off what follows.
        length = request.headers.get("Content-Length", "")
        size = min(int(length), max_bytes) if length.isdecimal() else max_bytes
        places = min(self._at_once, 1 + size // (PLACE_BYTES + 1))
        if self._places < places:
            raise Unavailable("too many requests are sending bodies; try again", retry_after_s=1)
        self._places -= places
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_bytes:
                        raise BodyTooLarge(f"the body has more than {max_bytes} bytes")
            return bytes(body)
        except TimeoutError:
            raise BodyTimeout(f"the body was not complete after {self._timeout_s:g} s") from None
        finally:
            self._places += places

    async def save(self, request: Request, to: Path, size: int, *, is_stopping: Callable[[], bool]) -> None:
        """Writes a body of `size` bytes to a new file.

        Raises MalformedMessage for a body of another length; BodyTimeout for one that stalls, or is slower than
        SLOWEST_BYTES_PER_S; Unavailable while too many others are being saved, and once `is_stopping`.
        """
        if (length := request.headers.get("Content-Length", str(size))) != str(size):
            raise MalformedMessage(f"the body has {length[:20]} bytes, not the {size} of the link")
        if not self._uploads:
            raise Unavailable("too many files are being uploaded; try again", retry_after_s=10)
        self._uploads -= 1
        came, began = 0, asyncio.get_running_loop().time()
        try:
            with to.open("xb", buffering=0) as file:
                async with asyncio.timeout(self._timeout_s) as limit:
                    async for chunk in request.stream():
                        came += len(chunk)
                        if came > size:
                            break
                        if is_stopping():
                            raise Unavailable("this process is stopping; try again", retry_after_s=10)
                        await asyncio.to_thread(file.write, chunk)
                        slowest_s = self._timeout_s + came / SLOWEST_BYTES_PER_S
                        now = asyncio.get_running_loop().time()
                        limit.reschedule(min(now + self._timeout_s, began + slowest_s))
        except TimeoutError:
            raise BodyTimeout(f"the body stalled, or was slower than {SLOWEST_BYTES_PER_S} bytes a second") from None
        except ClientDisconnect:
            raise MalformedMessage(f"the sender left after {came} of {size} bytes") from None
        except OSError as e:
            raise Unavailable(f"the body cannot be kept: {e.strerror or e}") from e
        finally:
            self._uploads += 1
        if came != size:
            raise MalformedMessage(f"the body has {'more' if came > size else 'fewer'} than {size} bytes")


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    details: Mapping[str, Any] | None = None,
    **more: Any,
) -> JSONResponse:
    """An `application/problem+json` answer (RFC 9457) with a stable `code`."""
    known: dict[str, Any] = json.loads(json.dumps(dict(details or {}), default=str))
    body = Problem(
        type="about:blank",
        title=code.replace("_", " "),
        status=status,
        code=code,
        detail=detail,
        message=detail,
        details=known,
        correlation_id=_CORRELATION_ID.get(),
        error=ErrorObject(
            message=detail,
            type="invalid_request_error" if status < 500 else "server_error",
            param=known.get("field"),
            code=_THEIR_CODES.get(code, code),
        ),
    )
    given = {**(headers or {}), CORRELATION_ID: body.correlation_id}
    return JSONResponse(
        {**body.model_dump(), **more}, status_code=status, headers=given, media_type="application/problem+json"
    )


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """For a route's description: the errors that it answers, beside those that any may answer."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {code: {"description": http.HTTPStatus(code).phrase, "content": content} for code in sorted(codes)}


def json_body(schema: str, media_type: str = "application/json") -> dict[str, Any]:
    """For the description of a route that reads its body itself: the name of its schema."""
    content = {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"required": True, "content": content}


#: What pydantic says in words of its own, by its type.
_SENTENCES = {"extra_forbidden": "there is no such field", "missing": "it is required"}


def invalid(e: ValidationError, *, but: str = "", names: Mapping[str, str] | None = None) -> RequestValidationError:
    """What is wrong with a body: the first field at fault, by the sender's own name of it, which has no part `but`, and
    never the input. `names` has the sender's own where they differ."""
    first = e.errors(include_input=False, include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part != but)
    return wrong((names or {}).get(field, field), _SENTENCES.get(first["type"], first["msg"]))


def wrong(field: str, why: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", *([field[:_NAME_CHARS]] if field else [])), "msg": why}])


#: Further headers of an answer. A connection whose body was not complete takes no second request.
_HEADERS: Mapping[type[FluxFillError], Mapping[str, str]] = {
    Unauthorized: {"WWW-Authenticate": "Bearer"},
    BodyTimeout: {"Connection": "close"},
}


def status_at(request: Request, status: int) -> int:
    """OpenAI's clients know no 422: what is wrong with a request is 400."""
    return 400 if status == 422 and "/v1/images/" in request.url.path else status


async def _problem(request: Request, e: FluxFillError) -> Response:
    headers = dict(_HEADERS.get(type(e), {}))
    if (wait_s := e.details.get("retry_after_s")) is not None:
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    elif e.http_status == 409:
        headers |= NO_RETRY
    return problem(status_at(request, e.http_status), e.code, e.message, headers=headers, details=e.details)


async def _http_problem(_request: Request, e: HTTPException) -> Response:
    if e.status_code < 400:
        return Response(status_code=e.status_code)
    code = {404: "not_found", 405: "method_not_allowed"}.get(e.status_code, "http_error")
    return problem(e.status_code, code, str(e.detail), headers=e.headers)


async def _invalid_request(request: Request, e: RequestValidationError) -> Response:
    # Without the input, which may be a token.
    first = e.errors()[0]
    # A body's fields by the names that its sender gave them.
    field = ".".join(map(str, first["loc"])).removeprefix("body.")
    why = first["msg"].removeprefix("Value error, ")
    return problem(status_at(request, 422), "invalid_request", f"{field}: {why}", details={"field": field})


async def _internal_error(_request: Request, _e: Exception) -> Response:
    # The server logs the exception, which is raised again.
    return problem(500, FluxFillError.code, "an internal error; see the log")


#: By which an app answers every error with a `problem`.
HANDLERS: Mapping[Any, Callable[[Request, Any], Awaitable[Response]]] = {
    FluxFillError: _problem,
    HTTPException: _http_problem,
    RequestValidationError: _invalid_request,
    Exception: _internal_error,
}
