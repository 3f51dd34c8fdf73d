"""From the names that programs give a LoRA's layers to those of the pipeline, by diffusers' own converters, but where
they are the pipeline's with `_` for `.`.

One layer's pair is converted at a time: so a refusal can name its key, and no converter sees an alpha, which diffusers
multiplies into FLUX.1's tensors, in a loop that does not end where it is negative.
"""

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from diffusers.loaders.lora_pipeline import (
    Flux2LoraLoaderMixin,
    FluxLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
)
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from ...models import Family
from .contents import KOHYA, OLD, PEFT, Pair

#: Layers of text encoders.
_TEXT = ("lora_te", "text_encoder")
#: Where the names of FLUX's original code begin.
_ORIGINAL = (
    "double_blocks", "single_blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer",
    "double_stream", "single_stream",
)  # fmt: skip
#: Of FLUX.2: there diffusers' converter leaves shift and scale in the original's places.
_LAST_NORM = re.compile(r"final_layer.adaLN_modulation.1$")
#: Before names of the pipeline with `_` for `.`, as OneTrainer, LyCORIS and some files of kohya's have them. diffusers
#: knows of OneTrainer's only those of attention.
_JOINED = re.compile(r"(?:lora_transformer|lora_unet|lycoris)_(.+)")
#: What a stem begins with, and who writes so; diffusers' scripts and SimpleTuner where nothing fits.
_WRITERS = {"lora_": "kohya", "diffusion_model.": "ai-toolkit", "base_model.model.": "peft", "double_": "xlabs"}
_WRITERS |= {"single_": "xlabs", "lycoris_": "lycoris"}


def is_of_text_encoder(stem: str) -> bool:
    return stem.startswith(_TEXT)


def writer(stem: str) -> str:
    return next((name for prefix, name in _WRITERS.items() if stem.startswith(prefix)), "diffusers")


def joined(layers: Iterable[str]) -> Mapping[str, str]:
    """Layers of the pipeline by their names with `_` for `.`, without their component's; none of text encoders."""
    return {name.partition(".")[2].replace(".", "_"): name for name in layers if not is_of_text_encoder(name)}


def converted(
    family: Family, pair: Pair, down: Tensor, up: Tensor, *, joined: Mapping[str, str], layers_per_block: int
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """The pairs that this one stands for, by the names of the pipeline's layers. It is several where the writer has q,
    k and v as one. `layers_per_block` is of SDXL's UNet.

    Raises whatever diffusers' converters raise for names that they do not know, and ValueError.
    """
    if (match := _JOINED.fullmatch(pair.stem)) and match[1] in joined:
        return {joined[match[1]]: (down, up)}
    of_flux = {"flux": FluxLoraLoaderMixin, "flux2-klein": Flux2LoraLoaderMixin}.get(family)
    stem, ending = _flux(pair.stem, pair.ending) if of_flux else _sdxl(pair.stem, pair.ending)
    if family == "flux2-klein":
        if _LAST_NORM.search(stem):
            raise ValueError(f"{stem} would be converted to the wrong rows")
        ending = KOHYA if stem.startswith("lora_") else PEFT
    state = {stem + ending[0]: down, stem + ending[1]: up}
    if of_flux:
        state = of_flux.lora_state_dict(state)
        # diffusers leaves this out of some, and then those layers; so does a component that was saved alone.
        state = {f"transformer.{key.removeprefix('transformer.')}": tensor for key, tensor in state.items()}
    else:
        unet = SimpleNamespace(layers_per_block=layers_per_block)
        state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(state, unet_config=unet)
        if all(key.startswith("unet.") for key in state):
            state = convert_unet_state_dict_to_peft(state)
        else:
            old = any("_lora." in key for key in state)
            state = convert_state_dict_to_peft(state, StateDictType.DIFFUSERS_OLD if old else StateDictType.DIFFUSERS)
    names = [key.removesuffix(PEFT[0]) for key in state if key.endswith(PEFT[0])]
    if not names or len(state) != 2 * len(names):
        raise ValueError(f"converted to {list(state)}")
    return {name: (state[name + PEFT[0]], state[name + PEFT[1]]) for name in names}


def _flux(stem: str, ending: tuple[str, str]) -> tuple[str, tuple[str, str]]:
    """As the converters take it."""
    for prefix in ("base_model.model.", "diffusion_model."):
        if stem.startswith(prefix):
            name = stem.removeprefix(prefix)
            stem = f"diffusion_model.{name}" if name.startswith(_ORIGINAL) else f"transformer.{name}"
    if ".processor." in stem:
        return stem, OLD
    return stem, KOHYA if stem.startswith(("lora_", "diffusion_model.")) else PEFT


def _sdxl(stem: str, ending: tuple[str, str]) -> tuple[str, tuple[str, str]]:
    if stem.startswith("base_model.model."):
        stem = f"unet.{stem.removeprefix('base_model.model.')}"
    elif stem.startswith("diffusion_model."):
        stem = f"lora_unet_{stem.removeprefix('diffusion_model.').replace('.', '_')}"
    elif not stem.startswith(("unet.", *_TEXT, "lora_")):
        # Of a component that was saved alone.
        stem = f"unet.{stem}"
    if stem.startswith("lora_"):
        return stem, KOHYA
    return stem, OLD if ending == OLD else PEFT
