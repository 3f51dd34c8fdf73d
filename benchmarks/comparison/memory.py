"""How much device memory a replica takes, found without that memory: one edit's work under fake tensors.

Fake tensors have sizes and no content. The transformer with its packed weights, the VAE and a window's tensors are
made of them, and the engine's own steps run: the modulation's weights leave for the host, its rows are computed, the
VAE encodes, the transformer runs forward, the VAE decodes. `Storages` counts what is allocated and what is given up.

It does not see what kernels take for themselves, the CUDA context (about 0.5 GB), nor what the allocator keeps unused;
of the modulation, neither the rows of earlier runs (at most 2 GB, on the host) nor the one unpacked weight (113 MB at
full size) that is on the device, too, before it leaves for the host and while rows are computed. `measured` runs the
same on real tensors, and lets the allocator count: on a CPU the transformer takes the same to the byte, and the VAE's
decoder two thirds more, because convolutions there copy what they take and give.
"""

import weakref
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, GGUFLinear, GGUFParameter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from serve_app.engine.flux.modulation import Conditions, Modulation
from serve_app.engine.flux.tiny import packers

from . import models
from .models import Shape
from .synthetic import is_packed

_STEPS = 28


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of the device; of a CPU, where host and device are the same memory, with `host` in each figure."""

    #: Weights that stay.
    resident: int
    #: The peak until they are loaded.
    loading: int
    #: The peak of an edit afterwards, `resident` included.
    painting: int
    #: Of the modulation, in host memory.
    host: int


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has not annotated its modes
    """Writes down every storage's birth and death."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._numbers = WeakIdKeyDictionary()
        #: Of each event: the storage's number, and bytes taken, or given up where negative.
        self._events: list[tuple[int, int]] = []
        self._elsewhere: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        self.hold(returned)
        return returned

    def hold(self, tensors: Any) -> None:
        """Count those of the tensors, in any nesting, whose storage is a new one."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._numbers:
                number, size = len(self._events), storage.nbytes()
                self._numbers[storage] = number
                self._events.append((number, size))
                weakref.finalize(storage, self._events.append, (number, -size))

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is taken inside, and still there at the end, is on another device and not counted."""
        before = len(self._events)
        yield
        born, gone = ({n for n, size in self._events[before:] if (size > 0) == taken} for taken in (True, False))
        self._elsewhere |= born - gone

    def now(self) -> int:
        """Bytes."""
        return self._sums(self._elsewhere)[-1]

    def happened(self) -> int:
        """Births and deaths so far."""
        return len(self._events)

    def peak(self, since: int = 0) -> int:
        """Bytes; `since` as `happened` gave it."""
        return max(self._sums(self._elsewhere)[since:])

    def _sums(self, without: Container[int]) -> list[int]:
        """After each event."""
        return list(accumulate((0 if number in without else size for number, size in self._events), initial=0))


class _NoKey(Conditions):
    """Of a run that is not kept apart from others: fake tensors have no content to tell them by."""

    @property
    def key(self) -> tuple[object, ...]:
        return ()


def tracked(
    shape: Shape, packing: str, side_px: int, *, dtype: torch.dtype = torch.bfloat16, on_cpu: bool = False
) -> Memory:
    """Of an edit of one window of `side_px` x `side_px`, under fake tensors; `on_cpu` as `measured` counts."""
    transformer, vae = _unfilled(shape, packing, dtype)
    storages = Storages()
    leaves: AbstractContextManager[None] = nullcontext() if on_cpu else storages.elsewhere()
    with FakeTensorMode(), torch.inference_mode(), storages:
        _fill(transformer, packing, dtype)
        _fill(vae, packing, dtype)
        with leaves:
            modulation = Modulation(transformer, dtype)
        loaded, resident, loading = storages.happened(), storages.now(), storages.peak()
        _edit(shape, transformer, vae, modulation, side_px, dtype)
    return Memory(resident=resident, loading=loading, painting=storages.peak(loaded), host=modulation.host_bytes)


def measured(shape: Shape, packing: str, side_px: int, *, dtype: torch.dtype) -> Memory:
    """The same on real tensors of a CPU, as its allocator reports it to PyTorch's profiler."""
    transformer, vae = _unfilled(shape, packing, dtype)
    with torch.inference_mode():
        with _allocations() as loading:
            _fill(transformer, packing, dtype)
            _fill(vae, packing, dtype)
            modulation = Modulation(transformer, dtype)
        with _allocations() as painting:
            _edit(shape, transformer, vae, modulation, side_px, dtype)
    resident = sum(loading)
    return Memory(
        resident=resident,
        loading=max(accumulate(loading)),
        painting=max(accumulate(painting, initial=resident)),
        host=modulation.host_bytes,
    )


@contextmanager
def _allocations() -> Iterator[list[int]]:
    """Bytes taken inside, or given up where negative, in order; filled at the end."""
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield sizes
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes.extend(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def _unfilled(shape: Shape, packing: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Transformer and VAE whose parameters take no memory yet; GGUF's linears where its weights are packed."""
    with torch.device("meta"):
        transformer, vae = models.transformer(shape), models.vae(shape)
        for name, linear in list(transformer.named_modules()):
            if isinstance(linear, nn.Linear) and is_packed(f"{name}.weight", linear.weight.shape, packing):
                packed = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, dtype)
                transformer.set_submodule(name, packed)
    return transformer, vae


def _fill(model: nn.Module, packing: str, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            is_weight = isinstance(module, GGUFLinear) and name == "weight"
            filled = _packed(parameter, packing) if is_weight else _plain(parameter, dtype)
            setattr(module, name, filled)


def _plain(parameter: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="cpu"), requires_grad=False)


def _packed(weight: Tensor, packing: str) -> Any:
    kind, _ = packers()[packing]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    data = torch.empty((rows, columns // block * block_bytes), dtype=torch.uint8, device="cpu")
    if not isinstance(data, FakeTensor):
        return GGUFParameter(data, quant_type=kind)
    # A fake tensor cannot be of another class, too: it gets what the unpacking asks a GGUFParameter for.
    parameter: Any = nn.Parameter(data, requires_grad=False)
    parameter.quant_type, parameter.as_tensor = kind, weakref.ref(parameter)
    return parameter


def _edit(shape: Shape, transformer: Any, vae: Any, modulation: Modulation, side_px: int, dtype: torch.dtype) -> None:
    given = models.inputs(shape, side_px, side_px, "cpu", dtype)
    modulation.begin(_NoKey(torch.ones(_STEPS), 30.0, given["pooled_projections"]))
    photo = torch.empty((1, 3, side_px, side_px), dtype=dtype)
    latents = vae.encode(photo).latent_dist.mode()
    transformer(**given)
    vae.decode(latents)
