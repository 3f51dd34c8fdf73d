"""The smoke job, from its post to a downloaded picture, by the real SDXL pipeline over servers that stand in for S3,
PostgreSQL and Google's; and by the fake one where there are no diffusion packages."""

import io
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from serve_app import adapters
from serve_app.engine import families
from serve_app.engine.generating import LocalGenerator
from serve_app.engine.weights import fetch
from serve_app.jobs.record import State
from serve_app.models import BUILT_IN, GenerateRequest, Images, OnProgress
from serve_app.settings import GeneratorSettings, Secrets, WeightsSettings

from .backends import run_python
from .blob_servers import bucket_url, forget_firebase_app, new_bucket
from .job_servers import Opened
from .test_generate import OPEN, Studio

SMOKE = {
    "type": "generate",
    "prompt": "an old-growth forest at dawn",
    "width": 1024,
    "height": 1024,
    "steps": 24,
    "guidance": 7.0,
    "format": "png",
    "seed": 20,
}


class Once:
    """A model that makes the same picture once only: at this size a tiny one takes its time, too."""

    is_ready = True

    def __init__(self, model: LocalGenerator) -> None:
        self._model = model
        self.made: dict[tuple[Any, ...], Images] = {}

    async def run(self, request: GenerateRequest, on_progress: OnProgress) -> Images:
        what = (request.prompt, request.width, request.height, request.steps, request.guidance_scale, request.seed)
        if what not in self.made:
            self.made[what] = await self._model.run(request, on_progress)
        return self.made[what]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Once]]:
    """Made where a test runs, because engines belong to one event loop; what was made is kept."""
    pytest.importorskip("diffusers")
    import asyncio

    row, cache = BUILT_IN["tiny-sdxl"], tmp_path_factory.mktemp("weights")
    weights = asyncio.run(fetch.fetch(row, fetch.Sources.of(WeightsSettings(cache=cache), Secrets())))
    made: dict[tuple[Any, ...], Images] = {}

    def model() -> Once:
        once = Once(LocalGenerator("tiny-sdxl", families.create("tiny-sdxl", row, weights, GeneratorSettings())))
        once.made = made
        return once

    yield model


STORES = [
    pytest.param(("s3", "postgresql"), id="S3 and PostgreSQL"),
    pytest.param(("firebase", "firestore"), id="Firebase Storage and Firestore"),
]


@pytest.mark.slow
@pytest.mark.emulator
@pytest.mark.parametrize("kinds", STORES)
async def test_the_smoke_job_runs_end_to_end(
    kinds: tuple[str, str],
    sdxl: Callable[[], Once],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    opened: Opened,
) -> None:
    bucket, records = kinds
    port = request.getfixturevalue(f"{bucket}_port")
    blobs = adapters.blob_store(bucket_url(bucket, port, new_bucket(bucket, port), monkeypatch), "")
    jobs = opened(adapters.job_store(request.getfixturevalue(f"{records}_url")))
    studio = Studio(stores=(blobs, jobs), painter=sdxl())
    posted, _ = await studio.api.post(SMOKE, OPEN, idempotency_key="smoke")
    await studio.notifier.drained()
    assert (await studio.work()).reason == "succeeded"
    done = await studio.job(posted)
    (artifact,) = done.artifacts
    assert (done.status, artifact.seed, artifact.width, artifact.height) == (State.SUCCEEDED, 20, 1024, 1024)
    time = f"{done.created_at:%Y%m%dT%H%M%S}"
    assert artifact.path == f"dreamforge/default/jobs/{done.id}/generate/{time}_0_1024x1024_20.png"
    picture = Image.open(io.BytesIO(httpx.get(await studio.api.link(artifact, 600)).raise_for_status().content))
    assert picture.size == (1024, 1024) and picture.text["prompt"] == SMOKE["prompt"]
    await studio.api.delete(done.id, OPEN)
    assert await studio.paths() == []
    forget_firebase_app()


def test_the_fake_one_needs_none_of_the_diffusion_packages(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import asyncio, sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {packages!r}:
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        from tests.test_generate import OPEN, Studio
        from serve_app.engine import families
        from serve_app.engine.generating import LocalGenerator
        from serve_app.models import BUILT_IN
        from serve_app.settings import GeneratorSettings

        async def main():
            engine = families.create("fake", BUILT_IN["fake"], None, GeneratorSettings())
            studio = Studio(painter=LocalGenerator("fake", engine))
            await studio.post(prompt="an old-growth forest at dawn", width=1024, height=1024, steps=24)
            assert (await studio.work()).reason == "succeeded"
            (path,) = await studio.paths()
            data, _ = await studio.blobs.get(path, max_bytes=10**7)
            open(sys.argv[1], "wb").write(data)

        asyncio.run(main())
        """
    ).format(packages=["torch", "diffusers", "transformers", "accelerate", "gguf", "safetensors"])
    process = run_python(script, tmp_path / "card.png")
    process.communicate(timeout=60)
    assert process.returncode == 0
    with Image.open(tmp_path / "card.png") as card:
        assert card.size == (1024, 1024)
