"""What an audit asks of the cluster: that its Ray job starts, and stops."""

from typing import Literal, Protocol

from .record import Audit

#: `gone`: nobody knows such a job.
LaunchState = Literal["pending", "running", "stopped", "succeeded", "failed", "gone"]


class AuditLauncher(Protocol):
    """Starts the job that works on a stored audit. Every method raises JobsUnavailable while jobs cannot be started."""

    #: Whether its jobs are processes of their own, which see nothing of this one's memory.
    is_apart: bool

    async def launch(self, audit: Audit) -> None:
        """Submit the audit's job under `audit.job_name`. Launching it twice is no error, and starts one job."""

    async def stop(self, audit: Audit) -> None:
        """End the audit's job: it is told first, then killed. Stopping what does not run is no error."""

    async def state(self, audit: Audit) -> LaunchState: ...
