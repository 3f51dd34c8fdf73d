"""How much of the time that an audit's replicas are up they paint: 15 cells over some replicas, an engine that sleeps
1 s a cell in place of painting, asked for as the audit's job asks.

The share is the ideal time (the cells one after the other on each replica, as evenly as can be) by the time measured.
It counts from when the replicas are up and one cell has been painted: in an audit, the job's connection to them is made
while the first of them starts.
"""

import asyncio
import math
import time
from pathlib import Path

import numpy as np
from ray import serve
from rich.console import Console
from rich.table import Table
from tenacity import retry, retry_if_result, stop_after_delay, wait_fixed

from deployments.app import build
from deployments.own_ray import free_port
from serve_app.audit.fan_out import fan_out
from serve_app.audit.waves import Wave
from serve_app.models import Box, EditRequest, Progress
from serve_app.settings import Settings

from .audit.ray_replicas import RayReplicas

out = Console()

APP, VARIANT = "fan-out", "sleeper"
CELLS, PAUSE_S = 15, 1.0
REPLICAS = (1, 3, 5, 15)
#: Of a job's prompt: 512 tokens of T5, in bfloat16.
_EMBEDDINGS_BYTES = 512 * 4096 * 2
_START_S = 300


def measure(folder: Path, canvas_px: int) -> dict[str, float]:
    """Replicas -> share, in the Ray that this process is connected to, with canvases of `canvas_px` a side. Prints a
    table."""
    seconds = {replicas: _seconds(replicas, folder, canvas_px) for replicas in REPLICAS}
    title = f"{CELLS} cells of {PAUSE_S:g} s, canvas {canvas_px}x{canvas_px}"
    table = Table("replicas", "ideal s", "measured s", "share", title=title, box=None)
    shares = {}
    for replicas, measured_s in seconds.items():
        ideal_s = math.ceil(CELLS / replicas) * PAUSE_S
        shares[str(replicas)] = ideal_s / measured_s
        table.add_row(str(replicas), f"{ideal_s:g}", f"{measured_s:.2f}", f"{ideal_s / measured_s:.3f}")
    out.print(table)
    return shares


def _seconds(replicas: int, folder: Path, canvas_px: int) -> float:
    config = _settings(replicas, folder)
    serve.run(build(config), name=APP)
    try:
        return asyncio.run(_painted(config, replicas, canvas_px))
    finally:
        serve.delete(APP)


def _settings(replicas: int, folder: Path) -> Settings:
    sleeper = {
        "definition": {"family": "pause", "pause_s": PAUSE_S},
        "min_replicas": replicas,
        "max_replicas": replicas,
        "num_cpus": 0.05,
    }
    return Settings(
        blobs=f"files:{folder}/blobs",
        jobs=f"sqlite:{folder}/jobs.db",
        messages={"url": f"embedded://127.0.0.1:{free_port()}"},
        variants={VARIANT: sleeper},
    )


async def _painted(config: Settings, count: int, canvas_px: int) -> float:
    """Seconds that the cells took."""
    replicas = RayReplicas(APP, config)

    @retry(stop=stop_after_delay(_START_S), wait=wait_fixed(0.2), retry=retry_if_result(lambda up: up < count))
    async def up() -> int:
        return (await replicas.counts())[VARIANT].running

    await up()
    async with fan_out(replicas, Wave(wanted={VARIANT: count}), config.audit) as fan:
        await fan.measure(VARIANT, _request(canvas_px), _ignore, trials=1)
        started_s = time.monotonic()
        await asyncio.gather(*(fan.measure(VARIANT, _request(canvas_px), _ignore, trials=1) for _ in range(CELLS)))
        return time.monotonic() - started_s


def _request(side_px: int) -> EditRequest:
    """Of one window. The canvas goes to the replica and back, as in an audit: the larger, the longer that takes."""
    return EditRequest(
        job_id="fan-out",
        canvas=np.zeros((side_px, side_px, 3), np.uint8),
        mask=np.full((side_px, side_px), 255, np.uint8),
        windows=[Box(x0=0, y0=0, x1=side_px, y1=side_px)],
        steps=28,
        guidance_scale=30.0,
        seed=0,
        embeddings=bytes(_EMBEDDINGS_BYTES),
    )


async def _ignore(progress: Progress) -> None: ...
