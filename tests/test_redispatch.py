"""A job whose message the broker has lost: it is published again, or the job ends. None stays `processing` for ever."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from serve_app.errors import ReplicaLost, VariantLoadFailed
from serve_app.jobs import claims, record
from serve_app.jobs.messages import ASKED_AT, Attributes
from serve_app.jobs.ports import Delivery
from serve_app.jobs.record import Job, State

from .backends import make_job, until
from .rig import SESSION, USER, Held, Rig, delivery

HOUR_S = 3600.0


@pytest.fixture
async def rig() -> Rig:
    rig = Rig()
    await rig.put_session()
    return rig


def fail_with(rig: Rig, error: Exception | None) -> None:
    def on_paint() -> None:
        if error is not None:
            raise error

    rig.engine.on_paint = on_paint


async def look(rig: Rig, after_s: float = 0) -> list[Delivery]:
    """What the notifier publishes after so long."""
    rig.clock.advance(after_s)
    before = len(rig.topics.sessions)
    await rig.notifier.send_due()
    await rig.notifier.drained()
    return [replace(copy, publish_time=rig.clock()) for copy in rig.topics.sessions[before:]]


def published(rig: Rig, **fields: str) -> Delivery:
    attributes = {"priority": "high", "idempotencyKey": "k", "tenant": "t"}
    return replace(delivery(attributes=attributes, **fields), publish_time=rig.clock())


async def test_a_job_whose_message_is_lost_is_published_again_and_ends(rig: Rig) -> None:
    fail_with(rig, ReplicaLost("gone"))
    first = published(rig, prompt="grass")
    assert (await rig.take(first)).action == "defer"
    assert await look(rig, HOUR_S - 1) == []
    [copy] = await look(rig, 1)
    assert copy.attributes == {**first.attributes, ASKED_AT: first.publish_time.isoformat()}  # type: ignore[union-attr]
    fail_with(rig, None)
    assert (await rig.take(copy)).reason == "succeeded"
    job = await rig.job()
    assert (job.status, job.owed, job.asked_at) == (State.SUCCEEDED, {}, first.publish_time)
    assert rig.metrics.total("fluxfill_notifications_total", "dispatch", "sent") == 1
    assert (await rig.document())["processingStatus"] == "completed"


async def test_a_job_whose_worker_died_with_its_message_ends(rig: Rig) -> None:
    asked = rig.editor.read(delivery().data)
    new = await rig.worker._new_job(rig.editor, asked, Attributes(), published(rig), "telea")
    await rig.worker._claim(new, "dead")
    [copy] = await look(rig, HOUR_S)
    assert (await rig.take(replace(copy, attributes={}))).reason == "succeeded"
    job = await rig.job()
    assert (job.attempt, job.fence) == (2, 2)


async def test_a_message_that_is_lost_again_is_published_again_ever_more_rarely(rig: Rig) -> None:
    fail_with(rig, ReplicaLost("gone"))
    await rig.take(published(rig))
    assert len(await look(rig, HOUR_S)) == 1
    assert await look(rig, HOUR_S * 0.75) == []
    assert len(await look(rig, HOUR_S * 0.5)) == 1
    assert await look(rig, HOUR_S * 1.5) == []
    assert len(await look(rig, HOUR_S)) == 1
    job = await rig.job()
    assert (job.status, job.owed["dispatch"].attempts) == (State.QUEUED, 3)


async def test_a_job_that_waits_and_is_heard_of_is_not_published_again(rig: Rig) -> None:
    fail_with(rig, VariantLoadFailed("not yet"))
    message = published(rig)
    for _ in range(10):
        assert (await rig.take(message)).action == "defer"
        assert await look(rig, 0.9 * HOUR_S) == []
    assert len(await look(rig, 0.1 * HOUR_S)) == 1


async def test_a_job_that_runs_is_not_published_again(rig: Rig) -> None:
    held = Held()
    rig.engine.on_paint = held
    working = asyncio.create_task(rig.take(published(rig)))
    await asyncio.to_thread(held.entered.wait)
    rig.clock.advance(HOUR_S)
    async with asyncio.timeout(10):
        while ((await rig.job()).lease_until or rig.clock()) <= rig.clock():
            await asyncio.sleep(0.01)
    assert await look(rig) == []
    job = await rig.job()
    assert job.lease_until and job.owed["dispatch"].due_at == job.lease_until + timedelta(seconds=HOUR_S)
    held.let_go.set()
    assert (await working).reason == "succeeded"


async def test_of_many_couriers_one_publishes(rig: Rig) -> None:
    fail_with(rig, ReplicaLost("gone"))
    await rig.take(published(rig))
    rig.clock.advance(HOUR_S)
    others = [rig.beside() for _ in range(3)]
    all_listed = asyncio.Barrier(len(others))

    async def wait_for_the_others() -> None:
        await all_listed.wait()

    for other in others:
        other.jobs.after["list"] = wait_for_the_others
    await asyncio.gather(*(other.notifier.send_due() for other in others))
    await asyncio.gather(*(other.notifier.drained() for other in others))
    assert sum(len(other.topics.sessions) for other in others) == 1


async def test_a_broker_that_is_away_gets_the_message_later(rig: Rig) -> None:
    fail_with(rig, ReplicaLost("gone"))
    await rig.take(published(rig))
    rig.broker.is_down = True
    assert await look(rig, HOUR_S) == []
    rig.broker.is_down = False
    assert len(await look(rig, 2 * HOUR_S)) == 1


async def test_a_copy_asks_for_nothing_that_was_canceled_meanwhile(rig: Rig) -> None:
    """The notifier had begun to publish it when the user canceled."""
    fail_with(rig, ReplicaLost("gone"))
    await rig.take(published(rig))
    [copy] = await look(rig, HOUR_S)
    job = await rig.job()
    await rig.jobs.update(job.id, job.lock_key, claims.cancel)
    rig.clock.advance(5)
    assert (await rig.take(replace(copy, publish_time=rig.clock()))).reason == "canceled"
    assert (await rig.take(published(rig))).reason == "replica_lost", "a message of the user's own does"


async def stored(rig: Rig, **changes: object) -> Job:
    """A claimed job whose message nobody has."""
    job = make_job(**{"user_id": USER, "session_id": SESSION, **changes})
    claim = claims.claim(job, lease_s=1, max_attempts=5)
    claimed: Job = await rig.jobs.update(job.id, job.lock_key, claim)
    return claimed


async def test_a_job_whose_record_keeps_no_message_ends_as_failed(rig: Rig) -> None:
    await stored(rig, message=None)
    assert await look(rig, HOUR_S) == []
    job = await rig.job()
    assert (job.status, job.error and job.error.code) == (State.FAILED, "message_lost")
    document = await rig.document()
    assert (document["processingStatus"], document["processingError"]["code"]) == ("failed", "message_lost")
    assert job.owed == {} and len(rig.topics.completed) == 1


async def test_a_message_that_the_broker_refuses_ends_its_job(rig: Rig) -> None:
    await stored(rig, message=record.Message(data="{}", attributes={"a": "b"}))
    rig.topics.max_attributes = 0
    rig.clock.advance(HOUR_S)
    await rig.notifier.send_due()
    await until(lambda: rig.jobs.calls["update"] >= 3)
    job = await rig.job()
    assert (job.status, job.error and job.error.code) == (State.FAILED, "message_lost")
    assert "the broker refuses its copy" in (job.error.message if job.error else "")
    await rig.notifier.close(grace_s=0)
