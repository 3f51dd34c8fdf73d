"""HTTP routes of audits. Knows no store, no launcher and no Ray."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from ..audit.options import OPTIONS
from ..audit.record import Audit, AuditFault, AuditStatus, CellProgress, MemoryReading, Recommendation
from ..audit.runs import Audits
from ..parameters import RUN_ID_PATTERN, Id, RunId
from .problems import invalid, json_body, problem, problems, wrong
from .service import Served, caller_with

MAX_BODY_BYTES = 64_000
#: A `Prefer` header that is longer is not read: looking for what it quotes takes time by its square.
_PREFER_CHARS = 1_000
_OPTIONS = {option.field for option in OPTIONS if option.over_http}


class AuditBody(BaseModel):
    """The body of `POST /audit`. What else is given are options; what is not is as `settings.audit` says."""

    model_config = ConfigDict(frozen=True, extra="allow")

    user_id: Id
    session_id: Id
    #: None: one is made.
    run_id: RunId | None = None
    #: Paint what run `run_id` lacks. It takes no option, because the run has them.
    resume: Annotated[bool, Field(strict=True)] = False

    def given(self) -> dict[str, Any]:
        """The options, where they say anything. Raises RequestValidationError for what is none."""
        given = self.model_extra or {}
        if unknown := next((name for name in given if name not in _OPTIONS), None):
            raise wrong(unknown, "Extra inputs are not permitted")
        return {name: value for name, value in given.items() if value is not None}


class _OfAudit(BaseModel):
    """Fields of an Audit."""

    model_config = ConfigDict(from_attributes=True)

    run_id: str = Field(validation_alias="id")
    status: AuditStatus


class AuditReport(_OfAudit):
    """What a run came to."""

    #: A signed link to the page, good for the run's `link_hours`, and its path in the blob store; None where there is
    #: no report.
    report_url: str | None = None
    report_path: str | None = None
    #: None before the first cell was painted.
    gpu: str | None
    sm: str | None
    #: None where torch.compile was not looked at.
    compile_viable: bool | None
    #: Cells that succeeded.
    result_count: int


class AuditLine(_OfAudit):
    """A run in the list of all."""

    stage: str
    attempt: int
    user_id: str
    session_id: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    counts: Mapping[str, int]
    error: AuditFault | None


class AuditView(AuditLine, AuditReport):
    """A run with its cells."""

    cells: Mapping[str, CellProgress]
    memory: Sequence[MemoryReading]
    recommended: Recommendation | None


R = TypeVar("R", bound=AuditReport)


async def _with_report(model: type[R], audit: Audit, audits: Audits) -> R:
    report = await audits.report(audit)
    return model.model_validate(audit).model_copy(
        update={"report_url": report and report.url, "report_path": report and report.path}
    )


_Run = Annotated[str, Path(pattern=RUN_ID_PATTERN)]


router = APIRouter(dependencies=[caller_with("audit")], responses=problems(401, 403, 422, 429, 503))


@router.post(
    "/audit",
    response_model=AuditReport,
    responses={202: {"model": AuditView}, **problems(404, 408, 409, 413, 500)},
    openapi_extra={"requestBody": json_body("AuditBody")},
)
async def start_audit(request: Request, service: Served) -> Response:
    """Start an audit, and answer when it is over; with `Prefer: respond-async` at once."""
    audits = service.audits
    started = await _start(request, audits)
    if _prefers_async(request.headers.getlist("Prefer")):
        return await _accepted(request, started, audits, {"Preference-Applied": "respond-async"})
    ended = await audits.wait(started.id)
    if not ended.status.is_over:
        # This process is about to end, and the job goes on.
        return await _accepted(request, ended, audits, {})
    if ended.status == AuditStatus.FAILED:
        # Whatever ended the run: nothing is wrong with the request any more, and there is no report.
        fault = ended.error or AuditFault(code="internal_error", message="nobody said why it failed")
        return problem(500, fault.code, fault.message, run_id=ended.id)
    return JSONResponse((await _with_report(AuditReport, ended, audits)).model_dump(mode="json"))


@router.get("/audits")
async def list_audits(service: Served, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Sequence[AuditLine]:
    """Runs, newest first."""
    return [AuditLine.model_validate(one) for one in await service.audits.list(limit)]


@router.get("/audits/{run_id}", responses=problems(404))
async def get_audit(run_id: _Run, service: Served) -> AuditView:
    """A run, with the progress of each cell."""
    return await _with_report(AuditView, await service.audits.look(run_id), service.audits)


@router.post("/audits/{run_id}/cancel", responses=problems(404, 409))
async def cancel_audit(run_id: _Run, service: Served) -> AuditView:
    """Stop a run: a waiting one never begins, a running one stops within a step. 409 where it is over."""
    return await _with_report(AuditView, await service.audits.cancel(run_id), service.audits)


async def _start(request: Request, audits: Audits) -> Audit:
    if not audits.settings.audit.enabled:
        raise HTTPException(404, "this app starts no audits: audit.enabled is false")
    data = await request.app.state.bodies.read(request, MAX_BODY_BYTES)
    try:
        body = AuditBody.model_validate_json(data)
        given = body.given()
        if not body.resume:
            whose = {"user_id": body.user_id, "session_id": body.session_id}
            return await audits.start(audits.settings.audit.request(whose | given), body.run_id)
    except ValidationError as e:
        raise invalid(e, but="matrix") from None
    if body.run_id is None:
        raise wrong("run_id", "a resume names its run")
    if given:
        raise wrong(min(given), "a resume goes by what its run was asked for")
    return await audits.resume(body.run_id, body.user_id, body.session_id)


async def _accepted(request: Request, audit: Audit, audits: Audits, headers: Mapping[str, str]) -> Response:
    """202, and where to look."""
    view = await _with_report(AuditView, audit, audits)
    place = f"{request.scope.get('root_path', '')}/audits/{audit.id}"
    return JSONResponse(view.model_dump(mode="json"), status_code=202, headers={**headers, "Location": place})


_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')


def _prefers_async(headers: Sequence[str]) -> bool:
    """Whether `respond-async` is among the preferences (RFC 7240, section 2)."""
    header = ",".join(headers)
    if len(header) > _PREFER_CHARS:
        return False
    preferences = _QUOTED.sub("", header).split(",")
    return any(re.split("[;=]", one)[0].strip().lower() == "respond-async" for one in preferences)
