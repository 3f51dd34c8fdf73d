"""Metrics through Ray: each node's agent exports them to Prometheus, with `ray_` before their names."""

from functools import cache
from typing import Any

from ray.serve import metrics

from serve_app.telemetry import METRICS


class RayMetrics:
    """Metrics of this process, tagged with its deployment, replica and application where it is a replica.

    Every method raises ValueError for a name that METRICS lacks or lists with another kind, and for labels other than
    the metric's. Without a cluster nothing is recorded.
    """

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """`amount` must be more than 0."""
        _checked(name, "counter", labels).inc(amount, tags=labels)

    def put(self, name: str, value: float, **labels: str) -> None:
        _checked(name, "gauge", labels).set(value, tags=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        _checked(name, "histogram", labels).observe(value, tags=labels)


def _checked(name: str, kind: str, labels: dict[str, str]) -> Any:
    """The instrument. Ray itself would silently drop unknown labels."""
    metric = METRICS.get(name)
    if metric is None or metric.kind != kind:
        raise ValueError(f"there is no {kind} {name}")
    if set(labels) != set(metric.labels):
        raise ValueError(f"{name} has the labels {list(metric.labels)}, not {list(labels)}")
    return _instrument(name)


@cache
def _instrument(name: str) -> Any:
    """Created when first used: only then does the process know which replica it is."""
    metric = METRICS[name]
    if metric.kind == "counter":
        return metrics.Counter(name, metric.what, metric.labels)
    if metric.kind == "gauge":
        return metrics.Gauge(name, metric.what, metric.labels)
    return metrics.Histogram(name, metric.what, list(metric.buckets), metric.labels)
