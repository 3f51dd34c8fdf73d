"""The replica of a generator, without Ray: what it streams, and what it notes."""

from typing import Any

import numpy as np
import pytest

from deployments.generator import Generator
from serve_app.engine.fake import Fake
from serve_app.errors import GpuLost, VariantLoadFailed, VariantNotReady
from serve_app.models import GenerateRequest, Images, Pixels, Progress
from serve_app.settings import Settings

from .rig import Counters

FAKE = Settings(variants={"telea": {}}, generators={"fake": {}}, blobs="memory:")


def request(seed: int = 7) -> GenerateRequest:
    return GenerateRequest(job_id="j", prompt="a fox", width=64, height=48, steps=3, guidance_scale=7.0, seed=seed)


class Replica(Generator):
    """Serve awaits `__del__` when it stops a replica; Python's own garbage collection would not."""

    def __init__(self, settings: Settings = FAKE, engine: Fake | None = None) -> None:
        self.counters = Counters()
        super().__init__(next(iter(settings.generators)), settings, self.counters)
        if engine is not None:
            self._loading._value = engine

    def __del__(self) -> None:
        self._loading._again.cancel()

    def _here(self) -> dict[str, Any]:
        return {"replica": "r", "node": "n", "pid": 1}

    async def events(self, request: GenerateRequest) -> list[Progress | Images]:
        return [event async for event in self.generate(request)]


class Lost(Fake):
    def __init__(self) -> None:
        super().__init__(FAKE.variant("fake"), None, FAKE.generators["fake"])

    def generate(self, *_: Any) -> Pixels:
        raise GpuLost("an ECC error")


async def test_it_streams_progress_and_then_the_picture() -> None:
    replica = Replica()
    *progress, made = await replica.events(request())
    assert progress[-1] == Progress(step=3, steps=3)
    assert isinstance(made, Images) and made.images[0].shape == (48, 64, 3)
    assert replica.counters.total("fluxfill_steps_per_second", "fake") == 3 / made.busy_s
    again, other = (await replica.events(request()))[-1], (await replica.events(request(8)))[-1]
    assert isinstance(again, Images) and isinstance(other, Images)
    assert np.array_equal(again.images[0], made.images[0]) and not np.array_equal(other.images[0], made.images[0])


async def test_a_model_that_did_not_load_says_why() -> None:
    nowhere = {"definition": {"family": "sdxl", "file": "nowhere.safetensors", "base": "nowhere"}}
    replica = Replica(Settings(variants={"telea": {}}, generators={"own": nowhere}, blobs="memory:"))
    assert (await replica.status()).error
    with pytest.raises(VariantLoadFailed, match=r"^variant own did not load"):
        await replica.events(request())


async def test_a_lost_gpu_has_the_replica_replaced() -> None:
    replica = Replica(engine=Lost())
    with pytest.raises(GpuLost, match="an ECC error"):
        await replica.events(request())
    with pytest.raises(VariantNotReady, match="an ECC error"):
        await replica.events(request())
    with pytest.raises(GpuLost):
        replica.check_health()
    assert replica.counters.total("fluxfill_gpu_lost_total", "fake") == 1
