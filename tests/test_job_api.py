"""The job API's routes over memory stores and a worker, in process."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve_app.errors import BlankImage
from serve_app.http.app import create_app
from serve_app.http.problems import Bodies
from serve_app.http.views import log_lines
from serve_app.jobs.record import Cause, Event, State
from serve_app.models import GenerateRequest, LoraUse
from serve_app.parameters import GenerateParameters
from serve_app.telemetry import JsonFormatter

from .backends import at, make_audit, make_job
from .http_service import Process
from .rig import jpeg, line_mask, photo, png
from .test_generate import Studio

BODY = {"type": "generate", "prompt": "a cat", "width": 64, "height": 64, "steps": 2, "seed": 7}


class Site:
    """An app of one process, and a client of it."""

    def __init__(self, studio: Studio, **app: Any) -> None:
        self.studio, self.process = studio, Process(studio)
        transport = httpx.ASGITransport(create_app(lambda: self.process, **app), raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=None)

    async def post(self, **body: Any) -> dict[str, Any]:
        answer = await self.http.post("/v1/jobs", json={**BODY, **body})
        assert answer.status_code == 202, answer.text
        await self.studio.notifier.drained()
        job: dict[str, Any] = answer.json()["job"]
        return job

    async def done(self, **body: Any) -> dict[str, Any]:
        job = await self.post(**body)
        await self.studio.work()
        return await self.get(f"/v1/jobs/{job['id']}")

    async def get(self, path: str, **params: Any) -> Any:
        answer = await self.http.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site(Studio())
    async with made.http:
        yield made


def refused(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["detail"] == problem["message"] and problem["status"] == answer.status_code
    assert problem["correlation_id"] == answer.headers["X-Correlation-ID"]
    return answer.status_code, problem["code"]


# Posting


async def test_a_posted_job_is_accepted_and_looked_at(site: Site) -> None:
    answer = await site.http.post("/v1/jobs", json={**BODY, "count": 2, "guidance": 5})
    job = answer.json()["job"]
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert job.items() >= {"type": "generate", "status": "queued", "queue_position": 1, "progress": 0.0}.items()
    assert job["steps"] == [{"name": "generate", "status": "queued"}]
    assert job["summary"] == {"count": 2, "completed": 0}
    assert job["parameters"].items() >= {"steps": 2, "guidance": 5.0, "model_id": "sdxl", "seed": 7}.items()
    assert await site.get(answer.headers["Location"]) == job


async def test_a_job_that_is_done_says_what_it_made(site: Site) -> None:
    job = await site.done(count=3, format="jpeg")
    assert (job["status"], job["progress"], job["queue_position"]) == ("succeeded", 1.0, None)
    assert job["summary"] == {"count": 3, "completed": 3}
    assert job["seeds"] == [7, 8, 9]
    assert job["timings"]["engine_s"] == 1.5
    assert job["updated_at"] >= job["finished_at"] >= job["started_at"] >= job["created_at"]
    rows = (await site.get(f"/v1/jobs/{job['id']}/artifacts"))["artifacts"]
    assert [(row["item_index"], row["seed"], row["format"]) for row in rows] == [(i, 7 + i, "jpg") for i in range(3)]
    for row in rows:
        assert (row["width"], row["height"], row["content_type"]) == (64, 64, "image/jpeg")
        assert row["s3_key"] in await site.studio.paths() and row["url"].startswith("http")
        assert row["bytes"] == (await site.studio.blobs.head(row["s3_key"])).size
    assert len({row["id"] for row in rows}) == 3


@pytest.mark.parametrize(("own", "cost"), [(None, 1.0), (4800.0, 2.0), (0.0, 0.0)])
async def test_a_job_says_what_it_cost_once_it_has_succeeded(own: float | None, cost: float) -> None:
    site = Site(Studio(price_per_hour=2400.0, generators={"sdxl": {"price_per_hour": own}}))
    async with site.http:
        assert (await site.post())["cost"] is None
        job = await site.done(count=3)
    assert job["timings"]["engine_s"] == 1.5 and job["cost"] == pytest.approx(cost)


async def test_without_a_price_a_job_has_no_cost(site: Site) -> None:
    job = await site.done()
    assert job["status"] == "succeeded" and job["cost"] is None


async def test_the_queue_is_counted(site: Site) -> None:
    site.studio.clock.advance(1)
    first = await site.post()
    site.studio.clock.advance(1)
    second = await site.post()
    assert (first["queue_position"], second["queue_position"]) == (1, 2)


@pytest.mark.parametrize("key", ['"k-1"', "k-1"])
async def test_a_request_sent_again_is_answered_with_its_job(site: Site, key: str) -> None:
    answers = [
        await site.http.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": given}) for given in ('"k-1"', key)
    ]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()
    other = await site.http.post("/v1/jobs", json={**BODY, "seed": 8}, headers={"Idempotency-Key": key})
    assert refused(other) == (422, "key_reused")


async def test_a_key_in_flight_is_answered_later(site: Site) -> None:
    held, entered = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        entered.set()
        await held.wait()

    site.studio.jobs.before["create"] = hold
    key = {"Idempotency-Key": "k"}
    first = asyncio.create_task(site.http.post("/v1/jobs", json=BODY, headers=key))
    await entered.wait()
    second = await site.http.post("/v1/jobs", json=BODY, headers=key)
    assert refused(second) == (409, "post_in_flight")
    assert second.headers["Retry-After"] == "1"
    held.set()
    assert (await first).status_code == 202


@pytest.mark.parametrize("key", ["", '""', "k" * 256, f'"{"k" * 256}"'])
async def test_a_key_without_length_or_too_long_is_refused(site: Site, key: str) -> None:
    answer = await site.http.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": key})
    assert refused(answer) == (422, "invalid_request")
    assert "Idempotency-Key" in answer.json()["detail"]


async def test_a_job_is_put_under_an_id_of_the_clients_own(site: Site) -> None:
    first, again = [await site.http.put("/v1/jobs/mine", json=BODY) for _ in range(2)]
    assert (first.status_code, first.json()["job"]["id"]) == (202, "mine")
    assert first.json() == again.json()
    assert refused(await site.http.put("/v1/jobs/mine", json={**BODY, "seed": 8})) == (422, "key_reused")
    for name in ("a.b", "a" * 65):
        assert refused(await site.http.put(f"/v1/jobs/{name}", json=BODY)) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("change", "status", "code", "field"),
    [
        ({"prompt": ""}, 422, "invalid_request", "prompt"),
        ({"count": 101}, 422, "invalid_request", "count"),
        ({"hue": "s3cret"}, 422, "invalid_request", "hue"),
        ({"steps": "s3cret"}, 422, "invalid_request", "steps"),
        ({"width": 65}, 422, "invalid_input", "width"),
        ({"chain": {"upscale": {"scale": 2}}}, 422, "not_supported", "chain"),
        ({"type": "video"}, 422, "invalid_input", "type"),
        ({"model_id": "none"}, 422, "unknown_variant", "model_id"),
    ],
)
async def test_a_refusal_names_the_field_and_not_the_input(
    site: Site, change: dict[str, Any], status: int, code: str, field: str
) -> None:
    answer = await site.http.post("/v1/jobs", json={**BODY, **change})
    assert refused(answer) == (status, code)
    assert answer.json()["detail"].startswith(f"{field}: ") and "s3cret" not in answer.text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"type": "generate"}, "prompt: it is required"),
        ({**BODY, "hue": 1}, "hue: there is no such field"),
        ({**BODY, "model_id": "none", "engine": "flux"}, "model_id: none is no model of engine flux; the models of "),
    ],
)
async def test_a_refusal_is_in_words_of_our_own(site: Site, body: dict[str, Any], said: str) -> None:
    answer = await site.http.post("/v1/jobs", json=body)
    assert answer.json()["detail"].startswith(said)
    assert answer.json()["details"].get("field", "model_id") == said.partition(":")[0]


# Bodies


def form(job: Any = None, **files: bytes) -> dict[str, Any]:
    return {
        "data": {"job": json.dumps(job or BODY)},
        "files": {name: (f"{name}.png", data) for name, data in files.items()},
    }


async def test_a_form_brings_its_files_as_bytes(site: Site) -> None:
    taken: list[Any] = []

    async def post(body: Any, *_: Any, **__: Any) -> Any:
        taken.append(body)
        return await original({**BODY}, *_, **__)

    original, site.process.jobs.post = site.process.jobs.post, post  # type: ignore[method-assign]
    pictures = {"image": jpeg(photo()), "mask": png(line_mask())}
    answer = await site.http.post("/v1/jobs", **form({"type": "inpaint"}, **pictures))
    assert answer.status_code == 202
    assert taken == [{"type": "inpaint", **pictures}]


#: Each of its names would have an error of its own.
WIDE = json.dumps({**BODY, **dict.fromkeys(map(str, range(10_000)))}).encode()


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "malformed_message"),
        ({"content": b"[]", "headers": {"Content-Type": "application/json"}}, 400, "malformed_message"),
        ({"content": b"[" * 60_000, "headers": {"Content-Type": "application/json"}}, 400, "malformed_message"),
        ({"content": WIDE, "headers": {"Content-Type": "application/json"}}, 400, "malformed_message"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "malformed_message"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400, "malformed_message"),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, "unsupported_media_type"),
        (form(photo=b"x"), 422, "invalid_request"),
        (form({**BODY, "mask": "data:,"}, mask=b"x"), 422, "invalid_request"),
        ({"files": [("image", ("a", b"x")), ("image", ("b", b"x"))]}, 422, "invalid_request"),
        ({"files": [("image", ("a", b"x"))]}, 422, "invalid_request"),
        ({"files": [("image", ("a", b"x"))] * 3}, 400, "malformed_message"),
    ],
)
async def test_what_is_no_body_of_a_job_is_refused(
    site: Site, request_: dict[str, Any], status: int, code: str
) -> None:
    assert refused(await site.http.post("/v1/jobs", **request_)) == (status, code)
    assert await site.get("/v1/jobs") == {"jobs": [], "next_cursor": None}


async def test_no_depth_of_nesting_is_a_fault_of_the_apps(site: Site) -> None:
    # Somewhere between what is read and what is not, there is a depth that the reader alone could do.
    bodies = [json.dumps({**BODY, "provider": "?"}).replace('"?"', "[" * n + "]" * n) for n in range(700, 1000)]
    kind = {"Content-Type": "application/json"}
    statuses = {(await site.http.post("/v1/jobs", content=body, headers=kind)).status_code for body in bodies}
    assert statuses <= {400, 422}


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
async def test_a_body_over_its_limit_is_refused_however_it_comes(site: Site, kind: str) -> None:
    site.process.limits = site.process.limits.model_copy(update={"image_bytes": 1000, "message_bytes": 1000})

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000
        pytest.fail("it read on")

    answer = await site.http.post("/v1/jobs", content=chunks(), headers={"Content-Type": kind})
    assert refused(answer) == (413, "body_too_large")


async def test_a_large_body_takes_the_places_of_several() -> None:
    site, begun, rest = Site(Studio(), bodies=Bodies(at_once=2)), asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        begun.set()
        await rest.wait()
        yield b"}"

    async with site.http:
        kind = {"Content-Type": "application/json"}
        large = asyncio.create_task(site.http.post("/v1/jobs", content=slow(), headers=kind))
        await begun.wait()
        answer = await site.http.post("/v1/jobs", json=BODY)
        assert refused(answer) == (503, "unavailable") and answer.headers["Retry-After"] == "1"
        rest.set()
        assert (await large).status_code == 422
        assert (await site.http.post("/v1/jobs", json=BODY)).status_code == 202


# Looking


async def test_an_audit_is_listed_with_audits_alone(site: Site) -> None:
    audit = make_audit()
    await site.studio.jobs.update(audit.id, audit.lock_key, lambda *_: (audit,))
    assert (await site.get("/v1/jobs"))["jobs"] == []
    assert (await site.http.get("/v1/jobs", params={"type": "audit"})).status_code == 422


async def test_jobs_are_listed_page_by_page(site: Site) -> None:
    ids = []
    for _ in range(5):
        site.studio.clock.advance(1)
        ids.append((await site.post())["id"])

    async def paged(*, deleted: bool = False) -> list[str]:
        found, cursor = list[str](), {}
        while cursor is not None:
            page = await site.get("/v1/jobs", limit=2, **cursor)
            found += [job["id"] for job in page["jobs"]]
            cursor = page["next_cursor"] and {"cursor": page["next_cursor"]}
            for job in page["jobs"] if deleted else ():
                assert (await site.http.delete(f"/v1/jobs/{job['id']}")).status_code == 204
        return found

    assert await paged() == ids[::-1]
    await site.http.post(f"/v1/jobs/{ids[2]}/cancel")
    assert [job["id"] for job in (await site.get("/v1/jobs", status="canceled"))["jobs"]] == [ids[2]]
    assert (await site.get("/v1/jobs", type="inpaint"))["jobs"] == []
    for wrong in ({"limit": 0}, {"limit": 201}, {"status": "done"}, {"cursor": "a.b"}, {"cursor": "1-"}):
        assert (await site.http.get("/v1/jobs", params=wrong)).status_code == 422
    for id in ids:
        await site.http.post(f"/v1/jobs/{id}/cancel")
    assert await paged(deleted=True) == ids[::-1] and await paged() == []


@pytest.mark.parametrize(("asked", "lasts_s"), [(None, 3600), (600, 600), (1, 300), (10**9, 86_400)])
async def test_links_last_as_long_as_asked_within_limits(site: Site, asked: int | None, lasts_s: int) -> None:
    job, given = await site.done(), []
    link = site.studio.blobs.link

    async def noted(path: str, *, expires_s: int) -> str:
        given.append(expires_s)
        return str(await link(path, expires_s=expires_s))

    site.process.jobs._blobs.link = noted
    await site.get(f"/v1/jobs/{job['id']}/artifacts", **({} if asked is None else {"expires_s": asked}))
    assert given == [lasts_s]


async def test_progress_is_of_the_whole_and_of_each_picture(site: Site) -> None:
    held, at_second = asyncio.Event(), asyncio.Event()

    async def hold(request: Any) -> None:
        if request.seed == 8:
            at_second.set()
            await held.wait()

    site.studio.painter.before = hold
    job = await site.post(count=4)
    path = f"/v1/jobs/{job['id']}"
    working = asyncio.create_task(site.studio.work())
    await at_second.wait()
    progress = await site.get(f"{path}/progress")
    assert progress["progress"] == 0.25
    assert [item["progress"] for item in progress["items"]] == [1.0, 0.0, 0.0, 0.0]
    assert progress["stages"] == [{"name": "generate", "weight": 1.0}]
    assert (await site.get(path)).items() >= {"status": "running", "seeds": [7], "attempt": 1}.items()
    held.set()
    await working
    assert (await site.get(f"{path}/progress"))["progress"] == 1.0


async def logs(site: Site, job_id: str, **params: Any) -> list[dict[str, Any]]:
    answer = await site.http.get(f"/v1/jobs/{job_id}/logs", params=params)
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_a_log_is_told_of_events(site: Site) -> None:
    job = await site.done(count=2)
    lines = await logs(site, job["id"])
    codes = ["step.start", "model.selected", "artifact.written", "artifact.written", "step.finish", "job.finish"]
    assert [line["code"] for line in lines] == codes
    assert [line["item_index"] for line in lines if "item_index" in line] == [0, 1]
    assert {line["job_id"] for line in lines} == {job["id"]}
    assert await logs(site, job["id"], tail=1) == lines[-1:]
    assert await logs(site, job["id"], since_ts=lines[0]["ts"]) == lines
    assert await logs(site, job["id"], since_ts="2999-01-01T00:00:00") == []
    for wrong in ({"tail": 0}, {"tail": 2001}, {"since_ts": "never"}):
        answer = await site.http.get(f"/v1/jobs/{job['id']}/logs", params=wrong)
        assert refused(answer) == (422, "invalid_request")


def test_a_log_names_the_loras_and_what_of_them_has_no_effect() -> None:
    cat, snow = (
        LoraUse(id=name, name=name, path=name, sha256=name, size_bytes=1, scale=scale, ignores_text_encoder=ignored)
        for name, scale, ignored in (("my cat", 0.8, True), ("snow", -1.0, False))
    )
    parameters = GenerateParameters(
        prompt="a cat", guidance_scale=3.5, steps=2, width=64, height=64, format="png", loras=(cat, snow)
    )
    claimed = Event(number=1, at=at(0), status=State.RUNNING, cause=Cause.CLAIMED)
    said = [line.message for line in log_lines(make_job(variant="flux", parameters=parameters), claimed)]
    assert said[-1] == (
        "Works with flux and the LoRA my cat at 0.8 (its text encoder layers have no effect) and the LoRA snow at -1"
    )


# Canceling and deleting


async def test_a_canceled_job_is_deleted_with_all_it_made(site: Site) -> None:
    job = await site.done()
    path = f"/v1/jobs/{job['id']}"
    assert refused(await site.http.post(f"{path}/cancel")) == (409, "illegal_transition")
    waiting = f"/v1/jobs/{(await site.post())['id']}"
    assert refused(await site.http.delete(waiting)) == (409, "illegal_transition")
    canceled = (await site.http.post(f"{waiting}/cancel")).json()
    assert (canceled["status"], canceled["error_code"]) == ("canceled", "canceled")
    assert [line["code"] for line in await logs(site, canceled["id"])] == ["error", "job.finish"]
    for one in (path, waiting):
        answer = await site.http.delete(one)
        assert (answer.status_code, answer.content) == (204, b"")
        for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/logs"), ("POST", "/cancel")):
            assert refused(await site.http.request(method, one + tail)) == (404, "unknown_job")
    assert await site.studio.paths() == []


async def test_a_failed_job_is_replayed_with_all_its_attempts(site: Site) -> None:
    async def blank(request: GenerateRequest) -> None:
        raise BlankImage("every pixel is the same")

    site.studio.painter.before = blank
    job = await site.done(count=2)
    assert (job["status"], job["error_code"], job["dead_lettered"]) == ("failed", "blank_image", True)
    path = f"/v1/jobs/{job['id']}"
    site.studio.painter.before = None
    again = (await site.http.post(f"{path}/replay")).json()
    assert (again["status"], again["attempt"], again["error_code"]) == ("queued", 0, None)
    assert not again["dead_lettered"]
    await site.studio.notifier.drained()
    assert len(site.studio.topics.sessions) == 2, "its message is published again"
    assert (await site.studio.work()).reason == "succeeded"
    assert (await site.get(path))["summary"] == {"count": 2, "completed": 2}
    assert refused(await site.http.post(f"{path}/replay")) == (409, "illegal_transition")
    assert refused(await site.http.post("/v1/jobs/none/replay")) == (404, "unknown_job")


# Keys


async def test_only_an_admin_replays(site: Site) -> None:
    site.process.guard(api_keys="both:submit+read+jobs,boss:admin")
    job = (await site.http.post("/v1/jobs", json=BODY, headers={"X-API-Key": "both"})).json()["job"]
    path = f"/v1/jobs/{job['id']}/replay"
    assert refused(await site.http.post(path, headers={"X-API-Key": "both"})) == (403, "forbidden")
    assert refused(await site.http.post(path, headers={"X-API-Key": "boss"})) == (409, "illegal_transition")


async def test_each_scope_does_its_own_and_each_key_sees_its_own(site: Site) -> None:
    site.process.guard(api_keys="writer:submit,reader:read,both:submit+read,boss:admin")

    async def ask(key: str, method: str, path: str, **request: Any) -> httpx.Response:
        return await site.http.request(method, path, headers={"X-API-Key": key}, **request)

    assert refused(await site.http.get("/v1/jobs")) == (401, "unauthorized")
    assert refused(await ask("reader", "POST", "/v1/jobs", json=BODY)) == (403, "forbidden")
    assert refused(await ask("writer", "GET", "/v1/jobs")) == (403, "forbidden")
    assert refused(await ask("writer", "GET", "/v1/models")) == (403, "forbidden")
    job = (await ask("both", "POST", "/v1/jobs", json=BODY)).json()["job"]
    path = f"/v1/jobs/{job['id']}"
    for tail in ("", "/artifacts", "/logs", "/progress", "/events", "/progress/stream"):
        assert refused(await ask("reader", "GET", path + tail)) == (404, "unknown_job")
    for method, tail in (("POST", "/cancel"), ("DELETE", "")):
        assert refused(await ask("writer", method, path + tail)) == (404, "unknown_job")
    listed = {key: (await ask(key, "GET", "/v1/jobs")).json()["jobs"] for key in ("both", "reader", "boss")}
    assert {key: len(jobs) for key, jobs in listed.items()} == {"both": 1, "reader": 0, "boss": 1}
    assert (await ask("boss", "POST", f"{path}/cancel")).status_code == 200


async def test_an_exhausted_quota_says_when_to_come_again() -> None:
    site = Site(Studio(api={"jobs_per_day": 1}))
    async with site.http:
        site.process.guard(api_keys="one")
        headers = {"Authorization": "Bearer one"}
        assert (await site.http.post("/v1/jobs", json=BODY, headers=headers)).status_code == 202
        answer = await site.http.post("/v1/jobs", json=BODY, headers=headers)
        assert refused(answer) == (429, "quota_exceeded")
        assert answer.headers["Retry-After"] == str(answer.json()["details"]["retry_after_s"])


# Models and readiness


async def test_models_are_one_body_for_several_clients(site: Site) -> None:
    body = await site.get("/v1/models")
    assert body["object"] == "list" and body["data"] == body["models"]
    rows = {row["id"]: row for row in body["models"]}
    kinds = {"telea": "inpaint", "sdxl": "sdxl-checkpoint", "flux-dev-Q8_0": "flux-transformer"}
    assert {name: row["kind"] for name, row in rows.items()} == kinds
    sdxl = await site.get("/v1/models/sdxl")
    assert rows["sdxl"].items() <= sdxl.items()
    assert sdxl["defaults"] == {"width": 1024, "height": 1024, "steps": 30, "guidance": 7.0}
    assert sdxl["capabilities"]["multiple_px"] == 8 and "count" in sdxl["parameters_schema"]["properties"]
    assert (sdxl["state"], sdxl["enabled"], sdxl["owned_by"]) == ("loaded", True, "stabilityai")
    assert sdxl["source_uri"].startswith("hf://stabilityai/") and sdxl["local_path"] is None
    assert refused(await site.http.get("/v1/models/none")) == (404, "unknown_model")


@pytest.mark.parametrize(
    ("state", "seen"),
    [("ready", "loaded"), ("starting", "loading"), ("scaled_to_zero", "available"), ("failed", "failed")],
)
async def test_a_model_says_whether_it_can_work(site: Site, state: Any, seen: str) -> None:
    site.process.state = state
    assert (await site.get("/v1/models/sdxl"))["state"] == seen


async def test_a_models_file_is_shown_without_its_folder() -> None:
    definition = {"family": "sdxl", "file": "/models/civitai/epic.safetensors", "base": "/models/base"}
    studio = Studio()
    studio.settings = studio.settings.model_copy(
        update={"generators": {"epic": type(studio.settings.generators["sdxl"])(definition=definition)}}
    )
    studio.api.settings = studio.settings
    site = Site(studio)
    async with site.http:
        answer = await site.http.get("/v1/models/epic")
        assert (
            answer.json().items()
            >= {"local_path": "epic.safetensors", "files_json": ["epic.safetensors", "base"]}.items()
        )
        assert "/models/civitai" not in answer.text and "/models/base" not in answer.text


async def test_readyz_says_in_a_word_what_ready_says(site: Site) -> None:
    assert await site.get("/readyz") == {"status": "ready"}
    assert await site.get("/healthz") == {"status": "ok"}
    site.process.state = "starting"
    assert refused(await site.http.get("/readyz")) == (503, "unavailable")


# Correlation


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        ({"X-Correlation-ID": "order-7"}, True),
        ({"X-Request-ID": "order-7"}, True),
        ({"X-Correlation-ID": "order 7"}, False),
        ({"X-Correlation-ID": "o" * 129}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("path", ["/health", "/nope", "/v1/jobs/none", "/v1/jobs?limit=0", "/blobs/broken.token"])
async def test_every_answer_has_the_requests_correlation_id(
    site: Site, path: str, headers: dict[str, str], kept: bool
) -> None:
    answer = await site.http.get(path, headers=headers)
    said = answer.headers["X-Correlation-ID"]
    assert (said == "order-7") == kept and len(said) >= 7
    if answer.status_code >= 400:
        assert answer.json()["correlation_id"] == said


async def test_the_log_has_the_requests_correlation_id(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonFormatter().format(record))

    handler = Lines()
    logging.getLogger("serve_app").addHandler(handler)
    envelope = {"message": {"data": base64.b64encode(b"{}").decode(), "messageId": "7"}}
    await site.http.post("/inpaint", json=envelope, headers={"X-Correlation-ID": "order-7"})
    logging.getLogger("serve_app").removeHandler(handler)
    assert lines and all(json.loads(line)["correlation_id"] == "order-7" for line in lines)
