import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.engine.device import Device
from serve_app.engine.flux import pipeline, quant
from serve_app.engine.flux.fill import FluxFill
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.weights.fetch import Weights
from serve_app.errors import Canceled, CorruptWeights, GpuLost, InputError, OutOfMemory, PaintError, VariantLoadFailed
from serve_app.models import BUILT_IN, Pixels
from serve_app.settings import VariantSettings

from .engine_fixtures import flux_fill, window

SIDE = 64


def paint(engine: FluxFill, embeddings: bytes | None, **changes: Any) -> Pixels:
    return engine.paint(window(SIDE, SIDE, embeddings=embeddings, **changes))


@pytest.mark.parametrize("quant", ["Q4_0", "Q5_K_S", "Q8_0"])
def test_each_quantisation_loads_and_paints(tiny: TinyWeights, embeddings: bytes, quant: str) -> None:
    engine = flux_fill(tiny, quant)
    engine.load()
    painted = paint(engine, embeddings)
    assert painted.shape == (SIDE, SIDE, 3)
    assert painted.dtype == np.uint8
    assert painted.std() > 0
    engine.close()


def test_the_seed_decides(engine: FluxFill, embeddings: bytes) -> None:
    first = paint(engine, embeddings, seed=1)
    assert np.array_equal(paint(engine, embeddings, seed=1), first)
    assert not np.array_equal(paint(engine, embeddings, seed=2), first)


def test_bfloat16_as_on_a_gpu_paints_nearly_the_same(
    tiny: TinyWeights, engine: FluxFill, embeddings: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant, "compute_dtype", lambda capability: "bfloat16")
    rounded = flux_fill(tiny)
    rounded.load()
    difference = np.abs(paint(rounded, embeddings).astype(int) - paint(engine, embeddings))
    assert 0 < difference.mean() < 5


def test_the_prompt_and_the_guidance_scale_decide(engine: FluxFill, embeddings: bytes) -> None:
    import safetensors.torch

    first = paint(engine, embeddings)
    other = {name: -tensor for name, tensor in safetensors.torch.load(embeddings).items()}
    assert not np.array_equal(paint(engine, safetensors.torch.save(other)), first)
    assert not np.array_equal(paint(engine, embeddings, guidance_scale=2.0), first)


def test_windows_need_not_be_square(engine: FluxFill, embeddings: bytes) -> None:
    painted = engine.paint(window(64, 128, steps=1, embeddings=embeddings))
    assert painted.shape == (64, 128, 3)


def test_every_step_is_reported(engine: FluxFill, embeddings: bytes) -> None:
    steps: list[int] = []
    paint(engine, embeddings, steps=3, on_step=steps.append)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("error", [Canceled("a user asked"), RuntimeError("the event loop is closed")])
def test_what_the_step_hook_raises_stops_the_run_and_passes_through(
    engine: FluxFill, embeddings: bytes, error: Exception
) -> None:
    steps: list[int] = []

    def stop_at_two(step: int) -> None:
        steps.append(step)
        if step == 2:
            raise error

    with pytest.raises(type(error)) as caught:
        paint(engine, embeddings, steps=8, on_step=stop_at_two)
    assert caught.value is error
    assert steps == [1, 2]


def test_an_interrupted_run_leaves_no_trace_in_the_next(engine: FluxFill, embeddings: bytes) -> None:
    """The scheduler counts its steps: the next run, of another length, sets it back."""
    first = paint(engine, embeddings)

    def stop(step: int) -> None:
        raise Canceled("a user asked")

    with pytest.raises(Canceled):
        paint(engine, embeddings, steps=5, on_step=stop)
    assert np.array_equal(paint(engine, embeddings), first)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore"), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), GpuLost),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"), PaintError),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
)
def test_device_failures_get_our_names(
    tiny: TinyWeights,
    embeddings: bytes,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    expected: type[Exception],
) -> None:
    from diffusers import FluxTransformer2DModel

    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    engine = flux_fill(tiny)
    engine.load()
    with monkeypatch.context() as patch:
        patch.setattr(FluxTransformer2DModel, "forward", fail)
        with pytest.raises(expected, match=str(raised).partition("\n")[0]) as caught:
            paint(engine, embeddings)
    assert type(caught.value) is expected
    engine.free_memory()
    assert paint(engine, embeddings).shape == (SIDE, SIDE, 3)


def test_a_gpu_that_is_lost_before_the_run_is_noticed(
    engine: FluxFill, embeddings: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: bytes) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr("safetensors.torch.load", fail)
    with pytest.raises(GpuLost, match="unspecified launch failure"):
        paint(engine, embeddings)


def test_an_allocation_that_fails_in_the_pipeline_is_out_of_memory(
    engine: FluxFill, embeddings: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxTransformer2DModel

    monkeypatch.setattr(FluxTransformer2DModel, "forward", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(OutOfMemory, match=r"cpu failed: .*can't allocate memory"):
        paint(engine, embeddings)


def test_what_filled_the_memory_is_let_go() -> None:
    class Large:
        pass

    held: list[weakref.ref[Large]] = []

    def fail() -> None:
        large = Large()
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no memory left")

    with pytest.raises(OutOfMemory) as caught, Device(wants_gpu=False).translated():
        fail()
    assert held[0]() is None, caught


@pytest.mark.parametrize(
    ("embeddings", "reason"),
    [(None, "was given none"), (b"", "cannot be read"), (b"\x02" + bytes(7) + b"{}", "cannot be read")],
)
def test_embeddings_that_cannot_be_read(engine: FluxFill, embeddings: bytes | None, reason: str) -> None:
    with pytest.raises(PaintError, match=reason):
        paint(engine, embeddings)


def test_a_window_the_model_cannot_take(engine: FluxFill, embeddings: bytes) -> None:
    with pytest.raises(InputError, match="100x256 px"):
        engine.paint(window(256, 100, embeddings=embeddings))


def test_warming_up_runs_the_smallest_size_on_a_cpu(tiny: TinyWeights) -> None:
    sizes: list[tuple[int, ...]] = []
    engine = flux_fill(tiny)
    engine.load()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: sizes.append(output[0].shape) if type(module).__name__ == "Decoder" else None
    )
    with hook:
        engine.warm_up([(128, 64), (64, 64), (1024, 1024)])
    assert sizes == [(3, 64, 64)]


def test_close_lets_go_of_the_model(tiny: TinyWeights, embeddings: bytes) -> None:
    engine = flux_fill(tiny)
    engine.load()
    transformer = weakref.ref(engine._pipeline.transformer)
    paint(engine, embeddings, steps=1)
    engine.close()
    gc.collect()
    assert transformer() is None
    with pytest.raises(PaintError, match="not loaded"):
        paint(engine, embeddings)


def test_it_says_where_it_runs(engine: FluxFill) -> None:
    where = engine.describe()
    assert where["device"].startswith("CPU")
    assert where["compute_capability"] == "N/A"
    assert where["memory_used_bytes"] is None
    assert where["versions"]["torch"] == str(torch.__version__)
    assert engine.device_ms() is None


def test_models_are_built_one_at_a_time(tiny: TinyWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    building: list[str] = []
    at_once: list[int] = []
    build = pipeline.build

    def watched(weights: Weights, device: Device, kind: Any) -> Any:
        building.append(weights.transformer.name)
        at_once.append(len(building))
        built = build(weights, device, kind)
        building.pop()
        return built

    monkeypatch.setattr(pipeline, "build", watched)
    threads = [threading.Thread(target=flux_fill(tiny).load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once == [1, 1, 1]


def one_block_short(tiny: TinyWeights, folder: Path) -> Weights:
    """A base whose transformer has one block more than the file."""
    shutil.copytree(tiny.base, folder / "base")
    config = folder / "base" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    return Weights(tiny.transformer("flux1-fill-dev-Q4_0.gguf"), folder / "base")


def cut_short(tiny: TinyWeights, folder: Path) -> Weights:
    file = folder / "cut.gguf"
    file.write_bytes(tiny.transformer("flux1-fill-dev-Q4_0.gguf").read_bytes()[:-1000])
    return Weights(file, tiny.base)


@pytest.mark.parametrize(
    ("damage", "reason"), [(one_block_short, "does not hold the model"), (cut_short, "but the file at")]
)
def test_weights_that_do_not_fit(
    tiny: TinyWeights, tmp_path: Path, damage: Callable[[TinyWeights, Path], Weights], reason: str
) -> None:
    with pytest.raises(CorruptWeights, match=reason):
        FluxFill(BUILT_IN["tiny-Q4_0"], damage(tiny, tmp_path), VariantSettings()).load()


def test_no_weights() -> None:
    with pytest.raises(VariantLoadFailed, match="needs weights"):
        FluxFill(BUILT_IN["tiny-Q4_0"], None, VariantSettings())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tiny: TinyWeights) -> None:
    with pytest.raises(VariantLoadFailed, match="needs a GPU"):
        FluxFill(BUILT_IN["Q8_0"], Weights(tiny.transformer("x.gguf"), tiny.base), VariantSettings())


def test_no_weight_moves_while_it_paints(engine: FluxFill, embeddings: bytes) -> None:
    """No offload: everything stays where the load put it, so nothing crosses a bus between steps."""
    places: list[dict[str, tuple[str, int]]] = []

    def note(_step: int) -> None:
        modules = (engine._pipeline.transformer, engine._pipeline.vae)
        places.append(
            {f"{i}.{n}": (str(p.device), p.data_ptr()) for i, m in enumerate(modules) for n, p in m.named_parameters()}
        )

    note(0)
    paint(engine, embeddings, on_step=note)
    note(0)
    assert len(places) == 4 and places[0]
    assert all(seen == places[0] for seen in places)
    modules = [m for part in (engine._pipeline.transformer, engine._pipeline.vae) for m in part.modules()]
    assert [type(m).__name__ for m in modules if hasattr(m, "_hf_hook")] == []
