"""What is made of the painted matrix: pictures compared, settings recommended, torch.compile looked at.

Nothing here ends a run: what cannot be had is None, or a verdict that says why.
"""

import asyncio
import io
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..blobs import BlobStore
from ..engine.weights.fetch import tiny_path
from ..engine.weights.lock import Lock
from ..jobs.lease import retry_unavailable
from ..models import TINY, EditRequest, Pixels
from ..settings import Settings
from . import metrics, recommend
from .progress import OUTAGE_S, Record, fault
from .record import CellResult, Compared, CompileVerdict, image_path
from .session import Session

log = logging.getLogger(__name__)

Compiler = Callable[[str, EditRequest], Awaitable[CompileVerdict]]

#: Of a picture that this audit wrote: more than a PNG of the largest photo takes.
_MAX_BYTES = 1_000_000_000


class Verdicts:
    """On the succeeded cells of `results`; those that were compared are replaced there and stored again."""

    def __init__(
        self,
        record: Record,
        session: Session,
        results: dict[str, CellResult],
        *,
        blobs: BlobStore,
        settings: Settings,
        locked: Lock,
    ) -> None:
        self._record, self._session, self._results = record, session, results
        self._blobs, self._settings, self._locked = blobs, settings, locked
        self._run_id, self._request = record.audit.id, record.audit.request

    async def compare(self) -> None:
        """Each picture with the reference variant's at the same other axes, where that one was painted."""
        self._record.stage("comparing the pictures")
        # By the name of the cell that they are compared with: each of those is read once.
        groups = defaultdict(list)
        for result in self._ordered():
            if result.status == "succeeded":
                cell = result.cell.model_copy(update={"variant": self._request.reference_variant})
                groups[self._request.matrix.name(cell)].append(result)
        for name, group in groups.items():
            reference = await self._picture(name) if any(result.name == name for result in group) else None
            for result in group:
                against = None if result.name == name else reference
                compared = await self._compared(result, against)
                if compared != result.compared:
                    self._results[result.name] = result.model_copy(update={"compared": compared})
                    await retry_unavailable(partial(self._record.files.keep_cell, self._results[result.name]), OUTAGE_S)

    def recommend(self) -> None:
        try:
            found = recommend.recommend(self._request, self._ordered(), self._sizes(), self._settings.quality.put_back)
        except Exception as e:
            log.exception("Nothing could be recommended: %s", e, extra={"action": "audit_recommend_failed"})
            found = None
        self._record.change(recommended=found)

    async def compile(self, compiler: Compiler) -> None:
        """After the matrix, so that no timing is touched. Verdicts of an earlier attempt are kept, but for those that
        measured nothing where there is something to measure: what was in the way then may be gone."""
        kept = tuple(verdict for verdict in self._record.audit.compile if _holds(verdict, self._settings))
        self._record.change(compile=kept)
        wanted, choice = self._request.compile_variants, self._record.audit.recommended
        if wanted is None:
            wanted = (choice.variant,) if choice else ()
        for name in wanted:
            if name not in {verdict.variant for verdict in kept}:
                self._record.stage(f"looking at torch.compile for {name}")
                verdict = await self._verdict(compiler, name)
                self._record.change(compile=(*self._record.audit.compile, verdict))

    def _ordered(self) -> list[CellResult]:
        names = map(self._request.matrix.name, self._request.matrix.cells())
        return [self._results[name] for name in names if name in self._results]

    async def _compared(self, result: CellResult, reference: Pixels | None) -> Compared | None:
        picture = await self._picture(result.name)
        if picture is None:
            return None
        photo, mask = self._session.photo.pixels, self._session.cut(result.cell).grown
        compare = partial(
            metrics.compare,
            reference=reference,
            feather_px=self._session.feather_px,
            drawn=self._session.mask,
        )
        try:
            return await asyncio.to_thread(compare, picture, photo, mask)
        except Exception as e:
            extra = {"action": "audit_compare_failed", "cell": result.name}
            log.exception("%s could not be compared: %s", result.name, e, extra=extra)
            return None

    async def _picture(self, name: str) -> Pixels | None:
        path = image_path(self._run_id, name)
        try:
            data, _ = await retry_unavailable(partial(self._blobs.get, path, max_bytes=_MAX_BYTES), OUTAGE_S)
            return await asyncio.to_thread(_decode, data)
        except Exception as e:
            extra = {"action": "audit_picture_unreadable", "cell": name}
            log.exception("The picture of %s cannot be read back: %s", name, e, extra=extra)
            return None

    async def _verdict(self, compiler: Compiler, name: str) -> CompileVerdict:
        cell = next(cell for cell in self._request.matrix.cells() if cell.variant == name)
        try:
            return await compiler(name, self._session.request(f"{self._run_id}/compile", cell))
        except Exception as e:
            extra = {"action": "audit_compile_failed", "variant": name}
            log.exception("torch.compile could not be looked at for %s: %s", name, e, extra=extra)
            return CompileVerdict(variant=name, viable=None, verdict=f"not looked at: {fault(e).message}")

    def _sizes(self) -> dict[str, float]:
        """GB of each variant's weights: of its file where all are known, else what is resident while serving."""
        names = self._request.matrix.variants
        sizes = {name: _file_gb(name, self._settings, self._locked) for name in names}
        of_files = {name: size for name, size in sizes.items() if size is not None}
        resident = {name: gib * 2**30 / 1e9 for name in names if (gib := self._settings.variant(name).memory_gib)}
        return of_files if len(of_files) == len(names) else {**of_files, **resident}


def _file_gb(name: str, settings: Settings, locked: Lock) -> float | None:
    """By the lock file, or of the file on this machine; None where neither knows it."""
    variant = settings.variant(name)
    if variant.file is None:
        return 0.0
    if variant.repo is not None:
        pinned = locked.repos.get(variant.repo)
        known = pinned.files.get(variant.file) if pinned and variant.revision in (None, pinned.revision) else None
        return known.size / 1e9 if known else None
    is_tiny = variant.file.startswith(TINY)
    path = tiny_path(variant, variant.file, settings.weights.cache) if is_tiny else Path(variant.file)
    return path.stat().st_size / 1e9 if path.is_file() else None


def _holds(verdict: CompileVerdict, settings: Settings) -> bool:
    """Whether a resumed run takes it over."""
    is_served = verdict.variant in settings.variants
    has_nothing = is_served and not settings.variant(verdict.variant).edits_by_transformer
    return verdict.eager_s is not None or has_nothing


def _decode(png: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
