"""The backlog by Cloud Monitoring, from a stand-in over HTTP."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from serve_app import adapters
from serve_app.errors import BrokerUnavailable
from serve_app.settings import MessagesSettings

TAKEN = datetime(2026, 11, 30, 9, 0, tzinfo=UTC)
MESSAGES = MessagesSettings(url="pubsub:", project="a-project", subscriptions={"one-of-two": {}, "two-of-two": {}})

Answer = Callable[[str], tuple[int, Any]]


class Monitoring:
    """Answers each query by its metric's name, and notes it."""

    def __init__(self) -> None:
        self.answer: Answer = lambda metric: (404, {})
        self.asked: list[dict[str, str]] = []
        self.paths: set[str] = set()


@pytest.fixture
def monitoring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Monitoring]:
    stand_in = Monitoring()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            stand_in.asked.append(query)
            stand_in.paths.add(url.path)
            status, body = stand_in.answer(query["filter"].split('"')[1].rpartition("/")[2])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MONITORING_EMULATOR_HOST", f"127.0.0.1:{server.server_port}")
        yield stand_in
        server.shutdown()


def series(name: str, *values: int) -> dict[str, Any]:
    """Points a minute apart, the newest first."""
    ends = [(TAKEN - timedelta(minutes=i)).isoformat().replace("+00:00", "Z") for i in range(len(values))]
    points = [
        {"interval": {"startTime": end, "endTime": end}, "value": {"int64Value": str(value)}}
        for end, value in zip(ends, values, strict=True)
    ]
    return {"resource": {"type": "pubsub_subscription", "labels": {"subscription_id": name}}, "points": points}


def answers(**by_metric: list[dict[str, Any]]) -> Answer:
    return lambda metric: (200, {"timeSeries": by_metric[metric]} if by_metric[metric] else {})


COUNTS = [series("one-of-two", 12, 900), series("two-of-two", 30)]
AGES = [series("one-of-two", 75), series("two-of-two", 5)]


async def read() -> Any:
    counted = adapters.backlog(MESSAGES)
    assert counted is not None
    return await counted.read()


async def test_a_reading_has_the_newest_points_of_all_subscriptions(monitoring: Monitoring) -> None:
    monitoring.answer = answers(num_undelivered_messages=COUNTS, oldest_unacked_message_age=AGES)
    reading = await read()
    assert (reading.messages, reading.oldest_age_s, reading.taken_at) == (42, 75, TAKEN.timestamp())
    assert monitoring.paths == {"/v3/projects/a-project/timeSeries"}
    (first, _) = monitoring.asked
    assert 'one_of("one-of-two", "two-of-two")' in first["filter"]
    assert datetime.fromisoformat(first["interval.startTime"]) < datetime.fromisoformat(first["interval.endTime"])


@pytest.mark.parametrize(
    "answer",
    [
        answers(num_undelivered_messages=[], oldest_unacked_message_age=[]),
        answers(num_undelivered_messages=COUNTS[:1], oldest_unacked_message_age=AGES),
        answers(num_undelivered_messages=COUNTS, oldest_unacked_message_age=AGES[1:]),
        lambda metric: (403, {"error": {"status": "PERMISSION_DENIED"}}),
        lambda metric: (200, b"not JSON"),
        lambda metric: (200, {"timeSeries": [{"points": []}]}),
    ],
    ids=["no points", "a subscription lacks its count", "and its age", "refused", "garbage", "another form"],
)
async def test_what_is_missing_is_no_empty_queue(monitoring: Monitoring, answer: Answer) -> None:
    monitoring.answer = answer
    with pytest.raises(BrokerUnavailable, match="Cloud Monitoring"):
        await read()
