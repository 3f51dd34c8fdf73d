"""Replicas on a Ray of their own whose engine hangs or loses its GPU: Serve replaces them, Prometheus hears of it."""

import asyncio
import re
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.inpainter import Inpainter
from deployments.readiness import VariantWatch
from deployments.remote import RemoteModel
from serve_app.engine import Window
from serve_app.engine.pause import Pause
from serve_app.errors import GpuLost, OutOfMemory
from serve_app.models import Images, Pixels, Progress
from serve_app.settings import Settings

from .backends import until
from .engine_fixtures import request

pytestmark = [pytest.mark.serve, pytest.mark.usefixtures("own_apps"), pytest.mark.timeout(180)]

SETTINGS = Settings(
    variants={
        "deaf": {"definition": {"family": "pause", "pause_s": 600, "deaf": True}},
        "faulty": {"definition": {"family": "pause", "pause_s": 0}},
    },
    work={"engine_stop_timeout_s": 0.5},
)


class Faulty(Pause):
    """Runs out of memory for guidance scale 1, and loses its GPU for 2."""

    def paint(self, window: Window) -> Pixels:
        if window.guidance_scale == 1.0:
            raise OutOfMemory("no memory left", device="cuda:0")
        if window.guidance_scale == 2.0:
            raise GpuLost("an illegal memory access", device="cuda:0")
        return super().paint(window)


class FaultyInpainter(Inpainter):
    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self._loading._value = Faulty(settings.variant(name), None, settings.variants[name])


def deployed(variant: str, kind: type[Inpainter]) -> DeploymentHandle:
    """One replica, which Serve looks at often."""
    options = {"health_check_period_s": 0.5, "graceful_shutdown_timeout_s": 1, "ray_actor_options": {"num_cpus": 0.1}}
    replica = serve.deployment(kind).options(name=f"Inpainter-{variant}", max_ongoing_requests=2, **options)
    return serve.run(replica.bind(variant, SETTINGS), name=variant, route_prefix=None)


async def paint(handle: DeploymentHandle, guidance_scale: float, begun: asyncio.Event | None = None) -> Images:
    async def note(_: Progress) -> None:
        if begun is not None:
            begun.set()

    model = RemoteModel("v", handle, VariantWatch({"v": handle}, {"v": "Inpainter-v"}))
    return await model.run(request(guidance_scale=guidance_scale), note)


async def pid_of(handle: DeploymentHandle) -> int:
    described: dict[str, Any] = await handle.options(method_name="describe").remote()
    return int(described["pid"])


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def exported(name: str, variant: str) -> float:
    """The sum of a metric's series for the variant, as Prometheus would get them from this node."""
    node = ray.nodes()[0]
    page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
    series = re.findall(rf"^ray_{name}{{([^}}]*)}} (\S+)$", page, re.M)
    return sum(float(value) for labels, value in series if f'variant="{variant}"' in labels)


async def test_a_replica_that_lost_its_gpu_is_replaced_after_it_said_so() -> None:
    faulty = deployed("faulty", FaultyInpainter)
    lost = await pid_of(faulty)
    await paint(faulty, 30.0)
    for guidance_scale, expected in ((1.0, OutOfMemory), (2.0, GpuLost)):
        with pytest.raises(expected) as caught:
            await paint(faulty, guidance_scale)
        assert type(caught.value) is expected
        assert caught.value.details == {"device": "cuda:0"}
    await until(lambda: is_gone(lost), 60)
    names = ("fluxfill_steps_per_second_count", "fluxfill_out_of_memory_total", "fluxfill_gpu_lost_total")
    await until(lambda: [exported(name, "faulty") for name in names] == [1, 1, 1], 60)
    assert isinstance(await paint(faulty, 30.0), Images)


async def test_an_engine_that_hangs_is_killed_with_its_replica() -> None:
    deaf = deployed("deaf", Inpainter)
    hung, begun = await pid_of(deaf), asyncio.Event()
    painting = asyncio.create_task(paint(deaf, 30.0, begun))
    await begun.wait()
    painting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await painting
    await until(lambda: is_gone(hung), 60)
    assert await pid_of(deaf) != hung
