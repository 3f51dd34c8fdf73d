"""`make inspect-env`: on this machine, on one that has nothing, and on one that has everything."""

import os
import pty
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from .programs import SYSTEM, Programs, nvidia_smi

SCRIPT = Path("scripts/inspect_env.sh").absolute()
#: What every Linux has.
PLAIN = ("awk", "df", "dirname", "grep", "head", "id", "ls", "nproc", "paste", "sed", "timeout", "uname")
TITLES = ["Machine", "Containers", "GPU", "Python", "Variables DF_*, NVIDIA_*"]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """It, without a checkout's Python."""
    copy = tmp_path / "scripts" / SCRIPT.name
    copy.parent.mkdir()
    copy.write_text(SCRIPT.read_text())
    return copy


def inspect(script: Path, path: str, **variables: str) -> dict[str, list[str]]:
    """What it says of each thing, in lines."""
    done = subprocess.run(["/bin/bash", script], env={"PATH": path, **variables}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if line]
    assert [line for line in lines if not line.startswith("  ")] == TITLES
    rows: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if line.startswith("  "):
            name = line[2:28].strip() or name
            rows.setdefault(name, []).append(line[29:])
    return rows


def test_it_describes_this_machine() -> None:
    rows = inspect(SCRIPT, os.environ["PATH"])
    assert rows["kernel"] == [f"{os.uname().sysname} {os.uname().release}"]
    assert rows["CPUs"][0].startswith(f"{len(os.sched_getaffinity(0))} of ")
    assert "MemAvailable: " in rows["memory"][0]
    assert rows["Python"][0].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert (rows["Ray"], rows["torch"]) == ([version("ray")], [version("torch")])
    assert len(rows["its CUDA"]) >= 2


def test_a_machine_that_has_none_of_it_is_described_all_the_same(programs: Programs, script: Path) -> None:
    programs.link(*PLAIN)
    rows = inspect(script, str(programs.folder))
    assert {name for name, value in rows.items() if value == ["not found"]} >= {
        *("Docker client", "Docker engine", "runtimes", "engine's CDI", "Docker Compose", "podman"),
        *("driver", "GPUs", "nvidia-ctk", "CDI devices"),
        *("Python", "Ray", "torch", "its CUDA"),
    }
    assert rows["any"] == ["not found"]


DOCKER = """case "$*" in
  "compose version --short") echo 5.0.2 ;;
  version*) echo 29.4.0 ;;
  *ServerVersion*) echo 29.4.0 ;;
  *Runtimes*) echo "io.containerd.runc.v2 nvidia runc" ;;
  *CDISpecDirs*) echo "on, reads /etc/cdi /var/run/cdi" ;;
esac"""
TOOLKIT = """case "$*" in
  --version) echo "NVIDIA Container Toolkit CLI version 1.20.1"; echo "commit: 0" ;;
  "cdi list") echo 'level=info msg="Found 2 CDI devices"' >&2; echo nvidia.com/gpu=0; echo nvidia.com/gpu=all ;;
esac"""


def test_a_machine_with_two_gpus_docker_and_nvidias_toolkit(programs: Programs, script: Path) -> None:
    nvidia_smi(programs, "NVIDIA L4, 23034, 8.9, 580.82.07\nNVIDIA L4, 23034, 8.9, 580.82.07")
    programs.add("docker", DOCKER)
    programs.add("nvidia-ctk", TOOLKIT)
    programs.add("podman", "echo podman version 5.6.0")
    rows = inspect(script, programs.path)
    assert rows["driver"] == ["580.82.07"]
    assert rows["GPUs"] == ["NVIDIA L4, 23034 MiB, compute capability 8.9"] * 2
    assert rows["nvidia-ctk"] == ["NVIDIA Container Toolkit CLI version 1.20.1"]
    assert rows["CDI devices"] == ["nvidia.com/gpu=0", "nvidia.com/gpu=all"]
    assert (rows["Docker engine"], rows["Docker Compose"], rows["podman"]) == (["29.4.0"], ["5.0.2"], ["5.6.0"])
    assert rows["runtimes"] == ["io.containerd.runc.v2 nvidia runc"]
    assert rows["engine's CDI"] == ["on, reads /etc/cdi /var/run/cdi"]


def test_a_driver_that_does_not_answer_is_no_gpu(programs: Programs, script: Path) -> None:
    programs.add("nvidia-smi", 'echo "NVIDIA-SMI has failed" >&2; exit 9')
    assert inspect(script, programs.path)["GPUs"] == ["not found"]


def test_variables_are_shown_and_secrets_are_not(script: Path) -> None:
    shown = {"DF_MODE": "fast", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    rows = inspect(script, SYSTEM, **shown, DF_API_KEY="k1", NVIDIA_TOKEN="k2", OTHER="x")
    assert {name: rows[name] for name in shown} == {name: [value] for name, value in shown.items()}
    assert (rows["DF_API_KEY"], rows["NVIDIA_TOKEN"]) == (["(hidden)"], ["(hidden)"])
    assert "OTHER" not in rows


def test_titles_are_bold_on_a_terminal(script: Path) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(["/bin/bash", script], stdout=theirs, env={"PATH": SYSTEM}, check=True)
    os.close(theirs)
    assert b"\x1b[1mMachine\x1b[0m" in os.read(ours, 65536)
    os.close(ours)
