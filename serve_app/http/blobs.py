"""The HTTP routes of signed links to blobs that this app serves itself."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

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

#: An edit's path ends in .jpg even if its format is another.
_SUFFIXES = {"image/png": ".png", "image/webp": ".webp"}

_Token = Annotated[str, Path(pattern=r"\A[A-Za-z0-9_.-]{1,4096}\z")]
_FILE: Any = {"required": True, "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}

router = APIRouter()


@router.get(
    "/blobs/{token}",
    response_class=Response,
    responses={200: {"description": "The blob.", "content": {"*/*": {}}}, **problems(403, 404, 413, 422, 503)},
)
async def blob(token: _Token, service: Served) -> Response:
    """The blob of one of this app's signed links."""
    data, info = await service.blob(token)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", info.path.rpartition("/")[2])
    name = re.sub(r"\.jpg$", _SUFFIXES.get(info.content_type, ".jpg"), name)
    headers = {**HEADERS, "Content-Disposition": f'inline; filename="{name}"'}
    if _PAGE_PATH.fullmatch(info.path) and info.content_type.partition(";")[0].strip() == "text/html":
        headers["Content-Security-Policy"] = PAGE_POLICY
    return Response(data, media_type=info.content_type, headers=headers)


@router.put(
    "/blobs/{token}",
    status_code=204,
    responses=problems(400, 403, 408, 422, 503),
    openapi_extra={"requestBody": _FILE},
)
async def upload_blob(token: _Token, request: Request, service: Served) -> None:
    """Store the body as the blob of one of this app's signed links for uploads. It has as many bytes as the link was
    made for; nothing is stored of any other."""
    path, size = service.upload_of(token)
    with tempfile.TemporaryDirectory(prefix="upload-") as folder:
        file = FilePath(folder) / "body"
        await request.app.state.bodies.save(request, file, size, is_stopping=lambda: service.is_stopping)
        await service.blobs.upload(path, file)
