"""What is left of a leash and its soft shadow when a perfect painter fills what the mask says, by how far the mask
grows: the photo is blended back over the feather, and what the mask leaves out was never painted.

    python -m benchmarks.ghost
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from skimage import data
from skimage.color import gray2rgb

from serve_app.edit.paste import cut, grow, growth_px, paste
from serve_app.edit.windows import plan
from serve_app.models import Pixels
from serve_app.parameters import CropStrategy
from serve_app.settings import WindowSettings

#: Of which 1% are 10 px.
LONGEST_PX = 1024
PHOTOS: tuple[Callable[[], Pixels], ...] = (
    data.chelsea,
    data.astronaut,
    data.coffee,
    data.rocket,
    lambda: gray2rgb(data.grass()),
)
LEASH_PX, SHADOW = 7, 0.35
_COLOURS = ((200, 30, 40), (25, 25, 30), (240, 240, 60))
#: As a phone writes it.
_JPEG_QUALITY = 90
#: How far from the mask anything of leash and shadow may be.
_NEAR_PX = 30

Floats = npt.NDArray[np.float32]


class Left(NamedTuple):
    #: Of what the leash and its shadow changed, the share that is left after an edit.
    left: float
    #: The 99.5th percentile of that, in grey levels.
    level: float


@dataclass(frozen=True, slots=True)
class Scene:
    photo: Pixels
    #: What the photo would be without the leash.
    clean: Pixels
    #: Tight, as a segmenter draws it: what the leash covers by half or more.
    mask: Pixels

    def left(self, settings: WindowSettings) -> Left:
        grown_px = growth_px(self.mask, settings.mask_grow)
        mask = grow(self.mask, grown_px)
        planned = plan(mask, CropStrategy.AUTO, settings, grown_px=grown_px)
        assert planned is not None, "no scene has an empty mask"
        painted, _ = cut(self.clean, mask, planned, settings.feather_px)
        near = grow(self.mask, _NEAR_PX) > 0
        before, after = (
            cv2.absdiff(picture, self.clean).mean(axis=2)[near]
            for picture in (self.photo, paste(self.photo, painted, mask, planned, settings.feather_px))
        )
        return Left(float(after.sum() / before.sum()), float(np.percentile(after, 99.5)))


def scenes() -> Iterator[Scene]:
    """Three a photo, always the same."""
    random = np.random.default_rng(0)
    for photo in PHOTOS:
        truth = photo()
        factor = LONGEST_PX / max(truth.shape)
        truth = cv2.resize(truth, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        for number, colour in enumerate(_COLOURS):
            leash = _leash(truth.shape[1], truth.shape[0], 2 + 2 * number, 0.25 + 0.5 * random.random())
            shadow = cv2.GaussianBlur(np.roll(leash, (LEASH_PX, 3), (0, 1)), (0, 0), 3) * np.float32(SHADOW)
            shaded = truth * (1 - shadow[..., None])
            drawn = shaded + (np.array(colour, np.float32) - shaded) * leash[..., None]
            mask = np.where(leash > 0.5, np.uint8(255), np.uint8(0))
            yield Scene(_jpeg(drawn.astype(np.uint8)), _jpeg(truth), mask)


def _leash(width: int, height: int, bends: int, middle: float) -> Floats:
    """How much of each pixel it covers, blurred by a lens."""
    t = np.linspace(0, 1, 40)
    x, y = width * (0.15 + 0.7 * t), height * (middle + 0.15 * np.sin(bends * t))
    covered = np.zeros((height, width), np.float32)
    cv2.polylines(covered, [np.stack([x, y], axis=1).astype(np.int32)], False, 1.0, LEASH_PX, cv2.LINE_AA)
    return np.asarray(cv2.GaussianBlur(covered, (0, 0), 1.2), np.float32)


def _jpeg(picture: Pixels) -> Pixels:
    _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)


def medians(settings: WindowSettings, count: int | None = None) -> Left:
    """Over the first `count` scenes."""
    left, level = np.median([scene.left(settings) for scene in islice(scenes(), count)], axis=0)
    return Left(float(left), float(level))


def main() -> None:
    rows = {}
    for mask_grow in (0.0, 0.005, 0.01, 0.02):
        found = medians(WindowSettings(mask_grow=mask_grow))
        print(f"mask_grow {mask_grow:5.3f}: {found.left:6.1%} left, 99.5th percentile {found.level:4.1f} grey levels")
        rows[str(mask_grow)] = {"left": round(found.left, 4), "level": round(found.level, 2)}
    print(json.dumps({"scenes": 3 * len(PHOTOS), "shadow": SHADOW, "by_mask_grow": rows}))


if __name__ == "__main__":
    main()
