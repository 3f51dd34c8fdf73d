"""The folder that torch's compiler works in. It lasts as long as the engine: code is loaded from it.

Each is held by a lock, which the system lets go of when its process ends, however that ends.
"""

import atexit
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

_PREFIX, _LOCK, _FOLDER = "flux-fill-compiled-", "lock", "cache"

#: This process's, by the folder that holds both the lock and the compiler's own.
_held: dict[Path, FileLock] = {}


def new() -> Path:
    """Where the compiler works from now on, Triton's too. Removes what processes left behind that were killed.

    Sets TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR for the process.
    """
    _remove_left_behind()
    home = Path(tempfile.mkdtemp(prefix=_PREFIX))
    _held[home] = lock = _lock(home)
    lock.acquire()
    # Made under the lock: nobody takes a folder for left behind while it is not held yet.
    (folder := home / _FOLDER).mkdir()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    # The compiler sets it only where it is unset, and it would stay at the first folder.
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return folder


@atexit.register
def remove() -> None:
    """All of this process's folders: nothing is compiled or loaded from them any more."""
    while _held:
        home, lock = _held.popitem()
        shutil.rmtree(home, ignore_errors=True)
        lock.release()


def _remove_left_behind() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_FOLDER}"):
        home = folder.parent
        # In use, by another process or this one; or removed by another process meanwhile.
        with suppress(OSError):
            if _is_ours(home):
                with _lock(home).acquire(timeout=0):
                    shutil.rmtree(home, ignore_errors=True)


def _is_ours(home: Path) -> bool:
    """Not another user's, and no link: taking its lock writes a file in it."""
    found = home.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _lock(home: Path) -> FileLock:
    # Taken in the thread that loads, let go of in another.
    return FileLock(home / _LOCK, thread_local=False)
