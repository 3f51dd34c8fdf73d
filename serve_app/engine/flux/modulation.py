"""The blocks' modulation, computed once for a whole run instead of in every step.

FLUX shifts, scales and gates every block by a row that depends on the timestep, the guidance scale and the pooled
prompt alone (adaLN-Zero: W. Peebles, S. Xie, "Scalable Diffusion Models with Transformers", 2022). The linears that
make these rows hold 27% of FLUX.1's weights, and multiply a single row each. Here they are unpacked once and kept in
host memory; a run's rows are computed before its first step, one step's row at a time: batched rows are not bit-equal
at FLUX.1's width. 28 steps take 59 MB in bfloat16, which stay in host memory, too: the device holds one run's.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from torch import Tensor, nn
from torch.nn import functional

from ...models import LoraUse
from ..lora.adapter import Adapter

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


class _Linear(nn.Module):
    """What a norm's linear computed with, in host memory."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def rows(self, inputs: Sequence[Tensor], device: torch.device) -> Tensor:
        """`[len(inputs), n]` in host memory, computed on `device` from inputs `[1, d]`."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        # By calls of the module: a LoRA's hook sees each row.
        return torch.cat([self(row, weight, bias) for row in inputs]).cpu()

    def forward(self, row: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(row, weight, bias)


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """What the rows of one run depend on."""

    #: Of each step, `[steps]`, as the scheduler gives them: 0 to 1000.
    timesteps: Tensor
    guidance_scale: float
    #: The pooled prompt, `[1, d]`.
    pooled: Tensor
    #: Key and scale of each LoRA that has layers among `Modulation.layers`, in their order.
    loras: tuple[object, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        pooled = self.pooled.float().cpu().numpy().tobytes()
        return tuple(self.timesteps.tolist()), self.guidance_scale, pooled, self.loras


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
        embed = "transformer.time_text_embed"
        layers: dict[str, nn.Module] = {f"{embed}.{name}": part for name, part in self._embed.named_modules()}
        for name, norm in [(name, part) for name, part in transformer.named_modules() if isinstance(part, _NORMS)]:
            self._linears.append(_to_host(norm.linear, dtype))
            layers[f"transformer.{name}.linear"] = self._linears[-1]
            norm.linear = _Row()
            self._rows.append(norm.linear)
        transformer.time_text_embed = self
        #: What computes the rows, by the names that LoRAs have for it.
        self.layers: Mapping[str, nn.Module] = layers
        #: Least recently used first.
        self._kept: OrderedDict[tuple[object, ...], _Table] = OrderedDict()
        self._run: _Table = ()
        self._step = 0

    @property
    def host_bytes(self) -> int:
        """Of the weights that left the device."""
        return sum(linear.weight.nbytes + linear.bias.nbytes for linear in self._linears)

    def changed_by(self, loras: Sequence[tuple[LoraUse, Adapter]]) -> tuple[object, ...]:
        """Of a run with these: `Conditions.loras`."""
        return tuple(
            (use.key, use.scale) for use, adapter in loras if not self.layers.keys().isdisjoint(adapter.layers)
        )

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
