"""Metrics through Ray. That Prometheus gets them is in tests/test_gpu_faults.py, with a Ray that runs."""

from typing import Any

import pytest
from ray.util.metrics import Metric

from deployments.metrics import RayMetrics, _instrument
from serve_app.telemetry import METRICS


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """What Ray's instruments were given."""
    seen: list[tuple[str, float, dict[str, str]]] = []
    record = Metric._record

    def watched(self: Any, value: float, tags: dict[str, str]) -> None:
        seen.append((self.info["name"], value, tags))
        record(self, value, tags)

    monkeypatch.setattr(Metric, "_record", watched)
    return seen


def test_every_metric_is_recorded_without_a_cluster(recorded: list[tuple[str, float, dict[str, str]]]) -> None:
    metrics = RayMetrics()
    record: dict[str, Any] = {"counter": metrics.add, "gauge": metrics.put, "histogram": metrics.observe}
    expected = []
    for name, metric in METRICS.items():
        labels = dict.fromkeys(metric.labels, "x")
        record[metric.kind](name, 1.5, **labels)
        expected.append((name, 1.5, labels))
    assert recorded == expected


@pytest.mark.parametrize("name", METRICS)
def test_an_instrument_is_made_once_as_the_table_says(name: str) -> None:
    metric, info = METRICS[name], _instrument(name).info
    assert _instrument(name) is _instrument(name)
    assert (info["description"], info["tag_keys"]) == (metric.what, metric.labels)
    assert tuple(info.get("boundaries", ())) == metric.buckets


@pytest.mark.parametrize(
    ("name", "labels", "reason"),
    [
        ("fluxfill_lost_total", {}, "there is no counter fluxfill_lost_total"),
        ("fluxfill_variant_ready", {"variant": "v"}, "there is no counter fluxfill_variant_ready"),
        ("fluxfill_gpu_lost_total", {}, r"has the labels \['variant'\], not \[\]"),
        ("fluxfill_gpu_lost_total", {"variant": "v", "node": "n"}, r"not \['variant', 'node'\]"),
    ],
)
def test_what_the_table_lacks_is_refused(name: str, labels: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RayMetrics().add(name, **labels)
