"""Prometheus itself scrapes the running app: every series of the rules and the dashboard is there after a demo run."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest
import yaml

from deployments.own_ray import free_port
from scripts import dashboard

from .absent import PROMETHEUS, absent
from .backends import until
from .serving import App
from .test_monitoring import RECORDED, SERIES

pytestmark = [pytest.mark.serve, pytest.mark.timeout(180)]

#: Of faults and prices that a demo run does not have, with their labels: recorded beside it, as a replica or an ingress
#: does.
COUNTERS = {
    "fluxfill_gpu_lost_total": {"variant": "v"},
    "fluxfill_out_of_memory_total": {"variant": "v"},
    "fluxfill_leases_lost_total": {},
    "fluxfill_suspect_edits_total": {"variant": "v"},
    "fluxfill_load_failures_total": {"component": "variant v", "code": "gated_repo"},
    "fluxfill_messages_deferred_total": {"code": "variant_failed"},
    "fluxfill_gpu_seconds_total": {"variant": "v"},
    "fluxfill_cost_total": {"variant": "v"},
    "fluxfill_policy_errors_total": {},
}
#: Of a GPU, too.
GAUGES = {"fluxfill_gpu_memory_bytes": {"variant": "v"}}


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        try:
            return httpx.get(f"{self.url}/api/v1/{path}", params=parameters).json()["data"]
        except httpx.TransportError:
            return {}

    def series(self) -> set[str]:
        return set(self.get("label/__name__/values"))

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.get("rules").get("groups", ()) for rule in group["rules"]]


@pytest.fixture
def prometheus(app: App, tmp_path: Path) -> Iterator[Prometheus]:
    """It has the rules, and scrapes each port of this Ray every second."""
    from ray._private import worker

    if not which("prometheus"):
        absent(PROMETHEUS)
    session = Path(worker._global_node.get_session_dir_path())
    targets = json.loads((session.parent / "prom_metrics_service_discovery.json").read_text())
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(tmp_path / "rules.yaml")],
        "scrape_configs": [{"job_name": "ray", "static_configs": targets}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    rules = yaml.safe_load(dashboard.COMPOSE_RULES.read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()


async def test_every_series_of_the_rules_and_the_dashboard_is_scraped(app: App, prometheus: Prometheus) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def record() -> None:
        import time

        from deployments.metrics import RayMetrics

        for name, labels in COUNTERS.items():
            RayMetrics().add(name, **labels)
        for name, labels in GAUGES.items():
            RayMetrics().put(name, 1, **labels)
        time.sleep(60)

    recording = record.remote()
    jobs = [await app.submit(), await app.submit(variant="nap"), await app.submit(variant="nobody-serves-it")]
    assert [(await app.finished(job)).status for job in jobs] == ["succeeded", "succeeded", "failed"]
    wanted = SERIES - RECORDED
    # Of histograms, _bucket too.
    await until(lambda: wanted <= prometheus.series(), 40)
    ray.cancel(recording, force=True)
    # A rule that cannot be evaluated, because it joins what does not fit, is unhealthy.
    await until(lambda: {rule["health"] for rule in prometheus.rules()} == {"ok"}, 20)
    assert [rule["name"] for rule in prometheus.rules() if rule.get("lastError")] == []
