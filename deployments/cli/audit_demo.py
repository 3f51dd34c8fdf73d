"""`make audit`: the whole matrix on the tiny variants, by a real Ray job against the app as `serve run` starts it."""

import asyncio
import uuid
from collections.abc import Sequence
from pathlib import Path

import httpx
from PIL import Image
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_fixed

from serve_app import adapters
from serve_app.audit.record import Audit, AuditStatus
from serve_app.edit import images, masks, paste, windows
from serve_app.edit.session import INPUTS, session_path
from serve_app.errors import FluxFillError, Unavailable
from serve_app.parameters import CropStrategy
from serve_app.settings import Settings

from .audit_client import AuditClient
from .audit_screen import Follower
from .demo import draw_leash

VARIANTS = ("tiny-klein", "tiny-Q4_0", "tiny-Q5_K_S", "tiny-Q8_0")
USER = "demo"
#: Of the demo's photo: the cat's chin, the leash, and what is round them. Left, top, right, bottom in pixels: one
#: window of the smallest size shows all of it.
PART = (195, 44, 451, 300)


def sample(folder: Path) -> tuple[Path, Path]:
    """Photo and mask, both 256 x 256, in `folder`. Raises SettingsError where scikit-image is not installed."""
    files = draw_leash(folder)
    for path in files:
        Image.open(path).crop(PART).save(path, quality=95)
    return files


def window_sizes(files: tuple[Path, Path], settings: Settings) -> list[tuple[int, int]]:
    """What an edit of these would paint: width and height of each window, in pixels."""
    original, mask = (path.read_bytes() for path in files)
    drawn = masks.decode_mask(mask, settings.limits, images.decode_photo(original, settings.limits).size)
    grown_px = paste.growth_px(drawn, settings.windows.mask_grow)
    plan = windows.plan(paste.grow(drawn, grown_px), CropStrategy.AUTO, settings.windows, grown_px=grown_px)
    return [(box.width, box.height) for box in plan.windows] if plan else []


async def audited(settings: Settings, url: str, files: tuple[Path, Path], follower: Follower) -> Audit:
    """Upload the session, ask the running app at `url` for an audit of it, follow it to its end."""
    session = f"cat-{uuid.uuid4().hex[:8]}"
    blobs = adapters.blob_store(settings.blobs)
    for name, path in zip((INPUTS["original"], INPUTS["mask"]), files, strict=True):
        content_type = "image/png" if path.suffix == ".png" else "image/jpeg"
        await blobs.put(session_path(USER, session, name), path.read_bytes(), content_type=content_type)
    client = AuditClient(settings)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as app:
        run_id = await _asked(app, session)

        async def look(run_id: str) -> Audit:
            # The app, which can see the job, ends a run whose job has died.
            (await app.get(f"/audits/{run_id}")).raise_for_status()
            return await client.store.get(run_id)

        return await client.follow(run_id, follower.show, look)


@retry(retry=retry_if_exception_type(Unavailable), stop=stop_after_attempt(5), wait=wait_fixed(2), reraise=True)
async def _asked(app: httpx.AsyncClient, session: str) -> str:
    """The run's id. Raises FluxFillError with the app's own words, at once where trying again is of no use: Ray's job
    server may come up later than the app."""
    body = {"user_id": USER, "session_id": session, "variants": VARIANTS}
    answer = await app.post("/audit", json=body, headers={"Prefer": "respond-async"})
    if answer.status_code != httpx.codes.ACCEPTED:
        refused = Unavailable if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else FluxFillError
        raise refused(f"POST /audit answered {answer.status_code}: {answer.text}")
    return str(answer.json()["run_id"])


def brought(settings: Settings, audit: Audit, folder: Path) -> Sequence[Path]:
    """The report's files and the pictures, in `folder`. Raises FluxFillError for a run that did not succeed."""
    if audit.status != AuditStatus.SUCCEEDED:
        why = audit.error.message if audit.error else f"{audit.result_count} of {len(audit.cells)} cells succeeded"
        raise FluxFillError(f"{audit.id} is {audit.status}: {why}; see {folder / 'serve.log'}")
    return asyncio.run(AuditClient(settings).fetch(audit.id, folder))
