"""LoRAs on their way from the blob store to a painting: fetched, checked, kept by a replica, and forgotten."""

import asyncio
import gc
import hashlib
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve import multiplex

from deployments.remote import _routed
from serve_app.adapters.memory import MemoryBlobStore
from serve_app.blobs import BlobInfo
from serve_app.engine.fake import Fake
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.generating import LocalGenerator
from serve_app.engine.lora import host
from serve_app.engine.sdxl.generator import Sdxl
from serve_app.errors import (
    FluxFillError,
    LoraChanged,
    LoraTooLarge,
    NotSafetensors,
    NotSupported,
    StoreUnavailable,
    UnknownModel,
    WrongModel,
)
from serve_app.models import Images, LoraUse, Pixels, Progress, Variant
from serve_app.settings import LoraSettings, Settings, VariantSettings

from . import lora_files
from .rig import BlobOutage
from .test_engine_generate import asked
from .test_generator import Replica
from .test_lora_pictures import same, sdxl_of


@pytest.fixture(scope="module")
def engine(tiny_sdxl: TinyWeights) -> Sdxl:
    return sdxl_of(tiny_sdxl)


def lora_file(seed: int) -> bytes:
    return lora_files.file(lora_files.layers("sdxl", seed, strength=0.5, text_encoders=True), "peft")


async def put(blobs: MemoryBlobStore, data: bytes, path: str | None = None, **changes: Any) -> LoraUse:
    """As a LoRA that was registered."""
    sha256 = hashlib.sha256(data).hexdigest()
    path = path or f"models/{sha256}/lora.safetensors"
    await blobs.put(path, data, content_type="application/octet-stream")
    return LoraUse(**{"id": "l", "name": "l", "path": path, "sha256": sha256, "size_bytes": len(data), **changes})


# Fetched and checked.


async def no_progress(progress: Progress) -> None: ...


async def test_what_is_not_the_registered_lora_is_refused_and_the_generator_goes_on(engine: Sdxl) -> None:
    blobs = MemoryBlobStore(f"memory:{uuid.uuid4().hex}")
    outage = BlobOutage(blobs, StoreUnavailable)
    fetched = partial(host.fetched, engine=engine, settings=LoraSettings(file_bytes=1_000_000, max_rank=8))
    model = LocalGenerator("sdxl", engine, partial(fetched, blobs=outage))

    async def painted(*loras: LoraUse) -> Pixels:
        return (await model.run(asked(loras=loras), no_progress)).images[0]

    data = lora_file(1)
    good, base = await put(blobs, data), await painted()
    first = await painted(good)
    assert not same(first, base)
    other = bytes([*data[:-1], data[-1] ^ 1])
    ranked = lora_files.file(lora_files.layers("sdxl", 1, rank=9), "peft")
    flux = lora_files.file(lora_files.layers("flux", 1), "diffusers")
    bad: list[tuple[LoraUse, type[FluxFillError]]] = [
        (await put(blobs, other, "swapped", sha256=good.sha256), LoraChanged),
        (await put(blobs, data[:-1], "cut", sha256=good.sha256, size_bytes=len(data)), LoraChanged),
        (good.model_copy(update={"path": "gone"}), UnknownModel),
        (good.model_copy(update={"size_bytes": 1_000_001}), LoraTooLarge),
        (await put(blobs, ranked), LoraTooLarge),
        (await put(blobs, b"no tensors"), NotSafetensors),
        (await put(blobs, flux), WrongModel),
    ]
    for use, error in bad:
        with pytest.raises(error):
            await painted(use)
        with pytest.raises(error):
            await painted(good, use)
    outage.is_down = True
    with pytest.raises(StoreUnavailable):
        await painted(good)
    outage.is_down = False
    assert same(await painted(), base) and same(await painted(good), first)


async def test_its_alpha_is_for_layers_that_say_none(engine: Sdxl) -> None:
    blobs = MemoryBlobStore(f"memory:{uuid.uuid4().hex}")
    load = partial(host.fetched, blobs=blobs, engine=engine, settings=LoraSettings())
    use = await put(blobs, lora_file(1))
    halved = use.model_copy(update={"alpha": 2.0})
    assert {layer.scale for layer in (await load(use)).layers.values()} == {1.0}
    assert {layer.scale for layer in (await load(halved)).layers.values()} == {0.5}
    assert use.key != halved.key


async def test_cards_have_none() -> None:
    fake = Fake(Variant(family="fake"), None, VariantSettings())
    blobs = MemoryBlobStore(f"memory:{uuid.uuid4().hex}")
    use = await put(blobs, lora_file(1))
    for adapter_of in (host.none, partial(host.fetched, blobs=blobs, engine=fake, settings=LoraSettings())):
        with pytest.raises(NotSupported):
            await LocalGenerator("fake", fake, adapter_of).run(asked(loras=[use]), no_progress)


# Kept by a replica.


@dataclass
class Kept:
    """A replica over a blob store, and what it has downloaded."""

    replica: Replica
    blobs: MemoryBlobStore
    downloads: list[str] = field(default_factory=list)
    #: Downloads wait for it.
    is_open: asyncio.Event = field(default_factory=asyncio.Event)

    async def paint(self, *loras: LoraUse, **changes: Any) -> Pixels:
        made = (await self.replica.events(asked(loras=loras, **changes)))[-1]
        assert isinstance(made, Images)
        return made.images[0]

    @property
    def told(self) -> set[str]:
        """What Serve is told of what the replica has, or will have in a moment."""
        wrapper = getattr(self.replica._adapters.__wrapped__, "__serve_multiplex_wrapper")
        return set(wrapper._get_loading_and_loaded_model_ids())


@pytest.fixture
def kept(engine: Sdxl, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Kept]:
    """Makes one that keeps so many."""
    here = SimpleNamespace(app_name="app", deployment="Generator", replica_id="r")
    monkeypatch.setattr(multiplex, "_get_internal_replica_context", lambda: here)
    monkeypatch.setattr(multiplex._ModelMultiplexWrapper, "_push_model_ids_info", lambda self: None)

    def make(cached: int) -> Kept:
        url = f"memory:{uuid.uuid4().hex}"
        settings = Settings(
            variants={"telea": {}}, generators={"fake": {}}, blobs=url, loras=LoraSettings(cached=cached)
        )
        kept = Kept(Replica(settings, engine=engine), MemoryBlobStore(url))
        kept.is_open.set()
        download = MemoryBlobStore.download

        async def noted(self: MemoryBlobStore, path: str, to: Any) -> BlobInfo:
            kept.downloads.append(path)
            await kept.is_open.wait()
            return await download(self, path, to)

        monkeypatch.setattr(MemoryBlobStore, "download", noted)
        return kept

    return make


async def test_a_replica_keeps_what_it_has_verified(kept: Callable[[int], Kept]) -> None:
    studio = kept(2)
    a, b, c = [await put(studio.blobs, lora_file(seed)) for seed in (1, 2, 3)]
    first = await studio.paint(a, b)
    # By its hash: the path of another registration of the same file is not read, nor what became of it.
    await studio.blobs.delete(a.path)
    elsewhere = a.model_copy(update={"path": "gone", "id": "m"})
    assert same(await studio.paint(elsewhere, b), first)
    assert studio.downloads == [a.path, b.path] and studio.told == {a.key, b.key}
    # The least recently used goes.
    await studio.paint(b)
    await studio.paint(c)
    assert studio.told == {b.key, c.key}
    with pytest.raises(UnknownModel):
        await studio.paint(a)
    assert a.key not in studio.told
    assert not same(await studio.paint(), first)


async def test_what_is_forgotten_in_the_middle_of_a_painting_is_in_it_to_the_end(kept: Callable[[int], Kept]) -> None:
    studio = kept(1)
    a, b = [await put(studio.blobs, lora_file(seed)) for seed in (1, 2)]
    alone, base = await studio.paint(a, steps=6), await studio.paint(steps=6)
    painting = studio.replica.generate(asked(loras=[a], steps=6))
    assert isinstance(await anext(painting), Progress)
    tensors = [weakref.ref(layer.up) for layer in (await studio.replica._adapter(a)).layers.values()]
    await studio.replica._adapter(b)
    assert studio.told == {b.key}
    *_, made = [event async for event in painting]
    assert isinstance(made, Images) and same(made.images[0], alone)
    del painting, made
    # The thread that painted lets go of them in a moment.
    async with asyncio.timeout(10):
        while any(tensor() is not None for tensor in tensors):
            gc.collect()
            await asyncio.sleep(0.01)
    assert same(await studio.paint(steps=6), base)


async def test_a_slow_download_keeps_no_gpu_and_ends_if_its_job_is_canceled(kept: Callable[[int], Kept]) -> None:
    studio = kept(2)
    a, b = [await put(studio.blobs, lora_file(seed)) for seed in (1, 2)]
    studio.is_open.clear()
    waiting = asyncio.create_task(studio.paint(a))
    async with asyncio.timeout(10):
        while not studio.downloads:
            await asyncio.sleep(0.01)
    await studio.paint()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    studio.is_open.set()
    await studio.paint(a, b)
    assert studio.downloads == [a.path, b.path] and studio.told == {a.key, b.key}


async def test_what_jobs_that_were_canceled_waited_for_is_not_loaded(kept: Callable[[int], Kept]) -> None:
    """Loads wait for one another: those that nobody wants would hold up the others."""
    studio = kept(4)
    a, b, c = [await put(studio.blobs, lora_file(seed)) for seed in (1, 2, 3)]
    studio.is_open.clear()
    first = asyncio.create_task(studio.paint(a))
    while not studio.downloads:
        await asyncio.sleep(0.01)
    left = [asyncio.create_task(studio.paint(lora)) for lora in (b, b, c)]
    await asyncio.sleep(0.01)
    for waiting in left[1:]:
        waiting.cancel()
    await asyncio.gather(*left[1:], return_exceptions=True)
    studio.is_open.set()
    await asyncio.gather(first, left[0])
    await studio.paint(a)
    assert studio.downloads == [a.path, b.path] and studio.told == {a.key, b.key}


async def test_a_failed_load_leaves_nothing(kept: Callable[[int], Kept]) -> None:
    studio = kept(2)
    a = await put(studio.blobs, lora_file(1))
    first = await studio.paint(a)
    swapped = await put(studio.blobs, bytes(a.size_bytes), "swapped", sha256="0" * 64)
    for _ in range(2):
        with pytest.raises(LoraChanged):
            await studio.paint(swapped)
    assert studio.told == {a.key}
    assert same(await studio.paint(a), first)


def test_a_request_goes_to_where_its_largest_lora_is() -> None:
    class Handle:
        def options(self, **options: Any) -> Any:
            return options

    handle: Any = Handle()
    small, large = (
        LoraUse(id=name, name=name, path=name, sha256=name, size_bytes=size) for name, size in (("s", 1), ("l", 2))
    )
    assert _routed(handle, asked(loras=[small, large])) == {"multiplexed_model_id": "l"}
    assert _routed(handle, asked()) is handle
