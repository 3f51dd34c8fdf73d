"""An AuditLauncher whose jobs are tasks of this process; held to the contract of the real one in test_launcher.py."""

import asyncio
from collections.abc import Awaitable, Callable

from serve_app.audits import Audit
from serve_app.errors import JobsUnavailable
from serve_app.ports import LaunchState


async def never_ends(_audit: Audit) -> None:
    await asyncio.Event().wait()


class LocalJobs:
    def __init__(self, work: Callable[[Audit], Awaitable[None]] = never_ends) -> None:
        self.work = work
        self.is_down = False
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def launch(self, audit: Audit) -> None:
        self._check()
        if audit.job_name not in self.tasks:
            self.tasks[audit.job_name] = asyncio.create_task(self._run(audit))

    async def stop(self, audit: Audit) -> None:
        self._check()
        if task := self.tasks.get(audit.job_name):
            task.cancel()

    async def state(self, audit: Audit) -> LaunchState:
        self._check()
        task = self.tasks.get(audit.job_name)
        if task is None:
            return "gone"
        if not task.done():
            return "running"
        if task.cancelled():
            return "stopped"
        return "failed" if task.exception() else "succeeded"

    async def close(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    async def _run(self, audit: Audit) -> None:
        await self.work(audit)

    def _check(self) -> None:
        if self.is_down:
            raise JobsUnavailable("switched off")
