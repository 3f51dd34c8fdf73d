"""The Dockerfile and what goes into the build: rules of ours, with faults that each must catch; the first process."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from deployments.config import load

DOCKERFILE = Path("Dockerfile").read_text()
IGNORED = Path(".dockerignore").read_text()
CONFIG = Path("container/serve_config.yaml")


# -- the Dockerfile


class Instruction(NamedTuple):
    stage: str
    keyword: str
    value: str


class Parsed:
    """A Dockerfile's instructions in order; continued lines are joined, and comments left out."""

    def __init__(self, text: str) -> None:
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        self.instructions: list[Instruction] = []
        stage = ""
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            keyword, _, value = line.strip().partition(" ")
            if keyword == "FROM":
                stage = value.split(" AS ")[1]
            if keyword:
                self.instructions.append(Instruction(stage, keyword, " ".join(value.split())))
        self.arguments = dict(value.partition("=")[::2] for value in self.values("ARG"))

    def values(self, keyword: str, *stages: str) -> list[str]:
        return [i.value for i in self.instructions if i.keyword == keyword and (not stages or i.stage in stages)]

    def says(self, pattern: str, *keywords: str, stage: str | None = None) -> bool:
        """Whether an instruction matches: one of these keywords', in this stage."""
        return any(
            re.search(pattern, i.value)
            for i in self.instructions
            if (not keywords or i.keyword in keywords) and stage in (None, i.stage)
        )

    def packages(self) -> str:
        """Debian's, in the image."""
        return " ".join(
            re.findall(r"apt-get install -y --no-install-recommends (.*?) &&", str(self.values("RUN", "app")))
        )


def is_pinned(image: str) -> bool:
    """By Docker Hub's short name, with a tag that is not `latest`, or by a digest."""
    name, _, tag = image.partition("@")[0].partition(":")
    return "." not in name and ((bool(tag) and tag != "latest") or "@sha256:" in image)


PORT = load(CONFIG).port
LABELS = ("title", "licenses", "version", "revision", "source")

#: What is wrong, and whether it is.
RULES: dict[str, Callable[[Parsed], bool]] = {
    "base image without a tag, or from a named registry": lambda file: not is_pinned(file.arguments["BASE"]),
    "bytecode switched off": lambda file: file.says("PYTHONDONTWRITEBYTECODE|--no-compile"),
    "requirements without bytecode": lambda file: (
        not file.says("UV_COMPILE_BYTECODE=1 PYC_INVALIDATION_MODE=UNCHECKED_HASH", "ENV", stage="build")
    ),
    "standard library without bytecode": lambda file: (
        not file.says("compileall .*unchecked-hash.*stdlib", "RUN", stage="app")
    ),
    "app without bytecode": lambda file: (
        not file.says(r"compileall .*unchecked-hash .*{serve_app,deployments,benchmarks}", stage="app")
    ),
    "installs without hashes": lambda file: file.says("pip install(?!.*(--require-hashes|--no-deps))", "RUN"),
    "does not run as uid 10001": lambda file: (
        not file.values("USER") == file.values("USER", "final") == ["10001:10001"]
    ),
    "sudo, or files that all may write": lambda file: file.says(r"\bsudo\b|chmod (-R )?([0-7]*7\b|[ao]?\+w)"),
    "no wget for KubeRay's probes": lambda file: "wget" not in file.packages().split(),
    "a compiler in every image": lambda file: bool(
        re.search(r"gcc|g\+\+|build-essential|-dev\b", file.packages()) or file.arguments["COMPILER"]
    ),
    "an entry point in the way of KubeRay's command": lambda file: file.says("", "ENTRYPOINT"),
    "a stop signal on which `ray start` does not drain": lambda file: file.says("", "STOPSIGNAL"),
    "no health check of /ready": lambda file: not file.says(f'"http://127.0.0.1:{PORT}/ready"]$', "HEALTHCHECK"),
    "another port than the config's": lambda file: file.values("EXPOSE") != [str(PORT)],
    "a shell between the runtime and the app": lambda file: not file.says(r"^\[", "CMD"),
    "labels missing": lambda file: not all(file.says(rf"image\.{name}=", "LABEL", stage="final") for name in LABELS),
    "copies more than it names": lambda file: file.says(r"(^| )\. \S+$", "COPY") or file.says("", "ADD"),
    "weights baked in": lambda file: file.arguments["WEIGHTS"] != "",
    "a secret that stays in the image": lambda file: file.says("(TOKEN|SECRET|PASSWORD|API_KEYS?)(=|$)", "ARG", "ENV"),
}


def dockerfile_problems(text: str) -> list[str]:
    file = Parsed(text)
    return [problem for problem, is_there in RULES.items() if is_there(file)]


#: What stands there, what is planted in its place, the problem.
FAULTS = [
    ("3.11-slim-bookworm\n", "latest\n", "base image without a tag, or from a named registry"),
    ("=python:3.11-slim-bookworm\n", "=python\n", "base image without a tag, or from a named registry"),
    ("=python:", "=registry.example.com/python:", "base image without a tag, or from a named registry"),
    ("HOME=/tmp", "HOME=/tmp PYTHONDONTWRITEBYTECODE=1", "bytecode switched off"),
    ("pip install --require", "pip install --no-compile --require", "bytecode switched off"),
    ("UV_COMPILE_BYTECODE=1 ", "", "requirements without bytecode"),
    ("PYC_INVALIDATION_MODE=UNCHECKED_HASH ", "", "requirements without bytecode"),
    ("unchecked-hash \\\n      /opt/app", "timestamp /opt/app", "app without bytecode"),
    ('sysconfig.get_path("stdlib")', '"/opt"', "standard library without bytecode"),
    ("{serve_app,deployments,benchmarks}", "serve_app", "app without bytecode"),
    ("--require-hashes -r requirements/build.txt", "-r requirements/build.txt", "installs without hashes"),
    ('--require-hashes -r "requirements/', '-r "requirements/', "installs without hashes"),
    ("USER 10001:10001", "USER root", "does not run as uid 10001"),
    ("USER 10001:10001\n", "", "does not run as uid 10001"),
    ("--no-install-recommends wget", "--no-install-recommends wget sudo", "sudo, or files that all may write"),
    ("mkdir /weights", "mkdir /weights && chmod 777 /weights", "sudo, or files that all may write"),
    ("--no-install-recommends wget", "--no-install-recommends curl", "no wget for KubeRay's probes"),
    ("--no-install-recommends wget", "--no-install-recommends wget g++", "a compiler in every image"),
    ("ARG COMPILER=", "ARG COMPILER=gcc", "a compiler in every image"),
    ("EXPOSE 8080", 'ENTRYPOINT ["serve", "run"]\nEXPOSE 8080', "an entry point in the way of KubeRay's command"),
    ("EXPOSE 8080", "STOPSIGNAL SIGINT\nEXPOSE 8080", "a stop signal on which `ray start` does not drain"),
    ("8080/ready", "8000/ready", "no health check of /ready"),
    ("HEALTHCHECK", "ONBUILD HEALTHCHECK", "no health check of /ready"),
    ("EXPOSE 8080", "EXPOSE 8000", "another port than the config's"),
    ('CMD ["/opt/app/serve.sh", "serve_config.yaml"]', "CMD serve.sh", "a shell between the runtime and the app"),
    ("image.licenses", "image.licence", "labels missing"),
    ("COPY container /opt/app", "COPY . /opt/app", "copies more than it names"),
    ("ARG WEIGHTS=", "ARG WEIGHTS=Q8_0", "weights baked in"),
    ("ARG WEIGHTS=", "ARG WEIGHTS=\nARG HF_TOKEN", "a secret that stays in the image"),
]


@pytest.mark.parametrize(("old", "new", "problem"), FAULTS)
def test_a_fault_in_the_dockerfile_is_caught(old: str, new: str, problem: str) -> None:
    assert old in DOCKERFILE
    assert dockerfile_problems(DOCKERFILE.replace(old, new)) == [problem]


def test_each_rule_catches_a_fault() -> None:
    assert {problem for _, _, problem in FAULTS} == set(RULES)


def test_the_dockerfile_keeps_the_rules() -> None:
    assert dockerfile_problems(DOCKERFILE) == []


def ignore_problems(text: str) -> Iterator[str]:
    patterns = [line for line in text.splitlines() if line and not line.startswith("#")]
    if patterns[0] != "*":
        yield "ignores only what it names"
    let_in = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    copied = {
        source
        for i in Parsed(DOCKERFILE).instructions
        if i.keyword == "COPY" and "--from=" not in i.value
        for source in i.value.split()[:-1]
    }
    yield from (f"{name} is not for the image" for name in sorted(let_in - copied))
    yield from (f"{name} is kept from the image" for name in sorted(copied - let_in))
    if "**/__pycache__" not in patterns:
        yield "brings bytecode of another place"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("*\n!benchmarks", "!benchmarks", "ignores only what it names"),
        ("!serve_app\n", "!serve_app\n!.git\n", ".git is not for the image"),
        ("!serve_app\n", "!serve_app\n!.venv\n!out\n!var\n", ".venv is not for the image"),
        ("!LICENSE\n", "", "LICENSE is kept from the image"),
        ("**/__pycache__\n", "", "brings bytecode of another place"),
    ],
)
def test_a_fault_in_what_is_ignored_is_caught(old: str, new: str, problem: str) -> None:
    assert problem in list(ignore_problems(IGNORED.replace(old, new)))


def test_nothing_but_what_the_image_is_made_of_goes_into_the_build() -> None:
    assert list(ignore_problems(IGNORED)) == []


# -- the first process


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH whose `serve` says how it was called, and ends when it is interrupted; `serve broken` ends with 3."""
    serve = tmp_path / "serve"
    serve.write_text(
        """#!/bin/bash
[ "$2" = broken ] && exit 3
trap 'echo interrupted; exit 0' INT
echo "$*, umask $(umask), loopback only: $RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
while :; do sleep 0.05; done
"""
    )
    serve.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts_serve(path: str, by: signal.Signals) -> None:
    # A shell cannot trap what is ignored where it starts, as SIGINT is in a background job.
    command = ["env", "--default-signal=INT", "container/serve.sh", "a.yaml"]
    app = subprocess.Popen(command, env={"PATH": path}, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert app.stdout
        assert app.stdout.readline() == "run a.yaml, umask 0077, loopback only: 0\n"
        app.send_signal(by)
        assert app.communicate(timeout=60) == ("interrupted\n", None)
        assert app.returncode == 0
    finally:
        # What goes on would hold up every other test.
        with suppress(ProcessLookupError):
            os.killpg(app.pid, signal.SIGKILL)


def test_what_serve_ends_with_is_the_containers_status(path: str) -> None:
    assert subprocess.run(["container/serve.sh", "broken"], env={"PATH": path}, check=False).returncode == 3


def test_what_docker_run_serves_is_closed_and_needs_only_tmp() -> None:
    config = load(CONFIG)
    settings = config.settings
    assert (config.host, settings.push.enabled, settings.messages.is_embedded) == ("0.0.0.0", False, True)
    places = [settings.blobs, settings.jobs, str(settings.weights.cache), str(settings.weights.lock)]
    assert all(place.rpartition(":")[2].startswith("/tmp/") for place in places)
    assert settings.public_url == f"http://127.0.0.1:{config.port}"
