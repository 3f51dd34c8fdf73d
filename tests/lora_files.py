"""LoRA files for the tiny models, as the programs in the field write them, and files that are refused. A seed makes
the same bytes every time."""

import json
import pickle
import re
import struct
from collections.abc import Mapping
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

Family = Literal["sdxl", "flux"]
Writer = Literal["kohya", "ai-toolkit", "diffusers", "old-diffusers", "peft", "simpletuner", "xlabs"]
#: down and up, by the layer's name in the pipeline.
Layers = dict[str, tuple[Tensor, Tensor]]

#: By family, those that write files for it.
WRITERS: Mapping[Family, tuple[Writer, ...]] = {
    "sdxl": ("kohya", "diffusers", "old-diffusers", "peft"),
    "flux": ("kohya", "ai-toolkit", "diffusers", "simpletuner", "peft"),
}

#: Of the tiny FLUX.1-dev: inputs and outputs of layers.
_FLUX = {
    **{f"transformer_blocks.{n}.attn.to_{to}": (256, 256) for n in range(2) for to in ("q", "k", "v", "out.0")},
    **{f"transformer_blocks.{n}.ff.net.0.proj": (256, 1024) for n in range(2)},
    **{f"single_transformer_blocks.{n}.proj_out": (1280, 256) for n in range(4)},
}
_FLUX_MODULATION = {
    "transformer_blocks.0.norm1.linear": (256, 1536),
    "transformer_blocks.1.norm1_context.linear": (256, 1536),
    "single_transformer_blocks.3.norm.linear": (256, 768),
    "norm_out.linear": (256, 512),
    "time_text_embed.timestep_embedder.linear_1": (256, 256),
}
_SDXL_ATTENTION = (
    "down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1",
)  # fmt: skip
_SDXL = {
    f"{block}.transformer_blocks.0.{layer}": shape
    for block in _SDXL_ATTENTION
    for layer, shape in (
        ("attn1.to_q", (16, 16)), ("attn1.to_out.0", (16, 16)), ("attn2.to_k", (96, 16)), ("attn2.to_v", (96, 16)),
        ("ff.net.0.proj", (16, 128)),
    )
}  # fmt: skip
_SDXL_CONVS = {
    "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    "mid_block.resnets.0.conv2": (16, 16, 3, 3),
    "down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
    "down_blocks.1.resnets.0.conv_shortcut": (8, 16, 1, 1),
}


def _encoder(name: str, width: int) -> dict[str, tuple[int, ...]]:
    layers = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
    return {f"{name}.text_model.encoder.layers.0.{layer}": (width, width) for layer in layers}


def layers(
    family: Family,
    seed: int = 0,
    *,
    rank: int = 4,
    strength: float = 1.0,
    modulation: bool = False,
    convs: bool = False,
    text_encoders: bool = False,
) -> Layers:
    """float32. `modulation` is FLUX's alone, `convs` SDXL's. FLUX's q, k and v share their down: some writers have
    them as one layer."""
    if family == "flux":
        shapes = {
            f"transformer.{name}": shape for name, shape in (_FLUX | (_FLUX_MODULATION if modulation else {})).items()
        }
        shapes |= _encoder("text_encoder", 256) if text_encoders else {}
    else:
        shapes = {f"unet.{name}": shape for name, shape in (_SDXL | (_SDXL_CONVS if convs else {})).items()}
        shapes |= _encoder("text_encoder", 32) | _encoder("text_encoder_2", 64) if text_encoders else {}
    random = torch.Generator().manual_seed(seed)
    made: Layers = {}
    for name, (wide, out, *kernel) in shapes.items():
        down = torch.randn(rank, wide, *kernel, generator=random) / wide**0.5
        up = torch.randn(out, rank, *[1] * len(kernel), generator=random) * strength / rank**0.5
        shared = made.get(name.replace(".to_k", ".to_q").replace(".to_v", ".to_q")) if family == "flux" else None
        made[name] = (shared[0] if shared else down, up)
    return made


def file(
    made: Layers, writer: Writer, *, alpha: float | None = None, dtype: torch.dtype = torch.float16, **metadata: str
) -> bytes:
    """Its bytes. `alpha` is written as the writer does: beside each layer, or in the metadata."""
    return save(tensors(made, writer, alpha=alpha, dtype=dtype), _metadata(made, writer, alpha) | metadata or None)


def tensors(
    made: Layers, writer: Writer, *, alpha: float | None = None, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    if writer in ("kohya", "ai-toolkit", "xlabs"):
        made = _fused(made)
    down, up = _PARTS[writer]
    written: dict[str, Tensor] = {}
    for name, (first, second) in made.items():
        stem = _stem(name, writer)
        if name.startswith("transformer.norm_out") and writer in ("kohya", "ai-toolkit"):
            # Shift and scale change places.
            second = torch.cat(second.chunk(2)[::-1])
        written[stem + down] = first.to(dtype).clone()
        written[stem + up] = second.to(dtype).contiguous()
        if alpha is not None and writer in ("kohya", "ai-toolkit"):
            written[stem + ".alpha"] = torch.tensor(alpha).to(dtype)
    return written


def _metadata(made: Layers, writer: Writer, alpha: float | None) -> dict[str, str]:
    if alpha is None or writer not in ("simpletuner", "diffusers", "peft"):
        return {}
    said: dict[str, Any] = {}
    for name, (down, _) in made.items():
        component = name.partition(".")[0]
        said |= {f"{component}.r": len(down), f"{component}.lora_alpha": alpha}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(said)}


_PARTS: Mapping[Writer, tuple[str, str]] = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "ai-toolkit": (".lora_down.weight", ".lora_up.weight"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "simpletuner": (".lora_A.weight", ".lora_B.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "old-diffusers": (".down.weight", ".up.weight"),
    "xlabs": (".down.weight", ".up.weight"),
}

#: FLUX's names in the original code.
_ORIGINAL = (
    ("single_transformer_blocks", "single_blocks"), ("transformer_blocks", "double_blocks"),
    ("attn.qkv", "img_attn.qkv"), ("attn.to_out.0", "img_attn.proj"), ("ff.net.0.proj", "img_mlp.0"),
    ("ff.net.2", "img_mlp.2"), ("norm1.linear", "img_mod.lin"), ("norm1_context.linear", "txt_mod.lin"),
    ("proj_out", "linear2"), ("norm_out.linear", "final_layer.adaLN_modulation.1"), ("norm.linear", "modulation.lin"),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
)  # fmt: skip
#: SDXL's, of the tiny model.
_SGM = (
    ("down_blocks.0.resnets.0", "input_blocks.1.0"), ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
    ("down_blocks.1.resnets.0", "input_blocks.3.0"), ("down_blocks.1.attentions.0", "input_blocks.3.1"),
    ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
    ("up_blocks.0.attentions.0", "output_blocks.0.1"), ("up_blocks.0.attentions.1", "output_blocks.1.1"),
    ("conv1", "in_layers.2"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
)  # fmt: skip


def _stem(name: str, writer: Writer) -> str:
    component, _, layer = name.partition(".")
    if component.startswith("text_encoder"):
        if writer in ("kohya", "ai-toolkit"):
            return ("lora_te2_" if component.endswith("2") else "lora_te1_") + layer.replace(".", "_")
        return f"{name}.lora_linear_layer" if writer == "old-diffusers" else name
    if writer == "kohya":
        for ours, theirs in _ORIGINAL if component == "transformer" else _SGM:
            layer = layer.replace(ours, theirs)
        return "lora_unet_" + layer.replace(".", "_")
    if writer == "ai-toolkit":
        for ours, theirs in _ORIGINAL:
            layer = layer.replace(ours, theirs)
        return f"diffusion_model.{layer}"
    if writer == "peft":
        return f"base_model.model.{layer}"
    if writer == "old-diffusers":
        attention = re.sub(r"\.(attn\d)\.(to_[a-z]+)(\.0)?$", r".\1.processor.\2_lora", name)
        return attention if attention != name else f"{name}.lora"
    return name


def _fused(made: Layers) -> Layers:
    """With FLUX's q, k and v as one layer."""
    fused: Layers = {}
    for name, (down, up) in made.items():
        if name.startswith("transformer.") and name.endswith((".to_k", ".to_v")):
            continue
        if name.startswith("transformer.") and name.endswith(".to_q"):
            up = torch.cat([made[name[:-1] + letter][1] for letter in "qkv"])
            name = name.replace(".to_q", ".qkv")
        fused[name] = (down, up)
    return fused


def header(file: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", file[:8])
    read: dict[str, Any] = json.loads(file[8 : 8 + length])
    return read


def with_header(head: Any, data: bytes = b"") -> bytes:
    text = (head if isinstance(head, str) else json.dumps(head)).encode()
    return struct.pack("<Q", len(text)) + text + data


def _with(change: Mapping[str, Tensor | None], writer: Writer = "diffusers", family: Family = "sdxl") -> bytes:
    """A file with these tensors beside its own; None leaves one out."""
    changed = {**tensors(layers(family), writer), **change}
    return save({name: tensor for name, tensor in changed.items() if tensor is not None})


def _overlapping() -> bytes:
    head = header(file(layers("sdxl"), "diffusers"))
    first, second, *_ = head.values()
    second["data_offsets"] = first["data_offsets"]
    return with_header(head, b"\0" * max(entry["data_offsets"][1] for entry in head.values()))


_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
_KOHYA_Q = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
_H = torch.float16


def bad() -> Mapping[str, tuple[bytes, str]]:
    """Files that are refused by SDXL and FLUX.1-dev alike, with the code that refuses them."""
    good = file(layers("sdxl"), "diffusers")
    a, b = f"{_Q}.lora_A.weight", f"{_Q}.lora_B.weight"

    def pair(
        kind: torch.dtype = _H, rank: int = 4, wide: int = 16, out: int = 16, of: float = 0.1
    ) -> dict[str, Tensor]:
        return {a: torch.full((rank, wide), of).to(kind), b: torch.full((out, rank), of).to(kind)}

    def alpha(value: Tensor) -> bytes:
        return _with({f"{_KOHYA_Q}.alpha": value}, "kohya")

    return {
        "nothing": (b"", "not_safetensors"),
        "a pickle": (pickle.dumps({"a": [1.0]}), "not_safetensors"),
        "a zip": (b"PK\x03\x04" + bytes(100), "not_safetensors"),
        "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not_safetensors"),
        "text": (b"version https://git-lfs.github.com/spec/v1\n", "not_safetensors"),
        "a huge header length": (struct.pack("<Q", 2**62) + good[8:], "not_safetensors"),
        "a header that is no JSON": (with_header("{nothing", bytes(64)), "not_safetensors"),
        "a header that is a list": (with_header([1, 2]), "not_safetensors"),
        "no tensors": (with_header({}), "unsupported_format"),
        "overlapping offsets": (_overlapping(), "not_safetensors"),
        "cut in its data": (good[:-100], "truncated"),
        "cut in its header": (good[:200], "truncated"),
        "trailing bytes": (good + b"\0" * 10, "truncated"),
        "LoKr": (_with({f"{_KOHYA_Q}.lokr_w1": torch.ones(4, 4, dtype=_H)}, "kohya"), "unsupported_format"),
        "LoHa": (_with({f"{_KOHYA_Q}.hada_w1_a": torch.ones(16, 4, dtype=_H)}, "kohya"), "unsupported_format"),
        "Tucker": (_with({f"{_KOHYA_Q}.lora_mid.weight": torch.ones(4, 4, dtype=_H)}, "kohya"), "unsupported_format"),
        "DoRA of kohya": (
            _with({f"{_KOHYA_Q}.dora_scale": torch.ones(16, 1, dtype=_H)}, "kohya"),
            "unsupported_format",
        ),
        "DoRA of PEFT": (_with({f"{_Q}.lora_magnitude_vector": torch.ones(16, dtype=_H)}), "unsupported_format"),
        "a LoRA's bias": (_with({f"{_Q}.lora_B.bias": torch.ones(16, dtype=_H)}), "unsupported_format"),
        "a norm": (_with({"unet.conv_norm_out.weight": torch.ones(8, dtype=_H)}), "unsupported_format"),
        "a control LoRA's norm": (
            _with({"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(64, dtype=_H)}, family="flux"),
            "unsupported_format",
        ),
        "a control LoRA's input": (
            _with(
                {
                    "transformer.x_embedder.lora_A.weight": torch.ones(4, 128, dtype=_H),
                    "transformer.x_embedder.lora_B.weight": torch.ones(256, 4, dtype=_H),
                },
                family="flux",
            ),
            "unsupported_format",
        ),
        "float64": (_with(pair(torch.float64)), "unsupported_format"),
        "int8": (_with(pair(torch.int8)), "unsupported_format"),
        "float8": (_with(pair(torch.float8_e4m3fn)), "unsupported_format"),
        "up without down": (_with({a: None}), "unsupported_format"),
        "down without up": (_with({b: None}), "unsupported_format"),
        "a layer of no rank": (_with(pair(rank=0)), "unsupported_format"),
        "vectors": (
            _with({a: torch.ones(4, dtype=_H), b: torch.ones(4, dtype=_H)}),
            "unsupported_format",
        ),
        "a matrix and a convolution": (_with({b: torch.ones(16, 4, 1, 1, dtype=_H)}), "unsupported_format"),
        "a long name": (
            _with({"x" * 300 + name.removeprefix(_Q): tensor for name, tensor in pair().items()}),
            "unsupported_format",
        ),
        "an alpha alone": (_with({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "kohya"), "unsupported_format"),
        "alpha 0": (alpha(torch.tensor(0.0)), "unsupported_format"),
        "a negative alpha": (alpha(torch.tensor(-4.0)), "unsupported_format"),
        "an alpha of two": (alpha(torch.tensor([4.0, 4.0])), "unsupported_format"),
        "an alpha that is none": (alpha(torch.tensor(float("nan"))), "not_finite"),
        "a number that is none": (_with(pair(of=float("nan"))), "not_finite"),
        "an infinite number": (_with(pair(of=float("inf"))), "not_finite"),
        "a rank too large": (_with(pair(rank=300)), "too_large"),
        "an input too wide": (_with(pair(wide=17)), "wrong_model"),
        "an output too wide": (_with(pair(out=15)), "wrong_model"),
        "an unknown layer": (
            _with(
                {
                    a.replace("to_q", "to_x"): torch.ones(4, 16, dtype=_H),
                    b.replace("to_q", "to_x"): torch.ones(16, 4, dtype=_H),
                }
            ),
            "wrong_model",
        ),
        "another model's": (save(_stable_diffusion_3()), "wrong_model"),
        "no key that is known": (
            save({"lora.lora_A.weight": torch.ones(4, 4), "lora.lora_B.weight": torch.ones(4, 4)}),
            "wrong_model",
        ),
    }


def _stable_diffusion_3() -> dict[str, Tensor]:
    name = "transformer.transformer_blocks.0.attn.to_q"
    return {f"{name}.lora_A.weight": torch.ones(4, 1536), f"{name}.lora_B.weight": torch.ones(1536, 4)}
