"""ImageModel and PromptEncoder over Serve handles, and what an audit asks of the same replicas."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app.engine.prompts import PromptCache
from serve_app.engine.weights.fetch import base_revision
from serve_app.errors import (
    FluxFillError,
    GpuLost,
    PaintError,
    ReplicaLost,
    UnknownVariant,
    VariantLoadFailed,
    VariantNotReady,
)
from serve_app.models import EditRequest, GenerateRequest, Images, Measured, OnProgress
from serve_app.settings import Settings

from .loading import sources
from .readiness import VariantWatch

T = TypeVar("T")
R = TypeVar("R", EditRequest, GenerateRequest)


class RemoteModel(Generic[R]):
    """The ImageModel port over the handle of one variant, or of one generator."""

    def __init__(self, name: str, handle: DeploymentHandle, watch: VariantWatch, method: str = "paint") -> None:
        self._name, self._watch = name, watch
        # The first options() of a handle makes its router, which those that are made from this one share.
        self._run = handle.options(stream=True, method_name=method)

    @property
    def is_ready(self) -> bool:
        return self._watch.states[self._name].state == "ready"

    async def run(self, request: R, on_progress: OnProgress) -> Images:
        try:
            return await _last(_routed(self._run, request).remote(request), self._name, Images, on_progress)
        except (VariantLoadFailed, VariantNotReady, GpuLost):
            self._watch.doubt(self._name)
            raise


class RemoteTrials:
    """`Inpainter.measure` over one handle per variant."""

    def __init__(self, handles: Mapping[str, DeploymentHandle]) -> None:
        self._measure = {name: h.options(stream=True, method_name="measure") for name, h in handles.items()}

    async def measure(
        self, variant: str, request: EditRequest | ObjectRef, on_progress: OnProgress, *, trials: int, places: int
    ) -> Measured:
        """As `Replicas.measure` of the audit says. The request may be one that was put into Ray's object store."""
        if variant not in self._measure:
            known = ", ".join(self._measure)
            raise UnknownVariant(f"variant {variant!r} is not served here; there are {known}")
        stream = self._measure[variant].remote(request, trials, places)
        return await _last(stream, variant, Measured, on_progress)


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
            try:
                with typed_errors(f"the text encoder of {row.base}"):
                    embeddings: bytes = await self._encode[str(row.base)].remote(prompt, row.max_prompt_tokens)
            except ReplicaLost as e:
                # Most of those whom it was lost to only waited for it.
                raise VariantNotReady(e.message) from e
            return embeddings

        return await self._cache.get_or_encode(row, base_revision(row, self._sources), prompt, ask)


def _routed(handle: DeploymentHandle, request: EditRequest | GenerateRequest) -> DeploymentHandle:
    """To a replica that has the largest LoRA of the request, if one is free."""
    if isinstance(request, EditRequest) or not request.loras:
        return handle
    largest = max(request.loras, key=lambda use: use.size_bytes)
    return handle.options(multiplexed_model_id=largest.key)


async def _last(stream: DeploymentResponseGenerator, variant: str, kind: type[T], on_progress: OnProgress) -> T:
    """The result, of type `kind`, of a stream of progress that ends with it, or with an error that is to be raised.

    Raises ReplicaLost where the replica was lost at work; VariantNotReady where it had not begun, which a replica
    reports first.
    """
    result: T | FluxFillError | None = None
    began = False
    try:
        with typed_errors(f"the replica of {variant} that painted"):
            async for item in stream:
                if isinstance(item, (kind, FluxFillError)):
                    result = item
                else:
                    began = True
                    await on_progress(item)
    except ReplicaLost as e:
        if began:
            raise
        raise VariantNotReady(f"{e.message}; it had not started the job") from e
    except asyncio.CancelledError:
        stream.cancel()
        raise
    if isinstance(result, FluxFillError):
        raise result
    if result is None:
        raise PaintError(f"variant {variant} ended without a picture")
    return result


@contextmanager
def typed_errors(who: str) -> Iterator[None]:
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
