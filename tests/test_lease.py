"""The keeper of a claim, by a monotonic clock that the test moves on: how long it believes in the claim, and what it
does meanwhile."""

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.adapters.memory import MemoryJobStore
from serve_app.edit.session import session_document
from serve_app.errors import Busy, Canceled, DeadlineExceeded, StaleClaim, StoreUnavailable
from serve_app.jobs import claims, lease
from serve_app.jobs.lease import Lease
from serve_app.jobs.record import Job
from serve_app.models import Progress
from serve_app.settings import Work

from .backends import make_job, until
from .rig import QUICK, Clock, Outage

#: Renewals are further apart than a test waits for anything: none comes by itself.
WORK = Work(lease_s=600.0, renew_s=200.0)


class Host:
    """A host's monotonic clock, and its keeper of a claim that a test may ruin."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.clock, self.ahead_s = name, Clock(), 0.0
        monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=self.monotonic))
        self.jobs = Outage(MemoryJobStore(f"memory:{name}", self.clock), StoreUnavailable)
        self.mirror = Outage(MemoryJobStore(f"memory:{name}"), StoreUnavailable)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def pass_s(self, seconds: float) -> None:
        """For the host and the store."""
        self.ahead_s += seconds
        self.clock.advance(seconds)

    async def claim(self, **changes: Any) -> Job:
        job = make_job(**changes)
        found: Job = await self.jobs.update(job.id, job.lock_key, claims.claim(job, lease_s=600, max_attempts=5))
        return found

    def keeper(self, job: Job, claimed_at: float | None = None) -> Lease:
        at = self.monotonic() if claimed_at is None else claimed_at
        return Lease(job, store=self.jobs, show=self.show, work=WORK, claimed_at=at, pace=QUICK)

    async def show(self, job: Job) -> None:
        await self.mirror.write_session(job, session_document(job))

    async def looks(self, method: str, times: int = 2) -> None:
        """Wait until the keeper has called the store's method so many times more."""
        before = self.jobs.calls[method]
        await until(lambda: self.jobs.calls[method] >= before + times)


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(request.node.name, monkeypatch)


async def forever() -> None:
    await asyncio.Event().wait()


def moves(host: Host, seconds: float) -> Callable[[], Any]:
    async def answer_late() -> None:
        host.pass_s(seconds)

    return answer_late


# How long a claim is believed in


@pytest.mark.slow
async def test_a_lease_counts_from_before_the_renewal_was_sent(host: Host) -> None:
    """The answer took 500 s; what it promises is 100 s more."""
    holding = asyncio.create_task(host.keeper(await host.claim()).guard(forever()))
    await host.looks("get")
    host.jobs.after["update"] = moves(host, 500)
    host.pass_s(200)
    await host.looks("update", 1)
    host.jobs.is_down = True
    host.pass_s(50)
    await host.looks("update")
    assert not holding.done(), "it may come back in time"
    host.pass_s(60)
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(10):
            await holding


async def test_a_lease_counts_from_before_the_claim_was_sent(host: Host) -> None:
    asked_at = host.monotonic()
    job = await host.claim()
    host.pass_s(610)
    host.jobs.is_down = True
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(10):
            await host.keeper(job, asked_at).guard(forever())


@pytest.mark.slow
async def test_a_renewal_makes_the_lease_last_from_then_on(host: Host) -> None:
    holding = asyncio.create_task(host.keeper(await host.claim()).guard(forever()))
    await host.looks("get")
    host.pass_s(200)
    await host.looks("update", 1)
    await host.looks("get")
    host.jobs.is_down = True
    host.pass_s(450)
    await host.looks("update")
    assert not holding.done(), "650 s after the claim, 450 s after the renewal"
    holding.cancel()
    await asyncio.wait({holding})


@pytest.mark.slow
async def test_a_missed_renewal_is_made_up_for_before_the_lease_ends(host: Host) -> None:
    holding = asyncio.create_task(host.keeper(await host.claim()).guard(forever()))
    await host.looks("get")
    host.jobs.is_down, host.jobs.only = True, {"update"}
    host.pass_s(200)
    await host.looks("update", 1)
    host.jobs.is_down = False
    await host.looks("update", 1)
    host.pass_s(190)
    with pytest.raises(Busy):
        await host.claim()
    job = await host.jobs.get("edit-1")
    assert job.lease_until == host.clock() + timedelta(seconds=410), "renewed at once, and not when the next was due"
    host.pass_s(5)
    await host.looks("get", 3)
    assert not holding.done()
    holding.cancel()
    await asyncio.wait({holding})


@pytest.mark.slow
async def test_a_renewal_that_succeeded_is_not_made_again_before_its_time(host: Host) -> None:
    holding = asyncio.create_task(host.keeper(await host.claim()).guard(forever()))
    await host.looks("get")
    host.pass_s(200)
    await host.looks("update", 1)
    before = host.jobs.calls["update"]
    host.pass_s(150)
    await host.looks("get", 3)
    assert host.jobs.calls["update"] == before
    holding.cancel()
    await asyncio.wait({holding})


# How a claim is lost


class Painting:
    """An attempt that takes its time to stop."""

    def __init__(self) -> None:
        self.has_stopped = False

    async def __call__(self) -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(0.05)
            self.has_stopped = True


async def test_a_cancellation_is_seen_between_renewals(host: Host) -> None:
    job, painting = await host.claim(), Painting()
    holding = asyncio.create_task(host.keeper(job).guard(painting()))
    await host.looks("get", 1)
    await host.jobs.update(job.id, job.lock_key, claims.cancel)
    with pytest.raises(Canceled):
        async with asyncio.timeout(10):
            await holding
    assert painting.has_stopped
    assert host.jobs.calls["update"] == 2, "the claim and the cancellation: no renewal was due"


async def test_a_painting_is_stopped_before_its_lost_claim_is_told_of(host: Host) -> None:
    painting = Painting()
    holding = asyncio.create_task(host.keeper(await host.claim()).guard(painting()))
    await host.looks("get", 1)
    host.clock.advance(601)
    assert (await host.claim()).fence == 2
    with pytest.raises(StaleClaim):
        async with asyncio.timeout(10):
            await holding
    assert painting.has_stopped


# Progress


@pytest.mark.slow
async def test_the_session_is_shown_one_progress_at_a_time_and_then_the_latest(host: Host) -> None:
    keeper, go_on = host.keeper(await host.claim()), asyncio.Event()

    async def hang() -> None:
        await go_on.wait()

    host.mirror.before["write_session"] = hang
    holding = asyncio.create_task(keeper.guard(forever()))
    for step in (1, 2, 3):
        await keeper.note(Progress(step=step, steps=4))
        await host.looks("report", 1)
        await host.looks("get")
    assert host.mirror.calls["write_session"] == 1, "the first has not been shown yet"
    go_on.set()
    async with asyncio.timeout(10):
        while (await host.mirror.read_session("u", "s") or {}).get("processingProgress") != 0.75:
            await asyncio.sleep(0.01)
    assert host.mirror.calls["write_session"] == 2
    holding.cancel()
    await asyncio.wait({holding})


# The deadline


@pytest.mark.parametrize("since_the_claim_s", [30.0, 31.0])
async def test_a_deadline_is_counted_from_the_claim_by_the_stores_clock(host: Host, since_the_claim_s: float) -> None:
    asked_at = host.monotonic()
    job = await host.claim(deadline=host.clock() + timedelta(seconds=30))
    host.ahead_s += since_the_claim_s
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(10):
            await host.keeper(job, asked_at).guard(forever())


async def test_a_deadline_that_moves_is_the_newest(host: Host) -> None:
    job = await host.claim(deadline=host.clock() + timedelta(seconds=30))
    holding = asyncio.create_task(host.keeper(job).guard(forever()))
    host.clock.advance(29)
    await host.jobs.update(job.id, job.lock_key, claims.attend(30))
    await host.looks("get")
    host.ahead_s += 31
    await host.looks("get")
    assert not holding.done()
    host.ahead_s += 30
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(10):
            await holding


async def test_a_deadline_may_have_moved_while_the_store_was_down(host: Host) -> None:
    """Another process, which it answers, attends the job meanwhile."""
    job = await host.claim(deadline=host.clock() + timedelta(seconds=30))
    holding = asyncio.create_task(host.keeper(job).guard(forever()))
    await host.looks("get")
    host.jobs.is_down = True
    host.pass_s(29)
    await MemoryJobStore(f"memory:{host.name}").update(job.id, job.lock_key, claims.attend(30))
    host.pass_s(2)
    await host.looks("get")
    host.jobs.is_down = False
    await host.looks("get")
    assert not holding.done()
    host.pass_s(30)
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(10):
            await holding


async def test_a_deadline_that_comes_late_ends_the_job(host: Host) -> None:
    job = await host.claim()
    holding = asyncio.create_task(host.keeper(job).guard(forever()))
    await host.jobs.update(job.id, job.lock_key, claims.attend(30))
    await host.looks("get")
    host.ahead_s += 31
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(10):
            await holding


async def test_a_job_goes_on_until_its_deadline(host: Host) -> None:
    job = await host.claim(deadline=host.clock() + timedelta(seconds=30))

    async def paint() -> str:
        await host.looks("get")
        return "painted"

    assert await host.keeper(job).guard(paint()) == "painted"


async def test_what_is_left_until_the_deadline_follows_a_deadline_that_moves(host: Host) -> None:
    """Who waits for a job moves it."""
    job = await host.claim(deadline=host.clock() + timedelta(seconds=30))
    keeper = host.keeper(job)
    host.pass_s(10)
    assert 19 < keeper.left_s() <= 20
    guarded = asyncio.create_task(keeper.guard(forever()))
    await host.jobs.update(job.id, job.lock_key, claims.attend(90))
    await until(lambda: keeper.left_s() > 30)
    assert 89 < keeper.left_s() <= 90
    guarded.cancel()
    await asyncio.wait({guarded})


async def test_without_a_deadline_there_is_no_end(host: Host) -> None:
    assert host.keeper(await host.claim()).left_s() == float("inf")
