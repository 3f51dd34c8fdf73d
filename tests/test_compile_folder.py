"""The folder the compiler works in: who has it, and when it goes."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.engine import compile_folder

#: A replica: says where its compiler works, and lasts until it is killed.
REPLICA = """
import sys
from serve_app.engine import compile_folder
folder = compile_folder.new()
(folder / "kernel.so").write_text("code")
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "another"))
    yield
    compile_folder.remove()


def homes() -> list[Path]:
    return [path for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("flux-fill-compiled-")]


def test_what_a_killed_replica_left_behind_goes_when_the_next_one_starts() -> None:
    command = [sys.executable, "-c", REPLICA]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as replica:
        assert replica.stdout is not None
        theirs = Path(replica.stdout.readline().strip())
        compile_folder.new()
        assert (theirs / "kernel.so").exists(), "it still runs"
        replica.kill()
    assert theirs.exists()
    ours = compile_folder.new()
    assert not theirs.parent.exists()
    assert ours.exists()


def test_a_process_may_have_several_and_removes_them_all_from_whatever_thread() -> None:
    folders: list[Path] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: folders.append(compile_folder.new()))
        thread.start()
        thread.join()
    assert [folder.exists() for folder in folders] == [True, True]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folders[1])
    assert os.environ["TRITON_CACHE_DIR"] == str(folders[1] / "triton")
    compile_folder.remove()
    assert homes() == []


def test_a_folder_of_another_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "compiled-another" / "cache").mkdir(parents=True)
    compile_folder.new()
    assert (tmp_path / "compiled-another" / "cache").exists()


def test_a_process_that_ends_by_itself_leaves_nothing() -> None:
    subprocess.run([sys.executable, "-c", REPLICA], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    assert homes() == []


def test_a_link_is_not_what_a_replica_left_behind(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "cache").mkdir(parents=True)
    (theirs / "lock").write_text("kept")
    (tmp_path / "flux-fill-compiled-x").symlink_to(theirs)
    compile_folder.new()
    assert (theirs / "lock").read_text() == "kept"
    assert (theirs / "cache").is_dir()
