"""What every job store and session mirror guarantees."""

import asyncio
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest

from serve_app import adapters
from serve_app.adapters.stores.sql import SqlJobStore
from serve_app.clock import utc_now
from serve_app.errors import Busy, QuotaExceeded, StaleClaim, UnknownJob
from serve_app.jobs import claims as jobs_claims
from serve_app.jobs import record
from serve_app.jobs.claims import Change, Quota
from serve_app.jobs.ports import JobStore, SessionMirror
from serve_app.jobs.record import Artifact, Cause, Due, Job, State
from serve_app.models import Progress

from .backends import at, make_audit, make_job
from .job_servers import Opened

KEY = "u/s"


@pytest.fixture
def store(jobs_url: str, opened: Opened) -> JobStore:
    return opened(adapters.job_store(jobs_url))


@pytest.fixture
def cancellations(jobs_url: str, opened: Opened) -> JobStore:
    return opened(adapters.job_store(jobs_url))


@pytest.fixture
def mirror(jobs_url: str, opened: Opened) -> SessionMirror:
    return opened(adapters.job_store(jobs_url))


@pytest.fixture
def crowd(jobs_url: str) -> int:
    """How many do something at once. Firestore's emulator lets each that met another wait for seconds."""
    return 2 if jobs_url.startswith("firestore:") else 8


def put(*records: Job) -> Change:
    return lambda _job, _rivals, _now: records


def dated(change: Change, second: float) -> Change:
    """The change at a moment of the test's own, whatever the store's clock says."""
    return lambda job, rivals, _now: change(job, rivals, at(second))


class Slow:
    """A change that waits."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, _job: Job | None, _rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
        self.begun.set()
        self.go_on.wait()
        return (make_job(),)


async def claimed(store: JobStore, job: Job, second: float = 10) -> Job:
    change = jobs_claims.claim(job, lease_s=60, max_attempts=5)
    return await store.update(job.id, job.lock_key, dated(change, second))


async def test_what_was_stored_is_there(store: JobStore) -> None:
    job = make_job(
        seed=2**63 - 1,
        deadline=at(99.123456),
        artifacts=(Artifact(role="edited", path="users/ü"),),
        error=record.JobError(code="x", message="y"),
        timings=record.Timings(gpu_ms=0.1),
        cost=0.1,
    )
    assert await store.get(job.id) is None
    assert await store.update(job.id, KEY, put(job)) == job
    assert await store.get(job.id) == job


async def test_update_sees_the_record_and_the_unfinished_rivals_of_its_session(store: JobStore) -> None:
    running = [make_job(id, status=State.RUNNING) for id in ("a", "b")]
    queued = make_job("queued")
    others = [
        make_job("done", status=State.SUCCEEDED),
        make_job("elsewhere", status=State.RUNNING, session_id="s2"),
    ]
    await store.update("a", KEY, put(*running, queued, *others))
    seen: list[tuple[Job | None, Sequence[Job]]] = []

    def look(job: Job | None, rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
        seen.append((job, rivals))
        return ()

    assert await store.update("a", KEY, look) == running[0]
    assert seen[-1][0] == running[0] and sorted(job.id for job in seen[-1][1]) == ["b", "queued"]


async def test_jobs_without_a_session_have_no_rivals(store: JobStore) -> None:
    alone = [make_job(id, user_id="", session_id="", status=State.RUNNING) for id in ("a", "b")]
    await store.update("a", "", put(*alone))

    def no_rivals(job: Job | None, rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
        assert not rivals
        return ()

    await store.update("a", "", no_rivals)


async def test_what_a_change_raises_passes_through_and_nothing_is_stored(store: JobStore) -> None:
    job = make_job()
    await store.update(job.id, KEY, put(job))

    def fail(job: Job | None, _rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
        raise Busy("not now", retry_after_s=3)

    with pytest.raises(Busy, match="not now"):
        await store.update(job.id, KEY, fail)
    assert await store.get(job.id) == job


async def test_an_update_that_stores_nothing_of_an_unknown_job_is_refused(store: JobStore) -> None:
    with pytest.raises(UnknownJob, match="no job edit-1"):
        await store.update("edit-1", KEY, put())
    with pytest.raises(UnknownJob):
        await store.update("edit-1", KEY, jobs_claims.cancel)


async def test_every_record_of_a_change_is_stored(store: JobStore) -> None:
    first = await claimed(store, make_job("a"), 0)
    second = await claimed(store, make_job("b"), 100)
    assert second.status == State.RUNNING
    lost = await store.get("a")
    assert lost and lost.status == State.QUEUED and lost.fence > first.fence
    with pytest.raises(StaleClaim):
        await store.update("a", KEY, dated(jobs_claims.renew(jobs_claims.claim_of(first), lease_s=60), 101))


def add_one(job: Job | None, _rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
    assert job is not None
    return (job.evolve(seed=job.seed + 1),)


async def test_concurrent_updates_lose_nothing(jobs_url: str, opened: Opened, crowd: int) -> None:
    stores = [opened(adapters.job_store(jobs_url)) for _ in range(crowd)]
    await stores[0].update("edit-1", KEY, put(make_job(seed=0)))

    def in_a_thread(store: JobStore) -> None:
        async def several() -> None:
            for _ in range(crowd):
                await store.update("edit-1", KEY, add_one)

        asyncio.run(several())

    with ThreadPoolExecutor(crowd) as pool:
        await asyncio.to_thread(lambda: list(pool.map(in_a_thread, stores)))
    job = await stores[0].get("edit-1")
    assert job and job.seed == crowd**2


async def claim_at_once(stores: Sequence[JobStore], records: Sequence[Job]) -> list[Job]:
    """The claims that were won; the others were refused as busy."""
    outcomes = await asyncio.gather(*map(claimed, stores, records), return_exceptions=True)
    won = [outcome for outcome in outcomes if isinstance(outcome, Job)]
    assert [type(outcome) for outcome in outcomes if outcome not in won] == [Busy] * (len(outcomes) - len(won))
    return won


async def test_one_of_many_claims_of_a_job_wins(jobs_url: str, opened: Opened, crowd: int) -> None:
    stores = [opened(adapters.job_store(jobs_url)) for _ in range(2 * crowd)]
    (won,) = await claim_at_once(stores, [make_job()] * len(stores))
    assert (won.attempt, won.fence) == (1, 1) and [*await stores[0].list()] == [won]


async def test_one_of_a_sessions_new_jobs_wins(jobs_url: str, opened: Opened, crowd: int) -> None:
    stores = [opened(adapters.job_store(jobs_url)) for _ in range(2 * crowd)]
    (won,) = await claim_at_once(stores, [make_job(f"edit-{i}") for i in range(len(stores))])
    assert [*await stores[0].list()] == [won], "a claim that is refused stores nothing"


def overlapping(*changes: Change) -> list[Change]:
    """The two changes, each held until the other has been made, too, or the store has plainly kept them apart."""
    made = [threading.Event() for _ in changes]

    def held(change: Change, mine: threading.Event, other: threading.Event) -> Change:
        def hold(job: Job | None, rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
            records = change(job, rivals, now)
            mine.set()
            other.wait(0.3)
            return records

        return hold

    return list(map(held, changes, made, reversed(made)))


@pytest.mark.slow
async def test_new_jobs_of_a_session_that_are_claimed_in_the_same_moment(jobs_url: str, opened: Opened) -> None:
    stores = [opened(adapters.job_store(jobs_url)) for _ in range(2)]
    records = [make_job("a"), make_job("b")]
    claims = overlapping(*(jobs_claims.claim(job, lease_s=60, max_attempts=5) for job in records))
    outcomes = await asyncio.gather(
        *(store.update(job.id, KEY, claim) for store, job, claim in zip(stores, records, claims, strict=True)),
        return_exceptions=True,
    )
    assert {type(outcome) for outcome in outcomes} == {Job, Busy}
    assert len(await stores[0].list()) == 1


@pytest.mark.slow
async def test_updates_in_the_same_moment_lose_nothing(jobs_url: str, opened: Opened) -> None:
    """Not even where one names no session."""
    stores = [opened(adapters.job_store(jobs_url)) for _ in range(2)]
    await stores[0].update("edit-1", KEY, put(make_job(seed=0)))
    first, second = overlapping(add_one, add_one)
    await asyncio.gather(stores[0].update("edit-1", KEY, first), stores[1].update("edit-1", "", second))
    job = await stores[0].get("edit-1")
    assert job and job.seed == 2


async def test_an_old_claim_can_do_nothing(jobs_url: str, opened: Opened) -> None:
    one, two = (opened(adapters.job_store(jobs_url)) for _ in range(2))
    first = jobs_claims.claim_of(await claimed(one, make_job(), 0))
    second = await claimed(two, make_job(), 100)
    assert second.fence == first.fence + 1
    for change in (
        jobs_claims.renew(first, lease_s=60),
        jobs_claims.requeue(first),
        jobs_claims.finish(first, Cause.SUCCEEDED),
    ):
        with pytest.raises(StaleClaim):
            await one.update("edit-1", KEY, change)
    assert await one.get("edit-1") == second
    done = await two.update("edit-1", KEY, jobs_claims.finish(jobs_claims.claim_of(second), Cause.SUCCEEDED))
    assert done.status == State.SUCCEEDED


async def test_get_has_the_progress_of_the_present_claim(store: JobStore) -> None:
    job = await claimed(store, make_job())
    claim = jobs_claims.claim_of(job)
    await store.report(claim, Progress(step=1, steps=28))
    await store.report(claim, Progress(step=2, steps=28))
    assert await store.get(job.id) == job.evolve(progress=Progress(step=2, steps=28))
    assert (await store.list())[0].progress == Progress(step=2, steps=28)

    again = await claimed(store, job, 100)
    assert (await store.get(job.id)) == again, "a new claim starts from nothing"
    await store.report(jobs_claims.claim_of(again), Progress(step=1, steps=28))
    await store.report(claim, Progress(step=9, steps=28))
    assert await store.get(job.id) == again.evolve(progress=Progress(step=1, steps=28)), "an older claim is ignored"


async def test_progress_is_no_part_of_the_record_and_moves_no_claim(store: JobStore) -> None:
    job = await claimed(store, make_job())
    await store.report(jobs_claims.claim_of(job), Progress(step=1, steps=28))
    assert await store.update(job.id, KEY, lambda stored, _rivals, _now: (stored,) if stored == job else ()) == job


async def test_progress_of_a_job_that_is_gone_is_ignored(store: JobStore) -> None:
    job = await claimed(store, make_job())
    await store.report(jobs_claims.claim_of(job), Progress(step=1, steps=2))
    await store.delete(job.id)
    await store.report(jobs_claims.claim_of(job), Progress(step=2, steps=2))
    assert await store.get(job.id) is None
    assert (await claimed(store, make_job())).progress == Progress()


async def test_list_is_newest_first_and_filtered(store: JobStore) -> None:
    ages = {"c": 3.0, "a": 1.0, "b": 2.000001, "b2": 2.0}
    for id, second in ages.items():
        await store.update(id, KEY, put(make_job(id, created_at=at(second))))
    await store.update("d", "u/s2", put(make_job("d", created_at=at(0), session_id="s2", status=State.FAILED)))
    assert [job.id for job in await store.list()] == ["c", "b", "b2", "a", "d"]
    assert [job.id for job in await store.list(limit=2)] == ["c", "b"]
    assert [job.id for job in await store.list(status=State.FAILED)] == ["d"]
    assert [job.id for job in await store.list(lock_key=KEY, status=State.QUEUED, limit=1)] == ["c"]
    assert list(await store.list(status=State.SUCCEEDED)) == []


async def test_jobs_of_a_type_are_listed_apart(store: JobStore) -> None:
    for id, second in {"old": 1.0, "new": 3.0}.items():
        await store.update(id, "audit", put(make_audit(id, created_at=at(second))))
    await store.update("edit", KEY, put(make_job("edit", created_at=at(2))))
    assert [job.id for job in await store.list(type="audit")] == ["new", "old"]
    assert [job.id for job in await store.list(type="audit", limit=1)] == ["new"]
    assert [job.id for job in await store.list(type="inpaint", status=State.QUEUED)] == ["edit"]
    assert [job.id for job in await store.list()] == ["new", "edit", "old"]


def owing(id: str, *due_at: float) -> Job:
    owed = {
        notification: Due(due_at=at(second))
        for notification, second in zip(("session", "completion"), due_at, strict=False)
    }
    return make_job(id, status=State.SUCCEEDED, owed=owed)


async def test_debts_that_are_due_are_listed_the_earliest_first(store: JobStore) -> None:
    records = [owing("late", 30.000001), owing("both", 40, 10), owing("now", 20.5), owing("paid"), make_job("waits")]
    for job in records:
        await store.update(job.id, KEY, put(job))
    assert [job.id for job in await store.list(owes_by=at(30))] == ["both", "now"]
    assert [job.id for job in await store.list(owes_by=at(30.000001), limit=2)] == ["both", "now"]
    assert [job.id for job in await store.list(owes_by=at(99))] == ["both", "now", "late"]
    assert list(await store.list(owes_by=at(9.999999))) == []


async def test_each_debt_is_listed_apart_and_webhooks_by_receiver(store: JobStore) -> None:
    def owes(id: str, url: str, **due_at: float) -> Job:
        owed = {notification: Due(due_at=at(second)) for notification, second in due_at.items()}
        return make_job(id, status=State.SUCCEEDED, owed=owed, callback_url=url)

    records = [
        owes("all", "https://A.example:443/x", session=3, completion=2, webhook=1),
        owes("a", "https://a.example./y", webhook=2),
        owes("b", "https://a.example:8443/", webhook=0, session=9),
        owes("c", "https://c.example/", completion=1),
    ]
    for job in records:
        await store.update(job.id, "", put(job))

    async def listed(notification: record.Notification, by: float = 5, **which: Any) -> list[str]:
        return [job.id for job in await store.list(owes_by=at(by), notification=notification, **which)]

    assert await listed("session") == ["all"]
    assert await listed("session", 9) == ["all", "b"]
    assert await listed("completion") == ["c", "all"]
    assert await listed("webhook") == ["b", "all", "a"]
    assert await listed("webhook", receiver="a.example") == ["all", "a"]
    assert await listed("webhook", receiver="a.example", limit=1) == ["all"]
    assert await listed("webhook", receiver="a.example:8443") == ["b"]
    assert await listed("webhook", receiver="c.example") == []
    await store.update("all", "", put(records[0].evolve(owed={})))
    assert await listed("webhook", receiver="a.example") == ["a"]
    assert await listed("session") == []


async def test_a_debt_that_is_paid_is_listed_no_more(store: JobStore) -> None:
    job = await claimed(store, make_job())
    told = await store.update(job.id, KEY, dated(jobs_claims.finish(jobs_claims.claim_of(job), Cause.SUCCEEDED), 11))
    assert [*await store.list(owes_by=told.owes_at)] == [told]
    later = told.evolve(owed=dict.fromkeys(told.owed, Due(due_at=at(76), attempts=1)))
    await store.update(job.id, KEY, put(later))
    assert list(await store.list(owes_by=at(75))) == []
    assert [*await store.list(owes_by=at(76))] == [later]
    paid = await store.update(job.id, KEY, jobs_claims.mark_sent(told, ["session", "completion"]))
    assert paid.owed == {} and list(await store.list(owes_by=at(76))) == []


async def test_a_job_that_is_not_over_owes_its_message(store: JobStore) -> None:
    job = await claimed(store, make_job(redispatch_s=100, message=record.Message(data="{}", attributes={"ü": "é"})), 10)
    assert [*await store.list(owes_by=at(110))] == [job]
    assert list(await store.list(owes_by=at(109.999999))) == []
    renewed = await store.update(job.id, KEY, dated(jobs_claims.renew(jobs_claims.claim_of(job), lease_s=60), 50))
    assert [*await store.list(owes_by=at(110))] == [renewed], "a renewal moves nothing"
    queued = await store.update(job.id, KEY, dated(jobs_claims.requeue(jobs_claims.claim_of(job)), 60))
    assert list(await store.list(owes_by=at(159.999999))) == []
    assert [*await store.list(owes_by=at(160), notification="dispatch")] == [queued]
    done = await store.update(job.id, KEY, dated(jobs_claims.cancel, 70))
    assert done.owed.keys() == {"session", "completion"} and done.message == job.message


async def test_delete(store: JobStore) -> None:
    await store.update("edit-1", KEY, put(make_job()))
    await store.delete("edit-1")
    await store.delete("edit-1")
    assert await store.get("edit-1") is None


async def test_stores_of_one_url_share_their_content(jobs_url: str, store: JobStore, opened: Opened) -> None:
    await store.update("edit-1", KEY, put(make_job()))
    assert await opened(adapters.job_store(jobs_url)).get("edit-1") == make_job()


# Posted jobs

DAY_S = 24 * 3600


async def outcomes_of(stores: Sequence[JobStore], jobs: Sequence[Job], quota: Quota | None) -> list[Any]:
    """What comes of creating them at once, each by a store of its own as far as there are."""
    creations = (store.create(job, quota) for store, job in zip(itertools.cycle(stores), jobs, strict=False))
    return await asyncio.gather(*creations, return_exceptions=True)


async def test_a_job_that_is_created_is_queued_and_owes_its_message(store: JobStore) -> None:
    before = await store.now()
    job, is_new = await store.create(make_job("a", owner="key"))
    assert is_new and await store.get("a") == job
    assert before <= job.created_at <= await store.now() and job.asked_at == job.created_at
    assert [(event.number, event.status) for event in job.events] == [(1, State.QUEUED)]
    due_at = job.created_at + timedelta(seconds=record.HEAD_START_S["dispatch"])
    assert [*await store.list(owes_by=due_at, notification="dispatch")] == [job]
    assert list(await store.list(owes_by=due_at - timedelta(microseconds=1))) == []


async def test_a_stored_job_stays_as_it_is(store: JobStore) -> None:
    first, _ = await store.create(make_job("a", owner="key", request="one"))
    assert await store.create(make_job("a", owner="key", request="two")) == (first, False)
    assert await store.create(make_job("a", owner="other"), Quota(unfinished=0, per_day=0)) == (first, False)
    assert await store.get("a") == first
    running = await store.update("a", KEY, jobs_claims.claim(first, lease_s=60, max_attempts=5))
    await store.report(jobs_claims.claim_of(running), Progress(step=1, steps=28))
    assert await store.create(make_job("a", owner="key")) == (
        running.evolve(progress=Progress(step=1, steps=28)),
        False,
    )


async def test_one_of_many_that_create_a_job_does(jobs_url: str, opened: Opened, crowd: int) -> None:
    stores = [opened(adapters.job_store(jobs_url)) for _ in range(crowd)]
    for quota in (None, Quota(unfinished=2, per_day=9)):
        id = f"a-{quota is None}"
        jobs = [make_job(id, owner="key", request=str(i)) for i in range(2 * crowd)]
        outcomes = await outcomes_of(stores, jobs, quota)
        (new,) = [job for job, is_new in outcomes if is_new]
        assert [job for job, _ in outcomes] == [new] * len(jobs) and await stores[0].get(id) == new


@pytest.mark.parametrize("quota", [Quota(unfinished=4, per_day=99), Quota(unfinished=99, per_day=4)])
async def test_a_quota_is_exact_however_many_create_at_once(quota: Quota, jobs_url: str, opened: Opened) -> None:
    stores = [opened(adapters.job_store(jobs_url)) for _ in range(2)]
    others = [make_job(id, owner=owner) for id, owner in (("other", "b"), ("message", ""))]
    await outcomes_of(stores, others, None)
    # Each has a session of its own, so that only the owner's lock is between them.
    jobs = [make_job(f"job-{i}", owner="a", session_id=f"s{i}") for i in range(20)]
    outcomes = await outcomes_of(stores, jobs, quota)
    refused = [outcome for outcome in outcomes if isinstance(outcome, QuotaExceeded)]
    created = [outcome[0] for outcome in outcomes if isinstance(outcome, tuple)]
    assert (len(created), len(refused)) == (4, 16), outcomes
    assert {job.id for job in await stores[0].list(owner="a")} == {job.id for job in created}


async def test_quotas_count_what_is_stored_of_the_owner(store: JobStore) -> None:
    now = await store.now()
    ages_s = {"today": DAY_S - 60, "yesterday": DAY_S + 60}
    for id, age_s in ages_s.items():
        created_at = now - timedelta(seconds=age_s)
        await store.update(id, "", put(make_job(id, owner="a", status=State.SUCCEEDED, created_at=created_at)))
    for id, status in (("queued", State.QUEUED), ("running", State.RUNNING)):
        await store.update(id, "", put(make_job(id, owner="a", status=status, created_at=now - timedelta(days=9))))
    with pytest.raises(QuotaExceeded, match="2 jobs that are not over, of 2"):
        await store.create(make_job("new", owner="a"), Quota(unfinished=2, per_day=9))
    with pytest.raises(QuotaExceeded, match="1 jobs within 24 hours, of 1"):
        await store.create(make_job("new", owner="a"), Quota(unfinished=3, per_day=1))
    assert await store.get("new") is None
    for owner in ("b", ""):
        assert (await store.create(make_job(f"of-{owner}", owner=owner), Quota(unfinished=1, per_day=1)))[1]
    assert (await store.create(make_job("of-none", owner=""), Quota(unfinished=0, per_day=0)))[1], "no key, no quota"
    await store.delete("today")
    assert (await store.create(make_job("new", owner="a"), Quota(unfinished=3, per_day=1)))[1]


async def test_ahead_are_the_queued_jobs_of_the_variant_that_are_older(store: JobStore) -> None:
    def waiting(id: str, second: float, **changes: Any) -> Job:
        return make_job(id, created_at=at(second), variant="sdxl", **changes)

    mine = waiting("mine", 5)
    records = [
        mine,
        waiting("older", 1),
        waiting("just-older", 4.999999, owner="a"),
        waiting("same", 5),
        waiting("younger", 6),
        waiting("running", 1, status=State.RUNNING),
        waiting("over", 1, status=State.FAILED),
        waiting("elsewhere", 1).evolve(variant="telea"),
    ]
    for job in records:
        await store.update(job.id, "", put(job))
    assert await store.ahead(mine) == 2
    await store.delete("older")
    assert await store.ahead(mine) == 1


def place(job: Job) -> tuple[datetime, str]:
    return job.created_at, job.id


async def test_pages_have_every_job_once_in_order(store: JobStore) -> None:
    seconds = {"a": 2, "b": 2, "c": 2, "d": 1, "e": 3, "f": 2, "g": 2}
    for id, second in seconds.items():
        await store.update(id, "", put(make_job(id, created_at=at(second), owner="x" if id in "acef" else "y")))

    async def paged(**which: Any) -> list[str]:
        found: list[Job] = []
        while page := await store.list(limit=2, before=place(found[-1]) if found else None, **which):
            found += page
        return [job.id for job in found]

    assert await paged() == ["e", "g", "f", "c", "b", "a", "d"]
    assert await paged(owner="x") == ["e", "f", "c", "a"]
    assert await paged(owner="x", status=State.QUEUED, type="inpaint") == ["e", "f", "c", "a"]
    assert await paged(owner="z") == []
    # A job that is gone keeps its place.
    cursor = (await store.list(limit=4))[-1]
    await store.delete(cursor.id)
    assert [job.id for job in await store.list(before=place(cursor))] == ["b", "a", "d"]


async def test_jobs_that_came_as_messages_are_listed_by_no_owner(store: JobStore) -> None:
    await store.create(make_job("posted", owner="a"))
    await claimed(store, make_job("message"))
    assert [job.id for job in await store.list(owner="")] == ["message"]
    assert [job.id for job in await store.list(owner="a", lock_key=KEY)] == ["posted"]


# The store's clock


async def test_a_change_is_told_the_stores_present_time(store: JobStore) -> None:
    seen: list[datetime] = []

    def look(_job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
        seen.append(now)
        return (make_job(),)

    before = await store.now()
    await store.update("edit-1", KEY, look)
    after = await store.now()
    assert before <= seen[-1] <= after
    assert {moment.utcoffset() for moment in (before, seen[-1], after)} == {timedelta(0)}


@pytest.fixture
def hosts(jobs_url: str, opened: Opened) -> Sequence[JobStore]:
    """The store as three hosts use it whose clocks are a minute apart. SQLite and memory have one machine's only."""
    if not jobs_url.startswith("postgresql:"):
        return [opened(adapters.job_store(jobs_url)) for _ in range(3)]
    skews = (timedelta(0), timedelta(minutes=1), timedelta(minutes=-1))
    return [opened(SqlJobStore(jobs_url, clock=lambda skew=skew: utc_now() + skew)) for skew in skews]


@pytest.mark.slow
async def test_a_lease_is_as_long_for_every_host(hosts: Sequence[JobStore]) -> None:
    for i, host in enumerate(hosts):
        change = jobs_claims.claim(make_job(f"edit-{i}", session_id=f"s{i}"), lease_s=0.02, max_attempts=5)
        before = await hosts[0].now()
        job = await host.update(f"edit-{i}", f"u/s{i}", change)
        assert job.started_at and job.lease_until and job.created_at == job.started_at
        assert before <= job.started_at <= await hosts[0].now()
        assert job.lease_until - job.started_at == timedelta(seconds=0.02)
        while await hosts[0].now() <= job.lease_until:
            await asyncio.sleep(0.005)
        for other in hosts:
            job = await other.update(job.id, job.lock_key, change)
            assert job.lease_until
            while await other.now() <= job.lease_until:
                await asyncio.sleep(0.005)
        assert job.attempt == 1 + len(hosts), "no host keeps a dead claim"


async def test_no_host_takes_a_live_lease_over(hosts: Sequence[JobStore]) -> None:
    change = jobs_claims.claim(make_job(), lease_s=50, max_attempts=5)
    for host in hosts:
        job = await host.update("edit-1", KEY, change)
        for other in hosts:
            with pytest.raises(Busy) as caught:
                await other.update("edit-1", KEY, change)
            assert 0 < caught.value.details["retry_after_s"] <= 50
            renewed = await other.update("edit-1", KEY, jobs_claims.renew(jobs_claims.claim_of(job), lease_s=50))
            assert renewed.lease_until and job.lease_until and renewed.lease_until >= job.lease_until
        await host.update("edit-1", KEY, jobs_claims.requeue(jobs_claims.claim_of(job)))


async def test_the_document_of_the_job_claimed_later_stands_whichever_hosts_clock_is_ahead(
    hosts: Sequence[JobStore], mirror: SessionMirror
) -> None:
    for i, host in enumerate(hosts):
        change = jobs_claims.claim(make_job(f"edit-{i}"), lease_s=60, max_attempts=5)
        job = await host.update(f"edit-{i}", KEY, change)
        await mirror.write_session(job, {"by": i})
        document = await mirror.read_session("u", "s")
        assert document and document["by"] == i
        await host.update(job.id, KEY, jobs_claims.finish(jobs_claims.claim_of(job), Cause.SUCCEEDED))


# Cancellations


async def test_a_cancellation_holds_until_its_moment(cancellations: JobStore) -> None:
    assert await cancellations.canceled_until(KEY) is None
    for given, then in ((5.000001, 5.000001), (4, 5.000001), (6, 6)):
        await cancellations.cancel_until(KEY, at(given))
        assert await cancellations.canceled_until(KEY) == at(then)
    assert await cancellations.canceled_until("u/s2") is None


async def test_the_latest_of_many_cancellations_holds(jobs_url: str, opened: Opened, crowd: int) -> None:
    stores = [opened(adapters.job_store(jobs_url)) for _ in range(crowd)]
    # Several times: only the first finds the connections closed.
    for round in range(3):
        key = f"u/s{round}"
        await asyncio.gather(*(store.cancel_until(key, at(crowd - i)) for i, store in enumerate(stores)))
        assert await stores[0].canceled_until(key) == at(crowd)


async def test_cancellations_are_kept_beside_the_jobs(store: JobStore, cancellations: JobStore) -> None:
    await cancellations.cancel_until(KEY, at(5))
    assert list(await store.list()) == []
    await claimed(store, make_job())
    assert await cancellations.canceled_until(KEY) == at(5)


# Session documents


def running(id: str, fence: int, second: float | None) -> Job:
    return make_job(id, fence=fence, status=State.RUNNING, started_at=None if second is None else at(second))


def ended(id: str, fence: int, second: float) -> Job:
    return running(id, fence, second).evolve(status=State.SUCCEEDED, finished_at=at(second + 1))


async def test_documents_merge_field_by_field(mirror: SessionMirror) -> None:
    assert await mirror.read_session("u", "s") is None
    await mirror.write_session(running("a", 1, 10), {"processingStatus": "processing", "jobId": "a"})
    await mirror.write_session(running("a", 1, 10), {"processingProgress": 0.5, "processingError": None})
    assert await mirror.read_session("u", "s") == {
        "processingStatus": "processing",
        "jobId": "a",
        "processingProgress": 0.5,
        "processingError": None,
    }
    await mirror.write_session(running("a", 1, 10), {"processingError": {"code": "x", "message": "y"}})
    await mirror.write_session(running("a", 1, 10), {"processingError": {"code": "z"}})
    document = await mirror.read_session("u", "s")
    assert document and document["processingError"] == {"code": "z"}, "a field is replaced whole"
    assert await mirror.read_session("u", "s2") is None
    assert await mirror.read_session("u2", "s") is None


async def test_of_many_writes_the_newest_claims_counts(jobs_url: str, opened: Opened, crowd: int) -> None:
    mirrors = [opened(adapters.job_store(jobs_url)) for _ in range(crowd)]
    # There is no document at first, and then there is one.
    for fences in (range(crowd), range(2 * crowd, crowd, -1)):
        writes = (each.write_session(running("a", i, i), {"by": i}) for i, each in zip(fences, mirrors, strict=True))
        await asyncio.gather(*writes)
        assert await mirrors[0].read_session("u", "s") == {"by": max(fences)}


WRITES: list[tuple[str, Job, Job, str]] = [
    ("an older claim of the same job", running("a", 2, 20), running("a", 1, 10), "first"),
    ("a newer claim of the same job", running("a", 1, 10), running("a", 2, 20), "second"),
    ("the same claim again", running("a", 1, 10), running("a", 1, 10), "second"),
    ("a cancellation, which raises the number", running("a", 2, 10), running("a", 1, 10), "first"),
    ("a job that was claimed before", running("b", 1, 20), running("a", 5, 10), "first"),
    ("a job that was claimed later", running("a", 5, 10), running("b", 1, 20), "second"),
    ("a later job that was never claimed", running("a", 1, -10), running("b", 0, None), "second"),
    ("an earlier job that was never claimed", running("a", 1, 10), running("b", 0, None), "first"),
    ("a claim of which it is said how it ended", ended("a", 1, 10), running("a", 1, 10), "first"),
    ("how that ended, told again", ended("a", 1, 10), ended("a", 1, 10), "second"),
    ("a new claim of a job that ended", ended("a", 1, 10), running("a", 2, 20), "second"),
]


@pytest.mark.parametrize(("first", "second", "wins"), [row[1:] for row in WRITES], ids=[row[0] for row in WRITES])
async def test_a_stale_worker_cannot_write(mirror: SessionMirror, first: Job, second: Job, wins: str) -> None:
    await mirror.write_session(first, {"by": "first"})
    await mirror.write_session(second, {"by": "second"})
    assert await mirror.read_session("u", "s") == {"by": wins}


async def test_of_many_first_writes_the_latest_claims_stands(jobs_url: str, opened: Opened, crowd: int) -> None:
    mirrors = [opened(adapters.job_store(jobs_url)) for _ in range(crowd)]
    for round in range(3):
        job = make_job("a", session_id=f"s{round}", status=State.RUNNING)
        writes = [(mirror, job.evolve(fence=crowd - i, started_at=at(crowd - i))) for i, mirror in enumerate(mirrors)]
        await asyncio.gather(*(mirror.write_session(claim, {"by": claim.fence}) for mirror, claim in writes))
        assert await mirrors[0].read_session("u", f"s{round}") == {"by": crowd}


async def test_a_job_that_was_never_claimed_does_not_shut_out_the_one_that_runs(mirror: SessionMirror) -> None:
    await mirror.write_session(running("a", 1, -10), {"by": "a"})
    await mirror.write_session(running("b", 1, None), {"by": "b"})
    await mirror.write_session(running("a", 1, -10), {"by": "a again"})
    assert await mirror.read_session("u", "s") == {"by": "a again"}
    await mirror.write_session(running("a-before", 1, -20), {"by": "a stale one"})
    assert await mirror.read_session("u", "s") == {"by": "a again"}
