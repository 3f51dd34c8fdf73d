import json
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.generating import LocalGenerator, generate
from serve_app.engine.rounding import rounded
from serve_app.engine.sdxl.generator import _SCHEDULERS, Sdxl
from serve_app.engine.weights.fetch import Weights
from serve_app.errors import BlankImage, Canceled, CorruptWeights, InputError, OutOfMemory, VariantLoadFailed
from serve_app.models import BUILT_IN, GENERATIONS, Pixels, Progress
from serve_app.settings import VariantSettings

from .test_engine_generate import asked, no_step

SHAPES: Mapping[str, Any] = {"width": 64, "height": 64}


def sdxl(file: Path, base: Path | None = None) -> Sdxl:
    """Loaded."""
    engine = Sdxl(BUILT_IN["tiny-sdxl"], Weights(file, base or file), VariantSettings())
    engine.load()
    return engine


@pytest.fixture(scope="module")
def weights(tiny_sdxl: TinyWeights) -> Weights:
    return Weights(tiny_sdxl.folder / "sdxl.safetensors", tiny_sdxl.folder / "sdxl-base")


@pytest.fixture(scope="module")
def engine(weights: Weights) -> Iterator[Sdxl]:
    engine = sdxl(weights.transformer, weights.base)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def folder(engine: Sdxl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as diffusers saves it."""
    path = tmp_path_factory.mktemp("sdxl") / "model"
    engine._pipeline.save_pretrained(path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    # The suite keeps the client offline; here nothing does but the code under test.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def far(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_it_is_the_picture_of_diffusers_own_pipeline(engine: Sdxl) -> None:
    request = asked(negative_prompt="dogs", seed=5)
    components = {**engine._pipeline.components, "scheduler": engine._scheduler}
    pipeline = StableDiffusionXLPipeline(**components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=2,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(5),
        **SHAPES,
    ).images
    assert np.array_equal(engine.generate(request, no_step), np.asarray(image))


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_a_file_and_a_folder_load_without_the_network(engine: Sdxl, weights: Weights, folder: Path) -> None:
    first = engine.generate(asked(), no_step)
    assert np.array_equal(sdxl(weights.transformer, weights.base).generate(asked(), no_step), first)
    # The same numbers, aligned otherwise in memory.
    assert far(sdxl(folder).generate(asked(), no_step), first) <= 1


@pytest.mark.slow
def test_a_folder_of_halves_loads(engine: Sdxl, folder: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float16, local_files_only=True)
    pipeline.save_pretrained(tmp_path / "halves", variant="fp16")
    assert far(sdxl(tmp_path / "halves").generate(asked(), no_step), engine.generate(asked(), no_step)) <= 8


OTHERS: list[dict[str, Any]] = [
    {"scheduler": "ddim", "steps": 3},
    {"scheduler": "unipc", "steps": 4},
    {"scheduler": "euler_a"},
    {"width": 96, "height": 72},
    {"guidance_scale": 1.0},
    {"seed": 2**63 - 1},
    {"prompt": "", "negative_prompt": "snow"},
    {"prompt": "猫 \U0001f408 " * 90},
]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [None, *_SCHEDULERS])
def test_a_picture_is_the_same_whatever_was_made_before(engine: Sdxl, scheduler: str | None) -> None:
    request = asked(scheduler=scheduler, steps=3)
    first = engine.generate(request, no_step)
    for other in OTHERS:
        engine.generate(asked(**other), no_step)
    with pytest.raises(Canceled):
        generate(engine, request, stop_at(2))
    assert np.array_equal(engine.generate(request, no_step), first)


def stop_at(step: int) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        if progress.step == step:
            raise Canceled("the painting was stopped")

    return tell


def test_a_picture_is_the_same_after_the_memory_ran_out(engine: Sdxl, monkeypatch: pytest.MonkeyPatch) -> None:
    request = asked(scheduler="dpmpp_2m", steps=3)
    first = engine.generate(request, no_step)
    decode, calls = engine._pipeline.vae.decode, list[int]()

    def full(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*given, **options)

    monkeypatch.setattr(engine._pipeline.vae, "decode", full)
    made = generate(engine, request, lambda progress: None)
    assert len(calls) == 2 and np.array_equal(made.images[0], first)
    calls.clear()
    with pytest.raises(OutOfMemory):
        engine.generate(request, no_step)


@pytest.mark.slow
async def test_cancelling_stops_within_a_step(engine: Sdxl) -> None:
    told: list[int] = []

    async def tell(progress: Progress) -> None:
        told.append(progress.step)
        if progress.step:
            raise Canceled("enough")

    with pytest.raises(Canceled):
        await LocalGenerator("tiny-sdxl", engine).run(asked(steps=100), tell)
    assert told[-1] < 100


@pytest.mark.slow
def test_each_scheduler_has_its_own_picture(engine: Sdxl) -> None:
    generation = GENERATIONS["sdxl"]
    assert tuple(_SCHEDULERS) == generation.schedulers
    assert generation.schedulers == GENERATIONS["fake"].schedulers
    steps = {name: list[int]() for name in _SCHEDULERS}
    pictures = {name: engine.generate(asked(scheduler=name, steps=5), done.append) for name, done in steps.items()}
    assert all(done == [1, 2, 3, 4, 5] for done in steps.values())
    # DDIM without noise takes the steps of Euler's method (arXiv:2010.02502, 4.3), unless it clips the latents.
    assert np.allclose(pictures.pop("ddim"), pictures["euler"], atol=1)
    assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures)
    # The tiny model's own is Euler's.
    assert np.array_equal(pictures["euler"], engine.generate(asked(steps=5), no_step))


@pytest.mark.parametrize("scheduler", [None, *_SCHEDULERS])
def test_one_step_is_enough_for_any_scheduler(engine: Sdxl, scheduler: str | None) -> None:
    assert engine.generate(asked(scheduler=scheduler, steps=1), no_step).shape == (64, 64, 3)


def test_what_is_asked_for_changes_the_picture(engine: Sdxl) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"prompt": "a dog"}, {"negative_prompt": "a dog"}, {"seed": 2}, {"steps": 3}, {"guidance_scale": 6.0}
    ]  # fmt: skip
    assert len({engine.generate(asked(**change), no_step).tobytes() for change in changes}) == len(changes)
    wide = engine.generate(asked(width=96, height=72), no_step)
    assert wide.shape == (72, 96, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"width": 68}, "multiples of 8"), ({"scheduler": "lcm"}, "no scheduler lcm; there are euler")],
)
def test_what_it_cannot_make(engine: Sdxl, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        engine.generate(asked(**change), no_step)


def test_warming_up_leaves_no_trace(engine: Sdxl) -> None:
    first = engine.generate(asked(), no_step)
    engine.warm_up([(4096, 4096)])
    assert np.array_equal(engine.generate(asked(), no_step), first)
    assert engine.device_ms() is None and engine.peak_memory() is None
    assert engine.describe()["versions"]["diffusers"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nan, "12288 of the picture's 12288 values are not finite"),
        (0.0, "every pixel of the picture has the colour"),
    ],
)
def test_a_picture_that_is_none_is_refused(
    engine: Sdxl, monkeypatch: pytest.MonkeyPatch, value: float, reason: str
) -> None:
    monkeypatch.setattr(engine._pipeline.vae, "decode", lambda *_, **__: [torch.full((1, 3, 64, 64), value)])
    with pytest.raises(BlankImage, match=reason):
        engine.generate(asked(), no_step)


def test_one_value_that_is_not_finite_is_noticed_though_it_would_be_clipped() -> None:
    image = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    assert rounded(image * 3 - 1).min() == 0
    image[3, 3, 1] = np.inf
    with pytest.raises(BlankImage, match="1 of the picture's 192 values"):
        rounded(image)


@pytest.mark.slow
def test_the_vae_stays_in_float32_where_the_model_says_so(weights: Weights, engine: Sdxl) -> None:
    halves = Sdxl(BUILT_IN["tiny-sdxl"], weights, VariantSettings())
    halves._device.dtype = torch.float16
    halves.load()
    assert (halves._pipeline.unet.dtype, halves._pipeline.vae.dtype) == (torch.float16, torch.float32)
    first = halves.generate(asked(), no_step)
    assert far(first, engine.generate(asked(), no_step)) < 40
    assert halves._pipeline.vae.dtype == torch.float32
    assert np.array_equal(halves.generate(asked(), no_step), first)


# What is refused, and why.


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def tensors(*names: str, channels: int = 4) -> dict[str, torch.Tensor]:
    return {CONV_IN: torch.zeros(8, channels, 3, 3), **{name: torch.zeros(1) for name in names}}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            tensors("conditioner.embedders.1.model.ln_final.bias", channels=9),
            "made for inpainting: .* 9 channels, not 4",
        ),
        (tensors("conditioner.embedders.0.model.ln_final.bias"), "the refiner of Stable Diffusion XL"),
        (tensors("cond_stage_model.transformer.text_model.final_layer_norm.bias"), "Stable Diffusion 1"),
        (tensors("cond_stage_model.model.ln_final.bias"), "Stable Diffusion 2"),
        (tensors("model.diffusion_model.label_emb.0.0.bias"), "XL without text encoders"),
        (tensors("conditioner.embedders.1.model.ln_final.bias"), "has no tensor first_stage_model"),
        ({"lora_unet_mid_block.alpha": torch.zeros(1)}, "a LoRA"),
        ({"double_blocks.0.img_attn.proj.bias": torch.zeros(1)}, "FLUX.1"),
        ({"weight": torch.zeros(1)}, "of another kind"),
    ],
)
def test_a_file_of_something_else_is_named(
    tmp_path: Path, weights: Weights, given: dict[str, torch.Tensor], reason: str
) -> None:
    save_file(given, tmp_path / "other.safetensors")
    with pytest.raises(
        CorruptWeights, match=rf"other\.safetensors is .*{reason}.*wanted is a Stable Diffusion XL base"
    ):
        sdxl(tmp_path / "other.safetensors", weights.base)


class Trap:
    def __reduce__(self) -> Any:
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.ckpt", pickle.dumps(Trap()), "not a .safetensors file; .* may run code"),
        ("model.safetensors", pickle.dumps(Trap()), "a pickle, whatever its name"),
        ("model.safetensors", b"PK\x03\x04archive/data.pkl", "a pickle, whatever its name"),
        ("model.safetensors", b"<html>Sign in</html>", "no whole safetensors file"),
        ("model.safetensors", b"", "no whole safetensors file"),
    ],
)
def test_nothing_is_unpickled(tmp_path: Path, weights: Weights, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptWeights, match=reason):
        sdxl(tmp_path / name, weights.base)


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.weight",
             "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
             "conditioner.embedders.1.model.text_projection"]
)  # fmt: skip
def test_a_file_that_lacks_a_tensor_or_has_another_shape(tmp_path: Path, weights: Weights, name: str) -> None:
    whole = load_file(weights.transformer)
    for odd in ({}, {name: whole[name][:3].contiguous()}):
        save_file({key: value for key, value in whole.items() if key != name} | odd, tmp_path / "odd.safetensors")
        with pytest.raises(CorruptWeights, match=r"odd\.safetensors does not hold the model that .* describes"):
            sdxl(tmp_path / "odd.safetensors", weights.base)


def test_a_file_that_was_cut_short(tmp_path: Path, weights: Weights) -> None:
    (tmp_path / "cut.safetensors").write_bytes(weights.transformer.read_bytes()[:-1])
    with pytest.raises(CorruptWeights, match="no whole safetensors file"):
        sdxl(tmp_path / "cut.safetensors", weights.base)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("unet/config.json", {"in_channels": 9}, "made for inpainting: .* 9 channels"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "a model for StableDiffusionPipeline"),
        ("model_index.json", {"text_encoder": [None, None]}, "names no text_encoder"),
        ("model_index.json", {"text_encoder": 1}, "no folder of diffusers"),
    ],
)
def test_a_folder_of_something_else_is_named(
    folder: Path, tmp_path: Path, file: str, change: dict[str, Any], reason: str
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptWeights, match=reason):
        sdxl(tmp_path / "other")


def test_a_folder_with_pickles_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "old")
    unet = tmp_path / "old" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    (unet / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CorruptWeights, match="does not hold the model"):
        sdxl(tmp_path / "old")


def test_no_weights() -> None:
    with pytest.raises(VariantLoadFailed, match="needs weights"):
        Sdxl(BUILT_IN["tiny-sdxl"], None, VariantSettings())
