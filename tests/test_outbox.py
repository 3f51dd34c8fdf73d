"""What others are told of a job's end, whatever dies or is down meanwhile."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import get_args

import pytest

from serve_app import adapters
from serve_app.errors import StoreUnavailable, WebhookFailed
from serve_app.jobs import claims, notifications, record
from serve_app.jobs.notifications import Notifier
from serve_app.jobs.record import Artifact, Cause, Job, State
from serve_app.settings import Settings, WebhookSettings

from .backends import make_job
from .rig import SESSION, USER, Rig, delivery

URL = "https://example.org/hook"
#: After it, what the process that ended a job has not told is anybody's to tell.
HEAD_START_S = max(record.HEAD_START_S.values())
TRACE = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


@pytest.fixture
async def rig() -> Rig:
    rig = Rig()
    await rig.put_session()
    return rig


async def told_later(rig: Rig, seconds: float) -> None:
    """What another process's notifier tells when it looks `seconds` from now."""
    rig.clock.advance(seconds)
    await rig.notifier.send_due()
    await rig.notifier.drained()


async def test_every_end_is_told_to_the_session_the_topic_and_the_url(rig: Rig) -> None:
    await rig.take(delivery(attributes={"traceparent": TRACE}, callbackUrl=URL))
    job = await rig.job()
    assert job.owed == {}
    assert (await rig.document())["processingStatus"] == "completed"
    [(body, attributes)] = rig.topics.completed
    assert body["processingStatus"] == "completed"
    assert body["editedPath"] == job.paths["edited"]
    ids = {"jobId": job.id, "userId": USER, "sessionId": SESSION}
    assert attributes == {**ids, "status": "succeeded", "traceparent": TRACE}
    assert [called.id for called in rig.receivers.called] == [job.id]
    assert rig.metrics.total("fluxfill_jobs_total", "inpaint", "telea", "succeeded") == 1


async def test_a_duplicate_is_told_to_nobody(rig: Rig) -> None:
    await rig.work(callbackUrl=URL)
    rig.clock.advance(1)
    await rig.work("m2", callbackUrl=URL)
    assert len(rig.topics.completed) == len(rig.receivers.called) == 1
    assert rig.metrics.total("fluxfill_duplicate_messages_total") == 1


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
    died = claims.claim(make_job("edit-2", user_id=USER, session_id=SESSION), lease_s=9, max_attempts=5)
    claimed = await rig.jobs.update("edit-2", job.lock_key, died)
    done = claims.finish(claims.claim_of(claimed), Cause.SUCCEEDED, artifacts=(Artifact(role="edited", path="e"),))
    await rig.jobs.update("edit-2", job.lock_key, done)
    await told_later(rig, record.HEAD_START_S["session"] - 1)
    assert (await rig.document())["jobId"] == job.id, "the process that ended it has a head start"
    await told_later(rig, 2)
    assert (await rig.document())["editedPath"] == "e"


async def test_only_one_of_many_couriers_takes_a_debt_on(rig: Rig) -> None:
    rig.receivers.is_down = True
    await rig.work(callbackUrl=URL)
    rig.clock.advance(HEAD_START_S + 1)
    others = [rig.beside() for _ in range(3)]
    all_listed = asyncio.Barrier(len(others))

    async def wait_for_the_others() -> None:
        await all_listed.wait()

    for other in others:
        other.jobs.after["list"] = wait_for_the_others
    await asyncio.gather(*(other.notifier.send_due() for other in others))
    await asyncio.gather(*(other.notifier.drained() for other in others))
    assert sum(len(other.receivers.called) for other in others) == 1


async def test_a_receiver_that_never_answers_is_given_up(rig: Rig) -> None:
    rig.receivers.is_down = True
    await rig.work(callbackUrl=URL)
    for _ in range(rig.settings.webhooks.max_attempts - 1):
        assert (await rig.job()).owed
        await told_later(rig, 2 * notifications.LONGEST_WAIT_S["webhook"])
    assert (await rig.job()).owed == {}
    assert rig.metrics.total("fluxfill_notifications_total", "webhook", "given_up") == 1


@pytest.mark.parametrize(("dead", "is_ours"), [("mirror", True), ("broker", True), ("receivers", False)])
async def test_how_long_an_end_is_untold_is_measured_but_for_receivers(rig: Rig, dead: str, is_ours: bool) -> None:
    getattr(rig, dead).is_down = True
    await rig.work(callbackUrl=URL)
    await told_later(rig, 1000)
    getattr(rig, dead).is_down = False
    for _ in range(2):
        await told_later(rig, 1000)
    overdue_s = rig.metrics.values[("fluxfill_notifications_overdue_seconds",)]
    assert overdue_s == ([1000, 2000, 0] if is_ours else [0, 0, 0])


async def test_the_session_is_never_given_up(rig: Rig) -> None:
    rig.mirror.is_down = True
    await rig.work()
    for _ in range(50):
        await told_later(rig, 1000)
    rig.mirror.is_down = False
    await told_later(rig, 1000)
    assert (await rig.document())["processingStatus"] == "completed"


@pytest.mark.slow
async def test_a_slow_receiver_keeps_no_session_waiting(rig: Rig) -> None:
    never = asyncio.Event()

    async def hang(_job: Job) -> None:
        await never.wait()
        raise WebhookFailed("too late")

    rig.notifier._ways = {**rig.notifier._ways, "webhook": hang}
    assert (await rig.worker.work(delivery(callbackUrl=URL))).action == "ack"
    async with asyncio.timeout(10):
        while (await rig.job()).owed.keys() != {"webhook"}:
            await asyncio.sleep(0.01)
    await rig.notifier.close(grace_s=0)
    assert (await rig.job()).owed.keys() == {"webhook"}, "what is not told by the end of the process stays owed"


async def test_what_was_told_while_the_store_is_down_stays_owed_and_is_told_again(rig: Rig) -> None:
    rig.mirror.is_down = True
    await rig.work()
    rig.mirror.is_down = False
    rig.clock.advance(HEAD_START_S + 1)
    await rig.notifier.send_due()
    rig.jobs.is_down = True
    await rig.notifier.drained()
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
    over = make_job(status=State.RUNNING, fence=1).after(Cause.REJECTED, make_job().created_at)
    assert over.owed.keys() == {"session", "completion"}
    [again] = claims.replay(over, (), over.created_at)
    assert again.owed.keys() == {"dispatch"}
    failed_again = again.evolve(status=State.RUNNING).after(Cause.REJECTED, make_job().created_at)
    assert failed_again.owed.keys() == {"session", "completion"}
    pay, now = claims.mark_sent(over, ["session"]), over.created_at
    assert pay(failed_again, (), now) == (), "that it failed before was told, not this"
    assert pay(over.evolve(status=State.CANCELED), (), now) == (), "nor another end"
    [paid] = pay(over, (), now)
    assert paid.owed.keys() == {"completion"}
    assert pay(paid, (), now) == ()


def test_a_debt_is_taken_only_when_it_is_due() -> None:
    over = make_job(status=State.RUNNING, fence=1).after(Cause.REJECTED, make_job().created_at)
    due_at = over.created_at + timedelta(seconds=record.HEAD_START_S["session"])
    assert over.owes_at == due_at

    def take(at: datetime, *notifications: record.Notification) -> Sequence[Job]:
        return claims.take_notifications("me", notifications, wait_s=lambda notification, n: 10 * n)(over, (), at)

    assert take(due_at - timedelta(seconds=1), "session", "completion") == ()
    [taken] = take(due_at, "session")
    mine = taken.owed["session"]
    assert (mine.attempts, mine.taken_by, mine.due_at) == (1, "me", due_at + timedelta(seconds=10))
    assert taken.owed["completion"] == over.owed["completion"]


def test_the_head_start_is_longer_than_telling_may_take() -> None:
    assert all(
        head_start_s > notifications.SEND_TIMEOUT_S[notification]
        for notification, head_start_s in record.HEAD_START_S.items()
    )
    assert {*record.HEAD_START_S, "dispatch"} == set(notifications.SEND_TIMEOUT_S)
    assert (
        Settings(variants={"telea": {}}, webhooks={"timeout_s": 25}).webhooks.timeout_s
        < notifications.SEND_TIMEOUT_S["webhook"]
    )


class Held:
    """Receivers that do not answer until they are let go."""

    def __init__(self) -> None:
        self.called: list[Job] = []
        self.at_once = 0
        self.go_on = asyncio.Event()

    def check(self, url: str) -> None: ...

    async def call(self, job: Job, _event: str, _document: Mapping[str, object]) -> None:
        self.called.append(job)
        self.at_once += 1
        await self.go_on.wait()
        self.at_once -= 1


AT_ONCE = notifications.AT_ONCE["webhook"]


async def over(
    rig: Rig, number: int, url: str, owes: Sequence[record.Notification] = get_args(record.Notification)
) -> None:
    """A stored job that has just ended, and of which only these were not told."""
    ended = make_job(f"edit-{number}", session_id=f"s{number}", status=State.RUNNING, fence=1, callback_url=url)
    job = ended.after(Cause.REJECTED, rig.clock())
    job = job.evolve(owed={notification: owed for notification, owed in job.owed.items() if notification in owes})
    await rig.jobs.update(job.id, job.lock_key, lambda *_: (job,))


async def test_a_dead_host_takes_few_places_and_counts_no_call_that_was_not_made(rig: Rig) -> None:
    held = Held()
    rig.notifier._webhooks = held
    for number in range(20):
        await over(rig, number, "https://dead.example/")
    await over(rig, 99, "https://live.example/")
    rig.clock.advance(HEAD_START_S + 1)
    await rig.notifier.send_due()
    async with asyncio.timeout(10):
        while held.at_once < AT_ONCE + 1:
            await asyncio.sleep(0.01)
    assert {job.callback_url for job in held.called} == {"https://dead.example/", "https://live.example/"}
    assert held.at_once == AT_ONCE + 1
    attempts = [job.owed["webhook"].attempts for job in await rig.jobs.list(limit=50) if "webhook" in job.owed]
    assert sum(attempts) == len(held.called)
    held.go_on.set()
    await rig.notifier.drained()
    for _ in range(20 // AT_ONCE):
        await rig.notifier.send_due()
        await rig.notifier.drained()
    assert len(held.called) == 21, "what found no place is told when there is one, and once"


@pytest.mark.slow
async def test_thousands_that_a_dead_receiver_is_owed_hold_up_nobody_else(rig: Rig) -> None:
    """Everything else is told at the first look, whatever is older and in whatever number."""
    held = Held()
    notifier = Notifier(
        kinds=[rig.editor],
        job_store=rig.jobs,
        mirror=rig.mirror,
        publisher=rig.broker,
        webhooks=held,
        settings=rig.settings.model_copy(update={"webhooks": WebhookSettings(hosts=("dead.example", "live.example"))}),
    )
    for number in range(3 * notifications.BATCH):
        await over(rig, number, "https://DEAD.example:443/hook", owes=["webhook"])
    rig.clock.advance(1)
    await over(rig, 9998, "https://live.example/")
    await over(rig, 9999, "")
    rig.clock.advance(HEAD_START_S + 1)
    await notifier.send_due()
    async with asyncio.timeout(10):
        while held.at_once < AT_ONCE + 1 or len(rig.topics.completed) < 2:
            await asyncio.sleep(0.01)
        for number in (9998, 9999):
            while (await rig.jobs.get(f"edit-{number}")).owed.keys() - {"webhook"}:
                await asyncio.sleep(0.01)
    await notifier.close(grace_s=0)
    assert {job.receiver for job in held.called} == {"dead.example", "live.example"}


@pytest.mark.slow
@pytest.mark.parametrize("owed", ["session", "completion"])
async def test_a_dead_mirror_or_topic_holds_up_what_it_is_owed_only(rig: Rig, owed: record.Notification) -> None:
    never = asyncio.Event()

    async def hang(_job: Job) -> None:
        await never.wait()

    rig.notifier._ways = {**rig.notifier._ways, owed: hang}
    for number in range(3 * notifications.BATCH):
        await over(rig, number, "", owes=[owed])
    rig.clock.advance(1)
    await over(rig, 9999, URL)
    rig.clock.advance(HEAD_START_S + 1)
    await rig.notifier.send_due()
    async with asyncio.timeout(10):
        while (await rig.jobs.get("edit-9999")).owed.keys() != {owed}:
            await asyncio.sleep(0.01)
    await rig.notifier.close(grace_s=0)


async def test_what_is_still_being_told_is_not_told_again(rig: Rig) -> None:
    held = Held()
    rig.notifier._webhooks = held
    await rig.worker.work(delivery(callbackUrl=URL))
    async with asyncio.timeout(10):
        while not held.called:
            await asyncio.sleep(0.01)
    for _ in range(3):
        rig.clock.advance(1000)
        await rig.notifier.send_due()
    assert len(held.called) == 1
    held.go_on.set()
    await rig.notifier.drained()
    assert (await rig.job()).owed == {}


@pytest.mark.slow
async def test_a_slow_mirror_keeps_no_completion_unpaid(rig: Rig) -> None:
    never = asyncio.Event()

    async def hang(_job: Job) -> None:
        await never.wait()

    rig.notifier._ways = {**rig.notifier._ways, "session": hang}
    await rig.worker.work(delivery())
    async with asyncio.timeout(10):
        while (await rig.job()).owed.keys() != {"session"}:
            await asyncio.sleep(0.01)
    await rig.notifier.close(grace_s=0)
    assert len(rig.topics.completed) == 1


@pytest.mark.parametrize("error", [ValueError("a record of a newer version"), StoreUnavailable("down")])
async def test_nothing_that_goes_wrong_ends_the_looking(error: Exception) -> None:
    rig = Rig()
    await rig.put_session()
    rig.mirror.is_down = True
    await rig.work()
    rig.mirror.is_down = False

    async def fail() -> None:
        raise error

    rig.jobs.before["list"] = fail
    rig.clock.advance(HEAD_START_S + 1)
    looking = asyncio.create_task(rig.notifier.run())
    stored = adapters.job_store(rig.settings.jobs)
    async with asyncio.timeout(10):
        while any(job.owed for job in await stored.list()):
            await asyncio.sleep(0.01)
    assert not looking.done()
    looking.cancel()


async def test_a_job_that_is_deleted_meanwhile_is_told_to_nobody(rig: Rig) -> None:
    rig.mirror.is_down = True
    await rig.work()
    job = await rig.job()
    rig.jobs.before["update"] = lambda: rig.jobs.delete(job.id)
    rig.clock.advance(HEAD_START_S + 1)
    await rig.notifier.send_due()
    await rig.notifier.drained()
    assert list(await rig.jobs.list()) == []


async def test_a_place_is_left_of_a_job_that_is_gone(rig: Rig) -> None:
    held = Held()
    rig.notifier._webhooks = held
    for number in range(AT_ONCE):
        await over(rig, number, URL, owes=["webhook"])
        rig.clock.advance(HEAD_START_S + 1)
        rig.jobs.before["update"] = partial(rig.jobs.delete, f"edit-{number}")
        await rig.notifier.send_due()
    await over(rig, AT_ONCE, URL, owes=["webhook"])
    rig.clock.advance(HEAD_START_S + 1)
    await rig.notifier.send_due()
    async with asyncio.timeout(10):
        while not held.called:
            await asyncio.sleep(0.01)
    await rig.notifier.close(grace_s=0)


async def hang_in(rig: Rig, *notifications: record.Notification) -> list[Job]:
    """Those that are told and hang; they are taken out again when the telling is cancelled."""
    telling: list[Job] = []

    async def hang(job: Job) -> None:
        telling.append(job)
        try:
            await asyncio.Event().wait()
        finally:
            telling.remove(job)

    rig.notifier._ways = {**rig.notifier._ways, **dict.fromkeys(notifications, hang)}
    return telling


@pytest.mark.parametrize("notification", ["session", "completion", "webhook"])
async def test_no_more_are_told_at_a_time_than_there_are_places_and_closing_ends_them(
    rig: Rig, notification: record.Notification
) -> None:
    telling = await hang_in(rig, notification)
    most = notifications.AT_ONCE[notification]
    for number in range(most + 5):
        await over(rig, number, URL, owes=[notification])
    rig.clock.advance(HEAD_START_S + 1)
    for _ in range(3):
        await rig.notifier.send_due()
    async with asyncio.timeout(10):
        while len(telling) < most:
            await asyncio.sleep(0.01)
    # All that began has come so far by now.
    await asyncio.sleep(0)
    assert len(telling) == most
    await rig.notifier.close(grace_s=0)
    assert telling == []


@pytest.mark.parametrize("notification", ["session", "completion", "webhook"])
async def test_nobody_else_tells_while_telling_may_take(rig: Rig, notification: record.Notification) -> None:
    telling = await hang_in(rig, notification)
    await over(rig, 1, URL, owes=[notification])
    rig.clock.advance(HEAD_START_S + 1)
    await rig.notifier.send_due()
    other = rig.beside()
    others = await hang_in(other, notification)
    rig.clock.advance(notifications.SEND_TIMEOUT_S[notification] - 0.1)
    await other.notifier.send_due()
    assert (await rig.jobs.get("edit-1")).owed[notification].attempts == 1, "nobody else has taken it on"
    rig.clock.advance(10_000)
    await other.notifier.send_due()
    async with asyncio.timeout(10):
        while not others:
            await asyncio.sleep(0.01)
    assert len(telling) == 1
    for each in (rig, other):
        await each.notifier.close(grace_s=0)


@pytest.mark.parametrize("notification", ["session", "completion", "webhook"])
async def test_telling_that_takes_too_long_is_given_up_for_now(
    rig: Rig, notification: record.Notification, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "SEND_TIMEOUT_S", dict.fromkeys(notifications.SEND_TIMEOUT_S, 0.01))
    telling = await hang_in(rig, notification)
    await over(rig, 1, URL, owes=[notification])
    rig.clock.advance(HEAD_START_S + 1)
    await rig.notifier.send_due()
    async with asyncio.timeout(10):
        await rig.notifier.drained()
    assert telling == []
    assert (await rig.jobs.get("edit-1")).owed.keys() == {notification}
    assert rig.metrics.total("fluxfill_notifications_total", notification, "failed") == 1


# A posted job's message


async def post(rig: Rig) -> Job:
    attributes = {"jobType": "inpaint", "jobId": "edit-1", "variant": "telea"}
    job, _ = await rig.jobs.create(make_job(redispatch_s=600, message=record.Message(data="{}", attributes=attributes)))
    posted: Job = job
    return posted


async def test_a_posted_jobs_message_is_published_at_once_and_once(rig: Rig) -> None:
    job = await post(rig)
    rig.clock.advance(1)
    rig.notifier.dispatch(job)
    await rig.notifier.drained()
    [message] = rig.topics.sessions
    assert message.attributes.items() >= {"jobId": "edit-1", "variant": "telea", "jobType": "inpaint"}.items()
    sent = await rig.job()
    assert sent == job.evolve(owed={"dispatch": record.Due(due_at=rig.clock() + timedelta(seconds=600))})
    await told_later(rig.beside(), 599)
    assert len(rig.topics.sessions) == 1
    await told_later(rig, 1)
    assert len(rig.topics.sessions) == 2


async def test_the_message_of_a_process_that_dies_before_is_published_by_another(rig: Rig) -> None:
    await post(rig)
    others = [rig.beside() for _ in range(2)]
    rig.clock.advance(record.HEAD_START_S["dispatch"] - 0.001)
    for step_s in (0, 0.001, 1):
        rig.clock.advance(step_s)
        for other in others:
            await told_later(other, 0)
    assert sorted(len(other.topics.sessions) for other in others) == [0, 1]


async def test_a_posted_jobs_message_is_published_while_the_broker_comes_back(rig: Rig) -> None:
    job = await post(rig)
    rig.broker.is_down = True
    rig.notifier.dispatch(job)
    await rig.notifier.drained()
    assert await rig.job() == job, "it stays owed"
    rig.broker.is_down = False
    await told_later(rig, record.HEAD_START_S["dispatch"])
    assert len(rig.topics.sessions) == 1


async def test_a_worker_that_is_faster_than_the_note_is_left_alone(rig: Rig) -> None:
    job = await post(rig)

    async def claimed() -> None:
        await rig.jobs.update(job.id, job.lock_key, claims.claim(job, lease_s=9, max_attempts=5))

    rig.jobs.before["update"] = claimed
    rig.notifier.dispatch(job)
    await rig.notifier.drained()
    running = await rig.job()
    assert running.status == State.RUNNING
    assert running.owed == {"dispatch": record.Due(due_at=rig.clock() + timedelta(seconds=600))}
