"""How busy the serving path keeps a replica, with an engine that sleeps in place of painting.

The whole app runs on this machine: embedded Pub/Sub, ingress, file blobs, SQLite, one replica. The sessions are
uploaded and published one after the other, far faster than they are painted. The busy share is the engine's sleep over
the seconds from the replica's first painting's start to its last one's end: what is missing from 1 is time in which the
replica waited for the next photo, or did work of its own. The occupied share is that of paintings from their start to
their end, which a busy machine only stretches.

    python -m benchmarks.serving [--sessions 60] [--out FILE]
    python -m benchmarks.serving --audit [--canvas 256|1024] [--out FILE]

With `--audit` it measures instead how busy an audit's job keeps several replicas: see `benchmarks.fan_out`.

Prints a table a scenario and, last, a JSON object.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from deployments.own_ray import free_port, ray_environment
from serve_app.jobs.messages import EditMessage
from serve_app.jobs.record import Job, State
from serve_app.models import Pixels
from serve_app.settings import Settings

from .context import machine

out = Console()

STAGES = ("download_s", "prepare_s", "encode_s", "upload_s")


@dataclass(frozen=True)
class Scenario:
    name: str
    #: Seconds the engine sleeps for a job.
    pause_s: float
    #: Of the photos, in pixels.
    width: int
    height: int
    #: The key of its busy share in the JSON object.
    key: str


SCENARIOS = (
    Scenario("12-megapixel photos, 1 s", 1.0, 4000, 3000, "busy_share"),
    Scenario("1024² photos, 0.25 s", 0.25, 1024, 1024, "busy_share_1024"),
)


def variant(scenario: Scenario) -> str:
    return f"pause-{scenario.pause_s:g}"


def settings(folder: Path) -> Settings:
    served = {
        variant(s): {
            "definition": {"family": "pause", "pause_s": s.pause_s},
            "min_replicas": 1,
            "max_replicas": 1,
            "num_cpus": 0.1,
        }
        for s in SCENARIOS
    }
    return Settings(
        blobs=f"files:{folder}/blobs",
        jobs=f"sqlite:{folder}/jobs.db",
        messages={"url": f"embedded://127.0.0.1:{free_port()}"},
        variants=served,
    )


def photo(width: int, height: int) -> Pixels:
    """Texture at every scale, so that the JPEG is as large as a phone's: about 0.4 bytes a pixel at quality 92."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
        grain = rng.normal(0, 2 ** (8 - octave), (height >> (8 - octave) or 1, width >> (8 - octave) or 1, 3))
        pixels += cv2.resize(grain.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(pixels + 128, 0, 255).astype(np.uint8)


def session_files(folder: Path, scenario: Scenario) -> tuple[Path, Path]:
    """A photo, and the mask of a leash that one window shows, for which the engine sleeps once."""
    original, mask = folder / f"{scenario.width}.jpg", folder / f"{scenario.width}.png"
    cv2.imwrite(str(original), photo(scenario.width, scenario.height), [cv2.IMWRITE_JPEG_QUALITY, 92])
    line = np.zeros((scenario.height, scenario.width), np.uint8)
    x, y = scenario.width // 3, scenario.height // 3
    cv2.line(line, (x, y), (x + 100, y + 250), 255, scenario.width // 100)
    cv2.imwrite(str(mask), line)
    return original, mask


async def measure(scenario: Scenario, config: Settings, folder: Path, sessions: int) -> dict[str, Any]:
    from ray import serve

    from deployments.app import inpainter_name
    from deployments.client import Client

    client = Client(config)
    original, mask = session_files(folder, scenario)
    messages = [
        EditMessage(userId="bench", sessionId=f"{variant(scenario)}-{i}".replace(".", "_"), variant=variant(scenario))
        for i in range(sessions)
    ]
    asked = [await client.submit(message, original, mask) for message in messages]
    jobs = [await client.follow(one, lambda job: None, timeout_s=600) for one in asked]
    failed = [job for job in jobs if job.status != State.SUCCEEDED]
    if failed:
        raise SystemExit(f"{len(failed)} jobs did not succeed, the first: {failed[0].error}")
    replica = serve.get_deployment_handle(inpainter_name(variant(scenario)), "default")
    usage = (await replica.describe.remote())["usage"]
    return {
        "busy_share": scenario.pause_s * usage["jobs"] / usage["wall_s"],
        "occupied_share": usage["busy_s"] / usage["wall_s"],
        "photo_mb": original.stat().st_size / 1e6,
        **usage,
        "stages_ms": {stage: median_ms(jobs, stage) for stage in STAGES},
    }


def median_ms(jobs: list[Job], stage: str) -> float:
    return 1000 * statistics.median(float(getattr(job.timings, stage)) for job in jobs)


def show(scenario: Scenario, result: dict[str, Any]) -> None:
    table = Table("what", "value", title=scenario.name, show_header=False)
    table.add_row("busy share", f"{result['busy_share']:.3f}")
    table.add_row("occupied share", f"{result['occupied_share']:.3f}")
    table.add_row("jobs, busy s, wall s", f"{result['jobs']}, {result['busy_s']:.1f}, {result['wall_s']:.1f}")
    table.add_row("photo", f"{scenario.width}x{scenario.height}, {result['photo_mb']:.1f} MB")
    for stage, ms in result["stages_ms"].items():
        table.add_row(f"median {stage.removesuffix('_s')}", f"{ms:.0f} ms")
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=60)
    parser.add_argument("--audit", action="store_true", help="measure the audit's fan-out instead")
    parser.add_argument("--canvas", type=int, choices=(256, 1024), default=256, help="its canvas' side, in pixels")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    args = parser.parse_args()
    with own_ray() as folder:
        found = audit(folder, args.canvas) if args.audit else serving(folder, args.sessions)
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


@contextmanager
def own_ray() -> Iterator[Path]:
    """Serve without an app, and a folder for the app's stores."""
    os.environ.update(ray_environment())
    import ray
    from ray import serve

    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        serve.shutdown()
    ray.shutdown()


def serving(folder: Path, sessions: int) -> dict[str, Any]:
    from ray import serve

    from deployments.app import build

    config = settings(folder)
    serve.run(build(config))
    results = {}
    for scenario in SCENARIOS:
        results[scenario.key] = asyncio.run(measure(scenario, config, folder, sessions))
        show(scenario, results[scenario.key])
    shares = {key: round(result["busy_share"], 4) for key, result in results.items()}
    return {**shares, **context(results, sessions)}


def audit(folder: Path, canvas_px: int) -> dict[str, Any]:
    from . import fan_out

    shares = {replicas: round(share, 4) for replicas, share in fan_out.measure(folder, canvas_px).items()}
    figures = {"fan_out": shares, "cells": fan_out.CELLS, "pause_s": fan_out.PAUSE_S, "canvas_px": canvas_px}
    return {**figures, **machine(("ray",))}


def context(results: dict[str, dict[str, Any]], sessions: int) -> dict[str, Any]:
    """What a reader of the figures needs beside them. `outside_engine_ms` is of the 12-megapixel photos."""
    stages = results["busy_share"]["stages_ms"]
    return {
        "outside_engine_ms": round(sum(stages.values()), 1),
        "stages_ms": {key: {s: round(ms, 1) for s, ms in r["stages_ms"].items()} for key, r in results.items()},
        "occupied_share": {key: round(r["occupied_share"], 4) for key, r in results.items()},
        "sessions": sessions,
        **machine(("ray", "pillow")),
    }


if __name__ == "__main__":
    main()
