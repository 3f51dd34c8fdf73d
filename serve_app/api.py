"""HTTP routes over the ports. Knows no adapter, no engine and no Ray."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from .errors import BodyTooLarge, FluxFillError, MalformedMessage, VariantNotReady
from .messages import parse_edit, parse_envelope
from .ports import Delivery, Verdict

#: Pub/Sub's largest message, 10 MB, in base64, and room for the rest. A message over our own, smaller limit must be
#: read to be acknowledged and dead-lettered: a refused push comes again for ever.
MAX_ENVELOPE_BYTES = 14_000_000

VariantState = Literal["starting", "ready", "scaled_to_zero", "failed"]


class VariantReadiness(BaseModel):
    state: VariantState
    #: Why, where the state is `failed`.
    error: str = ""

    @property
    def can_serve(self) -> bool:
        return self.state in ("ready", "scaled_to_zero")


class Readiness(BaseModel):
    """The body of `GET /ready`."""

    ready: bool
    default_variant: str
    variants: dict[str, VariantReadiness]
    #: `connected`, `error` and `held` of each subscription.
    messages: dict[str, dict[str, Any]] = {}
    #: Why the last change of the inference defaults was not taken; empty where it was.
    defaults_error: str = ""


class Service(Protocol):
    """What the routes need of the ingress."""

    async def work(self, delivery: Delivery) -> Verdict: ...

    def readiness(self) -> Readiness: ...


def create_app(service: Callable[[], Service]) -> FastAPI:
    """`service` is asked at each request, because Serve makes the app before the replica."""
    app = FastAPI(title="flux-fill-serve", docs_url=None, redoc_url=None)
    app.add_exception_handler(FluxFillError, _problem)
    app.add_exception_handler(HTTPException, _http_problem)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process answers. Says nothing of models or brokers; see /ready."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(response: Response) -> Readiness:
        """200 when the default variant can serve, else 503; each variant's state either way."""
        readiness = service().readiness()
        response.status_code = 200 if readiness.ready else 503
        return readiness

    @app.post("/inpaint")
    async def inpaint(request: Request) -> JSONResponse:
        """A Pub/Sub push: worked on now, answered when its result is stored. 2xx acknowledges."""
        envelope = parse_envelope(await _body(request, MAX_ENVELOPE_BYTES))
        delivery = Delivery(
            data=envelope.payload(),
            attributes=envelope.message.attributes,
            message_id=envelope.message.message_id,
            publish_time=envelope.message.publish_time,
        )
        _refuse_early(delivery, service().readiness())
        return _answer(await service().work(delivery))

    return app


def _refuse_early(delivery: Delivery, readiness: Readiness) -> None:
    """Raises VariantNotReady for a message whose variant cannot serve yet: pushed again, it finds it ready. What cannot
    be read, or names a variant nobody serves, is the worker's to dead-letter."""
    try:
        message, _ = parse_edit(delivery.data, max_bytes=MAX_ENVELOPE_BYTES)
    except MalformedMessage:
        return
    name = message.variant or readiness.default_variant
    variant = readiness.variants.get(name)
    if variant is not None and not variant.can_serve:
        raise VariantNotReady(f"variant {name} is {variant.state}; see /ready")


def _answer(verdict: Verdict) -> JSONResponse:
    if verdict.action == "ack":
        return JSONResponse({"outcome": verdict.reason})
    headers = {"Retry-After": str(max(1, round(verdict.delay_s)))}
    return problem(503, "held_back", f"not done: {verdict.reason}", headers=headers)


async def _body(request: Request, max_bytes: int) -> bytes:
    """Reads no more than `max_bytes`, whatever the Content-Length says."""
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
    return problem(e.http_status, e.code, e.message)


async def _http_problem(_request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(e.status_code, "http_error")
    return problem(e.status_code, code, str(e.detail), headers=e.headers)
