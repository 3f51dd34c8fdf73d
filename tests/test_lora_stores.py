"""Pictures with LoRAs, from the LoRA's upload to the downloaded pictures, by the real pipelines with tiny weights, over
servers that stand in for S3, PostgreSQL and Google's."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from serve_app import adapters
from serve_app.blobs import UploadLink
from serve_app.errors import BlobNotFound
from serve_app.generate.loras import Lora, LoraBody
from serve_app.jobs.record import State

from .blob_servers import bucket_url, forget_firebase_app, new_bucket
from .job_servers import Opened
from .test_generate import OPEN, Studio
from .test_generate_stores import STORES
from .tiny_studio import TinyStudios

pytestmark = [pytest.mark.slow, pytest.mark.emulator]


@pytest.fixture(params=STORES)
def stores(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> Iterator[Callable[[], tuple[Any, Any]]]:
    """Made in the test: of blobs, and of jobs."""
    bucket, records = request.param
    port = request.getfixturevalue(f"{bucket}_port")
    blobs = bucket_url(bucket, port, new_bucket(bucket, port), monkeypatch)
    jobs = request.getfixturevalue(f"{records}_url")
    yield lambda: (adapters.blob_store(blobs, ""), opened(adapters.job_store(jobs)))
    forget_firebase_app()


async def registered(studio: Studio, data: bytes, **about: Any) -> Lora:
    """As a client does it: it asks, uploads, and asks again."""
    sha256 = hashlib.sha256(data).hexdigest()
    body = LoraBody(name="flux_lora.safetensors", sha256=sha256, size_bytes=len(data), **about)
    link = await studio.loras.register(body, OPEN)
    assert isinstance(link, UploadLink)
    httpx.put(link.url, content=data, headers=dict(link.headers)).raise_for_status()
    lora = await studio.loras.register(body, OPEN)
    assert isinstance(lora, Lora)
    return lora


async def pictures(studio: Studio, *loras: tuple[Lora, float], **asked: Any) -> list[bytes]:
    """Downloaded by their links, in order."""
    given = [{"id": lora.id, "scale": scale} for lora, scale in loras]
    job = await studio.post(loras=given, embed_metadata=False, **asked)
    assert (await studio.work()).reason == "succeeded"
    done = await studio.job(job)
    assert done.status == State.SUCCEEDED
    links = [await studio.api.link(artifact, 600) for artifact in done.artifacts]
    return [httpx.get(link).raise_for_status().content for link in links]


async def test_four_pictures_by_flux_with_a_lora(
    stores: Callable[[], tuple[Any, Any]], tiny_studio: TinyStudios
) -> None:
    from . import lora_files

    studio = tiny_studio("tiny-flux-dev", stores=stores())
    data = lora_files.file(lora_files.layers("flux", 1), "simpletuner")
    lora = await registered(studio, data, trigger_word="TOK", alpha=2.0)
    base = await pictures(studio, count=4, seed=7)
    made = await pictures(studio, (lora, 0.8), count=4, seed=7)
    assert len({*base, *made}) == 8
    assert await pictures(studio, (lora, 0.8), seed=9) == [made[2]]
    assert await pictures(studio, count=4, seed=7) == base
    assert httpx.get(await studio.loras.link(lora, 600)).raise_for_status().content == data
    await studio.loras.delete(lora.id, OPEN)
    with pytest.raises(BlobNotFound):
        await studio.blobs.head(lora.path)


async def test_sdxl_with_two_loras(stores: Callable[[], tuple[Any, Any]], tiny_studio: TinyStudios) -> None:
    from . import lora_files

    studio = tiny_studio("tiny-sdxl", stores=stores())
    one = await registered(studio, lora_files.file(lora_files.layers("sdxl", 1), "kohya", alpha=2.0))
    layers = lora_files.layers("sdxl", 2, convs=True, text_encoders=True)
    other = await registered(studio, lora_files.file(layers, "diffusers"))
    asked = {"count": 2, "seed": 7, "negative_prompt": "dogs"}
    both = await pictures(studio, (one, 0.8), (other, 0.5), **asked)
    alone = [await pictures(studio, *loras, **asked) for loras in ((), ((one, 0.8),), ((other, 0.5),))]
    assert len({picture for of in (both, *alone) for picture in of}) == 8
    assert await pictures(studio, (one, 0.8), (other, 0.5), **asked) == both
