"""The app's autoscaling policy, which Ray's controller calls about ten times a second.

The controller must not wait and must not fail here: an exception would stop the scaling of every app.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

from deployments.metrics import RayMetrics
from serve_app.jobs.backlog import Reading, Replicas, Report, together, wanted
from serve_app.telemetry import configure_logging

log = logging.getLogger(__name__)

T = TypeVar("T")
#: Ray's DeploymentID, which is not in its public API.
Key = Any

INGRESS = "Ingress"
#: How often an ingress reports, in seconds.
REPORT_S = 1.0
#: An older report says nothing, in seconds.
REPORT_VALID_S = 30.0
#: The parts of a report that are by deployment; each of their numbers is named `part:deployment`.
_PARTS = ("held", "mix", "job_s")
_NUMBERS = ("empty_s", "target_drain_s", "trust_s", "quiet_s")
#: Of a report without a reading.
_NEVER = -1.0


def stats(report: Report) -> dict[str, float]:
    """`report` in the form in which Ray carries it to the controller; always the same names."""
    reading = report.reading or Reading(messages=0.0, oldest_age_s=0.0, taken_at=_NEVER)
    by_name = {f"{part}:{name}": n for part in _PARTS for name, n in getattr(report, part).items()}
    return {
        **by_name,
        **{name: getattr(report, name) for name in _NUMBERS},
        "messages": reading.messages,
        "oldest_age_s": reading.oldest_age_s,
        "taken_at": reading.taken_at,
    }


class Policy:
    """Ray's application-level policy: `autoscaling_policy: {policy_function: deployments.scaling:Policy}`.

    Deployments that ingresses send no jobs to follow Serve's own policy, and so do all where this one fails.
    """

    def __init__(self) -> None:
        configure_logging()
        self._metrics = RayMetrics()
        self._last_error = ""

    def __call__(
        self, contexts: Mapping[Key, AutoscalingContext]
    ) -> tuple[dict[Key, float], dict[Key, dict[str, Any]]]:
        report = self._or_none(lambda: together(list(_reports(contexts))))
        decisions = {key: self._or_none(partial(_decided, ctx, report)) for key, ctx in contexts.items()}
        plain = {key: replica_queue_length_autoscaling_policy(ctx)[0] for key, ctx in contexts.items()}
        return {key: plain[key] if number is None else number for key, number in decisions.items()}, {}

    def _or_none(self, decide: Callable[[], T]) -> T | None:
        try:
            return decide()
        except Exception as e:
            if self._last_error != (error := repr(e)):
                log.exception("The autoscaling policy failed; Serve's own decides", extra={"action": "policy_failed"})
            self._last_error = error
            self._metrics.add("fluxfill_policy_errors_total")
            return None


def _decided(ctx: AutoscalingContext, report: Report | None) -> float | None:
    """None where Serve's own policy decides."""
    if report is not None and ctx.deployment_name not in report.held:
        return None
    if ctx.deployment_name == INGRESS:
        return None
    replicas = Replicas(
        name=ctx.deployment_name,
        running=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        min=ctx.capacity_adjusted_min_replicas,
        max=ctx.capacity_adjusted_max_replicas,
        requests=ctx.total_num_requests,
        target_ongoing=ctx.config.get_target_ongoing_requests(),
        plain=replica_queue_length_autoscaling_policy(ctx)[0],
    )
    number = wanted(replicas, report, time.time())
    if not replicas.running:
        # With requests in a handle Ray would start one replica, and ask again when that one runs; it does not go below
        # this number, though. A test fails where a new Ray does.
        ctx.target_num_replicas = max(ctx.target_num_replicas, number)
    return number


def _reports(contexts: Mapping[Key, AutoscalingContext]) -> Iterator[Report]:
    """Of each ingress replica, the latest, where it is not too old."""
    for ctx in contexts.values():
        if ctx.deployment_name == INGRESS:
            series = ctx.raw_metrics or {}
            for replica in series.get("empty_s", {}):
                latest = {
                    name: by_replica[replica][-1] for name, by_replica in series.items() if by_replica.get(replica)
                }
                if time.time() - latest["empty_s"].timestamp <= REPORT_VALID_S:
                    yield _report({name: point.value for name, point in latest.items()})


def _report(numbers: Mapping[str, float]) -> Report:
    parts: dict[str, Any] = {part: {} for part in _PARTS}
    for name, number in numbers.items():
        part, _, deployment = name.partition(":")
        if deployment:
            parts[part][deployment] = number
    own: dict[str, Any] = {name: numbers[name] for name in _NUMBERS}
    reading = Reading(**{name: numbers[name] for name in ("messages", "oldest_age_s", "taken_at")})
    return Report(reading=None if reading.taken_at == _NEVER else reading, **parts, **own)
