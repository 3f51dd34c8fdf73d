"""The archive of what was compiled, with a compiler that writes files and nothing else."""

import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from serve_app.adapters import blob_store
from serve_app.engine import compile_cache, compile_folder
from serve_app.engine.cache import Sources
from serve_app.engine.compile_cache import CompileCache
from serve_app.engine.lock import Lock, LockedRepo
from serve_app.engine.origins import Mirror
from serve_app.errors import GpuLost, OutOfMemory, VariantLoadFailed
from serve_app.settings import Levers, VariantSettings
from serve_app.variants import BUILT_IN

ARCHIVE = "compiled/abc/inductor.zip"


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "another"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another"))
    yield
    compile_folder.remove()


def folder() -> Path:
    """Where the compiler works now."""
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def names() -> set[str]:
    return {path.relative_to(folder()).as_posix() for path in folder().rglob("*") if path.is_file()}


def writes(*files: str) -> Callable[[], None]:
    """A compiler that writes these, each in a folder of its own, and its locks."""

    def compile_all() -> None:
        for file in (*files, "locks/one.lock"):
            (folder() / file).parent.mkdir(parents=True, exist_ok=True)
            (folder() / file).write_text(file)

    return compile_all


def mirror(at: Path) -> Mirror:
    return Mirror(blob_store(f"files:{at}"))


def test_what_one_replica_compiled_the_next_one_finds(tmp_path: Path) -> None:
    kept = CompileCache(tmp_path, "abc")
    kept.warm_up(writes("fx/graph", "c/kernel.so"))
    first = folder()
    seen: set[str] = set()
    kept.warm_up(lambda: seen.update(names()))
    assert folder() != first
    assert seen == {"fx/graph", "c/kernel.so"}


def test_where_nothing_is_new_nothing_is_written(tmp_path: Path) -> None:
    kept = CompileCache(tmp_path, "abc")
    kept.warm_up(writes("fx/graph"))
    before = (tmp_path / ARCHIVE).stat().st_ino
    kept.warm_up(writes("fx/graph"))
    assert (tmp_path / ARCHIVE).stat().st_ino == before
    kept.warm_up(writes("fx/another"))
    with ZipFile(tmp_path / ARCHIVE) as packed:
        assert set(packed.namelist()) == {"fx/graph", "fx/another"}
    assert [path.name for path in (tmp_path / ARCHIVE).parent.iterdir()] == ["inductor.zip"]


def test_another_fingerprint_finds_nothing(tmp_path: Path) -> None:
    CompileCache(tmp_path, "abc").warm_up(writes("fx/graph"))
    CompileCache(tmp_path, "abd").warm_up(lambda: None)
    assert names() == set()


def test_the_mirror_brings_it_to_another_machine(tmp_path: Path) -> None:
    CompileCache(tmp_path / "one", "abc", mirror(tmp_path / "mirror")).warm_up(writes("fx/graph"))
    CompileCache(tmp_path / "two", "abc", mirror(tmp_path / "mirror")).warm_up(lambda: None)
    assert names() == {"fx/graph"}
    assert (tmp_path / "mirror/models/compiled/abc/inductor.zip").is_file()


def archive(path: Path, **files: bytes) -> bytes:
    with ZipFile(path, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return path.read_bytes()


def damaged(tmp_path: Path) -> dict[str, bytes]:
    whole = archive(tmp_path / "whole.zip", graph=b"0123456789")
    return {
        "empty": b"",
        "no archive": b"something else",
        "cut short": whole[:-10],
        "a flipped bit": whole.replace(b"0123456789", b"1123456789"),
        "no name": archive(tmp_path / "named.zip", gräph=b"x").replace(b"\xc3\xa4", b"\xff\xff"),
    }


@pytest.mark.parametrize("how", ["empty", "no archive", "cut short", "a flipped bit", "no name"])
def test_a_damaged_archive_is_said_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    (tmp_path / ARCHIVE).parent.mkdir(parents=True)
    (tmp_path / ARCHIVE).write_bytes(damaged(tmp_path)[how])
    kept = CompileCache(tmp_path, "abc")
    kept.warm_up(writes("fx/graph"))
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [vars(record)["action"] for record in warned] == ["compiled_refused"]
    kept.warm_up(lambda: None)
    assert names() == {"fx/graph"}


def test_whatever_is_damaged_in_an_archive_no_load_fails(tmp_path: Path) -> None:
    kept = CompileCache(tmp_path, "abc")
    kept.warm_up(writes("fx/graph", "c/kernel.so"))
    whole, chance = (tmp_path / ARCHIVE).read_bytes(), random.Random(16)
    loaded = []
    for number in range(200):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(len(whole))] = chance.randrange(256)
        (tmp_path / ARCHIVE).write_bytes(changed)
        kept.warm_up(lambda number=number: loaded.append(number))  # type: ignore[misc]  # mypy infers no default
        compile_folder.remove()
    assert loaded == list(range(200))


def test_an_archive_that_would_fill_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = CompileCache(tmp_path, "abc")
    kept.warm_up(writes("fx/graph"))
    monkeypatch.setattr(compile_cache, "_MAX_BYTES", 5)
    kept.warm_up(lambda: None)
    assert names() == set()
    kept.warm_up(writes("fx/graph"))
    assert not (tmp_path / ARCHIVE).exists()
    assert "more than the 5 that are kept" in caplog.text


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).parent.mkdir(parents=True)
    archive(tmp_path / ARCHIVE, **{"../../outside": b"x", "/tmp/absolute": b"x"})
    CompileCache(tmp_path, "abc").warm_up(lambda: None)
    assert names() == {"outside", "tmp/absolute"}


@pytest.mark.parametrize("error", [VariantLoadFailed("another machine's code"), RuntimeError("no kernel image")])
def test_what_is_found_and_does_not_work_is_compiled_anew(tmp_path: Path, error: Exception) -> None:
    kept = CompileCache(tmp_path, "abc")
    kept.warm_up(writes("fx/foreign"))

    def compile_all() -> None:
        if "fx/foreign" in names():
            raise error
        writes("fx/graph")()

    kept.warm_up(compile_all)
    kept.warm_up(lambda: None)
    assert names() == {"fx/graph"}


@pytest.mark.parametrize("error", [GpuLost("an illegal memory access"), OutOfMemory("no memory left")])
def test_a_failure_of_the_gpu_says_nothing_of_what_was_found(tmp_path: Path, error: Exception) -> None:
    kept = CompileCache(tmp_path, "abc")
    kept.warm_up(writes("fx/graph"))

    def compile_all() -> None:
        raise error

    with pytest.raises(type(error)):
        kept.warm_up(compile_all)
    kept.warm_up(lambda: None)
    assert names() == {"fx/graph"}


def test_what_does_not_compile_at_all_is_raised_and_not_kept(tmp_path: Path) -> None:
    def compile_all() -> None:
        writes("fx/half")()
        raise VariantLoadFailed("no C++ compiler")

    with pytest.raises(VariantLoadFailed, match=r"no C\+\+ compiler"):
        CompileCache(tmp_path, "abc").warm_up(compile_all)
    assert not (tmp_path / ARCHIVE).exists()


def test_a_mirror_that_cannot_be_written_to_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mirror").write_text("a file, where a folder should be")
    CompileCache(tmp_path, "abc", mirror(tmp_path / "mirror")).warm_up(writes("fx/graph"))
    assert "compiled_not_kept" in [vars(record)["action"] for record in caplog.records]
    assert (tmp_path / ARCHIVE).is_file()


def test_a_cache_that_cannot_be_written_to_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mirror").mkdir()
    CompileCache(tmp_path / "one", "abc", mirror(tmp_path / "mirror")).warm_up(writes("fx/graph"))
    caplog.set_level(logging.INFO)
    (tmp_path / "two").write_text("a file, where a folder should be")
    compiled: list[str] = []
    CompileCache(tmp_path / "two", "abc", mirror(tmp_path / "mirror")).warm_up(lambda: compiled.append("fx/graph"))
    assert compiled == ["fx/graph"]
    assert "compiled_not_fetched" in [vars(record)["action"] for record in caplog.records]


def test_triton_works_in_the_folder_too_and_its_part_is_not_kept(tmp_path: Path) -> None:
    kept = CompileCache(tmp_path, "abc")
    for _ in range(2):
        kept.warm_up(writes("fx/graph", "triton/hash/kernel.cubin"))
        assert Path(os.environ["TRITON_CACHE_DIR"]) == folder() / "triton"
    with ZipFile(tmp_path / ARCHIVE) as packed:
        assert packed.namelist() == ["fx/graph"]


Q4, SERVED, BUCKETS = BUILT_IN["tiny-Q4_0"], VariantSettings(levers=Levers(compile=True)), ((64, 64), (96, 64))


def fingerprint(**changes: object) -> str:
    given = {"variant": Q4, "served": SERVED, "buckets": BUCKETS, "sources": Sources(cache=Path("x")), "device": "L4"}
    return compile_cache.fingerprint(**{**given, **changes})  # type: ignore[arg-type]  # one value of each type


def test_a_fingerprint_is_of_all_that_compiled_code_depends_on() -> None:
    pinned = {Q4.base or "": LockedRepo(revision="a" * 40, files={})}
    found = [
        fingerprint(),
        fingerprint(variant=BUILT_IN["tiny-Q8_0"]),
        fingerprint(served=VariantSettings(levers=Levers(compile=True, unpack=True))),
        fingerprint(served=VariantSettings(levers=Levers(compile=True), threads=3)),
        fingerprint(buckets=((64, 64),)),
        fingerprint(device="H200"),
        fingerprint(sources=Sources(cache=Path("x"), locked=Lock(repos=pinned))),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint(buckets=tuple(reversed(BUCKETS)), sources=Sources(cache=Path("elsewhere"))) == found[0]


def test_a_fingerprint_names_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    monkeypatch.setattr(compile_cache, "version", lambda package: "0.0")
    assert fingerprint() != before
