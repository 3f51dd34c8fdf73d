"""What was compiled, kept for the next replica: the compiler's cache folder as one archive, under a fingerprint.

The whole folder, because `torch.compiler.save_cache_artifacts` leaves out what the C++ compiler made: on a CPU that is
most of the time. Its entries are found by hash, so it works wherever it is unpacked. Only Triton's own part stays out:
its files name the folder they lie in, and each graph's entry brings its kernels along (see torch's triton_bundler.py;
never run here on a GPU).

An archive holds code that the replica runs: who can write to the weights cache or the mirror can run code there.
"""

import asyncio
import hashlib
import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import torch
from torch._inductor.utils import clear_caches

from ..errors import CorruptWeights, FluxFillError, GpuLost, OutOfMemory
from ..settings import VariantSettings
from ..variants import Variant
from . import compile_folder
from .cache import Sources
from .origins import Mirror

log = logging.getLogger(__name__)

#: Of an archive's files, unpacked. FLUX.1 with ten sizes takes some hundred megabytes.
_MAX_BYTES = 4_000_000_000
#: Where archives lie, `compiled/{fingerprint}/{_FILE}`, in the weights cache and below the mirror's `models`.
_FOLDER, _FILE = "compiled", "inductor.zip"
_PACKAGES = ("torch", "triton", "diffusers", "gguf", "torchao")


def fingerprint(
    variant: Variant, served: VariantSettings, buckets: Sequence[tuple[int, int]], sources: Sources, device: str
) -> str:
    """SHA-256, in hex, of what compiled code depends on. `device` is a GPU's name and compute capability.

    It only tells archives apart that are no use to each other: the compiler looks each graph up by a hash of its own.
    """
    # Code for a CPU is compiled for this very one; of its description, what is no number are its instruction sets.
    cpu = {name: value for name, value in torch.cpu.get_capabilities().items() if isinstance(value, bool | str)}
    locked = sources.locked.repos
    facts = {
        "device": device,
        "cpu": cpu,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
        "variant": variant.model_dump(mode="json"),
        "revisions": [locked[repo].revision for repo in (variant.repo or "", variant.base or "") if repo in locked],
        "levers": served.levers.model_dump(mode="json"),
        "threads": served.threads,
        "buckets": sorted(buckets),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def of(
    variant: Variant,
    served: VariantSettings,
    buckets: Sequence[tuple[int, int]],
    sources: Sources,
    described: Mapping[str, Any],
) -> "CompileCache":
    """For an engine that describes itself so."""
    device = f"{described['device']} {described['compute_capability']}"
    return CompileCache(sources.cache, fingerprint(variant, served, buckets, sources, device), sources.mirror)


@dataclass(frozen=True, slots=True)
class CompileCache:
    """The archive of one fingerprint. Whatever is wrong with it or with the mirror, everything is compiled anew."""

    #: Of weights.
    cache: Path
    fingerprint: str
    mirror: Mirror | None = None

    def warm_up(self, compile_all: Callable[[], None]) -> None:
        """Call `compile_all` with what is in the archive, and put into the archive what was not in it yet.

        Raises what `compile_all` raises. The compiler works in a new `compile_folder`.
        """
        folder = compile_folder.new()
        found = self._restore(folder)
        if not (found and self._works(compile_all)):
            if found:
                folder, found = _start_over(), {}
            compile_all()
        if new := _files(folder).keys() - found.keys():
            self._keep(folder, len(new))

    def _works(self, compile_all: Callable[[], None]) -> bool:
        try:
            compile_all()
        except (GpuLost, OutOfMemory):
            raise
        except Exception as e:
            # What damaged or foreign code raises when it is loaded or run can be anything.
            self._refuse(e)
            return False
        return True

    @property
    def _archive(self) -> Path:
        return self.cache / _FOLDER / self.fingerprint / _FILE

    def _restore(self, folder: Path) -> Mapping[str, Path]:
        """Unpack the archive. What is in the folder then, by name."""
        if not self._archive.exists():
            self._fetch()
        if not self._archive.exists():
            return {}
        try:
            _unpack(self._archive, folder)
        except Exception as e:
            # zipfile raises all sorts of errors for damaged archives.
            self._refuse(e)
            shutil.rmtree(folder)
            folder.mkdir()
        found = _files(folder)
        log.info("Found %d compiled files", len(found), extra={"action": "compiled_found", "files": len(found)})
        return found

    def _fetch(self) -> None:
        if self.mirror is None:
            return
        try:
            asyncio.run(self.mirror.download(_FOLDER, self.fingerprint, _FILE, self._archive.parent))
        except (FluxFillError, OSError) as e:
            extra = {"action": "compiled_not_fetched", "fingerprint": self.fingerprint}
            log.info("Nothing compiled came from the mirror: %s", e, extra=extra)

    def _refuse(self, error: Exception) -> None:
        extra = {"action": "compiled_refused", "fingerprint": self.fingerprint}
        log.warning("What was compiled before is of no use: %r. It is compiled anew.", error, extra=extra)
        self._archive.unlink(missing_ok=True)

    def _keep(self, folder: Path, new: int) -> None:
        extra = {"action": "compiled_not_kept", "fingerprint": self.fingerprint}
        try:
            _pack(folder, self._archive)
            if self.mirror is not None:
                asyncio.run(self.mirror.upload(_FOLDER, self.fingerprint, _FILE, self._archive.parent))
        except (FluxFillError, OSError) as e:
            log.warning("What was compiled is not kept for the next replica: %s", e, extra=extra)
            return
        log.info("Kept %d newly compiled files", new, extra={"action": "compiled_kept", "files": new})


def _start_over() -> Path:
    """Forget what was compiled in this process, so that what is compiled now gets the keys it has in a new one."""
    torch._dynamo.reset()
    clear_caches()
    return compile_folder.new()


def _files(folder: Path) -> dict[str, Path]:
    """By name; without the compiler's notes of who is at work, and without Triton's own part."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if path.suffix != ".lock" and not name.startswith("triton/")}


def _pack(folder: Path, archive: Path) -> None:
    """Whole or not at all. Several replicas may pack the same: the last one's stays."""
    files = _files(folder)
    size = sum(path.stat().st_size for path in files.values())
    if size > _MAX_BYTES:
        raise OSError(f"{size} bytes are more than the {_MAX_BYTES} that are kept")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=archive.parent, prefix=".", delete=False) as file:
        part = Path(file.name)
    try:
        with ZipFile(part, "w", ZIP_DEFLATED, compresslevel=1) as packed:
            for name, path in files.items():
                packed.write(path, name)
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)


def _unpack(archive: Path, folder: Path) -> None:
    """Names that lead out of the folder are shortened to ones that do not, and each file's CRC-32 is checked.

    Raises CorruptWeights where it would take too much room; what zipfile raises where the archive is damaged.
    """
    with ZipFile(archive) as packed:
        size = sum(info.file_size for info in packed.infolist())
        if size > _MAX_BYTES:
            raise CorruptWeights(f"{archive} holds {size} bytes, more than the {_MAX_BYTES} that are taken")
        packed.extractall(folder)
