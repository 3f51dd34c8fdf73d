"""What others are told of a job's end, whatever dies or is down meanwhile."""

import asyncio
from datetime import timedelta

import pytest

from serve_app import jobs, outbox
from serve_app.errors import WebhookFailed
from serve_app.jobs import HEAD_START_S, Cause, Job, State

from .backends import make_job
from .rig import SESSION, USER, Rig, delivery

URL = "https://example.org/hook"
TRACE = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


@pytest.fixture
async def rig() -> Rig:
    rig = Rig()
    await rig.put_session()
    return rig


async def told_later(rig: Rig, seconds: float) -> None:
    """What another process's courier tells when it looks `seconds` from now."""
    rig.clock.advance(seconds)
    await rig.courier.look()
    await rig.courier.settled()


async def test_every_end_is_told_to_the_session_the_topic_and_the_url(rig: Rig) -> None:
    await rig.take(delivery(attributes={"traceparent": TRACE}, callbackUrl=URL))
    job = await rig.job()
    assert job.owed == {}
    assert (await rig.document())["processingStatus"] == "completed"
    [(body, attributes)] = rig.topics.completed
    assert body["processingStatus"] == "completed"
    assert body["editedPath"] == job.artifacts["edited"]
    ids = {"jobId": job.id, "userId": USER, "sessionId": SESSION}
    assert attributes == {**ids, "status": "succeeded", "traceparent": TRACE}
    assert [called.id for called in rig.receivers.called] == [job.id]
    assert rig.metrics.total("fluxfill_jobs_total", "inpaint", "telea", "succeeded") == 1


async def test_a_duplicate_is_told_to_nobody(rig: Rig) -> None:
    await rig.work(callbackUrl=URL)
    rig.clock.advance(1)
    await rig.work("m2", callbackUrl=URL)
    assert len(rig.topics.completed) == len(rig.receivers.called) == 1
    assert rig.metrics.total("fluxfill_duplicates_total") == 1


async def test_a_failure_is_told(rig: Rig) -> None:
    await rig.work(variant="nobody-serves-it", callbackUrl=URL)
    [(body, attributes)] = rig.topics.completed
    assert (body["processingStatus"], attributes["status"]) == ("failed", "failed")
    assert body["processingError"]["code"] == "unknown_variant"
    assert len(rig.receivers.called) == 1


@pytest.mark.parametrize("dead", ["mirror", "broker", "receivers"])
async def test_what_is_down_is_told_later_and_holds_up_nothing_else(rig: Rig, dead: str) -> None:
    getattr(rig, dead).is_down = True
    assert (await rig.work(callbackUrl=URL)).action == "ack"
    owed = {"mirror": "session", "broker": "completion", "receivers": "webhook"}[dead]
    assert (await rig.job()).owed.keys() == {owed}
    await told_later(rig, HEAD_START_S + 1)
    assert (await rig.job()).owed.keys() == {owed}, "it is still down"

    getattr(rig, dead).is_down = False
    await told_later(rig, 120)
    assert (await rig.job()).owed == {}
    assert (await rig.document())["processingStatus"] == "completed"
    assert len(rig.topics.completed) == len(rig.receivers.called) == 1


async def test_a_process_that_dies_after_the_last_write_loses_nothing(rig: Rig) -> None:
    await rig.work()
    job = await rig.job()
    died = jobs.claim(make_job("edit-2", user_id=USER, session_id=SESSION), now=rig.clock(), lease_s=9, max_attempts=5)
    claimed = await rig.jobs.update("edit-2", job.session_key, died)
    done = jobs.finish(jobs.claim_of(claimed), Cause.SUCCEEDED, now=rig.clock(), artifacts={"edited": "e"})
    await rig.jobs.update("edit-2", job.session_key, done)
    await told_later(rig, HEAD_START_S - 1)
    assert (await rig.document())["jobId"] == job.id, "the process that ended it has a head start"
    await told_later(rig, 2)
    assert (await rig.document())["editedPath"] == "e"


async def test_only_one_of_many_couriers_takes_a_debt_on(rig: Rig) -> None:
    rig.receivers.is_down = True
    await rig.work(callbackUrl=URL)
    rig.receivers.is_down = False
    rig.clock.advance(HEAD_START_S + 1)
    others = [rig.beside() for _ in range(3)]
    for other in others:
        other.jobs, other.courier._jobs = rig.jobs, rig.jobs
    await asyncio.gather(*(other.courier.look() for other in others))
    await asyncio.gather(*(other.courier.settled() for other in others))
    assert sum(len(other.receivers.called) for other in others) == 1


async def test_a_receiver_that_never_answers_is_given_up(rig: Rig) -> None:
    rig.receivers.is_down = True
    await rig.work(callbackUrl=URL)
    for _ in range(rig.settings.webhooks.max_attempts - 1):
        assert (await rig.job()).owed
        await told_later(rig, 2 * outbox.LONGEST_WEBHOOK_WAIT_S)
    assert (await rig.job()).owed == {}
    assert rig.metrics.total("fluxfill_told_total", "webhook", "given_up") == 1


async def test_the_session_is_never_given_up(rig: Rig) -> None:
    rig.mirror.is_down = True
    await rig.work()
    for _ in range(50):
        await told_later(rig, 1000)
    rig.mirror.is_down = False
    await told_later(rig, 1000)
    assert (await rig.document())["processingStatus"] == "completed"


async def test_a_slow_receiver_keeps_no_session_waiting(rig: Rig) -> None:
    never = asyncio.Event()

    async def hang(_job: Job) -> None:
        await never.wait()
        raise WebhookFailed("too late")

    rig.courier._ways = {**rig.courier._ways, "webhook": hang}
    assert (await rig.worker.work(delivery(callbackUrl=URL))).action == "ack"
    async with asyncio.timeout(10):
        while (await rig.job()).owed.keys() != {"webhook"}:
            await asyncio.sleep(0.01)
    await rig.courier.close(grace_s=0)
    assert (await rig.job()).owed.keys() == {"webhook"}, "what is not told by the end of the process stays owed"


async def test_what_was_told_while_the_store_is_down_stays_owed_and_is_told_again(rig: Rig) -> None:
    rig.mirror.is_down = True
    await rig.work()
    rig.mirror.is_down = False
    rig.clock.advance(HEAD_START_S + 1)
    await rig.courier.look()
    rig.jobs.is_down = True
    await rig.courier.settled()
    rig.jobs.is_down = False
    assert (await rig.document())["processingStatus"] == "completed"
    assert (await rig.job()).owed.keys() == {"session"}
    await told_later(rig, 100)
    assert (await rig.job()).owed == {}


async def test_a_callback_that_may_not_be_called_fails_the_job_before_it_is_painted(rig: Rig) -> None:
    assert (await rig.work(callbackUrl="https://elsewhere.example/")).action == "ack"
    job = await rig.job()
    assert (job.status, job.error and job.error.code) == (State.FAILED, "callback_refused")
    assert rig.engine.painted == 0
    assert rig.topics.dead[0][1]["deadLetterReason"] == "callback_refused"
    assert job.owed == {}, "and it is not called to say so"


async def test_paying_is_refused_for_a_job_that_has_changed_since() -> None:
    over = make_job(status=State.RUNNING, fence=1).after(Cause.REJECTED, finished_at=make_job().created_at)
    assert over.owed.keys() == {"session", "completion"}
    [again] = jobs.replay(over, ())
    assert again.owed == {}
    assert jobs.pay(over, ["session"])(again, ()) == ()
    [paid] = jobs.pay(over, ["session"])(over, ())
    assert paid.owed.keys() == {"completion"}
    assert jobs.pay(over, ["session"])(paid, ()) == ()


def test_a_debt_is_taken_only_when_it_is_due() -> None:
    over = make_job(status=State.RUNNING, fence=1).after(Cause.REJECTED, finished_at=make_job().created_at)
    due_at = over.created_at + timedelta(seconds=HEAD_START_S)
    assert over.owes_at == due_at
    early = jobs.take_debts("me", now=due_at - timedelta(seconds=1), wait_s=lambda debt, n: 10)
    assert early(over, ()) == ()
    [taken] = jobs.take_debts("me", now=due_at, wait_s=lambda debt, n: 10 * n)(over, ())
    assert {(owed.attempts, owed.taken_by, owed.due_at) for owed in taken.owed.values()} == {
        (1, "me", due_at + timedelta(seconds=10))
    }
