"""The replica's class, without Ray: what it streams, and how it notices an engine that does not stop."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from deployments import inpainter
from deployments.inpainter import Inpainter, Usage
from serve_app.engine.pause import Pause
from serve_app.errors import VariantLoadFailed
from serve_app.jobs import Progress
from serve_app.ports import Painted, PaintRequest
from serve_app.settings import Settings
from serve_app.windows import Box


def settings(**definition: Any) -> Settings:
    return Settings(variants={"v": {"definition": {"family": "pause", "pause_s": 0.05, **definition}}})


def request(job_id: str = "j") -> PaintRequest:
    canvas, mask = np.zeros((32, 32, 3), np.uint8), np.full((32, 32), 255, np.uint8)
    window = Box(x0=0, y0=0, x1=32, y1=32)
    return PaintRequest(job_id=job_id, canvas=canvas, mask=mask, windows=[window], steps=4, guidance_scale=1.0, seed=0)


class Replica(Inpainter):
    """Serve awaits `__del__` when it stops a replica; Python's own garbage collection would not."""

    def __del__(self) -> None:
        self._loading._again.cancel()


class Stubborn(Pause):
    """Goes on painting, whatever it is told, until the test lets it go."""

    let_go = threading.Event()
    entered = threading.Event()

    def paint(self, window_pixels: Any, *_: Any, **__: Any) -> Any:
        self.entered.set()
        assert self.let_go.wait(30)
        return window_pixels


async def test_it_streams_progress_and_then_the_picture() -> None:
    events = [event async for event in Replica("v", settings()).paint(request())]
    assert isinstance(events[-1], Painted)
    assert events[-1].canvas.mean() == 127
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1] == Progress(step=4, steps=4)
    assert progress == sorted(progress, key=lambda p: p.step)


async def test_two_jobs_are_painted_one_after_the_other() -> None:
    replica = Replica("v", settings())

    async def paint(job_id: str) -> list[Progress | Painted]:
        return [event async for event in replica.paint(request(job_id))]

    both = await asyncio.gather(paint("a"), paint("b"))
    assert all(isinstance(events[-1], Painted) for events in both)
    assert replica._usage.as_dict()["wall_s"] >= 0.1


async def test_a_variant_that_did_not_load_says_why() -> None:
    replica = Replica("v", settings(family="flux-fill", file="nowhere.gguf", base="tiny:base"))
    assert "nowhere.gguf" in await replica.status()
    with pytest.raises(VariantLoadFailed, match=r"nowhere\.gguf"):
        await anext(replica.paint(request()))
    replica.check_health()


async def test_an_engine_that_does_not_stop_makes_the_replica_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inpainter, "STUCK_S", 0.0)
    replica = Replica("v", settings())
    replica._loading._value = Stubborn(settings().variant("v"), None, 1)
    painting = asyncio.create_task(anext(_second(replica)))
    while not Stubborn.entered.is_set():
        await asyncio.sleep(0.01)
    replica.check_health()
    painting.cancel()
    while replica._seat.stopping_since is None:
        await asyncio.sleep(0.01)
    with pytest.raises(RuntimeError, match="was told to stop"):
        replica.check_health()
    Stubborn.let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await painting
    replica.check_health()


async def _second(replica: Inpainter) -> Any:
    """The second event, which the stubborn engine never reports."""
    events = replica.paint(request())
    try:
        await anext(events)
        yield await anext(events)
    finally:
        await events.aclose()


def test_usage_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 11.0, 15.0])
    monkeypatch.setattr(inpainter.time, "monotonic", lambda: next(now))
    usage = Usage()
    usage.add(1.0)
    usage.add(3.0)
    assert usage.as_dict() == {"jobs": 2, "busy_s": 4.0, "wall_s": 5.0}
