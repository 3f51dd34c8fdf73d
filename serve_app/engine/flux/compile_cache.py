"""What was compiled, kept for the next replica: torch's own caches, in a folder for each fingerprint.

The compiler works in `compiled/{fingerprint}` of the weights cache, so the next replica on this disk finds everything
there. By way of the mirror another machine gets what `torch.compiler.save_cache_artifacts` makes of it: graphs and
Triton's kernels, but not what the C++ compiler made for a CPU.

Both hold code that the replica runs: who can write to the weights cache or the mirror can run code there.
"""

import asyncio
import atexit
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import clear_caches
from torch.compiler._cache import CacheArtifactManager

from ...errors import FluxFillError, GpuLost, OutOfMemory
from ...models import Variant
from ...settings import VariantSettings
from ..weights.cache import Sources
from ..weights.origins import Mirror

log = logging.getLogger(__name__)

#: Where the compiler works, `compiled/{fingerprint}` in the weights cache; below the mirror's `models` with the file.
_FOLDER, _FILE = "compiled", "artifacts.bin"
_PACKAGES = ("torch", "triton", "diffusers", "gguf", "torchao")


def fingerprint(
    variant: Variant, served: VariantSettings, buckets: Sequence[tuple[int, int]], sources: Sources, device: str
) -> str:
    """SHA-256, in hex, of what compiled code depends on. `device` is a GPU's name and compute capability.

    It only separates caches that cannot share entries: the compiler finds each graph by its own hash.
    """
    # Code for a CPU is compiled for this very one; of its description, what is no number are its instruction sets.
    cpu = {name: value for name, value in torch.cpu.get_capabilities().items() if isinstance(value, bool | str)}
    locked = sources.locked.repos
    repos = (variant.repo or "", variant.base or "", *(lora.repo or "" for lora in variant.loras))
    facts = {
        "device": device,
        "cpu": cpu,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
        "variant": variant.model_dump(mode="json"),
        "revisions": [locked[repo].revision for repo in repos if repo in locked],
        "optimizations": served.optimizations.model_dump(mode="json"),
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
    """The compiler's folder for one fingerprint. If its content is damaged or does not work, all is compiled anew."""

    #: Of weights.
    cache: Path
    fingerprint: str
    mirror: Mirror | None = None

    def warm_up(self, compile_all: Callable[[], None]) -> None:
        """Call `compile_all` with what was compiled before, and give the mirror what was not.

        Raises what `compile_all` raises. Sets TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR for the process.
        """
        self._work_in(self._folder)
        misses = _misses()
        is_known = self._is_there() or self._fetch()
        if not (is_known and self._works(compile_all)):
            compile_all()
        if _misses() > misses:
            self._share()

    @property
    def _folder(self) -> Path:
        return self.cache / _FOLDER / self.fingerprint

    def _work_in(self, folder: Path) -> None:
        """Have the compiler work there, or in a folder of this process where that cannot be made."""
        try:
            # Code runs from this folder: only its owner may write there.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            extra = {"action": "compile_cache_unwritable", "fingerprint": self.fingerprint}
            log.warning("The compile cache is not writable; the next replica compiles again: %s", e, extra=extra)
            folder = Path(tempfile.mkdtemp())
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")

    def _is_there(self) -> bool:
        return self._folder.is_dir() and any(self._folder.iterdir())

    def _works(self, compile_all: Callable[[], None]) -> bool:
        try:
            compile_all()
        except (GpuLost, OutOfMemory):
            raise
        except Exception as e:
            # What damaged or foreign code raises when it is loaded or run can be anything.
            extra = {"action": "compile_cache_unusable", "fingerprint": self.fingerprint}
            log.warning("The compile cache is unusable, compiling again: %r", e, extra=extra)
            self._start_over()
            return False
        return True

    def _start_over(self) -> None:
        """Forget what was compiled, so that what is compiled now gets the keys it has in a new process."""
        with suppress(OSError):
            # Aside first, at once: replicas that start meanwhile find a new folder or the old one, never half of it.
            aside = Path(tempfile.mkdtemp(dir=self.cache, prefix=".compiled-"))
            self._folder.rename(aside / "refused")
            shutil.rmtree(aside)
        self._work_in(self._folder)
        torch._dynamo.reset()
        clear_caches()
        # What was found is recorded as soon as it is used, to be shared.
        CacheArtifactManager.clear()

    def _fetch(self) -> bool:
        """Whether the mirror had something that torch takes."""
        if self.mirror is None:
            return False
        extra = {"action": "compile_cache_fetch_failed", "fingerprint": self.fingerprint}
        try:
            asyncio.run(self.mirror.download(_FOLDER, self.fingerprint, _FILE, self._folder))
            found = torch.compiler.load_cache_artifacts((self._folder / _FILE).read_bytes())
        except Exception as e:
            # Of the mirror, or of what reads a damaged file.
            log.info("Could not fetch compiled graphs from the mirror: %r", e, extra=extra)
            return False
        if found is None:
            log.info("The mirror's compiled graphs are damaged, or from another version", extra=extra)
            return False
        log.info("Fetched compiled graphs from the mirror", extra={"action": "compile_cache_fetched"})
        return True

    def _share(self) -> None:
        if self.mirror is None or (artifacts := torch.compiler.save_cache_artifacts()) is None:
            return
        extra = {"action": "compile_cache_share_failed", "fingerprint": self.fingerprint}
        try:
            part = self._folder / f".{_FILE}-{os.getpid()}"
            part.write_bytes(artifacts[0])
            part.replace(self._folder / _FILE)
            asyncio.run(self.mirror.upload(_FOLDER, self.fingerprint, _FILE, self._folder))
        except (FluxFillError, OSError) as e:
            log.warning("Could not upload compiled graphs to the mirror: %s", e, extra=extra)
            return
        log.info("Uploaded compiled graphs to the mirror", extra={"action": "compile_cache_shared"})


def _misses() -> int:
    """Graphs that this process compiled because no cache had them."""
    return int(counters["inductor"]["fxgraph_cache_miss"])
