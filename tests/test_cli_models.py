"""`fluxfill models` as a user meets it, and the document that quotes it."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from deployments.cli import main, models
from deployments.cli.audit_client import AuditClient
from serve_app import adapters
from serve_app.audit.record import AuditStatus, Recommendation
from serve_app.models import BUILT_IN, TINY
from serve_app.parameters import AuditRequest, Matrix

from .audit_jobs import Driver
from .test_audit_cli import painted
from .test_cli import settings_in, write_config

DOCUMENT = Path("docs/models.md").read_text()


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """The lines that the command leaves on a terminal of 120 columns."""
    monkeypatch.setattr(models.out, "width", 120)
    monkeypatch.setattr(sys, "argv", ["fluxfill", "models", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    screen = capsys.readouterr()
    assert not ended.value.code, screen.err
    return [line.rstrip() for line in screen.out.splitlines()]


def row(lines: list[str], name: str) -> str:
    (found,) = (line for line in lines if line.startswith(f"{name} "))
    return found


def test_every_known_model_is_listed_those_served_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    lines = said(monkeypatch, capsys, "-c", config)
    listed = [line.split()[0] for line in lines[1:-4]]
    served = list(settings_in(config).served)
    assert listed[: len(served)] == served and set(listed) == {*served, *BUILT_IN}
    assert [name for name in listed if row(lines, name).split()[1] == "*"] == served
    assert "±25%" in lines[-1]


def test_a_served_variant_costs_what_its_optimizations_and_its_steps_make_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"family": "flux-fill", "file": "/models/own-Q8_0.gguf", "base": "/models/base", "steps": 14}
    lines = said(
        monkeypatch,
        capsys,
        "-c",
        write_config(tmp_path, variants={"telea": {}, "Q8_0": {}, "own": {"definition": own}}),
    )
    assert re.search(r"FLUX.1 \[dev\] Non-Commercial +28 +8.8 +14.9 [|] 45.0 ", row(lines, "Q8_0"))
    assert re.search(r"own \* +unknown +14 +- +7.5 [|] 22.7 ", row(lines, "own"))
    assert re.search(r"telea \* +- +- +- +- [|] +- ", row(lines, "telea"))


async def test_an_audit_that_painted_a_variant_has_judged_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    settings = settings_in(config)
    store, blobs = AuditClient(settings).store, adapters.blob_store(settings.blobs)
    request = AuditRequest(user_id="u", session_id="s", matrix=Matrix(variants=("tiny-Q4_0", "tiny-Q8_0")))
    for run in ("whole", "going-on"):
        driver = Driver(store, blobs, await store.create(request, run, several=True))
        await driver.begin()
        await painted(driver)
        if run == "whole":
            best = Recommendation(variant="tiny-Q8_0", guidance_scale=4.0, steps=28, reasons=(), pareto=())
            await driver.note(recommended=best)
            await driver.finish(AuditStatus.SUCCEEDED)
    lines = await asyncio.to_thread(said, monkeypatch, capsys, "-c", config)
    assert row(lines, "tiny-Q4_0").endswith(" whole") and row(lines, "tiny-Q8_0").endswith(" whole: recommended")
    assert row(lines, "tiny-Q5_K_S").endswith(" no") and row(lines, "tiny-sdxl").endswith(" -")


def test_without_a_config_nothing_is_served_and_audits_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = said(monkeypatch, capsys)
    assert [line.split()[0] for line in lines[1:-4]] == list(BUILT_IN)
    assert row(lines, "Q8_0").endswith(" unknown") and "*" not in "".join(lines[:-4])


def test_a_store_that_cannot_be_read_leaves_audits_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    lines = said(monkeypatch, capsys, "-c", write_config(tmp_path, jobs=f"sqlite:{tmp_path}/file/jobs.db"))
    assert row(lines, "tiny-Q4_0").endswith(" unknown")


def test_what_has_real_weights_says_its_licence_and_its_memory() -> None:
    real = {name: row for name, row in BUILT_IN.items() if row.file and not row.file.startswith(TINY)}
    assert real and not [name for name, row in real.items() if not row.licence or not row.memory_gib]
    assert not [name for name, row in BUILT_IN.items() if name not in real and row.licence]


def test_the_document_quotes_what_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(monkeypatch, capsys, "-c", write_config(tmp_path))
    assert "\n".join(lines) in DOCUMENT
