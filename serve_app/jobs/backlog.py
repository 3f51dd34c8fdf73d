"""How many messages wait, and how many replicas they call for.

Every ingress reads the backlog and reports what it knows; `wanted` decides from all reports together. It knows nothing
of Ray: `deployments.scaling` asks it, in Ray's controller.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import Unavailable
from ..settings import BacklogSettings
from ..telemetry import Metrics

log = logging.getLogger(__name__)

#: How long one reading may take, in seconds.
READ_S = 10.0
#: Weight of the latest message in the mix: the last 20 messages or so decide.
MIX_WEIGHT = 0.05
#: Weight of the latest job in the seconds that a job takes.
JOB_WEIGHT = 0.2
#: A model with a smaller share in the mix has no messages that anyone has seen lately.
TRACE = 0.01
#: Messages of a model in flight that may be neither at a replica nor waiting for one; see `Settings.share`.
ON_THEIR_WAY = 2
#: Beyond any number of jobs or replicas; keeps infinity out of the arithmetic.
_MANY = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the subscriptions held at one moment: messages waiting or being worked on."""

    messages: float
    #: Of the oldest message, in seconds.
    oldest_age_s: float
    #: Seconds since 1970.
    taken_at: float


class Backlog(Protocol):
    async def read(self) -> Reading:
        """The latest reading of all subscriptions together, which may be minutes old. Raises BrokerUnavailable where
        one has none: that is no proof of an empty queue."""


class BacklogWatch:
    """An ingress's latest reading. A failed attempt leaves it as it is, so that it grows old."""

    def __init__(
        self,
        backlog: Backlog | None,
        settings: BacklogSettings,
        metrics: Metrics,
        *,
        empty_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Without a `backlog` there are no readings. `empty_s` is what a `Report` has of that name."""
        self._backlog, self._settings, self._metrics, self._empty_s = backlog, settings, metrics, empty_s
        self._error = ""
        self.reading: Reading | None = None

    async def run(self) -> None:
        """Read and show the metrics, for ever."""
        while True:
            if self._backlog is not None:
                await self._read(self._backlog)
                self._show()
            await asyncio.sleep(self._settings.read_every_s)

    async def _read(self, backlog: Backlog) -> None:
        try:
            self.reading, self._error = await asyncio.wait_for(backlog.read(), READ_S), ""
        except (Unavailable, TimeoutError) as e:
            if self._error != (error := str(e) or "no answer"):
                log.warning("Could not read the backlog: %s", error, extra={"action": "backlog_unknown"})
            self._error = error

    def _show(self) -> None:
        now, reading = time.time(), self.reading
        # Cloud Monitoring may have no points of a subscription that has been empty for long.
        is_known = self._empty_s() >= self._settings.quiet_s or is_trusted(reading, now, self._settings.trust_s)
        self._metrics.put("fluxfill_backlog_trusted", float(is_known))
        if reading is not None:
            self._metrics.put("fluxfill_backlog_reading_age_seconds", max(0.0, now - reading.taken_at))
            self._metrics.put("fluxfill_backlog_messages", reading.messages)
            self._metrics.put("fluxfill_backlog_oldest_age_seconds", reading.oldest_age_s)


@dataclass(slots=True)
class Recent:
    """What an ingress has seen lately, by variant or generator."""

    #: Share of each in the messages, redelivered ones included.
    mix: dict[str, float] = field(default_factory=dict)
    #: Seconds that a replica of each works on a job.
    job_s: dict[str, float] = field(default_factory=dict)

    def message(self, variant: str) -> None:
        weight = MIX_WEIGHT if self.mix else 1.0
        self.mix = {name: share * (1 - weight) for name, share in self.mix.items()}
        self.mix[variant] = self.mix.get(variant, 0.0) + weight

    def job(self, variant: str, seconds: float) -> None:
        last = self.job_s.get(variant, seconds)
        self.job_s[variant] = last + JOB_WEIGHT * (seconds - last)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one ingress knows, or all of them together. Mappings are by deployment."""

    reading: Reading | None
    #: How long pulls that had room have brought nothing, in seconds; 0 while they bring messages, or fail.
    empty_s: float
    #: Messages in flight.
    held: Mapping[str, float]
    #: Share in the messages seen lately.
    mix: Mapping[str, float]
    #: Seconds that a replica works on a job.
    job_s: Mapping[str, float]
    target_drain_s: float
    trust_s: float
    quiet_s: float


def together(reports: Sequence[Report]) -> Report | None:
    """One report for all: None where there is none."""
    if not reports:
        return None
    names = {name for report in reports for name in report.held}
    readings = [report.reading for report in reports if report.reading is not None]
    first = reports[0]
    return Report(
        reading=max(readings, key=lambda reading: reading.taken_at, default=None),
        empty_s=min(report.empty_s for report in reports),
        held={name: sum(report.held.get(name, 0.0) for report in reports) for name in names},
        mix={name: sum(report.mix.get(name, 0.0) for report in reports) / len(reports) for name in names},
        job_s={name: max(report.job_s.get(name, 0.0) for report in reports) for name in names},
        target_drain_s=first.target_drain_s,
        trust_s=first.trust_s,
        quiet_s=first.quiet_s,
    )


def is_trusted(reading: Reading | None, now: float, trust_s: float) -> bool:
    return reading is not None and abs(now - reading.taken_at) <= trust_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicas:
    """One deployment as Serve sees it."""

    name: str
    running: int
    target: int
    min: int
    max: int
    #: Requests at its replicas and in the handles to it.
    requests: float
    #: Requests in flight per replica that are aimed at.
    target_ongoing: float
    #: What Serve's own policy wants.
    plain: float


def wanted(replicas: Replicas, report: Report | None, now: float) -> int:
    """How many replicas a deployment should have. Never raises; never fewer, within its limits, than Serve's own
    policy wants; and never none because of what is not known.

    More messages, older messages or more requests never mean fewer replicas.
    """
    most, least = _ceil(replicas.plain), 0
    if report is not None:
        most = max(most, _for_jobs(replicas, report, now))
    if replicas.target > 0 and not _is_idle(replicas.name, report, now):
        least = 1
    return max(replicas.min, min(replicas.max, max(most, least)))


def _for_jobs(replicas: Replicas, report: Report, now: float) -> int:
    """Replicas that end the jobs in flight and the hidden ones in time: the oldest message should be done within
    `target_drain_s` of its publication."""
    held, job_s = _number(report.held.get(replicas.name, 0.0)), _number(report.job_s.get(replicas.name, 0.0))
    hidden = _hidden(replicas.name, report, now)
    age_s = _number(report.reading.oldest_age_s) if report.reading is not None and hidden else 0.0
    left_s = max(_number(report.target_drain_s) - age_s, job_s, 1.0)
    for_all = _ceil((max(_number(replicas.requests), held) + hidden) * job_s / left_s)
    # Where none runs, Serve's own policy wants one for any number of requests, and learns slowly that there are more.
    at_replicas = held - ON_THEIR_WAY if replicas.running else held
    return max(for_all, _ceil(at_replicas / (_number(replicas.target_ongoing) or 1.0)))


def _hidden(name: str, report: Report, now: float) -> float:
    """Messages of the deployment that no ingress has, as far as is known."""
    if report.reading is None or _is_quiet(report) or not is_trusted(report.reading, now, report.trust_s):
        return 0.0
    others = _number(report.reading.messages) - sum(map(_number, report.held.values()))
    hidden = max(0.0, others) * min(1.0, _number(report.mix.get(name, 0.0)))
    return hidden if _is_seen(name, report) and hidden >= 0.5 else 0.0


def _is_quiet(report: Report) -> bool:
    """A pull that has room and brings nothing is a better proof of an empty queue than a reading, which may be late."""
    return report.empty_s >= report.quiet_s


def _is_seen(name: str, report: Report) -> bool:
    return _number(report.mix.get(name, 0.0)) >= TRACE


def _is_idle(name: str, report: Report | None, now: float) -> bool:
    """Whether it is known that no messages of the deployment wait."""
    if report is None:
        return False
    if _is_quiet(report) or not _is_seen(name, report):
        return True
    return is_trusted(report.reading, now, report.trust_s) and not _hidden(name, report, now)


def _number(value: float) -> float:
    """`value` within 0 and a billion; 0 for what is not a number."""
    return min(value, _MANY) if value > 0 else 0.0


def _ceil(value: float) -> int:
    return math.ceil(_number(value))
