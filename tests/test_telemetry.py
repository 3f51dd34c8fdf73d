"""Log lines: JSON, with the ids that tie them together, and none of what must not be in a log."""

import base64
import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from serve_app.errors import OutOfMemory
from serve_app.http.app import create_app
from serve_app.jobs.ports import Delivery
from serve_app.telemetry import METRICS, JsonFormatter, logged_with, trace_ids

from .http_service import LINKS, Process, long
from .rig import SESSION, USER, Rig, delivery

TRACE = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What the service logs meanwhile, as it is written."""
    written: list[str] = []

    class Writer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    def one(line: str) -> dict[str, Any]:
        assert "\n" not in line
        fields: dict[str, Any] = json.loads(line)
        return fields

    handler, top = Writer(), logging.getLogger("serve_app")
    handler.setFormatter(JsonFormatter())
    top.addHandler(handler)
    before = top.level
    top.setLevel(logging.DEBUG)
    yield lambda: [one(line) for line in written]
    top.removeHandler(handler)
    top.setLevel(before)


async def test_every_line_of_an_edit_carries_its_ids(lines: Callable[[], list[dict[str, Any]]]) -> None:
    rig = Rig(work_settings={"max_attempts": 1})
    await rig.put_session()
    rig.engine.on_paint = lambda: (_ for _ in ()).throw(OutOfMemory("full"))
    made = delivery("m7", attributes={"traceparent": TRACE}, callbackUrl="https://example.org/hook")
    await rig.take(Delivery(data=made.data, attributes=made.attributes, message_id="m7", publish_time=rig.clock()))
    job = await rig.job()
    ids = {"job_id": job.id, "lock_key": f"{USER}/{SESSION}", "trace_id": "ab" * 16, "span_id": "cd" * 8}
    written = lines()
    assert {"claimed", "attempt_failed", "dead_lettered", "ended"} <= {line["action"] for line in written}
    for line in written:
        assert {**ids, "message_id": "m7"}.items() <= line.items(), line


async def test_what_a_courier_says_later_carries_the_jobs_ids(lines: Callable[[], list[dict[str, Any]]]) -> None:
    rig = Rig()
    await rig.put_session()
    rig.mirror.is_down = True
    await rig.take(delivery(attributes={"traceparent": TRACE}))
    before = len(lines())
    rig.clock.advance(60)
    await rig.notifier.send_due()
    await rig.notifier.drained()
    [line] = lines()[before:]
    assert (line["action"], line["job_id"], line["trace_id"]) == (
        "notification_failed",
        (await rig.job()).id,
        "ab" * 16,
    )


async def test_no_prompt_and_no_url_of_a_receiver_is_logged(lines: Callable[[], list[dict[str, Any]]]) -> None:
    rig = Rig()
    await rig.put_session()
    rig.receivers.is_down = True
    await rig.work(prompt="my neighbour's cat", callbackUrl="https://example.org/hook?token=hunter2")
    assert lines()
    assert not any(word in json.dumps(lines()) for word in ("neighbour", "hunter2"))


def test_context_ends_with_its_block_and_empty_fields_are_left_out(
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    log = logging.getLogger("serve_app.test")
    with logged_with(job_id="j", trace_id=""), logged_with(message_id="m"):
        log.info("inside")
    log.info("outside")
    inside, outside = lines()
    assert (inside["job_id"], inside["message_id"], "trace_id" in inside) == ("j", "m", False)
    assert "job_id" not in outside


@pytest.mark.parametrize(("project", "trace"), [(None, "ab" * 16), ("shop", f"projects/shop/traces/{'ab' * 16}")])
def test_cloud_logging_finds_severity_time_and_trace(
    monkeypatch: pytest.MonkeyPatch, project: str | None, trace: str
) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    if project:
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", project)
    record = logging.LogRecord("serve_app.test", logging.WARNING, __file__, 1, "two\nlines of %s", ("it",), None)
    with logged_with(**trace_ids(TRACE)):
        text = JsonFormatter().format(record)
    line = json.loads(text)
    assert "\n" not in text
    assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
    google = {"logging.googleapis.com/trace": trace, "logging.googleapis.com/spanId": "cd" * 8}
    assert line.items() >= {"severity": "WARNING", "message": "two\nlines of it", **google}.items()


def test_a_line_outside_a_trace_names_none() -> None:
    record = logging.LogRecord("serve_app.test", logging.INFO, __file__, 1, "said", None, None)
    with logged_with(**trace_ids("")):
        line = json.loads(JsonFormatter().format(record))
    assert not any("trace" in name or "span" in name.lower() for name in line)


async def test_no_key_and_no_signed_link_of_a_request_is_logged(lines: Callable[[], list[dict[str, Any]]]) -> None:
    rig = Rig(work_settings={"max_attempts": 1})
    await rig.put_session()
    process = Process(rig)
    key, wrong, signed = long("right"), long("wrong"), "X-Goog-Signature=5ec2e7"
    process.guard(api_keys=f"{key}:admin")
    transport = httpx.ASGITransport(create_app(lambda: process), raise_app_exceptions=False)
    edit = {"userId": USER, "sessionId": SESSION, "callbackUrl": f"https://example.net/hook?{signed}"}
    push = {"message": {"data": base64.b64encode(json.dumps(edit).encode()).decode(), "messageId": "7"}}
    by_link = {
        "type": "inpaint",
        "image": f"https://example.org/photo?{signed}",
        "mask": f"https://example.org/m?{signed}",
    }
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
        for sent in (key, wrong):
            headers = {"X-API-Key": sent}
            for path in (*(f"/blobs/{token}" for token in LINKS), "/blobs/broken.token", "/v1/jobs", "/ready"):
                await http.get(path, headers=headers)
            await http.post("/v1/jobs", json=by_link, headers=headers)
            await http.post("/inpaint", json=push, headers={"Authorization": f"Bearer {sent}"})
    said = json.dumps(lines())
    assert "attempt_failed" in said
    for secret in (key, wrong, signed, "broken.token", *LINKS):
        assert secret not in said


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_named_as_prometheus_has_it(name: str) -> None:
    metric = METRICS[name]
    assert name.startswith("fluxfill_")
    assert name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))


async def test_an_edit_is_counted_timed_and_aged() -> None:
    rig = Rig()
    await rig.put_session()
    made = delivery("m1")
    published = rig.clock() - timedelta(seconds=7)
    await rig.take(Delivery(data=made.data, attributes={}, message_id="m1", publish_time=published))
    assert rig.metrics.total("fluxfill_jobs_total", "inpaint", "telea", "succeeded") == 1
    assert rig.metrics.values["fluxfill_queue_wait_seconds", "telea"] == [7.0]
    assert rig.metrics.values["fluxfill_job_attempts", "telea"] == [1]
    stages = {key[1] for key in rig.metrics.values if key[0] == "fluxfill_stage_seconds"}
    assert stages == {"queued", "download", "prepare", "wait", "engine", "encode", "upload", "total"}


async def test_failures_dead_letters_and_hold_backs_are_counted_by_code() -> None:
    rig = Rig(work_settings={"max_attempts": 1})
    rig.engine.on_paint = lambda: (_ for _ in ()).throw(OutOfMemory("full"))
    await rig.put_session()
    await rig.work()
    rig.jobs.is_down = True
    await rig.work("m2", seed=2)
    assert rig.metrics.total("fluxfill_attempts_failed_total", "telea", "out_of_memory") == 1
    assert rig.metrics.total("fluxfill_dead_letters_total", "out_of_memory") == 1
    assert rig.metrics.total("fluxfill_jobs_total", "inpaint", "telea", "failed") == 1
    assert rig.metrics.total("fluxfill_messages_deferred_total", "store_unavailable") == 1
