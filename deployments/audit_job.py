"""The AuditLauncher port over Ray's job server."""

import asyncio
import shlex
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import ray
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from serve_app.adapters.loopback import bypass_proxies
from serve_app.audit.ports import LaunchState
from serve_app.audit.record import Audit
from serve_app.errors import JobsUnavailable

T = TypeVar("T")

#: How long Ray's job server may take to answer, in seconds.
ANSWER_S = 10.0
#: How long it may take to take a job: a busy head node starts one slowly, and an answer that is missed fails the run.
SUBMIT_S = 30.0
#: What the job runs; it learns from its environment which run it is.
ENTRYPOINT = f"{shlex.quote(sys.executable)} -m benchmarks.audit"
#: Without any, Ray runs a job on the head node, which in a cluster has none to give and must not be burdened.
JOB_CPUS = 0.1
#: Ray's label for a group of nodes, where an operator gives them one.
POOL = "pool"

_STATES: Mapping[str, LaunchState] = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "running",
    JobStatus.STOPPED: "stopped",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
}


class RayJobs:
    """Ray's token is taken from this process's environment (RAY_AUTH_MODE, RAY_AUTH_TOKEN), as everywhere in Ray; in a
    replica it is that of its node. The job gets nothing but the environment of the head node and three names of its
    own, because what a job is submitted with shows in the dashboard."""

    is_apart = True

    def __init__(
        self,
        address: str | None = None,
        *,
        app: str = "fluxfill",
        entrypoint: str = ENTRYPOINT,
        pool: str | None = None,
    ) -> None:
        """`address` is the dashboard's URL, or the cluster's address; None: the Ray this process is connected to, or
        else the one on this machine. `app` is the name in Serve of the app that is audited. Jobs run on nodes with
        Ray's label `pool`; None: on any."""
        bypass_proxies()
        self._address, self._app, self._entrypoint, self._pool = address, app, entrypoint, pool
        self._client: JobSubmissionClient | None = None
        # The client's calls have no time-out of their own: one that hangs keeps its thread.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="ray-jobs")

    async def launch(self, audit: Audit) -> None:
        await self._ask(lambda client: self._submit(client, audit), SUBMIT_S)

    async def stop(self, audit: Audit) -> None:
        def stop(client: JobSubmissionClient) -> None:
            if self._found(client, audit) is not None:
                client.stop_job(audit.job_name)

        await self._ask(stop)

    async def state(self, audit: Audit) -> LaunchState:
        found = await self._ask(lambda client: self._found(client, audit))
        return "gone" if found is None else _STATES[found.status]

    def _submit(self, client: JobSubmissionClient, audit: Audit) -> None:
        which = {
            "FLUXFILL_AUDIT_RUN": audit.id,
            "FLUXFILL_AUDIT_ATTEMPT": str(audit.attempt),
            "FLUXFILL_AUDIT_APP": self._app,
        }
        try:
            client.submit_job(
                entrypoint=self._entrypoint,
                entrypoint_num_cpus=JOB_CPUS,
                entrypoint_label_selector={POOL: self._pool} if self._pool else None,
                submission_id=audit.job_name,
                runtime_env={"env_vars": which},
                metadata=self._metadata(audit),
            )
        except RuntimeError:
            # Ray takes a submission id once, and refuses it with an error that bears no code.
            if self._found(client, audit) is None:
                raise

    def _metadata(self, audit: Audit) -> dict[str, str]:
        return {"audit": audit.id, "attempt": str(audit.attempt), "app": self._app}

    def _found(self, client: JobSubmissionClient, audit: Audit) -> JobDetails | None:
        """The audit's job. A job that anyone else submitted under its id is not ours: it is neither followed nor
        stopped."""
        try:
            found = client.get_job_info(audit.job_name)
        except RuntimeError as e:
            if "status code 404" in str(e):
                return None
            raise
        return found if found.metadata == self._metadata(audit) else None

    async def _ask(self, question: Callable[[JobSubmissionClient], T], limit_s: float | None = None) -> T:
        """Raises JobsUnavailable within `limit_s`, or else ANSWER_S, where there is no answer."""
        limit_s = limit_s or ANSWER_S
        try:
            asked = asyncio.get_running_loop().run_in_executor(self._threads, lambda: question(self._connected()))
            return await asyncio.wait_for(asked, limit_s)
        except TimeoutError as e:
            self._client = None
            raise JobsUnavailable(f"Ray's job server did not answer within {limit_s:g} s") from e
        # Of connections: OSError; of a token that does not hold: RayError; of what the server answers: RuntimeError.
        except (OSError, RayError, RuntimeError) as e:
            # The head node may be another one by now.
            self._client = None
            first_line = next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise JobsUnavailable(f"Ray accepts no jobs: {first_line}") from e

    def _connected(self) -> JobSubmissionClient:
        if self._client is None:
            here = ray.get_runtime_context().gcs_address if ray.is_initialized() else "auto"
            self._client = JobSubmissionClient(self._address or here)
        return self._client
