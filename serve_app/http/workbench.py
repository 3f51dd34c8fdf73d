"""The workbench's page and its files. All else it asks of the same routes as any client."""

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path as FilePath
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, HTTPException, Path, Request, Response

from ..errors import StoreUnavailable
from .problems import problems
from .service import Served, Service

#: The page and what it loads; in `vendor`, which is not in git, the packages of package.json.
WEB = FilePath(__file__).parent.parent / "web"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE = "index.html"
_HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter()


@cache
def _files() -> Mapping[str, FilePath]:
    """By name, as they are at the first request."""
    return {file.name: file for file in WEB.rglob("*") if file.suffix in _TYPES}


def policy(blobs_origin: str) -> str:
    """The page's Content-Security-Policy: nothing inline, and nothing from elsewhere but the blob store's pictures."""
    return (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data: {blobs_origin}; "
        f"connect-src 'self' {blobs_origin}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


@router.get(
    "/",
    response_class=Response,
    responses={200: {"description": "The page.", "content": {"text/html": {}}}, **problems(404)},
)
async def workbench(request: Request, service: Served) -> Response:
    """A page in which a person edits photos, makes pictures, and looks at jobs and audits."""
    return await _answered(_PAGE, request, service)


@router.get(
    "/web/{file}",
    response_class=Response,
    responses={200: {"description": "The file.", "content": {"*/*": {}}}, **problems(404)},
)
async def workbench_file(
    file: Annotated[str, Path(pattern=r"\A[a-z][a-z0-9.-]{0,63}\z")], request: Request, service: Served
) -> Response:
    """A script or style sheet of the workbench's page."""
    return await _answered(file, request, service)


async def _answered(name: str, request: Request, service: Service) -> Response:
    if not service.jobs.settings.api.workbench:
        raise HTTPException(404, "there is no workbench here: api.workbench is false")
    if (file := _files().get(name)) is None:
        raise HTTPException(404, f"the workbench has no file {name}")
    headers = {**_HEADERS, "Content-Security-Policy": policy(await _blobs_origin(request, service))}
    return Response(file.read_bytes(), media_type=_TYPES[file.suffix], headers=headers)


async def _blobs_origin(request: Request, service: Service) -> str:
    """Of the links to pictures; empty while none can be signed."""
    state = request.app.state
    if not getattr(state, "blobs_origin", ""):
        with suppress(StoreUnavailable):
            link = urlsplit(await service.blobs.link("workbench", expires_s=300))
            state.blobs_origin = f"{link.scheme}://{link.netloc}"
    return str(getattr(state, "blobs_origin", ""))
