"""Blobs as files below a folder, for one machine. Several processes may share the folder.

A blob's version is its file's modification time in nanoseconds, inode and size. Every write goes to a new file whose
time is set to be later than that of the file it replaces, so two writes never share a version; and a blob keeps its
version until it is written again, at the cost of one stat however large it is. A file edited in place by another
program within one tick of the file system's clock, to the same size, would go unnoticed.

The content type is told by the suffix (`TYPES`), a picture's by its first bytes; what `put` is given is not kept.
Unlike in a bucket, a blob cannot also be the folder of others: that is a BlobConflict.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from ...blobs import ANY_VERSION, BlobInfo, UploadLink
from ...edit.containers import content_type
from ...errors import BlobConflict, BlobNotFound, BlobTooLarge, FluxFillError, StoreDenied, StoreUnavailable, UnsafePath
from .links import LocalLinks
from .paths import check_path
from .transfers import whole_file

T = TypeVar("T")

#: What trying again does not change: permissions, a file system that is read-only or full.
_DENIALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}

TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".heic": "image/heic",
    ".json": "application/json",
    ".md": "text/markdown",
    ".html": "text/html",
}
#: Name prefix of files being written; no blob's name may have it.
PART = ".part-"
#: Longest file name of the usual file systems, in bytes.
_MAX_NAME = 255


class FileBlobStore:
    def __init__(self, url: str, public_url: str = "") -> None:
        """`files:FOLDER`; the folder is made by the first write, for its owner alone. `public_url`: see LocalLinks."""
        self._links = LocalLinks(url, public_url)
        self._root = Path(url.removeprefix("files:")).absolute()

    async def head(self, path: str) -> BlobInfo:
        return await self._run(path, lambda: _head(path, self._locate(path)))

    async def get(self, path: str, *, max_bytes: int) -> tuple[bytes, BlobInfo]:
        return await self._run(path, lambda: _get(path, self._locate(path), max_bytes))

    async def put(self, path: str, data: bytes, *, content_type: str, if_version: str = ANY_VERSION) -> BlobInfo:
        def write() -> BlobInfo:
            return _write(path, self._placed(path), if_version, lambda file: _write_all(file, data))

        return await self._run(path, write)

    async def delete(self, path: str) -> None:
        await self._run(path, lambda: _delete(self._locate(path)))

    async def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        for info in await self._run(prefix, lambda: self._scan(prefix)):
            yield info

    async def download(self, path: str, to: Path) -> BlobInfo:
        return await self._run(path, lambda: _download(path, self._locate(path), to))

    async def link(self, path: str, *, expires_s: int) -> str:
        return await self._links.link(path, expires_s=expires_s)

    async def upload_link(self, path: str, *, size: int, expires_s: int) -> UploadLink:
        return await self._links.upload_link(path, size=size, expires_s=expires_s)

    async def upload(self, path: str, source: Path) -> BlobInfo:
        return await self._run(path, lambda: _upload(path, self._placed(path), source))

    async def _run(self, path: str, work: Callable[[], T]) -> T:
        check_path(path)
        return await asyncio.to_thread(_translated, path, work)

    def _locate(self, path: str) -> Path:
        """The file of `path`, links resolved. Raises UnsafePath where it lies outside the root."""
        for part in path.split("/"):
            if part.startswith(PART):
                raise UnsafePath(f"blob path {path!r} has a part that begins with {PART}", path=path)
            if len(part.encode()) > _MAX_NAME:
                raise UnsafePath(f"blob path {path[:80]!r} has a part of more than {_MAX_NAME} bytes", path=path)
        # Path.resolve raises for a circle of links; this leaves it to whoever opens the file.
        target = Path(os.path.realpath(self._root / path))
        if not target.is_relative_to(os.path.realpath(self._root)):
            raise UnsafePath(f"blob path {path!r} leads out of the store through a link", path=path)
        return target

    def _placed(self, path: str) -> Path:
        """As `_locate`, to be written. A root that is made is its owner's alone, whatever the process's umask."""
        # What is in the way is told by what follows.
        with suppress(OSError):
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._locate(path)

    def _scan(self, prefix: str) -> Sequence[BlobInfo]:
        names = [
            Path(folder, name).relative_to(self._root).as_posix()
            for folder, _, files in os.walk(self._locate(prefix))
            for name in files
            if not name.startswith(PART)
        ]
        return [info for name in sorted(names) if (info := self._listed(name))]

    def _listed(self, path: str) -> BlobInfo | None:
        try:
            return _head(path, self._locate(check_path(path)))
        except (BlobNotFound, UnsafePath):
            # Deleted since the walk, a link to outside, or another program's file, of a name that no blob can have.
            return None


def _translated(path: str, work: Callable[[], T]) -> T:
    """`work()`, with the file system's errors in our words."""
    try:
        return work()
    except FluxFillError:
        raise
    except OSError as e:
        error = StoreDenied if e.errno in _DENIALS else StoreUnavailable
        raise error(f"blob {path}: {e.strerror or e}", path=path) from e


def _info(path: str, file: BinaryIO) -> BlobInfo:
    stat, told = os.fstat(file.fileno()), TYPES.get(Path(path).suffix.lower(), "application/octet-stream")
    return BlobInfo(
        path=path,
        size=stat.st_size,
        version=f"{stat.st_mtime_ns:x}-{stat.st_ino:x}-{stat.st_size:x}",
        content_type=(told.startswith("image/") and content_type(os.pread(file.fileno(), 12, 0))) or told,
    )


@contextmanager
def _opened(path: str, target: Path) -> Iterator[tuple[BinaryIO, BlobInfo]]:
    try:
        file = target.open("rb")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise BlobNotFound(f"blob {path} does not exist", path=path) from e
    with file:
        yield file, _info(path, file)


def _head(path: str, target: Path) -> BlobInfo:
    with _opened(path, target) as (_, info):
        return info


def _get(path: str, target: Path, max_bytes: int) -> tuple[bytes, BlobInfo]:
    with _opened(path, target) as (file, info):
        # One byte more than allowed tells a file that grew since the stat.
        data = file.read(max_bytes + 1) if info.size <= max_bytes else b""
        if max(info.size, len(data)) > max_bytes:
            raise BlobTooLarge(f"blob {path} has {info.size} bytes; at most {max_bytes} are read", path=path)
        return data, info


def _download(path: str, target: Path, to: Path) -> BlobInfo:
    with _opened(path, target) as (source, info), whole_file(to) as file:
        shutil.copyfileobj(source, file)
        return info


def _upload(path: str, target: Path, source: Path) -> BlobInfo:
    with source.open("rb") as opened:
        return _write(path, target, ANY_VERSION, lambda file: shutil.copyfileobj(opened, file))


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _write(path: str, target: Path, if_version: str, fill: Callable[[BinaryIO], None]) -> BlobInfo:
    with _locked(path, target) as (part, file):
        before = _current(path, target)
        if if_version not in (ANY_VERSION, before.version if before else ""):
            stored = f"is at version {before.version}" if before else "is not there"
            raise BlobConflict(f"blob {path} {stored}, not at {if_version or 'none'}", path=path)
        fill(file)
        file.flush()
        os.fsync(file.fileno())
        _stamp(file, target)
        info = _info(path, file)
        part.replace(target)
        _sync_folder(target.parent)
        return info


def _current(path: str, target: Path) -> BlobInfo | None:
    if target.is_dir():
        raise BlobConflict(f"blob {path} is the folder of other blobs", path=path)
    try:
        return _head(path, target)
    except BlobNotFound:
        return None


def _stamp(file: BinaryIO, replaced: Path) -> None:
    """Give the file a time of its own: the clock's full resolution, and later than what it replaces."""
    now_ns = time.time_ns()
    if replaced.exists():
        now_ns = max(now_ns, replaced.stat().st_mtime_ns + 1)
    os.utime(file.fileno(), ns=(now_ns, now_ns))


def _delete(target: Path) -> None:
    if not target.is_file():
        return
    with _locked(str(target), target):
        target.unlink(missing_ok=True)


@contextmanager
def _locked(path: str, target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """The unfinished file beside `target`, empty and open for writing. Its holder is the only writer of `target`.

    The kernel drops the lock of a process that dies, and the next writer of the blob reuses the file.
    """
    part = target.with_name(PART + hashlib.sha256(target.name.encode()).hexdigest()[:32])
    file = _lock(path, part)
    try:
        # A writer that was killed has left a part of its blob in it.
        file.truncate(0)
        yield part, file
    finally:
        # After the replacement the name may already be the next writer's file.
        if _is_same(part, file):
            part.unlink()
        file.close()


def _lock(path: str, part: Path) -> BinaryIO:
    while True:
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")
        except (FileExistsError, NotADirectoryError) as e:
            raise BlobConflict(f"blob {path}: a part of its path is a blob, not a folder", path=path) from e
        except OSError as e:
            if part.is_symlink():
                raise UnsafePath(f"blob {path}: its unfinished file is a link", path=path) from e
            raise
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_same(part, file):
            return file
        # The holder before us renamed or removed it.
        file.close()


def _is_same(part: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(part.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Make the renaming last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
