"""What all HTTP routes share: a body is read up to its limit, and whatever is wrong is a problem with a code."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .errors import BodyTooLarge, FluxFillError, Unauthorized


def answer_problems(app: FastAPI) -> None:
    """Have `app` answer every error as `problem` does."""
    app.add_exception_handler(FluxFillError, _problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(Exception, _internal_error)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Reads no more than `max_bytes`, whatever the Content-Length says. Raises BodyTooLarge."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes")
    return bytes(body)


def problem(
    status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
) -> JSONResponse:
    """An `application/problem+json` answer (RFC 9457) with a stable `code`."""
    body = {"type": "about:blank", "title": code.replace("_", " "), "status": status, "code": code, "detail": detail}
    return JSONResponse(
        {**body, **more}, status_code=status, headers=headers and dict(headers), media_type="application/problem+json"
    )


async def _problem(_request: Request, e: Exception) -> Response:
    assert isinstance(e, FluxFillError)
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(e, Unauthorized) else None
    return problem(e.http_status, e.code, e.message, headers=headers)


async def _http_problem(_request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(e.status_code, "http_error")
    return problem(e.status_code, code, str(e.detail), headers=e.headers)


async def _invalid_request(_request: Request, e: Exception) -> Response:
    assert isinstance(e, RequestValidationError)
    # Without the input, which may be a token.
    first = e.errors()[0]
    return problem(422, "invalid_request", f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


async def _internal_error(_request: Request, _e: Exception) -> Response:
    # What happened is raised on, and logged by the server.
    return problem(500, FluxFillError.code, "something went wrong here; the log says what")
