"""What a release is made with: one version in all places, and advisories that never pass where none could be asked."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments.cli.main import app

VERSION = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
LOCKED = f"six==1.17.0 --hash=sha256:{'0' * 64}\n"


def test_the_command_says_its_version() -> None:
    ended = CliRunner().invoke(app, ["--version"])
    assert (ended.exit_code, ended.output) == (0, f"flux-fill-serve {VERSION}\n")


def test_every_image_is_of_this_version_and_the_upgrade_notes_know_it() -> None:
    named = ["git", "grep", "-hoE", r"flux-fill-serve:[0-9]+\.[0-9]+\.[0-9]+", "--", ":!tests/test_releases.py"]
    tags = subprocess.run(named, capture_output=True, text=True, check=True).stdout.split()
    assert set(tags) == {f"flux-fill-serve:{VERSION}"}
    assert re.search(rf"^## {re.escape(VERSION)}$", Path("docs/upgrade.md").read_text(), re.M)


def advisories(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "locked.txt").write_text(LOCKED)
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {**os.environ, "PATH": tools, "XDG_CACHE_HOME": str(tmp_path), **environment}
    command = ["scripts/advisories.sh", str(tmp_path / "locked.txt")]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_without_a_network_nothing_is_said_to_be_sound(tmp_path: Path) -> None:
    # A port that refuses, for both spellings.
    closed = "http://127.0.0.1:9"
    ended = advisories(tmp_path, HTTPS_PROXY=closed, https_proxy=closed, NO_PROXY="", no_proxy="")
    assert ended.returncode == 2
    assert "is there a network" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("said", "status", "ended_with"),
    [
        ("No known vulnerabilities found", 0, 0),
        ("Found 1 known vulnerability in 1 package", 1, 1),
        ("ERROR:pip_audit._cli:six: Dependency not found and could not be audited", 1, 2),
    ],
)
def test_what_pip_audit_says_is_told_apart(tmp_path: Path, said: str, status: int, ended_with: int) -> None:
    stub = tmp_path / "pip-audit"
    stub.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit {status}\n')
    stub.chmod(0o755)
    ended = advisories(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ended.returncode == ended_with and said in ended.stderr
