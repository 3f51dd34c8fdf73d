"""Steps that reuse what an earlier step computed: diffusers' caches, one row for each kind of `settings.StepCache`.

They are not exact. What a run leaves behind is one user's picture, so it ends with the run, however that ends.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry

from ...settings import FirstBlockCache, StepCache, TaylorSeerCache


def _first_block(cache: FirstBlockCache) -> FirstBlockCacheConfig:
    return FirstBlockCacheConfig(threshold=cache.threshold)


def _taylor_seer(cache: TaylorSeerCache) -> TaylorSeerCacheConfig:
    # Lite: only the model's own output is kept. The full kind keeps two copies of every attention's, 3 GB for FLUX.1 at
    # 1024², computes the rest of each block all the same, and breaks the graphs of compiled blocks.
    return TaylorSeerCacheConfig(
        use_lite_mode=True,
        cache_interval=cache.interval,
        disable_cache_before_step=cache.first_steps,
        max_order=cache.order,
        taylor_factors_dtype=torch.float32,
    )


#: Only what needs no calibration (MagCache does), and works beside compiled blocks: hooks inside blocks (Pyramid
#: Attention Broadcast, FasterCache) break their graphs. SeaCache knows video models only.
_CONFIGS: Mapping[str, Callable[[Any], Any]] = {"first_block": _first_block, "taylor_seer": _taylor_seer}


def enable(transformer: Any, cache: StepCache) -> None:
    """Once, after `compiled.compile_blocks`: the caches' hooks belong outside the graphs."""
    transformer.enable_cache(_CONFIGS[cache.kind](cache))


@contextmanager
def one_run(transformer: Any) -> Iterator[None]:
    """A run of a transformer goes in here: it begins with an empty cache and leaves one, also when it is broken off."""
    if not transformer.is_cache_enabled:
        yield
        return
    hooks = HookRegistry.check_if_exists_or_initialize(transformer)
    # The pipeline empties the caches only when it comes to its end.
    hooks.reset_stateful_hooks()
    try:
        with transformer.cache_context("cond"):
            yield
    finally:
        hooks.reset_stateful_hooks()
