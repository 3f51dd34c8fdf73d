"""Spans of OpenTelemetry: where a job's time goes, from its publication to the acknowledgment of its message.

Off, unless Serve traces this process or a standard variable says where its spans go. Off, nothing of OpenTelemetry is
imported here, and every span is the same object, which does nothing. Contexts travel as W3C `traceparent`s.
"""

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from .errors import SettingsError

#: https://opentelemetry.io/docs/specs/otel/protocol/exporter/
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
#: How long `flush` may take, in milliseconds.
FLUSH_MS = 3000

#: OpenTelemetry's TracerProvider and its Tracer; None while this process traces nothing.
_provider: Any = None
_tracer: Any = None

#: The last delivery's `traceparent` by message id, the oldest first.
_deliveries: OrderedDict[str, str] = OrderedDict()
_MOST_DELIVERIES = 10_000

_OFF: AbstractContextManager[None] = nullcontext()


def configure_tracing(service: str) -> None:
    """Trace this process if Serve does so or the environment asks for it; `service` is its name where OTEL_SERVICE_NAME
    gives none. Again: nothing. Raises SettingsError without the packages that it takes."""
    if _tracer is not None:
        return
    sdk, api = sys.modules.get("opentelemetry.sdk.trace"), sys.modules.get("opentelemetry.trace")
    if sdk and api and isinstance(api.get_tracer_provider(), sdk.TracerProvider):
        use(api.get_tracer_provider())
    elif _is_asked_for():
        exporting = processors()
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        name = os.environ.get("OTEL_SERVICE_NAME") or service
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        for processor in exporting:
            provider.add_span_processor(processor)
        trace.set_tracer_provider(provider)
        use(provider)


def processors() -> list[Any]:
    """SpanProcessors by the standard variables: what the `exporter_import_path` of Serve's `tracing_config` names."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise SettingsError("traces need what `pip install flux-fill-serve[traces]` installs") from e
    return [BatchSpanProcessor(OTLPSpanExporter())]


def _is_asked_for() -> bool:
    environment = os.environ
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(environment.get(name) for name in ENDPOINTS)


def use(provider: Any) -> None:
    """Make spans by this TracerProvider; None: no more."""
    global _provider, _tracer
    _deliveries.clear()
    _provider, _tracer = provider, provider and provider.get_tracer("flux-fill-serve")


def flush() -> None:
    """Send what is due, of a process that ends; blocks."""
    if _tracer is not None:
        _provider.force_flush(FLUSH_MS)


def span(
    name: str, parent: str = "", *, kind: Literal["INTERNAL", "PRODUCER", "CONSUMER"] = "INTERNAL"
) -> AbstractContextManager[None]:
    """The block as a span: below `parent`, a `traceparent`, or else below the span around it. What the block raises
    is its error, by its code or its type, never by its words."""
    return _OFF if _tracer is None else _span(name, parent, kind)


def delivery(message_id: str, parent: str) -> AbstractContextManager[None]:
    """The block as one delivery of a message, linked to the last one that came to this process."""
    return _OFF if _tracer is None else _delivery(message_id, parent)


def within(traceparent: str) -> AbstractContextManager[None]:
    """Spans of the block are below the caller's, who sent this; an empty or invalid one is ignored."""
    return _OFF if _tracer is None or not traceparent else _attached(traceparent)


def ended(name: str, began_at: float | None) -> None:
    """A span that began then, in Unix seconds, where that is known, and ends now."""
    if _tracer is not None and began_at is not None:
        now_ns = time.time_ns()
        _tracer.start_span(name, start_time=min(now_ns, int(began_at * 1e9))).end(now_ns)


def attribute(name: str, value: str) -> None:
    """Of the span around it."""
    if _tracer is not None:
        _current().set_attribute(name, value)


def step(step: int, steps: int) -> None:
    """Note a step as an event of the span around it."""
    if _tracer is not None:
        _current().add_event("step", {"step": step, "steps": steps})


def traceparent(default: str) -> str:
    """Of the span around it; `default` outside of any, and where this process traces nothing."""
    if _tracer is None:
        return default
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", default)


def _current(context: Any = None) -> Any:
    from opentelemetry.trace import get_current_span

    return get_current_span(context)


def _context(traceparent: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


@contextmanager
def _attached(traceparent: str) -> Iterator[None]:
    from opentelemetry.context import attach, detach

    token = attach(_context(traceparent))
    try:
        yield
    finally:
        detach(token)


@contextmanager
def _span(name: str, parent: str, kind: str) -> Iterator[None]:
    from opentelemetry.trace import SpanKind, StatusCode, use_span

    made = _tracer.start_span(name, _context(parent) if parent else None, SpanKind[kind])
    with use_span(made, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except BaseException as e:
            # An error's words may say more than a trace is to show.
            made.set_attribute("error.type", str(getattr(e, "code", type(e).__name__)))
            made.set_status(StatusCode.ERROR)
            raise


@contextmanager
def _delivery(message_id: str, parent: str) -> Iterator[None]:
    with span("process", parent, kind="CONSUMER"):
        attribute("messaging.system", "gcp_pubsub")
        attribute("messaging.operation.type", "process")
        attribute("messaging.message.id", message_id)
        if last := _deliveries.pop(message_id, ""):
            _current().add_link(_current(_context(last)).get_span_context())
        _deliveries[message_id] = traceparent("")
        if len(_deliveries) > _MOST_DELIVERIES:
            _deliveries.popitem(last=False)
        yield
