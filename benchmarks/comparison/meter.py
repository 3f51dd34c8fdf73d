"""Counts the calls of a pipeline's parts, and times them."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch

#: Seconds of each call, by part.
Laps = Mapping[str, Sequence[float]]


class Meter:
    """Watches methods; `laps` gives what was seen since it was last asked."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._laps: defaultdict[str, list[float]] = defaultdict(list)

    def watch(self, part: str, owner: Any, method: str) -> None:
        """From now on: the device's work is waited for before and after each call."""
        called = getattr(owner, method)

        @wraps(called)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = self.now_s()
            returned = called(*args, **kwargs)
            self._laps[part].append(self.now_s() - started_s)
            return returned

        setattr(owner, method, timed)

    def watch_pipeline(self, pipeline: Any) -> None:
        """Its transformer's steps and its VAE."""
        self.watch("step", pipeline.transformer, "forward")
        self.watch("vae_encode", pipeline.vae, "encode")
        self.watch("vae_decode", pipeline.vae, "decode")

    def laps(self) -> Laps:
        seen, self._laps = dict(self._laps), defaultdict(list)
        return seen

    def now_s(self) -> float:
        self._wait()
        return time.perf_counter()
