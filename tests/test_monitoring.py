"""The alerts: each fires when it should and only then, and has its section of the runbook. The dashboard."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from deployments.cli.main import app as fluxfill
from scripts import dashboard
from serve_app.errors import InputError
from serve_app.telemetry import METRICS

from .absent import PROMETHEUS, absent
from .test_errors import CLASSES

SPEC = yaml.safe_load(dashboard.RULES.read_text())["spec"]
RULES = [rule for group in SPEC["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
PANELS = [panel for row in dashboard.ROWS.values() for panel in row]
QUERIES = [rule["expr"] for rule in RULES] + [query for panel in PANELS for query in panel.queries.values()]
RUNBOOK = Path("docs/runbook.md").read_text()
#: Series in rules and panels: Ray's, ours, and those that rules record.
SERIES = {name for query in QUERIES for name in re.findall(r"\b(?:ray_|autoscaler_)\w+|\b\w*:fluxfill_\w+:\w+", query)}


def promtool(*arguments: str) -> None:
    if not shutil.which("promtool"):
        absent(PROMETHEUS)
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- alerts


class Case(NamedTuple):
    """Series at one sample a minute, in promtool's notation, and the minute in which the alert is looked at."""

    at: int
    fires: dict[str, str]
    is_quiet: dict[str, str]


def ours(name: str, **labels: str) -> str:
    return series(f"ray_fluxfill_{name}", **labels)


def series(name: str, **labels: str) -> str:
    pairs = [f'{key}="{value}"' for key, value in {"namespace": "n", **labels}.items()]
    return f"{name}{{{', '.join(pairs)}}}"


def both(name: str, values: str, other: str | None = None, **labels: str) -> dict[str, str]:
    """What the two clusters of an upgrade report."""
    return {
        series(name, ray_io_cluster="old", **labels): values,
        series(name, ray_io_cluster="new", **labels): other or values,
    }


SUCCEEDED, FAILED = ours("jobs_total", outcome="succeeded"), ours("jobs_total", outcome="failed")
DONE_BY_V = ours("jobs_total", outcome="succeeded", variant="v")
CONNECTED, PENDING_NODES = "ray_fluxfill_subscription_connected", "autoscaler_pending_nodes"
TIMEOUTS = ours("dead_letters_total", code="inference_timeout")
#: A failure in 21 jobs, and one in 201.
SOME = {TIMEOUTS: "0+1x90", FAILED: "0+1x90", SUCCEEDED: "0+20x90"}
FEW = {**SOME, SUCCEEDED: "0+200x90"}


def counted(name: str, at: int, **labels: str) -> Case:
    """A counter whose first sample is a failure, after which its process ends; and one that stood there before."""
    return Case(at, {ours(name, **labels): "_x10 1x2 stale"}, {ours(name, **labels): "7x60"})


def head(used: str, **labels: str) -> dict[str, str]:
    node = {"IsHeadNode": "true"}
    return both("ray_node_mem_used", used, **node) | both("ray_node_mem_total", "10x40", **node)


CASES: dict[str, Case] = {
    "FluxFillAbsent": Case(15, {"up": "0x30"}, {series(CONNECTED, subscription="s"): "0x30"}),
    "FluxFillSubscriptionDisconnected": Case(
        10, both(CONNECTED, "0x30", subscription="s"), both(CONNECTED, "0x30", "1x30", subscription="s")
    ),
    "FluxFillNoProgress": Case(
        40,
        {ours("messages_in_flight", subscription="s"): "2x60", SUCCEEDED: "5x60"},
        {ours("messages_in_flight", subscription="s"): "2x60", SUCCEEDED: " ".join(str(n // 4) for n in range(60))},
    ),
    "FluxFillQueueAge": Case(
        10,
        both("ray_fluxfill_backlog_oldest_age_seconds", "1000x30"),
        both("ray_fluxfill_backlog_oldest_age_seconds", "800x30"),
    ),
    "FluxFillDeadLetters": Case(
        15,
        {ours("dead_letters_total", code="gpu_lost"): "_x10 1x20"},
        {ours("dead_letters_total", code="invalid_image"): "0+1x30", TIMEOUTS: "4x30"},
    ),
    "FluxFillErrorsFast": Case(60, {**SOME, SUCCEEDED: "0+3x90"}, SOME),
    "FluxFillErrorsSlow": Case(60, SOME, FEW),
    "FluxFillSuspectEdits": Case(
        60,
        {ours("suspect_edits_total", variant="v"): "0+1x90", DONE_BY_V: "0+3x90"},
        {ours("suspect_edits_total", variant="v"): "0+1x90", DONE_BY_V: "0+9x90"},
    ),
    "FluxFillLoadFailure": Case(
        15,
        {ours("load_failures_total", component="variant v", code="gated_repo"): "_x5 1x20"},
        {ours("load_failures_total", component="variant v", code="gated_repo"): "7x20"},
    ),
    "FluxFillGpuLost": counted("gpu_lost_total", 30, variant="v"),
    "FluxFillGpuMemory": counted("out_of_memory_total", 20, variant="v"),
    "FluxFillLeasesLost": counted("leases_lost_total", 20),
    "FluxFillOutboxOverdue": Case(
        20,
        {ours("notifications_overdue_seconds"): " ".join("0" if n % 2 else str(60 * n) for n in range(30))},
        both("ray_fluxfill_notifications_overdue_seconds", "200x30"),
    ),
    "FluxFillBacklogUntrusted": Case(
        20, both("ray_fluxfill_backlog_trusted", "0x30"), both("ray_fluxfill_backlog_trusted", "0x30", "1x30")
    ),
    "FluxFillPolicyErrors": counted("policy_errors_total", 20),
    "FluxFillPendingGpuPods": Case(
        20,
        both(PENDING_NODES, "2x30", NodeType="l4-spot"),
        {series(PENDING_NODES, NodeType="cpu"): "2x30", series(PENDING_NODES, NodeType="l4"): "2x8 0x30"},
    ),
    "FluxFillIdleGpus": Case(
        150,
        {series("autoscaler_active_nodes", NodeType="l4"): "1x200", SUCCEEDED: "5x200"},
        {series("autoscaler_active_nodes", NodeType="l4"): "1x200", SUCCEEDED: "5x100 6x100"},
    ),
    "FluxFillHeadMemory": Case(20, head("9x40"), head("5x40")),
}


def test_each_alert_has_its_cases() -> None:
    assert CASES.keys() == ALERTS.keys()


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_once_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    case = CASES[alert]
    rules = tmp_path / "rules.yaml"
    rules.write_text(dashboard.written()[dashboard.COMPOSE_RULES])

    def unit(values: dict[str, str], alerts: list[dict[str, Any]]) -> dict[str, Any]:
        query = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": value} for name, value in values.items()],
            "promql_expr_test": [{"expr": query, "eval_time": f"{case.at}m", "exp_samples": alerts}],
        }

    tests = [unit(case.fires, [{"labels": "{}", "value": 1}]), unit(case.is_quiet, [])]
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "30s", "tests": tests}))
    promtool("test", "rules", str(path))


def test_the_two_clusters_of_an_upgrade_are_counted_each_once(tmp_path: Path) -> None:
    counts = both("ray_fluxfill_jobs_total", "0+1x30", "_x10 1+2x20", outcome="succeeded")
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in counts.items()],
        "promql_expr_test": [
            {
                "expr": "sum_over_time(namespace:fluxfill_jobs:new1m[30m])",
                "eval_time": "20m",
                "exp_samples": [{"labels": '{namespace="n"}', "value": 20 + 1 + 2 * 10}],
            }
        ],
    }
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(dashboard.COMPOSE_RULES.resolve())], "tests": [test]}))
    promtool("test", "rules", str(path))


def test_promtool_accepts_the_rules_and_composes_configuration(tmp_path: Path) -> None:
    promtool("check", "rules", str(dashboard.COMPOSE_RULES))
    config = yaml.safe_load(Path("compose/prometheus.yaml").read_text())
    config["rule_files"] = [str(dashboard.COMPOSE_RULES.resolve())]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    promtool("check", "config", str(tmp_path / "prometheus.yaml"))


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS)
def test_an_alert_says_how_bad_it_is_what_happened_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"].keys() == {"severity"}
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}


def test_the_codes_that_are_no_failure_of_the_service_are_the_publishers() -> None:
    (rule,) = [rule["expr"] for rule in RULES if rule.get("record") == "namespace:fluxfill_failures:new1m"]
    found = re.search(r'code!~"([^"]+)"', rule)
    assert found is not None
    of_the_message = {cls.code for cls in CLASSES if issubclass(cls, InputError)}
    assert set(found[1].split("|")) == of_the_message | {
        "unknown_model",
        "blob_not_found",
        "blob_too_large",
        "unsafe_path",
    }


# -- the runbook


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOK, re.M) == list(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_a_link_leads_to_the_alerts_section_which_says_what_to_do(alert: str) -> None:
    page, _, anchor = ALERTS[alert]["annotations"]["runbook_url"].partition("#")
    assert page.endswith("/docs/runbook.md")
    assert anchor == alert.lower(), "as Markdown makes an anchor of a heading of one word"
    section = RUNBOOK.split(f"## {alert}\n")[1].split("\n## ")[0]
    parts = [section.find(part) for part in ("*It means*", "*Look at*", "*Do*")]
    assert -1 not in parts and parts == sorted(parts)


def test_the_runbooks_commands_exist() -> None:
    runner = CliRunner()
    named = set(re.findall(r"fluxfill ((?:[a-z]+ )*[a-z]+)", " ".join(re.findall(r"`+[^`]+`+", RUNBOOK))))
    assert {"jobs show", "deadletters list", "deadletters replay"} <= named
    assert [words for words in named if runner.invoke(fluxfill, [*words.split(), "--help"]).exit_code] == []
    for script, command in re.findall(r"(scripts/\w+\.sh) (\w+)", RUNBOOK):
        assert re.search(rf"^#   {Path(script).name} {command}\b", Path(script).read_text(), re.M), command


def test_the_runbook_names_metrics_and_settings_that_there_are() -> None:
    named = set(re.findall(r"`(?:ray_)?(fluxfill_[a-z_]+)`", RUNBOOK))
    assert named and named <= METRICS.keys()
    configuration = Path("docs/configuration.md").read_text()
    settings = set(re.findall(r"`((?:work|messages|windows|limits|weights)\.\w+)`", RUNBOOK))
    assert settings and [name for name in settings if f"`{name}`" not in configuration] == []


# -- the dashboard


def test_the_files_are_what_the_generator_writes() -> None:
    stale = [path for path, text in dashboard.written().items() if path.read_text() != text]
    assert stale == [], "python scripts/dashboard.py"


@pytest.mark.parametrize("name", sorted(SERIES))
def test_a_series_is_recorded_or_measured(name: str) -> None:
    """That Prometheus gets Ray's and ours is in tests/test_scrape.py."""
    ours = {f"ray_{metric}{end}" for metric in METRICS for end in ("", "_sum", "_count", "_bucket")}
    assert name in RECORDED | ours or name.startswith(("ray_serve_", "ray_node_", "autoscaler_"))


def test_every_recorded_series_is_used() -> None:
    assert [name for name in RECORDED if not any(name in query for query in QUERIES)] == []


def test_grafana_and_prometheus_load_the_files_in_compose() -> None:
    services = yaml.safe_load(Path("compose.yaml").read_text())["services"]
    mounts = {
        name: dict(volume.split(":")[:2] for volume in services[name]["volumes"]) for name in ("grafana", "prometheus")
    }
    config = yaml.safe_load(Path("compose/prometheus.yaml").read_text())
    assert config["rule_files"] == [mounts["prometheus"][f"./{dashboard.COMPOSE_RULES}"]]
    (provider,) = yaml.safe_load(Path("compose/grafana/dashboards.yaml").read_text())["providers"]
    assert Path(mounts["grafana"][f"./{dashboard.DASHBOARD}"]).parent == Path(provider["options"]["path"])


def test_the_gpu_groups_of_the_overlays_are_watched() -> None:
    pattern = re.search(r'autoscaler_pending_nodes{NodeType=~"([^"]+)"}', ALERTS["FluxFillPendingGpuPods"]["expr"])
    assert pattern is not None
    files = [*Path("k8s/base").glob("rayservice.yaml"), *Path("k8s/overlays").rglob("rayservice.yaml")]
    groups = {
        name for file in files for name in re.findall(r"(?:groupName: |groupName, value: )([\w-]+)", file.read_text())
    }
    assert {name for name in groups if re.fullmatch(pattern[1], name)} == groups - {"cpu"}
