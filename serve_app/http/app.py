"""HTTP routes over the ports. Knows no adapter, no engine and no Ray."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..audit.record import PAGE
from ..audit.runs import Audits
from ..blobs import BlobInfo
from ..errors import FluxFillError, MalformedMessage, VariantNotReady
from ..jobs.api import JobApi
from ..jobs.messages import parse_edit, parse_envelope
from ..jobs.ports import Delivery, Verdict
from ..jobs.record import Job, State
from ..parameters import ID_PATTERN, Id
from ..settings import Limits
from ..telemetry import Metrics
from .audits import routes as audit_routes
from .auth import Access
from .pages import check_page
from .problems import Bodies, Gate, answer_problems, problem

log = logging.getLogger(__name__)

#: Pub/Sub's largest message, 10 MB, in base64, with room for the envelope. A message over this app's own, smaller limit
#: must be read to be acknowledged and dead-lettered: a refused push is delivered again for ever.
MAX_ENVELOPE_BYTES = 14_000_000

#: A header that carries a credential.
Credential = Annotated[str | None, Header()]

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

    async def cancel_job(self, job_id: str) -> Job:
        """Raises UnknownJob, IllegalTransition, StoreUnavailable."""

    async def cancel_session(self, user_id: str, session_id: str) -> Sequence[Job]:
        """The jobs that were stopped. Raises StoreUnavailable."""

    async def blob(self, token: str) -> tuple[bytes, BlobInfo]:
        """The blob of a signed link of this app. Raises InvalidLink, BlobNotFound, BlobTooLarge, StoreUnavailable."""


#: Called at each request, because Serve makes the app before the replica.
Services = Callable[[], Service]


def create_app(service: Services, bodies: Bodies | None = None) -> FastAPI:
    def check(request: Request) -> None:
        # In production every route needs a credential that no browser adds by itself, and probes and proxies use many
        # host names.
        if not service().access.is_production:
            check_page(request.method, request.url.path, request.headers)

    app = FastAPI(title="flux-fill-serve", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    answer_problems(app)
    app.add_middleware(Gate, check=check)
    bodies = bodies or Bodies()
    for routes in (_state_routes(service), _push_routes(service, bodies), _job_routes(service), _blob_routes(service)):
        app.include_router(routes)
    app.include_router(audit_routes(lambda: service().access, lambda: service().audits, bodies))
    return app


def _state_routes(service: Services) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """The process answers. Says nothing about models or brokers; see /ready."""
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready(response: Response, authorization: Credential = None, x_api_key: Credential = None) -> Readiness:
        """200 when the default variant can serve and an embedded Pub/Sub server listens, else 503; always with each
        variant's and each subscription's state, and for clients with a key the reasons."""
        readiness = service().readiness()
        response.status_code = 200 if readiness.ready else 503
        return readiness if service().access.is_client(authorization, x_api_key) else readiness.without_reasons()

    return routes


def _push_routes(service: Services, bodies: Bodies) -> APIRouter:
    routes = APIRouter()

    @routes.post("/inpaint")
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


def _job_routes(service: Services) -> APIRouter:
    async def client(authorization: Credential = None, x_api_key: Credential = None) -> None:
        await service().access.client(authorization, x_api_key, scope="jobs")

    routes = APIRouter(prefix="/v1", dependencies=[Depends(client)])

    @routes.post("/jobs/{id}/cancel")
    async def cancel_job(job_id: Annotated[str, Path(alias="id", pattern=ID_PATTERN)]) -> CanceledJob:
        """Cancel a job: a waiting one never starts, a running one stops within a step. 409 if it has ended."""
        return CanceledJob.of(await service().cancel_job(job_id))

    @routes.post("/sessions/{userId}/{sessionId}/cancel")
    async def cancel_session(
        user_id: Annotated[Id, Path(alias="userId")], session_id: Annotated[Id, Path(alias="sessionId")]
    ) -> CanceledSession:
        """Cancel a session's jobs and waiting messages. 200 even if there are none."""
        jobs = await service().cancel_session(user_id, session_id)
        return CanceledSession(jobs=[CanceledJob.of(job) for job in jobs])

    return routes


#: A browser shows a blob, and runs nothing in it.
_BLOB_HEADERS: Mapping[str, str] = {
    "Cache-Control": "private, no-store",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
#: An audit's page runs its own scripts, in an origin of its own, and fetches nothing. Only audits write to its path: a
#: user's blob is never such a page, whatever its content type.
_PAGE_PATH = re.compile(rf"audit/[A-Za-z0-9_-]{{1,64}}/{re.escape(PAGE)}")
_PAGE_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "sandbox allow-scripts allow-popups allow-popups-to-escape-sandbox"
)


def _blob_routes(service: Services) -> APIRouter:
    routes = APIRouter()

    @routes.get("/blobs/{token}", response_class=Response)
    async def blob(token: Annotated[str, Path(pattern=r"\A[A-Za-z0-9_.-]{1,4096}\z")]) -> Response:
        """The blob of one of this app's signed links."""
        data, info = await service().blob(token)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", info.path.rpartition("/")[2])
        headers = {**_BLOB_HEADERS, "Content-Disposition": f'inline; filename="{name}"'}
        if _is_page(info):
            headers["Content-Security-Policy"] = _PAGE_POLICY
        return Response(data, media_type=info.content_type, headers=headers)

    return routes


def _is_page(info: BlobInfo) -> bool:
    return _PAGE_PATH.fullmatch(info.path) is not None and info.content_type.partition(";")[0].strip() == "text/html"


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
