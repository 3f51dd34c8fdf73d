"""The folder on this machine that repositories' files are kept in, and how they come into it.

Plain files, `{owner--name}/{revision}/{file}`.
"""

import asyncio
import errno
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import AsyncFileLock
from pydantic import SecretStr

from ...blobs import BlobStore
from ...errors import CorruptWeights, Unavailable, UnknownWeights, WeightsError
from ...settings import Secrets, WeightsSettings
from ..cold_start import timed
from ..flux import gguf_file
from . import lock
from .origins import Mirror, Origin, folder_name

log = logging.getLogger(__name__)

#: Revision of a repository that nobody pinned.
UNPINNED = "main"

#: Called before each file: repository, file, its number from 1, and how many there are.
OnFile = Callable[[str, str, int, int], None]


def silent(repo: str, file: str, number: int, count: int) -> None:
    """An OnFile that tells nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where weights may come from."""

    cache: Path
    locked: lock.Lock = field(default_factory=lock.Lock)
    mirror: Mirror | None = None
    token: SecretStr | None = None
    #: Of the hub; None is the client's default.
    endpoint: str | None = None
    #: The app's own blob store, where the embeddings of fixed prompts lie.
    blobs: Callable[[], BlobStore] | None = None

    @classmethod
    def of(
        cls,
        settings: WeightsSettings,
        secrets: Secrets,
        mirror: Mirror | None = None,
        blobs: Callable[[], BlobStore] | None = None,
    ) -> "Sources":
        """Raises SettingsError where the lock file cannot be read."""
        return cls(
            cache=settings.cache,
            locked=lock.read(settings.lock),
            mirror=mirror,
            token=secrets.hf_token,
            blobs=blobs,
        )

    def hub(self) -> Origin:
        # Its package is an extra's: variants without weights run where it is not installed.
        from .hub import Hub

        return Hub(self.token, self.endpoint)


@dataclass(frozen=True, slots=True)
class Need:
    """Files of one repository: at least one for each pattern."""

    repo: str
    revision: str
    patterns: tuple[str, ...]

    @property
    def folder(self) -> str:
        return f"{folder_name(self.repo)}/{folder_name(self.revision)}"

    def matching(self, files: Iterable[str]) -> list[str]:
        return sorted(file for file in files if any(fnmatchcase(file, pattern) for pattern in self.patterns))

    def unmatched(self, files: Collection[str]) -> list[str]:
        return [pattern for pattern in self.patterns if not any(fnmatchcase(file, pattern) for file in files)]


async def cached(need: Need, sources: Sources, on_file: OnFile = silent) -> Path:
    """The cache folder with what is needed in it. Several processes may ask at once: one fetches.

    A cache that holds all of it may be mounted read-only. Raises WeightsError where it is and does not.
    """
    folder = sources.cache / need.folder
    # Before the lock, which has to create a file there.
    if await asyncio.to_thread(_is_whole, need, folder, sources.locked, remove=False):
        return folder
    try:
        return await _fetched(need, folder, sources, on_file)
    except OSError as e:
        if e.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        what = f"{folder} does not hold sound files of all that {need.repo} must have, and cannot be written to"
        raise WeightsError(f"{what}: {e.strerror}", repo=need.repo) from e


async def _fetched(need: Need, folder: Path, sources: Sources, on_file: OnFile) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    async with AsyncFileLock(folder.with_name(f"{folder.name}.lock")):
        if await asyncio.to_thread(_is_whole, need, folder, sources.locked, remove=True):
            return folder
        if need.revision == UNPINNED:
            log.warning(
                "%s is not pinned: its latest revision is used. `fluxfill weights pull --pin` pins it.",
                need.repo,
                extra={"action": "weights_unpinned", "repo": need.repo},
            )
        if sources.mirror is not None:
            try:
                await download(need, sources.mirror, folder, sources.locked, on_file)
                return folder
            except (WeightsError, Unavailable) as e:
                log.warning(
                    "The mirror failed, trying the hub: %s", e, extra={"action": "mirror_failed", "repo": need.repo}
                )
        await download(need, sources.hub(), folder, sources.locked, on_file)
    return folder


def _is_whole(need: Need, folder: Path, locked: lock.Lock, *, remove: bool) -> bool:
    """Whether all that is needed lies in the folder and is sound. `remove` removes the first file that is not: only
    who holds the folder's lock may, since another process could be replacing it."""
    known = locked.files(need.repo, need.revision)
    here = files_in(folder)
    files = need.matching(here)
    if _unfinished(need, folder).exists() or need.unmatched(files) or set(need.matching(known)) - set(here):
        return False
    for file in files:
        try:
            _check(folder / file, known.get(file))
        except FileNotFoundError:
            # Another process, which holds the folder's lock, has removed it.
            return False
        except CorruptWeights as e:
            log.warning("A cached file is corrupt: %s", e, extra={"action": "weights_corrupt", "repo": need.repo})
            if remove:
                (folder / file).unlink()
            return False
    return True


async def download(need: Need, origin: Origin, folder: Path, locked: lock.Lock, on_file: OnFile) -> None:
    """Raises UnknownWeights where the origin lacks a file; CorruptWeights where one is not what it should be."""
    listing = await origin.list(need.repo, need.revision)
    known = locked.files(need.repo, need.revision)
    files = need.matching(listing.files)
    lacking = need.unmatched(files) or sorted(set(need.matching(known)) - listing.files)
    if lacking:
        what = f"{need.repo} at {need.revision} has no {lacking[0]}"
        raise UnknownWeights(f"{origin.name}: {what}", repo=need.repo, file=lacking[0])
    folder.mkdir(parents=True, exist_ok=True)
    _unfinished(need, folder).touch()
    for number, file in enumerate(files, 1):
        on_file(need.repo, file, number, len(files))
        with timed("fetch") as part:
            await origin.download(need.repo, listing.revision, file, folder)
            part.bytes += (folder / file).stat().st_size
        try:
            await asyncio.to_thread(_check, folder / file, known.get(file))
        except CorruptWeights:
            (folder / file).unlink()
            raise
    _unfinished(need, folder).unlink()


def _check(path: Path, known: lock.LockedFile | None) -> None:
    """Raises CorruptWeights where the file is not what the lock says, or no sound GGUF file."""
    if known is not None:
        lock.verify(path, known)
    if path.suffix == ".gguf":
        gguf_file.check(path)


def _unfinished(need: Need, folder: Path) -> Path:
    """Exists while what is needed is being fetched into the folder, and after that broke off."""
    which = hashlib.sha256("\n".join(need.patterns).encode()).hexdigest()[:8]
    return folder.with_name(f"{folder.name}.{which}.unfinished")


def files_in(folder: Path) -> list[str]:
    """Names relative to the folder; hidden files and folders are notes of ours and of the hub's client."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]
