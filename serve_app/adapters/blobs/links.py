"""Signed links to blobs of this machine, which the app itself serves under `GET` and `PUT /blobs/{token}`.

A token is a JWT that names the blob, the second it expires, and whether it reads the blob or writes one of how many
bytes, signed with a key that only the processes sharing the store have. `files:FOLDER` keeps its key beside the folder
in `FOLDER.link-key`, made by the first process that needs it; remove the file and all links are void, at once and for
every process. `memory:NAME` keeps it in the process.
"""

import contextlib
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

import jwt

from ...blobs import UploadLink
from ...errors import InvalidLink, StoreUnavailable
from .paths import check_path

#: Seven days: the most that Google's and Amazon's signatures allow, and so the same for all.
MAX_EXPIRES_S = 604_800
#: What a token is for: one that reads does not write, nor the other way round.
AUDIENCE, UPLOADS = "fluxfill-blob", "fluxfill-upload"
#: As long as SHA-256's output, as RFC 7518 section 3.2 wants it.
KEY_BYTES = 32
_ALGORITHM = "HS256"

_KEYS_IN_MEMORY: dict[str, bytes] = {}


def check_expiry(expires_s: int) -> None:
    """Raises ValueError for what no store signs."""
    if not 1 <= expires_s <= MAX_EXPIRES_S:
        raise ValueError(f"expires_s is {expires_s}; a link is valid for 1 to {MAX_EXPIRES_S} seconds")


class LocalLinks:
    def __init__(self, url: str, public_url: str) -> None:
        """`url` is the blob store's, `files:FOLDER` or `memory:NAME`; `public_url` is where the app is reached."""
        self._url, self._public_url = url, public_url.rstrip("/")

    async def link(self, path: str, *, expires_s: int) -> str:
        return self._signed(expires_s, sub=check_path(path), aud=AUDIENCE)

    async def upload_link(self, path: str, *, size: int, expires_s: int) -> UploadLink:
        url = self._signed(expires_s, sub=check_path(path), aud=UPLOADS, size=size)
        return UploadLink(url=url, headers={"Content-Length": str(size)})

    def path_of(self, token: str) -> str:
        """The blob a token of ours reads.

        Raises InvalidLink where it has expired, is not ours or is for an upload; StoreUnavailable where the key cannot
        be read.
        """
        return check_path(self._claims(token, AUDIENCE)["sub"])

    def upload_of(self, token: str) -> tuple[str, int]:
        """The blob a token of ours writes, and its size in bytes. Raises as `path_of`."""
        claims = self._claims(token, UPLOADS)
        return check_path(claims["sub"]), claims["size"]

    def _signed(self, expires_s: int, **claims: str | int) -> str:
        check_expiry(expires_s)
        token = jwt.encode({**claims, "exp": int(time.time()) + expires_s}, self._key, _ALGORITHM)
        return f"{self._public_url}/blobs/{token}"

    def _claims(self, token: str, audience: str) -> dict[str, Any]:
        key = self._key
        try:
            return jwt.decode(
                token.encode("ascii"),
                key,
                algorithms=[_ALGORITHM],
                audience=audience,
                options={"require": ["sub", "exp", "aud"]},
            )
        except jwt.ExpiredSignatureError as e:
            raise InvalidLink("the link has expired") from e
        except jwt.InvalidAudienceError as e:
            raise InvalidLink("the link is for something else") from e
        except (jwt.InvalidTokenError, UnicodeEncodeError) as e:
            raise InvalidLink("the link was not signed by this app, or was altered") from e

    @property
    def _key(self) -> bytes:
        if self._url.startswith("memory:"):
            return _KEYS_IN_MEMORY.setdefault(self._url, secrets.token_bytes(KEY_BYTES))
        folder = Path(self._url.removeprefix("files:")).absolute()
        return _key_in(folder.with_name(f"{folder.name}.link-key"))


def _key_in(file: Path) -> bytes:
    """The key in `file`, which is made where it is not there: by one process, however many ask at once."""
    try:
        # Read for every link, so that a key that was removed or replaced counts nowhere any longer.
        if not file.exists():
            _make_key(file)
        key = file.read_bytes()
    except OSError as e:
        raise StoreUnavailable(f"the key that signs links, {file}, cannot be used: {e.strerror or e}") from e
    if len(key) != KEY_BYTES:
        raise StoreUnavailable(f"the key that signs links, {file}, has {len(key)} bytes, not {KEY_BYTES}: remove it")
    return key


def _make_key(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Readable by its owner alone, from the first byte.
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as part:
            part.write(secrets.token_bytes(KEY_BYTES))
        # Unlike renaming, linking fails where another process was first, and nobody ever sees half a key.
        with contextlib.suppress(FileExistsError):
            os.link(name, file)
    finally:
        os.unlink(name)
