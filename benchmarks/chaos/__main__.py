"""The run: servers, app, publishing under havoc, and the verdict. See the package's docstring."""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import servers
from deployments.own_ray import free_port
from serve_app.settings import MessagesSettings, Settings

from . import app
from .havoc import Toll, havoc
from .proxy import Proxy
from .publishing import publish, schedule
from .records import Records, make_bucket, stored_results
from .sessions import MOST_SESSIONS, POISONS, Session, plan
from .verdict import Evidence, Outcome, is_over, outcome

out = Console()

TWICE_SHARE = 0.2
POISONED_SHARE = 0.05
#: Two cores can do some 4 a second beside the killing; slower, so that there is time for the kills.
SESSIONS_PER_S = 2.5
LOOK_S = 2.0
#: After all is over: time for a stale worker's last write.
QUIET_S = app.LEASE_S + 2
BROKERS = {
    "embedded": (servers.embedded_pubsub, (app.INPAINTER, app.INGRESS)),
    "google": (servers.google_pubsub, (app.INPAINTER,)),
}
PACKAGES = ("ray", "google-cloud-pubsub", "SQLAlchemy", "psycopg", "obstore", "moto")


@dataclass
class Run:
    """One run, and what is known of it so far."""

    sessions: Sequence[Session]
    records: Records
    toll: Toll
    started: float
    messages_sent: int = 0

    def sent(self, _session: Session) -> None:
        self.messages_sent += 1

    async def until_over(self) -> None:
        """Look at the records, and say how far it is, until nothing more is to happen to any session."""
        by_id = {session.id: session for session in self.sessions}
        while True:
            found = await self.records.look()
            self._say(found)
            if all(is_over(by_id[id], evidence) for id, evidence in found.items()):
                return
            await asyncio.sleep(LOOK_S)

    def _say(self, found: Mapping[str, Evidence]) -> None:
        states = Counter(str(job.status) for evidence in found.values() for job in evidence.jobs)
        letters = sum(bool(evidence.letters) for evidence in found.values())
        jobs = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        kills = " + ".join(map(str, self.toll.kills.values())) or "0"
        out.print(
            f"{time.monotonic() - self.started:5.0f} s   {self.messages_sent} messages   jobs: {jobs or 'none'}   "
            f"dead letters: {letters}   kills: {kills}   cuts: {self.toll.cuts}"
        )


def main() -> None:
    args = _arguments()
    logs: Path = args.logs
    logs.mkdir(parents=True, exist_ok=True)
    serve_broker, kill = BROKERS[args.broker]
    messages = MessagesSettings(url=f"pubsub://127.0.0.1:{free_port()}")
    with ExitStack() as stack:
        database, s3 = stack.enter_context(servers.postgres(logs)), stack.enter_context(servers.s3(logs))
        stack.enter_context(serve_broker(messages, logs))
        stack.enter_context(app.own_ray(logs))
        make_bucket(s3)
        found = asyncio.run(rehearse(args.sessions, messages, kill, database, s3, args.limit_s))
    found |= {"broker": args.broker, **context()}
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))
    sys.exit(0 if is_passed(found) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill the service's processes while it works, and count what is lost.")
    parser.add_argument("--sessions", type=int, default=500, help=f"{2 * len(POISONS)} to {MOST_SESSIONS}")
    parser.add_argument("--broker", choices=BROKERS, default="embedded")
    parser.add_argument("--limit-s", type=float, default=1800, help="give up after so many seconds")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "chaos-logs")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    args = parser.parse_args()
    if not 2 * len(POISONS) <= args.sessions <= MOST_SESSIONS:
        parser.error(f"--sessions must be {2 * len(POISONS)} to {MOST_SESSIONS}")
    return args


async def rehearse(
    count: int, messages: MessagesSettings, kill: Sequence[str], database: int, s3: int, limit_s: float
) -> dict[str, Any]:
    """Publish, kill and cut, wait, judge. The ports are the servers' own."""
    sessions = plan(count, max(len(POISONS), round(POISONED_SHARE * count)))
    async with Proxy(database) as to_database, Proxy(s3) as to_s3:
        out.print("Starting the app")
        proxied = app.settings(messages, postgres=to_database.port, s3=to_s3.port)
        await asyncio.to_thread(app.deploy, proxied)
        direct = app.settings(messages, postgres=database, s3=s3)
        records = Records(direct, sessions)
        started = time.monotonic()
        async with havoc(kill, (to_database, to_s3)) as toll:
            run = Run(sessions, records, toll, started)
            await _publish_and_wait(run, direct, limit_s)
        duration_s = time.monotonic() - started
        out.print(f"No more kills; looking again in {QUIET_S:g} s, after a stale worker's last write")
        await asyncio.sleep(QUIET_S)
        results = await asyncio.to_thread(stored_results, s3)
        found = await judged(run, results)
        await records.close()
    return {**found, "duration_s": round(duration_s, 1)}


async def _publish_and_wait(run: Run, settings: Settings, limit_s: float) -> None:
    sendings = schedule(run.sessions, round(TWICE_SHARE * len(run.sessions)), len(run.sessions) / SESSIONS_PER_S)
    try:
        async with asyncio.timeout(limit_s), asyncio.TaskGroup() as tasks:
            publishing = tasks.create_task(publish(sendings, settings, run.sent))
            await publishing
            await run.until_over()
    except TimeoutError:
        out.print(f"Not over after {limit_s:g} s")


async def judged(run: Run, results: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The figures; what is not as it should be is printed session by session."""
    evidence = await run.records.look()
    counts: Counter[Outcome] = Counter()
    for session in run.sessions:
        found = evidence[session.id]
        is_right = await run.records.has_right_picture(session)
        ended, why = outcome(session, found, has_right_picture=is_right)
        counts[ended] += 1
        if why:
            out.print(f"[bold]{ended}[/bold] {session.id}: {why}")
    conflicting = [path for path, etags in results.items() if len(set(etags)) > 1]
    for path in conflicting:
        out.print(f"[bold]conflicting[/bold] {path}: stored as {', '.join(results[path])}")
    attempts = [job.attempt for found in evidence.values() for job in found.jobs]
    figures = {
        "sent": len(run.sessions),
        "poisoned": sum(session.poison is not None for session in run.sessions),
        **{str(ended): counts[ended] for ended in Outcome},
        "conflicting": len(conflicting),
        "messages": run.messages_sent,
        "attempts": sum(attempts),
        "most_attempts": max(attempts, default=0),
        "results_stored": sum(map(len, results.values())),
        "kills": dict(run.toll.kills),
        "cuts": run.toll.cuts,
    }
    _show(figures)
    return figures


def _show(figures: Mapping[str, Any]) -> None:
    table = Table("what", "count", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), json.dumps(value).strip("{}").replace('"', ""))
    out.print(table)


def is_passed(found: Mapping[str, Any]) -> bool:
    nothing = all(found[name] == 0 for name in ("lost", "wrong", "conflicting", "still_running"))
    good = found["sent"] - found["poisoned"]
    return nothing and found["completed"] == good and found["dead_lettered"] == found["poisoned"]


def context() -> dict[str, Any]:
    """What a reader of the figures needs beside them."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "replicas": {app.INPAINTER: app.INPAINTERS, app.INGRESS: app.INGRESSES},
        "lease_s": app.LEASE_S,
        "max_attempts": app.MAX_ATTEMPTS,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
