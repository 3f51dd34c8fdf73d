"""The workbench's page and its files. All else it asks of the same routes as any client."""

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path as FilePath
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, HTTPException, Path, Request, Response

from ..errors import StoreUnavailable
from .problems import problems
from .service import Served

#: The page and what it loads; in `vendor`, which is not in git, the packages of package.json.
WEB = FilePath(__file__).parent.parent / "web"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_FILE: dict[int | str, Any] = {200: {"description": "The file.", "content": {"*/*": {}}}}

router = APIRouter(default_response_class=Response, responses=_FILE | problems(404))


@cache
def _files() -> Mapping[str, FilePath]:
    """By name, as they are at the first request."""
    return {file.name: file for file in WEB.rglob("*") if file.suffix in _TYPES}


@router.get("/", responses={200: {"description": "The page.", "content": {"text/html": {}}}})
async def workbench(request: Request, service: Served) -> Response:
    """A page in which a person edits photos, makes pictures, and looks at jobs and audits."""
    return await workbench_file("index.html", request, service)


@router.get("/web/{file}")
async def workbench_file(
    file: Annotated[str, Path(pattern=r"\A[a-z][a-z0-9.-]{0,63}\z")], request: Request, service: Served
) -> Response:
    """A script or style sheet of the workbench's page."""
    if not service.jobs.settings.api.workbench:
        raise HTTPException(404, "there is no workbench here: api.workbench is false")
    if (found := _files().get(file)) is None:
        raise HTTPException(404, f"the workbench has no file {file}")
    state = request.app.state
    if not getattr(state, "blobs_origin", ""):
        state.blobs_origin = ""
        # Empty while no link can be signed.
        with suppress(StoreUnavailable):
            link = urlsplit(await service.blobs.link("workbench", expires_s=300))
            state.blobs_origin = f"{link.scheme}://{link.netloc}"
    # Nothing inline, and nothing from elsewhere but the blob store's pictures.
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        f"img-src 'self' blob: data: {state.blobs_origin}; connect-src 'self' {state.blobs_origin}; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(found.read_bytes(), media_type=_TYPES[found.suffix], headers=headers)
