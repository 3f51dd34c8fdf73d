"""One run: publish under havoc, wait until everything is over, judge."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from serve_app.settings import Settings

from . import app
from .havoc import START_UPS_PER_KILL, Toll, havoc, start_up_s
from .proxy import Proxy
from .publishing import publish, schedule
from .records import Records, stored_results
from .sessions import Session
from .verdict import Evidence, Outcome, conflicting, is_over, outcome

out = Console(soft_wrap=True)

TWICE_SHARE = 0.2
#: What two cores can do beside starting a killed replica again every few seconds.
SESSIONS_PER_S = 2.5
LOOK_S = 5.0
#: After all is over: time for a stale worker's last write.
QUIET_S = app.LEASE_S + 2


class Run:
    def __init__(self, sessions: Sequence[Session], settings: Settings, *, s3_port: int) -> None:
        """`settings` name the servers themselves, not the proxies."""
        self._sessions, self._settings, self._s3_port = sessions, settings, s3_port
        self._messages = 0
        self._started = time.monotonic()

    async def through(self, kill: Sequence[str], stores: Sequence[Proxy], limit_s: float) -> dict[str, Any]:
        """The figures, after everything is over or `limit_s` has passed."""
        records, toll = Records(self._settings, self._sessions), Toll()
        starts_s = {deployment: await start_up_s(deployment) for deployment in kill}
        every_s = {deployment: START_UPS_PER_KILL[deployment] * starts_s[deployment] for deployment in kill}
        for deployment in kill:
            out.print(f"{deployment} starts in {starts_s[deployment]:.1f} s: killed every {every_s[deployment]:.1f} s")
        async with asyncio.TaskGroup() as tasks:
            collecting = tasks.create_task(records.collect_dead_letters())
            trouble = tasks.create_task(havoc(every_s, stores, toll))
            await self._publish_and_wait(records, toll, limit_s)
            trouble.cancel()
            duration_s = self._passed_s()
            out.print(f"No more kills. Looking again in {QUIET_S:g} s, after a stale worker's last write")
            await asyncio.sleep(QUIET_S)
            collecting.cancel()
        havoc_figures = {
            "start_up_s": {deployment: round(seconds, 1) for deployment, seconds in starts_s.items()},
            "kills": dict(toll.kills),
            "cuts": toll.cuts,
            "duration_s": round(duration_s, 1),
        }
        return {**await self._judge(records), "messages": self._messages, **havoc_figures}

    async def _publish_and_wait(self, records: Records, toll: Toll, limit_s: float) -> None:
        count = len(self._sessions)
        sendings = schedule(self._sessions, round(TWICE_SHARE * count), count / SESSIONS_PER_S)
        try:
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(publish(sendings, self._settings, self._count))
                found = await records.look()
                while not (publishing.done() and self._is_over(found)):
                    self._say(found, toll)
                    await asyncio.sleep(LOOK_S)
                    found = await records.look()
        except TimeoutError:
            out.print(f"Not over after {limit_s:g} s", style="red")

    def _count(self) -> None:
        self._messages += 1

    def _passed_s(self) -> float:
        return time.monotonic() - self._started

    def _is_over(self, found: Mapping[str, Evidence]) -> bool:
        return all(is_over(session, found[session.id]) for session in self._sessions)

    def _say(self, found: Mapping[str, Evidence], toll: Toll) -> None:
        states = Counter(str(job.status) for evidence in found.values() for job in evidence.jobs)
        letters = sum(bool(evidence.letters) for evidence in found.values())
        out.print(
            f"{self._passed_s():5.0f} s  {self._messages} messages, {dict(states)}, "
            f"{letters} dead-lettered, {toll.kills.total()} kills, {toll.cuts} cuts"
        )

    async def _judge(self, records: Records) -> dict[str, Any]:
        """The figures; what is not as it should be is printed, session by session."""
        evidence = await records.look()
        counts: Counter[Outcome] = Counter()
        for session in self._sessions:
            is_right = await records.has_right_picture(session)
            ended, why = outcome(session, evidence[session.id], has_right_picture=is_right)
            counts[ended] += 1
            if why:
                out.print(f"{ended} {session.id}: {why}", style="red")
        results = await asyncio.to_thread(stored_results, self._s3_port)
        differing = conflicting(results)
        for path in differing:
            out.print(f"conflicting {path}: stored as {', '.join(results[path])}", style="red")
        attempts = [job.attempt for found in evidence.values() for job in found.jobs]
        return {
            "sent": len(self._sessions),
            "poisoned": sum(session.poison is not None for session in self._sessions),
            **{str(ended): counts[ended] for ended in Outcome},
            "conflicting": len(differing),
            "attempts": sum(attempts),
            "most_attempts": max(attempts, default=0),
            "results_stored": sum(map(len, results.values())),
        }
