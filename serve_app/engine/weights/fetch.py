"""From a variant to files on this machine: a local path, the cache, the mirror, or the hub, in that order.

An unpinned repository's revision is `main`, in the cache and in the mirror.
"""

import asyncio
import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import BlobNotFound, UnknownWeights, WeightsError
from ...models import TINY, Family, Variant, VariantLora
from ..cold_start import timed
from ..flux import tiny
from ..flux2 import tiny as tiny_klein
from ..sdxl import tiny as tiny_sdxl
from . import lock
from .cache import UNPINNED, Need, OnFile, Sources, cached, download, files_in, silent

__all__ = [
    "OnFile",
    "Pinned",
    "Sources",
    "Weights",
    "base_here",
    "base_revision",
    "fetch",
    "fetch_text_encoders",
    "pin",
    "pull",
    "push_to_mirror",
    "tiny_path",
]

#: Files of a base repository that painting needs. The configs are named because `push_to_mirror` uploads them last: a
#: mirror that has them has the rest.
_PAINTING = ("transformer/config.json", "vae/config.json", "vae/*", "scheduler/scheduler_config.json")
_KLEIN = (*_PAINTING, "model_index.json")
#: Files of a base repository that encoding prompts needs.
_TEXT = (
    "text_encoder/config.json", "text_encoder/*", "text_encoder_2/config.json", "text_encoder_2/*",
    "tokenizer/tokenizer_config.json", "tokenizer/*", "tokenizer_2/tokenizer_config.json", "tokenizer_2/*",
)  # fmt: skip
#: Files of a base repository that describe SDXL, whose weights are one file.
_SDXL = (
    "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/*.json",
    "tokenizer/*.txt", "tokenizer_2/*.json", "tokenizer_2/*.txt", "unet/config.json", "vae/config.json",
    "model_index.json",
)  # fmt: skip
_QWEN = ("text_encoder/config.json", "text_encoder/*", "tokenizer/tokenizer_config.json", "tokenizer/*")
#: By family: what it takes of its base repository.
_OF_BASE: Mapping[Family, Sequence[tuple[str, ...]]] = {
    "flux-fill": (_PAINTING, _TEXT),
    # Its text encoder, 8 GB, encodes one prompt once: fetched where that is done, and pulled nowhere.
    "flux2-klein": (_KLEIN,),
    "flux": (_PAINTING, _TEXT),
    "sdxl": (_SDXL,),
}
#: By family: a folder of the cache, and what writes its tiny weights there.
_TINIES: Mapping[Family, tuple[str, Callable[[Path], None]]] = {
    "flux-fill": (f"tiny-{tiny.FORMAT}", tiny.write_fill),
    "flux2-klein": (f"tiny-klein-{tiny_klein.FORMAT}", tiny_klein.write),
    "flux": (f"tiny-flux-{tiny.FORMAT_DEV}", tiny.write_dev),
    "sdxl": (f"tiny-sdxl-{tiny_sdxl.FORMAT}", tiny_sdxl.write),
}
#: Of one prompt's: more than twice those of 512 tokens in float32, `[1, 512, 7680]`.
_MAX_EMBEDDINGS_BYTES = 40_000_000
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Weights:
    """Files of one variant, all on this machine."""

    #: The file with the transformer. Of SDXL a file with all weights, or a folder in diffusers' layout.
    transformer: Path
    #: Folder with `transformer/config.json`, `vae` and `scheduler`; of SDXL with the configs of all parts.
    base: Path
    #: Of the one prompt that the variant has, as `flux2.prompt` reads it; None where it has none.
    embeddings: bytes | None = None
    #: Of `Variant.loras`, in their order.
    loras: tuple[Path, ...] = ()


async def fetch(variant: Variant, sources: Sources) -> Weights:
    """What the variant paints with, fetched first where it is not here yet.

    Raises UnknownWeights, MissingToken, GatedRepo, CorruptWeights, WeightsError; UnsafePath for a mirror's odd names;
    StoreUnavailable.
    """
    if variant.file is None or variant.base is None:
        raise UnknownWeights(f"a variant of family {variant.family} needs both `file` and `base` to have weights")
    with timed("fetch"):
        file = await _file(variant, variant, sources)
        loras = [await _file(variant, lora, sources) for lora in variant.loras]
        base = await _base(variant, sources, _OF_BASE[variant.family][0])
        return Weights(file, base, await _embeddings(variant, sources), tuple(loras))


async def fetch_text_encoders(variant: Variant, sources: Sources) -> Path:
    """The folder with the text encoders and tokenizers of the variant's base. Raises as `fetch` does."""
    with timed("fetch"):
        return await _base(variant, sources, _QWEN if variant.family == "flux2-klein" else _TEXT)


def base_here(variant: Variant, cache: Path) -> Path | None:
    """The folder that describes the variant's model, where it needs no repository."""
    base = variant.base or ""
    if base.startswith(TINY):
        return _written(variant, base, cache)
    return next((Path(place) for place in (base, variant.file) if place and Path(place).is_dir()), None)


def base_revision(variant: Variant, sources: Sources) -> str | None:
    """The commit of the variant's base that `fetch` uses; None where it is not pinned, or no repository's."""
    locked = sources.locked.repos.get(variant.base or "")
    return variant.base_revision or (locked.revision if locked else None)


async def pull(variants: Iterable[Variant], sources: Sources, on_file: OnFile = silent) -> None:
    """Bring everything these variants take from repositories into the cache. Raises as `fetch` does."""
    for need in _needs(variants, sources.locked):
        await cached(need, sources, on_file)


async def push_to_mirror(variants: Iterable[Variant], sources: Sources, on_file: OnFile = silent) -> None:
    """Upload to `sources.mirror` everything these variants take from repositories, pulling it first.

    Raises as `fetch` does; StoreUnavailable.
    """
    if sources.mirror is None:
        raise WeightsError("there is no mirror to push to")
    for need in _needs(variants, sources.locked):
        # From the hub, not from the mirror that is being filled.
        folder = await cached(need, replace(sources, mirror=None), on_file)
        # Configs last: see _PAINTING.
        files = sorted(need.matching(files_in(folder)), key=lambda file: file.endswith(".json"))
        for number, file in enumerate(files, 1):
            on_file(need.repo, file, number, len(files))
            await sources.mirror.upload(need.repo, need.revision, file, folder)


@dataclass(frozen=True, slots=True)
class Pinned:
    lock: lock.Lock
    #: Repository -> why it could not be looked up. It is not in the lock, unless it was before.
    missing: Mapping[str, str]


async def pin(variants: Iterable[Variant], sources: Sources, on_file: OnFile = silent) -> Pinned:
    """Look up each repository's commit at the hub, pull it, and note what came: sizes and SHA-256.

    A variant that names a revision keeps it. Other repositories of `sources.locked` stay as they were.
    """
    repos, missing = dict(sources.locked.repos), {}
    # Against an empty lock, because what is locked now is what is to be replaced.
    for need in _needs(variants, lock.Lock()):
        try:
            found = await _pinned(need, sources, on_file)
        except WeightsError as e:
            missing[need.repo] = e.message
            continue
        known = repos.get(need.repo)
        files = {**known.files, **found.files} if known and known.revision == found.revision else found.files
        repos[need.repo] = lock.LockedRepo(revision=found.revision, files=files)
    return Pinned(lock.Lock(repos=repos), missing)


async def _pinned(need: Need, sources: Sources, on_file: OnFile) -> lock.LockedRepo:
    hub = sources.hub()
    revision = (await hub.list(need.repo, need.revision)).revision
    pinned = Need(need.repo, revision, need.patterns)
    folder = sources.cache / pinned.folder
    await download(pinned, hub, folder, sources.locked, on_file)
    # What was locked already was held against the lock when it came.
    known = sources.locked.files(need.repo, revision)
    files = {}
    for file in pinned.matching(files_in(folder)):
        files[file] = known.get(file) or await asyncio.to_thread(lock.describe, folder / file)
    return lock.LockedRepo(revision=revision, files=files)


async def _file(variant: Variant, of: Variant | VariantLora, sources: Sources) -> Path:
    """The variant's own, or that of one of its LoRAs."""
    file = of.file or ""
    if file.startswith(TINY):
        return await _tiny(variant, file, sources)
    if of.repo is None:
        if not (Path(file).is_file() or (variant.family == "sdxl" and Path(file).is_dir())):
            raise UnknownWeights(f"there is no file {file}, and the variant names no repository to fetch it from")
        return Path(file)
    need = Need(of.repo, _revision(of.repo, of.revision, sources.locked), (glob.escape(file),))
    return await cached(need, sources) / file


async def _base(variant: Variant, sources: Sources, patterns: tuple[str, ...]) -> Path:
    base = variant.base or ""
    if base.startswith(TINY):
        return await _tiny(variant, base, sources)
    if Path(base).is_dir():
        return Path(base)
    if not _REPO.fullmatch(base):
        raise UnknownWeights(f"base {base!r} is neither a folder here nor a repository `owner/name`")
    revision = _revision(base, variant.base_revision, sources.locked)
    return await cached(Need(base, revision, patterns), sources)


async def _embeddings(variant: Variant, sources: Sources) -> bytes | None:
    path = variant.embeddings
    if path is None:
        return None
    if path.startswith(TINY):
        return (await _tiny(variant, path, sources)).read_bytes()
    if Path(path).is_file():
        return Path(path).read_bytes()
    if sources.blobs is None:
        raise UnknownWeights(f"there is no file {path} with the embeddings of the variant's prompt", file=path)
    try:
        data, _ = await sources.blobs().get(path, max_bytes=_MAX_EMBEDDINGS_BYTES)
    except BlobNotFound as e:
        what = f"the blob store has no {path} with the embeddings of the variant's prompt"
        raise UnknownWeights(f"{what}: `fluxfill weights embed` writes it", file=path) from e
    return data


def ensure_tiny(cache: Path) -> Sequence[Path]:
    """The folders in which the cache has the tiny weights of each family, written there first."""
    return [tiny.ensure(cache / folder, write).folder for folder, write in _TINIES.values()]


async def _tiny(variant: Variant, name: str, sources: Sources) -> Path:
    return await asyncio.to_thread(_written, variant, name, sources.cache)


def _written(variant: Variant, name: str, cache: Path) -> Path:
    path, (folder, write) = tiny_path(variant, name, cache), _TINIES[variant.family]
    tiny.ensure(cache / folder, write)
    return path


def tiny_path(variant: Variant, name: str, cache: Path) -> Path:
    """Where what is called `tiny:…` lies, once it is written."""
    folder, _ = _TINIES[variant.family]
    return cache / folder / name.removeprefix(TINY)


def _needs(variants: Iterable[Variant], locked: lock.Lock) -> Sequence[Need]:
    """What the variants take from repositories, each once."""
    needs: dict[Need, None] = {}
    for variant in variants:
        of: tuple[Variant | VariantLora, ...] = (variant, *variant.loras)
        for one in of:
            if one.repo and one.file:
                revision = _revision(one.repo, one.revision, locked)
                needs[Need(one.repo, revision, (glob.escape(one.file),))] = None
        if variant.base and not variant.base.startswith(TINY) and not Path(variant.base).is_dir():
            revision = _revision(variant.base, variant.base_revision, locked)
            needs |= {Need(variant.base, revision, patterns): None for patterns in _OF_BASE.get(variant.family, ())}
    return list(needs)


def _revision(repo: str, given: str | None, locked: lock.Lock) -> str:
    if given:
        return given
    if repo in locked.repos:
        return locked.repos[repo].revision
    return UNPINNED
