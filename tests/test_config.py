"""`fluxfill check`: what is wrong in a config, and where."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import check, load
from serve_app.errors import SettingsError
from serve_app.renamed import RENAMED

SOUND = Path("serve_config.yaml").read_text()


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_the_config_in_the_repository_is_sound() -> None:
    config = load(Path("serve_config.yaml"))
    assert config.inference.variant == "telea"
    assert set(config.settings.variants) == {"telea", "tiny-Q4_0", "tiny-Q5_K_S", "tiny-Q8_0", "tiny-klein"}
    assert config.url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("blobs: files", "blob: files", "applications.0.args.blob", "unknown key"),
        ("max_replicas: 2", "max_replica: 2", "applications.0.args.variants.telea.max_replica", "unknown key"),
        ("max_replicas: 2", "max_replicas: 0", "applications.0.args.variants.telea.max_replicas", "greater than"),
        ("tiny-Q8_0:", "huge-Q8_0:", "applications.0.args", "huge-Q8_0: not built in"),
        ("route_prefix: /", "route_prefx: /", "applications.0.route_prefx", "unknown key"),
        ("{policy_function:", "{policy:", "applications.0.autoscaling_policy.policy", "unknown key"),
        ("scaling:Policy", "scaling:Polic", "applications.0.autoscaling_policy.policy_function", "is not deploy"),
        ("port: 8000", "prot: 8000", "http_options.prot", "unknown key"),
        ("http_options:", "grpc_options: {grpc_servicer_functions: [a.b]}\nhttp_options:", "grpc_options", "open to"),
        ("steps: 28", "steps: 0", "applications.0.deployments.0.user_config.steps", "greater than"),
        ("variant: telea", "variant: Q4_0", "applications.0.deployments.0.user_config.variant", "not served"),
        ("- name: Ingress", "- name: Ingres", "applications.0.deployments.0.name", "not one of this app's"),
        ("deployments.app:build", "deployments.app:biuld", "applications", "exactly one application"),
        ("proxy_location: HeadOnly", "proxy_location: Anywhere", "proxy_location", "EveryNode"),
        (
            "        url: embedded",
            "        nodes: 2\n        url: embedded",
            "applications.0.args.messages.nodes",
            "unknown",
        ),
        ("      blobs: files", "      nodes: 2\n      blobs: files", "applications.0.args", "one machine only"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, old: str, new: str, where: str, what: str) -> None:
    assert old in SOUND
    text = SOUND.replace(old, new, 1)
    problems = check(write(tmp_path, text))
    found = [p for p in problems if ".".join(map(str, p.where)) == where]
    assert found, [str(p) for p in problems]
    assert any(what in p.what for p in found), [p.what for p in found]
    line = text.splitlines()[found[0].line - 1]
    assert str(found[0].where[-1]) in line or isinstance(found[0].where[-1], int), (found[0], line)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("    args:", "    arg:", "variants: Field required"),
        ("max_replicas: 2", "max_replicas: 2, max_replicas: 3", "max_replicas appears twice"),
        ("blobs: files:var/blobs", "blobs: 'files:'", "has no path"),
        ("jobs: sqlite:var/jobs.db", "jobs: memory:x", "every replica is a process of its own"),
        (
            "jobs: sqlite:var/jobs.db",
            "jobs: sqlite:x\n      sessions: firebase:b",
            "the scheme 'firebase' is not one",
        ),
        ("url: embedded://127.0.0.1:8085", "url: 'pubsub:'", "push.audience"),
        ("topic: session-completed", "topic: session-processing", "must differ"),
        ("port: 8000", "port: 8085", "port 8085 is already the HTTP port"),
        ("  host: 127.0.0.1\n", "", "without it Serve listens on every address"),
        ("public_url: http://127.0.0.1:8000", "public_url: https://app.example.org", "push.audience"),
        ("tiny-Q8_0:", "'tiny Q8_0!':", "should match pattern"),
    ],
)
def test_what_would_fail_later_is_found(tmp_path: Path, old: str, new: str, what: str) -> None:
    assert old in SOUND
    found = [str(problem) for problem in check(write(tmp_path, SOUND.replace(old, new, 1)))]
    assert any(what in problem for problem in found), found


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_setting_is_refused_with_its_new_name(tmp_path: Path, old: str, new: str) -> None:
    raw = yaml.safe_load(SOUND)
    settings, keys = raw["applications"][0]["args"], old.replace("*", "telea").split(".")
    for key in keys[:-1]:
        settings = settings.setdefault(key, {})
    settings[keys[-1]] = 1
    text = yaml.safe_dump(raw)
    (problem,) = check(write(tmp_path, text))
    assert (problem.where, problem.what) == (("applications", 0, "args", *keys), f"renamed to {new}")
    assert f"{keys[-1]}: 1" in text.splitlines()[problem.line - 1]


@pytest.mark.parametrize("args", ["args: {}", "args: []", "args: null"])
def test_an_app_without_settings_is_said_to_be_one(tmp_path: Path, args: str) -> None:
    start, end = SOUND.index("    args:"), SOUND.index("    deployments:")
    assert check(write(tmp_path, f"{SOUND[:start]}    {args}\n{SOUND[end:]}"))


def test_a_file_that_is_not_text_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    (problem,) = check(tmp_path / "config.yaml")
    assert "not UTF-8" in str(problem)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "a: b: c"])
def test_what_is_no_config_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    assert check(write(tmp_path, text))


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    (problem,) = check(tmp_path / "nowhere.yaml")
    assert "cannot be read" in str(problem)


def test_loading_a_wrong_config_tells_every_problem(tmp_path: Path) -> None:
    raw: dict[str, Any] = yaml.safe_load(SOUND)
    raw["applications"][0]["args"] |= {"typo": 1, "nodes": 0}
    with pytest.raises(SettingsError) as e:
        load(write(tmp_path, yaml.safe_dump(raw)))
    assert "typo: unknown key" in e.value.message
    assert "nodes" in e.value.message


#: What one machine with its own broker has written, so that strangers reach it.
EXPOSED: dict[str, dict[str, Any]] = {
    "every address": {},
    "a public URL": {"args": {"public_url": "https://app.example.org"}},
    "a proxy on every node": {"proxy_location": "EveryNode"},
    "S3 and PostgreSQL": {"args": {"blobs": "s3://bucket", "jobs": "postgresql://u@db/jobs"}},
    "Firebase and Firestore": {"args": {"blobs": "firebase:bucket", "jobs": "firestore:project"}},
    "a broker elsewhere": {"args": {"messages": {"url": "pubsub://broker:8085"}}},
    "no http_options": {"http_options": None},
    "a port alone": {"http_options": {"port": 8000}},
    "IPv6": {"http_options": {"host": "::"}},
    "an address": {"http_options": {"host": "10.0.0.7"}},
    "a name": {"http_options": {"host": "app.example.org"}},
    "nothing": {"http_options": {"host": ""}},
}


def exposed(kind: str) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load(SOUND)
    changes = {"http_options": {"host": "0.0.0.0", "port": 8000}, **EXPOSED[kind]}
    raw["applications"][0]["args"] |= changes.pop("args", {})
    return {name: value for name, value in {**raw, **changes}.items() if value is not None}


@pytest.mark.parametrize("kind", EXPOSED)
def test_an_app_that_strangers_reach_is_in_production(tmp_path: Path, kind: str) -> None:
    raw = exposed(kind)
    problems = [str(problem) for problem in check(write(tmp_path, yaml.safe_dump(raw)))]
    assert any("http_options.host" in problem or "push.audience" in problem for problem in problems), problems
    raw["applications"][0]["args"]["push"] = {"enabled": False}
    if raw.get("http_options", {}).get("host"):
        assert check(write(tmp_path, yaml.safe_dump(raw))) == []
    else:
        assert "is required" in str(check(write(tmp_path, yaml.safe_dump(raw)))[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_pushes_may_be_open(tmp_path: Path, host: str) -> None:
    assert check(write(tmp_path, SOUND.replace("host: 127.0.0.1", f"host: '{host}'"))) == []
