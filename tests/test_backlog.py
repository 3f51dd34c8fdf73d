"""How many replicas the waiting messages call for, and the readings of how many wait."""

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app import adapters
from serve_app.adapters.pubsub.client import GrpcSubscriber
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.errors import BrokerUnavailable
from serve_app.jobs import backlog
from serve_app.jobs.backlog import BacklogWatch, Reading, Recent, Replicas, Report, together, wanted
from serve_app.settings import BacklogSettings, MessagesSettings

NOW = 1_800_000_000.0
NAME = "Inpainter-Q8_0"
numbers = st.floats(allow_nan=True, allow_infinity=True)
readings = st.builds(Reading, messages=numbers, oldest_age_s=numbers, taken_at=numbers | st.just(NOW))
by_name = st.dictionaries(st.sampled_from([NAME, "Inpainter-other"]), numbers)
reports = st.builds(
    Report,
    reading=st.none() | readings,
    empty_s=numbers,
    held=by_name,
    mix=by_name,
    job_s=by_name,
    target_drain_s=numbers,
    trust_s=numbers,
    quiet_s=numbers,
)
counts = st.integers(0, 1000)


@st.composite
def deployments(draw: st.DrawFn) -> Replicas:
    least = draw(counts)
    most = least + draw(counts)
    return Replicas(
        name=NAME,
        running=draw(counts),
        target=draw(counts),
        min=least,
        max=most,
        requests=draw(numbers),
        target_ongoing=draw(numbers),
        plain=draw(numbers),
    )


def replicas(**changed: Any) -> Replicas:
    usual = {"running": 1, "target": 1, "min": 0, "max": 8, "requests": 0.0, "target_ongoing": 1.0, "plain": 0.0}
    return Replicas(**{"name": NAME, **usual, **changed})


def reading(messages: float = 0.0, age_s: float = 0.0, taken_s_ago: float = 0.0) -> Reading:
    return Reading(messages=messages, oldest_age_s=age_s, taken_at=NOW - taken_s_ago)


def report(of: Reading | None = None, **changed: Any) -> Report:
    usual = {"empty_s": 0.0, "held": {NAME: 0.0}, "mix": {NAME: 1.0}, "job_s": {NAME: 30.0}}
    times = {"target_drain_s": 300.0, "trust_s": 300.0, "quiet_s": 10.0}
    return Report(**{"reading": of, **usual, **times, **changed})


# -- what holds for every input


@given(deployments(), st.none() | reports)
def test_it_never_raises_and_keeps_the_limits(one: Replicas, known: Report | None) -> None:
    assert one.min <= wanted(one, known, NOW) <= one.max


@given(deployments(), st.none() | reports)
def test_it_never_wants_fewer_than_serves_own_policy(one: Replicas, known: Report | None) -> None:
    plain = one.plain if one.plain > 0 else 0.0
    assert wanted(one, known, NOW) >= min(one.max, plain)


@given(deployments(), reports, st.floats(0, 1e6), st.sampled_from(["messages", "oldest_age_s"]))
def test_more_or_older_messages_never_mean_fewer_replicas(one: Replicas, known: Report, more: float, what: str) -> None:
    low = Reading(messages=10.0, oldest_age_s=5.0, taken_at=NOW)
    values = {"messages": low.messages, "oldest_age_s": low.oldest_age_s, "taken_at": NOW}
    high = Reading(**{**values, what: values[what] + more})

    def at(of: Reading) -> int:
        parts = {name: getattr(known, name) for name in Report.__dataclass_fields__}
        return wanted(one, Report(**{**parts, "reading": of}), NOW)

    assert at(low) <= at(high)


@given(deployments(), st.none() | reports, st.floats(0, 1e6), st.floats(0, 1e6))
def test_more_requests_never_mean_fewer_replicas(
    one: Replicas, known: Report | None, requests: float, more: float
) -> None:
    parts = {name: getattr(one, name) for name in Replicas.__dataclass_fields__}
    low, high = (Replicas(**{**parts, "requests": n}) for n in (requests, requests + more))
    assert wanted(low, known, NOW) <= wanted(high, known, NOW)


@given(deployments().filter(lambda one: one.target > 0 and one.max > 0))
def test_nothing_known_never_means_none(one: Replicas) -> None:
    assert wanted(one, None, NOW) >= 1
    for of in (None, reading(0, taken_s_ago=301)):
        assert wanted(one, report(of), NOW) >= 1


# -- what it decides


def test_a_backlog_wakes_what_drains_it_in_time_and_less_where_jobs_are_short() -> None:
    asleep = replicas(running=0, target=0)
    assert wanted(asleep, report(reading(1000)), NOW) == 8
    assert wanted(asleep, report(reading(40)), NOW) == 4
    assert wanted(asleep, report(reading(40), job_s={NAME: 3.0}), NOW) == 1


def test_messages_that_wait_for_long_already_need_more_replicas() -> None:
    assert wanted(replicas(), report(reading(20)), NOW) == 2
    assert wanted(replicas(), report(reading(20, age_s=200)), NOW) == 6


def test_each_model_gets_its_part_of_the_mix_and_jobs_in_flight_count_once() -> None:
    held = {NAME: 0.0, "Inpainter-other": 20.0}
    assert wanted(replicas(running=0), report(reading(60), held=held, mix={NAME: 0.5}), NOW) == 2


def test_held_jobs_are_enough_to_wake_all_replicas_where_the_reading_is_late_absent_or_wrong() -> None:
    asleep = replicas(running=0, target=0)
    for of in (reading(0, taken_s_ago=120), None, reading(0)):
        assert wanted(asleep, report(of, held={NAME: 18.0}), NOW) == 8


def test_one_replica_that_runs_already_does_not_hold_up_the_others() -> None:
    assert wanted(replicas(running=1), report(None, held={NAME: 18.0}, job_s={NAME: 1.0}), NOW) == 8
    # One is painted, and two are on their way.
    assert wanted(replicas(running=1), report(None, held={NAME: 3.0}, job_s={NAME: 1.0}), NOW) == 1


def test_pulls_that_bring_nothing_overrule_a_reading() -> None:
    late = reading(1000, taken_s_ago=100)
    assert wanted(replicas(), report(late), NOW) == 8
    assert wanted(replicas(), report(late, empty_s=10.0), NOW) == 0


@pytest.mark.parametrize(
    ("known", "least"),
    [
        (report(None), 1),
        (report(reading(0, taken_s_ago=301)), 1),
        (report(reading(0)), 0),
        (report(None, empty_s=10.0), 0),
        # Another model's messages keep coming.
        (report(None, mix={NAME: 0.001}), 0),
        (report(reading(500), mix={NAME: 0.001}), 0),
    ],
)
def test_the_last_replica_stops_only_where_it_is_known_that_no_message_waits(known: Report, least: int) -> None:
    assert wanted(replicas(), known, NOW) == least
    assert wanted(replicas(target=0, running=0), known, NOW) == 0


def test_reports_of_several_ingresses_count_together() -> None:
    one = report(reading(50, taken_s_ago=60), held={NAME: 4.0}, mix={NAME: 1.0}, empty_s=40.0)
    two = report(reading(70), held={NAME: 6.0}, mix={NAME: 0.5}, empty_s=12.0, job_s={NAME: 40.0})
    both = together([one, two])
    assert both == report(reading(70), held={NAME: 10.0}, mix={NAME: 0.75}, empty_s=12.0, job_s={NAME: 40.0})
    assert together([]) is None


def test_the_mix_follows_the_latest_messages() -> None:
    recent = Recent()
    for name in ["a"] * 100 + ["b"] * 100:
        recent.message(name)
    assert sum(recent.mix.values()) == pytest.approx(1)
    assert recent.mix["b"] > 0.99
    assert recent.mix["a"] < backlog.TRACE


def test_a_jobs_seconds_follow_what_is_measured() -> None:
    recent = Recent()
    recent.job("a", 10.0)
    assert recent.job_s == {"a": 10.0}
    for _ in range(50):
        recent.job("a", 2.0)
    assert recent.job_s["a"] == pytest.approx(2, abs=0.01)


# -- readings


class Gauges:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def put(self, name: str, value: float, **labels: str) -> None:
        self.values[name] = value

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...


class Script:
    """A backlog that answers what it is told to, one after the other."""

    def __init__(self, *answers: Reading | Exception) -> None:
        self._answers = list(answers)
        self.is_over = asyncio.Event()

    async def read(self) -> Reading:
        if not self._answers:
            self.is_over.set()
            await asyncio.Event().wait()
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def watched(*answers: Reading | Exception, empty_s: float = 0.0) -> tuple[BacklogWatch, Gauges]:
    gauges, script = Gauges(), Script(*answers)
    watch = BacklogWatch(script, BacklogSettings(read_every_s=0.001), gauges, empty_s=lambda: empty_s)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(watch.run())
        await script.is_over.wait()
        task.cancel()
    return watch, gauges


async def test_a_reading_that_fails_leaves_the_last_one_which_grows_old() -> None:
    old = Reading(messages=7.0, oldest_age_s=1.0, taken_at=NOW)
    watch, gauges = await watched(old, BrokerUnavailable("down"))
    assert watch.reading == old
    assert gauges.values["fluxfill_backlog_messages"] == 7
    assert gauges.values["fluxfill_backlog_trusted"] == 0
    assert gauges.values["fluxfill_backlog_reading_age_seconds"] >= 0


async def test_without_any_reading_none_is_trusted(caplog: pytest.LogCaptureFixture) -> None:
    watch, gauges = await watched(*[BrokerUnavailable("no role")] * 3)
    assert watch.reading is None
    assert gauges.values == {"fluxfill_backlog_trusted": 0.0}
    assert caplog.text.count("no role") == 1


async def test_pulls_that_bring_nothing_are_trusted_without_a_reading() -> None:
    _, gauges = await watched(BrokerUnavailable("no points"), empty_s=10.0)
    assert gauges.values == {"fluxfill_backlog_trusted": 1.0}


@pytest.mark.parametrize("url", ["embedded://127.0.0.1:8085", "pubsub://127.0.0.1:8085"])
def test_servers_that_cannot_count_have_no_backlog(url: str) -> None:
    assert adapters.backlog(MessagesSettings(url=url)) is None


async def test_the_embedded_servers_count_has_messages_that_are_leased_and_deferred() -> None:
    settings = MessagesSettings(url="embedded://127.0.0.1:0")
    with EmbeddedPubSub.of(settings) as server:
        there = settings.model_copy(update={"url": f"embedded://{server.address}"})
        publisher, subscriber = adapters.publisher(there), GrpcSubscriber(there)
        for _ in range(3):
            await publisher.publish("sessions", b"x", {})
        leased, deferred = await subscriber.pull("session-processing", 2, 0)
        await subscriber.set_deadline("session-processing", [deferred.ack_id], 600)
        names = ["projects/local/subscriptions/session-processing"]
        assert server.backlog(names).messages == 3
        await subscriber.acknowledge("session-processing", [leased.ack_id])
        found = server.backlog(names)
        assert found.messages == 2
        assert 0 <= found.oldest_age_s < 60
        await subscriber.close()
    with pytest.raises(BrokerUnavailable):
        EmbeddedPubSub.of(settings).backlog(names)


async def test_the_memory_brokers_count_is_exact() -> None:
    settings = MessagesSettings(url="memory:backlog-of-a-test")
    counted, publisher = adapters.backlog(settings), adapters.publisher(settings)
    assert counted is not None
    assert (await counted.read()).messages == 0
    for _ in range(3):
        await publisher.publish("sessions", b"x", {})
    found = await counted.read()
    assert found.messages == 3
    assert 0 <= found.oldest_age_s < 60
    assert found.taken_at == pytest.approx(time.time(), abs=60)
