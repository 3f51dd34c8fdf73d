"""Jobs of pictures: posted, painted item by item, retried, canceled, deleted. Over memory stores, without Ray."""

import asyncio
import io
import json
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from serve_app.adapters.memory import MemoryBlobStore, MemoryJobStore
from serve_app.edit.job import Editor
from serve_app.engine.lora.apart import CheckedApart
from serve_app.engine.painting import LocalModel
from serve_app.errors import (
    BlankImage,
    FluxFillError,
    IllegalTransition,
    InputError,
    KeyReused,
    NotSupported,
    PostInFlight,
    QuotaExceeded,
    ReplicaLost,
    StoreUnavailable,
    Unavailable,
    UnknownJob,
    UnknownModel,
    UnknownVariant,
    VariantNotReady,
)
from serve_app.generate.job import Generation
from serve_app.generate.loras import Loras
from serve_app.jobs import api as jobs_api
from serve_app.jobs.api import ATTEND_S, LEFT_S, JobApi
from serve_app.jobs.kinds import Caller
from serve_app.jobs.notifications import Notifier
from serve_app.jobs.ports import Verdict
from serve_app.jobs.record import MAX_EVENTS, Cause, Job, State
from serve_app.jobs.worker import Worker
from serve_app.models import GenerateRequest, Images, OnProgress, Progress
from serve_app.settings import Inference, Settings

from .rig import FAST, QUICK, BlobOutage, Clock, Counters, Linked, Outage, Prompts, Receivers, Scripted, Topics

OPEN = Caller()


class Painter:
    """A model that paints what its seed says, and does before each picture what a test tells it."""

    is_ready = True

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.before: Callable[[GenerateRequest], Awaitable[None]] | None = None

    async def run(self, request: GenerateRequest, on_progress: OnProgress) -> Images:
        self.requests.append(request)
        if self.before is not None:
            await self.before(request)
        for step in range(request.steps + 1):
            await on_progress(Progress(step=step, steps=request.steps))
        noise = np.random.default_rng(request.seed).integers(0, 256, (request.height, request.width, 3), np.uint8)
        return Images(images=[noise], busy_s=0.5, gpu_ms=2.0, where={"versions": {"painter": "1"}})


class Studio:
    """One process: its API, its worker and its notifier; `beside()` is another over the same stores."""

    #: The service of the routes, where a server is in front.
    served: Any = None

    def __init__(
        self,
        name: str | None = None,
        clock: Clock | None = None,
        stores: tuple[Any, Any] | None = None,
        painter: Any = None,
        prompts: Any = None,
        **settings: Any,
    ) -> None:
        """Over `stores`, of blobs and of jobs, or else over those of this name in memory, with this clock."""
        self.name, self.clock, self.given = name or uuid.uuid4().hex, clock or Clock(), settings
        given = {"generators": {"sdxl": {}, "flux-dev-Q8_0": {"max_count": 4}}, "variants": {"telea": {}}, **settings}
        self.settings = Settings(
            blobs=f"memory:{self.name}",
            jobs=f"memory:{self.name}",
            work={**FAST, "lease_s": 10} if stores else FAST,
            **given,
        )
        blobs, jobs = stores or (
            MemoryBlobStore(self.settings.blobs, self.settings.public_url),
            MemoryJobStore(self.settings.jobs, self.clock),
        )
        self.blobs, self.jobs = BlobOutage(blobs, StoreUnavailable), Outage(jobs, StoreUnavailable)
        self.topics, self.painter, self.metrics = Topics(), painter or Painter(), Counters()
        editors = {name: LocalModel(name, Scripted()) for name in self.settings.variants}
        models: dict[str, Any] = {name: editors.get(name, self.painter) for name in self.settings.served}
        self.loras = Loras(blobs=self.blobs, checker=CheckedApart(self.settings), settings=self.settings.loras)
        self.kind = Generation(
            blobs=self.blobs, models=models, prompts=prompts or Prompts(), loras=self.loras, settings=self.settings
        )
        #: Of edits, which all variants make alike.
        self.editor = Editor(
            blobs=self.blobs,
            models=editors,
            prompts=prompts or Prompts(),
            settings=self.settings,
            defaults=lambda: Inference(variant=next(iter(editors)), steps=4),
            links=Linked(),
        )
        self.kinds: list[Any] = [self.kind, self.editor]
        shared: dict[str, Any] = dict(
            kinds=self.kinds,
            job_store=self.jobs,
            mirror=MemoryJobStore(self.settings.jobs),
            publisher=self.topics,
            webhooks=Receivers(),
            settings=self.settings,
            metrics=self.metrics,
        )
        self.notifier = Notifier(**shared, poll_s=0.01)
        self.worker = Worker(**shared, notifier=self.notifier, models=models, pace=QUICK)
        self.api = JobApi(
            kinds=self.kinds, job_store=self.jobs, blobs=self.blobs, notifier=self.notifier, settings=self.settings
        )

    def beside(self) -> "Studio":
        return Studio(self.name, self.clock, **self.given)

    async def post(self, caller: Caller = OPEN, **body: Any) -> Job:
        job, is_new = await self.api.post({"type": "generate", "prompt": "a cat", **SMALL, **body}, caller)
        assert is_new
        await self.notifier.drained()
        return job

    async def work(self) -> Verdict:
        return await self.worker.work(self.topics.sessions[-1])

    async def job(self, job: Job) -> Job:
        stored = await self.jobs.get(job.id)
        assert stored is not None
        return stored

    async def paths(self) -> list[str]:
        return [info.path async for info in self.blobs.list(self.settings.api.prefix)]


SMALL = {"width": 64, "height": 64, "steps": 2}


@pytest.fixture
def studio() -> Studio:
    return Studio()


# -- one job from its post to its pictures


async def test_every_picture_is_stored_under_its_own_name_and_recorded(studio: Studio) -> None:
    job = await studio.post(count=3, seed=7)
    assert (await studio.work()).reason == "succeeded"
    done = await studio.job(job)
    assert done.status == State.SUCCEEDED
    folder = f"dreamforge/default/jobs/{job.id}/generate/20260101T000000"
    paths = [f"{folder}_{n}_64x64_{7 + n}.png" for n in range(3)]
    assert [artifact.path for artifact in done.artifacts] == paths == await studio.paths()
    for n, artifact in enumerate(done.artifacts):
        assert (artifact.index, artifact.seed, artifact.width, artifact.height) == (n, 7 + n, 64, 64)
        data, info = await studio.blobs.get(artifact.path, max_bytes=10**6)
        assert (info.content_type, len(data), info.version) == ("image/png", artifact.size_bytes, artifact.version)
    assert done.timings.engine_s == pytest.approx(1.5) and done.timings.gpu_ms == pytest.approx(6.0)
    assert done.progress == Progress(step=6, steps=6)


async def test_what_became_of_it_is_told_in_order(studio: Studio) -> None:
    job = await studio.post(count=2)
    await studio.work()
    events = (await studio.job(job)).events
    assert [event.number for event in events] == [1, 2, 3, 4, 5]
    assert [(event.status, event.cause, event.artifact) for event in events] == [
        (State.QUEUED, None, None),
        (State.RUNNING, Cause.CLAIMED, None),
        (State.RUNNING, None, 0),
        (State.RUNNING, None, 1),
        (State.SUCCEEDED, Cause.SUCCEEDED, None),
    ]


async def test_each_picture_has_a_request_of_its_own(studio: Studio) -> None:
    await studio.post(count=2, seed=2**63 - 1, negative_prompt="dogs", guidance=5, scheduler="euler")
    await studio.work()
    first, second = studio.painter.requests
    assert (first.seed, second.seed) == (2**63 - 1, 0)
    asked = (first.prompt, first.negative_prompt, first.steps, first.guidance_scale, first.scheduler)
    assert asked == ("a cat", "dogs", 2, 5.0, "euler")


async def test_a_picture_says_how_to_make_it_again(studio: Studio) -> None:
    job = await studio.post(seed=3, prompt="une forêt à l'aube \N{DECIDUOUS TREE}")
    await studio.work()
    data, _ = await studio.blobs.get((await studio.job(job)).artifacts[0].path, max_bytes=10**6)
    text = Image.open(io.BytesIO(data)).text
    assert text["prompt"] == "une forêt à l'aube \N{DECIDUOUS TREE}"
    assert (text["seed"], text["steps"], text["model"]) == ("3", "2", "sdxl")
    assert json.loads(text["versions"]) == {"painter": "1"}
    assert job.id not in data.decode(errors="ignore")
    assert "scheduler" not in text


@pytest.mark.parametrize(("format", "ending", "kind"), [("jpeg", "jpg", "JPEG"), ("webp", "webp", "WEBP")])
async def test_other_formats(studio: Studio, format: str, ending: str, kind: str) -> None:
    job = await studio.post(format=format)
    await studio.work()
    path = (await studio.job(job)).artifacts[0].path
    assert path.endswith(f".{ending}")
    image = Image.open(io.BytesIO((await studio.blobs.get(path, max_bytes=10**6))[0]))
    assert image.format == kind and json.loads(image.getexif()[0x010E])["prompt"] == "a cat"


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
async def test_metadata_can_be_left_out(studio: Studio, format: str) -> None:
    job = await studio.post(prompt="a secret plan", embed_metadata=False, format=format)
    await studio.work()
    data, _ = await studio.blobs.get((await studio.job(job)).artifacts[0].path, max_bytes=10**6)
    assert b"secret" not in data


async def test_the_same_request_gives_the_same_bytes(studio: Studio) -> None:
    files = []
    for _ in range(2):
        job = await studio.post(seed=5)
        await studio.work()
        files.append((await studio.blobs.get((await studio.job(job)).artifacts[0].path, max_bytes=10**6))[0])
    assert files[0] == files[1]


# -- what goes wrong


async def test_a_retried_job_goes_on_at_the_first_missing_picture(studio: Studio) -> None:
    async def dies_at_the_second(request: GenerateRequest) -> None:
        if len(studio.painter.requests) == 2:
            raise ReplicaLost("gone")

    studio.painter.before = dies_at_the_second
    job = await studio.post(count=3, seed=0)
    assert (await studio.work()).action == "defer"
    assert len((await studio.job(job)).artifacts) == 1
    studio.clock.advance(3600)
    assert (await studio.work()).reason == "succeeded"
    assert [request.seed for request in studio.painter.requests] == [0, 1, 1, 2]
    done = await studio.job(job)
    assert [artifact.index for artifact in done.artifacts] == [0, 1, 2] and len(await studio.paths()) == 3
    assert done.progress == Progress(step=6, steps=6)


async def test_a_worker_killed_between_the_store_and_the_record_stores_no_second_object(studio: Studio) -> None:
    """The record of a picture is lost, the picture is not: the next attempt writes it again under the same name."""
    job = await studio.post()
    first = studio.beside()

    async def killed() -> None:
        raise asyncio.CancelledError

    first.blobs.after["put"] = killed
    first.topics.sessions = studio.topics.sessions
    working = asyncio.create_task(first.work())
    with pytest.raises(asyncio.CancelledError):
        await working
    assert (await studio.job(job)).artifacts == ()
    studio.clock.advance(60)
    assert (await studio.work()).reason == "succeeded"
    assert len(await studio.paths()) == 1


async def test_a_picture_that_cannot_be_stored_is_not_made_again(studio: Studio) -> None:
    job = await studio.post(count=2)
    studio.blobs.only, down = {"put"}, studio.painter

    async def store_goes_down(request: GenerateRequest) -> None:
        studio.blobs.is_down = True

    down.before = store_goes_down
    assert (await studio.work()).action == "defer"
    studio.blobs.is_down, down.before = False, None
    studio.clock.advance(60)
    assert (await studio.work()).reason == "succeeded"
    assert [request.seed - job.seed for request in down.requests] == [0, 1]
    assert (await studio.job(job)).attempt == 1


async def test_a_blank_picture_is_a_failure_with_a_reason(studio: Studio) -> None:
    async def blank(request: GenerateRequest) -> None:
        raise BlankImage("every pixel is black")

    studio.painter.before = blank
    job = await studio.post()
    assert (await studio.work()).reason == "blank_image"
    failed = await studio.job(job)
    assert failed.status == State.FAILED and failed.error is not None
    assert (failed.error.code, failed.error.message, failed.attempt) == ("blank_image", "every pixel is black", 1)
    ((_, letter),) = studio.topics.dead
    assert letter["deadLetterJobId"] == job.id


async def test_a_canceled_job_stops_within_a_step_and_keeps_what_it_has(studio: Studio) -> None:
    reached, job = asyncio.Event(), await studio.post(count=5)

    async def hangs_at_the_third(request: GenerateRequest) -> None:
        if len(studio.painter.requests) == 3:
            reached.set()
            await asyncio.sleep(60)

    studio.painter.before = hangs_at_the_third
    working = asyncio.create_task(studio.work())
    await asyncio.wait_for(reached.wait(), 10)
    assert (await studio.api.cancel(job.id, OPEN)).status == State.CANCELED
    assert (await asyncio.wait_for(working, 10)).action == "ack"
    canceled = await studio.job(job)
    assert canceled.status == State.CANCELED and len(canceled.artifacts) == 2
    with pytest.raises(IllegalTransition):
        await studio.api.cancel(job.id, OPEN)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_picture_that_is_stored_while_its_job_is_deleted_is_deleted_too(studio: Studio, when: str) -> None:
    job = await studio.post(count=2)

    async def delete() -> None:
        await studio.api.cancel(job.id, OPEN)
        await studio.api.delete(job.id, OPEN)

    async def at_the_second(request: GenerateRequest) -> None:
        if len(studio.painter.requests) == 2:
            getattr(studio.blobs, when)["put"] = delete

    studio.painter.before = at_the_second
    await studio.work()
    assert await studio.jobs.get(job.id) is None and await studio.paths() == []


async def test_a_job_canceled_while_it_waits_never_starts(studio: Studio) -> None:
    job = await studio.post()
    await studio.api.cancel(job.id, OPEN)
    assert (await studio.work()).reason == "canceled"
    assert studio.painter.requests == [] and (await studio.job(job)).status == State.CANCELED


async def test_a_message_that_comes_twice_paints_once(studio: Studio) -> None:
    await studio.post()
    assert [(await studio.work()).reason, (await studio.work()).reason] == ["succeeded", "succeeded"]
    assert len(studio.painter.requests) == 1


async def test_a_message_of_a_deleted_job_is_dropped(studio: Studio) -> None:
    job = await studio.post()
    await studio.api.cancel(job.id, OPEN)
    await studio.api.delete(job.id, OPEN)
    assert (await studio.work()).action == "ack"
    assert await studio.jobs.get(job.id) is None and studio.painter.requests == []


async def test_a_job_deleted_while_it_is_being_claimed_stays_deleted(studio: Studio) -> None:
    job = await studio.post()

    async def is_deleted() -> None:
        await studio.beside().api.cancel(job.id, OPEN)
        await studio.beside().api.delete(job.id, OPEN)

    studio.jobs.before["update"] = is_deleted
    assert (await studio.work()).reason == "unknown_job"
    assert await studio.jobs.get(job.id) is None and studio.painter.requests == []


async def test_a_message_that_names_no_stored_job_is_a_dead_letter(studio: Studio) -> None:
    await studio.post()
    named = studio.topics.sessions[-1]
    bare = {name: value for name, value in named.attributes.items() if name != "jobId"}
    object.__setattr__(named, "attributes", bare)
    assert (await studio.work()).reason == "malformed_message"
    assert studio.topics.dead[0][1]["deadLetterError"].startswith("attributes.jobId")


# -- asking


async def test_a_job_takes_what_is_left_out_from_its_model(studio: Studio) -> None:
    job, _ = await studio.api.post({"type": "generate", "prompt": "x"}, OPEN)
    asked = job.parameters.model_dump()
    assert job.variant == "sdxl"
    assert {name: asked[name] for name in ("width", "height", "steps", "guidance_scale", "count", "format")} == {
        "width": 1024, "height": 1024, "steps": 30, "guidance_scale": 7.0, "count": 1, "format": "png",
    }  # fmt: skip
    flux, _ = await studio.api.post({"type": "generate", "prompt": "x", "engine": "flux-srpo"}, OPEN)
    assert (flux.variant, flux.parameters.model_dump()["guidance_scale"]) == ("flux-dev-Q8_0", 3.5)
    by_name, _ = await studio.api.post({"type": "generate", "prompt": "x", "model": "flux-dev-Q8_0"}, OPEN)
    assert by_name.variant == "flux-dev-Q8_0"


async def test_seeds_are_kept_zero_included_and_made_up_where_none_is_given(studio: Studio) -> None:
    assert (await studio.post(seed=0)).seed == 0
    drawn = {(await studio.post()).seed for _ in range(3)}
    assert len(drawn) == 3


async def test_smoke_settings_go_before_what_is_asked() -> None:
    studio = Studio(api={"smoke": True})
    job = await studio.post(width=1024, height=1024, steps=24)
    asked = job.parameters.model_dump()
    assert (asked["width"], asked["height"], asked["steps"]) == (256, 256, 10)


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ({"prompt": ""}, ValidationError, "prompt"),
        ({"prompt": "x" * 2001}, ValidationError, "prompt"),
        ({"count": 0}, ValidationError, "count"),
        ({"count": 101}, ValidationError, "count"),
        ({"width": 32}, ValidationError, "width"),
        ({"height": 4096}, ValidationError, "height"),
        ({"steps": "30"}, ValidationError, "steps"),
        ({"seed": -1}, ValidationError, "seed"),
        ({"format": "gif"}, ValidationError, "format"),
        ({"loras": [{"id": "none"}]}, UnknownModel, "none"),
        ({"loras": [{"id": "none", "scale": 11.0}]}, ValidationError, "scale"),
        ({"width": 100}, InputError, "96 or 104"),
        ({"model_id": "flux-dev-Q8_0", "height": 72}, InputError, "height: 72 .* 64 or 80"),
        ({"scheduler": "ddpm"}, InputError, "scheduler: sdxl has euler"),
        ({"model_id": "flux-dev-Q8_0", "scheduler": "ddim"}, InputError, "scheduler"),
        ({"model_id": "flux-dev-Q8_0", "negative_prompt": "dogs"}, InputError, "negative_prompt"),
        ({"model_id": "flux-dev-Q8_0", "count": 5}, InputError, "at most 4"),
        ({"model_id": "none"}, UnknownVariant, "sdxl, flux-dev-Q8_0"),
        ({"model_id": "telea"}, UnknownVariant, "telea"),
        ({"model_id": "flux-dev-Q8_0", "engine": "sdxl"}, UnknownVariant, "of engine sdxl are sdxl"),
        ({"chain": {"upscale": {"scale": 2}}}, NotSupported, "chain"),
        ({"type": "upscale"}, InputError, "type: it must be one of generate"),
    ],
)  # fmt: skip
async def test_what_cannot_be_done_is_refused_by_name(
    studio: Studio, body: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        await studio.api.post({"type": "generate", "prompt": "x", **body}, OPEN)
    assert await studio.api.list(OPEN, limit=10) == []


async def test_null_is_as_left_out_and_a_provider_is_no_hindrance(studio: Studio) -> None:
    names = "negative_prompt width height steps guidance seed scheduler model_id engine chain"
    body = {"type": "generate", "prompt": "x", "provider": "local", **dict.fromkeys(names.split())}
    job, _ = await studio.api.post(body, OPEN)
    left_out, _ = await studio.api.post({"type": "generate", "prompt": "x"}, OPEN)
    assert (job.variant, job.parameters) == (left_out.variant, left_out.parameters)


# -- keys, ids and callers

BODY = {"type": "generate", "prompt": "a cat", **SMALL}


async def test_a_key_makes_one_job_however_often_it_comes(studio: Studio) -> None:
    first, is_new = await studio.api.post(BODY, OPEN, idempotency_key="k")
    again, is_newer = await studio.beside().api.post(dict(reversed(BODY.items())), OPEN, idempotency_key="k")
    assert (again.id, is_new, is_newer) == (first.id, True, False)
    await studio.notifier.drained()
    assert len(studio.topics.sessions) == 1
    assert "k" not in (first.id, first.request, first.message)
    await studio.work()
    after, _ = await studio.api.post(BODY, OPEN, idempotency_key="k")
    assert after.status == State.SUCCEEDED
    with pytest.raises(KeyReused):
        await studio.api.post(BODY | {"seed": 1}, OPEN, idempotency_key="k")


async def test_a_key_is_its_callers_own(studio: Studio) -> None:
    ann, bob = (Caller(id=name, sees_all=False, sees_messages=False) for name in ("ann", "bob"))
    jobs = [(await studio.api.post(BODY, caller, idempotency_key="k"))[0] for caller in (ann, bob)]
    assert jobs[0].id != jobs[1].id and [job.owner for job in jobs] == ["ann", "bob"]


async def test_an_id_makes_one_job_and_is_nobody_elses(studio: Studio) -> None:
    ann, bob = (Caller(id=name, sees_all=False, sees_messages=False) for name in ("ann", "bob"))
    job, _ = await studio.api.post(BODY, ann, job_id="mine")
    assert (await studio.api.post(BODY, ann, job_id="mine"))[0].id == job.id == "mine"
    with pytest.raises(KeyReused):
        await studio.api.post(BODY, bob, job_id="mine")


ANN, BOB = (Caller(id=name, sees_all=False, sees_messages=False) for name in ("ann", "bob"))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes again looks twice."""
    monkeypatch.setattr(jobs_api, "AGAIN_WAITS_S", (0, 0))


@pytest.mark.usefixtures("at_once")
async def test_a_request_that_comes_again_without_a_key_finds_a_job_that_was_left(studio: Studio) -> None:
    """One for each, whichever process they ask."""
    assert await studio.api.again(BODY, ANN) is None
    posted = [(await studio.api.post(BODY, ANN))[0] for _ in range(4)]
    other, _ = await studio.api.post(BODY | {"seed": 1}, ANN)
    for job in (*posted[:3], other):
        await studio.api.attend(job)
    assert await studio.api.again(BODY, ANN) is None, "all are waited for, or never were"
    for job in (*posted[:2], other):
        await studio.api.leave(job, answered=False)
    assert await studio.api.again(BODY, BOB) is None and await studio.api.again(BODY, OPEN) is None
    again = dict(reversed(BODY.items()))
    found = await asyncio.gather(*(one.api.again(again, ANN) for one in (studio, studio.beside(), studio.beside())))
    assert {job and job.id for job in found} == {posted[0].id, posted[1].id, None}


@pytest.mark.usefixtures("at_once")
async def test_a_job_is_left_when_its_ingress_is_gone(studio: Studio) -> None:
    job, _ = await studio.api.post(BODY, ANN)
    await studio.api.attend(job)
    studio.clock.advance(ATTEND_S - LEFT_S - 1)
    assert await studio.api.again(BODY, ANN) is None
    studio.clock.advance(1)
    found = await studio.beside().api.again(BODY, ANN)
    assert found and found.id == job.id and found.deadline == studio.clock.now + timedelta(seconds=ATTEND_S)


@pytest.mark.usefixtures("at_once")
async def test_a_job_that_is_over_is_found_until_it_was_answered(studio: Studio) -> None:
    job, _ = await studio.api.post(BODY, ANN)
    await studio.api.attend(job)
    await studio.notifier.drained()
    await studio.work()
    studio.clock.advance(ATTEND_S)
    found = await studio.api.again(BODY, ANN)
    assert found and (found.id, found.status) == (job.id, State.SUCCEEDED)
    await studio.api.leave(found, answered=True)
    assert await studio.api.again(BODY, ANN) is None
    canceled, _ = await studio.api.post(BODY, ANN)
    await studio.api.attend(canceled)
    await studio.api.cancel(canceled.id, ANN)
    studio.clock.advance(ATTEND_S)
    assert await studio.api.again(BODY, ANN) is None


@pytest.mark.usefixtures("at_once")
async def test_files_are_hashed_once_however_many_jobs_are_compared(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await studio.api.leave((await studio.api.post(BODY, ANN))[0], answered=False)
    hashed = []
    sha256 = jobs_api.hashlib.sha256
    monkeypatch.setattr(jobs_api.hashlib, "sha256", lambda data: hashed.append(len(data)) or sha256(data))
    assert await studio.api.again({**BODY, "image": bytes(10**6)}, ANN) is None
    assert hashed.count(10**6) == 1 and len(hashed) > 3


async def test_few_requests_that_come_again_wait_for_jobs_to_be_left(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_api, "AGAIN_WAITS_S", (0, 60))
    job, _ = await studio.api.post(BODY, ANN)
    await studio.api.attend(job)
    waiting = [asyncio.create_task(studio.api.again(BODY, ANN)) for _ in range(jobs_api.AGAIN_AT_ONCE)]
    async with asyncio.timeout(10):
        while studio.jobs.calls["list"] < jobs_api.AGAIN_AT_ONCE:
            await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refused:
            await studio.api.again(BODY, ANN)
    assert refused.value.details["retry_after_s"] == 2
    assert await studio.api.again(BODY, BOB) is None, "what has nothing to wait for, waits for nothing"
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)
    monkeypatch.setattr(jobs_api, "AGAIN_WAITS_S", (0, 0.01))
    assert await studio.api.again(BODY, ANN) is None


async def test_leaving_outlives_a_store_that_is_down_and_a_job_that_is_gone(studio: Studio) -> None:
    job, _ = await studio.api.post(BODY, ANN)
    studio.jobs.is_down = True
    await studio.api.leave(job, answered=False)
    studio.jobs.is_down = False
    await studio.jobs.delete(job.id)
    await studio.api.leave(job, answered=True)


async def test_a_job_that_all_have_left_expires_and_paints_nothing(studio: Studio) -> None:
    job = await studio.post()
    await studio.api.attend(job)
    studio.clock.advance(ATTEND_S + 1)
    await studio.work()
    assert (await studio.api.get(job.id, OPEN)).status == State.EXPIRED and not studio.painter.requests


async def test_a_request_in_flight_refuses_its_copy_until_it_is_answered(studio: Studio) -> None:
    held = asyncio.Event()
    studio.jobs.before["create"] = held.wait
    first = asyncio.create_task(studio.api.post(BODY, OPEN, idempotency_key="k"))
    await asyncio.sleep(0.05)
    with pytest.raises(PostInFlight) as refused:
        await studio.api.post(BODY, OPEN, idempotency_key="k")
    assert refused.value.details["retry_after_s"] == 1
    held.set()
    job, _ = await first
    assert (await studio.api.post(BODY, OPEN, idempotency_key="k"))[0].id == job.id


async def test_of_two_processes_one_makes_the_job(studio: Studio) -> None:
    posts = (one.api.post(BODY, OPEN, idempotency_key="k") for one in (studio, studio.beside()))
    results = await asyncio.gather(*posts)
    assert sorted(is_new for _, is_new in results) == [False, True] and len({job.id for job, _ in results}) == 1


async def test_who_sees_what(studio: Studio) -> None:
    ann, bob = (Caller(id=name, sees_all=False, sees_messages=False) for name in ("ann", "bob"))
    job = await studio.post(ann)
    for call in (studio.api.get, studio.api.cancel, studio.api.delete):
        with pytest.raises(UnknownJob):
            await call(job.id, bob)
    assert await studio.api.list(bob, limit=10) == []
    assert [one.id for one in await studio.api.list(ann, limit=10)] == [job.id]
    assert [one.id for one in await studio.api.list(Caller(id="root"), limit=10)] == [job.id]
    by_message = job.evolve(owner="")
    assert not ann.sees(by_message) and Caller(id="old", sees_all=False).sees(by_message)


async def test_quotas_are_a_keys_own() -> None:
    studio = Studio(api={"unfinished_jobs": 2, "jobs_per_day": 3})
    ann, bob = (Caller(id=name, sees_all=False, sees_messages=False) for name in ("ann", "bob"))
    first = await studio.post(ann)
    await studio.post(ann)
    with pytest.raises(QuotaExceeded):
        await studio.post(ann)
    await studio.post(bob)
    await studio.api.cancel(first.id, ann)
    await studio.post(ann)
    for job in await studio.api.list(ann, limit=10):
        if not job.status.is_final:
            await studio.api.cancel(job.id, ann)
    with pytest.raises(QuotaExceeded) as refused:
        await studio.post(ann)
    assert refused.value.details["retry_after_s"] <= 120
    studio.clock.advance(86_401)
    await studio.post(ann)


async def test_a_job_is_deleted_with_its_pictures_once_it_is_over(studio: Studio) -> None:
    job = await studio.post(count=2)
    with pytest.raises(IllegalTransition):
        await studio.api.delete(job.id, OPEN)
    await studio.work()
    await studio.api.delete(job.id, OPEN)
    assert await studio.paths() == [] and await studio.jobs.get(job.id) is None
    with pytest.raises(UnknownJob):
        await studio.api.delete(job.id, OPEN)


async def test_a_picture_that_a_killed_worker_did_not_record_is_deleted_with_its_job(studio: Studio) -> None:
    job = await studio.post(count=2)

    async def is_killed() -> None:
        raise asyncio.CancelledError

    # Whose own write comes first.
    await studio.kind._outputs.check_writable()
    studio.blobs.after["put"] = is_killed
    with pytest.raises(asyncio.CancelledError):
        await studio.work()
    await studio.api.cancel(job.id, OPEN)
    assert len(await studio.paths()) == 1 and (await studio.job(job)).artifacts == ()
    await studio.api.delete(job.id, OPEN)
    assert await studio.paths() == []


async def test_what_was_kept_of_a_deleted_job_is_not_a_later_jobs_of_its_id(studio: Studio) -> None:
    async def put(prompt: str) -> None:
        await studio.api.post({"type": "generate", "prompt": prompt, **SMALL}, OPEN, job_id="mine")
        await studio.notifier.drained()

    async def goes_down(_: GenerateRequest) -> None:
        studio.blobs.is_down = True

    await put("old")
    studio.painter.before = goes_down
    assert (await studio.work()).reason == "store_unavailable"
    studio.blobs.is_down, studio.painter.before = False, None
    await studio.api.cancel("mine", OPEN)
    await studio.api.delete("mine", OPEN)
    studio.clock.advance(1)
    await put("new")
    assert (await studio.work()).reason == "succeeded"
    assert [request.prompt for request in studio.painter.requests] == ["old", "new"]


async def test_a_store_that_is_down_while_pictures_are_deleted_keeps_the_record(studio: Studio) -> None:
    job = await studio.post(count=2)
    await studio.work()
    studio.blobs.is_down = True
    with pytest.raises(StoreUnavailable):
        await studio.api.delete(job.id, OPEN)
    studio.blobs.is_down = False
    assert (await studio.job(job)).artifacts
    await studio.api.delete(job.id, OPEN)
    assert await studio.paths() == []


async def test_a_post_survives_a_broker_that_is_down(studio: Studio) -> None:
    broker = Outage(studio.topics, FluxFillError)
    studio.notifier._publisher = broker
    broker.is_down = True
    job = await studio.post()
    assert studio.topics.sessions == []
    broker.is_down = False
    studio.clock.advance(16)
    await studio.notifier.send_due()
    await studio.notifier.drained()
    assert len(studio.topics.sessions) == 1
    assert (await studio.work()).reason == "succeeded" and (await studio.job(job)).status == State.SUCCEEDED


async def test_a_job_without_a_session_writes_no_session_document(studio: Studio) -> None:
    await studio.post()
    await studio.work()
    await studio.notifier.drained()
    assert await MemoryJobStore(studio.settings.jobs).read_session("", "") is None


async def test_the_largest_record_fits_into_a_document_of_firestore(studio: Studio) -> None:
    job = await studio.post(count=100, prompt="\N{DECIDUOUS TREE}" * 2000, negative_prompt="\N{DECIDUOUS TREE}" * 2000)

    async def starts_no_more(_: GenerateRequest) -> None:
        if len(studio.painter.requests) == 100:
            studio.painter.requests.pop()
            raise VariantNotReady("x" * 100_000)

    studio.painter.before = starts_no_more
    while len((stored := await studio.job(job)).events) < MAX_EVENTS:
        await studio.work()
    assert len(stored.artifacts) == 99 and len(stored.model_dump_json().encode()) < 1 << 20


async def test_a_job_that_waits_says_why(studio: Studio) -> None:
    async def starts(request: GenerateRequest) -> None:
        raise VariantNotReady("no replica of sdxl started")

    studio.painter.before = starts
    job = await studio.post()
    assert (await studio.work()).action == "defer"
    waits = (await studio.job(job)).events[-1]
    assert (waits.status, waits.cause) == (State.QUEUED, Cause.REQUEUED)
    assert waits.error is not None and waits.error.message == "no replica of sdxl started"


async def test_a_job_goes_on_when_the_whole_app_starts_again(studio: Studio) -> None:
    """With its broker, which held its message in memory."""
    running, queued, reached = await studio.post(count=2), await studio.post(), asyncio.Event()

    async def app_stops(request: GenerateRequest) -> None:
        if len(studio.painter.requests) == 2:
            # No write of a process that is gone arrives.
            studio.jobs.is_down = True
            reached.set()
            await asyncio.sleep(60)

    studio.painter.before = app_stops
    gone = asyncio.create_task(studio.worker.work(studio.topics.sessions[0]))
    await asyncio.wait_for(reached.wait(), 10)
    again = studio.beside()
    await again.notifier.recall()
    await again.notifier.send_due()
    await again.notifier.drained()
    assert [message.attributes["jobId"] for message in again.topics.sessions] == [queued.id]
    studio.clock.advance(FAST["lease_s"] + 1)
    await again.notifier.send_due()
    await again.notifier.drained()
    assert [message.attributes["jobId"] for message in again.topics.sessions] == [queued.id, running.id]
    assert (await again.work()).reason == "succeeded"
    assert len((await again.job(running)).artifacts) == 2 and len(again.painter.requests) == 1
    gone.cancel()
    await asyncio.wait({gone})
