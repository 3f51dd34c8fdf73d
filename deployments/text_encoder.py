"""The only place that loads T5 and CLIP: one deployment per base model."""

import asyncio
import time
from typing import TYPE_CHECKING

from serve_app.engine.weights import fetch
from serve_app.errors import GpuLost, InferenceTimeout
from serve_app.models import Variant
from serve_app.settings import Settings
from serve_app.telemetry import Metrics, configure_logging

from .loading import Loading, sources
from .metrics import RayMetrics

if TYPE_CHECKING:
    from serve_app.engine.flux.text_encoder import TextEncoder as Encoder


def open_encoder(variant: Variant, settings: Settings) -> "Encoder":
    """The loaded text encoders of the variant's base model. Raises WeightsError, and what torch raises."""
    # Its packages are an extra's: an app whose variants take no prompt runs without them.
    from serve_app.engine.flux.text_encoder import TextEncoder as Encoder

    row = settings.text_encoder
    folder = asyncio.run(fetch.fetch_text_encoders(variant, sources(settings)))
    encoder = Encoder(folder, threads=row.threads, wants_gpu=row.num_gpus > 0)
    encoder.load()
    return encoder


class TextEncoder:
    """Encodes prompts, one at a time. Sleeps most of the day: the ingress asks its cache first."""

    def __init__(self, variant: Variant, settings: Settings, metrics: Metrics | None = None) -> None:
        configure_logging()
        what = f"the text encoder of {variant.base}"
        self._loading: Loading[Encoder] = Loading(
            what, lambda: open_encoder(variant, settings), lambda encoder: encoder.close(), metrics or RayMetrics()
        )
        self._work = settings.work
        self._lock = asyncio.Lock()
        #: Since when a prompt has been encoded, on the monotonic clock; None while none is.
        self._since: float | None = None

    async def encode(self, prompt: str, max_tokens: int) -> bytes:
        """safetensors bytes as `EditRequest.embeddings` wants them.

        Raises VariantLoadFailed with the reason; InferenceTimeout where encoding itself takes longer than
        `work.inference_timeout_s`; OutOfMemory, GpuLost, PaintError.
        """
        encoder = self._loading.value
        await self._lock.acquire()
        self._since = time.monotonic()
        work = asyncio.ensure_future(asyncio.to_thread(encoder.encode, prompt, max_tokens))
        # By the thread's end, not by this coroutine's: a canceled request leaves its thread running.
        work.add_done_callback(self._end)
        limit_s = self._work.inference_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(work)
        except TimeoutError as e:
            raise InferenceTimeout(f"encoding the prompt took longer than {limit_s:g} s", limit_s=limit_s) from e
        except GpuLost as e:
            self._loading.lose(e)
            raise

    def _end(self, _: object) -> None:
        self._since = None
        self._lock.release()

    def check_health(self) -> None:
        """Raises when Serve is to replace the replica: GpuLost when its GPU failed for good; RuntimeError when it has
        encoded a prompt for longer than anyone waits."""
        self._loading.check_health()
        limit_s = self._work.inference_timeout_s + self._work.engine_stop_timeout_s
        if self._since is not None and time.monotonic() - self._since > limit_s:
            raise RuntimeError(f"the text encoder has been encoding one prompt for more than {limit_s:g} s")

    async def __del__(self) -> None:
        await self._loading.close()
