"""LoRA files: what the programs in the field write is read as what it is, and all else is refused with its own error.

Known trouble elsewhere: LoRAs that are not applied, in silence (huggingface/diffusers#9291, #10599, #10512;
comfyanonymous/ComfyUI#5359).
"""

import json
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save
from torch import Tensor

from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.lora.adapter import Adapter
from serve_app.engine.lora.apart import CheckedApart
from serve_app.engine.lora.architecture import described
from serve_app.engine.lora.check import check
from serve_app.engine.lora.contents import KOHYA, OLD, PEFT
from serve_app.engine.lora.read import Sizes, look, read
from serve_app.engine.weights.fetch import base_here
from serve_app.errors import (
    LoraRefused,
    LoraTooLarge,
    NotFinite,
    NotSafetensors,
    Truncated,
    UnsupportedFormat,
    WrongModel,
)
from serve_app.models import BUILT_IN, Variant
from serve_app.settings import Settings

from . import lora_files
from .lora_files import WRITERS, Family, Writer

FULL = {"modulation": True, "convs": True, "text_encoders": True}


@pytest.fixture(scope="module")
def sizes(tiny_sdxl: TinyWeights, tiny_dev: TinyWeights) -> dict[Family, Sizes]:
    return {
        "sdxl": described("sdxl", tiny_sdxl.folder / "sdxl-base"),
        "flux": described("flux", tiny_dev.folder / "flux-dev-base"),
    }


@pytest.fixture
def models(tiny_sdxl: TinyWeights, tiny_dev: TinyWeights) -> list[Variant]:
    return [
        Variant(family="sdxl", file="none", base=str(tiny_sdxl.folder / "sdxl-base")),
        Variant(family="flux", file="none", base=str(tiny_dev.folder / "flux-dev-base")),
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


# --- What is written in the field ---


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize(("family", "writer"), [(family, writer) for family in WRITERS for writer in WRITERS[family]])
def test_each_writers_file_is_read_as_the_layers_that_it_was_written_from(
    family: Family, writer: Writer, alpha: float | None, sizes: dict[Family, Sizes], file: Path
) -> None:
    made = lora_files.layers(family, **FULL)
    file.write_bytes(lora_files.file(made, writer, alpha=alpha))
    adapter = read(file, family, sizes[family], alpha=None, max_rank=4)
    # FLUX.1's prompts are encoded without LoRAs.
    wanted = {name: pair for name, pair in made.items() if family == "sdxl" or not name.startswith("text_encoder")}
    assert set(adapter.layers) == {_named(name, sizes[family]) for name in wanted}
    says_alpha = alpha is not None and writer != "old-diffusers"
    for name, (down, up) in wanted.items():
        layer = adapter.layers[_named(name, sizes[family])]
        assert torch.equal(layer.down, down.half())
        assert torch.equal(layer.up, up.half())
        assert layer.scale == (0.5 if says_alpha else 1.0)
    facts = adapter.facts
    assert facts == look(file, family, sizes[family], alpha=None, max_rank=4)
    assert (facts.family, facts.dtype, facts.rank, facts.layers) == (family, "F16", 4, len(made))
    assert facts.format == {"simpletuner": "diffusers", "old-diffusers": "diffusers"}.get(writer, writer)
    assert facts.text_encoder_layers == (6 if family == "sdxl" else 3)
    assert facts.has_alpha == says_alpha
    assert facts.alpha_scale == ((0.5, 0.5) if says_alpha else (1.0, 1.0))


def _named(name: str, sizes: Sizes) -> str:
    """Newer versions of transformers leave a part out."""
    return name if name in sizes else name.replace(".text_model.", ".")


def _read(tensors: Mapping[str, Tensor], family: Family, sizes: Sizes, file: Path, **metadata: str) -> Adapter:
    file.write_bytes(save(dict(tensors), metadata or None))
    return read(file, family, sizes, alpha=None, max_rank=256)


def _pair(name: str, wide: int, out: int, rank: int = 4, ending: tuple[str, str] = PEFT) -> dict[str, Tensor]:
    return {name + ending[0]: torch.rand(rank, wide), name + ending[1]: torch.rand(out, rank)}


def test_a_file_of_xlabs_is_read(sizes: dict[Family, Sizes], file: Path) -> None:
    qkv = _pair("double_blocks.1.processor.qkv_lora1", 256, 768, ending=OLD)
    proj = _pair("single_blocks.3.processor.proj_lora", 1280, 256, ending=OLD)
    adapter = _read(qkv | proj, "flux", sizes["flux"], file)
    for number, letter in enumerate("qkv"):
        layer = adapter.layers[f"transformer.transformer_blocks.1.attn.to_{letter}"]
        assert torch.equal(layer.up, qkv["double_blocks.1.processor.qkv_lora1.up.weight"].chunk(3)[number])
    assert "transformer.single_transformer_blocks.3.proj_out" in adapter.layers
    assert (adapter.facts.format, adapter.facts.layers) == ("xlabs", 4)


def test_onetrainers_file_is_read(sizes: dict[Family, Sizes], file: Path) -> None:
    name = "lora_transformer_transformer_blocks_1_attn_to_out_0"
    given = _pair(name, 256, 256, ending=KOHYA) | {f"{name}.alpha": torch.tensor(8.0)}
    layer = _read(given, "flux", sizes["flux"], file).layers["transformer.transformer_blocks.1.attn.to_out.0"]
    assert torch.equal(layer.down, given[f"{name}.lora_down.weight"])
    assert layer.scale == 2.0


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.double_blocks.0.img_mlp.2",
        "diffusion_model.transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff.net.2",
    ],
)
def test_other_spellings_of_flux_are_read(name: str, sizes: dict[Family, Sizes], file: Path) -> None:
    """Of the original names under PEFT's, of diffusers' under ComfyUI's, and of a transformer that was saved alone."""
    assert set(_read(_pair(name, 1024, 256), "flux", sizes["flux"], file).layers) == {
        "transformer.transformer_blocks.0.ff.net.2"
    }


@pytest.mark.parametrize("name", ["diffusion_model.middle_block.0.emb_layers.1", "mid_block.resnets.0.time_emb_proj"])
def test_other_spellings_of_sdxl_are_read(name: str, sizes: dict[Family, Sizes], file: Path) -> None:
    assert set(_read(_pair(name, 32, 16), "sdxl", sizes["sdxl"], file).layers) == {
        "unet.mid_block.resnets.0.time_emb_proj"
    }


def test_q_k_and_v_that_were_trained_apart_and_written_as_one_are_taken_apart(
    sizes: dict[Family, Sizes], file: Path
) -> None:
    """kohya writes them so, with zeros between. Their alpha goes with the rank that the file has."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    up = torch.block_diag(*(torch.rand(256, 2) for _ in range(3)))
    given = {
        f"{name}.lora_down.weight": torch.rand(6, 256),
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(3.0),
    }
    adapter = _read(given, "flux", sizes["flux"], file)
    for number, letter in enumerate("qkv"):
        layer = adapter.layers[f"transformer.transformer_blocks.0.attn.to_{letter}"]
        assert torch.equal(layer.down, given[f"{name}.lora_down.weight"].chunk(3)[number])
        assert torch.equal(layer.up, up[number * 256 : number * 256 + 256, number * 2 : number * 2 + 2])
        assert layer.scale == 0.5
    assert adapter.facts.rank == 6


def test_layers_of_flux_that_diffusers_leaves_out_in_silence_are_read(sizes: dict[Family, Sizes], file: Path) -> None:
    """Its converter gives them no component, and drops the alpha of the last."""
    time, last = "lora_unet_time_in_in_layer", "lora_unet_final_layer_linear"
    given = (
        _pair(time, 256, 256, ending=KOHYA) | _pair(last, 256, 64, ending=KOHYA) | {f"{last}.alpha": torch.tensor(2.0)}
    )
    layers = _read(given, "flux", sizes["flux"], file).layers
    assert set(layers) == {"transformer.time_text_embed.timestep_embedder.linear_1", "transformer.proj_out"}
    assert layers["transformer.proj_out"].scale == 0.5


def test_an_adapter_keeps_its_numbers_when_the_file_is_gone(sizes: dict[Family, Sizes], file: Path) -> None:
    given = _pair("unet.conv_in", 4, 8)
    given = {
        name: tensor[:, :, None, None].expand(-1, -1, *([3, 3] if "lora_A" in name else [1, 1])).contiguous()
        for name, tensor in given.items()
    }
    adapter = _read(given, "sdxl", sizes["sdxl"], file)
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(adapter.layers["unet.conv_in"].down, given["unet.conv_in.lora_A.weight"])
    assert adapter.host_bytes == sum(tensor.nbytes for tensor in given.values())


def test_a_file_says_that_ai_toolkit_wrote_it(sizes: dict[Family, Sizes], file: Path) -> None:
    """Whose files for FLUX.1 have diffusers' names."""
    said = {"software": json.dumps({"name": "ai-toolkit", "version": "0.5.1"})}
    facts = _read(_pair("transformer.proj_out", 256, 64), "flux", sizes["flux"], file, **said).facts
    assert facts.format == "ai-toolkit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_keep_their_type(dtype: torch.dtype, sizes: dict[Family, Sizes], file: Path) -> None:
    file.write_bytes(lora_files.file(lora_files.layers("flux"), "kohya", alpha=1.0, dtype=dtype))
    adapter = read(file, "flux", sizes["flux"], alpha=None, max_rank=4)
    assert {(layer.down.dtype, layer.up.dtype) for layer in adapter.layers.values()} == {(dtype, dtype)}
    assert adapter.facts.dtype == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]


def test_flux_ignores_layers_of_all_text_encoders_and_counts_them(sizes: dict[Family, Sizes], file: Path) -> None:
    t5 = (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    )
    clip = (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    )
    given = {name: tensor for stem in (*t5, *clip) for name, tensor in _pair(stem, 512, 512).items()}
    facts = _read(given | _pair("transformer.proj_out", 256, 64), "flux", sizes["flux"], file).facts
    assert (facts.layers, facts.text_encoder_layers) == (5, 4)
    with pytest.raises(WrongModel, match="text encoders"):
        _read(given, "flux", sizes["flux"], file)


# --- The published models, by their built-in descriptions ---


def test_kohyas_file_of_all_blocks_fits_flux_dev(file: Path) -> None:
    """Inputs and outputs by FLUX.1's original code: 19 double blocks, 38 single ones, of width 3072."""
    double = {"attn_qkv": (3072, 9216), "attn_proj": (3072, 3072), "mlp_0": (3072, 12288), "mlp_2": (12288, 3072)}
    double["mod_lin"] = (3072, 18432)
    single = {"linear1": (3072, 21504), "linear2": (15360, 3072), "modulation_lin": (3072, 9216)}
    shapes = {
        f"double_blocks_{n}_{of}_{name}": double[name] for n in range(19) for of in ("img", "txt") for name in double
    }
    shapes |= {f"single_blocks_{n}_{name}": single[name] for n in range(38) for name in single}
    shapes |= {"img_in": (64, 3072), "txt_in": (4096, 3072), "final_layer_linear": (3072, 64)}
    shapes |= {"final_layer_adaLN_modulation_1": (3072, 6144)}
    for name, wide in {"time_in": 256, "vector_in": 768, "guidance_in": 256}.items():
        shapes |= {f"{name}_in_layer": (wide, 3072), f"{name}_out_layer": (3072, 3072)}
    sizes = described("flux", None)
    layers = _of_rank_1({f"lora_unet_{name}": shape for name, shape in shapes.items()}, "flux", sizes, file)
    assert layers == set(sizes)


def test_kohyas_file_of_all_blocks_fits_sdxl(file: Path) -> None:
    """By the original UNet: widths 320, 640 and 1280 with 0, 2 and 10 transformer blocks."""
    shapes: dict[str, tuple[int, ...]] = {"input_blocks_0_0": (4, 320, 3, 3), "out_2": (320, 4, 3, 3)}
    shapes |= {"time_embed_0": (320, 1280), "time_embed_2": (1280, 1280)}
    shapes |= {"label_emb_0_0": (2816, 1280), "label_emb_0_2": (1280, 1280)}
    # Their inputs and outputs, and transformer blocks.
    blocks = {
        "input": [
            (320, 320, 0),
            (320, 320, 0),
            None,
            (320, 640, 2),
            (640, 640, 2),
            None,
            (640, 1280, 10),
            (1280, 1280, 10),
        ]
    }
    blocks["output"] = [
        (2560, 1280, 10),
        (2560, 1280, 10),
        (1920, 1280, 10),
        (1920, 640, 2),
        (1280, 640, 2),
        (960, 640, 2),
    ]
    blocks["output"] += [(960, 320, 0), (640, 320, 0), (640, 320, 0)]
    for side, first in (("input", 1), ("output", 0)):
        for number, block in enumerate(blocks[side], first):
            if block is not None:
                shapes |= _resnet(f"{side}_blocks_{number}_0", *block[:2])
                shapes |= _attention(f"{side}_blocks_{number}_1", *block[1:])
    shapes |= (
        _resnet("middle_block_0", 1280, 1280)
        | _attention("middle_block_1", 1280, 10)
        | _resnet("middle_block_2", 1280, 1280)
    )
    for number, width in ((3, 320), (6, 640)):
        shapes[f"input_blocks_{number}_0_op"] = width, width, 3, 3
    for number, width in ((2, 1280), (5, 640)):
        shapes[f"output_blocks_{number}_2_conv"] = width, width, 3, 3
    named = {f"lora_unet_{name}": shape for name, shape in shapes.items()}
    for encoder, width, layers in (("te1", 768, 12), ("te2", 1280, 32)):
        for number in range(layers):
            stem = f"lora_{encoder}_text_model_encoder_layers_{number}"
            named |= {f"{stem}_self_attn_{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
            named |= {f"{stem}_mlp_fc1": (width, 4 * width), f"{stem}_mlp_fc2": (4 * width, width)}
    named["lora_te2_text_projection"] = 1280, 1280
    sizes = described("sdxl", None)
    assert _of_rank_1(named, "sdxl", sizes, file) == set(sizes)


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("flux", "lora_transformer_"), ("flux", "lora_unet_"), ("flux", "lycoris_"), ("sdxl", "lora_unet_")],
)
def test_a_file_with_the_pipelines_names_joined_fits(family: Family, prefix: str, file: Path) -> None:
    """OneTrainer's for one, which by default trains all layers."""
    sizes = described(family, None)
    wanted = {name: shape for name, shape in sizes.items() if not name.startswith("text_encoder")}
    shapes = {
        prefix + name.partition(".")[2].replace(".", "_"): (wide, out, *kernel)
        for name, (out, wide, *kernel) in wanted.items()
    }
    assert _of_rank_1(shapes, family, sizes, file) == set(wanted)


def _resnet(name: str, wide: int, out: int) -> dict[str, tuple[int, ...]]:
    layers: dict[str, tuple[int, ...]] = {
        "in_layers_2": (wide, out, 3, 3),
        "out_layers_3": (out, out, 3, 3),
        "emb_layers_1": (1280, out),
    }
    if wide != out:
        layers["skip_connection"] = wide, out, 1, 1
    return {f"{name}_{layer}": shape for layer, shape in layers.items()}


def _attention(name: str, width: int, blocks: int) -> dict[str, tuple[int, ...]]:
    block: dict[str, tuple[int, ...]] = {"ff_net_0_proj": (width, 8 * width), "ff_net_2": (4 * width, width)}
    for layer in ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_out_0"):
        block[layer] = width, width
    block |= {"attn2_to_k": (2048, width), "attn2_to_v": (2048, width)}
    layers: dict[str, tuple[int, ...]] = {
        f"transformer_blocks_{n}_{layer}": shape for n in range(blocks) for layer, shape in block.items()
    }
    layers |= dict.fromkeys(("proj_in", "proj_out"), (width, width)) if blocks else {}
    return {f"{name}_{layer}": shape for layer, shape in layers.items()}


def _of_rank_1(shapes: Mapping[str, tuple[int, ...]], family: Family, sizes: Sizes, file: Path) -> set[str]:
    """The layers that kohya's file of these inputs and outputs changes."""
    tensors: dict[str, Tensor] = {}
    for name, (wide, out, *kernel) in shapes.items():
        tensors[name + KOHYA[0]] = torch.ones(1, wide, *kernel, dtype=torch.float16)
        tensors[name + KOHYA[1]] = torch.ones(out, 1, *[1] * len(kernel), dtype=torch.float16)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return set(_read(tensors, family, sizes, file).layers)


# --- Alphas ---

_LAYERS = "transformer.transformer_blocks.0.attn.to_out.0", "transformer.proj_out"


def _two() -> dict[str, Tensor]:
    return _pair(_LAYERS[0], 256, 256) | _pair(_LAYERS[1], 256, 64, rank=16)


def _scales(said: Mapping[str, Any], sizes: dict[Family, Sizes], file: Path, **beside: Tensor) -> tuple[float, ...]:
    adapter = _read({**_two(), **beside}, "flux", sizes["flux"], file, lora_adapter_metadata=json.dumps(said))
    return tuple(adapter.layers[name].scale for name in _LAYERS)


def test_the_metadatas_alpha_is_used(sizes: dict[Family, Sizes], file: Path) -> None:
    assert _scales({"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 1}, sizes, file) == (2.0, 0.5)
    assert _scales({"lora_alpha": 8.0}, sizes, file) == (2.0, 0.5)
    assert _scales({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, sizes, file) == (4.0, 2.0)


def test_a_layers_own_alpha_goes_before_the_metadatas(sizes: dict[Family, Sizes], file: Path) -> None:
    own = {f"{_LAYERS[0]}.alpha": torch.tensor([1.0])}
    assert _scales({"transformer.lora_alpha": 8}, sizes, file, **own) == (0.25, 0.5)


def test_the_given_alpha_is_for_layers_without_their_own(sizes: dict[Family, Sizes], file: Path) -> None:
    file.write_bytes(save({**_two(), f"{_LAYERS[0]}.alpha": torch.tensor(1.0)}))
    facts = look(file, "flux", sizes["flux"], alpha=4.0, max_rank=256)
    assert facts.alpha_scale == (0.25, 0.25)
    assert not facts.has_alpha
    assert look(file, "flux", sizes["flux"], alpha=None, max_rank=256).alpha_scale == (0.25, 1.0)


_KINDS = [({"transformer.use_dora": True}, UnsupportedFormat), ({"transformer.lora_bias": True}, UnsupportedFormat)]
_KINDS += [({"modules_to_save": ["norm"]}, UnsupportedFormat), ({"transformer.lora_alpha": "8"}, UnsupportedFormat)]
_KINDS += [
    ({"transformer.lora_alpha": True}, UnsupportedFormat),
    ({"transformer.lora_alpha": 10**400}, UnsupportedFormat),
]
_KINDS += [
    ({"transformer.lora_alpha": float("nan")}, NotFinite),
    ({"alpha_pattern": {"a": 1}}, UnsupportedFormat),
]
_KINDS += [([1], UnsupportedFormat)]


@pytest.mark.parametrize(("said", "kind"), _KINDS)
def test_metadata_that_is_not_understood_is_refused(
    said: Any, kind: type[LoraRefused], sizes: dict[Family, Sizes], file: Path
) -> None:
    with pytest.raises(kind, match="lora_adapter_metadata"):
        _scales(said, sizes, file)


@pytest.mark.parametrize("said", ["{", "[" * 100_000, "9" * 5000])
def test_metadata_that_is_no_object_is_refused(said: str, sizes: dict[Family, Sizes], file: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="lora_adapter_metadata"):
        _read(_two(), "flux", sizes["flux"], file, lora_adapter_metadata=said)


# --- What is refused ---


_BAD = lora_files.bad()


@pytest.mark.parametrize("name", _BAD)
def test_a_bad_file_is_refused_by_what_is_wrong_with_it(name: str, models: list[Variant], file: Path) -> None:
    content, code = _BAD[name]
    file.write_bytes(content)
    with pytest.raises(LoraRefused) as refused:
        check(file, models, alpha=None, max_rank=256, cache=file.parent)
    assert refused.value.code == code


def test_a_file_is_cut_short_wherever_it_was_cut(sizes: dict[Family, Sizes], file: Path) -> None:
    content = lora_files.file(lora_files.layers("sdxl"), "kohya")
    head = 8 + int.from_bytes(content[:8], "little")
    for kept in (9, 100, head - 9, head - 1, head, head + 1, len(content) - 1):
        file.write_bytes(content[:kept])
        with pytest.raises(Truncated):
            look(file, "sdxl", sizes["sdxl"], alpha=None, max_rank=256)


def test_a_refusal_names_the_key_and_each_model(models: list[Variant], file: Path) -> None:
    file.write_bytes(lora_files.bad()["another model's"][0])
    with pytest.raises(WrongModel) as refused:
        check(file, models, alpha=None, max_rank=256, cache=file.parent)
    assert "flux-dev-base: transformer.transformer_blocks.0.attn.to_q.lora_A.weight: [4, 1536]" in refused.value.message
    assert "sdxl-base: " in refused.value.message
    assert str(models[0].base) not in refused.value.message


@pytest.mark.parametrize(
    "second", ["transformer.proj_out.lora_down.weight", "diffusion_model.final_layer.linear.lora_A.weight"]
)
def test_two_keys_for_one_layer_are_refused(second: str, sizes: dict[Family, Sizes], file: Path) -> None:
    ending = KOHYA if "lora_down" in second else PEFT
    twice = _pair("transformer.proj_out", 256, 64) | _pair(second.removesuffix(ending[0]), 256, 64, ending=ending)
    with pytest.raises(UnsupportedFormat, match="for the same layer"):
        _read(twice, "flux", sizes["flux"], file)


_NAMES = [
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_single_blocks_0_linear1",
    "lora_unet_double_blocks_99_img_mlp_0",
]
_NAMES += ["lora_transformer_nothing", "lora_transformer_single_transformer_blocks_x", "lora_unet_input_blocks_x_0_op"]
_NAMES += ["diffusion_model.double_blocks.0.processor.qkv_lora1", "double_blocks.x.processor.proj_lora1", "lora_unet_"]
_NAMES += ["lora_unet_output_blocks_9_9_x", "base_model.model.", "a" * 280, "\u00e4\n\t\u202e\x7f", "transformer.alpha"]
_NAMES += [
    "text_encoder.text_model.encoder.layers.0.self_attn.to_x_lora",
    "unet",
    "lora_te1_",
    "lora_unet_middle_block_7_x",
]


@pytest.mark.parametrize("ending", [KOHYA, PEFT, OLD])
@pytest.mark.parametrize("name", _NAMES)
def test_names_that_diffusers_converters_do_not_know_are_of_no_model(
    name: str, ending: tuple[str, str], models: list[Variant], file: Path
) -> None:
    """Their errors are of many kinds: assertions, look-ups, splits; or they leave a name out, or make one up."""
    file.write_bytes(save(_pair(name, 16, 17, ending=ending)))
    with pytest.raises(WrongModel) as refused:
        check(file, models, alpha=None, max_rank=256, cache=file.parent)
    assert refused.value.message.isprintable()


# --- In a process of its own, as at a registration ---


@pytest.mark.slow
async def test_a_file_is_looked_at_in_a_process_without_peft(
    tiny_sdxl: TinyWeights, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which tests alone install."""
    (file.parent / "sitecustomize.py").write_text("import sys\nsys.modules['peft'] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{file.parent}{os.pathsep}{Path.cwd()}")
    sdxl = {"definition": {"family": "sdxl", "file": "none", "base": str(tiny_sdxl.folder / "sdxl-base")}}
    checked = CheckedApart(Settings(variants={"telea": {}}, generators={"mine": sdxl, "flux-dev-Q8_0": {}}))
    file.write_bytes(lora_files.file(lora_files.layers("sdxl"), "kohya", alpha=1.0))
    facts = await checked.check(file, alpha=None)
    assert (facts.family, facts.format, facts.alpha_scale) == ("sdxl", "kohya", (0.25, 0.25))
    # Of the tiny FLUX.1-dev, and the one that is served is the published one.
    file.write_bytes(lora_files.file(lora_files.layers("flux"), "diffusers"))
    with pytest.raises(WrongModel, match=r"FLUX\.1-dev: .* do not fit"):
        await checked.check(file, alpha=None)


def test_a_model_is_described_by_what_is_on_this_machine(tmp_path: Path) -> None:
    tiny, folder = BUILT_IN["tiny-sdxl"], Variant(family="sdxl", file=str(tmp_path), base="owner/name")
    base = base_here(tiny, tmp_path)
    assert base is not None
    assert (base / "unet" / "config.json").is_file()
    assert base_here(folder, tmp_path) == tmp_path
    assert base_here(tiny.model_copy(update={"base": "owner/name"}), tmp_path) is None
    assert base_here(Variant(family="sdxl"), tmp_path) is None


# --- Hostile ones ---


def test_a_tensor_that_no_layer_takes_is_not_read(sizes: dict[Family, Sizes], file: Path) -> None:
    """2 GB of zeros, which take no place on the disk, and would in memory."""
    wide = 250_000_000
    head = {
        "unet.conv_in.lora_A.weight": {"dtype": "F32", "shape": [1, wide], "data_offsets": [0, 4 * wide]},
        "unet.conv_in.lora_B.weight": {"dtype": "F32", "shape": [wide, 1], "data_offsets": [4 * wide, 8 * wide]},
    }
    content = lora_files.with_header(head)
    with file.open("wb") as written:
        written.write(content)
        written.truncate(len(content) + 8 * wide)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WrongModel, match="fit no layer"):
        look(file, "sdxl", sizes["sdxl"], alpha=None, max_rank=256)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_more_tensors_than_any_lora_has_are_refused(sizes: dict[Family, Sizes], file: Path) -> None:
    entries = {f"{number:x}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for number in range(20_001)}
    file.write_bytes(lora_files.with_header(entries))
    with pytest.raises(LoraTooLarge, match="20001 tensors"):
        look(file, "sdxl", sizes["sdxl"], alpha=None, max_rank=256)


def test_a_header_larger_than_any_loras_is_refused(sizes: dict[Family, Sizes], file: Path) -> None:
    file.write_bytes(lora_files.with_header({"__metadata__": {"a": " " * 25_000_000}}))
    with pytest.raises(LoraTooLarge, match="header"):
        look(file, "sdxl", sizes["sdxl"], alpha=None, max_rank=256)


_HEADERS = {
    "a hole": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "a size that is not the shape's": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "a size that overflows": {"a": {"dtype": "F32", "shape": [2**32, 2**32, 4], "data_offsets": [0, 0]}},
    "a negative size": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "an unknown type": {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
    "metadata that is no text": {"__metadata__": {"a": 1}},
}


@pytest.mark.parametrize("what", _HEADERS)
def test_a_header_with_something_wrong_is_not_safetensors(what: str, sizes: dict[Family, Sizes], file: Path) -> None:
    file.write_bytes(lora_files.with_header(_HEADERS[what], bytes(8)))
    with pytest.raises(NotSafetensors):
        look(file, "sdxl", sizes["sdxl"], alpha=None, max_rank=256)


_GOOD = [
    lora_files.file(lora_files.layers(family, rank=1), writer, alpha=1.0)
    for family in WRITERS
    for writer in WRITERS[family]
]
_ALL = [*_GOOD, *(content for content, _ in _BAD.values())]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.sampled_from(_ALL),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 8)), max_size=8),
    cut=st.floats(0, 1),
)
def test_a_file_with_bytes_changed_is_read_or_refused(
    content: bytes, changes: list[tuple[float, bytes, int]], cut: float, sizes: dict[Family, Sizes], file: Path
) -> None:
    """In its header, and cut short, mostly: nothing but LoraRefused comes of it."""
    changed = bytearray(content)
    head = min(len(changed), 8 + int.from_bytes(content[:8], "little"))
    for where, what, over in changes:
        at = int(where * head)
        changed[at : at + over] = what
    file.write_bytes(changed[: len(changed) - int(cut**8 * len(changed))])
    _look_at_for_each_family(file, sizes)


_WORDS = [
    "lora_unet_",
    "lora_te1_",
    "lora_transformer_",
    "transformer.",
    "unet.",
    "text_encoder.",
    "diffusion_model.",
    "base_model.model.",
]
_WORDS += [
    "double_blocks",
    "single_blocks",
    "input_blocks",
    "middle_block",
    "down_blocks",
    "transformer_blocks",
    "processor",
    "attn",
    "_",
    ".",
]
_WORDS += [
    "img_attn_qkv",
    "linear1",
    "linear2",
    "to_q",
    "to_out",
    "_lora",
    "proj",
    "0",
    "1",
    "19",
    "final_layer",
    "norm",
    "alpha",
    "op",
    "emb",
]


@given(
    stems=st.lists(st.lists(st.sampled_from(_WORDS), max_size=8).map("".join), min_size=1, max_size=3),
    ending=st.sampled_from([KOHYA, PEFT, OLD]),
    rank=st.sampled_from([1, 3, 4]),
    sides=st.tuples(*[st.sampled_from([1, 16, 17, 256, 768])] * 2),
    alpha=st.none() | st.floats(width=32),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_of_any_names_is_read_or_refused(
    stems: list[str],
    ending: tuple[str, str],
    rank: int,
    sides: tuple[int, int],
    alpha: float | None,
    sizes: dict[Family, Sizes],
    file: Path,
) -> None:
    tensors = {name: tensor for stem in stems for name, tensor in _pair(stem, *sides, rank=rank, ending=ending).items()}
    beside = {} if alpha is None else {f"{stems[0]}.alpha": torch.tensor(alpha)}
    file.write_bytes(save(tensors | beside))
    _look_at_for_each_family(file, sizes)


def _look_at_for_each_family(file: Path, sizes: dict[Family, Sizes]) -> None:
    for family in WRITERS:
        try:
            look(file, family, sizes[family], alpha=None, max_rank=256)
        except LoraRefused as e:
            assert e.message.isprintable()
