"""FLUX.2 klein: the pipeline's own bits, from two references and one prompt, and why it does not load."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    GGUFQuantizationConfig,
)
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.quantizers.gguf.utils import GGUFLinear
from gguf import GGMLQuantizationType
from PIL import Image

from benchmarks.audit.forwards import Forward
from serve_app.adapters.memory import MemoryBlobStore
from serve_app.engine import Window
from serve_app.engine.flux.tiny import TinyWeights, packers, write_gguf
from serve_app.engine.flux2 import prompt
from serve_app.engine.flux2.klein import Klein
from serve_app.engine.flux2.tiny import TOKENS
from serve_app.engine.lora.read import read
from serve_app.engine.painting import paint_canvas
from serve_app.engine.weights import fetch
from serve_app.engine.weights.fetch import Sources, Weights
from serve_app.errors import (
    Canceled,
    CorruptWeights,
    InputError,
    OutOfMemory,
    UnknownWeights,
    VariantLoadFailed,
    WrongModel,
)
from serve_app.models import BUILT_IN, Pixels, Variant, VariantLora
from serve_app.settings import BUCKETS, Optimizations, VariantSettings

from .engine_fixtures import SIDE, request, window

DENSE, GGUF = "flux2-klein.safetensors", "flux2-klein-Q8_0.gguf"
TINY = BUILT_IN["tiny-klein"]


def weights_of(tiny: TinyWeights, file: str = DENSE) -> Weights:
    embeddings = (tiny.folder / "prompt.safetensors").read_bytes()
    return Weights(tiny.folder / file, tiny.folder / "klein-base", embeddings)


def klein(weights: Weights, variant: Variant = TINY, **optimizations: Any) -> Klein:
    engine = Klein(variant, weights, VariantSettings(optimizations=Optimizations(**optimizations)))
    engine.load()
    return engine


@pytest.fixture(scope="module", params=[DENSE, GGUF])
def file(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(tiny_klein: TinyWeights, file: str) -> Klein:
    return klein(weights_of(tiny_klein, file))


def test_the_pipelines_own_bits(tiny_klein: TinyWeights, engine: Klein, file: str) -> None:
    """diffusers' pipeline on the same files, called as its documentation does, in a window that is not square."""
    base, here = tiny_klein.folder / "klein-base", {"local_files_only": True}
    packed = {"quantization_config": GGUFQuantizationConfig(torch.float32)} if file == GGUF else {}
    pipe = Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel.from_single_file(
            str(tiny_klein.folder / file), config=str(base), subfolder="transformer", dtype=torch.float32, **packed
        ),
        vae=AutoencoderKLFlux2.from_pretrained(base, subfolder="vae", **here),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler", **here),
        text_encoder=None,
        tokenizer=None,
        is_distilled=True,
    )
    given = window(64, SIDE, steps=4)
    expected = pipe(
        image=[Image.fromarray(given.pixels), Image.fromarray(given.mask).convert("RGB")],
        prompt_embeds=safetensors.torch.load_file(tiny_klein.folder / "prompt.safetensors")["prompt_embeds"].float(),
        height=64,
        width=SIDE,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(given.seed),
    ).images[0]
    painted = engine.paint(given)
    # As Pillow's images are made: rounded likewise.
    assert np.array_equal(painted, np.asarray(expected)) and painted.std() > 0


def test_photo_mask_and_seed_decide_and_guidance_does_not(engine: Klein) -> None:
    first = engine.paint(window())
    assert np.array_equal(engine.paint(window(guidance_scale=2.0)), first)
    others = ({"seed": 2}, {"pixels": 255 - window().pixels}, {"mask": 255 - window().mask}, {"steps": 3})
    assert [changes for changes in others if np.array_equal(engine.paint(window(**changes)), first)] == []


def test_canvas_and_two_references_go_in_and_no_text_encoder_is_there(engine: Klein) -> None:
    tokens: list[int] = []
    transformer = engine._pipeline.transformer
    with transformer.register_forward_pre_hook(
        lambda _module, _given, named: tokens.append(named["hidden_states"].shape[1]), with_kwargs=True
    ):
        engine.paint(window(steps=2))
    assert tokens == [3 * (SIDE // 16) ** 2] * 2
    assert engine._pipeline.text_encoder is None and engine._pipeline.tokenizer is None


def test_an_audit_finds_the_forward_that_it_may_compile(engine: Klein) -> None:
    forward = Forward(engine, request(steps=4))
    (_, first), (_, again) = forward.lap(), forward.lap()
    assert forward.per_edit == 4 and torch.equal(first, again)
    assert first.shape == (1, 3 * (SIDE // 16) ** 2, 32)


def test_gguf_stays_packed_and_unpacking_changes_no_bit(tiny_klein: TinyWeights) -> None:
    packed, unpacked = (klein(weights_of(tiny_klein, GGUF), unpack=unpack) for unpack in (False, True))
    kinds = [sum(isinstance(m, GGUFLinear) for m in e._pipeline.transformer.modules()) for e in (packed, unpacked)]
    assert kinds[0] > 10 and kinds[1] == 0
    assert np.array_equal(packed.paint(window()), unpacked.paint(window()))


def test_a_step_cache_that_does_not_fit_is_refused(tiny_klein: TinyWeights) -> None:
    with pytest.raises(VariantLoadFailed, match=r"optimizations\.step_cache.*first_block does not fit"):
        klein(weights_of(tiny_klein), step_cache={"kind": "first_block"})


@pytest.mark.parametrize(
    ("variant", "optimizations"),
    [
        ({"repack": "w8a8"}, {}),
        ({}, {"step_cache": {"kind": "taylor_seer"}}),
    ],
    ids=["w8a8", "taylor_seer"],
)
def test_the_approximate_levers_repeat(
    tiny_klein: TinyWeights, variant: Mapping[str, Any], optimizations: Mapping[str, Any]
) -> None:
    exact = klein(weights_of(tiny_klein)).paint(window(steps=8)).astype(int)
    engine = klein(weights_of(tiny_klein), TINY.model_copy(update=variant), **optimizations)
    first = engine.paint(window(steps=8))
    assert np.array_equal(engine.paint(window(steps=8)), first)
    assert 0 < np.abs(first - exact).mean() < 25


def test_nothing_changes_outside_the_mask_and_every_step_is_told(engine: Klein) -> None:
    told: list[tuple[int, int]] = []
    asked = request(steps=4)
    painted = paint_canvas(engine, asked, lambda progress: told.append((progress.step, progress.steps)))
    changed = (painted.images[0] != asked.canvas).any(axis=-1)
    assert not changed[asked.mask == 0].any() and changed[asked.mask == 255].mean() > 0.9
    assert told == [(step, 4) for step in range(5)]
    assert np.array_equal(paint_canvas(engine, asked, lambda _: None).images[0], painted.images[0])


def test_a_stopped_run_ends_within_a_step_and_leaves_no_trace(engine: Klein) -> None:
    first, steps = engine.paint(window()), list[int]()

    def stop_at_two(step: int) -> None:
        steps.append(step)
        if step == 2:
            raise Canceled("a user asked")

    with pytest.raises(Canceled):
        engine.paint(window(steps=6, on_step=stop_at_two))
    assert steps == [1, 2]
    assert np.array_equal(engine.paint(window()), first)


def test_a_window_that_runs_out_of_memory_is_begun_again_once(engine: Klein, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, left, freed = engine._pipeline.transformer.forward, [1], list[int]()

    def full(*given: Any, **named: Any) -> Any:
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*given, **named)

    expected = paint_canvas(engine, request(), lambda _: None).images[0]
    monkeypatch.setattr(engine._pipeline.transformer, "forward", full)
    again = paint_canvas(engine, request(), lambda _: None, lambda: freed.append(1))
    assert np.array_equal(again.images[0], expected) and freed == [1]
    left += [1, 1]
    with pytest.raises(OutOfMemory):
        paint_canvas(engine, request(), lambda _: None)


def test_every_default_bucket_passes_and_others_are_named(engine: Klein) -> None:
    """As diffusers' image processor takes them: neither refused nor shrunk."""
    for width, height in BUCKETS:
        Flux2ImageProcessor.check_image_input(Image.new("RGB", (width, height)))
        assert width * height <= 1024 * 1024
    engine.warm_up([(512, 64), (64, 64)])
    for size in ((48, 48), (1024, 112)):
        with pytest.raises(VariantLoadFailed, match=rf"windows\.buckets: {size[0]}x{size[1]} px"):
            engine.warm_up([(64, 64), size])
    with pytest.raises(InputError, match="100x256 px"):
        engine.paint(window(256, 100))


#: diffusers' names -> the original ones, as published GGUF files have them. Source: diffusers'
#: loaders/single_file_utils.py, the other way round.
ORIGINAL = (
    (r"^x_embedder", "img_in"), (r"^context_embedder", "txt_in"), (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"(_stream_modulation\w*)\.linear", r"\1.lin"), (r"^transformer_blocks", "double_blocks"),
    (r"^single_transformer_blocks", "single_blocks"), (r"attn\.to_qkv_mlp_proj", "linear1"),
    (r"(single_blocks\.\d+\.)attn\.to_out", r"\1linear2"), (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"), (r"ff_context\.linear_in", "txt_mlp.0"),
    (r"ff_context\.linear_out", "txt_mlp.2"), (r"ff\.linear_in", "img_mlp.0"), (r"ff\.linear_out", "img_mlp.2"),
    (r"(single_blocks\.\d+\.)attn\.norm_q\.weight", r"\1norm.query_norm.scale"),
    (r"(single_blocks\.\d+\.)attn\.norm_k\.weight", r"\1norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
)  # fmt: skip


def in_original_names(tiny: TinyWeights) -> dict[str, np.ndarray[Any, Any]]:
    tensors = {name: tensor.numpy() for name, tensor in safetensors.torch.load_file(tiny.folder / DENSE).items()}
    for block in {name.split(".attn.")[0] for name in tensors if name.startswith("transformer_blocks")}:
        for stream, parts in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            three = [
                tensors.pop(f"{block}.attn.{part}.weight") for part in parts if f"{block}.attn.{part}.weight" in tensors
            ]
            if three:
                tensors[f"{block}.{stream}_attn.qkv.weight"] = np.concatenate(three)
    scale, shift = np.split(tensors["norm_out.linear.weight"], 2)
    tensors["norm_out.linear.weight"] = np.concatenate([shift, scale])
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in ORIGINAL:
            name = re.sub(ours, theirs, name)
        renamed[name] = tensor
    return renamed


def test_files_in_the_original_names_paint_the_same(tiny_klein: TinyWeights, tmp_path: Path) -> None:
    tensors = in_original_names(tiny_klein)
    safetensors.torch.save_file({name: torch.from_numpy(t) for name, t in tensors.items()}, tmp_path / DENSE)
    write_gguf(tmp_path / GGUF, tensors, *packers()["Q8_0"])
    dense, packed = (klein(replace(weights_of(tiny_klein), transformer=tmp_path / file)) for file in (DENSE, GGUF))
    expected = klein(weights_of(tiny_klein)).paint(window())
    assert np.array_equal(dense.paint(window()), expected)
    # Packing rounds, other tensors in one name than in the other.
    assert np.abs(packed.paint(window()).astype(int) - expected).mean() < 0.5
    kinds = {m.weight.quant_type for m in packed._pipeline.transformer.modules() if isinstance(m, GGUFLinear)}
    assert kinds == {GGMLQuantizationType.Q8_0}


#: Layers of the pipeline, by the name that the original code has for one or three of them; sizes are rows and columns.
LORA = {
    "double_blocks.0.img_attn.qkv": (("to_q", "to_k", "to_v"), "transformer_blocks.0.attn", (768, 256)),
    "double_blocks.0.txt_mlp.0": (("linear_in",), "transformer_blocks.0.ff_context", (1536, 256)),
    "single_blocks.1.linear1": (("to_qkv_mlp_proj",), "single_transformer_blocks.1.attn", (2304, 256)),
    "single_stream_modulation.lin": (("linear",), "single_stream_modulation", (768, 256)),
}


def lora(writer: str) -> dict[str, torch.Tensor]:
    """The same one in each writer's names."""
    random, tensors = torch.Generator().manual_seed(3), {}
    for original, (parts, block, (rows, columns)) in LORA.items():
        down = torch.randn(4, columns, generator=random) / 16
        up = torch.randn(rows, 4, generator=random) * 4
        if writer == "diffusers":
            for part, share in zip(parts, up.chunk(len(parts)), strict=True):
                tensors[f"transformer.{block}.{part}.lora_A.weight"] = down.clone()
                tensors[f"transformer.{block}.{part}.lora_B.weight"] = share.clone()
        elif writer == "kohya":
            stem = f"lora_unet_{original.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        else:
            stem = f"{'base_model.model.' if writer == 'peft' else 'diffusion_model.'}{original}"
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    return tensors


def with_lora(weights: Weights, tensors: Mapping[str, torch.Tensor], folder: Path, scale: float = 0.5) -> Klein:
    safetensors.torch.save_file(dict(tensors), folder / "lora.safetensors")
    row = VariantLora(file=str(folder / "lora.safetensors"), scale=scale)
    loras = (folder / "lora.safetensors",)
    return klein(replace(weights, loras=loras), TINY.model_copy(update={"loras": (row,)}))


def test_a_lora_paints_what_diffusers_paints_with_it(tiny_klein: TinyWeights, file: str, tmp_path: Path) -> None:
    """Merged into dense weights, beside packed ones: to the bit."""
    weights = weights_of(tiny_klein, file)
    theirs = klein(weights)
    theirs._pipeline.load_lora_weights(lora("diffusers"), adapter_name="a")
    theirs._pipeline.set_adapters(["a"], [0.5])
    if file == DENSE:
        theirs._pipeline.fuse_lora(adapter_names=["a"])
    painted = with_lora(weights, lora("diffusers"), tmp_path).paint(window())
    assert np.array_equal(painted, theirs.paint(window()))
    assert np.abs(painted.astype(int) - klein(weights).paint(window())).mean() > 1


@pytest.mark.parametrize("writer", ["ai-toolkit", "peft", "kohya"])
def test_a_lora_is_the_same_in_other_programs_names(tiny_klein: TinyWeights, writer: str, tmp_path: Path) -> None:
    weights = weights_of(tiny_klein)
    # kohya's scripts have no layers of the modulation.
    left_out = "modulation" if writer == "kohya" else "none"
    theirs, ours = (
        {name: tensor for name, tensor in lora(one).items() if left_out not in name} for one in (writer, "diffusers")
    )
    expected = with_lora(weights, ours, tmp_path).paint(window())
    assert np.array_equal(with_lora(weights, theirs, tmp_path).paint(window()), expected)


def test_a_lora_that_does_not_fit_is_named(tiny_klein: TinyWeights, tmp_path: Path) -> None:
    of_flux_1 = {"transformer.transformer_blocks.0.norm1.linear": (1536, 256), "transformer.x_embedder": (256, 64)}
    last_norm = {"diffusion_model.final_layer.adaLN_modulation.1": (512, 256)}
    for layers in (of_flux_1, last_norm, {"text_encoder.text_model.encoder.layers.0.mlp.fc1": (32, 32)}):
        tensors = {}
        for name, (rows, columns) in layers.items():
            tensors |= {f"{name}.lora_A.weight": torch.ones(4, columns), f"{name}.lora_B.weight": torch.ones(rows, 4)}
        with pytest.raises(VariantLoadFailed, match=r"the LoRA .*lora\.safetensors: "):
            with_lora(weights_of(tiny_klein), tensors, tmp_path)


def test_the_input_of_a_lora_for_flux_1_is_not_made_to_fit(tmp_path: Path) -> None:
    """It has 64 channels, FLUX.2 klein 128."""
    layer, file = "transformer.x_embedder", tmp_path / "lora.safetensors"
    tensors = {f"{layer}.lora_A.weight": torch.ones(4, 64), f"{layer}.lora_B.weight": torch.ones(256, 4)}
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(WrongModel):
        read(file, "flux2-klein", {layer: (256, 128)}, alpha=None, max_rank=4)


def embedded(tensor: torch.Tensor, name: str = "prompt_embeds") -> bytes:
    return safetensors.torch.save({name: tensor})


@pytest.mark.parametrize(
    ("embeddings", "reason"),
    [
        (None, "needs `embeddings`"),
        (b"not safetensors", "cannot be read"),
        (embedded(torch.zeros(1, TOKENS, 96), "embeds"), "cannot be read: KeyError"),
        (embedded(torch.zeros(1, TOKENS, 7680)), r"\[1, 64, 7680\], and must be \[1, 64, 96\]"),
        (embedded(torch.zeros(1, 512, 96)), r"\[1, 512, 96\], and must be \[1, 64, 96\]"),
        (embedded(torch.full((1, TOKENS, 96), torch.nan)), "not finite"),
    ],
    ids=["none", "no file", "other tensor", "wrong width", "wrong tokens", "not finite"],
)
def test_embeddings_that_are_not_this_models(tiny_klein: TinyWeights, embeddings: bytes | None, reason: str) -> None:
    with pytest.raises(VariantLoadFailed, match=reason):
        klein(replace(weights_of(tiny_klein), embeddings=embeddings))


async def test_embeddings_come_from_the_blob_store_or_are_missed_by_name(
    tiny_klein: TinyWeights, tmp_path: Path
) -> None:
    weights, blobs = weights_of(tiny_klein), MemoryBlobStore()
    row = TINY.model_copy(update={"file": str(weights.transformer), "base": str(weights.base)})
    row = row.model_copy(update={"embeddings": "prompts/klein.safetensors"})
    with pytest.raises(UnknownWeights, match=r"blob store has no prompts/klein\.safetensors.*fluxfill weights embed"):
        await fetch.fetch(row, Sources(cache=tmp_path, blobs=lambda: blobs))
    with pytest.raises(UnknownWeights, match=r"no file prompts/klein\.safetensors"):
        await fetch.fetch(row, Sources(cache=tmp_path))
    await blobs.put("prompts/klein.safetensors", weights.embeddings or b"", content_type="application/octet-stream")
    assert await fetch.fetch(row, Sources(cache=tmp_path, blobs=lambda: blobs)) == weights
    local = row.model_copy(update={"embeddings": str(tiny_klein.folder / "prompt.safetensors")})
    assert await fetch.fetch(local, Sources(cache=tmp_path)) == weights


Damage = Callable[[Weights, Path], Weights]


def _with_config(weights: Weights, folder: Path, file: str, before: str, after: str) -> Weights:
    shutil.copytree(weights.base, folder / "base")
    config = folder / "base" / file
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))
    return replace(weights, base=folder / "base")


def one_block_short(weights: Weights, folder: Path) -> Weights:
    return _with_config(weights, folder, "transformer/config.json", '"num_layers": 1', '"num_layers": 2')


def of_another_width(weights: Weights, folder: Path) -> Weights:
    return _with_config(
        weights, folder, "transformer/config.json", '"num_attention_heads": 4', '"num_attention_heads": 5'
    )


def cut_short(weights: Weights, folder: Path) -> Weights:
    file = folder / weights.transformer.name
    file.write_bytes(weights.transformer.read_bytes()[:-1000])
    return replace(weights, transformer=file)


def not_distilled(weights: Weights, folder: Path) -> Weights:
    return _with_config(weights, folder, "model_index.json", "true", "false")


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (one_block_short, CorruptWeights, r"does not hold the model that .*config\.json describes"),
        (of_another_width, CorruptWeights, r"does not hold the model that .*config\.json describes"),
        (cut_short, CorruptWeights, "no whole safetensors file|but the file at"),
        (not_distilled, VariantLoadFailed, "not of a distilled model"),
    ],
)
def test_weights_that_do_not_fit(
    tiny_klein: TinyWeights, tmp_path: Path, file: str, damage: Damage, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        klein(damage(weights_of(tiny_klein, file), tmp_path))


def test_the_prompt_decides_and_is_encoded_alike_each_time(tiny_klein: TinyWeights) -> None:
    weights = weights_of(tiny_klein)
    assert prompt.encode(weights.base, prompt.PROMPT, TOKENS) == weights.embeddings
    other = replace(weights, embeddings=prompt.encode(weights.base, "a lawn", TOKENS))

    def painted(weights: Weights) -> Pixels:
        given: Window = window()
        return klein(weights).paint(given)

    assert not np.array_equal(painted(other), painted(weights))
