"""Signed links to local blobs."""

import asyncio
import base64
import json
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jwt
import pytest

from serve_app import adapters
from serve_app.adapters.blobs.links import AUDIENCE, KEY_BYTES, MAX_EXPIRES_S, UPLOADS, LocalLinks
from serve_app.errors import InvalidLink, StoreUnavailable, UnsafePath
from serve_app.settings import Settings, VariantSettings

PATH = "users/u/sessions/s/edited ü.jpg"
PUBLIC_URL = "https://photos.example"


@pytest.fixture(params=["files", "memory"])
def links(request: pytest.FixtureRequest, tmp_path: Path) -> LocalLinks:
    return LocalLinks(f"{request.param}:{tmp_path}/blobs", PUBLIC_URL)


@pytest.fixture
def folder_links(tmp_path: Path) -> LocalLinks:
    return LocalLinks(f"files:{tmp_path}/blobs", PUBLIC_URL)


@pytest.fixture
def key(folder_links: LocalLinks, tmp_path: Path) -> bytes:
    """The key of `folder_links`."""
    with pytest.raises(InvalidLink):
        folder_links.path_of("x")
    return (tmp_path / "blobs.link-key").read_bytes()


def token_of(link: str) -> str:
    return link.removeprefix(f"{PUBLIC_URL}/blobs/")


def token(key: bytes, algorithm: str = "HS256", **changes: object) -> str:
    claims = {"sub": PATH, "exp": int(time.time()) + 60, "aud": AUDIENCE, **changes}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm)


async def test_a_link_names_its_blob_and_nothing_but_a_token_follows(links: LocalLinks) -> None:
    link = await links.link(PATH, expires_s=60)
    assert link.startswith(f"{PUBLIC_URL}/blobs/")
    assert "/" not in token_of(link)
    assert links.path_of(token_of(link)) == PATH


async def test_a_public_url_may_end_with_a_slash(tmp_path: Path) -> None:
    link = await LocalLinks(f"files:{tmp_path}/blobs", f"{PUBLIC_URL}/").link(PATH, expires_s=60)
    assert link.startswith(f"{PUBLIC_URL}/blobs/ey")


async def test_a_link_for_an_upload_names_its_blob_and_its_size(links: LocalLinks) -> None:
    link = await links.upload_link(PATH, size=77, expires_s=60)
    assert link.headers == {"Content-Length": "77"}
    assert links.upload_of(token_of(link.url)) == (PATH, 77)
    with pytest.raises(ValueError, match="604800"):
        await links.upload_link(PATH, size=77, expires_s=0)
    with pytest.raises(UnsafePath):
        await links.upload_link("../secret", size=77, expires_s=60)


async def test_who_may_read_may_not_write_nor_the_other_way_round(links: LocalLinks) -> None:
    with pytest.raises(InvalidLink, match="something else"):
        links.path_of(token_of((await links.upload_link(PATH, size=77, expires_s=60)).url))
    with pytest.raises(InvalidLink, match="something else"):
        links.upload_of(token_of(await links.link(PATH, expires_s=60)))


async def test_what_is_asked_for_is_checked(links: LocalLinks) -> None:
    await links.link(PATH, expires_s=MAX_EXPIRES_S)
    for expires_s in (0, -1, MAX_EXPIRES_S + 1):
        with pytest.raises(ValueError, match="604800"):
            await links.link(PATH, expires_s=expires_s)
    with pytest.raises(UnsafePath):
        await links.link("../secret", expires_s=60)


def test_tokens_that_do_not_hold_are_refused(folder_links: LocalLinks, key: bytes) -> None:
    assert folder_links.path_of(token(key)) == PATH
    with pytest.raises(InvalidLink, match="expired"):
        folder_links.path_of(token(key, exp=int(time.time()) - 1))
    refused = {
        "another key": token(b"k" * KEY_BYTES),
        "another audience": token(key, aud="fluxfill-push"),
        "no audience": token(key, aud=None),
        "no expiry": token(key, exp=None),
        "no path": token(key, sub=None),
        "a path that is a number": token(key, sub=7),
        "another algorithm": token(key * 2, "HS512"),
        "no token": "",
        "no JWT": "abc",
        "no ASCII": "ü.ü.ü",
        "a surrogate": "\ud800",
        "very long": "a" * 100_000,
    }
    for what, made in refused.items():
        with pytest.raises(InvalidLink):
            folder_links.path_of(made)
            pytest.fail(what)


def test_an_unsigned_or_altered_token_is_refused(folder_links: LocalLinks, key: bytes) -> None:
    header, claims, signature = token(key).split(".")
    none = base64.urlsafe_b64encode(json.dumps({"alg": "none", "typ": "JWT"}).encode()).decode().rstrip("=")
    padding = "=" * (-len(claims) % 4)
    other = json.loads(base64.urlsafe_b64decode(claims + padding)) | {"sub": "users/another"}
    altered = base64.urlsafe_b64encode(json.dumps(other).encode()).decode().rstrip("=")
    for forged in (f"{none}.{claims}.", f"{none}.{claims}.{signature}", f"{header}.{claims}.", f"{header}.{claims}"):
        with pytest.raises(InvalidLink):
            folder_links.path_of(forged)
    with pytest.raises(InvalidLink):
        folder_links.path_of(f"{header}.{altered}.{signature}")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "a\x00b", ""])
def test_a_path_is_checked_though_it_is_signed(folder_links: LocalLinks, key: bytes, path: str) -> None:
    with pytest.raises(UnsafePath):
        folder_links.path_of(token(key, sub=path))
    with pytest.raises(UnsafePath):
        folder_links.upload_of(token(key, sub=path, aud=UPLOADS, size=1))


async def test_stores_share_no_links(tmp_path: Path) -> None:
    link = await LocalLinks(f"files:{tmp_path}/blobs", PUBLIC_URL).link(PATH, expires_s=60)
    for other in (f"files:{tmp_path}/others", f"memory:{tmp_path}/blobs"):
        with pytest.raises(InvalidLink):
            LocalLinks(other, PUBLIC_URL).path_of(token_of(link))


@pytest.mark.parametrize("scheme", ["files", "memory"])
async def test_all_of_one_store_read_each_others_links(scheme: str, tmp_path: Path) -> None:
    one, other = (LocalLinks(f"{scheme}:{tmp_path}/blobs", PUBLIC_URL) for _ in range(2))
    assert other.path_of(token_of(await one.link(PATH, expires_s=60))) == PATH


async def test_removing_the_key_voids_all_links_at_once(folder_links: LocalLinks, tmp_path: Path) -> None:
    old = await folder_links.link(PATH, expires_s=60)
    (tmp_path / "blobs.link-key").unlink()
    new = await LocalLinks(f"files:{tmp_path}/blobs", PUBLIC_URL).link(PATH, expires_s=60)
    assert folder_links.path_of(token_of(new)) == PATH
    with pytest.raises(InvalidLink):
        folder_links.path_of(token_of(old))


def test_the_key_is_its_owners_alone(key: bytes, tmp_path: Path) -> None:
    assert len(key) == KEY_BYTES
    assert stat.S_IMODE((tmp_path / "blobs.link-key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["blobs.link-key"], "beside the blobs, not one of them"


SIGN = """
    import asyncio, pathlib, sys
    from serve_app.adapters.blobs.links import LocalLinks

    links = LocalLinks(sys.argv[1], "http://h")
    print("ready", flush=True)
    while not pathlib.Path(sys.argv[2]).exists():
        pass
    print(asyncio.run(links.link("a/b", expires_s=60)))
"""


@pytest.mark.slow
def test_processes_that_begin_at_once_make_one_key(
    folder_links: LocalLinks, tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    signers = [processes(SIGN, f"files:{tmp_path}/blobs", tmp_path / "go") for _ in range(2)]
    for signer in signers:
        assert signer.stdout is not None and signer.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    for signer in signers:
        assert signer.stdout is not None
        assert folder_links.path_of(signer.stdout.readline().strip().removeprefix("http://h/blobs/")) == "a/b"


def test_threads_that_begin_at_once_make_one_key(tmp_path: Path) -> None:
    together = threading.Barrier(16)

    def sign(_: int) -> str:
        together.wait()
        return asyncio.run(LocalLinks(f"files:{tmp_path}/blobs", PUBLIC_URL).link(PATH, expires_s=60))

    with ThreadPoolExecutor(16) as pool:
        links = list(pool.map(sign, range(16)))
    reader = LocalLinks(f"files:{tmp_path}/blobs", PUBLIC_URL)
    assert {reader.path_of(token_of(link)) for link in links} == {PATH}


def test_a_damaged_key_is_said(folder_links: LocalLinks, tmp_path: Path) -> None:
    (tmp_path / "blobs.link-key").write_bytes(b"short")
    with pytest.raises(StoreUnavailable, match="5 bytes, not 32"):
        folder_links.path_of("x")


async def test_a_key_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="key"):
        await LocalLinks(f"files:{tmp_path}/file/blobs", PUBLIC_URL).link(PATH, expires_s=60)


def test_the_app_serves_the_links_of_its_own_disk_and_memory_only() -> None:
    def links_of(blobs: str) -> LocalLinks | None:
        return adapters.local_links(Settings(blobs=blobs, variants={"telea": VariantSettings()}))

    assert links_of("files:var/blobs") and links_of("memory:x")
    assert links_of("s3://bucket") is None and links_of("firebase:bucket") is None
