"""The autoscaling policy in the hands of Ray's own controller code, without a cluster."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import AutoscalingStateManager
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    HandleMetricReport,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.util.metrics import Metric

from deployments.config import POLICY
from deployments.scaling import stats
from serve_app.jobs import backlog
from serve_app.jobs.backlog import Reading, Report

APP, PAINTER, ENCODER, INGRESS = "fluxfill", "Inpainter-Q8_0", "TextEncoder-FLUX", "Ingress"


class Controller:
    """Ray's autoscaling of one app: what it is told, and what it decides."""

    def __init__(self) -> None:
        self._states = AutoscalingStateManager()
        self._states.register_application(APP, AutoscalingPolicy(policy_function=POLICY))
        self.targets = {self.id(PAINTER): 0, self.id(ENCODER): 0, self.id(INGRESS): 1}
        self._register(PAINTER, min_replicas=0, max_replicas=8, target_ongoing_requests=1, downscale_delay_s=0)
        self._register(ENCODER, min_replicas=0, max_replicas=2, target_ongoing_requests=1)
        self._register(INGRESS, min_replicas=1, max_replicas=1)
        self._runs(INGRESS, 1)

    @staticmethod
    def id(name: str) -> DeploymentID:
        return DeploymentID(name=name, app_name=APP)

    def _register(self, name: str, **scaling: Any) -> None:
        config = DeploymentConfig(autoscaling_config=AutoscalingConfig(**scaling))
        info = DeploymentInfo(config, replica_config=None, start_time_ms=0, deployer_job_id="")
        self._states.register_deployment(self.id(name), info, self.targets[self.id(name)])

    def _runs(self, name: str, count: int) -> None:
        replicas = [ReplicaID(unique_id=f"{name}-{i}", deployment_id=self.id(name)) for i in range(count)]
        self._states.update_running_replica_ids(self.id(name), replicas)

    def painters(self, count: int) -> None:
        self._runs(PAINTER, count)
        self.targets[self.id(PAINTER)] = count

    def queued(self, name: str, requests: int) -> None:
        """Requests wait in a handle."""
        report = HandleMetricReport(
            deployment_id=self.id(name),
            handle_id=name,
            actor_id="",
            handle_source=DeploymentHandleSource.UNKNOWN,
            queued_requests=[TimeStampedValue(time.time(), requests)],
            metrics={},
            timestamp=time.time(),
        )
        self._states.record_request_metrics_for_handle(report)

    def told(self, numbers: Mapping[str, float], *, s_ago: float = 0.0) -> None:
        """The ingress's report arrives."""
        at = time.time() - s_ago
        series = {name: [TimeStampedValue(at, value)] for name, value in numbers.items()}
        replica = ReplicaID(unique_id=f"{INGRESS}-0", deployment_id=self.id(INGRESS))
        self._states.record_request_metrics_for_replica(ReplicaMetricReport(replica, series, at))

    def decides(self) -> dict[str, int]:
        decided = self._states.get_decision_num_replicas(APP, self.targets)
        return {one.name: count for one, count in decided.items()}


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each time the policy's counter is raised."""
    seen: list[str] = []
    record = Metric._record

    def watched(self: Any, value: float, tags: dict[str, str]) -> None:
        if self.info["name"] == "fluxfill_policy_errors_total":
            seen.append(self.info["name"])
        record(self, value, tags)

    monkeypatch.setattr(Metric, "_record", watched)
    return seen


def report(messages: float | None, *, held: float = 0.0, s_ago: float = 0.0, empty_s: float = 0.0) -> dict[str, float]:
    taken = time.time() - s_ago
    return stats(
        Report(
            reading=None if messages is None else Reading(messages=messages, oldest_age_s=0.0, taken_at=taken),
            empty_s=empty_s,
            held={PAINTER: held},
            mix={PAINTER: 1.0},
            job_s={PAINTER: 30.0},
            target_drain_s=300.0,
            trust_s=300.0,
            quiet_s=10.0,
        )
    )


def test_without_a_report_serves_own_policy_decides(controller: Controller, errors: list[str]) -> None:
    assert controller.decides() == {PAINTER: 0, ENCODER: 0, INGRESS: 1}
    controller.queued(PAINTER, 1)
    assert controller.decides()[PAINTER] == 1
    assert errors == []


@pytest.mark.parametrize("in_handles", [0, 1])
def test_a_backlog_wakes_all_replicas_in_one_step_also_with_a_request_in_a_handle(
    controller: Controller, in_handles: int
) -> None:
    """Ray by itself would start one, and not ask again until that one runs. Where this fails with a new Ray, see
    `_get_cold_start_scale_up_replicas` in ray.serve.autoscaling_policy, and `_decided`."""
    controller.queued(PAINTER, in_handles)
    controller.told(report(200))
    assert controller.decides() == {PAINTER: 8, ENCODER: 0, INGRESS: 1}


@pytest.mark.parametrize(
    "late",
    [{"messages": 0, "s_ago": 120}, {"messages": None}, {"messages": 0}],
    ids=["late", "absent", "wrong"],
)
def test_messages_in_flight_wake_all_replicas_whatever_the_reading_says(
    controller: Controller, late: dict[str, Any]
) -> None:
    controller.queued(PAINTER, 1)
    controller.told(report(**late, held=18))
    assert controller.decides()[PAINTER] == 8


def test_one_replica_that_starts_does_not_hold_up_the_others(controller: Controller) -> None:
    controller.queued(PAINTER, 1)
    assert controller.decides()[PAINTER] == 1
    controller.targets[controller.id(PAINTER)] = 1
    controller.told(report(200))
    assert controller.decides()[PAINTER] == 8


@pytest.mark.parametrize(
    ("messages", "empty_s", "least"),
    [(0, 0, 0), (None, 60, 0), (900, 60, 0), (None, 0, 1)],
    ids=["empty", "pulls bring nothing", "the reading is late", "nothing is known"],
)
def test_the_last_replica_stops_where_no_message_waits(
    controller: Controller, messages: float | None, empty_s: float, least: int
) -> None:
    controller.painters(1)
    controller.told(report(messages, empty_s=empty_s))
    assert controller.decides()[PAINTER] == least


def test_an_old_report_says_nothing(controller: Controller) -> None:
    controller.told(report(200), s_ago=31)
    assert controller.decides()[PAINTER] == 0
    controller.painters(1)
    assert controller.decides()[PAINTER] == 1


def broken_decision(monkeypatch: pytest.MonkeyPatch, controller: Controller) -> None:
    monkeypatch.setattr(backlog, "_for_jobs", lambda *_: 1 / 0)
    controller.told(report(200))


def broken_report(monkeypatch: pytest.MonkeyPatch, controller: Controller) -> None:
    controller.told({"empty_s": 0.0})


@pytest.mark.parametrize("breaks", [broken_decision, broken_report])
def test_a_policy_that_fails_leaves_the_decision_to_serves_own_and_raises_a_counter(
    controller: Controller,
    errors: list[str],
    monkeypatch: pytest.MonkeyPatch,
    breaks: Callable[[pytest.MonkeyPatch, Controller], None],
) -> None:
    breaks(monkeypatch, controller)
    controller.queued(ENCODER, 1)
    controller.queued(PAINTER, 1)
    assert controller.decides() == {PAINTER: 1, ENCODER: 1, INGRESS: 1}
    assert errors
