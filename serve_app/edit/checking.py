"""Paints an edit, checks it, and paints it again, with the next seed, where the object was put back."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from math import inf

from ..jobs.record import Quality
from ..models import EditRequest, Images
from ..settings import QualitySettings

log = logging.getLogger(__name__)

#: Seeds are below this.
_SEEDS = 2**63


async def paint_checked(
    request: EditRequest,
    paint: Callable[[EditRequest], Awaitable[Images]],
    measure: Callable[[Images], Awaitable[float | None]],
    settings: QualitySettings,
    *,
    left_s: Callable[[], float],
    after_s: float,
) -> tuple[Images, Quality | None]:
    """The painting that puts back the least, and its quality; None where `measure` (`quality.put_back`) cannot tell.

    It is painted again only while `left_s` are enough for as long as the first painting took and the `after_s` that
    follow. A further painting that fails, or takes longer, costs nothing but its time: the one before is kept. Raises
    what the first painting raises.
    """
    began = time.monotonic()
    kept = await paint(request)
    took_s = time.monotonic() - began
    put_back = await measure(kept)
    if put_back is None:
        return kept, None
    best = _checked(put_back, request.seed, 1, settings)
    for tries in range(2, settings.retries + 2):
        if best.verdict == "ok" or took_s + after_s > left_s():
            break
        again = replace(request, seed=(request.seed + tries - 1) % _SEEDS)
        try:
            limit_s = left_s() - after_s
            async with asyncio.timeout(None if limit_s == inf else limit_s):
                painted = await paint(again)
            put_back = await measure(painted)
        except Exception as e:
            extra = {"action": "repainting_failed", "seed": again.seed}
            log.warning("An edit could not be painted again: %s", e, exc_info=e, extra=extra)
            break
        # What can be told of one painting can be told of the next: it hangs on the photo and the mask.
        assert put_back is not None
        found = _checked(put_back, again.seed, tries, settings)
        kept, best = (painted, found) if found.put_back < best.put_back else (kept, best)
        best = best.model_copy(update={"tries": tries})
    return kept, best


def _checked(put_back: float, seed: int, tries: int, settings: QualitySettings) -> Quality:
    verdict = "suspect" if put_back > settings.put_back else "ok"
    found = Quality(put_back=round(put_back, 3), seed=seed, tries=tries, verdict=verdict)
    extra = {"action": "edit_checked", **found.model_dump()}
    log.info("Checked an edit: %.2f of what was there is put back", put_back, extra=extra)
    return found
