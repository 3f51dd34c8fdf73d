"""A studio whose pictures real pipelines make, with tiny weights and with LoRAs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serve_app.engine import families
from serve_app.engine.generating import LocalGenerator
from serve_app.engine.lora import host
from serve_app.engine.lora.apart import CheckedApart
from serve_app.engine.weights import fetch
from serve_app.models import BUILT_IN, LoraFacts, Variant
from serve_app.settings import GeneratorSettings, LoraSettings, Secrets, WeightsSettings

from .test_generate import Studio


@dataclass(frozen=True)
class TinyStudios:
    """Engines belong to the event loop in which a studio is made; the weights are written once."""

    cache: Path
    weights: dict[str, fetch.Weights]
    text_encoders: Path

    def __call__(self, model: str, *, stores: tuple[Any, Any], **given: Any) -> Studio:
        """With the tiny model of this name alone, unless others are given as `generators`."""
        engine = families.create(model, BUILT_IN[model], self.weights[model], GeneratorSettings())
        adapter_of = partial(host.fetched, blobs=stores[0], engine=engine, settings=LoraSettings())
        studio = Studio(
            stores=stores,
            painter=LocalGenerator(model, engine, adapter_of),
            prompts=Encoded(self.text_encoders),
            **{"generators": {model: {}}, "weights": {"cache": self.cache}, **given},
        )
        studio.loras._checker = CheckedHere(studio.settings)
        return studio


class CheckedHere(CheckedApart):
    """The same check in this process, which has imported torch already."""

    async def check(self, file: Path, *, alpha: float | None) -> LoraFacts:
        from serve_app.engine.lora import check

        cache, models = Path(self._asked["cache"]), [Variant.model_validate(model) for model in self._asked["models"]]
        looked = partial(check.check, file, models, alpha=alpha, max_rank=self._asked["max_rank"], cache=cache)
        return await asyncio.to_thread(looked)


class Encoded:
    """FLUX.1's prompts, by the tiny text encoders."""

    def __init__(self, base: Path) -> None:
        from serve_app.engine.flux.text_encoder import TextEncoder

        self._encoder, self._is_loaded = TextEncoder(base, threads=2), False

    async def encode(self, variant: str, prompt: str) -> bytes | None:
        if not BUILT_IN[variant].takes_prompt:
            return None
        return await asyncio.to_thread(self._encode, prompt, BUILT_IN[variant].max_prompt_tokens)

    def _encode(self, prompt: str, max_tokens: int) -> bytes:
        if not self._is_loaded:
            self._encoder.load()
            self._is_loaded = True
        return self._encoder.encode(prompt, max_tokens)


@pytest.fixture(scope="module")
def tiny_studio(tmp_path_factory: pytest.TempPathFactory) -> TinyStudios:
    pytest.importorskip("diffusers")
    cache = tmp_path_factory.mktemp("weights")
    sources = fetch.Sources.of(WeightsSettings(cache=cache), Secrets())

    async def fetched() -> TinyStudios:
        weights = {name: await fetch.fetch(BUILT_IN[name], sources) for name in ("tiny-flux-dev", "tiny-sdxl")}
        return TinyStudios(cache, weights, await fetch.fetch_text_encoders(BUILT_IN["tiny-flux-dev"], sources))

    # In a thread, because Playwright's loop may run in this one.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(fetched())).result()
