"""Writes what follows from k8s/monitoring/rules.yaml and from the panels below: `python scripts/dashboard.py`.

k8s/monitoring/dashboard.json is Grafana's; compose/rules.yaml are the rules for a Prometheus without its operator.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

RULES = Path("k8s/monitoring/rules.yaml")
DASHBOARD = Path("k8s/monitoring/dashboard.json")
COMPOSE_RULES = Path("compose/rules.yaml")


class Panel(NamedTuple):
    title: str
    #: An alert: the panel links to its section of the runbook.
    alert: str
    unit: str
    #: Queries, by their legends. N stands for the matcher of the namespace, V for that and the variant's.
    queries: dict[str, str]


def _quantile(share: float, metric: str, matchers: str = "V") -> str:
    return f"histogram_quantile({share}, sum by (variant, le) (rate({metric}_bucket{{{matchers}}}[10m])))"


def _mean(metric: str, by: str) -> str:
    """Of the processes that run: each starts once, and rate() does not see what a series begins with."""
    return f"sum by ({by}) ({metric}_sum{{N}}) / sum by ({by}) ({metric}_count{{N}})"


def _of_replicas(metric: str) -> str:
    return f'sum by (deployment) ({metric}{{N, deployment=~"Inpainter-.*|Generator-.*"}})'


TOTAL = 'V, stage="total"'
COST = "sum by (variant) (sum_over_time(namespace_variant:fluxfill_cost:new1m{V}[1h]))"
DONE = 'sum by (variant) (sum_over_time(namespace_variant_outcome:fluxfill_jobs:new1m{V, outcome="succeeded"}[1h]))'
SUSPECT = "sum by (variant) (sum_over_time(namespace_variant:fluxfill_suspect_edits:new1m{V}[1h]))"
HEAD = '{N, IsHeadNode="true"}'
# fmt: off
ROWS: dict[str, list[Panel]] = {
    "Service level": [
        Panel("Jobs that fail by the service's fault (1 % is allowed)", "FluxFillErrorsFast", "percentunit", {
            f"in {window}": f"namespace:fluxfill_failures:ratio{window}{{N}}" for window in ("1h", "1d", "3d")}),
        Panel("Jobs that ended, a minute", "FluxFillNoProgress", "short", {
            "{{outcome}}": "sum by (outcome) (namespace_variant_outcome:fluxfill_jobs:new1m{V})"}),
        Panel("Dead letters, a minute", "FluxFillDeadLetters", "short", {
            "{{code}}": "sum by (code) (namespace_code:fluxfill_dead_letters:new1m{N}) > 0"}),
        Panel("Failed attempts, a second", "FluxFillErrorsSlow", "short", {
            "{{code}}": "sum by (code) (rate(ray_fluxfill_attempts_failed_total{V}[10m])) > 0"}),
        Panel("Edits that leave the object in, over an hour", "FluxFillSuspectEdits", "percentunit", {
            "{{variant}}": f"{SUSPECT} / {DONE}"}),
        Panel("From claim to result", "FluxFillQueueAge", "s", {
            "median, {{variant}}": _quantile(0.5, "ray_fluxfill_stage_seconds", TOTAL),
            "p95, {{variant}}": _quantile(0.95, "ray_fluxfill_stage_seconds", TOTAL)}),
        Panel("Where the time goes: seconds in a stage, a second", "FluxFillQueueAge", "short", {
            "{{stage}}": 'sum by (stage) (rate(ray_fluxfill_stage_seconds_sum{V, stage!="total"}[10m]))'}),
    ],
    "Queue": [
        Panel("Messages", "FluxFillNoProgress", "short", {
            "in the subscription": "max by (namespace) (ray_fluxfill_backlog_messages{N})",
            "in flight": "sum by (namespace) (ray_fluxfill_messages_in_flight{N})"}),
        Panel("Age", "FluxFillQueueAge", "s", {
            "oldest message": "max by (namespace) (ray_fluxfill_backlog_oldest_age_seconds{N})",
            "p95 at the claim, {{variant}}": _quantile(0.95, "ray_fluxfill_queue_wait_seconds")}),
        Panel("Deferred, a second", "FluxFillQueueAge", "short", {
            "{{code}}": "sum by (code) (rate(ray_fluxfill_messages_deferred_total{N}[10m]))"}),
        Panel("The backlog's reading", "FluxFillBacklogUntrusted", "s", {
            "age": "min by (namespace) (ray_fluxfill_backlog_reading_age_seconds{N})",
            "trusted (1)": "max by (namespace) (ray_fluxfill_backlog_trusted{N})"}),
        Panel("Errors of the autoscaling policy, a minute", "FluxFillPolicyErrors", "short", {
            "errors": "sum(namespace:fluxfill_policy_errors:new1m{N})"}),
        Panel("Ingresses connected", "FluxFillSubscriptionDisconnected", "short", {
            "{{subscription}}": "sum by (subscription) (ray_fluxfill_subscription_connected{N})"}),
        Panel("Ingresses that report", "FluxFillAbsent", "short", {
            "ingresses": "count(count by (replica) (ray_fluxfill_subscription_connected{N}))"}),
        Panel("An end is untold for", "FluxFillOutboxOverdue", "s", {
            "oldest": "max by (namespace) (ray_fluxfill_notifications_overdue_seconds{N})"}),
        Panel("Leases lost, a minute", "FluxFillLeasesLost", "short", {
            "leases": "sum(namespace:fluxfill_leases_lost:new1m{N})"}),
    ],
    "GPUs": [
        Panel("Replicas", "FluxFillPendingGpuPods", "short", {
            "up, {{deployment}}": _of_replicas("ray_serve_deployment_replica_healthy"),
            "wanted, {{deployment}}": _of_replicas("ray_serve_autoscaling_target_replicas")}),
        Panel("Nodes", "FluxFillPendingGpuPods", "short", {
            "up, {{NodeType}}": "sum by (NodeType) (autoscaler_active_nodes{N})",
            "coming, {{NodeType}}": "sum by (NodeType) (autoscaler_pending_nodes{N})"}),
        Panel("GPU memory", "FluxFillGpuMemory", "bytes", {
            "{{variant}}": "max by (variant) (ray_fluxfill_gpu_memory_bytes{V})"}),
        Panel("Out of memory, and lost, a minute", "FluxFillGpuLost", "short", {
            "out of memory, {{variant}}": "sum by (variant) (namespace_variant:fluxfill_out_of_memory:new1m{V})",
            "lost, {{variant}}": "sum by (variant) (namespace_variant:fluxfill_gpu_lost:new1m{V})"}),
        Panel("Denoising steps a second, median", "FluxFillQueueAge", "short", {
            "{{variant}}": _quantile(0.5, "ray_fluxfill_steps_per_second")}),
        Panel("The head's memory", "FluxFillHeadMemory", "percentunit", {
            "used": f"max by (namespace) (ray_node_mem_used{HEAD} / ray_node_mem_total{HEAD})"}),
    ],
    "Cost": [
        Panel("Cost of an edit over an hour", "FluxFillIdleGpus", "short", {
            "{{variant}}": f"{COST} / {DONE}"}),
        Panel("Engines that paint", "FluxFillIdleGpus", "short", {
            "{{variant}}": "sum by (variant) (namespace_variant:fluxfill_gpu_seconds:new1m{V}) / 60"}),
    ],
    "Cold starts": [
        Panel("Parts of a load, mean", "FluxFillLoadFailure", "s", {
            "{{component}}, {{part}}": _mean("ray_fluxfill_load_seconds", "component, part")}),
        Panel("Start of a replica, mean", "FluxFillPendingGpuPods", "ms", {
            "{{deployment}}": _mean("ray_serve_replica_startup_latency_ms", "deployment")}),
        Panel("Failed loads, a minute", "FluxFillLoadFailure", "short", {
            "{{component}}": "sum by (component) (namespace_component:fluxfill_load_failures:new1m{N})"}),
    ],
}
# fmt: on


def expression(query: str) -> str:
    """With the dashboard's variables. `All` matches a missing label, too: a machine on its own has no namespace."""
    namespace = 'namespace=~"$namespace"'
    return query.replace("{V", f'{{{namespace}, variant=~"$variant"').replace("{N", f"{{{namespace}")


def dashboard(runbooks: dict[str, str]) -> dict[str, Any]:
    """In Grafana's form; `runbooks` by alert."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in ROWS.items():
        panels.append({"type": "row", "title": row, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        for number, panel in enumerate(members):
            panels.append(
                {
                    "type": "timeseries",
                    "title": panel.title,
                    "datasource": source,
                    "gridPos": {"x": number % 3 * 8, "y": y + 1 + number // 3 * 8, "w": 8, "h": 8},
                    "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                    "links": [{"title": f"Runbook: {panel.alert}", "url": runbooks[panel.alert], "targetBlank": True}],
                    "targets": [
                        {"refId": chr(ord("A") + i), "expr": expression(query), "legendFormat": legend}
                        for i, (legend, query) in enumerate(panel.queries.items())
                    ],
                }
            )
        y += 1 + -(-len(members) // 3) * 8
    shared = {"type": "query", "datasource": source, "refresh": 2, "multi": True, "includeAll": True, "allValue": ".*"}
    variables = [
        {
            **shared,
            "name": name,
            "query": f"label_values(ray_fluxfill_variant_ready, {name})",
            "current": {"text": "All", "value": "$__all"},
        }
        for name in ("namespace", "variant")
    ]
    return {
        "uid": "flux-fill-serve",
        "title": "flux-fill-serve",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [{"type": "datasource", "name": "datasource", "query": "prometheus"}, *variables]},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


def written() -> dict[Path, str]:
    """The text of each file: a panel or a rule a line, so that a change is seen."""
    spec = yaml.safe_load(RULES.read_text())["spec"]
    rules = [rule for group in spec["groups"] for rule in group["rules"]]
    runbooks = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in rules if "alert" in rule}
    whole = dashboard(runbooks)
    panels = ",\n".join(json.dumps(panel) for panel in whole.pop("panels"))
    lines = [f"# Of {RULES}, by scripts/dashboard.py.", "groups:"]
    for group in spec["groups"]:
        lines += [f"- name: {group['name']}", f"  interval: {group['interval']}"]
        lines += ["  rules:", *(f"  - {json.dumps(rule)}" for rule in group["rules"])]
    return {
        DASHBOARD: f'{json.dumps(whole)[:-1]}, "panels": [\n{panels}\n]}}\n',
        COMPOSE_RULES: "\n".join(lines) + "\n",
    }


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)
