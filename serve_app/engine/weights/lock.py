"""The weights lock file: which commit of each repository was looked up, and what its files are.

{"format": 1, "repos": {"owner/name": {"revision": SHA, "files": {PATH: {"size": BYTES, "sha256": HEX}}}}}
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import CorruptWeights, SettingsError
from ..cold_start import timed

log = logging.getLogger(__name__)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedFile(_Value):
    #: Bytes.
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"\A[0-9a-f]{64}\z")


class LockedRepo(_Value):
    #: Commit.
    revision: str = Field(pattern=r"\A[0-9a-f]{40}\z")
    files: Mapping[str, LockedFile]


class Lock(_Value):
    format: Literal[1] = 1
    repos: Mapping[str, LockedRepo] = {}

    def files(self, repo: str, revision: str) -> Mapping[str, LockedFile]:
        """What is known of the repository's files at this revision: nothing, where another one is locked."""
        locked = self.repos.get(repo)
        return locked.files if locked is not None and locked.revision == revision else {}


def read(path: Path) -> Lock:
    """The lock in the file; an empty one where there is none. Raises SettingsError, which says what is wrong in it."""
    try:
        return Lock.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Lock()
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingsError(f"{path} is not a weights lock file: {where}: {first['msg']}", file=str(path)) from e


def write(path: Path, lock: Lock) -> None:
    """Whole or not at all."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(lock.model_dump_json(indent=2) + "\n")
    beside.replace(path)


def describe(path: Path) -> LockedFile:
    """What the lock would say of this file. Reads all of it."""
    size = path.stat().st_size
    with timed("verify", size), path.open("rb") as file:
        return LockedFile(size=size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def verify(path: Path, locked: LockedFile) -> None:
    """Hold the file against the lock. Raises CorruptWeights, naming the file.

    It is hashed once: a note beside it keeps what it was found good for, and by which size, time and inode the file is
    known again. A change that keeps all three is not noticed. Where no note can be kept, it is hashed each time.
    """
    stat, note = path.stat(), path.with_name(f".{path.name}.verified")
    if stat.st_size != locked.size:
        raise CorruptWeights(f"{path} has {stat.st_size} bytes, but the lock file says {locked.size}", file=str(path))
    found_good = f"{locked.sha256} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n".encode()
    if note.is_file() and note.read_bytes() == found_good:
        return
    sha256 = describe(path).sha256
    if sha256 != locked.sha256:
        raise CorruptWeights(f"{path} has SHA-256 {sha256}, but the lock file says {locked.sha256}", file=str(path))
    _keep(note, found_good)


def _keep(note: Path, found_good: bytes) -> None:
    beside = note.with_name(f"{note.name}.new")
    try:
        beside.write_bytes(found_good)
        beside.replace(note)
    except OSError as e:
        extra = {"action": "hash_not_cached", "file": str(note)}
        log.warning(
            "The weights match their hash, but it could not be cached: the next load hashes them again: %s",
            e,
            extra=extra,
        )
