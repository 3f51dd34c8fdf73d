"""Inpainting by OpenCV: needs no weights, and takes thin things out of photos well enough to look at."""

from collections.abc import Mapping

import cv2
import numpy as np

from ..models import Pixels, Variant
from ..settings import VariantSettings
from . import Window
from .weightless import Weightless
from .weights.fetch import Weights

#: A pixel is filled from known ones this near: 3 pixels up to windows of 512, 6 at 1024. Larger blurs, and takes long.
_MIN_RADIUS_PX, _WINDOW_PER_RADIUS_PX = 3, 170


class Telea(Weightless):
    """An Engine by A. Telea's fast marching method ("An image inpainting technique", J. Graphics Tools 9(1), 2004).

    It knows no steps, prompt, guidance or seed: it reports one step.
    """

    versions: Mapping[str, str] = {"opencv": cv2.__version__}

    def __init__(self, _variant: Variant, _weights: Weights | None, served: VariantSettings) -> None:
        self._threads = served.threads

    def load(self) -> None:
        cv2.setNumThreads(self._threads)

    def paint(self, window: Window) -> Pixels:
        painted = inpaint(window.pixels, window.mask)
        window.on_step(1)
        return painted


def inpaint(pixels: Pixels, mask: Pixels) -> Pixels:
    """The pixels `[h, w, 3]`, filled where the mask `[h, w]` is 128 or more and next to it. Where no known pixel is
    left to go on from, all become their mean colour."""
    radius_px = max(_MIN_RADIUS_PX, max(mask.shape) // _WINDOW_PER_RADIUS_PX)
    taken_out, rim_px = (mask >= 128).astype(np.uint8), radius_px // 2 + 1
    # The soft rim of what is taken out still has its colour, and would bleed into the hole.
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * rim_px + 1, 2 * rim_px + 1))
    hole = np.asarray(cv2.dilate(taken_out, disc), np.uint8)
    if hole.all():
        hole = taken_out
    if hole.all():
        return np.broadcast_to(pixels.mean(axis=(0, 1)).astype(np.uint8), pixels.shape).copy()
    return np.asarray(cv2.inpaint(pixels, hole, radius_px, cv2.INPAINT_TELEA), np.uint8)
