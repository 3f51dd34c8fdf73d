"""What is edited, and with which optimizations: rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from serve_app.models import Family, Pixels, Repacking
from serve_app.parameters import CropStrategy
from serve_app.settings import FirstBlockCache, Optimizations

#: None.
EXACT = Optimizations()
COMPILED = Optimizations(compile=True)
#: Unpacking is exact, too. On a GPU compiled blocks unpack as they go, and 24 GB hold no unpacked FLUX.1.
ALL = Optimizations(compile=True, unpack=True)
CACHED = Optimizations(compile=True, step_cache=FirstBlockCache())

#: From (width, height) in pixels.
Mask = Callable[[int, int], Pixels]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    name: str
    #: Of the photo, in pixels.
    width: int = 1024
    height: int = 1024
    mask: Mask
    strategy: CropStrategy = CropStrategy.AUTO
    optimizations: Optimizations = ALL
    #: Without them the modulation and both VAE encodings are computed as diffusers does.
    adaln_once: bool = True
    one_encode: bool = True
    repack: Repacking | None = None
    #: Of the service's engine; the recipe is FLUX.1-Fill's.
    family: Family = "flux-fill"

    def photo(self) -> Pixels:
        """Noise: what an edit costs depends on no pixel."""
        return np.random.default_rng(0).integers(0, 256, (self.height, self.width, 3), np.uint8)

    def painted(self) -> Pixels:
        return self.mask(self.width, self.height)


def _line(width: int, height: int, start: tuple[float, float], end: tuple[float, float]) -> Pixels:
    """From and to fractions of the photo, 1% of its longest side thick."""
    mask = np.zeros((height, width), np.uint8)
    first, last = ((round(x * (width - 1)), round(y * (height - 1))) for x, y in (start, end))
    cv2.line(mask, first, last, 255, max(1, max(width, height) // 100))
    return mask


def thin_vertical(width: int, height: int) -> Pixels:
    """A leash 36% of the photo long: of a 1024 x 1024 one, a 512 x 512 window shows it with its context."""
    return _line(width, height, (0.5, 0.32), (0.5, 0.66))


def thin_diagonal(width: int, height: int) -> Pixels:
    """A leash from corner to corner."""
    return _line(width, height, (0, 0), (1, 1))


def leash(width: int, height: int) -> Pixels:
    """From a hand to a collar, across a third of the photo."""
    return _line(width, height, (0.35, 0.35), (0.55, 0.8))


def blob(width: int, height: int) -> Pixels:
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, (width // 2, height // 2), (width // 6, height // 5), 0, 0, 360, 255, cv2.FILLED)
    return mask


def _whole(name: str, side: int, **how: Any) -> Scenario:
    """The whole frame in one window: what the optimizations give without the windows."""
    return Scenario(
        name=f"{name}_{side}",
        width=side,
        height=side,
        mask=thin_vertical,
        strategy=CropStrategy.RESIZE,
        **how,
    )


_ROWS = (
    Scenario(name="thin_vertical", mask=thin_vertical),
    Scenario(name="thin_diagonal", mask=thin_diagonal),
    Scenario(name="klein_thin_vertical", mask=thin_vertical, family="flux2-klein"),
    Scenario(name="blob", mask=blob),
    Scenario(name="phone_leash", width=4000, height=3000, mask=leash),
    Scenario(name="thin_vertical_exact", mask=thin_vertical, optimizations=EXACT),
    Scenario(name="thin_vertical_cached", mask=thin_vertical, optimizations=CACHED),
    Scenario(name="thin_vertical_w8a8", mask=thin_vertical, optimizations=COMPILED, repack="w8a8"),
    _whole("klein_exact", 512, optimizations=EXACT, family="flux2-klein"),
    *(
        row
        for side in (1024, 512)
        for row in (
            _whole("eager", side, optimizations=EXACT, adaln_once=False, one_encode=False),
            _whole("exact", side, optimizations=EXACT),
            _whole("compiled", side, optimizations=COMPILED),
            _whole("cached", side, optimizations=CACHED),
            _whole("w8a8", side, optimizations=COMPILED, repack="w8a8"),
        )
    ),
)
SCENARIOS: Mapping[str, Scenario] = {row.name: row for row in _ROWS}
#: What a CPU gets through in minutes.
FOR_CPU = ("thin_vertical", "thin_diagonal", "klein_thin_vertical")
