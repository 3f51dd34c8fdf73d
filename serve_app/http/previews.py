"""HTTP routes for those who look: what an edit would paint, a photo as it is edited, and what a job was made of."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ValidationError

from ..clock import utc_now
from ..edit.images import decode_photo, encode_jpeg
from ..edit.planned import PlanBody, PlanView, planned
from ..edit.posted import AT_ONCE, served_variant
from ..edit.session import INPUTS, session_path
from ..errors import Unavailable
from ..settings import Inference, Limits
from .forms import FILE_BODY, PLAN_BODY, read_file, read_job
from .jobs import Shown, Submitter
from .problems import invalid, problems
from .service import Served

T = TypeVar("T")

#: Of the JPEG as which a photo is shown.
_QUALITY = 92


class Input(BaseModel):
    #: `original` or `mask`.
    role: str
    #: Signed anew in each answer, and its end.
    url: str
    expires_at: datetime


class InputList(BaseModel):
    inputs: Sequence[Input]


class Turns:
    """Looks at one picture at a time, because of the memory that it takes; few wait, because each is held meanwhile."""

    def __init__(self) -> None:
        self._held, self._lock = 0, asyncio.Lock()

    async def take(self, look: Callable[[], T]) -> T:
        """What `look` returns, in a thread. Raises Unavailable where too many wait."""
        if self._held >= AT_ONCE:
            raise Unavailable("too many pictures are being looked at; try again", retry_after_s=1)
        self._held += 1
        try:
            async with self._lock:
                return await asyncio.to_thread(look)
        finally:
            self._held -= 1


router = APIRouter(prefix="/v1", responses=problems(401, 403, 422, 429, 503))
_JPEG: dict[int | str, Any] = {
    200: {"description": "The photo, turned upright, in all its pixels.", "content": {"image/jpeg": {}}}
}


@router.post("/jobs/plan", responses=problems(400, 404, 408, 413, 415), openapi_extra={"requestBody": PLAN_BODY})
async def plan_job(request: Request, service: Served, _: Submitter) -> PlanView:
    """What an edit would paint and take. It is asked as the job would be, in a form without the photo; the mask has the
    photo's size."""
    settings, readiness = service.jobs.settings, service.readiness()
    defaults = Inference.model_validate({"variant": readiness.default_variant, **readiness.defaults})
    try:
        body = PlanBody.model_validate({"type": "inpaint", **await read_job(request, service.limits)})
    except ValidationError as e:
        raise invalid(e) from None
    where = service.models()[served_variant(body, settings, defaults)].where
    device = str(where.get("device", ""))
    plan: PlanView = await request.app.state.turns.take(lambda: planned(body, settings, defaults, device))
    return plan


@router.post(
    "/photos",
    response_class=Response,
    responses=_JPEG | problems(400, 408, 413, 415),
    openapi_extra={"requestBody": FILE_BODY},
)
async def show_photo(request: Request, service: Served, _: Submitter) -> Response:
    """A photo as it would be edited, as a JPEG, for browsers that show no HEIC. Nothing is stored."""
    data = await read_file(request, "content", service.limits)
    shown: bytes = await request.app.state.turns.take(lambda: _shown(data, service.limits))
    return Response(shown, media_type="image/jpeg", headers={"Cache-Control": "no-store"})


def _shown(data: bytes, limits: Limits) -> bytes:
    photo = decode_photo(data, limits)
    return encode_jpeg(photo.pixels, quality=_QUALITY, icc=photo.icc, exif=None)


@router.get("/jobs/{id}/inputs", responses=problems(404))
async def list_inputs(job: Shown, service: Served) -> InputList:
    """What an edit is made of, each with a link; nothing for other jobs."""
    lasts_s = service.jobs.settings.api.link_s
    until = utc_now() + timedelta(seconds=lasts_s)
    names = INPUTS if job.type == "inpaint" else {}
    paths = {role: session_path(job.user_id, job.session_id, name) for role, name in names.items()}
    links = await asyncio.gather(*(service.blobs.link(path, expires_s=lasts_s) for path in paths.values()))
    return InputList(
        inputs=[Input(role=role, url=url, expires_at=until) for role, url in zip(paths, links, strict=True)]
    )
