"""How often the four measures of `serve_app.edit.quality` find a bad removal, and how often they accuse a good one.

Each scene is one of scikit-image's public-domain photos with a leash drawn across it: soft edges, a soft shadow beside
it, JPEG at quality 90. The mask is the leash and 4 px round it. A perfect painter fills it with the truth, or with the
photo's own surroundings moved in from beside; eight bad ones fail in a way of their own. Every fill is pasted as the
service pastes.

    python -m benchmarks.quality            # a table; the last line is one JSON object
    python -m benchmarks.quality --out benchmarks/results/quality.json

Of the photos, astronaut (NASA) and rocket (SpaceX) are in the public domain; camera, chelsea, coffee, brick, grass and
gravel are CC0, by scikit-image's own documentation. All come with its wheel. It knows no model: failures that are drawn
are no failures that were painted.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt
import skimage.data
import typer
from rich.console import Console
from rich.table import Table

from serve_app.edit import quality
from serve_app.edit.paste import grow, soft_mask
from serve_app.models import Pixels

from .context import machine

Floats = npt.NDArray[np.float64]

PHOTOS = ("astronaut", "camera", "chelsea", "coffee", "brick", "grass", "gravel", "rocket")
#: Width in pixels, colour, and the colour of the leash that a bad painter puts in its place.
LEASHES = (
    (6, (200, 30, 40), (250, 250, 250)),
    (9, (25, 25, 30), (160, 110, 60)),
    (12, (240, 240, 60), (10, 10, 10)),
    (16, (60, 90, 200), (220, 40, 40)),
)
FEATHER_PX = 8
MEASURES: Mapping[str, tuple[Callable[[quality.Edit], float | None], float]] = {
    "put_back": (quality.put_back, quality.PUT_BACK),
    "contrast": (quality.contrast, quality.CONTRAST),
    "busy": (quality.busy, quality.BUSY),
    "cast": (quality.cast, quality.CAST),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    #: Before the leash, `[height, width, 3]`, 0..255; with it; and its mask, 0 or 255.
    truth: Floats
    photo: Pixels
    mask: Pixels
    #: Opacity of the leash, and of a thinner one a little beside it, `[height, width, 1]`.
    leash: Floats
    other_leash: Floats
    colour: tuple[int, int, int]
    other_colour: tuple[int, int, int]
    width_px: int
    #: Another photo of this size.
    elsewhere: Floats


def scenes() -> Iterator[Scene]:
    rng = np.random.default_rng(0)
    photos = {name: _photo(name) for name in PHOTOS}
    for number, truth in enumerate(photos.values()):
        height, width = truth.shape[:2]
        elsewhere = photos[PHOTOS[(number + 1) % len(PHOTOS)]]
        elsewhere = cv2.resize(np.roll(elsewhere, 17, 0), (width, height)).astype(np.float64)
        for turn, (width_px, colour, other_colour) in enumerate(LEASHES):
            across = np.linspace(0.1 * width, 0.9 * width, 40)
            middle = height * (0.2 + 0.6 * rng.random())
            down = middle + 0.18 * height * np.sin(np.linspace(0, 1.5 + 1.5 * turn, 40) + turn)
            line = np.stack([across, np.clip(down, 20, height - 20)], 1).astype(np.int32)
            drawn = _line(line, width_px, truth.shape[:2])
            leash, shadow = _soft(drawn, 1.2), _soft(_line(line + 3, width_px, truth.shape[:2]), 3)
            photo = truth * (1 - 0.35 * shadow)
            photo = photo * (1 - leash) + np.array(colour) * leash
            yield Scene(
                truth=truth,
                photo=_jpeg(photo),
                mask=grow(((drawn > 0.5) * 255).astype(np.uint8), 4),
                leash=leash,
                other_leash=_soft(_line(line + 2, max(width_px // 2, 3), truth.shape[:2]), 1),
                colour=colour,
                other_colour=other_colour,
                width_px=width_px,
                elsewhere=elsewhere,
            )


def fills(scene: Scene) -> Mapping[str, Floats]:
    """What painters make of the scene, by what they are."""
    truth, leash = scene.truth, scene.leash
    smear = cv2.inpaint(scene.photo, scene.mask, 5, cv2.INPAINT_TELEA).astype(np.float64)
    moved = np.roll(truth, 3 * scene.width_px, 0)
    noise = np.random.default_rng(1).normal(0, 25, truth.shape)
    return {
        "good: the truth": truth,
        "good: moved background": moved + cv2.GaussianBlur(smear - moved, (0, 0), 8),
        "put back": truth * (1 - 0.9 * leash) + np.array(scene.colour) * 0.9 * leash,
        "faint (35%)": truth * (1 - 0.35 * leash) + np.array(scene.colour) * 0.35 * leash,
        "other colour": truth * (1 - scene.other_leash) + np.array(scene.other_colour) * scene.other_leash,
        "other object": scene.elsewhere,
        "cast": truth * (1.12, 1.0, 0.9) + (10, 6, -4),
        "blur": cv2.GaussianBlur(smear, (0, 0), 5),
        "smear": smear,
        "noise": smear + noise,
    }


def measured(scene: Scene, fill: Floats) -> tuple[dict[str, float | None], float]:
    """Each measure, and the milliseconds of `put_back`, with which the service checks every edit."""
    opacity = soft_mask(scene.mask, FEATHER_PX)[..., None]
    result = np.clip(scene.photo * (1 - opacity) + fill * opacity, 0, 255).astype(np.uint8)
    edit = quality.cut(scene.photo, result, scene.mask)
    assert edit is not None
    began = time.perf_counter()
    put_back = quality.put_back(edit)
    took_ms = (time.perf_counter() - began) * 1000
    return {name: put_back if name == "put_back" else measure(edit) for name, (measure, _) in MEASURES.items()}, took_ms


def figures() -> dict[str, Any]:
    found: dict[str, list[dict[str, float | None]]] = {}
    times_ms = []
    for scene in scenes():
        for name, fill in fills(scene).items():
            row, took_ms = measured(scene, fill)
            found.setdefault(name, []).append(row)
            times_ms.append(took_ms)
    good = [row for name, rows in found.items() if name.startswith("good") for row in rows]
    return {
        **machine(["opencv-python-headless", "scikit-image"]),
        "scenes": len(found["put back"]),
        "put_back_ms": round(float(np.median(times_ms)), 1),
        "thresholds": {name: limit for name, (_, limit) in MEASURES.items()},
        "good_95th": {
            name: round(float(np.percentile([row[name] or 0.0 for row in good], 95)), 2) for name in MEASURES
        },
        "rows": {name: _summary(rows) for name, rows in found.items()},
    }


def main(out: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None) -> None:
    """How often each measure finds a bad removal, and how often it accuses a good one."""
    found = figures()
    table = Table("fill", *MEASURES, "any", title=f"Share of {found['scenes']} scenes above the threshold (median)")
    for name, row in found["rows"].items():
        shares = (f"{row[one]['share']:.0%} ({row[one]['median']:.2f})" for one in MEASURES)
        table.add_row(name, *shares, f"{row['any']:.0%}")
    Console(width=120).print(table)
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def _summary(rows: list[dict[str, float | None]]) -> dict[str, Any]:
    above = {
        name: [(row[name] is not None and (row[name] or 0) > limit) for row in rows]
        for name, (_, limit) in MEASURES.items()
    }
    return {
        **{
            name: {
                "share": round(float(np.mean(flags)), 3),
                "median": round(float(np.median([row[name] or 0.0 for row in rows])), 3),
            }
            for name, flags in above.items()
        },
        "any": round(float(np.mean(np.any(list(above.values()), axis=0))), 3),
    }


def _photo(name: str) -> Floats:
    pixels = getattr(skimage.data, name)()
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return np.asarray(pixels[:400, :600], np.float64)


def _line(points: npt.NDArray[np.int32], width_px: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.asarray(cv2.polylines(np.zeros(shape, np.float32), [points], False, 1.0, width_px, cv2.LINE_AA))


def _soft(drawn: npt.NDArray[np.float32], sigma: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(drawn, (0, 0), sigma)[..., None], np.float64)


def _jpeg(pixels: Floats) -> Pixels:
    _, data = cv2.imencode(".jpg", np.clip(pixels, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


if __name__ == "__main__":
    typer.run(main)
