"""The demo: the app as `serve run` starts it, a real photo with a leash, an edit by each of two engines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw
from PIL.ImageFilter import GaussianBlur

from serve_app.errors import SettingsError

from ..config import position
from ..own_ray import free_port


def draw_leash(folder: Path) -> tuple[Path, Path]:
    """scikit-image's public-domain cat with a leash and its soft shadow drawn over it, and the leash's mask, as tight
    as a segmenter draws it: only as it grows does the shadow go, too.

    Raises SettingsError where scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as e:
        raise SettingsError("the demo's photo comes with scikit-image: pip install 'flux-fill-serve[demo]'") from e
    photo = Image.fromarray(data.cat())
    photo.paste(
        (0, 0, 0), mask=_line(photo.size, width=7, up=-4).filter(GaussianBlur(2)).point(lambda level: level // 3)
    )
    photo.paste((150, 24, 28), mask=_line(photo.size, width=7).filter(GaussianBlur(0.7)))
    photo.paste((205, 70, 66), mask=_line(photo.size, width=2, up=2))
    mask = _line(photo.size, width=7).point(lambda level: 255 if level >= 128 else 0)
    folder.mkdir(parents=True, exist_ok=True)
    photo.save(folder / "original.jpg", quality=95)
    mask.save(folder / "mask.png")
    return folder / "original.jpg", folder / "mask.png"


def _line(size: tuple[int, int], *, width: int, up: int = 0) -> Image.Image:
    """A slack line from below the cat's chin out of the picture to the right: how much of each pixel it covers."""
    t = np.linspace(0, 1, 60)
    x = size[0] * (0.58 + 0.46 * t)
    y = size[1] * (1.03 - 0.72 * t + 0.16 * np.sin(np.pi * t)) - up
    # Drawn four times as large, because Pillow's lines have jagged edges.
    large = Image.new("L", (4 * size[0], 4 * size[1]), 0)
    points = [(4 * float(a), 4 * float(b)) for a, b in zip(x, y, strict=True)]
    ImageDraw.Draw(large).line(points, fill=255, width=4 * width, joint="curve")
    return large.resize(size, Image.Resampling.BOX)


def before_after(pictures: Mapping[str, Path], to: Path) -> None:
    """The pictures side by side, each under its name."""
    images = {name: Image.open(path).convert("RGB") for name, path in pictures.items()}
    width, height = next(iter(images.values())).size
    gap, label = 12, 26
    sheet = Image.new("RGB", ((width + gap) * len(images) - gap, height + label), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, image) in enumerate(images.items()):
        sheet.paste(image.resize((width, height)), (i * (width + gap), label))
        draw.text((i * (width + gap) + 2, 4), name, fill="black", font_size=16)
    sheet.save(to)


def config_beside(config: Path, folder: Path) -> Path:
    """A copy of the sound file `config` in `folder`, with free ports and stores of its own: a running app is left
    alone."""
    raw: dict[str, Any] = yaml.safe_load(config.read_text())
    port = free_port()
    raw["http_options"] = {**(raw.get("http_options") or {}), "port": port}
    args = raw["applications"][position(raw)]["args"]
    store = folder.absolute() / "store"
    args |= {
        "blobs": f"files:{store}/blobs",
        "jobs": f"sqlite:{store}/jobs.db",
        "public_url": f"http://127.0.0.1:{port}",
    }
    args["messages"] = {**(args.get("messages") or {}), "url": f"embedded://127.0.0.1:{free_port()}"}
    copy = folder / "serve_config.yaml"
    copy.write_text(yaml.safe_dump(raw, sort_keys=False))
    return copy
