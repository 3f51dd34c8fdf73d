"""Every row of the ack table, over memory stores and a real engine. tests/test_serve_app.py repeats some on Serve."""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from serve_app.adapters.memory import MemoryJobStore
from serve_app.edit import job as edit_job
from serve_app.edit.containers import content_type
from serve_app.edit.images import decode_photo
from serve_app.edit.session import session_path
from serve_app.errors import (
    BlobNotFound,
    MaskMismatch,
    OutOfMemory,
    ReplicaLost,
    StoreUnavailable,
    VariantLoadFailed,
    VariantNotReady,
)
from serve_app.jobs import claims
from serve_app.jobs.admission import Admission
from serve_app.jobs.kinds import Asked, Attempt, Caller, Result
from serve_app.jobs.lease import Pace
from serve_app.jobs.ports import Delivery, Verdict
from serve_app.jobs.record import Artifact, Job, JobType, State, Timings
from serve_app.jobs.worker import Worker
from serve_app.models import BUILT_IN, Progress, Variant
from serve_app.parameters import AuditRequest, EditParameters
from serve_app.settings import Inference, Limits, MessagesSettings, VariantSettings

from .backends import make_audit
from .rig import SESSION, USER, Held, Rig, delivery, jpeg, line_mask, photo, png
from .test_images import FORMATS, encoded, telling_exif


@pytest.fixture
async def rig() -> Rig:
    rig = Rig()
    await rig.put_session()
    return rig


async def eventually(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def held(rig: Rig) -> AsyncIterator[Held]:
    """The engine stops inside its first paint until the test lets it go."""
    held = Held()
    rig.engine.on_paint = held
    yield held
    held.let_go.set()


# -- done: succeeded, acknowledged after the blobs and the job are both stored


async def test_an_edit_is_stored_and_acknowledged(rig: Rig) -> None:
    verdict = await rig.work()
    job = await rig.job()
    assert verdict == Verdict(action="ack", reason="succeeded")
    assert (job.status, job.attempt, job.fence, job.lease_until) == (State.SUCCEEDED, 1, 1, None)
    assert job.paths == {role: f"users/{USER}/sessions/{SESSION}/{role}.jpg" for role in ("edited", "preview")}
    for artifact in job.artifacts:
        stored = await rig.blobs.head(artifact.path)
        assert (artifact.version, artifact.content_type, artifact.size_bytes) == (
            stored.version,
            "image/jpeg",
            stored.size,
        )
    edited = cv2.imdecode(np.frombuffer(await rig.blob("edited.jpg"), np.uint8), cv2.IMREAD_COLOR)
    assert edited.shape == (80, 96, 3)
    assert cv2.imdecode(np.frombuffer(await rig.blob("preview.jpg"), np.uint8), cv2.IMREAD_COLOR) is not None


async def test_the_session_document_follows_the_job(rig: Rig, held: Held) -> None:
    working = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    assert (await rig.document())["processingStatus"] == "processing"
    held.let_go.set()
    await working
    document = await rig.document()
    job = await rig.job()
    assert document["processingStatus"] == "completed"
    assert document["processingProgress"] == 1.0
    assert document["processingError"] is None
    assert document["editedPath"] == job.paths["edited"]
    assert document["previewPath"] == job.paths["preview"]
    assert document["jobId"] == job.id
    assert document["editedAt"]


async def test_stages_are_timed(rig: Rig) -> None:
    await rig.work()
    timings = (await rig.job()).timings.model_dump()
    assert timings.pop("gpu_ms") is None
    assert all(seconds is not None and seconds >= 0 for seconds in timings.values()), timings


async def test_an_empty_mask_stores_the_originals_own_bytes_and_wakes_no_engine(rig: Rig) -> None:
    await rig.put("mask_auto.png", png(np.zeros((80, 96), np.uint8)))
    verdict = await rig.work()
    assert verdict.action == "ack"
    assert await rig.blob("edited.jpg") == await rig.blob("original.jpg")
    assert (await rig.blob("preview.jpg")).startswith(b"\xff\xd8")
    assert rig.engine.painted == 0


@pytest.mark.parametrize("kind", FORMATS)
async def test_an_empty_mask_keeps_the_format_and_says_so_and_the_place_goes(rig: Rig, kind: str) -> None:
    original = encoded(Image.fromarray(photo()), kind, exif=telling_exif(), xmp=b"<x>48,51N</x>")
    await rig.put("original.jpg", original)
    await rig.put("mask_auto.png", png(np.zeros((80, 96), np.uint8)))
    assert (await rig.work()).reason == "succeeded"
    edited, info = await rig.blobs.get(session_path(USER, SESSION, "edited.jpg"), max_bytes=10**7)
    assert info.content_type == content_type(original) and b"48,51N" not in edited
    before, after = (decode_photo(data, Limits()) for data in (original, edited))
    assert np.array_equal(before.pixels, after.pixels)


@pytest.mark.slow
async def test_nothing_is_acknowledged_before_the_job_is_stored(rig: Rig) -> None:
    rig.engine.on_paint = lambda: setattr(rig.jobs, "is_down", True)
    verdict = await rig.work()
    assert verdict.action == "defer"
    rig.jobs.is_down = False
    assert (await rig.job()).status == State.RUNNING


# -- parameters


async def test_parameters_are_the_messages_else_the_defaults(rig: Rig) -> None:
    await rig.work(steps=7, seed=5, guidanceScale=2.5)
    job = await rig.job()
    assert (job.parameters.steps, job.seed, job.parameters.guidance_scale) == (7, 5, 2.5)
    assert job.parameters.prompt == Inference().prompt


async def test_a_variants_own_steps_are_its_edits_default(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILT_IN, "telea", Variant(family="telea", steps=8))
    await rig.work()
    assert (await rig.job()).parameters.steps == 8
    await rig.put_session("s2")
    await rig.work("m2", sessionId="s2", steps=7)
    assert sorted(job.parameters.steps for job in await rig.jobs.list()) == [7, 8]
    posted = await rig.editor.post(
        {"type": "inpaint", "session": {"user_id": USER, "session_id": SESSION}}, Caller(), job_id="job-1"
    )
    assert posted.parameters == EditParameters(**rig.inference.model_dump(exclude={"variant"}) | {"steps": 8})


@pytest.mark.parametrize(("variant", "steps"), [("fill", 2), ("telea", 4)])
async def test_strength_leaves_some_of_the_steps_where_the_family_has_noise(rig: Rig, variant: str, steps: int) -> None:
    await rig.work(strength=0.5, variant=variant)
    job = await rig.job()
    assert (job.parameters.strength, job.parameters.steps) == (0.5, 4)
    assert (job.progress.step, job.progress.steps, rig.engine.steps_done) == (steps, steps, steps)


async def test_a_seed_that_was_not_given_derives_from_the_jobs_id(rig: Rig) -> None:
    await rig.work()
    job = await rig.job()
    assert job.seed == edit_job.seed_of(job.id)


async def test_a_retry_keeps_the_values_of_the_first_claim(rig: Rig) -> None:
    rig.engine.on_paint = _raise(ReplicaLost("gone"))
    await rig.work()
    first = await rig.job()
    rig.inference = Inference(variant="telea", steps=9, prompt="another")
    rig.engine.on_paint = lambda: None
    rig.clock.advance(600)
    await rig.work()
    job = await rig.job()
    assert (job.status, job.attempt) == (State.SUCCEEDED, 2)
    assert (job.parameters, job.seed) == (first.parameters, first.seed)


async def test_new_defaults_apply_to_the_next_claimed_job(rig: Rig) -> None:
    await rig.put_session("s2")
    await rig.work()
    rig.inference = Inference(variant="telea", steps=9)
    await rig.work("m2", sessionId="s2")
    steps = {job.session_id: job.parameters.steps for job in await rig.jobs.list()}
    assert steps == {SESSION: 4, "s2": 9}


# -- duplicate of a finished job: unchanged, acknowledged


async def test_a_duplicate_of_a_finished_job_is_acknowledged_and_painted_no_more(rig: Rig) -> None:
    await rig.work()
    before = await rig.job()
    verdict = await rig.work("another-message-id")
    assert verdict.action == "ack"
    assert await rig.job() == before
    assert rig.engine.painted == 1


async def test_a_changed_photo_is_new_work(rig: Rig) -> None:
    await rig.work()
    await rig.put("original.jpg", jpeg(photo()[:, ::-1]))
    await rig.work()
    assert len(await rig.jobs.list()) == 2
    assert rig.engine.painted == 2


class Tally:
    """A kind of job that is no edit, and needs nothing of one."""

    type: JobType = "audit"
    event = "tally"

    def read(self, data: bytes) -> Asked:
        return Asked(message=json.loads(data)["word"], variant="telea")

    async def new_job(self, asked: Asked, *, variant: str, idempotency_key: str | None) -> Job:
        request = AuditRequest(user_id=asked.message, session_id="s")
        return Job(id=f"tally-{asked.message}", variant=variant, lock_key="tally", parameters=request)

    async def run(self, job: Job, attempt: Attempt) -> Result:
        await attempt.on_progress(Progress(step=1, steps=1))
        await attempt.confirm()
        assert isinstance(job.parameters, AuditRequest)
        return Result(artifacts=(Artifact(role=job.parameters.user_id, path="tally/1"),), timings=Timings())

    def document(self, job: Job) -> Mapping[str, Any]:
        return {"jobId": job.id}


async def test_the_worker_works_on_any_kind_of_job(rig: Rig) -> None:
    worker = Worker(**{**rig.parts, "kinds": [rig.editor, Tally()]})
    message = Delivery(data=b'{"word": "cat"}', attributes={"jobType": "audit"}, message_id="m1")
    for _ in range(2):
        assert (await worker.work(message)).action == "ack"
    job = await rig.job()
    assert (job.id, job.status, job.attempt, job.lock_key) == ("tally-cat", State.SUCCEEDED, 1, "tally")
    assert job.paths == {"cat": "tally/1"}
    worker.close()


async def test_a_type_that_no_kind_has_is_dead_lettered(rig: Rig) -> None:
    assert (await rig.take(delivery(attributes={"jobType": "poem"}))).action == "ack"
    assert rig.topics.dead[0][1]["deadLetterError"] == "attributes.jobType: 'poem' is none of inpaint"
    assert await rig.jobs.list() == []


async def test_an_idempotency_key_replaces_the_versions(rig: Rig) -> None:
    key = {"idempotencyKey": "k"}
    await rig.take(delivery(attributes=key))
    await rig.put("original.jpg", jpeg(photo()[:, ::-1]))
    await rig.take(delivery("m2", attributes=key))
    assert rig.engine.painted == 1


async def test_a_mirror_that_is_down_holds_up_no_job(rig: Rig) -> None:
    rig.mirror.is_down = True
    assert (await rig.work()).action == "ack"
    assert (await rig.job()).status == State.SUCCEEDED


# -- another worker holds a live lease, or the session is busy: unchanged, held back


async def test_a_job_under_a_live_lease_is_held_back(rig: Rig, held: Held) -> None:
    working = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    other = rig.beside()
    before = await rig.job()
    verdict = await other.work()
    assert (verdict.action, verdict.reason) == ("defer", "busy")
    assert 0 < verdict.delay_s <= 1.0
    assert (await rig.job()).attempt == before.attempt == 1
    held.let_go.set()
    assert (await working).action == "ack"
    assert other.engine.painted == 0
    assert (await other.work()).action == "ack"


async def test_a_second_job_of_a_session_waits_for_the_first(rig: Rig, held: Held) -> None:
    working = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    other = rig.beside()
    assert (await other.work("m2", steps=5)).reason == "busy"
    held.let_go.set()
    await working
    assert (await other.work("m2", steps=5)).reason == "succeeded"


async def test_the_lease_is_renewed_while_the_job_runs(rig: Rig, held: Held) -> None:
    working = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    first = (await rig.job()).lease_until
    rig.clock.advance(0.9)

    async def renewed() -> bool:
        return (await rig.job()).lease_until > first

    async with asyncio.timeout(20):
        while not await renewed():
            await asyncio.sleep(0.02)
    held.let_go.set()
    await working


# -- asked again


def asking(rig: Rig, message_id: str, **fields: Any) -> Delivery:
    """A message published now."""
    return replace(delivery(message_id, **fields), publish_time=rig.clock())


async def test_a_failed_edit_runs_again_for_who_asks_again_and_for_no_other(rig: Rig) -> None:
    first, twin = asking(rig, "m1"), asking(rig, "m2")
    rig.clock.advance(1)
    rig.engine.on_paint = _raise(MaskMismatch("no"))
    for _ in range(3):
        assert (await rig.take(first)).reason == "mask_mismatch"
    rig.engine.on_paint = lambda: None
    assert (await rig.take(twin)).reason == "mask_mismatch", "it was asked before the failure, too"
    assert ((await rig.job()).status, len(rig.topics.dead)) == (State.FAILED, 1)
    rig.clock.advance(0.1)
    again = asking(rig, "m3")
    assert (await rig.take(again)).reason == "succeeded"
    assert (await rig.document())["processingStatus"] == "completed"
    for late in (first, twin, again):
        assert (await rig.take(late)).reason == "succeeded"
    job = await rig.job()
    assert (job.status, job.dead_lettered, job.attempt, rig.engine.painted) == (State.SUCCEEDED, False, 1, 2)


async def test_an_edit_that_fails_again_has_a_dead_letter_of_its_own(rig: Rig) -> None:
    rig.engine.on_paint = _raise(MaskMismatch("no"))
    for message_id in ("m1", "m2"):
        await rig.take(asking(rig, message_id))
        rig.clock.advance(1)
    assert [letter["deadLetterMessageId"] for _, letter in rig.topics.dead] == ["m1", "m2"]
    assert len(rig.topics.completed) == 2


async def test_a_later_deadline_that_is_sent_while_the_first_message_waits_is_used(rig: Rig) -> None:
    def in_s(seconds: float) -> str:
        return (rig.clock() + timedelta(seconds=seconds)).isoformat()

    first = asking(rig, "m1", deadline=in_s(10))
    rig.clock.advance(1)
    second = asking(rig, "m2", deadline=in_s(100))
    rig.clock.advance(20)
    assert (await rig.take(first)).reason == "deadline_exceeded"
    assert (await rig.take(second)).reason == "succeeded"
    assert (await rig.take(first)).reason == "succeeded"


# -- lost lease


async def test_a_job_whose_worker_died_is_claimed_again_and_counted(rig: Rig) -> None:
    await _claim_and_die(rig)
    assert (await rig.work()).reason == "busy"
    rig.clock.advance(1.1)
    assert (await rig.work()).reason == "succeeded"
    job = await rig.job()
    assert (job.attempt, job.fence) == (2, 2)


async def test_a_job_that_kills_every_worker_fails_in_the_end(rig: Rig) -> None:
    for _ in range(3):
        await _claim_and_die(rig)
        rig.clock.advance(1.1)
    assert (await rig.work()).action == "ack"
    job = await rig.job()
    assert (job.status, job.error.code, rig.engine.painted) == (State.FAILED, "attempts_exhausted", 0)
    assert [attributes["deadLetterReason"] for _, attributes in rig.topics.dead] == ["attempts_exhausted"]


async def test_a_stale_worker_neither_finishes_the_job_nor_keeps_its_bytes(rig: Rig, held: Held) -> None:
    rig.engine.fill = 10
    stale = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    rig.jobs.is_down = True  # it can renew no more
    rig.clock.advance(1.1)
    other = rig.beside()
    other.engine.fill = 240
    assert (await other.work("m2")).reason == "succeeded"
    result = await other.blob("edited.jpg")
    rig.jobs.is_down = False
    held.let_go.set()
    assert (await stale).action == "ack"  # it finds the job done
    assert await other.blob("edited.jpg") == result
    assert rig.blobs.calls["put"] == 3, "the test's photo and mask, and a probe: the stale worker wrote nothing"
    job = await rig.job()
    assert (job.status, job.fence) == (State.SUCCEEDED, 2)


async def test_a_stale_worker_that_has_noticed_nothing_is_stopped_before_it_writes() -> None:
    """Its keeper looks no more before the painting ends: only the renewal before the last writes can tell."""
    seldom = Pace(cancel_poll_s=3000.0, progress_s=3000.0)
    rig = Rig(work_settings={"lease_s": 7200.0, "renew_s": 3000.0}, pace=seldom)
    await rig.put_session()
    held = Held()
    rig.engine.on_paint = held
    stale = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    rig.clock.advance(7201)
    other = rig.beside()
    other.engine.fill = 240
    assert (await other.work("m2")).reason == "succeeded"
    result = await other.blob("edited.jpg")
    held.let_go.set()
    assert (await stale).action == "ack"
    assert await other.blob("edited.jpg") == result
    assert rig.blobs.calls["put"] == 3, "the test's photo and mask, and a probe: the stale worker wrote nothing"


async def test_a_late_write_of_a_stale_worker_is_written_over(rig: Rig, held: Held) -> None:
    """The stale worker's put may land between the new claim and the new put: the last word is the claim holder's."""
    working = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    await rig.put("edited.jpg", b"written by a stale worker")
    held.let_go.set()
    await working
    assert (await rig.blob("edited.jpg")).startswith(b"\xff\xd8")


# -- unreadable message: no job, dead letter with the reason, acknowledged


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\xff\x00", "the message"),
        (b"[]", "the message"),
        (b'{"userId":"u"}', "sessionId"),
        (b'{"userId":"../x","sessionId":"s"}', "userId"),
        (b'{"userId":"u","sessionId":"s","steps":0}', "steps"),
        (b'{"userId":"u","sessionId":"s","prompt":"' + b"x" * 70_000 + b'"}', "70"),
    ],
)
async def test_an_unreadable_message_is_dead_lettered_with_its_reason(rig: Rig, data: bytes, named: str) -> None:
    verdict = await rig.take(type(delivery())(data=data, attributes={"a": "b"}, message_id="m9"))
    assert verdict == Verdict(action="ack", reason="malformed_message")
    ((dead, attributes),) = rig.topics.dead
    assert dead == data
    assert attributes["a"] == "b"
    assert attributes["deadLetterReason"] == "malformed_message"
    assert attributes["deadLetterMessageId"] == "m9"
    assert named in attributes["deadLetterError"]
    assert await rig.jobs.list() == []


async def test_an_audit_that_has_the_jobs_id_is_left_alone(rig: Rig) -> None:
    await rig.work()
    job_id = (await rig.job()).id
    audit = make_audit(job_id)
    await rig.jobs.update(job_id, "", lambda *_: (audit,))
    assert await rig.work("m2") == Verdict(action="ack", reason="malformed_message")
    assert await rig.jobs.get(job_id) == audit
    _, attributes = rig.topics.dead[-1]
    assert attributes["deadLetterReason"] == "malformed_message"


async def test_a_dead_letter_says_what_the_service_says_and_not_its_sender(rig: Rig) -> None:
    theirs = {"deadLetterTruncated": "true", "deadLetterJobId": "edit-another", "deadLetterX": "x", "traceparent": "t"}
    await rig.take(type(delivery())(data=b"{}", attributes=theirs, message_id="m9"))
    ((_, attributes),) = rig.topics.dead
    assert set(attributes) - set(theirs) == {
        "deadLetterReason", "deadLetterError", "deadLetterAttempts", "deadLetterMessageId",
    }  # fmt: skip
    assert {name: attributes.get(name) for name in theirs} == {
        "deadLetterTruncated": None, "deadLetterJobId": "", "deadLetterX": None, "traceparent": "t",
    }  # fmt: skip


async def test_an_unreadable_message_is_held_back_while_it_cannot_be_dead_lettered(rig: Rig) -> None:
    rig.broker.is_down = True
    broken = type(delivery())(data=b"{", attributes={}, message_id="m9")
    assert (await rig.take(broken)).action == "defer"
    rig.broker.is_down = False
    assert (await rig.take(broken)).action == "ack"
    assert len(rig.topics.dead) == 1


# -- bad input: failed, dead letter, acknowledged


BAD_INPUT: dict[str, tuple[dict[str, bytes | None], dict[str, Any], str]] = {
    "no original": ({"original.jpg": None}, {}, "missing_input"),
    "no mask": ({"mask_auto.png": None}, {}, "missing_input"),
    "not a picture": ({"original.jpg": b"hello"}, {}, "invalid_image"),
    "cut off": ({"original.jpg": jpeg(photo())[:900]}, {}, "invalid_image"),
    "mask of another shape": ({"mask_auto.png": png(line_mask(40, 90))}, {}, "mask_mismatch"),
    "too many pixels": ({"original.jpg": jpeg(np.zeros((64, 10_001, 3), np.uint8))}, {}, "image_too_large"),
    "too many bytes": ({"original.jpg": jpeg(photo()) + b"\0" * 25_000_000}, {}, "image_too_large"),
    "unknown variant": ({}, {"variant": "nope"}, "unknown_variant"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
async def test_bad_input_fails_the_job_and_is_dead_lettered(rig: Rig, case: str) -> None:
    blobs, fields, code = BAD_INPUT[case]
    for name, data in blobs.items():
        if data is None:
            await rig.blobs.delete(f"users/{USER}/sessions/{SESSION}/{name}")
        else:
            await rig.put(name, data)
    verdict = await rig.work(**fields)
    job = await rig.job()
    assert verdict == Verdict(action="ack", reason=code)
    assert (job.status, job.error.code, job.dead_lettered, rig.engine.painted) == (State.FAILED, code, True, 0)
    ((_, attributes),) = rig.topics.dead
    assert (attributes["deadLetterReason"], attributes["deadLetterJobId"]) == (code, job.id)
    assert attributes["deadLetterAttempts"] == "1"
    document = await rig.document()
    assert (document["processingStatus"], document["processingError"]["code"]) == ("failed", code)
    # A duplicate is not dead-lettered again.
    await rig.work("m2", **fields)
    assert len(rig.topics.dead) == 1


async def test_a_failure_whose_dead_letter_was_lost_is_dead_lettered_by_the_duplicate(rig: Rig) -> None:
    await rig.put("original.jpg", b"hello")
    rig.broker.is_down = True
    assert (await rig.work()).action == "defer"
    assert (await rig.job()).status == State.FAILED
    rig.broker.is_down = False
    assert (await rig.work()).action == "ack"
    assert len(rig.topics.dead) == 1


# -- painting failed for a reason that may pass: queued, attempt + 1, held back with exponential backoff


@pytest.mark.parametrize("error", [ReplicaLost("gone" * 1000), OutOfMemory("full"), RuntimeError("bug")])
async def test_a_failed_painting_is_tried_again_then_dead_lettered(rig: Rig, error: Exception) -> None:
    rig.engine.on_paint = _raise(error)
    delays = []
    for attempt in (1, 2):
        verdict = await rig.work()
        job = await rig.job()
        assert (verdict.action, job.status, job.attempt) == ("defer", State.QUEUED, attempt)
        assert (await rig.document())["processingStatus"] == "processing"
        delays.append(verdict.delay_s)
        rig.clock.advance(verdict.delay_s)
    assert delays[1] > delays[0] * 1.3  # doubling, under ±20% of jitter
    assert rig.topics.dead == []
    verdict = await rig.work()
    job = await rig.job()
    assert (verdict.action, job.status, job.attempt) == ("ack", State.FAILED, 3)
    ((_, attributes),) = rig.topics.dead
    assert attributes["deadLetterAttempts"] == "3"
    assert len(attributes["deadLetterError"].encode()) <= 1024
    assert (await rig.document())["processingError"]["code"] == job.error.code


@pytest.mark.slow
async def test_a_painting_that_hangs_is_cut_off_and_tried_again(rig: Rig, held: Held) -> None:
    rig = Rig(work_settings={"inference_timeout_s": 0.05}, engine=rig.engine)
    await rig.put_session()
    rig.engine.on_paint = lambda: None

    def slow() -> None:
        # Past the limit between two steps: the cancellation takes effect at the next one.
        held.let_go.wait(0.3)

    rig.engine.on_paint = slow
    verdict = await rig.work()
    assert (verdict.action, verdict.reason) == ("defer", "inference_timeout")
    assert (await rig.job()).status == State.QUEUED


# -- waiting for what is not there: no attempt is used, held back (the rest of it is in test_waiting.py)


async def test_weights_that_are_not_there_are_waited_for(rig: Rig) -> None:
    rig.engine.on_paint = _raise(VariantLoadFailed("variant telea did not load: no such file"))
    verdict = await rig.work()
    job = await rig.job()
    assert (verdict.action, verdict.reason, verdict.delay_s <= 10) == ("defer", "variant_failed", True)
    assert (job.error.code, job.status, job.attempt) == ("variant_failed", State.QUEUED, 0)
    assert "no such file" in job.error.message


# -- a store or the broker is unavailable: no attempt is used, held back with backoff


async def test_a_job_store_that_is_down_leaves_everything_as_it_was(rig: Rig) -> None:
    rig.jobs.is_down = True
    first, second = await rig.work(), await rig.work()
    assert (first.action, first.reason) == ("defer", "store_unavailable")
    assert second.delay_s > first.delay_s * 1.3
    rig.jobs.is_down = False
    assert await rig.jobs.list() == []
    assert (await rig.work()).reason == "succeeded"
    assert (await rig.job()).attempt == 1


@pytest.mark.parametrize("method", ["head", "get", "put"])
async def test_a_blob_store_that_is_down_uses_no_attempt(rig: Rig, method: str) -> None:
    rig.blobs.is_down, rig.blobs.only = True, {method}
    delays = []
    for _ in range(5):
        verdict = await rig.work()
        assert (verdict.action, verdict.reason) == ("defer", "store_unavailable")
        delays.append(verdict.delay_s)
    assert delays[-1] > delays[0] * 8
    rig.blobs.is_down = False
    assert (await rig.work()).reason == "succeeded"
    assert (await rig.job()).attempt == 1


@pytest.mark.slow
async def test_a_store_that_is_down_for_less_than_a_lease_costs_nothing(rig: Rig, held: Held) -> None:
    working = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    rig.jobs.is_down = True
    await asyncio.sleep(0.5)
    rig.jobs.is_down = False
    held.let_go.set()
    assert (await working).reason == "succeeded"
    assert rig.engine.painted == 1


@pytest.mark.slow
async def test_a_hiccup_before_the_last_writes_throws_no_painting_away(rig: Rig) -> None:
    def hiccup(step: int) -> None:
        if step == 4:
            rig.jobs.is_down = True
            threading.Timer(0.3, setattr, (rig.jobs, "is_down", False)).start()

    rig.engine.on_step = hiccup
    assert (await rig.work()).reason == "succeeded"
    assert rig.engine.painted == 1


async def test_an_output_that_others_keep_writing_ends_the_attempt(rig: Rig) -> None:
    async def written_again() -> None:
        rig.blobs.before.pop("put", None)
        await rig.put("edited.jpg", b"another's")
        await rig.put("preview.jpg", b"another's")
        rig.blobs.before["put"] = written_again

    rig.blobs.before["put"] = written_again
    verdict = await rig.work()
    assert (verdict.action, verdict.reason) == ("defer", "blob_conflict")
    assert (await rig.job()).status == State.QUEUED


async def test_a_variant_that_cannot_paint_yet_keeps_no_more_than_its_share(rig: Rig, held: Held) -> None:
    rig.models["telea"].is_ready = False
    share = rig.settings.share("telea")
    sessions = [f"s{i}" for i in range(share + 1)]
    for session in sessions:
        await rig.put_session(session)
    working = [asyncio.create_task(rig.work(session, sessionId=session)) for session in sessions[:-1]]
    await eventually(held.entered.is_set)
    verdict = await rig.work(sessionId=sessions[-1])
    assert (verdict.action, verdict.reason) == ("defer", "variant_not_ready")
    rig.models["telea"].is_ready = True
    last = asyncio.create_task(rig.work(sessionId=sessions[-1]))
    held.let_go.set()
    assert [verdict.reason for verdict in await asyncio.gather(*working, last)] == ["succeeded"] * len(sessions)


@pytest.mark.parametrize("others", [("b",), ("b", "c")])
async def test_a_variant_that_paints_leaves_the_others_a_place(rig: Rig, others: tuple[str, ...]) -> None:
    settings = rig.settings.model_copy(update={"variants": dict.fromkeys(("telea", *others), VariantSettings())})
    admission = Admission(rig.models, settings)
    with ExitStack() as taken:
        while True:
            try:
                taken.enter_context(admission.admitted("telea"))
            except VariantNotReady:
                break
            assert len(taken._exit_callbacks) < settings.in_flight()
        assert len(taken._exit_callbacks) == settings.in_flight() - len(others)
        for other in others:
            with admission.admitted(other):
                pass
    with admission.admitted("telea"):
        pass


def test_a_variant_that_cannot_paint_has_no_more_than_its_part_of_few_places(rig: Rig) -> None:
    settings = rig.settings.model_copy(
        update={
            "variants": dict.fromkeys(("telea", "b"), VariantSettings(max_replicas=9)),
            "messages": MessagesSettings(max_in_flight=4),
        }
    )
    rig.models["telea"].is_ready = False
    admission = Admission(rig.models, settings)
    with (
        admission.admitted("telea"),
        admission.admitted("telea"),
        pytest.raises(VariantNotReady),
        admission.admitted("telea"),
    ):
        pass


@pytest.mark.parametrize(("is_ready", "at_most_s"), [(True, 1.0), (False, 10.0)])
async def test_a_message_beyond_the_share_of_a_variant_that_paints_comes_again_soon(
    rig: Rig, is_ready: bool, at_most_s: float
) -> None:
    """However often it came: the variant has room again long before one that starts."""
    rig.models["telea"].is_ready = is_ready
    admission = rig.worker._admission
    admission._settings = rig.settings.model_copy(
        update={
            "variants": dict.fromkeys(("telea", "b"), VariantSettings()),
            "messages": MessagesSettings(max_in_flight=2),
        }
    )
    with admission.admitted("telea"):
        delays = [(await rig.worker.work(delivery())).delay_s for _ in range(12)]
    assert max(delays) == at_most_s


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_variant_has_one_place_where_places_are_fewer_than_variants(rig: Rig, is_ready: bool) -> None:
    settings = rig.settings.model_copy(
        update={
            "variants": dict.fromkeys(("telea", "b", "c"), VariantSettings()),
            "messages": MessagesSettings(max_in_flight=2),
        }
    )
    rig.models["telea"].is_ready = is_ready
    admission = Admission(rig.models, settings)
    with (
        admission.admitted("telea"),
        admission.admitted("b"),
        pytest.raises(VariantNotReady),
        admission.admitted("telea"),
    ):
        pass


async def test_windows_are_planned_by_what_the_variants_own_prompt_tokens_cost(rig: Rig) -> None:
    """Fewer tokens make small windows cheaper, so that more of them are painted along a diagonal."""
    await rig.put("original.jpg", jpeg(photo(960, 800)))
    await rig.put("mask_auto.png", png(cv2.line(np.zeros((800, 960), np.uint8), (20, 10), (930, 740), 255, 5)))
    painted = []
    for variant in ("telea", "fill"):
        before = rig.engine.painted
        assert (await rig.work(variant, variant=variant, maskGrow=0)).reason == "succeeded"
        painted.append(rig.engine.painted - before)
    assert 1 < painted[0] < painted[1]


def _count_resizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    resized: list[tuple[int, ...]] = []
    resize = cv2.resize

    def counted(pixels: Any, size: Any, **how: Any) -> Any:
        resized.append(pixels.shape)
        return resize(pixels, size, **how)

    monkeypatch.setattr(cv2, "resize", counted)
    return resized


async def test_a_photo_at_its_own_scale_is_resized_for_its_preview_only(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.put("original.jpg", jpeg(photo(800, 600)))
    await rig.put("mask_auto.png", png(line_mask(800, 600)))
    resized = _count_resizes(monkeypatch)
    assert (await rig.work(cropStrategy="crop")).reason == "succeeded"
    assert resized == [(600, 800, 3)]


async def test_a_photo_at_another_scale_is_resized_once_in_and_once_out(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.put("original.jpg", jpeg(photo(1600, 1200)))
    await rig.put("mask_auto.png", png(line_mask(1600, 1200)))
    resized = _count_resizes(monkeypatch)
    assert (await rig.work(cropStrategy="resize")).reason == "succeeded"
    pictures = [shape for shape in resized if len(shape) == 3]
    assert len(pictures) == 3, "to working scale, back, and the preview"


async def test_a_job_whose_photo_was_replaced_before_its_retry_is_superseded(rig: Rig) -> None:
    rig.engine.on_paint = _raise(ReplicaLost("gone"))
    await rig.work()
    waiting = await rig.job()
    rig.engine.on_paint = lambda: None
    await rig.put("original.jpg", jpeg(photo()[:, ::-1]))
    assert (await rig.work()).reason == "succeeded"
    old = await rig.jobs.get(waiting.id)
    assert (old.status, old.error.code) == (State.CANCELED, "superseded")
    assert (await rig.document())["processingStatus"] == "completed"


async def test_another_request_of_the_session_that_waits_is_left_alone(rig: Rig) -> None:
    rig.engine.on_paint = _raise(ReplicaLost("gone"))
    await rig.work(steps=5)
    waiting = await rig.job()
    rig.engine.on_paint = lambda: None
    await rig.work("m2", steps=6)
    assert (await rig.jobs.get(waiting.id)).status == State.QUEUED


async def test_a_dead_letter_at_the_brokers_limits_loses_its_end_not_itself(rig: Rig) -> None:
    attributes = {f"a{i}": "" for i in range(98)}
    broken = type(delivery())(data=b"x" * 100_000, attributes=attributes, message_id="m9")
    assert (await rig.take(broken)).action == "ack"
    ((data, kept),) = rig.topics.dead
    assert data == b"x" * 64_000
    assert (kept["deadLetterTruncated"], kept["deadLetterReason"]) == ("true", "malformed_message")


async def test_a_dead_letter_has_no_reason_that_its_sender_made_up(rig: Rig) -> None:
    sent = {"deadLetterTruncated": "true", "deadLetterJobId": "edit-0", "priority": "high"}
    await rig.take(Delivery(data=b"{}", attributes=sent, message_id="m9"))
    ((_, kept),) = rig.topics.dead
    assert (kept["priority"], kept["deadLetterJobId"]) == ("high", "")
    assert "deadLetterTruncated" not in kept


# -- a user cancels: canceled, acknowledged


async def test_a_waiting_job_that_is_canceled_never_starts(rig: Rig) -> None:
    rig.engine.on_paint = _raise(ReplicaLost("gone"))
    await rig.work()
    await _cancel(rig)
    assert await rig.work() == Verdict(action="ack", reason="canceled")
    assert rig.engine.painted == 1
    assert (await rig.document())["processingStatus"] == "canceled"


@pytest.mark.slow
async def test_a_running_job_that_is_canceled_stops_within_a_step(rig: Rig, held: Held) -> None:
    rig.inference = Inference(variant="telea", steps=50)
    working = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    await _cancel(rig)
    # The keeper looks every 0.05 s; the engine goes on only after it must have seen it.
    await asyncio.sleep(0.4)
    held.let_go.set()
    assert await working == Verdict(action="ack", reason="canceled")
    assert rig.engine.steps_done <= 1
    with pytest.raises(BlobNotFound):
        await rig.blob("edited.jpg")


async def test_a_job_canceled_between_its_last_step_and_its_last_write_stays_canceled(rig: Rig) -> None:
    rig.blobs.before["put"] = lambda: _cancel(rig)
    assert (await rig.work()).reason == "canceled"
    assert (await rig.job()).status == State.CANCELED
    assert (await rig.document())["processingStatus"] == "canceled"


# -- its deadline passed: expired, acknowledged


async def test_a_job_past_its_deadline_is_expired_without_an_engine(rig: Rig) -> None:
    verdict = await rig.work(deadline="2025-12-31T00:00:00Z")
    job = await rig.job()
    assert verdict == Verdict(action="ack", reason="deadline_exceeded")
    assert (job.status, rig.engine.painted) == (State.EXPIRED, 0)
    document = await rig.document()
    assert (document["processingStatus"], document["processingError"]["code"]) == ("failed", "deadline_exceeded")
    assert rig.topics.dead == []


async def test_an_expired_message_waits_while_another_job_of_the_session_paints(rig: Rig, held: Held) -> None:
    working = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    assert (await rig.beside().work("m2", deadline="2025-12-31T00:00:00Z")).reason == "busy"
    assert (await rig.document())["processingStatus"] == "processing"
    held.let_go.set()
    await working


@pytest.mark.slow
async def test_a_running_job_is_stopped_at_its_deadline(rig: Rig, held: Held) -> None:
    working = asyncio.create_task(rig.work(deadline="2026-01-01T00:00:01Z"))
    await eventually(held.entered.is_set)
    await asyncio.sleep(1.1)
    held.let_go.set()
    assert (await working).reason == "deadline_exceeded"
    assert (await rig.job()).status == State.EXPIRED


# -- shutdown: queued, given back


async def test_shutdown_puts_the_job_back_and_uses_no_attempt(rig: Rig, held: Held) -> None:
    working = asyncio.create_task(rig.work())
    await eventually(held.entered.is_set)
    working.cancel()
    held.let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await working
    job = await rig.job()
    assert (job.status, job.attempt, job.lease_until) == (State.QUEUED, 0, None)
    rig.engine.on_paint = lambda: None
    assert (await rig.work()).reason == "succeeded"
    assert (await rig.job()).attempt == 1


async def test_shutdown_while_the_claim_is_being_stored_gives_it_back(rig: Rig) -> None:
    stored = asyncio.Event()

    async def slowly() -> None:
        stored.set()
        await asyncio.sleep(0.2)

    rig.jobs.after["update"] = slowly
    working = asyncio.create_task(rig.work())
    await stored.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    job = await rig.job()
    assert (job.status, job.attempt) == (State.QUEUED, 0)


async def test_shutdown_while_a_failure_is_being_stored_leaves_no_job_running(rig: Rig) -> None:
    rig.engine.on_paint = _raise(ReplicaLost("gone"))
    storing = asyncio.Event()

    async def slowly() -> None:
        storing.set()
        await asyncio.sleep(10)

    async def then_slowly() -> None:
        rig.jobs.before["update"] = slowly

    rig.jobs.after["update"] = then_slowly
    working = asyncio.create_task(rig.work())
    await storing.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert (await rig.job()).status == State.QUEUED


# -- progress


async def test_progress_reaches_the_job_and_the_session_document(rig: Rig) -> None:
    halfway = Held()
    rig.engine.on_step = lambda step: halfway() if step == 3 else None
    working = asyncio.create_task(rig.work())
    await eventually(halfway.entered.is_set)
    async with asyncio.timeout(20):
        while (await rig.document()).get("processingProgress") != 0.5:
            await asyncio.sleep(0.01)
    assert (await rig.job()).progress.fraction == 0.5
    halfway.let_go.set()
    await working
    assert (await rig.job()).progress.fraction == 1.0


# -- the documents


#: Outcome, as the ack table in docs/architecture.md begins its row -> the test of it here.
ROWS = {
    "done": test_an_edit_is_stored_and_acknowledged,
    "duplicate of a finished job": test_a_duplicate_of_a_finished_job_is_acknowledged_and_painted_no_more,
    "another worker holds a live lease": test_a_job_under_a_live_lease_is_held_back,
    "unreadable message": test_an_unreadable_message_is_dead_lettered_with_its_reason,
    "bad input": test_bad_input_fails_the_job_and_is_dead_lettered,
    "painting failed": test_a_failed_painting_is_tried_again_then_dead_lettered,
    "waiting for what is not there": test_weights_that_are_not_there_are_waited_for,
    "a store or the broker is unavailable": test_a_blob_store_that_is_down_uses_no_attempt,
    "user cancels": test_a_running_job_that_is_canceled_stops_within_a_step,
    "deadline passed": test_a_running_job_is_stopped_at_its_deadline,
    "shutdown": test_shutdown_puts_the_job_back_and_uses_no_attempt,
}


async def test_a_claim_that_was_stored_without_a_word_costs_no_attempt(rig: Rig) -> None:
    async def lose_the_answer() -> None:
        raise StoreUnavailable("the connection broke after the commit")

    rig.jobs.after["update"] = lose_the_answer
    assert (await rig.work()).action == "defer"
    async with asyncio.timeout(10):
        while (await rig.job()).status != State.QUEUED:
            await asyncio.sleep(0.01)
    assert (await rig.job()).attempt == 0
    assert (await rig.work()).reason == "succeeded"
    assert (await rig.job()).attempt == 1


async def test_a_letter_that_is_replayed_before_it_is_marked_does_not_hide_the_next_one(rig: Rig) -> None:
    rig.engine.on_paint = lambda: (_ for _ in ()).throw(OutOfMemory("full"))
    rig.worker._settings = rig.settings.model_copy(
        update={"work": rig.settings.work.model_copy(update={"max_attempts": 1})}
    )

    async def replay() -> None:
        job = await rig.job()
        await rig.jobs.update(job.id, job.lock_key, claims.replay)

    rig.broker.after["publish"] = replay
    await rig.work()
    assert ((await rig.job()).status, (await rig.job()).dead_lettered) == (State.QUEUED, False)
    await rig.work()
    assert (len(rig.topics.dead), (await rig.job()).dead_lettered) == (2, True)


async def test_a_name_that_nobody_serves_makes_no_series_of_its_own(rig: Rig) -> None:
    await rig.work(variant="made-up")
    named = {label for key in rig.metrics.values for label in key[1:]}
    assert "made-up" not in named and "other" in named


@pytest.mark.slow
async def test_progress_is_written_no_more_often_than_the_pace_says() -> None:
    """With an hour between two reports, a job reports at its end only, and its session hears of start and end."""
    pace = Pace(progress_s=3600.0, mirror_s=3600.0)
    rig = Rig(inference=Inference(variant="telea", steps=100), pace=pace)
    await rig.put_session()
    ticks = threading.Event()
    rig.engine.on_step = lambda step: ticks.wait(0.005) and None
    await rig.work()
    assert rig.jobs.calls["report"] == 1
    assert rig.mirror.calls["write_session"] == 2
    assert (Pace().progress_s, Pace().mirror_s) == (0.5, 2.0)


def test_every_row_of_the_ack_table_has_its_test() -> None:
    table = Path("docs/architecture.md").read_text().partition("| outcome | job | message |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([a-z][^|]+?) \|", table, re.M)
    assert len(rows) == len(ROWS)
    assert all(row.startswith(outcome) for row, outcome in zip(rows, ROWS, strict=True))


def _raise(error: Exception) -> Callable[[], None]:
    def on_paint() -> None:
        raise error

    return on_paint


async def _cancel(rig: Rig) -> None:
    job = await rig.job()
    await MemoryJobStore(rig.settings.jobs).update(job.id, job.lock_key, claims.cancel)


async def _claim_and_die(rig: Rig) -> None:
    """What a worker that is killed after its claim leaves behind."""
    from serve_app.jobs.messages import Attributes

    asked = rig.editor.read(delivery().data)
    new = await rig.worker._new_job(rig.editor, asked, Attributes(), delivery(), "telea")
    await rig.worker._claim(new, "dead")
