"""The only place that loads T5 and CLIP: one deployment per base model."""

import asyncio
from typing import TYPE_CHECKING

from serve_app.engine import weights
from serve_app.settings import Settings
from serve_app.telemetry import configure_logging
from serve_app.variants import Variant

from .loading import Loading, sources

if TYPE_CHECKING:
    from serve_app.engine.text_encoder import TextEncoder as Encoder


def open_encoder(variant: Variant, settings: Settings) -> "Encoder":
    """The loaded text encoders of the variant's base model. Raises WeightsError, and what torch raises."""
    # Its packages are an extra's: an app whose variants take no prompt runs without them.
    from serve_app.engine.text_encoder import TextEncoder as Encoder

    row = settings.text_encoder
    folder = asyncio.run(weights.fetch_text_encoders(variant, sources(settings)))
    encoder = Encoder(folder, threads=row.threads, wants_gpu=row.num_gpus > 0)
    encoder.load()
    return encoder


class TextEncoder:
    """Encodes prompts, one at a time. Sleeps most of the day: the ingress asks its cache first."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        configure_logging()
        self._loading = Loading(f"the text encoder of {variant.base}", lambda: open_encoder(variant, settings))
        self._lock = asyncio.Lock()

    async def encode(self, prompt: str, max_tokens: int) -> bytes:
        """safetensors bytes as `ports.PaintRequest.embeddings` wants them.

        Raises VariantLoadFailed with the reason.
        """
        encoder = self._loading.value
        await self._lock.acquire()
        work = asyncio.ensure_future(asyncio.to_thread(encoder.encode, prompt, max_tokens))
        # By the thread's end, not by this coroutine's: a canceled request leaves its thread running.
        work.add_done_callback(lambda _: self._lock.release())
        return await asyncio.shield(work)

    async def __del__(self) -> None:
        await self._loading.close(lambda encoder: encoder.close())
