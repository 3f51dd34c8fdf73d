"""The audit's Ray job; see docs/audit.md.

    ray job submit --working-dir . -- python -m benchmarks.audit --user U --session S

Its output names paths in the blob store, and no signed link.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import ray
from rich.console import Console

from serve_app import adapters
from serve_app.audit.progress import OUTAGE_S, fault
from serve_app.audit.record import PAGE, Audit, AuditStatus, folder
from serve_app.audit.run import Auditor
from serve_app.audit.store import AuditStore
from serve_app.clock import utc_now
from serve_app.errors import FluxFillError, JobsUnavailable
from serve_app.jobs.lease import retry_unavailable
from serve_app.settings import Settings
from serve_app.telemetry import configure_logging

from . import app, arguments
from .arguments import Given
from .queued import queued
from .ray_compiler import RayCompiler
from .ray_replicas import RayReplicas

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 only where every cell is painted and the report is written."""
    given = arguments.parse(argv, os.environ)
    configure_logging()
    try:
        _connect()
        audit = asyncio.run(_audit(given))
    except FluxFillError as e:
        err.print(f"{e.code}: {e.message}", markup=False)
        return 1
    except asyncio.CancelledError:
        err.print("stopped before the run began")
        return 1
    why = f": {audit.error.message}" if audit.error else ""
    out.print(f"{audit.id}: {audit.status}{why}; {audit.result_count} of {len(audit.cells)} cells", markup=False)
    if audit.status != AuditStatus.FAILED:
        out.print(f"report: {folder(audit.id)}/{PAGE}")
    return 0 if audit.status == AuditStatus.SUCCEEDED else 1


def _connect() -> None:
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError as e:
        why = "there is no Ray here that takes this process in: start this as a job, with ray job submit"
        raise JobsUnavailable(why) from e


async def _audit(given: Given) -> Audit:
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None
    # After ray.init, which takes this signal to end the process at once.
    loop.add_signal_handler(signal.SIGTERM, this.cancel)
    name = app.find(given.app)
    settings = await app.settings(name)
    blobs = adapters.blob_store(settings.blobs, settings.public_url)
    job_store = adapters.job_store(settings.jobs)
    store = AuditStore(job_store, blobs)
    audit, attempt = await _run_of(given, store, settings)
    try:
        auditor = Auditor(
            job_store=job_store,
            blobs=blobs,
            replicas=RayReplicas(name, settings),
            prompts=app.prompts(name, settings, blobs),
            settings=settings,
            compiler=RayCompiler(settings, audit.request.gpus),
            clock=utc_now,
        )
    except Exception as e:
        with suppress(FluxFillError):
            await store.fail(audit.id, attempt, fault(e))
        raise
    loop.add_signal_handler(signal.SIGTERM, auditor.cancel)
    return await auditor.run(audit.id, attempt)


async def _run_of(given: Given, store: AuditStore, settings: Settings) -> tuple[Audit, int]:
    """The stored run, and which of its attempts this job is."""
    if given.launched:
        run_id, attempt = given.launched
        return await retry_unavailable(partial(store.get, run_id), OUTAGE_S), attempt
    audit = await queued(given.asked, store, settings, out.print)
    out.print(f"run {audit.id}, attempt {audit.attempt}: {len(audit.cells)} cells")
    return audit, audit.attempt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
