"""Logs and metrics of this service. A log line is JSON: a sentence, its action and its context."""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, Protocol

#: The packages whose modules log; each module's logger bears its name.
PACKAGES = ("serve_app", "deployments", "benchmarks")

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_CONTEXT: ContextVar[Mapping[str, Any]] = ContextVar("log_context", default=MappingProxyType({}))


@contextmanager
def logged_with(**fields: Any) -> Iterator[None]:
    """Add `fields` to every log line of this task and of the tasks it starts; empty ones are left out."""
    token = _CONTEXT.set({**_CONTEXT.get(), **{name: value for name, value in fields.items() if value}})
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def trace_ids(traceparent: str) -> Mapping[str, str]:
    """The fields `trace_id` and `span_id` of a W3C `traceparent`; none where it is empty."""
    if not traceparent:
        return {}
    _, trace_id, span_id, _ = traceparent.split("-")
    return {"trace_id": trace_id, "span_id": span_id}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, the context, then the fields of `extra`.

    `time`, `severity`, `message` and the fields with Google's name are those that Cloud Logging reads:
    https://cloud.google.com/logging/docs/structured-logging#structured_logging_special_fields
    """

    def __init__(self) -> None:
        super().__init__()
        project = os.environ.get("GOOGLE_CLOUD_PROJECT")
        self._traces = f"projects/{project}/traces/" if project else ""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "severity": record.levelname,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_CONTEXT.get(),
        }
        # Ray puts fields of its own on every record, under private names.
        line |= {k: v for k, v in vars(record).items() if k not in _PLAIN and not k.startswith("_")}
        if trace_id := line.get("trace_id"):
            line["logging.googleapis.com/trace"] = f"{self._traces}{trace_id}"
            line["logging.googleapis.com/spanId"] = line["span_id"]
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: int = logging.INFO) -> None:
    """Send this service's log lines to standard error as JSON. Calling it again changes nothing."""
    for package in PACKAGES:
        top = logging.getLogger(package)
        if not top.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(JsonFormatter())
            top.addHandler(handler)
            top.setLevel(level)
    # When imported, it warns of each CUDA library that a machine without a GPU cannot load.
    logging.getLogger("torchao").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Metric:
    kind: Literal["counter", "gauge", "histogram"]
    what: str
    labels: tuple[str, ...] = ()
    #: Upper bounds of a histogram's buckets.
    buckets: tuple[float, ...] = ()


_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 600)

#: Every metric, by name. docs/operations.md lists them; a test compares.
METRICS: Mapping[str, Metric] = {
    "fluxfill_jobs_total": Metric("counter", "jobs that ended, by outcome", ("type", "variant", "outcome")),
    "fluxfill_stage_seconds": Metric("histogram", "duration of a job's stage", ("stage", "variant"), _SECONDS),
    "fluxfill_queue_wait_seconds": Metric(
        "histogram", "time from a message's publication to its job's claim", ("variant",), _SECONDS
    ),
    "fluxfill_job_attempts": Metric("histogram", "attempts that a job took", ("variant",), (1, 2, 3, 4, 5, 10)),
    "fluxfill_attempts_failed_total": Metric("counter", "attempts that failed, by error code", ("variant", "code")),
    "fluxfill_put_back": Metric(
        "histogram",
        "how much of what was to be removed an edit has put back; 1 is all",
        ("variant",),
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    ),
    "fluxfill_suspect_edits_total": Metric("counter", "edits that put back what was to be removed", ("variant",)),
    "fluxfill_duplicate_messages_total": Metric("counter", "messages of jobs that had ended already"),
    "fluxfill_dead_letters_total": Metric(
        "counter", "messages sent to the dead-letter topic, by error code", ("code",)
    ),
    "fluxfill_messages_deferred_total": Metric("counter", "messages deferred, by error code", ("code",)),
    "fluxfill_messages_in_flight": Metric("gauge", "messages in flight in an ingress replica", ("subscription",)),
    "fluxfill_subscription_connected": Metric("gauge", "1 while a subscription delivers", ("subscription",)),
    "fluxfill_backlog_messages": Metric("gauge", "messages in the subscriptions, by the latest reading"),
    "fluxfill_backlog_oldest_age_seconds": Metric("gauge", "age of the oldest message, by the latest reading"),
    "fluxfill_backlog_reading_age_seconds": Metric("gauge", "age of the latest reading of the backlog"),
    "fluxfill_backlog_trusted": Metric(
        "gauge", "1 while a recent reading, or pulls that bring nothing, say how many messages wait"
    ),
    "fluxfill_policy_errors_total": Metric("counter", "failures of the autoscaling policy; Serve's own then decides"),
    "fluxfill_leases_lost_total": Metric("counter", "leases that a worker lost while its job ran"),
    "fluxfill_notifications_total": Metric(
        "counter", "notifications of finished jobs, and messages published again", ("kind", "outcome")
    ),
    "fluxfill_notifications_overdue_seconds": Metric(
        "gauge", "time since the first job ended whose session document or completion message is due"
    ),
    "fluxfill_pushes_refused_total": Metric("counter", "pushes refused, by error code", ("code",)),
    "fluxfill_variant_ready": Metric("gauge", "1 while a variant can serve", ("variant",)),
    "fluxfill_load_failures_total": Metric("counter", "failures to load a model", ("component", "code")),
    "fluxfill_load_seconds": Metric("histogram", "duration of a part of a load", ("component", "part"), _SECONDS),
    "fluxfill_gpu_memory_bytes": Metric("gauge", "memory used on a replica's device", ("variant",)),
    "fluxfill_steps_per_second": Metric(
        "histogram", "denoising steps per second", ("variant",), (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
    ),
    "fluxfill_gpu_seconds_total": Metric("counter", "seconds that engines painted for jobs", ("variant",)),
    "fluxfill_cost_total": Metric("counter", "cost of those seconds, at the configured price", ("variant",)),
    "fluxfill_out_of_memory_total": Metric("counter", "paintings that ran out of memory", ("variant",)),
    "fluxfill_gpu_lost_total": Metric("counter", "GPUs that failed for good", ("variant",)),
}


class Metrics(Protocol):
    """Records metrics. `name` is one of METRICS, and `labels` are exactly its labels."""

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add `amount` to a counter."""

    def put(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge to `value`."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add `value` to a histogram."""


class NoMetrics:
    """Metrics of a process that is not monitored, such as the command line's."""

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None: ...

    def put(self, name: str, value: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...
