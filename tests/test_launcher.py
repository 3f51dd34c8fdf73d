"""Jobs of audits: what every launcher guarantees, a job server that is not well, and a real job of the real app."""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.job_submission import JobStatus, JobSubmissionClient

from deployments import audit_job
from deployments.audit_job import RayJobs
from deployments.ingress import _http_host
from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.audit.ports import AuditLauncher, LaunchState
from serve_app.audit.record import Audit
from serve_app.edit.session import session_path
from serve_app.errors import JobsUnavailable
from serve_app.parameters import AuditRequest

from .audit_jobs import LocalJobs
from .blob_servers import Answer, answering
from .rig import jpeg, line_mask, photo, png
from .serving import DEFAULTS, App

SLEEP = f"{sys.executable} -c 'import time; time.sleep(600)'"


def queued(run_id: str | None = None, attempt: int = 1) -> Audit:
    now = datetime.now(UTC)
    request = AuditRequest(user_id="u", session_id="s")
    return Audit(id=run_id or f"run-{uuid.uuid4().hex}", request=request, attempt=attempt, created_at=now)


async def until_state(jobs: AuditLauncher, audit: Audit, *states: LaunchState) -> LaunchState:
    async with asyncio.timeout(90):
        while (state := await jobs.state(audit)) not in states:
            await asyncio.sleep(0.1)
    return state


# -- what every launcher guarantees


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.serve)])
async def jobs(request: pytest.FixtureRequest) -> AsyncIterator[AuditLauncher]:
    if request.param == "local":
        local = LocalJobs()
        yield local
        await local.close()
        return
    request.getfixturevalue("connection")
    # The Ray that this process is connected to.
    yield RayJobs(entrypoint=SLEEP)


async def test_a_job_that_nobody_knows_is_gone_and_stopping_it_is_no_error(jobs: AuditLauncher) -> None:
    audit = queued()
    assert await jobs.state(audit) == "gone"
    await jobs.stop(audit)
    assert await jobs.state(audit) == "gone"


async def test_a_job_runs_until_it_is_stopped(jobs: AuditLauncher) -> None:
    audit = queued()
    await jobs.launch(audit)
    await until_state(jobs, audit, "running")
    await jobs.stop(audit)
    await until_state(jobs, audit, "stopped")
    await jobs.stop(audit)
    await jobs.launch(audit)
    assert await jobs.state(audit) == "stopped"


async def test_launching_twice_starts_one_job(jobs: AuditLauncher) -> None:
    audit = queued()
    await asyncio.gather(jobs.launch(audit), jobs.launch(audit), jobs.launch(audit))
    await until_state(jobs, audit, "running")
    await jobs.launch(audit)
    if isinstance(jobs, RayJobs):
        client = JobSubmissionClient(ray.get_runtime_context().gcs_address)
        assert len([job for job in client.list_jobs() if job.submission_id == audit.job_name]) == 1
    await jobs.stop(audit)
    await until_state(jobs, audit, "stopped")


async def test_each_attempt_has_a_job_of_its_own(jobs: AuditLauncher) -> None:
    first = queued()
    second = queued(first.id, attempt=2)
    await jobs.launch(first)
    assert await jobs.state(second) == "gone"
    await jobs.launch(second)
    await jobs.stop(first)
    await until_state(jobs, first, "stopped")
    await until_state(jobs, second, "running")
    await jobs.stop(second)


#: Metadata that the job of another has under the id of run `{}`.
FOREIGN = [None, {}, {"audit": "{}"}, {"audit": "{}", "attempt": "1", "app": "another"}]


@pytest.mark.serve
@pytest.mark.parametrize("metadata", FOREIGN, ids=str)
async def test_a_job_of_others_is_neither_followed_nor_stopped(app: App, metadata: dict[str, str] | None) -> None:
    audit, client = queued(), JobSubmissionClient(app.dashboard)
    described = metadata and {name: value.format(audit.id) for name, value in metadata.items()}
    client.submit_job(entrypoint=SLEEP, submission_id=audit.job_name, metadata=described)
    jobs = RayJobs(entrypoint=SLEEP)
    with pytest.raises(JobsUnavailable):
        await jobs.launch(audit)
    await jobs.stop(audit)
    assert await jobs.state(audit) == "gone"
    assert client.get_job_status(audit.job_name) in (JobStatus.PENDING, JobStatus.RUNNING)
    client.stop_job(audit.job_name)


@pytest.mark.serve
@pytest.mark.usefixtures("connection")
async def test_a_job_runs_in_its_pool_of_nodes() -> None:
    elsewhere, here = queued(), queued()
    await RayJobs(entrypoint=SLEEP, pool="elsewhere").launch(elsewhere)
    jobs = RayJobs(entrypoint=SLEEP, pool="tests")
    await jobs.launch(here)
    await until_state(jobs, here, "running")
    # It waits for such a node, as long as this Ray lasts.
    assert await jobs.state(elsewhere) == "pending"
    await jobs.stop(here)
    await until_state(jobs, here, "stopped")


@pytest.mark.serve
async def test_a_run_may_be_called_as_a_job_of_others_is(app: App) -> None:
    client = JobSubmissionClient(app.dashboard)
    theirs = client.submit_job(entrypoint=SLEEP, submission_id=f"nightly-{uuid.uuid4().hex}")
    audit, jobs = queued(theirs), RayJobs(entrypoint=SLEEP)
    await jobs.launch(audit)
    await jobs.stop(audit)
    await until_state(jobs, audit, "stopped")
    assert client.get_job_status(theirs) in (JobStatus.PENDING, JobStatus.RUNNING)
    client.stop_job(theirs)


# -- a job server that is not well


async def refused(url: str) -> str:
    with pytest.raises(JobsUnavailable) as refusal:
        await RayJobs(url).launch(queued())
    return refusal.value.message


async def test_where_nobody_listens_there_are_no_jobs() -> None:
    assert "Failed to connect" in await refused(f"http://127.0.0.1:{free_port()}")


def says(status: str, body: str) -> Answer:
    async def answer(_request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())

    return answer


@pytest.mark.parametrize(
    ("status", "body"),
    [
        ("401 Unauthorized", "Unauthorized: Missing authentication token"),
        ("403 Forbidden", "Forbidden: Invalid authentication token"),
        ("404 Not Found", ""),
        ("500 Internal Server Error", "Traceback"),
        ("503 Service Unavailable", ""),
        ("200 OK", "<html>"),
    ],
)
async def test_a_server_that_takes_no_jobs_is_unavailable(status: str, body: str) -> None:
    async with answering(says(status, body)) as port:
        message = await refused(f"http://127.0.0.1:{port}")
    assert message.startswith("Ray accepts no jobs: ")
    assert "\n" not in message


async def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_job, "SUBMIT_S", 0.2)
    asked = asyncio.Event()

    async def hang(_request: str, _writer: asyncio.StreamWriter) -> None:
        asked.set()
        await asyncio.Event().wait()

    async with answering(hang) as port:
        assert await refused(f"http://127.0.0.1:{port}") == "Ray's job server did not answer within 0.2 s"
        assert asked.is_set()


# -- the real app


@pytest.fixture
async def client(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=app.http, timeout=60) as client:
        yield client


async def put_session(app: App) -> dict[str, Any]:
    session = uuid.uuid4().hex
    blobs = adapters.blob_store(app.settings.blobs)
    for name, data in (("original.jpg", jpeg(photo())), ("mask_auto.png", png(line_mask()))):
        await blobs.put(session_path("u", session, name), data, content_type="image/jpeg")
    return {"user_id": "u", "session_id": session, "variants": ["telea"], "guidance_scales": [2], "steps": [2]}


async def seen(client: httpx.AsyncClient, place: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async with asyncio.timeout(120):
        view: dict[str, Any] = {}
        while not view or not reached(view):
            await asyncio.sleep(0.3)
            view = (await client.get(place)).json()
    return view


@pytest.mark.serve
@pytest.mark.timeout(240)
async def test_a_post_starts_a_job_of_ray(app: App, client: httpx.AsyncClient) -> None:
    body = await put_session(app)
    response = await client.post("/audit", json=body, headers={"Prefer": "respond-async"})
    assert response.status_code == 202, response.text
    run_id = response.json()["run_id"]
    job = JobSubmissionClient(app.dashboard).get_job_info(f"fluxfill-audit-{run_id}")
    assert job.entrypoint == audit_job.ENTRYPOINT
    # What shows in the dashboard says which run it is, and nothing else.
    assert job.runtime_env == {
        "env_vars": {"FLUXFILL_AUDIT_RUN": run_id, "FLUXFILL_AUDIT_ATTEMPT": "1", "FLUXFILL_AUDIT_APP": "fluxfill"}
    }
    assert job.metadata == {"audit": run_id, "attempt": "1", "app": "fluxfill"}
    second = await client.post("/audit", json=body)
    assert (second.status_code, second.json()["code"]) == (409, "audit_running")
    view = await seen(client, response.headers["Location"], lambda view: view["finished_at"] is not None)
    assert view["status"] == "succeeded", view
    page = await client.get(view["report_url"])
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "allow-scripts" in page.headers["content-security-policy"]


@pytest.mark.serve
@pytest.mark.timeout(240)
async def test_a_canceled_audit_ends_its_job(app: App, client: httpx.AsyncClient) -> None:
    body = {**await put_session(app), "variants": ["slow"], "steps": [50]}
    run_id = (await client.post("/audit", json=body, headers={"Prefer": "respond-async"})).json()["run_id"]
    assert (await client.post(f"/audits/{run_id}/cancel")).status_code == 200
    await seen(client, f"/audits/{run_id}", lambda view: view["status"] == "canceled")
    state = await until_state(RayJobs(), queued(run_id), "stopped", "failed", "succeeded")
    assert state in ("stopped", "failed")


@pytest.mark.serve
async def test_the_app_knows_where_serve_listens_whatever_its_config_says(app: App) -> None:
    assert _http_host() == app.raw["http_options"]["host"]


@pytest.mark.serve
async def test_the_running_apps_settings_are_had_by_handle(app: App) -> None:
    settings = await serve.get_app_handle("fluxfill").settings.remote()
    assert (settings.blobs, settings.variants) == (app.settings.blobs, app.settings.variants)


@pytest.mark.serve
@pytest.mark.timeout(240)
async def test_who_waits_while_the_app_is_deployed_again_is_told_where_to_look(
    app: App, client: httpx.AsyncClient
) -> None:
    body = {**await put_session(app), "variants": ["slow"], "guidance_scales": list(range(1, 41))}
    waiting = asyncio.create_task(client.post("/audit", json=body, timeout=200))
    async with asyncio.timeout(60):
        while not (runs := (await client.get("/audits", params={"limit": 1})).json()) or runs[0]["finished_at"]:
            await asyncio.sleep(0.1)
    # The app's args: every replica is replaced.
    app.raw["applications"][0]["args"]["audit"] = {"link_hours": 71}
    await asyncio.to_thread(app.deploy, **DEFAULTS)
    response = await waiting
    assert (response.status_code, response.headers["Location"]) == (202, f"/audits/{runs[0]['run_id']}"), response.text
    app.wait_ready()
    await client.post(f"{response.headers['Location']}/cancel")
    await seen(client, response.headers["Location"], lambda view: view["finished_at"] is not None)
