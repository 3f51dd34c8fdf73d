"""Draws where the windows lie for some masks, and what they cost: the whole frame, its longest side 1024, costs 1.

python -m benchmarks.windows docs/images/windows.jpg
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from skimage import data

from serve_app.edit.cost import forward_flops
from serve_app.edit.paste import grow, growth_px
from serve_app.edit.windows import plan
from serve_app.models import Pixels
from serve_app.parameters import CropStrategy
from serve_app.settings import WindowSettings

#: Of each drawing, in pixels: all scenes are of 4:3.
_SIZE = (640, 480)
_CAPTION_PX = 36
_MASK = (255, 0, 255)
_COLOURS = ((0, 255, 255), (0, 255, 0), (255, 255, 0), (0, 128, 255))


@dataclass(frozen=True)
class Scene:
    what: str
    #: Of the photo, in pixels.
    width: int
    height: int
    #: Corners of the leash, in fractions of the photo.
    leash: list[tuple[float, float]]
    #: Radius of a ball where the leash begins, in fractions of the height.
    ball: float = 0.0

    def mask(self) -> Pixels:
        mask = np.zeros((self.height, self.width), np.uint8)
        corners = (np.array(self.leash) * [self.width - 1, self.height - 1]).astype(np.int32)
        cv2.polylines(mask, [corners], False, 255, self.height // 70)
        cv2.circle(mask, corners[0].tolist(), int(self.ball * self.height), 255, cv2.FILLED)
        return mask


_WAVE = [(x, 0.5 + 0.35 * float(np.sin(5 * x))) for x in np.linspace(0, 1, 60)]
SCENES = (
    Scene("768x1024, diagonal", 1024, 768, [(0, 0), (1, 1)]),
    Scene("768x1024, upright", 1024, 768, [(0.5, 0.3), (0.53, 0.75)]),
    Scene("768x1024, wave", 1024, 768, _WAVE),
    Scene("12 megapixels, diagonal", 4032, 3024, [(0, 0), (1, 1)]),
    Scene("12 megapixels, short", 4032, 3024, [(0.45, 0.5), (0.53, 0.62)]),
    Scene("12 megapixels, with a ball", 4032, 3024, [(0.45, 0.6), (0.95, 0.05)], ball=0.11),
)


def draw(scene: Scene) -> Pixels:
    """BGR, with a caption below."""
    drawn, settings = scene.mask(), WindowSettings()
    grown_px = growth_px(drawn, settings.mask_grow)
    mask = grow(drawn, grown_px)
    planned = plan(mask, CropStrategy.AUTO, settings, grown_px=grown_px)
    assert planned is not None, "no scene has an empty mask"
    picture = cv2.resize(cv2.cvtColor(data.chelsea(), cv2.COLOR_RGB2BGR), _SIZE, interpolation=cv2.INTER_AREA)
    picture[cv2.resize(mask, _SIZE, interpolation=cv2.INTER_AREA) > 60] = _MASK
    region, scale = planned.region, planned.content_size[0] / planned.region.width
    shown = _SIZE[0] / scene.width
    for number, box in enumerate(planned.windows):
        x0, x1 = (round((region.x0 + x / scale) * shown) for x in (box.x0, box.x1))
        y0, y1 = (round((region.y0 + y / scale) * shown) for y in (box.y0, box.y1))
        # Neighbours' edges beside each other, not over.
        corners = (x0 + 3 * number, y0 + 3 * number), (x1 - 2 - 3 * number, y1 - 2 - 3 * number)
        cv2.rectangle(picture, *corners, _COLOURS[number % len(_COLOURS)], 2)
    cost = sum(forward_flops(box.width, box.height) for box in planned.windows) / forward_flops(1024, 768)
    caption = np.full((_CAPTION_PX, _SIZE[0], 3), 255, np.uint8)
    text = f"{scene.what}: scale {scale:.2f}, cost {cost:.2f}"
    cv2.putText(caption, text, (8, 25), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    print(text, [(box.width, box.height) for box in planned.windows])
    return np.vstack([picture, caption])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    drawn = [draw(scene) for scene in SCENES]
    sheet = np.vstack([np.hstack(drawn[:3]), np.hstack(drawn[3:])])
    cv2.imwrite(str(args.out), sheet, [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    main()
