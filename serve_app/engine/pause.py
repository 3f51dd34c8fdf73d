"""Sleeps in place of painting: it stands in for a GPU that works while the CPU is free, in load tests."""

import time

from ..models import Pixels, Variant
from ..settings import VariantSettings
from . import Window
from .weightless import Weightless
from .weights.fetch import Weights

_GREY = 127


class Pause(Weightless):
    """An Engine that takes `variant.pause_s` seconds for each window and paints it grey. A deaf one reports no step, so
    that it cannot be stopped either."""

    device = "none: it sleeps"

    def __init__(self, variant: Variant, _weights: Weights | None, _served: VariantSettings) -> None:
        self._pause_s, self._deaf = variant.pause_s, variant.deaf

    def paint(self, window: Window) -> Pixels:
        started_s = time.monotonic()
        for step in range(1, window.steps + 1):
            # To the step's due time, not for a step's length: every sleep lasts a little too long.
            time.sleep(max(0.0, started_s + self._pause_s * step / window.steps - time.monotonic()))
            if not self._deaf:
                window.on_step(step)
        painted = window.pixels.copy()
        painted[window.mask >= 128] = _GREY
        return painted
