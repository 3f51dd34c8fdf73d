"""The routes of audits over the real store, with jobs that are tasks of this process."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from serve_app.audit import runs
from serve_app.audit.record import Audit, AuditFault, AuditStatus, CellProgress, CompileVerdict, MemoryReading
from serve_app.audit.store import LAUNCH_S, AuditStore
from serve_app.http.app import create_app
from serve_app.http.audits import MAX_BODY_BYTES
from serve_app.parameters import AuditRequest, Cell, Matrix

from .audit_jobs import Driver, never_ends
from .backends import until
from .http_service import Process, long
from .rig import SESSION, USER, Rig

BODY = {"user_id": USER, "session_id": SESSION, "variants": ["telea"], "guidance_scales": [2, 4]}
ASYNC = {"Prefer": "respond-async"}
ALIVE_S = 60.0


JSON = {"Content-Type": "application/json"}


class Site:
    """An app, its clients, and the work that its audits' jobs do."""

    def __init__(self, process: Process, client: httpx.AsyncClient) -> None:
        self.process, self.client = process, client
        self.store = AuditStore(process.rig.jobs, process.rig.blobs)
        #: The job goes on to its end once it is set.
        self.may_end = asyncio.Event()
        self.ends_as = AuditStatus.SUCCEEDED
        process.audit_jobs.work = self.job

    async def job(self, audit: Audit) -> None:
        """What a job does with its run."""
        driver = await self.begun(audit)
        while not self.may_end.is_set():
            if await driver.is_canceled():
                self.ends_as = AuditStatus.CANCELED
                break
            await asyncio.sleep(0.01)
        fault = AuditFault(code="audit_impossible", message="no GPU is free") if self.ends_as == "failed" else None
        if fault is None:
            await self.put_report(audit.id)
        await driver.finish(self.ends_as, fault)

    async def begun(self, audit: Audit) -> Driver:
        """One that has painted all cells."""
        driver = Driver(self.store, self.process.rig.blobs, audit)
        await driver.begin()
        await driver.note(**painted(audit))
        return driver

    async def put_report(self, run_id: str) -> None:
        await self.process.rig.blobs.put(f"audit/{run_id}/report.html", b"<html>", content_type="text/html")

    async def post(self, path: str = "/audit", headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return await self.client.post(path, json={**BODY, **fields}, headers=headers)

    async def started(self, **fields: Any) -> str:
        """The id of a run whose job has begun."""
        response = await self.post(headers=ASYNC, **fields)
        assert response.status_code == 202, response.text
        run_id: str = response.json()["run_id"]
        await self.until(run_id, AuditStatus.RUNNING)
        return run_id

    async def until(self, run_id: str, status: AuditStatus) -> Audit:
        async with asyncio.timeout(10):
            while (audit := await self.store.get(run_id)).status != status or (
                status == AuditStatus.RUNNING and not audit.gpu
            ):
                await asyncio.sleep(0.01)
        return audit

    def set(self, **audit: Any) -> None:
        """Change the app's audit settings."""
        settings = self.process.audits.settings
        changed = settings.audit.model_copy(update=audit)
        self.process.audits.settings = settings.model_copy(update={"audit": changed})


def painted(audit: Audit) -> dict[str, Any]:
    cells = {name: CellProgress(status="succeeded", step=8, steps=8) for name in audit.cells}
    memory = (MemoryReading(after="", used_bytes=None, floor_bytes=None, waited_s=0.0),)
    verdict = CompileVerdict(variant="telea", viable=False, verdict="nothing to compile")
    return {"cells": cells, "gpu": "CPU", "sm": "N/A", "memory": memory, "compile": (verdict,), "stage": "painting"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "POLL_S", 0.01)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    rig = Rig()
    await rig.put_session()
    process = Process(rig)
    transport = httpx.ASGITransport(create_app(lambda: process), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=JSON) as client:
        yield Site(process, client)
    await process.audits.close()
    await process.audit_jobs.close()


def problem_code(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == response.status_code and problem["detail"]
    code: str = problem["code"]
    return code


# -- asked and waited for


async def test_an_audit_is_answered_when_it_is_over(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.may_end.set()
    with caplog.at_level(logging.DEBUG):
        response = await site.post(run_id="run-1")
    answer = response.json()
    assert response.status_code == 200
    assert answer.pop("report_url").startswith("http://app.example.org/blobs/ey")
    assert answer == {
        "status": "succeeded",
        "run_id": "run-1",
        "report_path": "audit/run-1/report.html",
        "gpu": "CPU",
        "sm": "N/A",
        "compile_viable": False,
        "result_count": 2,
    }
    assert "/blobs/" not in caplog.text
    assert "audit_started" in {getattr(record, "action", "") for record in caplog.records}


async def test_what_is_not_asked_for_is_as_the_settings_say(site: Site) -> None:
    site.set(matrix=Matrix(variants=("telea",), guidance_scales=(7.0,), steps=(3,)), link_hours=5.0)
    body = {"user_id": USER, "session_id": SESSION, "run_id": "plain"}
    assert (await site.client.post("/audit", json=body, headers=ASYNC)).status_code == 202
    request = (await site.store.get("plain")).request
    assert request == AuditRequest(
        user_id=USER,
        session_id=SESSION,
        matrix=Matrix(variants=("telea",), guidance_scales=(7.0,), steps=(3,)),
        link_hours=5.0,
    )


async def test_every_axis_and_option_may_be_asked_for(site: Site) -> None:
    asked: dict[str, Any] = {
        "variants": ["telea"],
        "guidance_scales": [2.5],
        "steps": [4, 8],
        "seeds": [1, 2],
        "prompts": ["a", "b"],
        "crops": ["crop", "resize"],
        "mask_grows": [0.0, 0.02],
        "reference": "telea",
        "runs": 3,
        "compile_variants": [],
        "link_hours": 1.5,
        "price_per_hour": 0,
    }
    assert (await site.post(headers=ASYNC, run_id="full", **asked)).status_code == 202
    request = (await site.store.get("full")).request.model_dump(mode="json")
    stored = {**request, **request["matrix"]}
    assert {name: stored[name] for name in asked} == asked


async def test_a_whole_number_may_be_written_with_a_point(site: Site) -> None:
    asked = {"steps": [4.0], "seeds": [1.0], "runs": 3.0}
    assert (await site.post(headers=ASYNC, run_id="points", **asked)).status_code == 202
    request = (await site.store.get("points")).request
    assert (request.matrix.steps, request.matrix.seeds, request.runs) == ((4,), (1,), 3)


@pytest.mark.parametrize("status", [AuditStatus.INCOMPLETE, AuditStatus.CANCELED])
async def test_a_run_that_ends_otherwise_is_answered_with_its_status(site: Site, status: AuditStatus) -> None:
    site.may_end.set()
    site.ends_as = status
    response = await site.post()
    assert (response.status_code, response.json()["status"]) == (200, status)
    assert response.json()["report_path"].endswith("/report.html")


async def test_a_run_that_fails_is_a_problem_with_the_reasons_code(site: Site) -> None:
    site.may_end.set()
    site.ends_as = AuditStatus.FAILED
    response = await site.post(run_id="run-1")
    assert (response.status_code, problem_code(response)) == (500, "audit_impossible")
    assert (response.json()["detail"], response.json()["run_id"]) == ("no GPU is free", "run-1")


async def test_a_client_that_hangs_up_stops_nothing(site: Site) -> None:
    waiting = asyncio.create_task(site.post(run_id="run-1"))
    while not site.process.audit_jobs.tasks:
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    site.may_end.set()
    assert (await site.until("run-1", AuditStatus.SUCCEEDED)).result_count == 2


async def test_a_client_that_hangs_up_at_once_leaves_no_run_without_its_job(site: Site) -> None:
    held = asyncio.Event()
    jobs = site.process.rig.jobs
    stored = jobs.calls["update"]

    async def hold() -> None:
        await held.wait()

    jobs.after["update"] = hold
    waiting = asyncio.create_task(site.post(run_id="run-1"))
    while jobs.calls["update"] == stored:
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    held.set()
    await site.until("run-1", AuditStatus.RUNNING)


async def test_an_app_that_is_about_to_end_says_where_to_look(site: Site) -> None:
    waiting = asyncio.create_task(site.post(run_id="run-1"))
    await asyncio.sleep(0)
    site.process.is_stopping = True
    response = await waiting
    assert (response.status_code, response.headers["Location"]) == (202, "/audits/run-1")
    assert "Preference-Applied" not in response.headers


async def test_a_store_that_is_away_for_a_moment_is_waited_for(site: Site) -> None:
    waiting = asyncio.create_task(site.post(run_id="run-1"))
    while not site.process.audit_jobs.tasks:
        await asyncio.sleep(0.01)
    await site.until("run-1", AuditStatus.RUNNING)
    jobs = site.process.rig.jobs
    asked = jobs.calls["get"]
    jobs.is_down, jobs.only = True, {"get"}
    while jobs.calls["get"] < asked + 5:
        await asyncio.sleep(0.01)
    jobs.is_down = False
    site.may_end.set()
    assert (await waiting).status_code == 200


# -- asked without waiting


@pytest.mark.parametrize(
    "prefer",
    [
        ["respond-async"],
        ["Respond-Async"],
        ["respond-async, wait=10"],
        ['handling=lenient; foo="a, b" , respond-async;x=y'],
        ["return=minimal", "respond-async"],
        ['respond-async=""'],
    ],
)
async def test_who_prefers_not_to_wait_is_told_where_to_look(site: Site, prefer: list[str]) -> None:
    headers = [("Prefer", one) for one in prefer]
    response = await site.client.post("/audit", json={**BODY, "run_id": "run-1"}, headers=headers)
    assert response.status_code == 202
    assert response.headers["Location"] == "/audits/run-1"
    assert response.headers["Preference-Applied"] == "respond-async"
    assert response.json()["status"] == "queued"


@pytest.mark.parametrize(
    "prefer", ["wait=10", 'foo="respond-async"', 'foo="\\", respond-async"', "respond-asynchronously"]
)
async def test_other_preferences_are_no_wish_not_to_wait(site: Site, prefer: str) -> None:
    site.may_end.set()
    assert (await site.post(headers={"Prefer": prefer})).status_code == 200


def test_too_many_cells_are_counted_and_not_made() -> None:
    """A body within its limit can ask for millions of millions."""

    class Counted(Matrix):
        def cells(self) -> list[Cell]:
            raise AssertionError("made")

    with pytest.raises(ValidationError, match="6000 cells are more than 500"):
        Counted(seeds=tuple(range(2_000)), guidance_scales=(2.0,))


async def test_a_preference_that_is_too_long_is_not_read(site: Site) -> None:
    site.may_end.set()
    padded = "respond-async, foo=" + "x" * 1_000
    assert (await site.post(headers={"Prefer": padded})).status_code == 200


# -- what is refused


async def test_where_audits_are_switched_off_none_is_started(site: Site) -> None:
    site.set(enabled=False)
    response = await site.client.post("/audit", content=b"{")
    assert (response.status_code, problem_code(response)) == (404, "not_found")
    assert "audit.enabled is false" in response.json()["detail"]
    assert (await site.client.get("/audits")).json() == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"user_id": "../x"}, "user_id: "),
        ({"session_id": 3}, "session_id: "),
        ({"run_id": "a/b"}, "run_id: "),
        ({"run_id": ""}, "run_id: "),
        ({"run_id": "run\n"}, "run_id: "),
        ({"run_id": "x" * 65}, "run_id: "),
        ({"resume": "yes"}, "resume: "),
        ({"gpus": 8}, "gpus: "),
        ({"entrypoint": "rm -rf /"}, "entrypoint: "),
        ({"variants": []}, "variants: "),
        ({"variants": "telea"}, "variants: "),
        ({"variants": ["telea", "telea"]}, "body: variants: a value is given twice"),
        ({"variants": ["a/b"]}, "variants.0: "),
        ({"guidance_scales": [2, 101]}, "guidance_scales.1: "),
        ({"guidance_scales": ["2"]}, "guidance_scales.0: "),
        ({"steps": [0]}, "steps.0: "),
        ({"steps": [True]}, "steps.0: "),
        ({"steps": [4.5]}, "steps.0: "),
        ({"steps": ["4"]}, "steps.0: "),
        ({"seeds": ["1"]}, "seeds.0: "),
        ({"runs": "3"}, "runs: "),
        ({"link_hours": "3"}, "link_hours: "),
        ({"price_per_hour": "1"}, "price_per_hour: "),
        ({"seeds": [-1]}, "seeds.0: "),
        ({"seeds": list(range(251))}, "body: 502 cells are more than 500"),
        ({"prompts": ["x" * 2001]}, "prompts.0: "),
        ({"crops": ["all"]}, "crops.0: "),
        ({"reference": "Q8_0"}, "body: Q8_0 is not among the matrix's variants"),
        ({"compile_variants": ["Q8_0"]}, "body: Q8_0 is not among the matrix's variants"),
        ({"runs": 1}, "runs: "),
        ({"runs": 2.5}, "runs: "),
        ({"link_hours": 0}, "link_hours: "),
        ({"link_hours": 169}, "link_hours: "),
        ({"price_per_hour": -1}, "price_per_hour: "),
        ({"x" * 5000: 1}, "x" * 100 + ": "),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_wrong_field_is_named(site: Site, fields: dict[str, Any], named: str) -> None:
    response = await site.post(**fields)
    assert (response.status_code, problem_code(response)) == (422, "invalid_request")
    assert response.json()["detail"].startswith(named)
    assert await site.store.list() == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"price_per_hour": NaN}', b'{"price_per_hour": Infinity}']
)
async def test_what_is_no_request_is_refused(site: Site, body: bytes) -> None:
    given = body.replace(b"{", json.dumps(BODY).encode()[:-1] + b", ") if b"price" in body else body
    response = await site.client.post("/audit", content=given)
    assert (response.status_code, problem_code(response)) == (422, "invalid_request")


async def test_a_body_over_its_limit_is_refused(site: Site) -> None:
    response = await site.client.post("/audit", content=b" " * (MAX_BODY_BYTES + 1))
    assert (response.status_code, problem_code(response)) == (413, "body_too_large")


async def test_stores_that_no_job_can_reach_are_named(site: Site) -> None:
    site.process.audit_jobs.is_apart = True
    response = await site.post()
    assert (response.status_code, problem_code(response)) == (409, "audit_impossible")
    assert response.json()["detail"].startswith("jobs: memory:")
    assert await site.store.list() == []


async def test_a_variant_that_is_not_served_is_refused(site: Site) -> None:
    response = await site.post(variants=["telea", "Q4_0"])
    assert (response.status_code, problem_code(response)) == (422, "unknown_variant")
    assert "Q4_0" in response.json()["detail"]


@pytest.mark.parametrize("name", ["original.jpg", "mask_auto.png"])
async def test_a_session_without_its_pictures_is_not_found(site: Site, name: str) -> None:
    path = f"users/{USER}/sessions/{SESSION}/{name}"
    await site.process.rig.blobs.delete(path)
    response = await site.post()
    assert (response.status_code, problem_code(response)) == (404, "missing_input")
    assert path in response.json()["detail"]
    assert await site.store.list() == []


class AnHour:
    """Links of a backend whose own last an hour at most."""

    async def link(self, path: str, *, expires_s: int) -> str:
        if expires_s > 3600:
            raise ValueError(f"a link holds for 3600 s at most, not {expires_s}")
        return f"https://store/{path}"


async def test_links_longer_than_the_backend_allows_are_refused_before_anything_is_painted(site: Site) -> None:
    site.process.audits._blobs.link = AnHour().link
    response = await site.post(link_hours=1.5, headers=ASYNC)
    assert (response.status_code, problem_code(response)) == (422, "invalid_input")
    assert "link_hours: a link holds for 3600 s at most" in response.json()["detail"]
    assert await site.store.list() == []
    assert (await site.post(link_hours=1, headers=ASYNC)).status_code == 202


async def test_a_run_id_that_exists_is_refused(site: Site) -> None:
    site.may_end.set()
    await site.post(run_id="run-1")
    response = await site.post(run_id="run-1")
    assert (response.status_code, problem_code(response)) == (409, "audit_exists")


async def test_a_second_audit_is_refused_unless_several_may_run(site: Site) -> None:
    first = await site.started()
    response = await site.post()
    assert (response.status_code, problem_code(response)) == (409, "audit_running")
    assert first in response.json()["detail"]
    site.set(allow_concurrent=True)
    assert (await site.post(headers=ASYNC)).status_code == 202


async def test_of_many_audits_at_once_one_is_started(site: Site) -> None:
    answers = await asyncio.gather(*(site.post(headers=ASYNC) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 7
    assert len(site.process.audit_jobs.tasks) == len(await site.store.list()) == 1


async def test_a_store_that_is_down_is_said_to_be(site: Site) -> None:
    site.process.rig.jobs.is_down = True
    for response in (
        await site.post(),
        await site.client.get("/audits"),
        await site.client.get("/audits/x"),
        await site.client.post("/audits/x/cancel"),
    ):
        assert (response.status_code, problem_code(response)) == (503, "store_unavailable")


async def test_where_no_job_can_be_started_the_run_has_failed_and_can_be_resumed(site: Site) -> None:
    site.process.audit_jobs.is_down = True
    response = await site.post(run_id="run-1")
    assert (response.status_code, problem_code(response)) == (503, "jobs_unavailable")
    audit = await site.store.get("run-1")
    assert audit.status == AuditStatus.FAILED and audit.error is not None
    assert audit.error.code == "jobs_unavailable"
    site.process.audit_jobs.is_down = False
    site.may_end.set()
    resumed = await site.client.post(
        "/audit", json={"user_id": USER, "session_id": SESSION, "run_id": "run-1", "resume": True}
    )
    assert (resumed.status_code, resumed.json()["status"]) == (200, "succeeded")


# -- resuming


def resume(run_id: str | None = "run-1", **fields: Any) -> dict[str, Any]:
    return {"user_id": USER, "session_id": SESSION, "run_id": run_id, "resume": True, **fields}


async def test_a_run_that_lost_cells_is_resumed(site: Site) -> None:
    site.may_end.set()
    site.ends_as = AuditStatus.INCOMPLETE
    await site.post(run_id="run-1")
    site.ends_as = AuditStatus.SUCCEEDED
    response = await site.client.post("/audit", json=resume())
    assert (response.status_code, response.json()["status"]) == (200, "succeeded")
    assert set(site.process.audit_jobs.tasks) == {"fluxfill-audit-run-1", "fluxfill-audit-run-1.2"}


async def test_a_run_whose_job_was_killed_just_now_is_resumed_at_once(site: Site) -> None:
    run_id = await site.started()
    site.process.audit_jobs.tasks[f"fluxfill-audit-{run_id}"].cancel()
    site.may_end.set()
    assert (await site.client.post("/audit", json=resume(run_id))).status_code == 200


async def test_a_silent_job_is_stopped_before_its_run_goes_on(site: Site) -> None:
    run_id = await site.started()
    site.process.rig.clock.advance(ALIVE_S)
    first = site.process.audit_jobs.tasks[f"fluxfill-audit-{run_id}"]
    stopped_first: list[bool] = []

    async def work(audit: Audit) -> None:
        stopped_first.append(first.cancelled())
        site.may_end.set()
        await site.job(audit)

    site.process.audit_jobs.work = work
    response = await site.client.post("/audit", json=resume(run_id))
    assert (response.status_code, response.json()["status"]) == (200, "succeeded")
    assert stopped_first == [True]


async def test_a_silent_job_that_does_not_stop_is_not_waited_for_for_ever(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "GRACE_S", 0.05)

    async def deaf(audit: Audit) -> None:
        await site.begun(audit)
        while not site.may_end.is_set():
            with suppress(asyncio.CancelledError):
                await site.may_end.wait()

    site.process.audit_jobs.work = deaf
    run_id = await site.started()
    site.process.rig.clock.advance(ALIVE_S)
    site.process.audit_jobs.work = site.job
    response = await site.client.post("/audit", json=resume(run_id), headers=ASYNC)
    assert (response.status_code, response.json()["attempt"]) == (202, 2)
    site.may_end.set()
    await site.until(run_id, AuditStatus.SUCCEEDED)


async def test_a_run_whose_job_was_killed_just_now_is_in_nobodys_way(site: Site) -> None:
    run_id = await site.started()
    site.process.audit_jobs.tasks[f"fluxfill-audit-{run_id}"].cancel()
    assert (await site.post(headers=ASYNC)).status_code == 202
    killed = await site.store.get(run_id)
    assert killed.status == AuditStatus.FAILED and killed.error is not None and killed.error.code == "job_died"


async def test_a_run_with_a_live_job_is_not_resumed(site: Site) -> None:
    response = await site.client.post("/audit", json=resume(await site.started()))
    assert (response.status_code, problem_code(response)) == (409, "audit_running")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"run_id": None}, 422, "run_id: "),
        ({"steps": [4]}, 422, "steps: "),
        ({"compile_variants": []}, 422, "compile_variants: "),
        ({"link_hours": 1}, 422, "link_hours: "),
        ({"user_id": "somebody-else"}, 404, "there is no run run-1 of this session"),
        ({"session_id": "another"}, 404, "there is no run run-1 of this session"),
        ({"run_id": "run-2"}, 404, "there is no run run-2"),
    ],
    ids=str,
)
async def test_a_resume_goes_by_what_its_run_was_asked_for(
    site: Site, fields: dict[str, Any], status: int, named: str
) -> None:
    site.may_end.set()
    await site.post(run_id="run-1")
    response = await site.client.post("/audit", json=resume(**{"run_id": "run-1", **fields}))
    assert response.status_code == status
    assert response.json()["detail"].startswith(named)


# -- looking


async def test_a_run_is_seen_with_each_cells_progress(site: Site) -> None:
    run_id = await site.started()
    seen = (await site.client.get(f"/audits/{run_id}")).json()
    assert (seen["status"], seen["stage"], seen["attempt"]) == ("running", "painting", 1)
    assert seen["cells"]["telea_gs2"] == {"status": "succeeded", "step": 8, "steps": 8, "error": None}
    assert seen["counts"] == {"succeeded": 2}
    assert seen["memory"] == [{"after": "", "used_bytes": None, "floor_bytes": None, "waited_s": 0.0}]
    assert (seen["report_url"], seen["report_path"], seen["recommended"]) == (None, None, None)
    site.may_end.set()
    await site.until(run_id, AuditStatus.SUCCEEDED)
    seen = (await site.client.get(f"/audits/{run_id}")).json()
    assert seen["report_path"] == f"audit/{run_id}/report.html"
    assert seen["report_url"].startswith("http://app.example.org/blobs/")


async def test_the_newest_runs_are_listed_first(site: Site) -> None:
    site.set(allow_concurrent=True)
    for name in ("a", "b", "c"):
        await site.post(run_id=name, headers=ASYNC)
        site.process.rig.clock.advance(1)
    listed = (await site.client.get("/audits", params={"limit": 2})).json()
    assert [one["run_id"] for one in listed] == ["c", "b"]
    assert (listed[0]["user_id"], listed[0]["session_id"]) == (USER, SESSION)
    assert "report" not in str(listed)
    for limit in ("0", "101", "x"):
        response = await site.client.get("/audits", params={"limit": limit})
        assert (response.status_code, problem_code(response)) == (422, "invalid_request")


@pytest.mark.parametrize(("method", "path"), [("GET", "/audits/{}"), ("POST", "/audits/{}/cancel")])
@pytest.mark.parametrize("run_id", ["%2e%2e", "a%2Fb", "a%5Cb", "run%0A", "%00", "a.b", "%C3%A9", "x" * 65])
async def test_ids_that_could_escape_a_path_are_refused(site: Site, method: str, path: str, run_id: str) -> None:
    site.process.rig.jobs.is_down = True  # So that whatever reached the store would answer 503.
    response = await site.client.request(method, path.format(run_id))
    assert response.status_code in (404, 405, 422)
    assert problem_code(response) in ("not_found", "method_not_allowed", "invalid_request")


async def test_runs_that_never_were(site: Site) -> None:
    for response in (await site.client.get("/audits/x"), await site.client.post("/audits/x/cancel")):
        assert (response.status_code, problem_code(response)) == (404, "unknown_audit")


# -- jobs that die


async def test_who_waits_is_told_that_the_job_died(site: Site) -> None:
    async def crash(audit: Audit) -> None:
        await site.begun(audit)
        raise RuntimeError("out of luck")

    site.process.audit_jobs.work = crash
    response = await site.post(run_id="run-1")
    assert (response.status_code, problem_code(response)) == (500, "job_died")
    assert "failed before the run was over" in response.json()["detail"]
    assert (await site.store.get("run-1")).status == AuditStatus.FAILED


async def test_a_job_that_ended_before_it_began_is_seen(site: Site) -> None:
    async def nothing(audit: Audit) -> None: ...

    site.process.audit_jobs.work = nothing
    assert (await site.post()).json()["code"] == "job_died"


async def test_a_job_that_nobody_knows_is_dead_once_it_is_silent(site: Site) -> None:
    request = AuditRequest(user_id=USER, session_id=SESSION, matrix=Matrix(variants=("telea",)))
    await site.begun(await site.store.create(request, "by-hand"))
    assert (await site.client.get("/audits/by-hand")).json()["status"] == "running"
    site.process.rig.clock.advance(ALIVE_S)
    seen = (await site.client.get("/audits/by-hand")).json()
    assert (seen["status"], seen["error"]["code"]) == ("failed", "job_died")


@pytest.mark.parametrize(("has_begun", "silent_s"), [(True, ALIVE_S), (False, LAUNCH_S)])
async def test_a_job_that_goes_and_is_silent_is_dead_once_its_time_is_over(
    site: Site, has_begun: bool, silent_s: float
) -> None:
    if not has_begun:
        site.process.audit_jobs.work = never_ends
    waiting = asyncio.create_task(site.post(run_id="run-1"))
    await until(lambda: site.process.audit_jobs.tasks)
    if has_begun:
        await site.until("run-1", AuditStatus.RUNNING)
    site.process.rig.clock.advance(silent_s - 1)
    assert (await site.client.get("/audits/run-1")).json()["status"] == ("running" if has_begun else "queued")
    site.process.rig.clock.advance(1)
    assert problem_code(await waiting) == "job_died"


async def test_a_run_that_failed_has_no_report_of_an_earlier_attempt(site: Site) -> None:
    site.may_end.set()
    site.ends_as = AuditStatus.INCOMPLETE
    assert (await site.post(run_id="run-1")).json()["report_path"]
    site.process.audit_jobs.is_down = True
    await site.client.post("/audit", json=resume())
    seen = (await site.client.get("/audits/run-1")).json()
    assert (seen["status"], seen["report_path"], seen["report_url"]) == ("failed", None, None)


# -- canceling


async def test_a_running_audit_stops_by_itself(site: Site) -> None:
    run_id = await site.started()
    response = await site.client.post(f"/audits/{run_id}/cancel")
    assert (response.status_code, response.json()["run_id"]) == (200, run_id)
    assert (response.json()["status"], response.json()["result_count"]) == ("canceled", 2)
    await asyncio.wait_for(site.process.audit_jobs.tasks[f"fluxfill-audit-{run_id}"], 10)
    again = await site.client.post(f"/audits/{run_id}/cancel")
    assert (again.status_code, problem_code(again)) == (409, "illegal_transition")


async def test_a_canceled_job_has_time_to_write_its_report(site: Site) -> None:
    async def slow(audit: Audit) -> None:
        driver = await site.begun(audit)
        while not await driver.is_canceled():
            await asyncio.sleep(0.01)
        await site.may_end.wait()
        await site.put_report(audit.id)

    site.process.audit_jobs.work = slow
    await site.started(run_id="run-1")
    await site.client.post("/audits/run-1/cancel")
    await site.until("run-1", AuditStatus.CANCELED)
    assert (await site.client.get("/audits/run-1")).json()["report_url"] is None
    site.may_end.set()
    await asyncio.wait_for(site.process.audit_jobs.tasks["fluxfill-audit-run-1"], 10)
    assert (await site.client.get("/audits/run-1")).json()["report_path"] == "audit/run-1/report.html"


async def test_a_job_that_does_not_stop_is_stopped(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(audit: Audit) -> None:
        await site.begun(audit)
        await asyncio.Event().wait()

    monkeypatch.setattr(runs, "GRACE_S", 0.05)
    site.process.audit_jobs.work = deaf
    run_id = await site.started()
    assert (await site.client.post(f"/audits/{run_id}/cancel")).json()["status"] == "canceled"
    await asyncio.gather(site.process.audit_jobs.tasks[f"fluxfill-audit-{run_id}"], return_exceptions=True)
    assert site.process.audit_jobs.tasks[f"fluxfill-audit-{run_id}"].cancelled()


async def test_an_audit_that_waits_for_its_job_is_canceled_at_once(site: Site) -> None:
    waits = asyncio.Event()

    async def late(audit: Audit) -> None:
        await waits.wait()

    site.process.audit_jobs.work = late
    await site.post(headers=ASYNC, run_id="run-1")
    assert (await site.client.post("/audits/run-1/cancel")).json()["status"] == "canceled"
    async with asyncio.timeout(10):
        await asyncio.gather(site.process.audit_jobs.tasks["fluxfill-audit-run-1"], return_exceptions=True)
    assert site.process.audit_jobs.tasks["fluxfill-audit-run-1"].cancelled()


async def test_a_driver_that_begins_as_the_cancel_comes_has_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "GRACE_S", 0.05)
    begins = asyncio.Event()

    async def late(audit: Audit) -> None:
        await begins.wait()
        await site.job(audit)

    async def begin() -> None:
        begins.set()
        await site.until("run-1", AuditStatus.RUNNING)

    site.process.audit_jobs.work = late
    graces: list[float] = []

    async def stop(audit: Audit, grace_s: float) -> None:
        graces.append(grace_s)

    monkeypatch.setattr(site.process.audits, "_stop", stop)
    await site.post(headers=ASYNC, run_id="run-1")
    site.process.rig.jobs.before["update"] = begin
    await site.client.post("/audits/run-1/cancel")
    await site.process.audits.stopped()
    assert graces == [0.05]


async def test_a_job_that_cannot_be_stopped_is_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    run_id = await site.started()
    site.process.audit_jobs.is_down = True
    with caplog.at_level(logging.WARNING):
        await site.client.post(f"/audits/{run_id}/cancel")
        async with asyncio.timeout(10):
            while "Could not stop the job" not in caplog.text:
                await asyncio.sleep(0.01)
    assert (await site.until(run_id, AuditStatus.CANCELED)).id == run_id


# -- who may


ROUTES = [
    ("POST", "/audit"),
    ("GET", "/audits"),
    ("GET", "/audits/x"),
    ("POST", "/audits/x/cancel"),
    ("GET", "/audits/a.b"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        (None, 401, "unauthorized"),
        ("nobody", 401, "unauthorized"),
        ("worker", 403, "forbidden"),
        ("auditor", None, None),
        ("both", None, None),
    ],
)
async def test_audits_want_a_key_of_their_own(
    site: Site, method: str, path: str, key: str | None, status: int | None, code: str | None
) -> None:
    site.process.guard(api_keys=long("worker, auditor:audit, both:jobs+audit"), is_production=True)
    # Before anything else is looked at: a body that is none says nothing to a stranger.
    response = await site.client.request(method, path, content=b"{", headers={"X-API-Key": long(key)} if key else {})
    if status is None:
        assert response.status_code in (200, 404, 422)
    else:
        assert (response.status_code, problem_code(response)) == (status, code)


async def test_an_audit_is_none_of_the_jobs_that_the_other_routes_stop(site: Site) -> None:
    response = await site.client.post(f"/v1/jobs/{await site.started(run_id='run-1')}/cancel")
    assert (response.status_code, problem_code(response)) == (404, "unknown_job")
    assert (await site.store.get("run-1")).status == AuditStatus.RUNNING


async def test_a_key_for_audits_is_not_good_for_jobs(site: Site) -> None:
    site.process.guard(api_keys=long("worker, auditor:audit"), is_production=True)
    response = await site.client.post("/v1/jobs/x/cancel", headers={"X-API-Key": long("auditor")})
    assert (response.status_code, problem_code(response)) == (403, "forbidden")
    assert (await site.client.post("/v1/jobs/x/cancel", headers={"X-API-Key": long("worker")})).status_code == 404
