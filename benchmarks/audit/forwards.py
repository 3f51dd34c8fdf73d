"""One forward of a served transformer, on the inputs of a real call: run, explained, and run compiled."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.flux import compiled
from serve_app.engine.flux.fill import FluxFill
from serve_app.engine.flux2.klein import Klein
from serve_app.engine.painting import paint_canvas
from serve_app.models import EditRequest

#: What all turns may take together, in seconds, and how many there are at least and at most.
_BUDGET_S, _LEAST, _MOST = 5.0, 3, 20
_MAX_REASONS = 5


class _Caught(Exception):
    """The transformer was about to run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """What torch's compiler makes of the whole forward."""

    graphs: int
    breaks: int
    #: Where its breaks come from, up to five, each once.
    reasons: tuple[str, ...]


class Forward:
    """The transformer's first forward in a painting, again and again. Compiles for good: close the engine after it."""

    def __init__(self, engine: FluxFill | Klein, request: EditRequest) -> None:
        """Paints the request up to its first step. `engine` is loaded, and its blocks are not compiled.

        Raises as `paint_canvas` does.
        """
        # An engine shows nobody its parts; only an audit has to look inside.
        self._transformer: Any = engine._pipeline.transformer
        self._modulation, self._device = engine._modulation, engine._device
        #: Forwards of one edit: its steps times the windows that are painted.
        self.per_edit = 0
        self._inputs = self._caught(engine, request)

    def _caught(self, engine: FluxFill | Klein, request: EditRequest) -> Mapping[str, Any]:
        inputs: dict[str, Any] = {}

        def catch(_module: Any, _args: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs.update(named)
            raise _Caught

        hook = self._transformer.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            paint_canvas(engine, request, lambda progress: setattr(self, "per_edit", progress.steps))
        except _Caught:
            pass
        finally:
            hook.remove()
        return inputs

    def explained(self) -> Explained:
        """By `torch._dynamo.explain`. Raises what torch's compiler raises."""
        self._at_first_step()
        with torch.inference_mode():
            found = torch._dynamo.explain(self._transformer.forward)(**self._inputs)
        reasons = dict.fromkeys(_told(reason) for reason in found.break_reasons)
        # It counts graphs less one, also where there is none.
        breaks = max(0, found.graph_break_count)
        return Explained(graphs=found.graph_count, breaks=breaks, reasons=tuple(reasons)[:_MAX_REASONS])

    def compile(self) -> None:
        """As `optimizations.compile` does. The next forward takes the time."""
        torch._dynamo.reset()
        compiled.compile_blocks(self._transformer)

    def lap(self) -> tuple[float, Tensor]:
        """Seconds of one forward, by CUDA events where there is a GPU, and its output. Raises what torch raises."""
        self._at_first_step()
        self._device.synchronize()
        started_s, before_ms = time.perf_counter(), self._device.ms
        with torch.inference_mode(), self._device.timed():
            output = self._transformer(**self._inputs)[0]
        if self._device.is_gpu:
            return (self._device.ms - before_ms) / 1000, output
        return time.perf_counter() - started_s, output

    def by_turns(self) -> tuple[float, float]:
        """Seconds of a warm forward, eager and compiled, medians: taken by turns, so that what else the machine does
        meets both alike. Raises what torch raises."""
        turns: list[tuple[float, float]] = []
        while not turns or len(turns) < min(max(int(_BUDGET_S / sum(turns[0])), _LEAST), _MOST):
            with torch.compiler.set_stance("force_eager"):
                eager_s, _ = self.lap()
            compiled_s, _ = self.lap()
            turns.append((eager_s, compiled_s))
        return statistics.median(eager for eager, _ in turns), statistics.median(compiled for _, compiled in turns)

    def _at_first_step(self) -> None:
        """Each forward takes the modulation of its run's next step; these are all the first."""
        if self._modulation is not None:
            self._modulation._step = 0


def _told(reason: Any) -> str:
    """The reason's first line, and the line of code without its folders."""
    line = str(reason.reason).strip().partition("\n")[0]
    frames = reason.user_stack
    return f"{line} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else line
