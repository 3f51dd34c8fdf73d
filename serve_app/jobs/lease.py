"""Keeps a claim while its job runs: renews the lease, notices a cancellation, passes progress on."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, stop_never, wait_random_exponential

from ..errors import Canceled, DeadlineExceeded, FluxFillError, StaleClaim, StoreUnavailable
from ..models import Progress
from ..settings import Work
from . import claims
from .ports import JobStore
from .record import Job, State

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How often a lease looks and writes, in seconds, beside renewing the claim. Only tests change it."""

    #: Between two checks for a cancellation.
    cancel_poll_s: float = 1.0
    #: The shortest time between two progress reports to the job store.
    progress_s: float = 0.5
    #: The shortest time between two writes of the session document: Firestore sustains one a second.
    mirror_s: float = 2.0


class Lease:
    """The keeper of one running job's claim."""

    def __init__(
        self,
        job: Job,
        *,
        store: JobStore,
        work: Work,
        claimed_at: float,
        show: Callable[[Job], Awaitable[None]] | None = None,
        pace: Pace | None = None,
    ) -> None:
        """`claimed_at` is the moment on the monotonic clock before the store was asked for the claim. `show` is given
        the job with its progress at the start, and then at its own pace."""
        self._job, self._claim = job, claims.claim_of(job)
        self._store, self._show_job, self._work, self._pace = store, show, work, pace or Pace()
        self._claimed_at = claimed_at
        self._latest = self._reported = self._mirrored = Progress()
        #: On the monotonic clock, before the store was asked: its lease ends no earlier than `lease_s` after it.
        self._renewed_at = claimed_at
        self._showing: asyncio.Future[None] | None = None
        #: As it was last seen: who waits for a job moves it.
        self._deadline = job.deadline

    async def guard(self, attempt: Awaitable[T]) -> T:
        """Await `attempt` while the claim holds; stop it, and wait until it has stopped, when it does not.

        Raises what `attempt` raises; Canceled when a user canceled the job; StaleClaim when another worker took it;
        StoreUnavailable when the lease ran out unrenewed; DeadlineExceeded when the job's deadline passed.
        """
        painting: asyncio.Future[T] = asyncio.ensure_future(attempt)
        keeping = asyncio.create_task(self._keep())
        self._showing = asyncio.ensure_future(self._show())
        both: set[asyncio.Future[Any]] = {painting, keeping}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not painting.done():
                keeping.result()
            return painting.result()
        finally:
            try:
                await _stop(painting)
            finally:
                await _stop(keeping)
                await _stop(self._showing)

    async def note(self, progress: Progress) -> None:
        """Remember the latest progress; the keeper passes it on at its own pace."""
        self._latest = progress

    def left_s(self) -> float:
        """Seconds until the job's deadline; infinite without one."""
        if self._deadline is None or self._job.started_at is None:
            return inf
        # From the claim to the deadline by the store's clock, and since the claim by this host's monotonic one.
        whole_s = (self._deadline - self._job.started_at).total_seconds()
        return whole_s - (time.monotonic() - self._claimed_at)

    async def confirm(self) -> None:
        """Renew now, before a write that only the claim's holder may do. Insists for as long as the lease can last.

        Raises StaleClaim, Canceled, StoreUnavailable.
        """
        with suppress(StoreUnavailable):
            await self._report()
        await retry_unavailable(self._renew, self._work.lease_s)

    async def _keep(self) -> None:
        assert self._showing is not None
        renewal, look = _Every(self._work.renew_s), _Every(self._pace.cancel_poll_s)
        report, mirror = _Every(self._pace.progress_s), _Every(self._pace.mirror_s)
        tick_s = max(0.05, min(self._work.renew_s, self._pace.cancel_poll_s, self._pace.progress_s))
        while True:
            await asyncio.sleep(tick_s)
            try:
                if renewal.is_due():
                    await self._renew()
                elif look.is_due():
                    self._check(await self._store.get(self._claim.job_id))
                if report.is_due():
                    await self._report()
                if mirror.is_due() and self._latest != self._mirrored and self._showing.done():
                    self._showing = asyncio.ensure_future(self._show())
            except StoreUnavailable:
                # A store that is down for less than a lease costs nothing; after that the job may be another's.
                if time.monotonic() - self._renewed_at > self._work.lease_s:
                    raise
                if time.monotonic() - self._renewed_at >= self._work.renew_s:
                    renewal.make_due()

    async def _renew(self) -> None:
        change, asked_at = claims.renew(self._claim, lease_s=self._work.lease_s), time.monotonic()
        try:
            await self._store.update(self._claim.job_id, self._claim.lock_key, change)
        except StaleClaim as e:
            raise _why(e) from e
        self._renewed_at = asked_at

    def _check(self, job: Job | None) -> None:
        try:
            self._deadline = claims.check_held(job, self._claim).deadline
        except StaleClaim as e:
            raise _why(e) from e
        if self.left_s() <= 0:
            raise DeadlineExceeded(f"the deadline {self._deadline} passed while the job ran")

    async def _report(self) -> None:
        if self._latest != self._reported:
            self._reported = self._latest
            await self._store.report(self._claim, self._reported)

    async def _show(self) -> None:
        """Show that the job runs, and how far it is. Beside the keeping: a mirror that hangs or is down
        costs no lease, and what it missed is in the next write."""
        self._mirrored = self._latest
        if self._show_job is None:
            return
        try:
            await self._show_job(self._job.evolve(progress=self._mirrored))
        except FluxFillError as e:
            log.info(
                "Could not write progress to the session document: %s", e, extra={"action": "progress_not_written"}
            )


async def retry_unavailable(call: Callable[[], Awaitable[T]], for_s: float | None = None) -> T:
    """What `call` returns, tried again while the store is unavailable, for at most `for_s` seconds (None: for ever)."""
    return await AsyncRetrying(
        retry=retry_if_exception_type(StoreUnavailable),
        stop=stop_never if for_s is None else stop_after_delay(for_s),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        reraise=True,
    )(call)


class UnconfirmedClaims:
    """Claims whose store could not say whether it stored them. They are given back when it answers again, by one task
    and one at a time, so that a store that comes back is not run down by those who waited for it."""

    def __init__(self, job_store: JobStore, at_most: int = 1_000) -> None:
        """Of more than `at_most` the oldest are left to their leases' end."""
        self._jobs, self._at_most = job_store, at_most
        #: Session keys by job id and claimer, the oldest first.
        self._claims: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._giving_back: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._claims)

    def add(self, job: Job, claimer: str) -> None:
        self._claims[job.id, claimer] = job.lock_key
        if len(self._claims) > self._at_most:
            self._claims.popitem(last=False)
        if self._giving_back is None or self._giving_back.done():
            self._giving_back = asyncio.create_task(self._give_back())

    def close(self) -> None:
        if self._giving_back is not None:
            self._giving_back.cancel()

    async def _give_back(self) -> None:
        while self._claims:
            (job_id, claimer), lock_key = next(iter(self._claims.items()))
            update = partial(self._jobs.update, job_id, lock_key, claims.release(claimer))
            with suppress(FluxFillError):
                # A claim that never was stored has no job.
                await retry_unavailable(update)
            self._claims.pop((job_id, claimer), None)


def _why(e: StaleClaim) -> StaleClaim | Canceled:
    return Canceled("canceled by a user") if e.details.get("status") == State.CANCELED else e


async def _stop(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        # Read, so that asyncio does not warn of an exception never retrieved.
        task.exception()


class _Every:
    """True at most once in `period_s` seconds."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._next = time.monotonic() + period_s

    def make_due(self) -> None:
        self._next = time.monotonic()

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._period_s
        return True
