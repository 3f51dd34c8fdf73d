"""Shared by all HTTP routes: bodies are read up to a limit, and every error is answered as a problem with a code."""

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import BodyTimeout, BodyTooLarge, FluxFillError, Unauthorized, Unavailable

#: Bodies that may be read at a time.
BODIES_AT_ONCE = 32


def answer_problems(app: FastAPI) -> None:
    """Have `app` answer every error with a `problem`."""
    app.add_exception_handler(FluxFillError, _problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(Exception, _internal_error)


class Gate:
    """ASGI middleware: a request for which `check` raises is answered with that problem, without reading its body."""

    def __init__(self, app: ASGIApp, check: Callable[[Request], None]) -> None:
        self._app, self._check = app, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                self._check(Request(scope))
        except FluxFillError as e:
            await _answer(e)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Bodies:
    """Reads bodies, each up to its limit and in time, and so few at once that slow ones do not block other requests."""

    def __init__(self, *, at_once: int = BODIES_AT_ONCE, timeout_s: float = 15.0) -> None:
        self._places, self._timeout_s = at_once, timeout_s

    async def read(self, request: Request, max_bytes: int) -> bytes:
        """Reads no more than `max_bytes`, whatever the Content-Length says. Raises BodyTooLarge; BodyTimeout;
        Unavailable while too many others are being read."""
        if not self._places:
            raise Unavailable("too many requests are sending bodies; try again")
        self._places -= 1
        try:
            async with asyncio.timeout(self._timeout_s):
                return await _read(request, max_bytes)
        except TimeoutError:
            raise BodyTimeout(f"the body was not complete after {self._timeout_s:g} s") from None
        finally:
            self._places += 1


async def _read(request: Request, max_bytes: int) -> bytes:
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


#: Further headers of an answer. A connection whose body was not complete takes no second request.
_HEADERS: Mapping[type[FluxFillError], Mapping[str, str]] = {
    Unauthorized: {"WWW-Authenticate": "Bearer"},
    BodyTimeout: {"Connection": "close"},
}


def _answer(e: FluxFillError) -> Response:
    headers = dict(_HEADERS.get(type(e), {}))
    if "retry_after_s" in e.details:
        headers["Retry-After"] = str(max(1, math.ceil(e.details["retry_after_s"])))
    return problem(e.http_status, e.code, e.message, headers=headers)


async def _problem(_request: Request, e: Exception) -> Response:
    assert isinstance(e, FluxFillError)
    return _answer(e)


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
    # The server logs the exception, which is raised again.
    return problem(500, FluxFillError.code, "an internal error; see the log")
