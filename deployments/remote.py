"""Painter and PromptEncoder over Serve handles."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.engine.prompts import PromptCache
from serve_app.engine.weights import base_revision
from serve_app.errors import GpuLost, PaintError, ReplicaLost, UnknownVariant, VariantLoadFailed, VariantNotReady
from serve_app.ports import OnProgress, Painted, PaintRequest
from serve_app.settings import Settings

from .loading import sources
from .readiness import VariantWatch


class RemotePainter:
    """The Painter port over one handle per variant."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], watch: VariantWatch) -> None:
        self._watch = watch
        # Made once: each options() call would make a router of its own.
        self._paint = {name: h.options(stream=True, method_name="paint") for name, h in handles.items()}

    def is_ready(self, variant: str) -> bool:
        state = self._watch.states.get(variant)
        return state is not None and state.state == "ready"

    async def paint(self, variant: str, request: PaintRequest, on_progress: OnProgress) -> Painted:
        if variant not in self._paint:
            raise UnknownVariant(f"variant {variant!r} is not served here; there are {', '.join(self._paint)}")
        stream = self._paint[variant].remote(request)
        painted: Painted | None = None
        try:
            with _typed_errors(f"the replica of {variant} that painted"):
                async for item in stream:
                    if isinstance(item, Painted):
                        painted = item
                    else:
                        await on_progress(item)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except (VariantLoadFailed, VariantNotReady, GpuLost):
            self._watch.doubt(variant)
            raise
        if painted is None:
            raise PaintError(f"variant {variant} ended without a picture")
        return painted


class RemotePrompts:
    """The PromptEncoder port: the cache first, then the TextEncoder of the variant's base model."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], cache: PromptCache, settings: Settings) -> None:
        self._encode = {base: h.options(method_name="encode") for base, h in handles.items()}
        self._cache, self._settings, self._sources = cache, settings, sources(settings)

    async def encode(self, variant: str, prompt: str) -> bytes | None:
        row = self._settings.variant(variant)
        if not row.takes_prompt:
            return None

        async def ask() -> bytes:
            with _typed_errors(f"the text encoder of {row.base}"):
                embeddings: bytes = await self._encode[str(row.base)].remote(prompt, row.max_prompt_tokens)
            return embeddings

        return await self._cache.get_or_encode(row, base_revision(row, self._sources), prompt, ask)


@contextmanager
def _typed_errors(who: str) -> Iterator[None]:
    """Ray's wrappers taken off: the application's own error where there is one, else ReplicaLost."""
    try:
        yield
    except (RayError, RayServeException) as e:
        # Also a task's cause may be Ray's, such as a picture that was lost with the node that held it.
        cause = e.cause if isinstance(e, RayTaskError) else e
        if isinstance(cause, Exception) and not isinstance(cause, (RayError, RayServeException)):
            raise cause from None
        why = str(cause).partition("\n")[0]
        raise ReplicaLost(f"{who} is gone: {type(cause).__name__}: {why}") from e
