"""An edit as the service does it, from the mask to the pasted photo, without what carries it: queue, stores, Ray."""

import asyncio
from collections.abc import Sequence

import torch

from serve_app.adapters.memory import MemoryBlobStore
from serve_app.edit.paste import cut, grow, growth_px, paste
from serve_app.edit.windows import Plan, plan
from serve_app.engine.flux.fill import FluxFill
from serve_app.engine.flux.text_encoder import TextEncoder
from serve_app.engine.flux2.klein import Klein
from serve_app.engine.painting import paint_canvas
from serve_app.engine.prompts import PromptCache
from serve_app.engine.weights.fetch import Weights
from serve_app.models import EditRequest, Pixels, Variant
from serve_app.settings import Inference, VariantSettings, WindowSettings

from .meter import Meter
from .runs import Contender
from .scenarios import Scenario

WINDOWS = WindowSettings()


def planned(scenario: Scenario) -> Plan:
    """With the default settings."""
    mask = scenario.painted()
    grown_px = growth_px(mask, WINDOWS.mask_grow)
    found = plan(_grown(mask), scenario.strategy, WINDOWS, grown_px=grown_px, family=scenario.family)
    assert found is not None, "the mask is empty"
    return found


def _grown(mask: Pixels) -> Pixels:
    return grow(mask, growth_px(mask, WINDOWS.mask_grow))


class Service:
    """The engine that a scenario asks for, and an empty prompt cache."""

    def __init__(
        self,
        weights: Weights,
        scenario: Scenario,
        *,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        self._base, self._threads = weights.base, threads
        self._variant = Variant(
            family=scenario.family,
            file=str(weights.transformer),
            base=str(weights.base),
            repack=scenario.repack,
            num_gpus=1 if device.type == "cuda" else 0,
        )
        served = VariantSettings(optimizations=scenario.optimizations, threads=threads)
        exact = {"adaln_once": scenario.adaln_once, "one_encode": scenario.one_encode}
        self._engine: FluxFill | Klein = (
            FluxFill(self._variant, weights, served, dtype=dtype, **exact)
            if scenario.family == "flux-fill"
            else Klein(self._variant, weights, served, dtype=dtype)
        )
        self._engine.load()
        self._prompts = PromptCache(MemoryBlobStore())
        self._device, self._dtype, self._meter = device, dtype, Meter(device)
        self._is_compiled = scenario.optimizations.compile
        # An engine shows nobody its parts; only a benchmark has to look inside.
        self._pipeline, modulation = self._engine._pipeline, self._engine._modulation
        self._host_bytes = modulation.host_bytes if modulation is not None else 0
        self._meter.watch_pipeline(self._pipeline)
        self._meter.watch("text", self, "_encode")

    def warm_up(self, scenarios: Sequence[Scenario]) -> None:
        sizes = {(window.width, window.height) for one in scenarios for window in planned(one).windows}
        self._engine.warm_up(sorted(sizes))

    def contender(self, scenario: Scenario, asked: Inference) -> Contender:
        photo, mask = scenario.photo(), _grown(scenario.painted())
        return Contender(
            edit=lambda: self._edit(photo, mask, scenario, asked),
            meter=self._meter,
            models=[self._pipeline.transformer, self._pipeline.vae],
            windows=[(window.width, window.height) for window in planned(scenario).windows],
            device=self._device,
            dtype=self._dtype,
            host_bytes=self._host_bytes,
            is_compiled=self._is_compiled,
        )

    def _edit(self, photo: Pixels, mask: Pixels, scenario: Scenario, asked: Inference) -> Pixels:
        found = planned(scenario)
        canvas, canvas_mask = cut(photo, mask, found, WINDOWS.feather_px)
        request = EditRequest(
            job_id="benchmark",
            canvas=canvas,
            mask=canvas_mask,
            windows=found.windows,
            steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            seed=0,
            embeddings=asyncio.run(self._embeddings(asked.prompt)) if self._variant.takes_prompt else None,
        )
        painted = paint_canvas(self._engine, request, lambda progress: None)
        return paste(photo, painted.images[0], mask, found, WINDOWS.feather_px)

    def close(self) -> None:
        self._pipeline = None
        self._engine.close()

    async def _embeddings(self, prompt: str) -> bytes:
        async def encode() -> bytes:
            return self._encode(prompt)

        return await self._prompts.get_or_encode(self._variant, None, prompt, encode)

    def _encode(self, prompt: str) -> bytes:
        """On the CPU, and gone afterwards, as where the text encoder's deployment scales to zero."""
        encoder = TextEncoder(self._base, threads=self._threads)
        encoder.load()
        encoded = encoder.encode(prompt, self._variant.max_prompt_tokens)
        encoder.close()
        return encoded
