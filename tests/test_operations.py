"""docs/operations.md lists every metric, log action and error code; docs/concerns.md names tests that are there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.telemetry import METRICS

from .test_errors import CLASSES

OPERATIONS = Path("docs/operations.md").read_text()
SOURCES = [path for package in ("serve_app", "deployments", "benchmarks") for path in Path(package).rglob("*.py")]
#: Codes that are no error's own, by where they come from.
OTHER_CODES = {"attempts_exhausted", "superseded", "held_back", "not_found", "method_not_allowed", "http_error"} | {
    "invalid_request",
    "job_died",
    "message_lost",
}


def listed(section: str) -> set[str]:
    """First cells of the section's table."""
    text = OPERATIONS.split(f"## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.M))


def actions() -> Iterator[tuple[Path, ast.expr]]:
    """The value of every `"action"` that a log line is given."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "action":
                        yield path, value


def test_every_metric_is_listed() -> None:
    assert listed("Metrics") == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_listed_with_its_labels(name: str) -> None:
    row = re.search(rf"^\| `{name}` \| (\w+) \| ([^|]*) \|", OPERATIONS, re.M)
    assert row is not None
    assert row[1] == METRICS[name].kind
    assert re.findall(r"`(\w+)`", row[2]) == list(METRICS[name].labels)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_written_somewhere(name: str) -> None:
    users = [path for path in SOURCES if path.name != "telemetry.py" and f'"{name}"' in path.read_text()]
    assert users


def test_every_metric_that_is_written_is_known() -> None:
    written = {name for path in SOURCES for name in re.findall(r'"(fluxfill_[a-z_]+)"', path.read_text())}
    assert written == set(METRICS)


@pytest.mark.slow
def test_every_log_action_is_a_literal_and_listed() -> None:
    values = list(actions())
    assert [path for path, value in values if not isinstance(value, ast.Constant)] == []
    assert listed("Logs") == {value.value for _, value in values if isinstance(value, ast.Constant)}


@pytest.mark.slow
def test_every_log_line_has_an_action() -> None:
    levels = {"debug", "info", "warning", "error", "exception", "critical"}
    bare = [
        f"{path}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.lower() in ("log", "logger")
        and node.func.attr in levels
        and "extra" not in {keyword.arg for keyword in node.keywords}
    ]
    assert bare == []


def test_every_error_code_is_listed() -> None:
    assert listed("Error codes") == {cls.code for cls in CLASSES} | OTHER_CODES


def test_the_codes_that_are_no_errors_own_are_in_the_code() -> None:
    source = "".join(path.read_text() for path in SOURCES)
    assert [code for code in OTHER_CODES if f'"{code}"' not in source] == []


CONCERNS = Path("docs/concerns.md").read_text()


def test_concerns_names_only_tests_that_are_there() -> None:
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", CONCERNS)
    assert len(named) > 30
    missing = [f"{file}::{test}" for file, test in named if not _is_there(Path(file), test)]
    assert missing == []


def _is_there(file: Path, test: str) -> bool:
    return file.exists() and (not test or f"def {test}(" in file.read_text())
