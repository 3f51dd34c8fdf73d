"""cloudbuild.yaml: Google's own schema, and rules of ours, each with faults that it must catch."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from .test_dockerfile import DOCKERFILE, Parsed, is_pinned

CLOUDBUILD = Path("cloudbuild.yaml").read_text()
CHECK_SCHEMA = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", "vendor.cloudbuild"]


def cloudbuild_problems(text: str) -> Iterator[str]:
    build = yaml.safe_load(text)
    steps: list[Mapping[str, Any]] = build["steps"]
    order = [step["id"] for step in steps]
    if order != ["build", "test", "scan", "push"] or any("waitFor" in step for step in steps):
        yield "pushes before all has passed"
    if any("--push" in str(step) or "docker push" in str(step) for step in steps[:-1]) or build.get("images"):
        yield "pushes before all has passed"
    yield from (f"{step['name']} is not pinned" for step in steps if not is_pinned(step["name"]))
    if not all(flag in str(steps[-1]) for flag in ("--sbom=true", "--provenance=mode=max")):
        yield "no bill of materials"
    if "flux-fill-build@$PROJECT_ID." not in build.get("serviceAccount", ""):
        yield "no account of its own"
    if build["options"].get("logging") != "CLOUD_LOGGING_ONLY":
        yield "logs into a bucket that the account has not"
    used = set(re.findall(r"(?<!\$)\$\{?(_\w+)", text))
    if used != set(build["substitutions"]):
        yield "substitutions that are not declared, or not used"
    # Cloud Build takes a single dollar before a name as its own.
    if re.search(r"(?<!\$)\$(?!\$|\(|_[A-Z]|PROJECT_ID\b)", "\n".join(str(step["args"]) for step in steps)):
        yield "a shell's variable with one dollar"
    arguments = [sorted(re.findall(r"--build-arg \"(\w+)", str(step))) for step in (steps[0], steps[-1])]
    if arguments[0] != arguments[1]:
        yield "pushes another image than it tested"
    if unknown := set(arguments[0]) - set(Parsed(DOCKERFILE).arguments):
        yield f"arguments that the Dockerfile lacks: {', '.join(unknown)}"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("- id: scan", "- id: look", "pushes before all has passed"),
        ("buildx build --load", "buildx build --push", "pushes before all has passed"),
        ("tags: [", "images: [$_IMAGE]\ntags: [", "pushes before all has passed"),
        ("google/cloud-sdk:528.0.0", "google/cloud-sdk:latest", "google/cloud-sdk:latest is not pinned"),
        ("--sbom=true ", "", "no bill of materials"),
        ("flux-fill-build@", "flux-fill@", "no account of its own"),
        ("CLOUD_LOGGING_ONLY", "LEGACY", "logs into a bucket that the account has not"),
        ("_TORCH: cuda", "_TORCHES: cuda", "substitutions that are not declared, or not used"),
        ('--load --tag "$_IMAGE"', '--load --build-arg "WEIGHTS=Q8_0"', "pushes another image than it tested"),
        ('"TORCH=', '"TORCHES=', "arguments that the Dockerfile lacks: TORCHES"),
        ("$${image", "${image", "a shell's variable with one dollar"),
    ],
)
def test_a_fault_in_the_build_is_caught(old: str, new: str, problem: str) -> None:
    assert old in CLOUDBUILD
    assert problem in list(cloudbuild_problems(CLOUDBUILD.replace(old, new)))


def test_cloud_build_pushes_what_it_has_tested() -> None:
    assert list(cloudbuild_problems(CLOUDBUILD)) == []


@pytest.mark.parametrize(("old", "new", "status"), [("", "", 0), ("entrypoint:", "entry_point:", 1)])
def test_googles_schema(old: str, new: str, status: int, tmp_path: Path) -> None:
    file = tmp_path / "cloudbuild.yaml"
    file.write_text(CLOUDBUILD.replace(old, new) if old else CLOUDBUILD)
    assert subprocess.run([*CHECK_SCHEMA, str(file)], check=False).returncode == status
