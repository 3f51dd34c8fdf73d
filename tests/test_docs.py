"""The documents say what is true: settings, defaults, routes, commands, files."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from serve_app import adapters
from serve_app.environment import with_environment
from serve_app.http.app import create_app
from serve_app.jobs import record as records
from serve_app.models import BUILT_IN
from serve_app.renamed import RENAMED
from serve_app.settings import BUCKETS, Inference, Secrets, Settings, VariantSettings

README = Path("README.md").read_text()
ARCHITECTURE = Path("docs/architecture.md").read_text()
CONFIGURATION = Path("docs/configuration.md").read_text()
API = Path("docs/api.md").read_text()
CLIENTS = Path("docs/clients.md").read_text()
CHANGELOG = Path("CHANGELOG.md").read_text()


def rows(document: str) -> dict[str, str]:
    """Key and second cell of each table row."""
    return {key: cell for key, cell in re.findall(r"^\| `([^`]+)` \| ([^|]*?) ?\|", document, re.M)}


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting below `model`, by its path, with its default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= fields(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.get_default(call_default_factory=True)
    return found


def written(default: Any) -> str:
    """A default as the tables write it."""
    if default in (None, ()):
        return "none"
    if isinstance(default, tuple):
        return ", ".join(map(written, default))
    if isinstance(default, dict):
        return ", ".join(default)
    if isinstance(default, float) and default.is_integer():
        return str(int(default))
    return str(default)


SETTINGS = {
    k: v for k, v in fields(Settings).items() if not k.startswith(("text_encoder.", "variants", "windows.buck"))
}


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_is_documented_with_its_default(key: str) -> None:
    assert rows(CONFIGURATION)[key] == written(SETTINGS[key])


VARIANT = fields(VariantSettings)


@pytest.mark.parametrize("key", VARIANT)
def test_every_setting_of_a_variant_is_documented_with_its_default(key: str) -> None:
    assert rows(CONFIGURATION)[key] == written(VARIANT[key])


@pytest.mark.parametrize("key", Inference.model_fields)
def test_every_inference_default_is_documented(key: str) -> None:
    default = Inference.model_fields[key].default
    assert rows(CONFIGURATION)[key].strip("`") in (str(default), written(default))


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_setting_is_in_the_changelog_and_its_new_name_is_one(old: str, new: str) -> None:
    assert f"| `{old}` | `{new}` |" in CHANGELOG
    names = {*SETTINGS, *(f"variants.*.{name}" for name in VARIANT)}
    assert old not in names and any(f"{name}.".startswith(f"{new}.") for name in names)


def test_the_buckets_are_documented() -> None:
    cell = rows(CONFIGURATION)["windows.buckets"]
    named = [tuple(map(int, re.findall(r"\d+", size))) for size in cell.replace("²", "").split(", ")]
    assert {size if len(size) == 2 else size * 2 for size in named} == set(BUCKETS)


def test_every_key_in_the_tables_is_a_setting() -> None:
    known = {*SETTINGS, *VARIANT, *Inference.model_fields}
    others = {"windows.buckets", "text_encoder.…", "variants", "RAY_AUTH_MODE", *SECRETS}
    environment = set(re.findall(r"\bDF_[A-Z_]+\b", with_environment.__doc__ or ""))
    named = {key for key in rows(CONFIGURATION) if ":" not in key}
    assert environment <= named <= known | others | environment


SECRETS = [name.upper() for name in Secrets.model_fields]


@pytest.mark.parametrize("name", SECRETS)
def test_every_secret_is_documented(name: str) -> None:
    assert name in rows(CONFIGURATION)


def test_every_store_is_documented() -> None:
    schemes = {key.partition(":")[0] for key in rows(CONFIGURATION) if ":" in key}
    assert schemes == adapters.BLOB_STORES.keys() | adapters.JOB_STORES.keys()
    assert [
        s
        for s in (*adapters.BLOB_STORES, *adapters.JOB_STORES, *adapters.MESSAGE_SOURCES)
        if f"{s}:" not in (adapters.__doc__ or "")
    ] == []


def test_every_built_in_variant_is_documented() -> None:
    assert [name for name in BUILT_IN if f"`{name}`" not in CONFIGURATION] == []


def test_every_route_is_documented() -> None:
    routes = create_app(lambda: pytest.fail("no route is asked")).openapi()["paths"]
    named = [f"{method.upper()} {path}" for path, methods in routes.items() for method in methods]
    assert len(named) == 52
    assert [route for route in named if f"`{route}`" not in README + ARCHITECTURE + API + CLIENTS] == []


def test_every_module_has_its_line_in_the_layout() -> None:
    layout = re.search(r"## Layout\n\n```\n(.*?)```", ARCHITECTURE, re.S)
    assert layout is not None
    modules = [m for top in ("serve_app", "deployments") for m in Path(top).rglob("*.py") if m.name != "__init__.py"]
    in_groups = ("flux", "weights", "containers")
    missing = [m.name for m in modules if m.parent.name not in in_groups and m.name not in layout[1]]
    missing += [m.parent.name for m in modules if f"{m.parent.name}/" not in layout[1]]
    assert missing == []
    named = re.findall(r"\b[a-z_]+\.py\b", layout[1])
    assert [name for name in named if not any(m.name == name for m in modules)] == []


def test_the_state_diagram_in_the_docs_is_the_codes() -> None:
    """Line by line, but for the remarks beside it. That the code's is true to its table is tests/test_jobs.py's."""
    drawn = [line[4:] for line in (records.__doc__ or "").splitlines() if line.startswith("    ")]
    shown = ARCHITECTURE.split("## Jobs")[1].split("```")[1].strip().splitlines()
    assert len(drawn) == 9
    assert all(line.startswith(code) for line, code in zip(shown, drawn, strict=True))


def test_the_readmes_make_targets_exist() -> None:
    makefile = Path("Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", README + ARCHITECTURE + CONFIGURATION))
    assert {"demo", "test", "run", "check", "bench"} <= targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.M)] == []


def test_links_and_pictures_lead_somewhere() -> None:
    for document in (Path("README.md"), *Path("docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("https://"):
                assert (document.parent / target).exists(), f"{document}: {target}"


def test_no_committed_file_names_a_machine_or_a_registry() -> None:
    hosts = "|".join(["pypi" + r"\.org", "registry" + r"\.npmjs", "deb" + r"\.debian", "/wo" + "rk/", "/ro" + "ot/"])
    found = subprocess.run(["git", "grep", "-nE", hosts], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_the_changelog_knows_this_version() -> None:
    version = re.search(r'^version = "(.+)"', Path("pyproject.toml").read_text(), re.M)
    assert version is not None
    assert f"## {version[1]} " in CHANGELOG


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[\[<>=~!]", one)[0].lower().replace("_", "-") for one in wanted} - {"flux-fill-serve"}
    assert all("<" in one and ">=" in one for one in wanted if not one.startswith("flux-fill-serve"))
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==", Path("constraints.txt").read_text(), re.M)
    assert names - {pin.lower().replace("_", "-") for pin in pins} == set()


def test_defaults_that_other_documents_quote_are_the_codes() -> None:
    """`name` (12): a setting with its default in brackets."""
    quoted = [
        (path.name, key, value)
        for path in Path("docs").glob("*.md")
        for key, value in re.findall(
            r"`((?:work|webhooks|messages|push|limits)\.\w+)` \(([^) ]+)(?: s)?\)", path.read_text()
        )
    ]
    assert quoted
    assert [one for one in quoted if written(SETTINGS[one[1]]) != one[2]] == []


def test_every_field_of_a_job_is_documented() -> None:
    record = ARCHITECTURE.split("**Job** record: `")[1].split("`")[0]
    assert record.split() == list(dict.fromkeys(record.split()))
    assert set(record.split()) == set(records.Job.model_fields)
