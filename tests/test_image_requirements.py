"""requirements/: what the image installs is what the project needs, in constraints.txt's versions, by hash."""

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())
#: Of the project, as in the Makefile's `lock`.
EXTRAS = ("diffusion", "google", "s3", "postgresql", "heif", "traces", "audit")
#: What PyPI's torch needs beyond its CPU build.
CUDA = re.compile(r"(nvidia|cuda)-[a-z0-9-]+|triton")
HASH = f"\\\n    --hash=sha256:{'0' * 64}\n"


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


CONSTRAINTS = pins(Path("constraints.txt").read_text())


def closure(requirements: list[Requirement]) -> set[str]:
    """The names of all that these need, by the installed packages' own words."""
    found: dict[str, set[str]] = {}
    while requirements:
        requirement = requirements.pop()
        name = canonicalize_name(requirement.name)
        new = requirement.extras - found.get(name, set()) if name in found else {"", *requirement.extras}
        found.setdefault(name, set()).update(new)
        for line in (metadata.requires(name) or []) if new else []:
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in new):
                requirements.append(needed)
    return set(found)


def wanted() -> list[Requirement]:
    project = PROJECT["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)]
    return [Requirement(line) for lines in lists for line in lines]


def requirement_problems(name: str, text: str) -> Iterator[str]:
    locked = pins(text)
    if re.search(r"^\s*-[^-]|^\s*--(?!hash=)|://", text, re.MULTILINE):
        yield "names an index, or another option"
    entries = re.split(r"\n(?=\S)", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    yield from (f"{entry.split('=')[0]} without a hash" for entry in entries if "--hash=sha256:" not in entry)
    for package, version in locked.items():
        pinned = CONSTRAINTS.get(package, version)
        if version != (pinned.removesuffix("+cpu") if name == "cuda" else pinned):
            yield f"{package} is {version} here and {pinned} in constraints.txt"
    for requirement in wanted():
        version = locked.get(canonicalize_name(requirement.name), "")
        if not version or not requirement.specifier.contains(version):
            yield f"{requirement} is not met"
    own = {package for package in locked if package not in CONSTRAINTS and CUDA.fullmatch(package)}
    yield from (f"{package} is nothing that the app needs" for package in sorted(set(locked) - own - NEEDED))
    yield from (f"{package} is missing" for package in sorted(NEEDED - set(locked)))
    if (name == "cuda") != {"nvidia-cudnn-cu13", "triton"}.issubset(own):
        yield "another build of torch"


NEEDED = closure(wanted())


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_locked_requirements_are_the_projects(name: str) -> None:
    assert list(requirement_problems(name, Path(f"requirements/{name}.txt").read_text())) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (r"\A", "--index-url https://example.com/simple\n", "names an index, or another option"),
        (r"^httpx==0.28.1 \\\n( +--hash.*\n)+", "httpx==0.28.1\n", "httpx without a hash"),
        (r"^pillow==13.0.0 ", "pillow==13.0.1 ", "pillow is 13.0.1 here and 13.0.0 in constraints.txt"),
        (r"^numpy==2.4.6 \\\n( +--hash.*\n)+", "", "numpy is missing"),
        (r"^numpy==2.4.6 \\\n( +--hash.*\n)+", "", "numpy<3,>=2.4 is not met"),
        (r"^ray==2.60.0 ", "ray==2.59.0 ", "ray[serve]<2.61,>=2.60 is not met"),
        (r"\Z", f"pytest==9.1.1 {HASH}", "pytest is nothing that the app needs"),
        (r"\Z", f"triton==3.7.1 {HASH}nvidia-cudnn-cu13==9.20.0.48 {HASH}", "another build of torch"),
    ],
)
def test_a_fault_in_the_requirements_is_caught(old: str, new: str, problem: str) -> None:
    cpu = Path("requirements/cpu.txt").read_text()
    text, changed = re.subn(old, lambda _: new, cpu, count=1, flags=re.MULTILINE)
    assert changed == 1
    assert problem in list(requirement_problems("cpu", text))


def test_the_build_has_the_same_tools_as_the_project() -> None:
    text = Path("requirements/build.txt").read_text()
    locked = pins(text)
    assert text.count("==") == len(locked) <= text.count("--hash=sha256:")
    for requirement in map(Requirement, PROJECT["dependency-groups"]["image"]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])
    assert {name: version for name, version in locked.items() if CONSTRAINTS.get(name, version) != version} == {}
