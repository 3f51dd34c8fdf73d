"""The demo: the app as `serve run` starts it, a real photo with a leash, an edit by each of two engines."""

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from PIL import Image, ImageDraw
from tenacity import RetryError, retry, retry_if_exception_type, retry_if_result, stop_after_delay, wait_fixed

from serve_app.errors import SettingsError

from .config import position

START_S = 120


def draw_leash(folder: Path) -> tuple[Path, Path]:
    """scikit-image's public-domain cat with a leash drawn over it, and the mask a person would paint.

    Raises SettingsError where scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as e:
        raise SettingsError("the demo's photo comes with scikit-image: pip install 'flux-fill-serve[demo]'") from e
    photo = Image.fromarray(data.cat())
    photo.paste((150, 24, 28), mask=_line(photo.size, width=7))
    photo.paste((205, 70, 66), mask=_line(photo.size, width=2, up=2))
    mask = _line(photo.size, width=15).point(lambda level: 255 if level else 0)
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


def free_port() -> int:
    """A loopback port nobody listens on, below the range that outgoing connections are given ports from: one of those
    could be taken again before the server that it is for starts."""
    for port in random.sample(range(20_000, 32_000), 200):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise SettingsError("no free port between 20000 and 32000")


def config_beside(config: Path, folder: Path) -> Path:
    """A copy of the sound file `config` in `folder`, with free ports and stores of its own: a running app is left
    alone."""
    raw: dict[str, Any] = yaml.safe_load(config.read_text())
    raw["http_options"] = {**(raw.get("http_options") or {}), "port": free_port()}
    args = raw["applications"][position(raw)]["args"]
    store = folder.absolute() / "store"
    args |= {"blobs": f"files:{store}/blobs", "jobs": f"sqlite:{store}/jobs.db"}
    args["messages"] = {**(args.get("messages") or {}), "url": f"embedded://127.0.0.1:{free_port()}"}
    copy = folder / "serve_config.yaml"
    copy.write_text(yaml.safe_dump(raw, sort_keys=False))
    return copy


@contextmanager
def serving(config: Path, url: str, log: Path) -> Iterator[None]:
    """`serve run config` in a process group of its own, ready when entered, gone when left.

    Raises SettingsError, with the end of the log, when it does not become ready.
    """
    with log.open("wb") as out:
        app = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(config)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=ray_environment(),
            start_new_session=True,
            # Only SIGINT ends `serve run` cleanly, and a process started in the background may have it ignored.
            preexec_fn=_take_interrupts,
        )
    try:
        _wait_ready(app, url, log)
        yield
    finally:
        _stop(app)


def ray_environment() -> dict[str, str]:
    """For a Ray of one's own on this machine: token authentication with a token of this run, loopback only."""
    return {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_ready(app: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    @retry(
        stop=stop_after_delay(START_S),
        wait=wait_fixed(0.3),
        retry=retry_if_exception_type(httpx.TransportError) | retry_if_result(lambda ready: not ready),
    )
    def ready() -> bool:
        if app.poll() is not None:
            raise SettingsError(f"the app ended at its start; the end of {log}:\n{_tail(log)}")
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200

    try:
        ready()
    except RetryError:
        raise SettingsError(f"not ready after {START_S} s; the end of {log}:\n{_tail(log)}") from None


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _stop(app: "subprocess.Popen[bytes]") -> None:
    app.send_signal(signal.SIGINT)
    try:
        app.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(app.pid, signal.SIGKILL)
        app.wait()
