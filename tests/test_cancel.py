"""Cancelling: whatever the moment, the canceled job does not go on, and no other is touched."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from serve_app.errors import IllegalTransition, ReplicaLost, UnknownJob
from serve_app.jobs.api import JobApi
from serve_app.jobs.kinds import Caller
from serve_app.jobs.ports import Delivery
from serve_app.jobs.record import State

from .rig import SESSION, USER, Held, Rig, delivery, wait_for


@pytest.fixture
async def rig() -> Rig:
    rig = Rig()
    await rig.put_session()
    return rig


@pytest.fixture
def canceler(rig: Rig) -> JobApi:
    return JobApi(kinds=rig.kinds, job_store=rig.jobs, blobs=rig.blobs, notifier=rig.notifier, settings=rig.settings)


@pytest.fixture
async def held(rig: Rig) -> AsyncIterator[Held]:
    held = Held()
    rig.engine.on_paint = held
    yield held
    held.let_go.set()


def published(rig: Rig, seconds_ago: float, session: str = SESSION) -> Delivery:
    """A message published a while ago."""
    made = delivery(sessionId=session)
    at = rig.clock() - timedelta(seconds=seconds_ago)
    return Delivery(data=made.data, attributes={}, message_id=session, publish_time=at)


async def test_a_running_job_stops_within_a_step_and_no_other_does(rig: Rig, canceler: JobApi, held: Held) -> None:
    await rig.put_session("other")
    working = asyncio.create_task(rig.take(published(rig, 1)))
    other = asyncio.create_task(rig.take(published(rig, 1, "other")))
    await asyncio.to_thread(wait_for, held.entered.is_set)
    async with asyncio.timeout(10):
        while len(await rig.jobs.list(status=State.RUNNING)) < 2:
            await asyncio.sleep(0.01)
    [canceled] = await canceler.cancel_session(USER, SESSION)
    assert canceled.session_id == SESSION
    held.let_go.set()
    assert (await working).reason == "canceled"
    assert (await other).reason == "succeeded"
    assert (await rig.document())["processingStatus"] == "canceled"
    assert (await rig.document("other"))["processingStatus"] == "completed"


async def test_a_message_that_waits_never_starts(rig: Rig, canceler: JobApi) -> None:
    message = published(rig, 5)
    assert list(await canceler.cancel_session(USER, SESSION)) == []
    assert (await rig.take(message)).action == "ack"
    job = await rig.job()
    assert (job.status, job.error and job.error.code) == (State.CANCELED, "canceled")
    assert rig.engine.painted == 0
    assert (await rig.document())["processingStatus"] == "canceled"
    assert (await rig.take(message)).reason == "canceled", "nor when it comes again"
    assert rig.topics.dead == []


async def test_a_message_published_at_the_moment_of_the_cancellation_never_starts(rig: Rig, canceler: JobApi) -> None:
    await canceler.cancel_session(USER, SESSION)
    assert (await rig.take(published(rig, 0))).reason == "canceled"


async def test_who_cancels_and_asks_again_gets_an_edit(rig: Rig, canceler: JobApi, held: Held) -> None:
    working = asyncio.create_task(rig.take(published(rig, 1)))
    await asyncio.to_thread(wait_for, held.entered.is_set)
    await canceler.cancel_session(USER, SESSION)
    held.let_go.set()
    assert (await working).reason == "canceled"
    rig.clock.advance(60)
    assert (await rig.take(published(rig, 5))).reason == "succeeded"
    assert (await rig.document())["processingStatus"] == "completed"
    assert (await rig.take(published(rig, 200))).reason == "succeeded", "an old duplicate changes nothing"
    assert rig.engine.painted == 2


async def test_who_asks_again_at_once_gets_an_edit(rig: Rig, canceler: JobApi, held: Held) -> None:
    working = asyncio.create_task(rig.take(published(rig, 1)))
    await asyncio.to_thread(wait_for, held.entered.is_set)
    await canceler.cancel_session(USER, SESSION)
    held.let_go.set()
    assert (await working).reason == "canceled"
    rig.clock.advance(0.1)
    assert (await rig.take(published(rig, 0))).reason == "succeeded"


async def test_a_message_from_before_the_cancellation_does_not_stop_one_from_after_it(
    rig: Rig, canceler: JobApi
) -> None:
    early = published(rig, 0)
    await canceler.cancel_session(USER, SESSION)
    assert (await rig.take(early)).reason == "canceled"
    rig.clock.advance(1)
    late = published(rig, 0)
    rig.engine.on_paint = fail
    assert (await rig.take(late)).reason == "replica_lost", "it is to be tried again"
    rig.clock.advance(600)
    rig.engine.on_paint = lambda: None
    assert (await rig.take(early)).reason == "succeeded", "which of the job's messages comes first does not matter"
    assert (await rig.take(late)).reason == "succeeded"
    assert rig.engine.painted == 2


def fail() -> None:
    raise ReplicaLost("gone")


async def test_a_message_published_after_the_cancellation_runs(rig: Rig, canceler: JobApi) -> None:
    await canceler.cancel_session(USER, SESSION)
    rig.clock.advance(10)
    assert (await rig.take(published(rig, 5))).reason == "succeeded"


async def test_a_session_canceled_between_its_claim_and_its_start_never_starts(rig: Rig, canceler: JobApi) -> None:
    async def cancel() -> None:
        assert await canceler.cancel_session(USER, SESSION)

    rig.jobs.before["canceled_until"] = cancel
    assert (await rig.take(published(rig, 5))).reason == "canceled"
    assert rig.engine.painted == 0


async def test_a_job_is_canceled_by_its_id(rig: Rig, canceler: JobApi, held: Held) -> None:
    working = asyncio.create_task(rig.take(published(rig, 1)))
    await asyncio.to_thread(wait_for, held.entered.is_set)
    job = await canceler.cancel((await rig.job()).id, Caller())
    assert job.status == State.CANCELED
    held.let_go.set()
    assert (await working).reason == "canceled"


async def test_what_cannot_be_canceled(rig: Rig, canceler: JobApi) -> None:
    with pytest.raises(UnknownJob):
        await canceler.cancel("edit-nobody-knows", Caller())
    await rig.take(published(rig, 1))
    with pytest.raises(IllegalTransition, match="succeeded"):
        await canceler.cancel((await rig.job()).id, Caller())
    assert list(await canceler.cancel_session(USER, SESSION)) == []
    assert (await rig.job()).status == State.SUCCEEDED
