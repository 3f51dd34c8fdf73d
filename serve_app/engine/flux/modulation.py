"""The blocks' modulation, computed once for a whole run instead of in every step.

FLUX shifts, scales and gates every block by a row that depends on the timestep, the guidance scale and the pooled
prompt alone (adaLN-Zero: W. Peebles, S. Xie, "Scalable Diffusion Models with Transformers", 2022). The linears that
make these rows hold 27% of FLUX.1's weights, and multiply a single row each. Here they are unpacked once and kept in
host memory; a run's rows are computed before its first step, one step's row at a time: batched rows are not bit-equal
at FLUX.1's width. 28 steps take 59 MB in bfloat16, which stay in host memory, too: the device holds one run's.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from torch import Tensor, nn
from torch.nn import functional

_NORMS = (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)
#: Of rows kept in host memory: 34 runs of 28 steps. Each area of a window has a schedule of its own; there are nine.
_MAX_BYTES = 2_000_000_000

#: Rows of one run: for each norm, `[steps, n]`.
_Table = Sequence[Tensor]


class _Row(nn.Module):
    """In place of a norm's linear: gives the present step's row, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        #: `[1, n]`.
        self.value = torch.empty(0)

    def forward(self, _: Tensor) -> Tensor:
        return self.value


@dataclass(frozen=True, slots=True)
class _Linear:
    """What a norm's linear computed with, in host memory."""

    weight: Tensor
    bias: Tensor

    def rows(self, inputs: Sequence[Tensor], device: torch.device) -> Tensor:
        """`[len(inputs), n]` in host memory, computed on `device` from inputs `[1, d]`."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        return torch.cat([functional.linear(row, weight, bias) for row in inputs]).cpu()


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """What the rows of one run depend on."""

    #: Of each step, `[steps]`, as the scheduler gives them: 0 to 1000.
    timesteps: Tensor
    guidance_scale: float
    #: The pooled prompt, `[1, d]`.
    pooled: Tensor

    @property
    def key(self) -> tuple[object, ...]:
        return tuple(self.timesteps.tolist()), self.guidance_scale, self.pooled.float().cpu().numpy().tobytes()


class Modulation(nn.Module):
    """Takes the place of a FluxTransformer2DModel's `time_text_embed`, and of the linears in its norms.

    `begin` prepares a run; from then on each forward of the transformer is that run's next step.
    """

    def __init__(self, transformer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self._embed = transformer.time_text_embed
        self._dtype = dtype
        self._rows: list[_Row] = []
        self._linears: list[_Linear] = []
        for norm in [module for module in transformer.modules() if isinstance(module, _NORMS)]:
            self._linears.append(_to_host(norm.linear, dtype))
            norm.linear = _Row()
            self._rows.append(norm.linear)
        transformer.time_text_embed = self
        #: Least recently used first.
        self._kept: OrderedDict[tuple[object, ...], _Table] = OrderedDict()
        self._run: _Table = ()
        self._step = 0

    @property
    def host_bytes(self) -> int:
        """Of the weights that left the device."""
        return sum(linear.weight.nbytes + linear.bias.nbytes for linear in self._linears)

    def begin(self, run: Conditions) -> None:
        """The next run is under these conditions."""
        self._run = [rows.to(run.pooled.device) for rows in self._table(run)]
        self._step = 0

    def forward(self, _timestep: Tensor, _guidance: Tensor, pooled: Tensor) -> Tensor:
        """Sets every norm's row to the next step's. What it returns goes to `_Row`s only, which look at nothing."""
        for row, steps in zip(self._rows, self._run, strict=True):
            row.value = steps[self._step : self._step + 1]
        self._step += 1
        return pooled[:, :1]

    def _table(self, run: Conditions) -> _Table:
        if run.key not in self._kept:
            self._kept[run.key] = self._computed(run)
            # The least recently used are forgotten, but never the newest.
            while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > _MAX_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(run.key)
        return self._kept[run.key]

    def _computed(self, run: Conditions) -> _Table:
        device = run.pooled.device
        guidance = torch.full([1], run.guidance_scale, device=device, dtype=torch.float32).to(self._dtype) * 1000
        inputs = []
        for timestep in run.timesteps:
            # To the number type, down and up again, as the pipeline and the transformer do.
            time = timestep.expand(1).to(device, self._dtype) / 1000 * 1000
            inputs.append(functional.silu(self._embed(time, guidance, run.pooled)))
        return [linear.rows(inputs, device) for linear in self._linears]


def _to_host(linear: Any, dtype: torch.dtype) -> _Linear:
    weight = dequantize_gguf_tensor(linear.weight).to(dtype).cpu()
    return _Linear(weight.detach(), linear.bias.detach().to(dtype).cpu())


def _bytes(table: _Table) -> int:
    return sum(rows.nbytes for rows in table)
