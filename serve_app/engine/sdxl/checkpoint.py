"""What a file or folder of Stable Diffusion weights holds, by its header alone."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...errors import CorruptWeights

_WANTED = "a Stable Diffusion XL base model with its UNet, VAE and both text encoders"
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
#: Channels of a UNet's input that are noise alone.
_CHANNELS = 4
#: Prefix of a name -> what a file is that has such tensors, nothing where it is what is wanted; the first that fits.
_KINDS: Mapping[str, str] = {
    "conditioner.embedders.1.model.": "",
    "conditioner.embedders.0.model.": "the refiner of Stable Diffusion XL",
    "cond_stage_model.transformer.": "Stable Diffusion 1",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "model.diffusion_model.label_emb.": "a Stable Diffusion XL without text encoders",
    "lora_": "a LoRA",
    "double_blocks.": "FLUX.1",
    "model.diffusion_model.double_blocks.": "FLUX.1",
    "down_blocks.": "a UNet alone, in diffusers' names",
}
#: How zip files begin, in which torch pickles, and pickles of protocols 2 to 5.
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_PARTS = ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.transformer.")


def check(path: Path) -> None:
    """Raises CorruptWeights, which says what the file or folder is and what is wanted, unless it is SDXL's base."""
    if problem := _of_folder(path) if path.is_dir() else _of_file(path):
        raise CorruptWeights(f"{path} is {problem}; wanted is {_WANTED}", file=str(path))


def _of_file(path: Path) -> str:
    """What it is instead, or nothing."""
    if path.suffix != ".safetensors":
        # diffusers would unpickle it.
        return "not a .safetensors file; other kinds are not loaded, because they may run code"
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            channels = file.get_slice(_CONV_IN).get_shape()[1] if _CONV_IN in names else 0
    except SafetensorError as e:
        with path.open("rb") as content:
            is_pickle = content.read(2) in _PICKLES
        return "a pickle, whatever its name, and may run code" if is_pickle else f"no whole safetensors file: {e}"
    if channels > _CHANNELS:
        return f"made for inpainting: its UNet takes {channels} channels, not {_CHANNELS}"

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    kind = next((kind for prefix, kind in _KINDS.items() if has(prefix)), "of another kind")
    lacking = [part for part in _PARTS if not has(part)]
    return kind or (f"incomplete: it has no tensor {lacking[0]}*" if lacking else "")


def _of_folder(path: Path) -> str:
    try:
        index = json.loads((path / "model_index.json").read_text())
        channels = json.loads((path / "unet" / "config.json").read_text())["in_channels"]
        kind, absent = index["_class_name"], [part for part in _FOLDERS if not index.get(part, [None])[0]]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as e:
        return f"no folder of diffusers: {e!r}"
    if channels != _CHANNELS:
        return f"made for inpainting: its UNet takes {channels} channels, not {_CHANNELS}"
    if not str(kind).startswith("StableDiffusionXL"):
        return f"a model for {kind}"
    return f"incomplete: model_index.json names no {absent[0]}" if absent else ""
