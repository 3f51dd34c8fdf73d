"""Edits that put back what they were to remove: painted again, and never passed over in silence."""

import asyncio
import logging
from collections.abc import Sequence
from math import inf
from typing import Any

import cv2
import numpy as np
import pytest

from serve_app import adapters
from serve_app.edit import quality
from serve_app.edit.checking import paint_checked
from serve_app.edit.images import decode_photo
from serve_app.errors import InferenceTimeout, ReplicaLost
from serve_app.http.views import job_view
from serve_app.jobs import claims
from serve_app.jobs.api import JobApi
from serve_app.jobs.record import Job, Quality, State
from serve_app.models import Box, EditRequest, Images, OnProgress, Progress, Variant
from serve_app.settings import Limits, QualitySettings

from .backends import make_job, until
from .job_servers import Opened
from .rig import SESSION, USER, Rig, jpeg, line_mask, photo
from .test_job_stores import KEY

SEED = 7
LEASH = cv2.line(photo(), (20, 10), (60, 60), (220, 30, 40), 3)
#: Of what a leash is in `Painter`'s pictures.
AGAIN, FAINT, GONE = 1.0, 0.6, 0.0


class Painter:
    """A model that puts back as much as it is told, painting by painting; the last figure counts on."""

    is_ready = True

    def __init__(self, *shares: float | Exception) -> None:
        self.shares, self.seeds = shares, list[int]()
        self.progress = list[Progress]()
        #: Set while the painting of this number, from 1, goes on for ever.
        self.hangs_in = 0

    async def run(self, request: EditRequest, on_progress: OnProgress) -> Images:
        self.seeds.append(request.seed)
        for step in range(request.steps + 1):
            await on_progress(Progress(step=step, steps=request.steps))
        if len(self.seeds) == self.hangs_in:
            await asyncio.Event().wait()
        share = self.shares[min(len(self.seeds), len(self.shares)) - 1]
        if isinstance(share, Exception):
            raise share
        clean = cv2.inpaint(request.canvas, request.mask, 3, cv2.INPAINT_TELEA).astype(float)
        canvas = (clean + share * (request.canvas - clean)).astype(np.uint8)
        return Images(images=[canvas], busy_s=2.0, gpu_ms=1500.0)


async def rig_of(painter: Painter, original: Any = LEASH, **checked: Any) -> Rig:
    rig = Rig()
    rig.settings = rig.settings.model_copy(update={"quality": QualitySettings(**checked), "price_per_hour": 3600.0})
    rig.editor._settings = rig.worker._settings = rig.settings
    rig.models["telea"] = painter
    await rig.put_session()
    await rig.put("original.jpg", jpeg(original))
    return rig


async def worked(painter: Painter, **more: Any) -> tuple[Rig, Job]:
    rig = await rig_of(painter, **more)
    assert (await rig.work(seed=SEED)).reason == "succeeded"
    return rig, await rig.job()


async def leash_in(rig: Rig) -> float | None:
    """How much of it is in the picture that was stored."""
    edited = decode_photo(await rig.blob("edited.jpg"), Limits()).pixels
    edit = quality.cut(decode_photo(jpeg(LEASH), Limits()).pixels, edited, line_mask())
    return None if edit is None else quality.put_back(edit)


async def test_an_edit_that_removes_is_painted_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    painter = Painter(GONE)
    rig, job = await worked(painter)
    assert job.quality is not None and painter.seeds == [SEED]
    assert (job.quality.tries, job.quality.seed, job.quality.verdict) == (1, SEED, "ok")
    assert job.quality.put_back < 0.2
    assert rig.metrics.values[("fluxfill_put_back", "telea")] == [max(0.0, job.quality.put_back)]
    assert ("fluxfill_suspect_edits_total", "telea") not in rig.metrics.values
    [line] = [line for line in caplog.records if vars(line).get("action") == "edit_checked"]
    assert {name: vars(line)[name] for name in ("put_back", "seed", "tries", "verdict")} == job.quality.model_dump()


async def test_an_edit_that_put_the_object_back_is_painted_again_with_the_next_seed() -> None:
    painter = Painter(AGAIN, GONE)
    rig, job = await worked(painter)
    assert painter.seeds == [SEED, SEED + 1]
    assert job.quality is not None and job.quality.put_back < 0.2
    assert (job.quality.tries, job.quality.seed, job.quality.verdict, job.seed) == (2, SEED + 1, "ok", SEED)
    assert {artifact.seed for artifact in job.artifacts} == {SEED + 1}
    found = await leash_in(rig)
    assert found is not None and found < 0.3
    assert (await rig.document())["quality"] == "ok"


async def test_the_cost_of_an_edit_is_that_of_all_its_paintings() -> None:
    _, once = await worked(Painter(GONE))
    _, twice = await worked(Painter(AGAIN, GONE))
    assert (once.timings.engine_s, once.timings.gpu_ms, once.cost) == (2.0, 1500.0, 2.0)
    assert (twice.timings.engine_s, twice.timings.gpu_ms, twice.cost) == (4.0, 3000.0, 4.0)


async def test_an_edit_that_always_puts_the_object_back_is_suspect_wherever_it_is_told() -> None:
    painter = Painter(AGAIN)
    rig, job = await worked(painter)
    assert painter.seeds == [SEED, SEED + 1]
    assert job.quality is not None and job.quality.put_back > 0.9
    assert (job.status, job.quality.tries, job.quality.verdict) == (State.SUCCEEDED, 2, "suspect")
    assert (await rig.document())["quality"] == "suspect"
    [(completion, _)] = rig.topics.completed
    assert completion["quality"] == "suspect"
    assert rig.editor.document(job)["quality"] == "suspect", "what a webhook carries"
    assert job_view(job).model_dump(mode="json")["quality"] == job.quality.model_dump()
    assert rig.metrics.total("fluxfill_suspect_edits_total", "telea") == 1


@pytest.mark.parametrize(("shares", "kept"), [((FAINT, AGAIN), SEED), ((AGAIN, FAINT), SEED + 1)])
async def test_the_better_of_two_suspect_paintings_is_kept(shares: Sequence[float], kept: int) -> None:
    rig, job = await worked(Painter(*shares))
    assert job.quality is not None and (job.quality.tries, job.quality.seed) == (2, kept)
    assert job.quality.verdict == "suspect"
    found = await leash_in(rig)
    assert found == pytest.approx(job.quality.put_back, abs=0.1)


@pytest.mark.parametrize(("retries", "seeds"), [(0, [7]), (1, [7, 8]), (3, [7, 8, 9, 10])])
async def test_it_is_painted_again_as_often_as_is_set(retries: int, seeds: list[int]) -> None:
    painter = Painter(AGAIN)
    _, job = await worked(painter, retries=retries)
    assert painter.seeds == seeds
    assert job.quality is not None and (job.quality.tries, job.quality.verdict) == (len(seeds), "suspect")


async def test_the_threshold_is_a_setting() -> None:
    painter = Painter(FAINT)
    _, job = await worked(painter, put_back=1.0)
    assert job.quality is not None and (painter.seeds, job.quality.verdict) == ([SEED], "ok")


async def test_where_nothing_is_to_be_seen_nothing_is_said() -> None:
    """The photo shows no object under the mask."""
    painter = Painter(AGAIN)
    rig, job = await worked(painter, original=np.full_like(LEASH, 120))
    assert (painter.seeds, job.quality, (await rig.document())["quality"]) == ([SEED], None, None)
    assert ("fluxfill_put_back", "telea") not in rig.metrics.values
    assert {artifact.seed for artifact in job.artifacts} == {None}


def test_a_family_that_claims_to_remove_nothing_is_not_checked() -> None:
    assert Variant(family="flux-fill").removes and Variant(family="telea").removes
    assert not Variant(family="pause").removes


@pytest.mark.parametrize("fault", [ReplicaLost("gone"), InferenceTimeout("slow"), RuntimeError("a bug")])
async def test_a_painting_that_fails_costs_the_one_before_nothing(fault: Exception) -> None:
    painter = Painter(AGAIN, fault)
    rig, job = await worked(painter)
    assert (job.attempt, painter.seeds) == (1, [SEED, SEED + 1])
    assert job.quality is not None and (job.quality.tries, job.quality.verdict) == (1, "suspect")
    found = await leash_in(rig)
    assert found is not None and found > 0.9


async def test_a_first_painting_that_fails_is_an_attempt_that_failed() -> None:
    rig = await rig_of(Painter(ReplicaLost("gone"), GONE))
    assert (await rig.work()).action == "defer"
    assert (await rig.job()).status == State.QUEUED


async def test_progress_begins_anew_with_each_painting() -> None:
    """As it does with each attempt."""
    rig = await rig_of(painter := Painter(AGAIN))
    seen = list[Progress]()

    async def on_progress(progress: Progress) -> None:
        seen.append(progress)

    run = painter.run
    painter.run = lambda request, report: run(request, _both(report, on_progress))  # type: ignore[method-assign]
    await rig.work()
    assert [progress.step for progress in seen] == [0, 1, 2, 3, 4] * 2
    assert (await rig.job()).status == State.SUCCEEDED


def _both(*reports: OnProgress) -> OnProgress:
    async def report(progress: Progress) -> None:
        for one in reports:
            await one(progress)

    return report


async def test_a_cancellation_stops_the_second_painting_and_nothing_is_stored() -> None:
    painter = Painter(AGAIN)
    painter.hangs_in = 2
    rig = await rig_of(painter)
    api = JobApi(kinds=rig.kinds, job_store=rig.jobs, blobs=rig.blobs, notifier=rig.notifier, settings=rig.settings)
    working = asyncio.create_task(rig.work())
    await until(lambda: len(painter.seeds) == 2)
    await api.cancel_session(USER, SESSION)
    assert (await working).reason == "canceled"
    job = await rig.job()
    assert (job.status, job.quality, job.artifacts) == (State.CANCELED, None, ())


async def test_a_worker_that_dies_in_the_second_painting_loses_nothing() -> None:
    painter = Painter(AGAIN, AGAIN, GONE)
    painter.hangs_in = 2
    rig = await rig_of(painter)
    working = asyncio.create_task(rig.work(seed=SEED))
    await until(lambda: len(painter.seeds) == 2)
    working.cancel()
    await asyncio.wait({working})
    assert (await rig.job()).status == State.QUEUED
    assert (await rig.work(seed=SEED)).reason == "succeeded"
    job = await rig.job()
    assert painter.seeds == [SEED, SEED + 1, SEED]
    assert job.quality is not None and (job.quality.seed, job.quality.verdict) == (SEED, "ok")


async def test_what_could_not_be_stored_keeps_what_was_found() -> None:
    painter = Painter(AGAIN, GONE)
    rig = await rig_of(painter)

    async def down() -> None:
        rig.blobs.is_down, rig.blobs.only = True, {"put"}

    rig.blobs.after["get"] = down
    assert (await rig.work(seed=SEED)).action == "defer"
    rig.blobs.is_down = False
    assert (await rig.work(seed=SEED)).reason == "succeeded"
    job = await rig.job()
    assert painter.seeds == [SEED, SEED + 1]
    assert job.quality is not None and (job.quality.tries, job.quality.seed) == (2, SEED + 1)


REQUEST = EditRequest(
    job_id="j",
    canvas=np.zeros((16, 16, 3), np.uint8),
    mask=np.full((16, 16), 255, np.uint8),
    windows=[Box(x0=0, y0=0, x1=16, y1=16)],
    steps=1,
    guidance_scale=1.0,
    seed=2**63 - 1,
)


async def checked(painter: Painter, left_s: float, after_s: float = 0.0) -> Quality | None:
    async def paint(request: EditRequest) -> Images:
        async def ignore(_: Progress) -> None: ...

        return await painter.run(request, ignore)

    async def all_of_it(_: Images) -> float:
        return 1.0

    _, found = await paint_checked(REQUEST, paint, all_of_it, QualitySettings(), left_s=lambda: left_s, after_s=after_s)
    return found


@pytest.mark.parametrize(
    ("left_s", "after_s", "tries"), [(inf, 60.0, 2), (120.0, 60.0, 2), (50.0, 60.0, 1), (-1, 0, 1)]
)
async def test_there_is_no_second_painting_that_would_end_after_the_deadline(
    left_s: float, after_s: float, tries: int
) -> None:
    found = await checked(Painter(AGAIN), left_s, after_s)
    assert found is not None and (found.tries, found.verdict) == (tries, "suspect")


async def test_a_second_painting_is_given_up_in_time_for_the_deadline() -> None:
    painter = Painter(AGAIN)
    painter.hangs_in = 2
    found = await checked(painter, left_s=0.2)
    assert found is not None and (found.tries, len(painter.seeds)) == (1, 2)


async def test_the_seed_after_the_last_is_the_first() -> None:
    painter = Painter(AGAIN)
    await checked(painter, inf)
    assert painter.seeds == [2**63 - 1, 0]


async def test_each_store_keeps_what_was_found(kept_url: str, opened: Opened) -> None:
    store = opened(adapters.job_store(kept_url))
    found = Quality(put_back=0.912, seed=8, tries=2, verdict="suspect")
    job = await store.update("edit-1", KEY, claims.claim(make_job(), lease_s=60, max_attempts=5))
    await store.update("edit-1", KEY, claims.finish(claims.claim_of(job), "succeeded", quality=found))
    assert (stored := await store.get("edit-1")) is not None and stored.quality == found


def test_a_record_without_it_is_one_that_older_versions_read() -> None:
    assert "quality" not in make_job(status=State.SUCCEEDED).model_dump()
    assert "quality" not in make_job().model_dump_json()
