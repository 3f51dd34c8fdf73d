"""What the routes use of the process that serves them, and how a route gets it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel

from ..audit.runs import Audits
from ..blobs import BlobInfo, BlobStore
from ..generate.loras import Loras
from ..jobs.api import JobApi
from ..jobs.kinds import Caller
from ..jobs.ports import Delivery, Verdict
from ..settings import Limits
from ..telemetry import Metrics
from .auth import Access, Scope

VariantState = Literal["starting", "ready", "scaled_to_zero", "failed"]

#: Replaces a reason.
WITHHELD = "shown with an API key"


class VariantReadiness(BaseModel):
    state: VariantState
    #: The reason if the state is `failed`, or if a replica waits for long to start.
    error: str = ""
    #: Of a replica that was asked: `replica`, `node`, `pid`, and `device` once it is loaded.
    where: dict[str, Any] = {}

    @property
    def can_serve(self) -> bool:
        return self.state in ("ready", "scaled_to_zero")

    def without_reasons(self) -> "VariantReadiness":
        return VariantReadiness(state=self.state, error=self.error and WITHHELD)


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
        changes = {
            "variants": {name: one.without_reasons() for name, one in self.variants.items()},
            "generators": {name: one.without_reasons() for name, one in self.generators.items()},
            "messages": {n: {**one, "error": WITHHELD if one.get("error") else ""} for n, one in self.messages.items()},
            "defaults_error": self.defaults_error and WITHHELD,
        }
        return self.model_copy(update=changes)


class Service(Protocol):
    """The part of the ingress that the routes use."""

    access: Access
    limits: Limits
    blobs: BlobStore
    metrics: Metrics
    audits: Audits
    jobs: JobApi
    loras: Loras
    #: Whether an ingress replica is stopping, which may be this one: no request may wait any longer.
    is_stopping: bool

    async def work(self, delivery: Delivery) -> Verdict: ...

    def readiness(self) -> Readiness: ...

    def models(self) -> Mapping[str, VariantReadiness]:
        """The state of each variant and generator."""

    async def blob(self, token: str) -> tuple[bytes, BlobInfo]:
        """The blob of a signed link of this app. Raises InvalidLink, BlobNotFound, BlobTooLarge, StoreUnavailable."""

    def upload_of(self, token: str) -> tuple[str, int]:
        """The path and the size that a signed link of this app is for. Raises InvalidLink, StoreUnavailable."""


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service()
    return service


#: A parameter of a route. It is asked for at each request, because Serve makes the app before the replica.
Served = Annotated[Service, Depends(_service)]


_BEARER = Depends(HTTPBearer(auto_error=False, scheme_name="bearer"))
_KEY = Depends(APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="key"))


async def _credentials(request: Request, _: Any = _BEARER, __: Any = _KEY) -> tuple[str | None, str | None]:
    # As they were sent: the schemes, which are there for the description, drop malformed ones.
    headers = request.headers
    return headers.get("Authorization"), headers.get("X-API-Key", headers.get("X-Key"))


#: A parameter of a route: the values of `Authorization`, and of `X-API-Key` or `X-Key`, as some clients call it.
Credentials = Annotated[tuple[str | None, str | None], Depends(_credentials)]


def caller_with(scope: Scope) -> Any:
    """A route's dependency: who calls it, with a key of this scope."""

    async def caller(service: Served, credentials: Credentials) -> Caller:
        return await service.access.client(*credentials, scope=scope)

    return Depends(caller)
