"""Tiny checkpoints of the real architectures with random weights, GGUF files included.

They let tests and laptops run the real loader and the real pipeline: what they paint is noise. About 30 MB, written in
seconds, always the same bytes from the same library versions. The GGUF files carry diffusers' own tensor names,
because its converter from the original names takes no other width than the full model's.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from . import q5_k

#: Part of the folder's name: raise it when what is written changes.
FORMAT, FORMAT_DEV = 2, 1

SEED = 0
#: Width of everything: the least that K-quants take, since they pack rows in blocks of 256.
_WIDTH = 256
_FILL_CHANNELS, _DEV_CHANNELS = 384, 64
#: Longest CLIP prompt, in tokens, as in the real model.
_CLIP_TOKENS = 77


@dataclass(frozen=True, slots=True)
class TinyWeights:
    folder: Path

    @property
    def base(self) -> Path:
        """VAE, scheduler, text encoders, tokenizers and the transformer's config, in the hub's layout."""
        return self.folder / "base"

    def transformer(self, file: str) -> Path:
        """The GGUF file called `file`, e.g. `flux1-fill-dev-Q4_0.gguf`; it need not exist."""
        return self.folder / file


def ensure(folder: Path, write: Callable[[Path], None] | None = None) -> TinyWeights:
    """The checkpoints in `folder`, written there first, by `write`, where they are absent; by default FLUX.1-Fill's.

    Several processes may call it at once: one writes, into a folder beside it that is then renamed, and the others
    wait. The global random state of torch is left as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                (write or write_fill)(beside)
                beside.rename(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return TinyWeights(folder)


def write_fill(folder: Path) -> None:
    """FLUX.1-Fill: `base`, a GGUF file of each quantisation, and `turbo.safetensors`, a LoRA."""
    files = {folder / f"flux1-fill-dev-{quant}.gguf": quant for quant in packers()}
    _write(folder / "base", files, in_channels=_FILL_CHANNELS)
    _write_lora(folder / "turbo.safetensors")


def write_dev(folder: Path) -> None:
    """FLUX.1-dev: `flux-dev-base` and `flux1-dev-Q8_0.gguf`."""
    _write(folder / "flux-dev-base", {folder / "flux1-dev-Q8_0.gguf": "Q8_0"}, in_channels=_DEV_CHANNELS)


def _write(base: Path, files: Mapping[Path, str], in_channels: int) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        transformer = _transformer(in_channels)
        _vae().save_pretrained(base / "vae")
        _write_text_encoders(base)
    transformer.save_config(base / "transformer")
    _scheduler().save_pretrained(base / "scheduler")
    tensors = {name: tensor.float().numpy() for name, tensor in transformer.state_dict().items()}
    for file, quant in files.items():
        write_gguf(file, tensors, *packers()[quant])


def _transformer(in_channels: int) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )


def _write_lora(path: Path) -> None:
    """Rank 4, for each linear of a FLUX.1-dev, as LoRAs that save steps are made for."""
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):
        layers = _transformer(_DEV_CHANNELS).named_modules(prefix="transformer")
    generator, tensors = torch.Generator().manual_seed(SEED), {}
    for name, layer in layers:
        if isinstance(layer, torch.nn.Linear):
            for half, shape in (("A", (4, layer.in_features)), ("B", (layer.out_features, 4))):
                tensors[f"{name}.lora_{half}.weight"] = 0.05 * torch.randn(shape, generator=generator)
    save_file(tensors, path)


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        # FLUX.1's own.
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def _write_text_encoders(base: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(write_clip_tokenizer(base / "tokenizer")),
            hidden_size=_WIDTH,
            intermediate_size=_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            projection_dim=_WIDTH,
            max_position_embeddings=_CLIP_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(base / "text_encoder")

    printable = [(chr(code), -5.0) for code in range(33, 127)]
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *printable, ("\u2581", -2.0)]
    T5TokenizerFast(vocab=scored, extra_ids=0, model_max_length=512).save_pretrained(base / "tokenizer_2")
    T5EncoderModel(
        T5Config(vocab_size=len(scored), d_model=_WIDTH, d_kv=64, d_ff=_WIDTH, num_layers=1, num_heads=4)
    ).save_pretrained(base / "text_encoder_2")


def write_clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer, which is also in the folder from now on."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    # Every byte alone, within a word and at its end: any text can be encoded, and no merges are needed.
    letters = sorted(ByteLevel.alphabet())
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=_CLIP_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


Array = npt.NDArray[Any]
#: The GGML type, and what packs a float32 matrix into its bytes.
Packer = tuple[Any, Callable[[Array], Array]]


def packers() -> Mapping[str, Packer]:
    """By the name that published files carry."""
    from gguf import GGMLQuantizationType, quants

    def by_gguf(kind: Any) -> Packer:
        return kind, lambda array: quants.quantize(array, kind)

    return {
        "Q4_0": by_gguf(GGMLQuantizationType.Q4_0),
        "Q5_K_S": (GGMLQuantizationType.Q5_K, q5_k.pack),
        "Q8_0": by_gguf(GGMLQuantizationType.Q8_0),
    }


def write_gguf(path: Path, tensors: Mapping[str, Array], kind: Any, pack: Callable[[Array], Array]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "flux")
    for name, array in tensors.items():
        # As in published files: embedders and vectors stay unquantised.
        if array.ndim == 2 and array.shape[1] % q5_k.BLOCK == 0 and "embed" not in name:
            writer.add_tensor(name, pack(array), raw_dtype=kind)
        else:
            writer.add_tensor(name, array if array.ndim < 2 else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
