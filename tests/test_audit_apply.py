"""What an audit recommends, in a config file: written where it belongs, and nothing else touched."""

import os
import re
from difflib import unified_diff
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from deployments.cli.audit_apply import Applied, apply, drift
from deployments.config import check, load
from serve_app.errors import AuditError, SettingsError
from serve_app.models import BUILT_IN

REPOSITORY = Path("serve_config.yaml")
SOUND = REPOSITORY.read_text()
USER_CONFIG = """        user_config:
          variant: telea
          steps: 28
          guidance_scale: 30.0
          crop_strategy: auto
"""
DEPLOYMENTS = SOUND[SOUND.index("    deployments:\n") :]


def results(**recommended: Any) -> dict[str, Any]:
    """Of a run, as far as it matters; with more of it, that does not."""
    choice = {"variant": "tiny-Q4_0", "guidance_scale": 4.0, "steps": 20, "reasons": ["x"], "pareto": []}
    return {"run_id": "audit-1", "status": "succeeded", "recommended": {**choice, **recommended}, "cells": []}


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text.encode())
    return path


def applied(folder: Path, text: str, **recommended: Any) -> tuple[Applied, str]:
    path = write(folder, text)
    return apply(results(**recommended), path), path.read_bytes().decode()


def test_the_repository_s_config_gets_three_values_and_keeps_all_else(tmp_path: Path) -> None:
    assert SOUND.endswith(USER_CONFIG)
    found, text = applied(tmp_path, SOUND)
    assert text == SOUND.replace(USER_CONFIG, USER_CONFIG.replace("telea", "tiny-Q4_0").replace("28", "20")).replace(
        "guidance_scale: 30.0", "guidance_scale: 4.0"
    )
    assert found.diff
    before, after = found.before, found.after
    assert (before.variant, before.guidance_scale, before.steps) == ("telea", 30.0, 28)
    assert (after.variant, after.guidance_scale, after.steps) == ("tiny-Q4_0", 4.0, 20)
    assert load(tmp_path / "config.yaml").inference == after


def test_the_difference_and_the_way_to_deploy_are_told(tmp_path: Path) -> None:
    found, _ = applied(tmp_path, SOUND, steps=28)
    lines = found.diff.splitlines()
    assert [line for line in lines if line.startswith(("-  ", "+  "))] == [
        "-          variant: telea",
        "+          variant: tiny-Q4_0",
        "-          guidance_scale: 30.0",
        "+          guidance_scale: 4.0",
    ]
    assert f"serve deploy {tmp_path / 'config.yaml'}" in found.next_step
    assert "serveConfigV2" in found.next_step


def test_steps_that_the_variants_own_override_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILT_IN, "tiny-Q4_0", BUILT_IN["tiny-Q4_0"].model_copy(update={"steps": 8}))
    found, text = applied(tmp_path, SOUND, steps=12)
    assert "tiny-Q4_0 still take 8 steps" in found.next_step
    again, _ = applied(tmp_path, text, steps=12)
    assert not again.diff and "still take 8 steps" in again.next_step
    assert "still take" not in applied(tmp_path, SOUND, steps=8)[0].next_step


def flush(text: str) -> str:
    """Lists that start where their key does."""
    head, apps = text.split("applications:\n")
    app, deployments = dedent(apps).split("  deployments:\n")
    return f"{head}applications:\n{app}  deployments:\n{re.sub('^  ', '', deployments, flags=re.MULTILINE)}"


LAYOUTS = {
    "lists flush": flush(SOUND),
    "four blanks": re.sub("^( *)(- )?", lambda m: m[1] * 2 + ("-   " if m[2] else ""), SOUND, flags=re.MULTILINE),
    "anchors": SOUND.replace("tiny-Q4_0: {", "tiny-Q4_0: &tiny {")
    .replace("tiny-Q5_K_S: {downscale_delay_s: 60}", "tiny-Q5_K_S: *tiny")
    .replace("tiny-Q8_0: {downscale_delay_s: 60}", "tiny-Q8_0: {<<: *tiny, num_cpus: 0.5}"),
    "quotes and a long line": SOUND.replace(
        "crop_strategy: auto", f"crop_strategy: \"auto\"\n          prompt: '{'word ' * 60}'"
    ).replace("host: 127.0.0.1", 'host: "127.0.0.1"   # loopback'),
    "another deployment behind": SOUND + "\n      # The embedded server.\n      - name: PubSub\n",
    "Windows' line ends": SOUND.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("text", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_only_the_lines_that_say_the_three_values_differ(tmp_path: Path, text: str) -> None:
    _, edited = applied(tmp_path, text)
    differing = list(unified_diff(text.splitlines(keepends=True), edited.splitlines(keepends=True), n=0))[3:]
    assert [(line[0], line[1:].strip()) for line in differing] == [
        ("-", "variant: telea"),
        ("-", "steps: 28"),
        ("-", "guidance_scale: 30.0"),
        ("+", "variant: tiny-Q4_0"),
        ("+", "steps: 20"),
        ("+", "guidance_scale: 4.0"),
    ]


def test_lists_indented_in_two_ways_get_one_of_them(tmp_path: Path) -> None:
    text = SOUND.replace(DEPLOYMENTS, "    deployments:\n    - name: PubSub # it\n      num_replicas: 1\n")
    _, edited = applied(tmp_path, text)
    assert check(tmp_path / "config.yaml") == []
    assert not {line.strip() for line in text.splitlines()} - {line.strip() for line in edited.splitlines()}


def test_what_is_added_stands_before_a_comment_on_what_follows(tmp_path: Path) -> None:
    follows = "\n      # The embedded server.\n      - name: PubSub\n"
    _, edited = applied(tmp_path, SOUND.replace("          steps: 28\n", "") + follows)
    assert edited.endswith(f"crop_strategy: auto\n{follows}")
    assert "          steps: 20\n" in edited


ODD = {
    "user_config absent": SOUND.replace(USER_CONFIG, "").replace("        # What", "# What"),
    "user_config empty": SOUND.replace(USER_CONFIG, "        user_config:\n"),
    "user_config in braces": SOUND.replace(
        USER_CONFIG, "        user_config: {prompt: 'a: b', variant: telea, steps: 3} # mine\n"
    ),
    "user_config of nothing": SOUND.replace(USER_CONFIG, "        user_config: {}\n").replace(
        "        telea:", "        Q8_0: {}\n        telea:"
    ),
    "a long prompt last": SOUND.replace("crop_strategy: auto", "prompt: >\n            two\n            lines").replace(
        "          steps: 28\n", ""
    ),
    "quoted": SOUND.replace("variant: telea\n", 'variant:   "telea"   # the fast one\n'),
    "no deployments": SOUND.replace(DEPLOYMENTS, ""),
    "no end of line": SOUND.replace(DEPLOYMENTS, "").rstrip(),
    "another deployment": SOUND.replace(
        DEPLOYMENTS, "    deployments:\n      - name: PubSub # it\n        num_replicas: 1\n"
    ),
    "deployments in brackets": SOUND.replace(DEPLOYMENTS, "    deployments: [{name: PubSub}]\n"),
    "an empty list": SOUND.replace(DEPLOYMENTS, "    deployments: []\n"),
    "Windows' line ends": SOUND.replace("\n", "\r\n"),
    "Windows' line ends, absent": SOUND.replace(DEPLOYMENTS, "").replace("\n", "\r\n"),
    "a key before it": SOUND.replace(
        "      - name: Ingress\n", "      - max_queued_requests: 7\n        name: Ingress\n"
    ),
    "two documents' start": f"---\n{SOUND}",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_odd_files_lose_no_line_stay_sound_and_a_second_time_changes_nothing(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    settings = load(path).settings
    found, edited = apply(results(), path), path.read_bytes().decode()
    assert check(path) == []
    config = load(path)
    inference = config.inference
    assert (inference.variant, inference.guidance_scale, inference.steps) == ("tiny-Q4_0", 4.0, 20)
    assert inference == found.after
    assert config.settings == settings
    changed = ("variant:", "steps:", "guidance_scale:", "user_config:", "deployments:")
    kept = [line for line in text.splitlines() if not line.strip().startswith(changed)]
    assert [line for line in kept if line not in edited.splitlines()] == []
    assert ("\r\n" in edited) == ("\r\n" in text) and edited.count("\r") == edited.count("\r\n")
    again = apply(results(), path)
    assert again.diff == ""
    assert "says this already" in again.next_step
    assert path.read_bytes().decode() == edited


@pytest.mark.parametrize(
    ("variant", "guidance_scale", "steps"),
    [("telea", 0.0, 1), ("tiny-Q8_0", 2.5, 100), ("telea", 30, 28), ("telea", 1e-5, 2)],
)
def test_every_value_comes_back_as_it_was(tmp_path: Path, variant: str, guidance_scale: float, steps: int) -> None:
    applied(tmp_path, SOUND, variant=variant, guidance_scale=guidance_scale, steps=steps)
    inference = load(tmp_path / "config.yaml").inference
    assert (inference.variant, inference.guidance_scale, inference.steps) == (variant, guidance_scale, steps)


def test_a_variant_the_file_does_not_serve_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, SOUND)
    with pytest.raises(SettingsError, match=r"variant Q5_K_S is not served; there are telea, tiny-Q4_0"):
        apply(results(variant="Q5_K_S"), path)
    assert path.read_text() == SOUND


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (SOUND.replace("port: 8000", "prot: 8000"), "http_options.prot: unknown key"),
        ("a: [", "not YAML"),
        ("", "not a mapping"),
    ],
)
def test_an_unsound_file_is_refused_and_stays(tmp_path: Path, text: str, what: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError, match=what):
        apply(results(), path)
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_word_that_others_share_stays_theirs(tmp_path: Path) -> None:
    shared = SOUND.replace("variant: telea", "variant: &v telea").replace("crop_strategy: auto", "prompt: *v")
    found, _ = applied(tmp_path, shared)
    assert (found.after.variant, found.after.prompt) == ("tiny-Q4_0", "telea")
    assert load(tmp_path / "config.yaml").inference == found.after


def test_values_that_others_share_are_refused_and_told_to_be_set_by_hand(tmp_path: Path) -> None:
    shared = SOUND.replace("user_config:", "user_config: &u") + "      - name: PubSub\n        user_config: *u\n"
    path = write(tmp_path, shared)
    with pytest.raises(SettingsError, match=r"user_config cannot be set here.*by hand"):
        apply(results(), path)
    assert path.read_text() == shared


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"recommended": None}, "run audit-1 recommends nothing"),
        ({"status": "running"}, "run audit-1 is running"),
        ({"status": "failed"}, "run audit-1 is failed"),
        ({"status": "canceled"}, "run audit-1 is canceled"),
        ({"status": "done"}, "not an audit's results.json: status"),
        ({"recommended": {"variant": "telea", "guidance_scale": 300.0, "steps": 1}}, "recommended.guidance_scale"),
        ({"recommended": {"variant": "a b", "guidance_scale": 3.0, "steps": 1}}, "recommended.variant"),
        ({"recommended": {"variant": "telea", "guidance_scale": "3", "steps": 1}}, "recommended.guidance_scale"),
    ],
)
def test_results_with_nothing_to_apply_are_refused(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    path = write(tmp_path, SOUND)
    with pytest.raises(AuditError, match=what):
        apply({**results(), **changes}, path)
    assert path.read_text() == SOUND


def test_an_incomplete_run_s_recommendation_is_taken(tmp_path: Path) -> None:
    assert apply({**results(), "status": "incomplete"}, write(tmp_path, SOUND)).diff


def test_a_link_stays_a_link_and_the_mode_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = write(tmp_path / "real", SOUND)
    real.chmod(0o640)
    link = tmp_path / "config.yaml"
    link.symlink_to(real)
    assert apply(results(), link).diff
    assert link.is_symlink()
    assert "tiny-Q4_0" in real.read_text().partition("user_config")[2]
    assert real.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path / "real") == ["config.yaml"]


def test_a_folder_that_takes_no_file_is_told(tmp_path: Path) -> None:
    """Not by its mode, which does not stop root."""
    path = write(tmp_path, SOUND)
    long = tmp_path / ("n" * 250)
    path.rename(long)
    with pytest.raises(SettingsError, match="cannot be written: File name too long"):
        apply(results(), long)
    assert long.read_text() == SOUND


def running(**changes: Any) -> dict[str, Any]:
    """The body of GET /ready of the app that REPOSITORY describes."""
    names = ("telea", "tiny-Q4_0", "tiny-Q5_K_S", "tiny-Q8_0", "tiny-klein")
    states = {name: {"state": "scaled_to_zero", "error": ""} for name in names}
    defaults = {"variant": "telea", "steps": 28, "guidance_scale": 30.0, "crop_strategy": "auto"}
    body = {"ready": True, "default_variant": "telea", "defaults": defaults, "variants": states, "messages": {}}
    return {**body, **changes}


def test_an_app_that_runs_what_the_file_says_has_no_drift() -> None:
    assert drift(load(REPOSITORY), running()) == []


def test_drift_names_what_the_app_has_otherwise() -> None:
    states = {"telea": {"state": "ready"}, "Q8_0": {"state": "ready"}}
    defaults = {"variant": "Q8_0", "steps": 28, "guidance_scale": 10.0, "crop_strategy": "auto"}
    changes = {"variants": states, "defaults": defaults, "defaults_error": "steps: wrong"}
    assert drift(load(REPOSITORY), running(**changes)) == [
        "tiny-Q4_0 is in the file, and not served",
        "tiny-Q5_K_S is in the file, and not served",
        "tiny-Q8_0 is in the file, and not served",
        "tiny-klein is in the file, and not served",
        "Q8_0 is served, and not in the file",
        "variant is telea in the file, and Q8_0 in the app",
        "guidance_scale is 30.0 in the file, and 10.0 in the app",
        "the app refused its last defaults: steps: wrong",
    ]


def test_what_is_not_the_app_is_told() -> None:
    """Another server at its port, or an error in place of the answer."""
    (told,) = drift(load(REPOSITORY), {"code": "internal_error"})
    assert "http://127.0.0.1:8000/ready is not this app" in told
