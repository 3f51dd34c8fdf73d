"""What every blob store guarantees, and what the folder store adds."""

import asyncio
import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from serve_app import adapters
from serve_app.adapters.blobs.links import LocalLinks
from serve_app.blobs import BlobInfo, BlobStore, UploadLink
from serve_app.errors import (
    BlobConflict,
    BlobNotFound,
    BlobTooLarge,
    SettingsError,
    StoreDenied,
    StoreUnavailable,
    UnsafePath,
)
from serve_app.http.app import create_app
from serve_app.http.auth import Access
from serve_app.settings import Secrets, Settings

from .backends import until
from .blob_servers import BUCKETS

JPEG = "image/jpeg"
PATH = "users/u/sessions/s/original.jpg"
APP = "http://localhost:8000"

UNSAFE = [
    "", "/etc/passwd", "/", "..", "../x", "a/../b", "a/..", ".", "./a", "a/./b", "a//b", "a/", "//a", "a\\b",
    "..\\a", "a\x00b", "a\nb", "a\x7f", "a\x85b", "a\ud800b", "x" * 1025, "ü" * 513, "y/" * 5000 + "z",
]  # fmt: skip


@pytest.fixture
def store(blobs_url: str) -> BlobStore:
    return adapters.blob_store(blobs_url)


@pytest.fixture
def files(blobs_url: str) -> BlobStore:
    return adapters.blob_store(blobs_url)


@pytest.fixture
def folder_store(tmp_path: Path) -> BlobStore:
    return adapters.blob_store(f"files:{tmp_path}/blobs")


async def listed(store: BlobStore, prefix: str) -> list[str]:
    return [info.path async for info in store.list(prefix)]


async def test_what_was_put_is_there(store: BlobStore) -> None:
    put = await store.put(PATH, b"photo", content_type=JPEG)
    assert await store.get(PATH, max_bytes=5) == (b"photo", put)
    assert await store.head(PATH) == put
    assert (put.path, put.size, put.content_type) == (PATH, 5, JPEG)


async def test_a_picture_is_of_its_own_type_whatever_its_name(store: BlobStore) -> None:
    for start, kind in (
        (b"RIFF\4\0\0\0WEBP", "image/webp"),
        (b"\0\0\0\x0cftypheic", "image/heic"),
        (b"\xff\xd8", JPEG),
    ):
        put = await store.put(PATH, start, content_type=kind)
        assert (put.content_type, (await store.head(PATH)).content_type) == (kind, kind)
        assert (await store.get(PATH, max_bytes=99))[1] == put


async def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    await store.put(PATH, b"", content_type=JPEG)
    assert (await store.get(PATH, max_bytes=0))[0] == b""


async def test_what_is_not_there(store: BlobStore) -> None:
    await store.put("a/b", b"x", content_type=JPEG)
    for path in ("missing", "a", "a/b/c"):
        with pytest.raises(BlobNotFound, match=path):
            await store.head(path)
        with pytest.raises(BlobNotFound, match=path):
            await store.get(path, max_bytes=10)
        await store.delete(path)
    assert await listed(store, "a") == ["a/b"]


async def test_more_than_max_bytes_is_refused(store: BlobStore) -> None:
    await store.put(PATH, b"12345", content_type=JPEG)
    with pytest.raises(BlobTooLarge, match="5 bytes; at most 4"):
        await store.get(PATH, max_bytes=4)


async def test_other_bytes_are_another_version_which_they_keep(store: BlobStore) -> None:
    versions = [(await store.put(PATH, b"same size %d" % i, content_type=JPEG)).version for i in range(10)]
    assert len(set(versions)) == 10
    await store.put("users/u/sessions/s/other.jpg", b"x", content_type=JPEG)
    assert (await store.head(PATH)).version == versions[-1]


async def next_second() -> None:
    now_s = int(time.time())
    await until(lambda: int(time.time()) > now_s)


@pytest.mark.slow
async def test_bytes_that_come_back_after_others_are_another_version(store: BlobStore) -> None:
    first = await store.put(PATH, b"photo A", content_type=JPEG)
    await store.put(PATH, b"photo B", content_type=JPEG)
    # S3 tells times to the second.
    await next_second()
    again = await store.put(PATH, b"photo A", content_type=JPEG)
    assert again.version != first.version
    assert await store.head(PATH) == again == (await store.get(PATH, max_bytes=7))[1]


async def test_of_many_who_write_at_once_only_the_last_has_the_version_that_stays(store: BlobStore) -> None:
    puts = await asyncio.gather(*(store.put(PATH, b"%d" % i, content_type=JPEG) for i in range(20)))
    data, stored = await store.get(PATH, max_bytes=2)
    assert [i for i, put in enumerate(puts) if put.version == stored.version] == [int(data)]


# Not S3, where a second must lie between them.
@pytest.mark.parametrize("blobs_url", ["files", "memory", BUCKETS[1]], indirect=True)
async def test_the_same_bytes_again_are_another_version(store: BlobStore) -> None:
    versions = [(await store.put(PATH, b"same", content_type=JPEG)).version for _ in range(50)]
    await store.delete(PATH)
    versions.append((await store.put(PATH, b"same", content_type=JPEG)).version)
    assert len(set(versions)) == 51


async def test_put_only_over_the_version_that_is_named(store: BlobStore) -> None:
    first = await store.put(PATH, b"1", content_type=JPEG, if_version="")
    with pytest.raises(BlobConflict, match=r"original\.jpg"):
        await store.put(PATH, b"2", content_type=JPEG, if_version="")
    second = await store.put(PATH, b"2", content_type=JPEG, if_version=first.version)
    with pytest.raises(BlobConflict):
        await store.put(PATH, b"3", content_type=JPEG, if_version=first.version)
    await store.delete(PATH)
    with pytest.raises(BlobConflict):
        await store.put(PATH, b"3", content_type=JPEG, if_version=second.version)
    with pytest.raises(BlobNotFound):
        await store.head(PATH)


async def add_one(store: BlobStore, path: str) -> None:
    """Count up the number in a blob, by compare-and-set."""
    while True:
        try:
            data, info = await store.get(path, max_bytes=100)
            await store.put(path, b"%d" % (int(data) + 1), content_type=JPEG, if_version=info.version)
            return
        except BlobConflict:
            await asyncio.sleep(0)


async def test_compare_and_set_between_tasks_and_threads_loses_nothing(store: BlobStore) -> None:
    await store.put("n", b"0", content_type=JPEG)

    def in_a_thread(_: int) -> None:
        async def several() -> None:
            await asyncio.gather(*(add_one(store, "n") for _ in range(5)))

        asyncio.run(several())

    with ThreadPoolExecutor(4) as pool:
        await asyncio.to_thread(lambda: list(pool.map(in_a_thread, range(4))))
    assert (await store.get("n", max_bytes=100))[0] == b"20"


async def test_only_one_of_many_creates(store: BlobStore) -> None:
    async def create(i: int) -> BlobInfo | None:
        try:
            return await store.put("one", b"%d" % i, content_type=JPEG, if_version="")
        except BlobConflict:
            return None

    made = [info for info in await asyncio.gather(*(create(i) for i in range(20))) if info]
    assert made == [await store.head("one")]


async def test_list_is_by_folder_and_in_path_order(store: BlobStore) -> None:
    for path in ("users/u2/x", "users/u/z", "users/u/a/b", "users/u-1/x", "users/u/a.b", "users/u"[:-1] + "v/x"):
        await store.put(path, b"", content_type=JPEG)
    assert await listed(store, "users/u") == ["users/u/a.b", "users/u/a/b", "users/u/z"]
    assert await listed(store, "users/nobody") == []
    last, head = [info async for info in store.list("users/u")][-1], await store.head("users/u/z")
    assert (last.path, last.size, last.version) == (head.path, head.size, head.version)


@pytest.mark.parametrize("path", UNSAFE, ids=lambda path: repr(path[:12]))
async def test_unsafe_paths_are_refused_by_every_method(
    store: BlobStore, files: BlobStore, path: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    with pytest.raises(UnsafePath):
        await store.head(path)
    with pytest.raises(UnsafePath):
        await store.get(path, max_bytes=1)
    with pytest.raises(UnsafePath):
        await store.put(path, b"x", content_type=JPEG)
    with pytest.raises(UnsafePath):
        await store.delete(path)
    with pytest.raises(UnsafePath):
        await listed(store, path)
    with pytest.raises(UnsafePath):
        await files.download(path, tmp_path / "to")
    with pytest.raises(UnsafePath):
        await files.upload(path, source)
    with pytest.raises(UnsafePath):
        await files.upload_link(path, size=1, expires_s=60)


async def test_odd_but_safe_paths_are_taken(store: BlobStore) -> None:
    for path in (
        "...",
        "a/..b",
        "ä/ö ü.jpg",
        "a:b",
        "-",
        ".hidden",
        "a%2Fb",
        "100%",
        "a+b?c#d",
        "a" * 200 + "/" + "b" * 200,
    ):
        await store.put(path, path.encode(), content_type=JPEG)
        assert (await store.get(path, max_bytes=1000))[0] == path.encode()


async def test_files_go_in_and_out(store: BlobStore, files: BlobStore, tmp_path: Path) -> None:
    source, to = tmp_path / "source", tmp_path / "to"
    source.write_bytes(b"weights" * 100_000)
    uploaded = await files.upload("models/m/w.gguf", source)
    assert await files.download("models/m/w.gguf", to) == uploaded == await store.head("models/m/w.gguf")
    assert to.read_bytes() == source.read_bytes()
    with pytest.raises(BlobNotFound):
        await files.download("models/m/missing", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


async def put(store: BlobStore, link: UploadLink, body: bytes) -> int:
    """Send it to where the link leads: to the store, or for one of this machine to an app. The status of the answer."""
    url = getattr(getattr(store, "_links", None), "_url", "")
    transport = httpx.ASGITransport(create_app(lambda: Uploads(url, store))) if url else None
    async with httpx.AsyncClient(transport=transport) as client:
        return (await client.put(link.url, content=body, headers=dict(link.headers))).status_code


class Uploads:
    """What an app's route for uploads needs."""

    is_stopping = False

    def __init__(self, url: str, blobs: BlobStore) -> None:
        self.access = Access(Settings(variants={"telea": {}}), Secrets())
        self.blobs = blobs
        self.upload_of = LocalLinks(url, APP).upload_of


async def test_an_upload_needs_no_credentials_but_the_link(blobs_url: str) -> None:
    store = adapters.blob_store(blobs_url, APP)
    for body in (b"weights", b"others!"):
        link = await store.upload_link("models/ü b/w", size=7, expires_s=60)
        assert link.headers["Content-Length"] == "7"
        assert await put(store, link, body) in (200, 204)
        assert (await store.get("models/ü b/w", max_bytes=9))[0] == body
    for expires_s in (0, 604_801):
        with pytest.raises(ValueError, match="604800"):
            await store.upload_link("w", size=7, expires_s=expires_s)


# Not fake-gcs-server, which minds no length; test_firebase_app.py shows that it is signed.
@pytest.mark.parametrize("blobs_url", ["files", "memory", BUCKETS[0]], indirect=True)
@pytest.mark.parametrize("body", [b"", b"weight", b"weights!", bytes(100_000)])
async def test_an_upload_of_another_length_is_refused(blobs_url: str, body: bytes) -> None:
    store = adapters.blob_store(blobs_url, APP)
    link = await store.upload_link("models/w", size=7, expires_s=60)
    for headers in ({"Content-Length": str(len(body))}, {}):
        assert await put(store, replace(link, headers=headers), body) in (400, 403)
    assert await listed(store, "models") == []


async def test_a_file_that_cannot_be_written_leaves_nothing(files: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"weights")
    (tmp_path / "taken" / "by" / "others").mkdir(parents=True)
    await files.upload("w", tmp_path / "source")
    with pytest.raises(StoreUnavailable):
        await files.download("w", tmp_path / "taken" / "by")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["by"]


COUNT_UP = """
    import asyncio, sys
    from serve_app import adapters
    from serve_app.errors import BlobConflict

    async def main():
        store = adapters.blob_store(sys.argv[1])
        for _ in range(50):
            while True:
                data, info = await store.get("n", max_bytes=100)
                try:
                    await store.put("n", b"%d" % (int(data) + 1), content_type="", if_version=info.version)
                    break
                except BlobConflict:
                    pass

    asyncio.run(main())
"""


@pytest.mark.slow
async def test_compare_and_set_between_processes_loses_nothing(
    folder_store: BlobStore, tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    await folder_store.put("n", b"0", content_type=JPEG)
    for counter in [processes(COUNT_UP, f"files:{tmp_path}/blobs") for _ in range(2)]:
        assert await asyncio.to_thread(counter.wait) == 0
    assert (await folder_store.get("n", max_bytes=100))[0] == b"100"


WRITE_FOR_EVER = """
    import asyncio, itertools, sys
    from serve_app import adapters

    async def main():
        store = adapters.blob_store(sys.argv[1])
        for i in itertools.count():
            await store.put("big", bytes([i % 251]) * 8_000_000, content_type="")
            print(i, flush=True)

    asyncio.run(main())
"""


def is_writing(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(file.stat().st_size for file in folder.glob(".part-*"))
    return False


@pytest.mark.slow
async def test_a_writer_that_is_killed_leaves_a_whole_blob(
    folder_store: BlobStore, tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    writer = processes(WRITE_FOR_EVER, f"files:{tmp_path}/blobs")
    assert writer.stdout is not None
    await asyncio.to_thread(writer.stdout.readline)
    folder = tmp_path / "blobs"
    for _ in range(20):
        data, _info = await folder_store.get("big", max_bytes=8_000_000)
        assert len(data) == 8_000_000 and data == data[:1] * len(data), "a reader saw a part"
    await until(lambda: is_writing(folder))
    writer.send_signal(signal.SIGKILL)
    await asyncio.to_thread(writer.wait)
    data, _info = await folder_store.get("big", max_bytes=8_000_000)
    assert data == data[:1] * 8_000_000
    async with asyncio.timeout(10):
        await folder_store.put("big", b"next", content_type="")
    assert (await folder_store.get("big", max_bytes=8_000_000))[0] == b"next"
    assert [path.name for path in folder.iterdir()] == ["big"], "the next writer uses up what the dead one left"


async def test_files_of_other_programs_with_names_that_no_blob_can_have_are_not_listed(
    folder_store: BlobStore, tmp_path: Path
) -> None:
    await folder_store.put("users/u/a", b"x", content_type=JPEG)
    folder = os.fsencode(tmp_path / "blobs/users/u")
    for name in (b"\xff.jpg", b"new\nline", b"back\\slash"):
        (Path(os.fsdecode(folder)) / os.fsdecode(name)).write_bytes(b"y")
    assert await listed(folder_store, "users") == ["users/u/a"]


async def test_a_folder_that_the_store_makes_is_its_owners_alone(folder_store: BlobStore, tmp_path: Path) -> None:
    await folder_store.put("a/b", b"x", content_type=JPEG)
    assert (tmp_path / "blobs").stat().st_mode & 0o777 == 0o700
    (tmp_path / "blobs").chmod(0o750)
    await folder_store.put("a/b", b"y", content_type=JPEG)
    assert (tmp_path / "blobs").stat().st_mode & 0o777 == 0o750, "what its owner allowed stays"


@pytest.mark.parametrize("left", [b"", b"half", b"much more than what comes next"])
async def test_what_a_dead_writer_left_is_no_part_of_the_next_blob(
    folder_store: BlobStore, tmp_path: Path, left: bytes
) -> None:
    part = await unfinished(folder_store, tmp_path)
    part.write_bytes(left)
    info = await folder_store.put("a", b"next", content_type="")
    assert (await folder_store.get("a", max_bytes=100))[0] == b"next"
    assert info.size == 4


async def unfinished(store: BlobStore, tmp_path: Path) -> Path:
    """The file that the blob `a` is written to first."""
    conflict = store.put("a", b"x", content_type="", if_version="another")
    with pytest.raises(BlobConflict):
        await conflict
    return tmp_path / "blobs" / f".part-{hashlib.sha256(b'a').hexdigest()[:32]}"


async def test_a_link_in_the_unfinished_files_place_is_not_followed(folder_store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"theirs")
    part = await unfinished(folder_store, tmp_path)
    part.symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafePath, match="link"):
        await folder_store.put("a", b"ours", content_type="")
    assert (tmp_path / "outside").read_bytes() == b"theirs"


async def test_unfinished_files_are_not_listed_and_cannot_be_named(folder_store: BlobStore, tmp_path: Path) -> None:
    await folder_store.put("a/b", b"x", content_type=JPEG)
    (tmp_path / "blobs/a/.part-1").write_bytes(b"half")
    assert await listed(folder_store, "a") == ["a/b"]
    with pytest.raises(UnsafePath, match=r"\.part-"):
        await folder_store.head("a/.part-1")


async def test_links_that_lead_out_are_refused(folder_store: BlobStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    await folder_store.put("a/b", b"x", content_type=JPEG)
    (tmp_path / "blobs/a/folder").symlink_to(outside)
    (tmp_path / "blobs/a/file").symlink_to(outside / "secret")
    (tmp_path / "blobs/a/inside").symlink_to(tmp_path / "blobs/a/b")
    for path in ("a/folder/secret", "a/file", "a/folder/new"):
        with pytest.raises(UnsafePath, match="link"):
            await folder_store.get(path, max_bytes=100)
        with pytest.raises(UnsafePath, match="link"):
            await folder_store.put(path, b"overwritten", content_type=JPEG)
        with pytest.raises(UnsafePath, match="link"):
            await folder_store.delete(path)
    assert await listed(folder_store, "a") == ["a/b", "a/inside"]
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


async def test_a_blob_cannot_be_the_folder_of_others(folder_store: BlobStore) -> None:
    await folder_store.put("a/b", b"x", content_type=JPEG)
    with pytest.raises(BlobConflict, match="folder"):
        await folder_store.put("a", b"x", content_type=JPEG)
    with pytest.raises(BlobConflict, match="a blob, not a folder"):
        await folder_store.put("a/b/c", b"x", content_type=JPEG)
    assert await listed(folder_store, "a") == ["a/b"]


async def test_a_name_too_long_for_a_file_is_refused(folder_store: BlobStore) -> None:
    with pytest.raises(UnsafePath, match="255 bytes"):
        await folder_store.put("ü" * 200, b"x", content_type=JPEG)


async def test_a_file_put_there_by_hand_is_a_blob(folder_store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/x.png").write_bytes(b"1")
    before = await folder_store.head("x.png")
    assert before.content_type == "image/png"
    replacement = tmp_path / "replacement"
    replacement.write_bytes(b"2")
    os.utime(replacement, ns=(1, (tmp_path / "blobs/x.png").stat().st_mtime_ns))
    replacement.replace(tmp_path / "blobs/x.png")
    assert (await folder_store.head("x.png")).version != before.version


async def test_a_store_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    store = adapters.blob_store(f"files:{tmp_path}/loop/blobs")
    with pytest.raises(StoreUnavailable):
        await store.put("a", b"x", content_type=JPEG)


@pytest.mark.parametrize("url", ["ftp:x", "files", "", "sqlite:x"])
def test_an_unknown_scheme_names_the_known_ones(url: str) -> None:
    with pytest.raises(SettingsError, match="files:, s3:, firebase:, memory:"):
        adapters.blob_store(url)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapters.BLOB_STORES, "ghost", adapters.Row("a_package_nobody_has.stores:Store", "ghost"))
    with pytest.raises(SettingsError, match=r"a_package_nobody_has.*flux-fill-serve\[ghost\]"):
        adapters.blob_store("ghost:bucket")


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EACCES, StoreDenied),
        (errno.EROFS, StoreDenied),
        (errno.ENOSPC, StoreDenied),
        (errno.EIO, StoreUnavailable),
        (errno.ESTALE, StoreUnavailable),
    ],
)
async def test_a_folder_that_refuses_is_no_outage(
    number: int, error: type[StoreUnavailable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, whom no permission stops: the system's answer is put in its place."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    store = adapters.blob_store(f"files:{tmp_path}")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StoreUnavailable, match="blob users/u") as caught:
        await store.put("users/u", b"x", content_type="image/jpeg")
    assert type(caught.value) is error
