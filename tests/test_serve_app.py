"""The whole app on Ray Serve: what its users see, and what dies in the middle."""

import asyncio
import base64
import json
import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from standardwebhooks import Webhook

from serve_app import adapters
from serve_app.adapters.stores import sql_database
from serve_app.edit.job import edit_job_id
from serve_app.edit.session import session_path
from serve_app.jobs.messages import EditMessage
from serve_app.jobs.record import Job, State
from serve_app.models import Pixels

from . import webhook_receiver
from .rig import jpeg, line_mask, photo, png
from .serving import DEFAULTS, WEBHOOK_SECRET, App, Collector

pytestmark = [pytest.mark.serve, pytest.mark.timeout(240)]


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 60) -> Any:
    """What the condition gives once it is true."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.1)
        return found


async def state_of(app: App, job_id: str, state: State) -> Job:
    async def reached() -> Job | None:
        job = await app.client.get(job_id)
        return job if job is not None and job.status == state else None

    return await until(reached)


async def variant_state(app: App, variant: str, state: str, kind: str = "variants") -> dict[str, Any]:
    async def reached() -> dict[str, Any] | None:
        found: dict[str, Any] = app.ready()[kind][variant]
        return found if found["state"] == state else None

    return await until(reached)


async def dead_letters(app: App) -> list[dict[str, str]]:
    """What is in the dead-letter topic once there is something, and acknowledged."""

    async def some() -> list[dict[str, str]]:
        return await attributes_in(app, app.settings.messages.dead_letter_subscription)

    found: list[dict[str, str]] = await until(some)
    return found


async def attributes_in(app: App, subscription: str) -> list[dict[str, str]]:
    """Of the messages that the subscription has now, acknowledged."""
    kept = adapters.dead_letters(app.settings.messages.model_copy(update={"dead_letter_subscription": subscription}))
    found = await kept.pull(1000)
    await kept.acknowledge(found)
    await kept.close()
    return [dict(letter.delivery.attributes) for letter in found]


# -- what users see


async def test_a_message_goes_in_and_the_edited_photo_comes_out(app: App, tmp_path: Path) -> None:
    job = await app.finished(await app.submit())
    assert (job.status, job.variant, job.attempt) == (State.SUCCEEDED, "telea", 1)
    edited, preview = sorted(await app.client.fetch(job, tmp_path))
    assert cv2.imread(str(edited)).shape == photo().shape
    assert cv2.imread(str(preview)).shape == photo().shape
    mirror = adapters.job_store(app.settings.jobs)

    async def told() -> bool:
        document = await mirror.read_session(job.user_id, job.session_id)
        return document is not None and document["processingStatus"] == "completed"

    await until(told)


async def test_the_end_is_told_on_the_topic_and_at_the_url_with_the_trace(app: App) -> None:
    trace = f"00-{uuid.uuid4().hex}-{uuid.uuid4().hex[:16]}-01"
    async with webhook_receiver.serve(webhook_receiver.status(204), port=app.receiver_port) as receiver:
        url = f"http://{receiver.authority}/hook"
        job_id = await app.submit(callbackUrl=url, attributes={"traceparent": trace})
        assert (await app.finished(job_id)).status == State.SUCCEEDED

        async def called() -> Any:
            return receiver.requests

        [hook] = await until(called)
    assert Webhook(WEBHOOK_SECRET).verify(hook.body.decode(), hook.headers)["data"]["jobId"] == job_id
    assert hook.headers["traceparent"] == trace
    [completed] = [one for one in await attributes_in(app, "session-completed") if one["jobId"] == job_id]
    assert (completed["status"], completed["traceparent"]) == ("succeeded", trace)


async def test_a_picture_is_seen_by_a_signed_link(app: App) -> None:
    job = await app.finished(await app.submit())
    urls = await app.client.links(job, expires_s=60)
    links = dict(zip((artifact.role for artifact in job.artifacts), urls, strict=True))
    async with httpx.AsyncClient() as http:
        answer = await http.get(links["edited"])
        altered = await http.get(links["edited"][:-4] + "AAAA")
    stored, _ = await adapters.blob_store(app.settings.blobs).get(job.paths["edited"], max_bytes=10**7)
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, "image/jpeg", stored)
    assert (altered.status_code, altered.json()["code"]) == (403, "invalid_link")


async def test_no_process_logs_a_secret_or_a_signed_link(app: App) -> None:
    async with webhook_receiver.serve(webhook_receiver.status(500), port=app.receiver_port) as receiver:
        job_id = await app.submit(prompt="a neighbour", callbackUrl=f"http://{receiver.authority}/hook?token=sesame")
        job = await app.finished(job_id)

        async def called() -> Any:
            return receiver.requests

        await until(called)
    links = [*await app.client.links(job, expires_s=60), f"{app.http}/blobs/sesame", f"{app.http}/nowhere?token=sesame"]
    async with httpx.AsyncClient() as http:
        for link in links:
            await http.get(link)
            await http.get(link[:-4] + "AAAA")

    def logged() -> str:
        return "".join(file.read_text(errors="replace") for file in app.logs.rglob("*") if file.is_file())

    async def all_answered() -> str:
        said = logged()
        return said if job_id in said and said.count("GET /blobs/{token} 403") >= 4 else ""

    said = await until(all_answered)
    tokens = [link.rpartition("/")[2] for link in links[:2]]
    for secret in (WEBHOOK_SECRET, WEBHOOK_SECRET.removeprefix("whsec_"), "sesame", "a neighbour", *tokens):
        found = [line[:300] for line in said.splitlines() if secret in line]
        assert not found, found


async def test_one_trace_leads_from_the_command_line_to_the_acknowledgment(
    app: App, collector: Collector, tmp_path: Path
) -> None:
    original, mask = app.photo_files()
    program = str(Path(sys.executable).with_name("fluxfill"))
    files = ["--original", str(original), "--mask", str(mask), "--out", str(tmp_path), "--steps", "5"]
    command = [program, "submit", *files, "--config", str(app.folder / "config.yaml")]
    environment = {**os.environ, **collector.environment("always_on")}
    ran = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    def published() -> str:
        return next(span.trace_id.hex() for service, span in collector.received if service == "fluxfill-client")

    async def all_told() -> list[tuple[str, str]] | None:
        found = sorted((service, span.name) for service, span in collector.of_trace(published()))
        return (
            found if ("fluxfill-ingress", "acknowledge") in found and ("fluxfill-replica", "paint") in found else None
        )

    found = await until(all_told)
    of_ingress = ["acknowledge", "decode", "encode", "fetch", "process", "prompt", "queue", "upload", "wait"]
    assert found == [
        ("fluxfill-client", "publish"),
        *(("fluxfill-ingress", name) for name in of_ingress),
        ("fluxfill-replica", "paint"),
    ]
    spans = {span.name: span for _, span in collector.of_trace(published())}
    assert spans["process"].parent_span_id == spans["publish"].span_id
    assert spans["paint"].parent_span_id == spans["process"].span_id
    assert [event.name for event in spans["paint"].events]


async def test_a_session_is_canceled_over_http_and_its_waiting_message_never_starts(app: App) -> None:
    running_job = await app.submit("unwanted", variant="slow", steps=30)
    await state_of(app, running_job, State.RUNNING)
    waiting = await app.submit("unwanted", variant="telea", steps=3)
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{app.http}/v1/sessions/u/unwanted/cancel")
        again = await http.post(f"{app.http}/v1/jobs/{running_job}/cancel")
        unknown = await http.post(f"{app.http}/v1/jobs/edit-nobody-knows/cancel")
    assert {"id": running_job, "status": "canceled"} in answer.json()["jobs"]
    assert (again.status_code, unknown.status_code) == (409, 404)
    for job_id in (running_job, waiting):
        job = await app.finished(job_id)
        assert (job.status, job.artifacts) == (State.CANCELED, ())


async def test_the_real_pipeline_wakes_from_zero_and_encodes_a_prompt_once(app: App) -> None:
    assert app.ready()["variants"]["tiny-Q4_0"]["state"] == "scaled_to_zero"
    job = await app.finished(await app.submit(variant="tiny-Q4_0", steps=2, prompt="grass"))
    assert (job.status, job.progress.step, job.progress.steps) == (State.SUCCEEDED, 2, 2)
    assert job.error is None
    cached = [blob.path async for blob in adapters.blob_store(app.settings.blobs).list("prompts")]
    assert len(cached) == 1 and cached[0].endswith(".safetensors")
    state = await variant_state(app, "tiny-Q4_0", "ready")
    assert state["error"] == "" and state["where"]["pid"] in app.pids("Inpainter-tiny-Q4_0")


async def test_asking_for_readiness_wakes_no_variant(app: App) -> None:
    for _ in range(5):
        assert app.ready()["variants"]["tiny-Q8_0"] == {"state": "scaled_to_zero", "error": "", "where": {}}
        await asyncio.sleep(1.1)
    assert app.pids("Inpainter-tiny-Q8_0") == set()


async def test_the_command_line_makes_pictures_with_a_real_pipeline_from_zero(app: App, tmp_path: Path) -> None:
    """FLUX.1-dev's, which has its prompts from a text encoder; SDXL's is tried without Ray."""
    program = str(Path(sys.executable).with_name("fluxfill"))
    size = ["--width", "64", "--height", "64", "--steps", "2", "--url", app.http]
    command = [program, "generate", "grass", "--model", "tiny-flux-dev", "--count", "2", "--seed", "7", "--out", "out"]
    ran = await asyncio.to_thread(
        subprocess.run, [*command, *size], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = sorted(path.name.partition("_")[2] for path in (tmp_path / "out").iterdir())
    assert names == ["0_64x64_7.png", "1_64x64_8.png"]
    where = (await variant_state(app, "tiny-flux-dev", "ready", "generators"))["where"]
    assert where["device"] and where["pid"] in app.pids("Generator-tiny-flux-dev")


async def test_a_push_is_worked_on_and_answered(app: App) -> None:
    store = adapters.blob_store(app.settings.blobs)
    await store.put(session_path("u", "push", "original.jpg"), jpeg(photo()), content_type="image/jpeg")
    await store.put(session_path("u", "push", "mask_auto.png"), png(line_mask()), content_type="image/png")
    data = base64.b64encode(json.dumps({"userId": "u", "sessionId": "push"}).encode()).decode()
    body = {"message": {"data": data, "messageId": "1"}, "subscription": "s"}
    async with httpx.AsyncClient(timeout=60) as http:
        answer = await http.post(f"{app.http}/inpaint", json=body)
        refused = await http.post(f"{app.http}/inpaint", json={})
    assert (answer.status_code, answer.json()) == (200, {"outcome": "succeeded"})
    assert (refused.status_code, refused.json()["code"]) == (400, "malformed_message")
    assert (await store.head(session_path("u", "push", "edited.jpg"))).size > 0


async def test_a_variant_that_does_not_load_says_why_and_stops_no_other(app: App) -> None:
    job_id = await app.submit(variant="broken")
    state = await variant_state(app, "broken", "failed")
    assert "nowhere.gguf" in state["error"]
    other = await app.finished(await app.submit())
    assert other.status == State.SUCCEEDED

    async def waits() -> bool:
        job = await app.client.get(job_id)
        return job is not None and job.error is not None and job.status == State.QUEUED

    await until(waits, timeout_s=60)
    job = await app.client.get(job_id)
    assert job is not None and job.error is not None
    assert (job.error.code, job.attempt) == ("variant_failed", 0)
    assert "nowhere.gguf" in job.error.message
    letters = await attributes_in(app, app.settings.messages.dead_letter_subscription)
    assert job_id not in {letter["deadLetterJobId"] for letter in letters}
    # It would wait for a day.
    await app.client.cancel(job_id)


async def test_a_variant_that_is_not_served_is_a_clear_error(app: App) -> None:
    job = await app.finished(await app.submit(variant="nope"))
    assert job.status == State.FAILED
    assert job.error is not None and job.error.code == "unknown_variant"
    assert "telea" in job.error.message


async def test_a_running_job_is_canceled_and_its_replica_goes_on(app: App) -> None:
    job_id = await app.submit(variant="endless", steps=100)
    await painted_a_step(app, job_id)
    await app.client.cancel((await state_of(app, job_id, State.RUNNING)).id)
    # The engine sleeps for a minute when nobody stops it: the next job's first step shows that it was stopped.
    following = await app.submit(variant="endless", steps=100)
    await painted_a_step(app, following)
    canceled = await app.client.get(job_id)
    assert canceled is not None and (canceled.status, canceled.artifacts) == (State.CANCELED, ())
    await app.client.cancel((await state_of(app, following, State.RUNNING)).id)
    assert (await app.finished(following)).status == State.CANCELED


async def painted_a_step(app: App, job_id: str) -> None:
    async def painted() -> bool:
        job = await app.client.get(job_id)
        return job is not None and job.progress.step > 0

    await until(painted, timeout_s=30)


async def test_a_job_past_its_deadline_is_not_painted(app: App) -> None:
    job = await app.finished(await app.submit(variant="slow", deadline="2020-01-01T00:00:00Z"))
    assert (job.status, job.started_at) == (State.EXPIRED, None)


async def test_a_running_job_is_stopped_at_its_deadline(app: App) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=2)).isoformat()
    job = await app.finished(await app.submit(variant="slow", steps=30, deadline=soon))
    assert job.status == State.EXPIRED
    assert job.started_at is not None and job.artifacts == ()


async def test_bad_pixels_fail_the_job_and_reach_the_dead_letter_topic(app: App, tmp_path: Path) -> None:
    damaged, mask = tmp_path / "damaged.jpg", tmp_path / "mask.png"
    damaged.write_bytes(jpeg(photo())[:700])
    mask.write_bytes(png(line_mask()))
    job_id = (await app.client.submit(EditMessage(userId="u", sessionId="damaged"), damaged, mask)).job_id
    job = await app.finished(job_id)
    assert job.error is not None and (job.status, job.error.code) == (State.FAILED, "invalid_image")
    letters = {letter["deadLetterJobId"]: letter for letter in await dead_letters(app)}
    assert letters[job_id]["deadLetterReason"] == "invalid_image"


async def test_an_unreadable_message_reaches_the_dead_letter_topic(app: App) -> None:
    publisher = adapters.publisher(app.settings.messages)
    message_id = await publisher.publish("sessions", b'{"userId": "../u", "sessionId": "s"}', {"from": "a test"})
    letters = {letter["deadLetterMessageId"]: letter for letter in await dead_letters(app)}
    assert letters[message_id]["deadLetterReason"] == "malformed_message"
    assert letters[message_id]["deadLetterError"].startswith("userId")
    assert letters[message_id]["from"] == "a test"


async def test_a_second_job_of_a_session_waits_for_the_first(app: App) -> None:
    first = await app.submit("busy", variant="slow", steps=30)
    await state_of(app, first, State.RUNNING)
    second = await app.submit("busy", variant="telea", steps=2)
    assert await app.client.get(second) is None
    done = [await app.finished(first), await app.finished(second)]
    assert [job.status for job in done] == [State.SUCCEEDED, State.SUCCEEDED]
    assert done[0].finished_at is not None and done[1].started_at is not None
    assert done[0].finished_at <= done[1].started_at


async def test_a_job_store_that_is_locked_for_a_while_uses_no_attempt(app: App) -> None:
    with closing(sqlite3.connect(app.settings.jobs.removeprefix("sqlite:"), isolation_level=None)) as other:
        other.execute("begin immediate")
        job_id = await app.submit()
        # Longer than a writer waits for the lock.
        await asyncio.sleep(sql_database.BUSY_TIMEOUT_S + 3)
    job = await app.finished(job_id)
    assert (job.status, job.attempt) == (State.SUCCEEDED, 1)


async def test_a_push_whose_sender_hangs_up_is_worked_on_to_its_end(app: App) -> None:
    store = adapters.blob_store(app.settings.blobs)
    original, mask = jpeg(photo()), png(line_mask())
    versions = [
        (await store.put(session_path("u", "hung-up", name), data, content_type="image/png")).version
        for name, data in (("original.jpg", original), ("mask_auto.png", mask))
    ]
    message = EditMessage(userId="u", sessionId="hung-up", variant="slow")
    data = base64.b64encode(message.model_dump_json(by_alias=True, exclude_none=True).encode()).decode()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{app.http}/inpaint", json={"message": {"data": data, "messageId": "1"}}, timeout=1)
    job = await app.finished(edit_job_id(message, versions=versions, idempotency_key=None))
    assert (job.status, job.attempt) == (State.SUCCEEDED, 1)


async def test_defaults_change_on_a_running_app_and_claimed_jobs_keep_theirs(app: App) -> None:
    processes = app.pids("Ingress")
    claimed = await app.submit(variant="slow")
    await state_of(app, claimed, State.RUNNING)
    app.deploy(variant="telea", steps=7, prompt="snow")

    async def changed() -> bool:
        job = await app.finished(await app.submit())
        return job.parameters.steps == 7 and job.parameters.prompt == "snow"

    await until(changed)
    assert (await app.finished(claimed)).parameters.steps == 12
    assert app.pids("Ingress") == processes


async def test_wrong_defaults_are_refused_and_shown_while_the_old_ones_serve(app: App) -> None:
    processes = app.pids("Ingress")
    app.deploy(variant="telea", steps=0)

    async def shown() -> bool:
        return "steps" in app.ready()["defaults_error"]

    await until(shown)
    assert (await app.finished(await app.submit())).status == State.SUCCEEDED
    app.deploy(**DEFAULTS)

    async def mended() -> bool:
        return app.ready()["defaults_error"] == ""

    await until(mended)
    assert app.pids("Ingress") == processes


# -- nobody gets another's picture


def marked(number: int) -> Pixels:
    """A photo of one colour that only `number` has: its three digits to the base of 6, 40 levels apart."""
    levels = [20 + 40 * (number // 6**digit % 6) for digit in range(3)]
    return np.full((96, 96, 3), levels, np.uint8)


def marks(jpeg_bytes: bytes) -> tuple[int, int]:
    """The numbers that the picture carries where it was painted, and where it was kept."""
    pixels = cv2.imdecode(np.frombuffer(jpeg_bytes, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)
    return _number(pixels[60, 45]), _number(pixels[4, 90])


def _number(color: Any) -> int:
    return sum(round((int(level) - 20) / 40) * 6**digit for digit, level in enumerate(color))


async def test_200_concurrent_sessions_each_get_their_own_picture(app: App, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    # The engine fills from around the mask, on the canvas it was given: another job's canvas would show inside.
    mask.write_bytes(png(cv2.line(np.zeros((96, 96), np.uint8), (10, 40), (80, 80), 255, 9)))
    client, store = app.client, adapters.blob_store(app.settings.blobs)

    async def edit(number: int) -> tuple[int, int]:
        original = tmp_path / f"{number}.jpg"
        original.write_bytes(jpeg(marked(number)))
        message = EditMessage(userId="marks", sessionId=f"m{number}")
        job = await client.follow(await client.submit(message, original, mask), lambda job: None, timeout_s=180)
        assert job.status == State.SUCCEEDED, job.error
        data, _ = await store.get(session_path("marks", f"m{number}", "edited.jpg"), max_bytes=10**7)
        return marks(data)

    assert await asyncio.gather(*(edit(number) for number in range(200))) == [(number, number) for number in range(200)]


# -- what dies in the middle


async def test_a_killed_inpainter_loses_nothing(app: App) -> None:
    job_id = await app.submit(variant="slow", steps=30)
    await state_of(app, job_id, State.RUNNING)

    async def painting() -> bool:
        job = await app.client.get(job_id)
        return job is not None and job.progress.step > 3

    await until(painting)
    app.kill("Inpainter-slow")
    job = await app.finished(job_id)
    assert (job.status, job.attempt, job.fence) == (State.SUCCEEDED, 2, 2)


async def test_a_killed_ingress_loses_nothing(app: App) -> None:
    job_id = await app.submit(variant="slow", steps=30)
    await state_of(app, job_id, State.RUNNING)
    killed = app.pids("Ingress")
    app.kill("Ingress")
    job = await app.finished(job_id)
    assert (job.status, job.attempt, job.fence) == (State.SUCCEEDED, 2, 2)
    assert app.pids("Ingress").isdisjoint(killed)
    app.wait_ready()


async def test_stopping_the_app_gives_the_running_job_back(app: App) -> None:
    job_id = await app.submit(variant="endless")
    await state_of(app, job_id, State.RUNNING)
    await asyncio.to_thread(app.stop)
    with sqlite3.connect(app.settings.jobs.removeprefix("sqlite:")) as database:
        ((status,),) = database.execute("select status from jobs where id = ?", (job_id,)).fetchall()
    assert status == "queued"
    job = await app.client.get(job_id)
    assert job is not None and (job.attempt, job.lease_until) == (0, None)
