"""Spans: one trace for each job, nothing where tracing is off, and no word of an error."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path

import httpx
import pytest
import yaml
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from deployments.config import check_text
from serve_app import tracing
from serve_app.errors import OutOfMemory
from serve_app.http.app import create_app
from serve_app.jobs.messages import parse_attributes, traceparent_of
from serve_app.jobs.ports import Delivery

from .http_service import Process
from .rig import SESSION, USER, Rig, delivery
from .test_operations import listed

TRACE_ID, PARENT_ID = "ab" * 16, "cd" * 8
TRACE = f"00-{TRACE_ID}-{PARENT_ID}-01"


class Spans:
    """What was traced so far."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]


@pytest.fixture
def spans() -> Iterator[Spans]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield Spans(exporter)
    tracing.use(None)
    provider.shutdown()


def trace_of(span: ReadableSpan) -> str:
    return f"{span.context.trace_id:032x}"


async def test_an_edit_is_one_trace_of_its_parts(spans: Spans) -> None:
    rig = Rig()
    await rig.put_session()
    made = delivery("m1", attributes={"traceparent": TRACE})
    published = datetime.now(UTC) - timedelta(seconds=7)
    await rig.take(Delivery(data=made.data, attributes=made.attributes, message_id="m1", publish_time=published))
    names = [span.name for span in spans.all]
    assert sorted(names) == sorted(
        ["queue", "fetch", "decode", "prompt", "paint", "wait", "encode", "upload", "process"]
    )
    assert {trace_of(span) for span in spans.all} == {TRACE_ID}
    [process], [paint], [queue] = (spans.named(name) for name in ("process", "paint", "queue"))
    assert (process.kind, f"{process.parent.span_id:016x}") == (SpanKind.CONSUMER, PARENT_ID)
    assert {span.parent.span_id for span in spans.all if span is not process} == {process.context.span_id}
    assert [event.attributes["step"] for event in paint.events] == [0, 1, 2, 3, 4]
    assert 7 <= (queue.end_time - queue.start_time) / 1e9 < 60
    job = await rig.job()
    about = {"fluxfill.job_id": job.id, "fluxfill.variant": "telea", "messaging.message.id": "m1"}
    assert process.attributes.items() >= {**about, "fluxfill.verdict": "ack: succeeded"}.items()
    # What others are told of is the publisher's trace, not a part of ours.
    assert job.traceparent == TRACE


async def test_a_message_that_comes_again_is_linked_to_its_last_delivery(spans: Spans) -> None:
    rig = Rig()
    await rig.put_session()
    rig.jobs.is_down = True
    await rig.take(delivery("m1", attributes={"traceparent": TRACE}))
    rig.jobs.is_down = False
    await rig.take(delivery("m1", attributes={"traceparent": TRACE}))
    await rig.take(delivery("m2", attributes={"traceparent": TRACE}))
    first, second, other = spans.named("process")
    assert [link.context.span_id for link in second.links] == [first.context.span_id]
    assert not first.links and not other.links
    assert first.attributes["fluxfill.verdict"] == "defer: store_unavailable"
    assert {trace_of(span) for span in (first, second)} == {TRACE_ID}


async def test_a_span_that_fails_has_the_errors_code_and_none_of_its_words(spans: Spans) -> None:
    rig = Rig(work_settings={"max_attempts": 1})
    await rig.put_session()
    rig.engine.on_paint = lambda: (_ for _ in ()).throw(OutOfMemory("sesame"))
    await rig.take(delivery("m1", prompt="a neighbour", callbackUrl="https://example.org/hook?token=sesame"))
    [paint] = spans.named("paint")
    assert (paint.status.status_code, paint.attributes["error.type"]) == (StatusCode.ERROR, "out_of_memory")
    told = "".join(span.to_json() for span in spans.all)
    assert "sesame" not in told and "neighbour" not in told


async def test_a_posted_job_is_traced_from_its_caller_and_its_links_are_not(spans: Spans) -> None:
    rig = Rig()
    await rig.put_session()
    app = create_app(lambda: Process(rig))
    body = {"type": "inpaint", "session": {"user_id": USER, "session_id": SESSION}}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as http:
        posted = await http.post("/v1/jobs", json=body, headers={"traceparent": TRACE})
        await http.get("/blobs/good.token")
    assert posted.status_code == 202, posted.text
    [publish] = spans.all
    assert (publish.name, publish.kind, trace_of(publish)) == ("publish", SpanKind.PRODUCER, TRACE_ID)
    await rig.notifier.drained()
    [message] = rig.topics.sessions
    await rig.take(message)
    [process] = spans.named("process")
    assert (trace_of(process), process.parent.span_id) == (TRACE_ID, publish.context.span_id)


async def test_an_unsampled_trace_is_passed_on_and_not_recorded(spans: Spans) -> None:
    rig = Rig()
    await rig.put_session()
    await rig.take(delivery("m1", attributes={"traceparent": f"{TRACE[:-2]}00"}))
    assert (await rig.job()).status == "succeeded"
    assert spans.all == []


@pytest.mark.parametrize(
    ("attributes", "parent"),
    [
        ({"traceparent": TRACE}, TRACE),
        ({"googclient_traceparent": TRACE}, TRACE),
        ({"traceparent": TRACE, "googclient_traceparent": TRACE.replace("ab", "ef")}, TRACE),
        ({"traceparent": "of another form", "googclient_traceparent": TRACE}, TRACE),
        ({"googclient_traceparent": "of another form"}, ""),
        ({}, ""),
    ],
)
def test_the_publishers_own_context_wins_over_its_librarys(attributes: dict[str, str], parent: str) -> None:
    assert traceparent_of(attributes) == parse_attributes(attributes).traceparent == parent


# Off and on


def run(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**clean, **environment}, check=True, capture_output=True, text=True
    ).stdout.strip()


OFF = """
import sys
from serve_app import tracing
tracing.configure_tracing("a")
one = tracing.span("a")
with one, tracing.delivery("m", "") as inside, tracing.within("x"):
    tracing.step(1, 2); tracing.attribute("a", "b"); tracing.ended("a", 1.0); tracing.flush()
print(one is tracing.span("b") is tracing.delivery("m", ""), tracing.traceparent("given"))
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off_imports_nothing_and_makes_nothing(environment: dict[str, str]) -> None:
    assert run(OFF, **environment).splitlines() == ["True given", "[]"]


ON = """
from serve_app import tracing
tracing.configure_tracing("a")
from opentelemetry import trace
print(trace.get_tracer_provider().resource.attributes["service.name"])
with tracing.span("a"):
    print(len(tracing.traceparent("")))
"""


@pytest.mark.parametrize(("environment", "name"), [({}, "a"), ({"OTEL_SERVICE_NAME": "mine"}, "mine")])
def test_an_endpoint_alone_turns_it_on(environment: dict[str, str], name: str) -> None:
    environment |= {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_SAMPLER": "always_off"}
    assert run(ON, **environment).splitlines() == [name, "55"]


SERVES = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from serve_app import tracing
trace.set_tracer_provider(TracerProvider())
tracing.configure_tracing("a")
with tracing.span("a"):
    print(trace.get_current_span().is_recording())
"""


def test_serves_own_provider_is_used() -> None:
    assert run(SERVES) == "True"


# Documents


def test_the_setting_for_serve_is_valid_as_documented() -> None:
    [line] = re.findall(r"^tracing_config: .*$", Path("docs/operations.md").read_text(), re.MULTILINE)
    assert check_text(f"{Path('serve_config.yaml').read_text()}\n{line}\n") == []
    module, _, name = yaml.safe_load(line)["tracing_config"]["exporter_import_path"].partition(":")
    [processor] = getattr(import_module(module), name)()
    processor.shutdown()


def test_every_span_is_listed() -> None:
    code = "".join(path.read_text() for folder in ("serve_app", "deployments") for path in Path(folder).rglob("*.py"))
    assert listed("Traces") == set(re.findall(r"\b(?:span|ended)\(\"(\w+)\"", code))
