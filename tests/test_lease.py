"""The keeper of a claim, by a monotonic clock that the test moves on: how long it believes in the claim, and what it
does meanwhile."""

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app import jobs, lease
from serve_app.adapters.memory import MemoryJobStore, MemorySessionMirror
from serve_app.errors import DeadlineExceeded, StoreUnavailable
from serve_app.jobs import Job
from serve_app.lease import Lease
from serve_app.settings import Work

from .backends import make_job, until
from .rig import Clock, Outage

WORK = {"lease_s": 60.0, "renew_s": 20.0, "cancel_poll_s": 0.05, "progress_s": 0.05, "mirror_s": 0.05}


class Host:
    """A host's monotonic clock, and its keeper of a claim that a test may ruin."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.ahead_s = Clock(), 0.0
        monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=self.monotonic))
        self.jobs = Outage(MemoryJobStore(f"memory:{name}", self.clock), StoreUnavailable)
        self.mirror = Outage(MemorySessionMirror(f"memory:{name}"), StoreUnavailable)
        self.work = Work(**WORK)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def pass_s(self, seconds: float) -> None:
        """For the host and the store."""
        self.ahead_s += seconds
        self.clock.advance(seconds)

    async def claim(self, **changes: Any) -> Job:
        job = make_job(**changes)
        found: Job = await self.jobs.update(job.id, job.session_key, jobs.claim(job, lease_s=60, max_attempts=5))
        return found

    def keeper(self, job: Job, claimed_at: float | None = None) -> Lease:
        at = self.monotonic() if claimed_at is None else claimed_at
        return Lease(job, store=self.jobs, mirror=self.mirror, work=self.work, claimed_at=at)

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


async def test_a_lease_counts_from_before_the_renewal_was_sent(host: Host) -> None:
    """The answer took 50 s; what it promises is 10 s more."""
    holding = asyncio.create_task(host.keeper(await host.claim()).hold(forever()))
    await host.looks("get")
    host.jobs.after["update"] = moves(host, 50)
    host.pass_s(20)
    await host.looks("update", 1)
    host.jobs.is_down = True
    host.pass_s(5)
    await host.looks("update")
    assert not holding.done(), "it may come back in time"
    host.pass_s(6)
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(10):
            await holding


async def test_a_lease_counts_from_before_the_claim_was_sent(host: Host) -> None:
    asked_at = host.monotonic()
    job = await host.claim()
    host.pass_s(61)
    host.jobs.is_down = True
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(10):
            await host.keeper(job, asked_at).hold(forever())


# The deadline


@pytest.mark.parametrize("since_the_claim_s", [30.0, 31.0])
async def test_a_deadline_is_counted_from_the_claim_by_the_stores_clock(host: Host, since_the_claim_s: float) -> None:
    asked_at = host.monotonic()
    job = await host.claim(deadline=host.clock() + timedelta(seconds=30))
    host.ahead_s += since_the_claim_s
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(10):
            await host.keeper(job, asked_at).hold(forever())


async def test_a_job_goes_on_until_its_deadline(host: Host) -> None:
    job = await host.claim(deadline=host.clock() + timedelta(seconds=30))

    async def paint() -> str:
        await host.looks("get")
        return "painted"

    assert await host.keeper(job).hold(paint()) == "painted"
