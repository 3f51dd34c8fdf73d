"""HTTP routes over the ports. Knows no adapter, no engine and no Ray."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Depends, FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..audit.runs import Audits
from ..blobs import BlobInfo
from ..errors import FluxFillError, MalformedMessage, Unavailable, VariantNotReady
from ..jobs.api import JobApi
from ..jobs.messages import parse_edit, parse_envelope
from ..jobs.ports import Delivery, Verdict
from ..jobs.record import Job, State
from ..parameters import Id
from ..settings import Limits
from ..telemetry import Metrics
from .audits import routes as audit_routes
from .auth import Access, Credential, caller_with
from .blobs import routes as blob_routes
from .events import Streams
from .jobs import routes as job_routes
from .models import routes as model_routes
from .openapi import described
from .pages import check_page
from .problems import Bodies, Gate, answer_problems, json_body, problem, problems

log = logging.getLogger(__name__)

#: Pub/Sub's largest message, 10 MB, in base64, with room for the envelope. A message over this app's own, smaller limit
#: must be read to be acknowledged and dead-lettered: a refused push is delivered again for ever.
MAX_ENVELOPE_BYTES = 14_000_000

VariantState = Literal["starting", "ready", "scaled_to_zero", "failed"]


#: Replaces a reason.
WITHHELD = "shown with an API key"


class VariantReadiness(BaseModel):
    state: VariantState
    #: The reason if the state is `failed`.
    error: str = ""
    #: Of a replica that was asked: `replica`, `node`, `pid`, and `device` once it is loaded.
    where: dict[str, Any] = {}

    @property
    def can_serve(self) -> bool:
        return self.state in ("ready", "scaled_to_zero")


class Readiness(BaseModel):
    """The body of `GET /ready`."""

    ready: bool
    default_variant: str
    #: The inference defaults, without the prompt.
    defaults: dict[str, Any] = {}
    variants: dict[str, VariantReadiness]
    generators: dict[str, VariantReadiness] = {}
    #: `connected`, `error` and `held` of each subscription.
    messages: dict[str, dict[str, Any]] = {}
    #: Why the last change of the inference defaults was refused; empty if it was not.
    defaults_error: str = ""

    def without_reasons(self) -> "Readiness":
        """For callers without a key: reasons name files and hosts."""

        def plain(states: dict[str, VariantReadiness]) -> dict[str, VariantReadiness]:
            return {
                name: one.model_copy(update={"error": one.error and WITHHELD, "where": {}})
                for name, one in states.items()
            }

        models = {"variants": plain(self.variants), "generators": plain(self.generators)}
        messages = {name: {**one, "error": WITHHELD if one.get("error") else ""} for name, one in self.messages.items()}
        error = self.defaults_error and WITHHELD
        return self.model_copy(update={**models, "messages": messages, "defaults_error": error})


class Health(BaseModel):
    status: Literal["ok", "ready"]


class Outcome(BaseModel):
    #: Of the push's message: an outcome of a job, or an error's code.
    outcome: str


class CanceledJob(BaseModel):
    id: str
    status: State

    @classmethod
    def of(cls, job: Job) -> "CanceledJob":
        return cls(id=job.id, status=job.status)


class CanceledSession(BaseModel):
    #: Jobs that were stopped. Messages that still wait become no job.
    jobs: list[CanceledJob]


class Service(Protocol):
    """The part of the ingress that the routes use."""

    @property
    def access(self) -> Access: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def metrics(self) -> Metrics: ...

    @property
    def audits(self) -> Audits: ...

    async def work(self, delivery: Delivery) -> Verdict: ...

    def readiness(self) -> Readiness: ...

    def models(self) -> Mapping[str, VariantReadiness]:
        """The state of each variant and generator."""

    @property
    def jobs(self) -> JobApi: ...

    @property
    def is_stopping(self) -> bool:
        """Whether an ingress replica is stopping, which may be this one: no request may wait any longer."""

    async def cancel_session(self, user_id: str, session_id: str) -> Sequence[Job]:
        """The jobs that were stopped. Raises StoreUnavailable."""

    async def blob(self, token: str) -> tuple[bytes, BlobInfo]:
        """The blob of a signed link of this app. Raises InvalidLink, BlobNotFound, BlobTooLarge, StoreUnavailable."""


#: Called at each request, because Serve makes the app before the replica.
Services = Callable[[], Service]


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        self.openapi_schema = self.openapi_schema or described(super().openapi())
        return self.openapi_schema


def create_app(service: Services, bodies: Bodies | None = None, streams: Streams | None = None) -> FastAPI:
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
    )
    answer_problems(app)
    app.add_middleware(Gate, check=check)
    bodies = bodies or Bodies()
    routers = (_state_routes(service), _push_routes(service, bodies), _session_routes(service), blob_routes(service))
    for routes in (*routers, job_routes(service, bodies, streams or Streams()), model_routes(service)):
        app.include_router(routes)
    app.include_router(audit_routes(lambda: service().access, lambda: service().audits, bodies))
    return app


def _state_routes(service: Services) -> APIRouter:
    routes = APIRouter()

    async def health() -> Health:
        """The process answers. Says nothing about models or brokers; see /ready."""
        return Health(status="ok")

    for path in ("/health", "/healthz"):
        routes.get(path, operation_id=path[1:])(health)

    @routes.get("/readyz", responses=problems(503))
    async def readyz() -> Health:
        """Whether the app can work, as /ready has it, in a word."""
        if not service().readiness().ready:
            raise Unavailable("not ready; see /ready")
        return Health(status="ready")

    @routes.get("/ready", responses={503: {"model": Readiness}})
    async def ready(response: Response, authorization: Credential = None, x_api_key: Credential = None) -> Readiness:
        """200 when the default variant can serve and an embedded Pub/Sub server listens, else 503; always with each
        variant's and each subscription's state, and for clients with a key the reasons."""
        readiness = service().readiness()
        response.status_code = 200 if readiness.ready else 503
        return readiness if service().access.is_client(authorization, x_api_key) else readiness.without_reasons()

    return routes


def _push_routes(service: Services, bodies: Bodies) -> APIRouter:
    routes = APIRouter()

    @routes.post(
        "/inpaint",
        response_model=Outcome,
        responses=problems(400, 401, 403, 404, 408, 413, 422, 503),
        openapi_extra={"requestBody": json_body("PushEnvelope")},
    )
    async def inpaint(request: Request) -> JSONResponse:
        """A Pub/Sub push, answered when its result is stored. 2xx acknowledges it."""
        if not service().access.takes_pushes:
            raise HTTPException(404, "this app accepts no pushes: push.enabled is false")
        try:
            return _answer(await _work_on_push(request, service(), bodies))
        except FluxFillError as e:
            service().metrics.add("fluxfill_pushes_refused_total", code=e.code)
            log.warning("Refused a push: %s", e.message, extra={"action": "push_refused", "code": e.code})
            raise

    return routes


async def _work_on_push(request: Request, service: Service, bodies: Bodies) -> Verdict:
    # Before the body is read, so that a stranger's push costs only its headers.
    await service.access.check_push(request.headers.get("Authorization"))
    body = await bodies.read(request, MAX_ENVELOPE_BYTES)
    try:
        delivery = _delivery(body)
    except MalformedMessage as e:
        if not service.access.verifies_pushes:
            raise
        # Pub/Sub would send a refused push again for ever; another client reads the answer.
        return await service.work(Delivery(data=body, attributes={}, message_id="", fault=e.message))
    _refuse_early(delivery, service.readiness(), service.limits)
    return await service.work(delivery)


def _delivery(body: bytes) -> Delivery:
    """Raises MalformedMessage."""
    envelope = parse_envelope(body)
    return Delivery(
        data=envelope.payload(),
        attributes=envelope.message.attributes or {},
        message_id=envelope.message.message_id,
        publish_time=envelope.message.publish_time,
    )


def _session_routes(service: Services) -> APIRouter:
    client = caller_with(lambda: service().access, "jobs")
    routes = APIRouter(prefix="/v1", dependencies=[Depends(client)], responses=problems(401, 403, 422, 429, 503))

    @routes.post("/sessions/{userId}/{sessionId}/cancel")
    async def cancel_session(
        user_id: Annotated[Id, Path(alias="userId")], session_id: Annotated[Id, Path(alias="sessionId")]
    ) -> CanceledSession:
        """Cancel a session's jobs and waiting messages. 200 even if there are none."""
        jobs = await service().cancel_session(user_id, session_id)
        return CanceledSession(jobs=[CanceledJob.of(job) for job in jobs])

    return routes


def _refuse_early(delivery: Delivery, readiness: Readiness, limits: Limits) -> None:
    """Raises VariantNotReady for a message whose variant cannot serve yet: pushed again, it finds it ready. The worker
    dead-letters a message that cannot be read or names an unknown variant."""
    try:
        message, _ = parse_edit(delivery.data, max_bytes=limits.message_bytes)
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
    return problem(503, "held_back", f"not done yet: {verdict.reason}", headers=headers)
