"""The audit's Ray job against the running app: what it leaves, what is killed in its middle, too few GPUs."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from ray import serve
from ray.job_submission import JobSubmissionClient

from benchmarks.audit import __main__ as audit_job
from benchmarks.audit import app as audit_app
from benchmarks.audit.arguments import APP as APP_NAME
from benchmarks.audit.arguments import ATTEMPT, RUN, Given, parse
from benchmarks.audit.ray_compiler import RayCompiler
from deployments.app import build
from deployments.audit_job import RayJobs
from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.audit.files import read_cells
from serve_app.audit.record import Audit, AuditStatus, folder
from serve_app.audit.store import AuditStore
from serve_app.edit.session import INPUTS, session_path
from serve_app.errors import ReplicaLost
from serve_app.jobs.record import Job
from serve_app.models import EditRequest
from serve_app.parameters import AuditRequest, Matrix
from serve_app.settings import Settings

from .blob_servers import forget_firebase_app, new_bucket
from .serving import APP, VARIANTS, App, sleeper

pytestmark = [pytest.mark.serve, pytest.mark.timeout(240)]


class Audited:
    """Runs on an app in the test's Ray: its stores, its jobs, one session."""

    def __init__(self, app: App, settings: Settings, name: str = APP) -> None:
        self.app = app
        self.blobs = adapters.blob_store(settings.blobs)
        self.job_store = adapters.job_store(settings.jobs)
        self.store = AuditStore(self.job_store, self.blobs)
        self.jobs = RayJobs(app.dashboard, app=name)

    async def upload(self) -> None:
        for role, path in zip(INPUTS, self.app.photo_files(), strict=True):
            where = session_path("u", "s", INPUTS[role])
            await self.blobs.put(where, path.read_bytes(), content_type="image/png")

    async def launch(self, run_id: str, **matrix: Any) -> Audit:
        request = AuditRequest(user_id="u", session_id="s", matrix={"steps": (4,), **matrix}, compile_variants=())
        audit = await self.store.create(request, run_id)
        await self.jobs.launch(audit)
        return audit

    async def when(self, run_id: str, met: Callable[[Audit], bool]) -> Audit:
        try:
            async with asyncio.timeout(200):
                while not met(audit := await self.store.get(run_id)):
                    await asyncio.sleep(0.1)
                return audit
        except TimeoutError:
            log = JobSubmissionClient(self.app.dashboard).get_job_logs(audit.job_name)
            raise AssertionError(f"{audit.status}, {audit.stage}; the job's log:\n{log}") from None

    async def over(self, run_id: str) -> Audit:
        return await self.when(run_id, lambda audit: audit.status.is_over)

    async def painted(self, run_id: str) -> dict[str, Any]:
        """When each stored cell was painted, and how long each painting took."""
        return {name: (cell.finished_at, cell.trials) for name, cell in (await read_cells(self.blobs, run_id)).items()}

    async def in_the_middle(self, run_id: str) -> dict[str, Any]:
        """Once a cell is stored and another one is being painted: those that are stored."""
        await self.when(run_id, lambda audit: "running" in {cell.status for cell in audit.cells.values()})
        async with asyncio.timeout(60):
            while not (painted := await self.painted(run_id)):
                await asyncio.sleep(0.05)
        return painted

    async def resumed_later(self, run_id: str) -> Audit:
        """The run is resumed when the lease of its dead driver has run out."""
        job = await self.job_store.get(run_id)
        assert job is not None

        def long_ago(job: Job | None, _rivals: Sequence[Job], now: datetime) -> Sequence[Job]:
            assert job is not None
            return (job.evolve(lease_until=now),)

        await self.job_store.update(run_id, job.lock_key, long_ago)
        return await self.store.resume(run_id)

    def driver(self, run_id: str) -> psutil.Process:
        processes = self.app.processes()
        found = [p for p, command in processes if "benchmarks.audit" in command and p.environ().get(RUN) == run_id]
        # The job's shell, where there is one, has the same words.
        return max(found, key=lambda process: process.create_time())


@pytest.fixture
async def audited(app: App) -> AsyncIterator[Audited]:
    audited = Audited(app, app.settings)
    await audited.upload()
    yield audited


def submit(app: App, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit --working-dir . -- python -m benchmarks.audit ARGUMENTS`, until the job ends."""
    ray = str(Path(sys.executable).with_name("ray"))
    job = [ray, "job", "submit", "--address", app.dashboard, "--working-dir", "."]
    command = [*job, "--", sys.executable, "-m", "benchmarks.audit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


async def test_a_submitted_job_leaves_pictures_records_and_a_report(audited: Audited) -> None:
    done = await asyncio.to_thread(
        submit,
        audited.app,
        *("--user", "u", "--session", "s", "--run-id", "first", "--variants", "telea,nap", "--guidance", "2,30"),
        *("--steps", "4", "--reference", "telea", "--compile", "nap", "--app", APP),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    audit = await audited.store.get("first")
    names = {"telea_gs2", "telea_gs30", "nap_gs2", "nap_gs30"}
    assert (audit.status, set(audit.cells), audit.result_count) == (AuditStatus.SUCCEEDED, names, 4)
    assert [verdict.verdict for verdict in audit.compile] == ["the pause family has nothing to compile"]
    stored = {info.path.removeprefix(f"{folder('first')}/") async for info in audited.blobs.list(folder("first"))}
    pictures = {f"{name}.png" for name in names} | {f"cells/{name}.json" for name in names}
    assert stored == pictures | {"run.json", "REPORT.md", "report.html", "results.json", "results.csv"}
    results = json.loads((await audited.blobs.get("audit/first/results.json", max_bytes=10**6))[0])
    assert {cell["status"] for cell in results["cells"]} == {"succeeded"}
    links = [cell["signed_url"] for cell in results["cells"]]
    assert "first: succeeded; 4 of 4 cells" in done.stdout
    assert not [link for link in links if link in done.stdout + done.stderr], "links are secrets"


async def test_a_killed_replica_costs_no_cell(audited: Audited) -> None:
    await audited.launch("replica", variants=("nap",), guidance_scales=(1, 2, 3, 4, 5, 6))
    before = await audited.in_the_middle("replica")
    victim = min(audited.app.pids("Inpainter-nap"))
    os.kill(victim, signal.SIGKILL)
    audit = await audited.over("replica")
    assert (audit.status, audit.result_count) == (AuditStatus.SUCCEEDED, 6)
    after = await audited.painted("replica")
    assert {name: after[name] for name in before} == before


async def test_a_killed_job_is_resumed_and_paints_nothing_again(audited: Audited) -> None:
    await audited.launch("job", variants=("nap",), guidance_scales=(1, 2, 3, 4, 5, 6))
    before = await audited.in_the_middle("job")
    audited.driver("job").kill()
    again = await audited.resumed_later("job")
    await audited.jobs.launch(again)
    audit = await audited.over("job")
    assert (audit.status, audit.attempt, audit.result_count) == (AuditStatus.SUCCEEDED, 2, 6)
    after = await audited.painted("job")
    assert 0 < len(before) < len(after)
    assert {name: after[name] for name in before} == before


async def test_a_stopped_job_ends_its_run_as_canceled(audited: Audited) -> None:
    audit = await audited.launch("stopped", variants=("nap",), guidance_scales=(1, 2, 3, 4, 5, 6))
    before = await audited.in_the_middle("stopped")
    await audited.jobs.stop(audit)
    audit = await audited.over("stopped")
    assert (audit.status, audit.result_count < 6) == (AuditStatus.CANCELED, True)
    after = await audited.painted("stopped")
    assert {name: after[name] for name in before} == before


async def test_variants_that_share_a_gpu_wait_for_each_other(audited: Audited) -> None:
    await audited.launch("waves", variants=("gpu-a", "gpu-b"), guidance_scales=(1, 2))
    audit = await audited.over("waves")
    assert (audit.status, audit.result_count) == (AuditStatus.SUCCEEDED, 4), audit.error
    assert [reading.after for reading in audit.memory] == ["", "gpu-a"]
    assert {reading.used_bytes for reading in audit.memory} == {None}, "Ray only believes in this GPU"
    cells = await read_cells(audited.blobs, "waves")
    last_a = max(cell.finished_at for name, cell in cells.items() if name.startswith("gpu-a") and cell.finished_at)
    assert audit.memory[1].waited_s > 0
    assert all(cell.started_at > last_a for name, cell in cells.items() if name.startswith("gpu-b") and cell.started_at)


@pytest.mark.usefixtures("own_apps")
async def test_a_gpu_that_never_becomes_free_is_said_at_once(app: App, tmp_path: Path) -> None:
    """A second app in the same Ray, one of whose variants keeps the GPU."""
    settings = Settings(
        blobs=f"files:{tmp_path}/blobs",
        jobs=f"sqlite:{tmp_path}/jobs.db",
        messages={"url": f"embedded://127.0.0.1:{free_port()}"},
        variants={"gpu-a": VARIANTS["gpu-a"], "keeper": sleeper(0.1, num_gpus=1, min_replicas=1)},
    )
    await asyncio.to_thread(serve.run, build(settings), name="keeping", route_prefix="/keeping")
    keeping = Audited(app, settings, "keeping")
    await keeping.upload()
    await keeping.launch("never", variants=("gpu-a",), guidance_scales=(1, 2))
    audit = await keeping.over("never")
    assert (audit.status, audit.error and audit.error.code) == (AuditStatus.FAILED, "audit_impossible")
    assert "keeper keeps 1" in str(audit.error)
    assert [info.path async for info in keeping.blobs.list("audit")] == ["audit/never/run.json"]


@pytest.mark.usefixtures("connection")
async def test_gpus_that_can_still_be_had_are_waited_for_to_compile() -> None:
    """What the run says of them counts for more than what the settings say."""
    keeper = {"gpu-a": VARIANTS["gpu-a"], "keeper": sleeper(0.1, num_gpus=1, min_replicas=1)}
    settings = Settings(variants=keeper, audit={"replica_wait_s": 60.0, "gpus": 1})
    canvas = np.zeros((8, 8, 3), np.uint8)
    request = EditRequest(
        job_id="job", canvas=canvas, mask=canvas[..., 0], windows=(), steps=1, guidance_scale=2.0, seed=0
    )
    kept = await RayCompiler(settings)("gpu-a", request)
    assert kept.verdict == "not looked at: other variants keep every GPU (min_replicas)"
    assert "not looked at" not in (await RayCompiler(settings, 2)("gpu-a", request)).verdict


# -- jobs that cannot begin


@pytest.fixture
async def deaf(own_apps: None) -> str:
    """The name of an app whose ingress takes calls and answers none."""

    @serve.deployment(name="Ingress", ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=0.1)
    class Deaf:
        async def settings(self) -> None:
            await asyncio.Event().wait()

    await asyncio.to_thread(serve.run, Deaf.bind(), name="deaf", route_prefix="/deaf")
    return "deaf"


def launched(run_id: str, app: str) -> Given:
    return parse([], {RUN: run_id, ATTEMPT: "1", APP_NAME: app})


async def test_an_ingress_that_does_not_answer_is_not_waited_for_for_ever(
    deaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_app, "ANSWER_S", 0.5)
    with pytest.raises(ReplicaLost, match="no ingress of deaf said within"):
        await audit_job._audit(launched("run", deaf))


async def test_a_job_is_stopped_before_it_knows_the_apps_settings(deaf: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    working = asyncio.create_task(audit_job._audit(launched("run", deaf)))
    await asyncio.sleep(0)
    # Otherwise the signal ends the tests.
    assert signal.getsignal(signal.SIGTERM) is not before
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await working


async def test_a_run_whose_job_cannot_begin_has_failed(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, settings: Settings) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(audit_job, "RayReplicas", broken)
    matrix = Matrix(variants=("telea",), guidance_scales=(1.0,))
    await audited.store.create(AuditRequest(user_id="u", session_id="s", matrix=matrix), "broken")
    with pytest.raises(ZeroDivisionError):
        await audit_job._audit(launched("broken", APP))
    audit = await audited.store.get("broken")
    assert (audit.status, audit.error and audit.error.message) == (AuditStatus.FAILED, "ZeroDivisionError: by zero")


# -- other stores


@pytest.fixture
def firebase_bucket(firebase_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the emulator that Ray's processes know, too."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{firebase_port}")
    yield new_bucket("firebase", firebase_port)
    forget_firebase_app()


@pytest.mark.usefixtures("own_apps")
async def test_a_job_works_on_firebase_storage(app: App, tmp_path: Path, firebase_bucket: str) -> None:
    """A second app in the same Ray, whose blobs are in Google's emulated storage, as its job's are."""
    settings = Settings(
        blobs=f"firebase:{firebase_bucket}",
        jobs=f"sqlite:{tmp_path}/jobs.db",
        messages={"url": f"embedded://127.0.0.1:{free_port()}"},
        variants={"telea": VARIANTS["telea"]},
    )
    await asyncio.to_thread(serve.run, build(settings), name="in-firebase", route_prefix="/in-firebase")
    audited = Audited(app, settings, "in-firebase")
    await audited.upload()
    await audited.launch("clouded", variants=("telea",), guidance_scales=(2, 30))
    audit = await audited.over("clouded")
    assert (audit.status, audit.result_count) == (AuditStatus.SUCCEEDED, 2), audit.error
    results = json.loads((await audited.blobs.get("audit/clouded/results.json", max_bytes=10**6))[0])
    for cell in results["cells"]:
        assert cell["image_path"] == f"audit/clouded/{cell['name']}.png"
        assert httpx.get(cell["signed_url"]).content.startswith(b"\x89PNG")
