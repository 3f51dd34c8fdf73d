"""Where weights are fetched from: the Protocol, and a mirror of ours in a blob store. The hub is in `hub`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...blobs import BlobStore
from ...errors import BlobNotFound, UnknownWeights, UnsafePath


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit."""

    #: The commit; as it was asked for where the origin knows no commits.
    revision: str
    files: frozenset[str]


class Origin(Protocol):
    #: For a person: where this is.
    name: str

    async def list(self, repo: str, revision: str) -> Listing:
        """Raises UnknownWeights, MissingToken, GatedRepo, WeightsError."""

    async def download(self, repo: str, revision: str, file: str, folder: Path) -> None:
        """Write `file` below `folder`, whole or not at all. Raises as `list` does."""


def folder_name(repo: str) -> str:
    """`owner/name` as one path part."""
    return repo.replace("/", "--")


def check_file(file: str) -> None:
    """Raises UnsafePath for a file name that would not stay below the folder it is written to."""
    parts = file.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in file or not file.isprintable():
        raise UnsafePath(f"{file!r} is not a safe name for a weights file")


class Mirror:
    """Blobs `models/{owner--name}/{revision}/{file}`."""

    name = "the mirror"

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def list(self, repo: str, revision: str) -> Listing:
        """Raises UnsafePath where the mirror holds a file name that could escape its folder."""
        prefix = _mirror_path(repo, revision, "")
        files = frozenset([info.path.removeprefix(prefix) async for info in self._blobs.list(prefix.rstrip("/"))])
        for file in files:
            check_file(file)
        if not files:
            raise UnknownWeights(f"the mirror has no {repo} at {revision}", repo=repo, revision=revision)
        return Listing(revision, files)

    async def download(self, repo: str, revision: str, file: str, folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            await self._blobs.download(_mirror_path(repo, revision, file), folder / file)
        except BlobNotFound as e:
            raise UnknownWeights(f"the mirror has no {file} of {repo} at {revision}", repo=repo, file=file) from e

    async def upload(self, repo: str, revision: str, file: str, folder: Path) -> None:
        check_file(file)
        await self._blobs.upload(_mirror_path(repo, revision, file), folder / file)


def _mirror_path(repo: str, revision: str, file: str) -> str:
    return f"models/{folder_name(repo)}/{folder_name(revision)}/{file}"
