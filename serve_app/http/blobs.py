"""The HTTP route of signed links to blobs that this app serves itself."""

import re
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Path, Response

from ..audit.record import PAGE
from .problems import problems
from .service import Served

#: A browser shows a blob, and runs nothing in it.
HEADERS: Mapping[str, str] = {
    "Cache-Control": "private, no-store",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
#: An audit's page runs its own scripts, in an origin of its own, and fetches nothing. Only audits write to its path: a
#: user's blob is never such a page, whatever its content type.
_PAGE_PATH = re.compile(rf"audit/[A-Za-z0-9_-]{{1,64}}/{re.escape(PAGE)}")
PAGE_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "sandbox allow-scripts allow-popups allow-popups-to-escape-sandbox"
)

router = APIRouter()


@router.get(
    "/blobs/{token}",
    response_class=Response,
    responses={200: {"description": "The blob.", "content": {"*/*": {}}}, **problems(403, 404, 413, 422, 503)},
)
async def blob(token: Annotated[str, Path(pattern=r"\A[A-Za-z0-9_.-]{1,4096}\z")], service: Served) -> Response:
    """The blob of one of this app's signed links."""
    data, info = await service.blob(token)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", info.path.rpartition("/")[2])
    headers = {**HEADERS, "Content-Disposition": f'inline; filename="{name}"'}
    if _PAGE_PATH.fullmatch(info.path) and info.content_type.partition(";")[0].strip() == "text/html":
        headers["Content-Security-Policy"] = PAGE_POLICY
    return Response(data, media_type=info.content_type, headers=headers)
