"""A replica of a generator, which makes pictures from prompts."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray import serve

from serve_app import adapters, engine
from serve_app.engine.generating import generating
from serve_app.engine.lora import host
from serve_app.errors import Canceled
from serve_app.models import GenerateRequest, Images, LoraUse, Progress
from serve_app.settings import Settings
from serve_app.telemetry import Metrics

from .replica import Replica

if TYPE_CHECKING:
    from serve_app.engine.lora.adapter import Adapter


@dataclass
class _Wanted:
    use: LoraUse
    by_a_job: bool = True


#: What is loaded for a key, which is all that Serve tells a loader.
_WANTED: ContextVar[_Wanted] = ContextVar("wanted")


class Generator(Replica[engine.Generator]):
    """Answers `generate` with progress and then the picture. Keeps LoRAs in host memory, and tells Serve which, so that
    jobs that use them come here. Serve forgets the least recently used; paintings hold their own."""

    def __init__(self, name: str, settings: Settings, metrics: Metrics | None = None) -> None:
        super().__init__(name, settings, metrics)
        blobs = adapters.blob_store(settings.blobs, settings.public_url)

        async def load(_key: str) -> "Adapter":
            wanted = _WANTED.get()
            # Loads wait for one another.
            if not wanted.by_a_job:
                raise Canceled("no job waits for this LoRA any more")
            return await host.fetched(wanted.use, blobs=blobs, engine=self._loading.value, settings=settings.loras)

        self._adapters = serve.multiplexed(max_num_models_per_replica=settings.loras.cached)(load)

    async def _adapter(self, use: LoraUse) -> "Adapter":
        wanted = _Wanted(use)

        async def load() -> "Adapter":
            _WANTED.set(wanted)
            adapter: Adapter = await self._adapters(use.key)
            return adapter

        try:
            # Of a load that is canceled Serve would tell for ever that it goes on here.
            return await asyncio.shield(load())
        finally:
            wanted.by_a_job = False

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Progress | Images, None]:
        """As `Inpainter.paint`. Also raises what `host.fetched` raises."""
        events = generating(self._loading.value, request, self._slot, self._out_of_memory, adapter_of=self._adapter)
        async with aclosing(self._streamed(request, events)) as told:
            async for event in told:
                yield event
