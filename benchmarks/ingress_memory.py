"""What an ingress's memory grows by with hostile photos in hand: its real worker, with replicas that are all busy.

python -m benchmarks.ingress_memory [--sessions 18] [--megapixels 49.9] [--out FILE]

Photos of one colour, of the most pixels that the limits allow and few bytes. Every job is claimed, downloaded, decoded,
planned and cut, and waits for a replica; then all replicas paint at once, and everything is pasted, encoded and stored.
Says megabytes above the start: while all wait, and at the peak. The last line is JSON.
"""

import argparse
import asyncio
import ctypes
import io
import json
import threading
import time
from math import inf
from pathlib import Path

import cv2
import numpy as np
import psutil
from PIL import Image

from serve_app.adapters.image_links import ImageLinks
from serve_app.adapters.memory import MemoryBlobStore
from serve_app.clock import utc_now
from serve_app.edit import session as edit_session
from serve_app.edit.job import Editor
from serve_app.edit.session import session_path
from serve_app.jobs.kinds import Attempt
from serve_app.jobs.record import Artifact, Job
from serve_app.jobs.worker import pixel_pool
from serve_app.models import EditRequest, Images, OnProgress, Progress
from serve_app.parameters import CropStrategy, EditParameters
from serve_app.settings import Inference, Settings

from .context import machine

_MB = 1e6


class Memory:
    """The process's resident bytes above the start, looked at every 5 ms."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.peak_bytes = 0
        self._start: int = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def bytes(self) -> int:
        now: int = self._process.memory_info().rss
        return now - self._start

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, self.bytes)


class Busy:
    """A model that paints when it is let, and nothing then."""

    is_ready = True

    def __init__(self, jobs: int) -> None:
        self._left, self.all_wait, self.go_on = jobs, asyncio.Event(), asyncio.Event()

    async def run(self, request: EditRequest, on_progress: OnProgress) -> Images:
        self._left -= 1
        if not self._left:
            self.all_wait.set()
        await self.go_on.wait()
        await on_progress(Progress())
        return Images(images=[request.canvas], busy_s=0.0, windows=request.windows)


class NoPrompts:
    async def encode(self, variant: str, prompt: str) -> bytes | None:
        return None


async def confirmed() -> None: ...


async def recorded(_: Artifact) -> None: ...


def files(megapixels: float) -> dict[str, bytes]:
    """A photo that is cheap to send, and a leash across it."""
    height = int((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = int(megapixels * 1e6 / height)
    mask = cv2.line(np.zeros((height, width), np.uint8), (0, 0), (width, height), 255, 40)
    out = {}
    for role, pixels in (("original", np.full((height, width, 3), 90, np.uint8)), ("mask", mask)):
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        out[role] = encoded.getvalue()
    return out


def job_of(session: str) -> Job:
    asked = EditParameters(prompt="", guidance_scale=30, steps=1, crop_strategy=CropStrategy.AUTO)
    ids = {"id": session, "user_id": "u", "session_id": session, "lock_key": f"u/{session}"}
    return Job(**ids, variant="telea", parameters=asked, seed=0, created_at=utc_now())


async def measured(sessions: int, megapixels: float, settings: Settings) -> dict[str, float]:
    blobs, sent = MemoryBlobStore("memory:ingress"), files(megapixels)
    for number in range(sessions):
        for role, data in sent.items():
            path = session_path("u", f"s{number}", edit_session.INPUTS[role])
            await blobs.put(path, data, content_type="image/png")
    model, pool = Busy(sessions), pixel_pool()
    models = {"telea": model}
    links = ImageLinks(settings)
    editor = Editor(blobs=blobs, models=models, prompts=NoPrompts(), settings=settings, defaults=Inference, links=links)
    memory, started = Memory(), time.perf_counter()

    async def progress(_: Progress) -> None: ...

    attempt = Attempt(on_progress=progress, confirm=confirmed, record=recorded, left_s=lambda: inf, pool=pool)
    jobs = [asyncio.create_task(editor.run(job_of(f"s{n}"), attempt)) for n in range(sessions)]
    await model.all_wait.wait()
    # What malloc holds and nobody uses is not what the jobs take.
    ctypes.CDLL(None).malloc_trim(0)
    waiting = memory.bytes
    model.go_on.set()
    await asyncio.gather(*jobs)
    memory.end()
    pool.shutdown()
    return {
        "sent_mb": sum(map(len, sent.values())) / _MB,
        "waiting_mb": waiting / _MB,
        "peak_mb": memory.peak_bytes / _MB,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=18, help="jobs in hand at a time")
    parser.add_argument("--megapixels", type=float, default=49.9, help="of each photo and mask")
    parser.add_argument("--decoded-pixels", type=int, help="limits.decoded_pixels")
    parser.add_argument("--out", type=Path, help="a file for the figures")
    asked = parser.parse_args()
    limits = {} if asked.decoded_pixels is None else {"decoded_pixels": asked.decoded_pixels}
    settings = Settings(variants={"telea": {}}, limits=limits)
    figures = asyncio.run(measured(asked.sessions, asked.megapixels, settings))
    figures = {name: round(value, 1) for name, value in figures.items()}
    asked_for = {"sessions": asked.sessions, "megapixels": asked.megapixels, **settings.limits.model_dump()}
    result = {**asked_for, **figures, **machine(["numpy", "pillow", "opencv-python-headless"])}
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
