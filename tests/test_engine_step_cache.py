"""Step caching: what it saves, and that nothing of one user's run reaches another's."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from pydantic import ValidationError

from serve_app.engine.flux.fill import FluxFill
from serve_app.engine.flux.step_cache import _CONFIGS
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.errors import Canceled
from serve_app.settings import FirstBlockCache, Optimizations, StepCache, TaylorSeerCache

from .engine_fixtures import flux_fill, photo, window

SIDE, STEPS, BLOCKS = 64, 6, 6
#: Every one skips steps of the tiny model.
CACHES: dict[str, StepCache] = {
    "first_block": FirstBlockCache(threshold=1.0),
    "taylor_seer": TaylorSeerCache(interval=2, first_steps=2),
}


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest) -> StepCache:
    return CACHES[request.param]


@pytest.fixture
def block_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by one for each block that computes."""
    ran: list[str] = []
    for kind in (FluxTransformerBlock, FluxSingleTransformerBlock):
        monkeypatch.setattr(kind, "forward", counting(kind.forward, ran))
    yield ran


def counting(forward: Callable[..., Any], ran: list[str]) -> Callable[..., Any]:
    from functools import wraps

    @wraps(forward)
    def counted(self: Any, *given: Any, **named: Any) -> Any:
        ran.append(type(self).__name__)
        return forward(self, *given, **named)

    return counted


def loaded(tiny: TinyWeights, cache: StepCache | None, **optimizations: Any) -> FluxFill:
    engine = flux_fill(tiny, step_cache=cache, unpack=True, **optimizations)
    engine.load()
    return engine


def given(embeddings: bytes, **changes: Any) -> Any:
    return window(SIDE, SIDE, **{"embeddings": embeddings, "steps": STEPS, **changes})


def test_every_kind_has_its_row() -> None:
    assert _CONFIGS.keys() == CACHES.keys()


def test_a_tiny_threshold_skips_no_block_and_changes_no_bit(
    tiny: TinyWeights, embeddings: bytes, block_runs: list[str]
) -> None:
    plain = loaded(tiny, None).paint(given(embeddings))
    assert len(block_runs) == STEPS * BLOCKS
    block_runs.clear()
    assert np.array_equal(loaded(tiny, FirstBlockCache(threshold=1e-9)).paint(given(embeddings)), plain)
    assert len(block_runs) == STEPS * BLOCKS


@pytest.mark.parametrize("adaln_once", [True, False])
def test_a_huge_threshold_runs_the_other_blocks_once(
    tiny: TinyWeights, embeddings: bytes, block_runs: list[str], adaln_once: bool
) -> None:
    loaded(tiny, FirstBlockCache(threshold=1.0), adaln_once=adaln_once).paint(given(embeddings))
    assert len(block_runs) == STEPS + (BLOCKS - 1)


@pytest.mark.parametrize(("steps", "strength"), [(STEPS, 1.0), (2 * STEPS, 0.5)])
def test_extrapolated_steps_run_no_block(
    tiny: TinyWeights, embeddings: bytes, block_runs: list[str], steps: int, strength: float
) -> None:
    """Computed are the first two steps that run, and from the fourth on every second: 0, 1, 3, 5."""
    engine = loaded(tiny, TaylorSeerCache(interval=2, first_steps=2))
    engine.paint(given(embeddings, steps=steps, strength=strength))
    assert len(block_runs) == 4 * BLOCKS


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_nothing_of_a_canceled_run_reaches_the_next(
    tiny: TinyWeights, embeddings: bytes, cache: StepCache, steps: int
) -> None:
    alone = loaded(tiny, cache).paint(given(embeddings, seed=2))

    def cancel(step: int) -> None:
        if step == steps:
            raise Canceled("somebody asked")

    shared = loaded(tiny, cache)
    with pytest.raises(Canceled):
        shared.paint(given(embeddings, seed=1, pixels=255 - photo(SIDE, SIDE), on_step=cancel))
    assert kept(shared) == 0
    assert np.array_equal(shared.paint(given(embeddings, seed=2)), alone)


def test_a_run_leaves_nothing_behind(tiny: TinyWeights, embeddings: bytes, cache: StepCache) -> None:
    engine = loaded(tiny, cache)
    during: list[int] = []
    engine.paint(given(embeddings, on_step=lambda step: during.append(kept(engine))))
    assert max(during) > 0
    assert kept(engine) == 0


def kept(engine: FluxFill) -> int:
    """States that the hooks hold."""
    hooks = [
        hook
        for module in engine._pipeline.transformer.modules()
        if hasattr(module, "_diffusers_hook")
        for hook in module._diffusers_hook.hooks.values()
    ]
    return sum(len(hook.state_manager._state_cache) for hook in hooks)


def test_it_is_off_by_default() -> None:
    assert Optimizations().step_cache is None


@pytest.mark.parametrize(
    ("step_cache", "named"),
    [
        ({"kind": "first_block", "interval": 3}, "interval"),
        ({"kind": "taylor_seer", "threshold": 0.1}, "threshold"),
        ({"kind": "first_block", "threshold": 0}, "threshold"),
        ({"kind": "taylor_seer", "interval": 1}, "interval"),
        ({"kind": "mag"}, "kind"),
        ({"threshold": 0.1}, "kind"),
    ],
)
def test_what_a_kind_does_not_know_is_refused(step_cache: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Optimizations.model_validate({"step_cache": step_cache})
