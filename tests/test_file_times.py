"""The list of slow test files, and what holds the others to their minute."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .file_times import LIMIT_S, SLOW, too_slow

ROOT = Path(__file__).parents[1]
LISTED = next(iter(SLOW))


def test_every_listed_file_is_there_and_says_why() -> None:
    assert [name for name, why in SLOW.items() if not why or not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("times", "slow"),
    [
        ({"tests/a.py": LIMIT_S - 1, "tests/b.py": 1}, []),
        ({"tests/a.py": LIMIT_S + 1, "tests/b.py": LIMIT_S + 2, "tests/c.py": 1}, ["tests/b.py", "tests/a.py"]),
        ({LISTED: 10 * LIMIT_S}, []),
        # A machine half as fast: all takes longer.
        ({LISTED: 2800, "tests/a.py": 1.8 * LIMIT_S}, []),
        ({LISTED: 2800, "tests/a.py": 2.2 * LIMIT_S}, ["tests/a.py"]),
    ],
)
def test_a_file_over_the_limit_is_named(times: dict[str, float], slow: list[str]) -> None:
    assert too_slow(Counter(times)) == slow


@pytest.mark.slow
@pytest.mark.parametrize(("ci", "status", "workers"), [("true", 1, ("-n", "1")), ("", 0, ())], ids=["CI", "laptop"])
def test_a_slow_file_fails_continuous_integration_only(
    ci: str, status: int, workers: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "test_it.py").write_text("def test_it(): ...\n")
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.file_times", "--file-limit=0", *workers]
    ended = subprocess.run(pytest_command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert "test_it.py takes 0 s" in ended.stdout
    assert ("seconds by file" in ended.stdout) == bool(ci)
