"""What a run has in the blob store: its findings, its cells, their pictures."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ..blobs import BlobStore
from ..errors import BlobNotFound, BlobTooLarge
from .record import CellResult, Findings, cell_path, findings_path, folder, image_path

log = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)

#: Findings and cells; the pictures have limits of their own.
_MAX_BYTES = 4_000_000
#: Blobs that are read at once.
_READS = 16


async def read_findings(blobs: BlobStore, run_id: str) -> Findings:
    """Empty where there are none, or damaged ones: stored cells count for more."""
    return await _read(blobs, findings_path(run_id), Findings) or Findings()


async def read_cells(blobs: BlobStore, run_id: str) -> dict[str, CellResult]:
    """Those that are stored, by name. Damaged ones are left out, so that they are painted again."""
    at_once = asyncio.Semaphore(_READS)

    async def read(path: str) -> CellResult | None:
        async with at_once:
            return await _read(blobs, path, CellResult)

    paths = [info.path async for info in blobs.list(f"{folder(run_id)}/cells")]
    return {found.name: found for found in await asyncio.gather(*map(read, paths)) if found is not None}


async def _read(blobs: BlobStore, path: str, model: type[M]) -> M | None:
    try:
        data, _ = await blobs.get(path, max_bytes=_MAX_BYTES)
        return model.model_validate_json(data)
    except BlobNotFound:
        return None
    except (BlobTooLarge, ValidationError) as e:
        log.warning("Left %s out: %s", path, type(e).__name__, extra={"action": "record_unreadable"})
        return None


class RunFiles:
    """For the holder of a run's claim. Each write awaits `confirm`, which raises where the run is another's."""

    def __init__(self, blobs: BlobStore, run_id: str, confirm: Callable[[], Awaitable[None]]) -> None:
        self._blobs, self._run_id, self.confirm = blobs, run_id, confirm

    async def keep_findings(self, findings: Findings) -> None:
        await self._put(findings_path(self._run_id), findings)

    async def keep_cell(self, result: CellResult) -> None:
        await self._put(cell_path(self._run_id, result.name), result)

    async def keep_image(self, name: str, png: bytes) -> str:
        """Its path."""
        await self.confirm()
        path = image_path(self._run_id, name)
        await self._blobs.put(path, png, content_type="image/png")
        return path

    async def _put(self, path: str, value: BaseModel) -> None:
        await self.confirm()
        await self._blobs.put(path, value.model_dump_json(indent=1).encode(), content_type="application/json")
