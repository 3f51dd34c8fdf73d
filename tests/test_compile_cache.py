"""The compiler's folder, and what goes by way of the mirror, with a compiler that writes files and nothing else."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from serve_app.adapters import blob_store
from serve_app.engine.flux import compile_cache
from serve_app.engine.flux.compile_cache import CompileCache
from serve_app.engine.weights.cache import Sources
from serve_app.engine.weights.lock import Lock, LockedRepo
from serve_app.engine.weights.origins import Mirror
from serve_app.errors import GpuLost, OutOfMemory, VariantLoadFailed
from serve_app.models import BUILT_IN
from serve_app.settings import Optimizations, VariantSettings

ARTIFACTS = "models/compiled/abc/artifacts.bin"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "another")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What torch was given to load; what it makes of all that was compiled is `artifacts`."""
    found = list[bytes]()

    def load(given: bytes) -> object:
        found.append(given)
        return None if given == b"damaged" else "info"

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"artifacts", None))
    return found


def folder() -> Path:
    """Where the compiler works now."""
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def names() -> set[str]:
    return {path.relative_to(folder()).as_posix() for path in folder().rglob("*") if path.is_file()}


def writes(*files: str) -> Callable[[], None]:
    """A compiler that writes these, each a graph that it had to compile."""

    def compile_all() -> None:
        for file in files:
            (folder() / file).parent.mkdir(parents=True, exist_ok=True)
            (folder() / file).write_text(file)
            counters["inductor"]["fxgraph_cache_miss"] += 1

    return compile_all


def mirror(at: Path) -> Mirror:
    return Mirror(blob_store(f"files:{at}"))


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(record)["action"] for record in caplog.records]


def test_what_one_replica_compiled_the_next_one_finds(tmp_path: Path) -> None:
    CompileCache(tmp_path, "abc").warm_up(writes("fx/graph", "triton/kernel"))
    seen: set[str] = set()
    CompileCache(tmp_path, "abc").warm_up(lambda: seen.update(names()))
    assert seen == {"fx/graph", "triton/kernel"}
    assert Path(os.environ["TRITON_CACHE_DIR"]) == folder() / "triton" == tmp_path / "compiled" / "abc" / "triton"


def test_another_fingerprint_finds_nothing(tmp_path: Path) -> None:
    CompileCache(tmp_path, "abc").warm_up(writes("fx/graph"))
    CompileCache(tmp_path, "abd").warm_up(lambda: None)
    assert names() == set()


def test_the_mirror_brings_it_to_another_machine(tmp_path: Path, taken: list[bytes]) -> None:
    for machine in ("one", "two"):
        CompileCache(tmp_path / machine, "abc", mirror(tmp_path / "mirror")).warm_up(writes("fx/graph"))
    assert taken == [b"artifacts"]
    assert (tmp_path / "mirror" / ARTIFACTS).read_bytes() == b"artifacts"


def test_where_nothing_is_new_nothing_is_shared(tmp_path: Path, taken: list[bytes]) -> None:
    (tmp_path / "mirror").mkdir()
    CompileCache(tmp_path, "abc", mirror(tmp_path / "mirror")).warm_up(lambda: None)
    assert not (tmp_path / "mirror" / ARTIFACTS).exists()


def test_what_is_on_the_disk_is_not_fetched(tmp_path: Path, taken: list[bytes]) -> None:
    for _ in range(2):
        CompileCache(tmp_path / "one", "abc", mirror(tmp_path / "mirror")).warm_up(writes("fx/graph"))
    assert taken == []


def test_damaged_artifacts_are_said_and_replaced(
    tmp_path: Path, taken: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mirror" / ARTIFACTS).parent.mkdir(parents=True)
    (tmp_path / "mirror" / ARTIFACTS).write_bytes(b"damaged")
    caplog.set_level(logging.INFO)
    CompileCache(tmp_path / "one", "abc", mirror(tmp_path / "mirror")).warm_up(writes("fx/graph"))
    assert taken == [b"damaged"] and actions(caplog) == ["compile_cache_fetch_failed", "compile_cache_shared"]
    assert (tmp_path / "mirror" / ARTIFACTS).read_bytes() == b"artifacts"


def test_torch_itself_says_of_damaged_artifacts_that_they_are(tmp_path: Path) -> None:
    for damaged in (b"", b"something else", bytes(1000)):
        assert torch.compiler.load_cache_artifacts(damaged) is None


@pytest.mark.parametrize("error", [VariantLoadFailed("another machine's code"), RuntimeError("no kernel image")])
def test_what_is_found_and_does_not_work_is_compiled_anew(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    kept = CompileCache(tmp_path, "abc")
    kept.warm_up(writes("fx/foreign"))

    def compile_all() -> None:
        if "fx/foreign" in names():
            raise error
        writes("fx/graph")()

    kept.warm_up(compile_all)
    assert actions(caplog) == ["compile_cache_unusable"]
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
    assert names() == {"fx/graph"}


def test_what_does_not_compile_at_all_is_raised_and_not_shared(tmp_path: Path, taken: list[bytes]) -> None:
    def compile_all() -> None:
        writes("fx/half")()
        raise VariantLoadFailed("no C++ compiler")

    with pytest.raises(VariantLoadFailed, match=r"no C\+\+ compiler"):
        CompileCache(tmp_path, "abc", mirror(tmp_path / "mirror")).warm_up(compile_all)
    assert not (tmp_path / "mirror" / ARTIFACTS).exists()


def test_a_mirror_that_cannot_be_written_to_stops_nothing(
    tmp_path: Path, taken: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mirror").write_text("a file, where a folder should be")
    CompileCache(tmp_path, "abc", mirror(tmp_path / "mirror")).warm_up(writes("fx/graph"))
    assert "compile_cache_share_failed" in actions(caplog) and "fx/graph" in names()


def test_a_cache_that_cannot_be_written_to_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file, where a folder should be")
    CompileCache(tmp_path / "cache", "abc").warm_up(writes("fx/graph"))
    assert names() == {"fx/graph"} and actions(caplog) == ["compile_cache_unwritable"]


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    CompileCache(tmp_path, "abc").warm_up(lambda: None)
    assert folder().stat().st_mode & 0o777 == 0o700


Q4, SERVED, BUCKETS = (
    BUILT_IN["tiny-Q4_0"],
    VariantSettings(optimizations=Optimizations(compile=True)),
    ((64, 64), (96, 64)),
)


def fingerprint(**changes: object) -> str:
    given = {"variant": Q4, "served": SERVED, "buckets": BUCKETS, "sources": Sources(cache=Path("x")), "device": "L4"}
    return compile_cache.fingerprint(**{**given, **changes})  # type: ignore[arg-type]  # one value of each type


def test_a_fingerprint_is_of_all_that_compiled_code_depends_on() -> None:
    pinned = {Q4.base or "": LockedRepo(revision="a" * 40, files={})}
    found = [
        fingerprint(),
        fingerprint(variant=BUILT_IN["tiny-Q8_0"]),
        fingerprint(served=VariantSettings(optimizations=Optimizations(compile=True, unpack=True))),
        fingerprint(served=VariantSettings(optimizations=Optimizations(compile=True), threads=3)),
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
