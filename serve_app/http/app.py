"""HTTP routes over the ports. Knows no adapter, no engine and no Ray."""

import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..edit.posted import API_USER
from ..errors import FluxFillError, Forbidden, MalformedMessage, Unavailable, VariantNotReady
from ..jobs.messages import parse_edit, parse_envelope
from ..jobs.ports import Delivery, Verdict
from ..jobs.record import State
from ..parameters import Id
from . import audits, bfl, blobs, jobs, models, openai_images, previews, replicate, studio, workbench
from .events import Streams
from .openapi import described
from .pages import check_page
from .problems import HANDLERS, Bodies, Gate, json_body, problem, problems
from .service import Credentials, Readiness, Served, Service, caller_with

log = logging.getLogger(__name__)

#: Pub/Sub's largest message, 10 MB, in base64, with room for the envelope. A message over this app's own, smaller limit
#: must be read to be acknowledged and dead-lettered: a refused push is delivered again for ever.
MAX_ENVELOPE_BYTES = 14_000_000


class Health(BaseModel):
    status: Literal["ok", "ready"]


class Outcome(BaseModel):
    #: Of the push's message: an outcome of a job, or an error's code.
    outcome: str


class CanceledJob(BaseModel):
    id: str
    status: State


class CanceledSession(BaseModel):
    #: Jobs that were stopped. Messages that still wait become no job.
    jobs: list[CanceledJob]


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        self.openapi_schema = self.openapi_schema or described(super().openapi())
        return self.openapi_schema


def create_app(service: Callable[[], Service], bodies: Bodies | None = None, streams: Streams | None = None) -> FastAPI:
    """`service` is called at each request, because Serve makes the app before the replica."""

    def check(request: Request) -> None:
        # In production every route needs a credential that no browser adds by itself, and probes and proxies use many
        # host names.
        if not service().access.is_production:
            check_page(request.method, request.url.path, request.headers)

    app = _App(
        title="flux-fill-serve",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        responses=problems(421, 500),
        exception_handlers=dict(HANDLERS),
        # Its spans would hold the paths of signed links, and its logs what exceptions say.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service, app.state.bodies, app.state.streams = service, bodies or Bodies(), streams or Streams()
    app.state.turns = previews.Turns()
    app.add_middleware(Gate, check=check)
    of_clients = (studio.router, openai_images.router, replicate.router, bfl.router)
    for routes in (
        router,
        blobs.router,
        jobs.router,
        previews.router,
        models.router,
        audits.router,
        workbench.router,
        *of_clients,
    ):
        app.include_router(routes)
    return app


router = APIRouter()


@router.get("/healthz", operation_id="healthz")
@router.get("/health")
async def health() -> Health:
    """The process answers. Says nothing about models or brokers; see /ready."""
    return Health(status="ok")


@router.get("/readyz", responses=problems(503))
async def readyz(service: Served) -> Health:
    """Whether the app can work, as /ready has it, in a word."""
    if not service.readiness().ready:
        raise Unavailable("not ready; see /ready")
    return Health(status="ready")


@router.get("/ready", responses={503: {"model": Readiness}})
async def ready(response: Response, service: Served, credentials: Credentials) -> Readiness:
    """200 when the default variant can serve and an embedded Pub/Sub server listens, else 503; always with each
    variant's and each subscription's state, and for clients with a key the reasons."""
    readiness = service.readiness()
    response.status_code = 200 if readiness.ready else 503
    return readiness if service.access.is_client(*credentials) else readiness.without_reasons()


@router.post(
    "/v1/sessions/{userId}/{sessionId}/cancel",
    dependencies=[caller_with("jobs")],
    responses=problems(401, 403, 422, 429, 503),
)
async def cancel_session(
    user_id: Annotated[Id, Path(alias="userId")], session_id: Annotated[Id, Path(alias="sessionId")], service: Served
) -> CanceledSession:
    """Cancel a session's jobs and waiting messages. 200 even if there are none."""
    if user_id == API_USER:
        raise Forbidden(f"userId: a session of {API_USER} is a posted job's own: cancel the job")
    canceled = await service.jobs.cancel_session(user_id, session_id)
    return CanceledSession(jobs=[CanceledJob(id=job.id, status=job.status) for job in canceled])


@router.post(
    "/inpaint",
    response_model=Outcome,
    responses=problems(400, 401, 403, 404, 408, 413, 422, 503),
    openapi_extra={"requestBody": json_body("PushEnvelope")},
)
async def inpaint(request: Request, service: Served) -> JSONResponse:
    """A Pub/Sub push, answered when its result is stored. 2xx acknowledges it."""
    if not service.access.takes_pushes:
        raise HTTPException(404, "this app accepts no pushes: push.enabled is false")
    try:
        verdict = await _work_on_push(request, service)
    except FluxFillError as e:
        service.metrics.add("fluxfill_pushes_refused_total", code=e.code)
        log.warning("Refused a push: %s", e.message, extra={"action": "push_refused", "code": e.code})
        raise
    if verdict.action == "ack":
        return JSONResponse({"outcome": verdict.reason})
    headers = {"Retry-After": str(max(1, round(verdict.delay_s)))}
    return problem(503, "held_back", f"not done yet: {verdict.reason}", headers=headers)


async def _work_on_push(request: Request, service: Service) -> Verdict:
    # Before the body is read, so that a stranger's push costs only its headers.
    await service.access.check_push(request.headers.get("Authorization"))
    body = await request.app.state.bodies.read(request, MAX_ENVELOPE_BYTES)
    try:
        envelope = parse_envelope(body)
        delivery = Delivery(
            data=envelope.payload(),
            attributes=envelope.message.attributes or {},
            message_id=envelope.message.message_id,
            publish_time=envelope.message.publish_time,
        )
    except MalformedMessage as e:
        if not service.access.verifies_pushes:
            raise
        # Pub/Sub would send a refused push again for ever; another client reads the answer.
        return await service.work(Delivery(data=body, attributes={}, message_id="", fault=e.message))
    try:
        message, _ = parse_edit(delivery.data, max_bytes=service.limits.message_bytes)
    except MalformedMessage:
        # The worker dead-letters it, and one that names an unknown variant.
        return await service.work(delivery)
    readiness = service.readiness()
    name = message.variant or readiness.default_variant
    if (variant := readiness.variants.get(name)) is not None and not variant.can_serve:
        # Pushed again, it finds it ready.
        raise VariantNotReady(f"variant {name} is {variant.state}; see /ready")
    return await service.work(delivery)
