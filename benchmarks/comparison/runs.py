"""Runs the recipe and the service by turns, and reduces what was measured to figures."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from serve_app.engine.flux import compiled

from .counts import Calls, Flops, Size, unpacked_bytes
from .memory import Storages
from .meter import Laps, Meter

PARTS = ("step", "vae_encode", "vae_decode", "text")
#: A CPU without arithmetic for bfloat16 takes about 80 s a round, and a median needs three.
_ENOUGH, _ENOUGH_S = 3, 180


@dataclass(frozen=True, slots=True)
class Run:
    """One edit."""

    job_s: float
    laps: Laps
    #: Graphs that were compiled meanwhile.
    graphs: int

    def seconds(self, part: str) -> float:
        return sum(self.laps.get(part, ()))

    def calls(self, part: str) -> int:
        return len(self.laps.get(part, ()))


@dataclass(kw_only=True, slots=True)
class Contender:
    """One way to do an edit."""

    edit: Callable[[], object]
    meter: Meter
    #: The transformer first.
    models: Sequence[nn.Module]
    #: Sizes that the transformer paints.
    windows: Sequence[Size]
    device: torch.device
    dtype: torch.dtype
    #: Held in host memory besides the models.
    host_bytes: int = 0
    #: Compiled blocks unpack weights as they multiply: what diffusers' kernels would move is not moved.
    is_compiled: bool = False
    #: Measured ones.
    runs: list[Run] = field(default_factory=list)
    peak_bytes: int = 0

    def warm_up(self) -> None:
        """Twice, unmeasured: the first compiles what is to be compiled, of the second the peak of memory is kept."""
        self._run()
        self.peak_bytes = _peak_bytes(self._run, self.models, self.device)
        if self.device.type == "cpu":
            self.peak_bytes += self.host_bytes

    def measure(self) -> None:
        self.runs.append(self._run())

    def _run(self) -> Run:
        self.meter.laps()
        graphs, started_s = compiled.graphs(), self.meter.now_s()
        self.edit()
        job_s = self.meter.now_s() - started_s
        return Run(job_s, self.meter.laps(), compiled.graphs() - graphs)

    def figures(self, flops: Flops, *, steps: int, counted_steps: int) -> dict[str, Any]:
        """Seconds are of edits of `steps`, FLOPs of one of `counted_steps`.

        `peak_gb` is the device's; on a CPU with what is held on the host. `unpacked_gb_per_step` is None where
        compiled blocks unpack.
        """
        run = self.runs[0]
        calls = Calls(
            windows=self.windows,
            vae_encodes=run.calls("vae_encode"),
            vae_decodes=run.calls("vae_decode"),
            texts=run.calls("text"),
        )
        step_s = _spread(each.seconds("step") / steps for each in self.runs)
        return {
            "windows": [f"{width}x{height}" for width, height in self.windows],
            "step_s": step_s,
            "job_s": _spread(each.job_s for each in self.runs),
            "parts_s": {part: round(statistics.median(each.seconds(part) for each in self.runs), 4) for part in PARTS},
            "tflop": {part: round(count / 1e12, 4) for part, count in flops.of(calls, counted_steps).items()},
            "tflop_per_s": round(sum(map(flops.step, self.windows)) / 1e12 / step_s["median"], 3),
            "text_encoder_calls": sum(each.calls("text") for each in self.runs),
            "vae_calls": calls.vae_encodes + calls.vae_decodes,
            "unpacked_gb_per_step": self._unpacked_gb(),
            "peak_gb": round(self.peak_bytes / 1e9, 3),
            "recompiles": sum(each.graphs for each in self.runs),
        }

    def _unpacked_gb(self) -> float | None:
        moved = len(self.windows) * unpacked_bytes(self.models[0], self.dtype)
        return None if moved and self.is_compiled else round(moved / 1e9, 4)


def by_turns(contenders: Iterable[Contender], rounds: int) -> None:
    """Warmed up first, then measured one after the other, round by round: what slows the machine slows all.

    After `_ENOUGH` rounds, none begins later than `_ENOUGH_S` after the first.
    """
    contenders = list(contenders)
    for contender in contenders:
        contender.warm_up()
    started_s = time.monotonic()
    for number in range(rounds):
        if number >= _ENOUGH and time.monotonic() - started_s > _ENOUGH_S:
            break
        for contender in contenders:
            contender.measure()


def compared(recipe: Mapping[str, Any], service: Mapping[str, Any]) -> dict[str, Any]:
    """How many times cheaper the service's figures are: FLOPs of a whole edit, seconds of a step and of an edit."""
    flops = [sum(side["tflop"].values()) for side in (recipe, service)]
    return {
        "flops_ratio": round(flops[0] / flops[1], 3),
        "wall_ratio": round(recipe["step_s"]["median"] / service["step_s"]["median"], 3),
        "job_ratio": round(recipe["job_s"]["median"] / service["job_s"]["median"], 3),
        "text_encoder_calls": service["text_encoder_calls"],
    }


def matmul_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Of the largest product that is quick on the device: 8192³ on a GPU, 2048³ on a CPU; the median of 20."""
    side = 8192 if device.type == "cuda" else 2048
    now_s = Meter(device).now_s
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def once_s() -> float:
        started_s = now_s()
        torch.matmul(a, b)
        return now_s() - started_s

    for _ in range(3):
        once_s()
    return 2 * side**3 / statistics.median(once_s() for _ in range(20)) / 1e12


def _spread(seconds: Iterable[float]) -> dict[str, Any]:
    runs_s = [round(each_s, 4) for each_s in seconds]
    return {"median": round(statistics.median(runs_s), 4), "min": min(runs_s), "max": max(runs_s), "runs_s": runs_s}


def _peak_bytes(work: Callable[[], object], models: Sequence[nn.Module], device: torch.device) -> int:
    """Of these models on the device, and of what the work takes there besides."""
    if device.type == "cuda":
        others = torch.cuda.memory_allocated() - _bytes(models, device)
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - others
    storages = Storages()
    storages.hold([list(model.parameters()) for model in models])
    # Compiled code allocates where nobody sees it; uncompiled it takes at least as much.
    with torch.compiler.set_stance("force_eager"), storages:
        work()
    return storages.peak()


def _bytes(models: Sequence[nn.Module], device: torch.device) -> int:
    parameters: list[Tensor] = [one for model in models for one in model.parameters()]
    return sum(one.nbytes for one in parameters if one.device.type == device.type)
