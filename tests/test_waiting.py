"""Waiting for what is not there: weights, a replica, the text encoder, a store. It uses no attempt, has an end, and
paints nothing twice; and what is claimed at a time has bounds in number, in memory and in tries.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from serve_app.edit import images, outputs
from serve_app.edit import job as edit_job
from serve_app.engine.painting import LocalModel
from serve_app.errors import ReplicaLost, StoreDenied, StoreUnavailable, VariantLoadFailed
from serve_app.jobs import claims
from serve_app.jobs.admission import Deferrals
from serve_app.jobs.lease import UnconfirmedClaims
from serve_app.jobs.ports import Verdict
from serve_app.jobs.record import State
from serve_app.models import EditRequest, Images, OnProgress
from serve_app.settings import Inference, Settings, VariantSettings, Work

from .rig import Held, Rig, delivery, jpeg, photo

DAY_S = 86_400.0


@pytest.fixture
async def rig() -> Rig:
    rig = Rig()
    await rig.put_session()
    return rig


def raising(error: Exception) -> Callable[[], None]:
    def on_paint() -> None:
        raise error

    return on_paint


# -- weights, replicas, the text encoder


class Away(LocalModel):
    """A model whose replicas do not begin while `error` is set: it is raised, or waited for without end."""

    error: Exception | None = None
    is_awaited = False

    async def run(self, request: EditRequest, on_progress: OnProgress) -> Images:
        if self.is_awaited:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return await super().run(request, on_progress)


def away(rig: Rig, error: Exception | None = None) -> Away:
    rig.models["telea"] = model = Away("telea", rig.engine)
    model.error = error
    return model


async def test_a_variant_that_does_not_load_holds_its_messages_back_and_uses_no_attempt(rig: Rig) -> None:
    model = away(rig, VariantLoadFailed("variant telea did not load: no such file"))
    for _ in range(20):
        verdict = await rig.work()
        assert (verdict.action, verdict.reason) == ("defer", "variant_failed")
        assert verdict.delay_s <= 10, "what loads within a minute is not waited for any longer"
        rig.clock.advance(verdict.delay_s)
    job = await rig.job()
    assert (job.status, job.attempt, rig.topics.dead) == (State.QUEUED, 0, [])
    assert job.error and "no such file" in job.error.message
    model.error = None
    assert (await rig.work()).reason == "succeeded"
    assert (await rig.job()).attempt == 1


async def test_waiting_ends_in_a_dead_letter_that_says_what_for(rig: Rig) -> None:
    away(rig, VariantLoadFailed("variant telea did not load: no such file"))
    await rig.work()
    rig.clock.advance(DAY_S - 1)
    assert (await rig.work()).action == "defer"
    rig.clock.advance(1)
    assert await rig.work() == Verdict(action="ack", reason="variant_failed")
    job = await rig.job()
    assert (job.status, rig.engine.painted) == (State.FAILED, 0)
    ((_, attributes),) = rig.topics.dead
    assert attributes["deadLetterReason"] == "variant_failed"
    assert "no such file" in attributes["deadLetterError"]
    assert (await rig.document())["processingError"]["code"] == "variant_failed"


async def test_an_attempt_that_began_ends_the_wait(rig: Rig) -> None:
    model = away(rig, VariantLoadFailed("not there"))
    await rig.work()
    rig.clock.advance(DAY_S - 1)
    model.error = None
    rig.engine.on_paint = raising(ReplicaLost("gone"))
    assert (await rig.work()).reason == "replica_lost"
    rig.clock.advance(600)
    model.error = VariantLoadFailed("not there")
    assert (await rig.work()).action == "defer"
    assert (await rig.job()).attempt == 1


async def test_a_replica_that_never_begins_gives_the_place_back_and_uses_no_attempt() -> None:
    rig = Rig(work_settings={"replica_wait_s": 0.05})
    await rig.put_session()
    model = away(rig)
    model.is_awaited = True
    for _ in range(4):
        verdict = await rig.work()
        assert (verdict.action, verdict.reason) == ("defer", "variant_not_ready")
    assert ((await rig.job()).status, (await rig.job()).attempt) == (State.QUEUED, 0)
    patient = Rig(name=rig.name, clock=rig.clock)
    assert (await patient.work()).reason == "succeeded"


class OneByOne:
    """A text encoder with one replica: prompts wait for each other."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()

    async def encode(self, variant: str, prompt: str) -> bytes | None:
        async with self.lock:
            return None


@pytest.mark.slow
@pytest.mark.slow
async def test_waiting_for_the_text_encoder_is_no_inference() -> None:
    rig = Rig(work_settings={"inference_timeout_s": 2.0, "lease_s": 60.0, "renew_s": 20.0})
    await rig.put_session()
    rig.editor._prompts = encoder = OneByOne()
    await encoder.lock.acquire()
    working = asyncio.create_task(rig.work())
    await asyncio.sleep(2.1)
    encoder.lock.release()
    assert (await working).reason == "succeeded"


async def test_a_text_encoder_that_does_not_answer_gives_the_place_back_and_uses_no_attempt() -> None:
    rig = Rig(work_settings={"replica_wait_s": 0.05})
    await rig.put_session()
    rig.editor._prompts = encoder = OneByOne()
    await encoder.lock.acquire()
    verdict = await rig.work()
    assert (verdict.action, verdict.reason, (await rig.job()).attempt) == ("defer", "variant_not_ready", 0)
    patient = Rig(name=rig.name, clock=rig.clock)
    assert (await patient.work()).reason == "succeeded"


# -- messages that wait for their share


async def fill(rig: Rig, held: Held) -> list[asyncio.Task[Verdict]]:
    """Jobs that take the whole share of a variant that is not ready."""
    rig.engine.on_paint = held
    rig.models["telea"].is_ready = False
    sessions = [f"s{n}" for n in range(rig.settings.share("telea"))]
    for session in sessions:
        await rig.put_session(session)
    working = [asyncio.create_task(rig.work(session, sessionId=session)) for session in sessions]
    await asyncio.to_thread(held.entered.wait)
    return working


async def test_a_message_that_waits_for_its_share_for_too_long_ends_as_a_failed_job() -> None:
    rig, held = Rig(work_settings={"wait_limit_s": 0.1}), Held()
    working = await fill(rig, held)
    await rig.put_session("late")
    first = await rig.work("last", sessionId="late")
    assert (first.action, first.reason) == ("defer", "variant_not_ready")
    await asyncio.sleep(0.1)
    assert await rig.work("last", sessionId="late") == Verdict(action="ack", reason="variant_not_ready")
    ((_, attributes),) = rig.topics.dead
    assert attributes["deadLetterReason"] == "variant_not_ready"
    assert (await rig.document("late"))["processingStatus"] == "failed"
    held.let_go.set()
    assert {verdict.reason for verdict in await asyncio.gather(*working)} == {"succeeded"}


async def test_a_hold_back_for_a_share_is_short_however_often_it_happened(rig: Rig) -> None:
    held = Held()
    working = await fill(rig, held)
    delays = [(await rig.work("last")).delay_s for _ in range(12)]
    assert max(delays) <= 10
    held.let_go.set()
    await asyncio.gather(*working)


def test_waits_are_counted_by_message_forgotten_and_bounded() -> None:
    waits = Deferrals(at_most=2)
    assert [waits.count("a"), waits.count("a"), waits.count("b")] == [1, 2, 1]
    assert waits.count("a") == 3, "two are kept"
    waits.forget("a")
    assert waits.count("a") == 1
    waits.count("c")
    assert (waits.count("b"), waits.waited_s("unknown")) == (1, 0.0), "b was the least recently held back"


async def test_a_message_that_is_done_starts_anew(rig: Rig) -> None:
    rig.jobs.is_down = True
    for _ in range(3):
        await rig.work()
    rig.jobs.is_down = False
    await rig.work()
    rig.jobs.is_down = True
    assert (await rig.work()).delay_s <= rig.settings.work.backoff_s * 1.2


@pytest.mark.slow
async def test_a_jobs_share_is_that_of_the_variant_it_was_claimed_with() -> None:
    """The operator moves the default: jobs that began with the old one do not fill the places of the new one."""
    rig = Rig()
    settings = Settings(
        variants={"telea": {}, "b": {"definition": {"family": "telea"}}},
        blobs=rig.settings.blobs,
        jobs=rig.settings.jobs,
        work=rig.settings.work,
    )
    rig.editor._settings = rig.worker._settings = rig.worker._admission._settings = settings
    rig.inference = Inference(variant="b", steps=2)
    old, new = [f"old{n}" for n in range(settings.in_flight())], [f"new{n}" for n in range(4)]
    for session in (*old, *new):
        await rig.put_session(session)
    rig.engine.on_paint = raising(ReplicaLost("preempted"))
    for session in old:
        assert (await rig.work(session, sessionId=session)).reason == "replica_lost"
    rig.clock.advance(600)
    rig.inference = Inference(variant="telea", steps=2)
    (model := rig.models["b"]).is_ready = False
    stuck = asyncio.Event()

    async def waits(request: EditRequest, on_progress: OnProgress) -> Images:
        await stuck.wait()
        return await LocalModel.run(model, request, on_progress)

    model.run = waits  # type: ignore[method-assign]
    rig.engine.on_paint = lambda: None
    waiting = [asyncio.create_task(rig.worker.work(delivery(s, sessionId=s))) for s in old]
    done, pending = await asyncio.wait(waiting, timeout=0.5)
    assert len(pending) == min(settings.share("b"), settings.in_flight() // 2)
    assert {task.result().reason for task in done} == {"variant_not_ready"}
    assert [(await rig.work(s, sessionId=s)).reason for s in new] == ["succeeded"] * 4
    stuck.set()
    assert {verdict.reason for verdict in await asyncio.gather(*pending)} == {"succeeded"}


@pytest.mark.parametrize("ingresses", [1, 2, 3, 8, 100])
def test_ingresses_share_what_keeps_the_replicas_busy(ingresses: int) -> None:
    settings = Settings(
        variants={"telea": VariantSettings(max_replicas=10), "tiny-Q4_0": VariantSettings()},
        ingress_replicas=ingresses,
    )
    busy = 2 * 10 + 2
    assert busy <= settings.share("telea") * ingresses < busy + ingresses
    assert settings.in_flight() == settings.share("telea") + settings.share("tiny-Q4_0")


# -- uploads


def goes_down(rig: Rig, *methods: str) -> Callable[[], None]:
    def on_paint() -> None:
        rig.blobs.is_down, rig.blobs.only = True, set(methods)

    return on_paint


async def test_no_gpu_paints_what_cannot_be_stored(rig: Rig) -> None:
    rig.blobs.is_down, rig.blobs.only = True, {"put"}
    for _ in range(5):
        assert (await rig.work()).reason == "store_unavailable"
    assert (rig.engine.painted, (await rig.job()).attempt, rig.blobs.calls["get"]) == (0, 0, 0)
    rig.blobs.is_down = False
    assert (await rig.work()).reason == "succeeded"


async def test_what_was_painted_is_kept_until_it_can_be_stored(rig: Rig) -> None:
    rig.engine.on_paint = goes_down(rig, "put")
    assert (await rig.work()).reason == "store_unavailable"
    for _ in range(5):
        # The probe finds the store down.
        assert (await rig.work()).reason == "store_unavailable"
    rig.blobs.is_down = False
    assert (await rig.work()).reason == "succeeded"
    job = await rig.job()
    assert (rig.engine.painted, job.attempt) == (1, 1)
    assert job.timings.engine_s is not None and job.timings.upload_s is not None
    assert (await rig.blob("edited.jpg")).startswith(b"\xff\xd8")
    assert (await rig.blob("preview.jpg")).startswith(b"\xff\xd8")


@pytest.mark.slow
async def test_what_was_painted_of_a_photo_since_replaced_is_painted_again(rig: Rig) -> None:
    key = {"idempotencyKey": "k"}
    rig.engine.on_paint = goes_down(rig, "put")
    await rig.take(delivery(attributes=key))
    rig.blobs.is_down = False
    rig.engine.on_paint = lambda: None
    await rig.put("original.jpg", jpeg(photo()[:, ::-1]))
    assert (await rig.take(delivery(attributes=key))).reason == "succeeded"
    assert rig.engine.painted == 2


@pytest.mark.slow
async def test_a_store_that_is_away_for_a_moment_delays_the_upload_only() -> None:
    rig = Rig(work_settings={"upload_timeout_s": 20.0})
    await rig.put_session()

    async def comes_back() -> None:
        while rig.blobs.calls["put"] < 5:  # the test's two, the probe, and two that fail
            await asyncio.sleep(0.01)
        rig.blobs.is_down = False

    rig.engine.on_paint = goes_down(rig, "put")
    verdict, _ = await asyncio.gather(rig.work(), comes_back())
    assert verdict.reason == "succeeded"
    assert (rig.engine.painted, (await rig.job()).fence) == (1, 1)


async def test_a_store_that_refuses_is_not_asked_again_and_again() -> None:
    """A permission is no outage: it comes back when somebody gives it."""
    rig = Rig(work_settings={"upload_timeout_s": 3600.0})
    await rig.put_session()
    down = goes_down(rig, "put")

    def denied() -> None:
        rig.blobs._error = StoreDenied
        down()

    rig.engine.on_paint = denied
    verdict = await rig.work()
    assert (verdict.action, verdict.reason) == ("defer", "store_denied")
    assert rig.blobs.calls["put"] == 2 + 1 + 1, "the test's own two, the probe, one upload"
    assert (await rig.job()).attempt == 0
    rig.clock.advance(DAY_S)
    assert await rig.work() == Verdict(action="ack", reason="store_denied")
    assert [attributes["deadLetterReason"] for _, attributes in rig.topics.dead] == ["store_denied"]
    assert rig.engine.painted == 1


async def test_a_probe_proves_a_while_and_leaves_nothing(rig: Rig) -> None:
    await rig.put_session("s2")
    await rig.work()
    await rig.work("m2", sessionId="s2")
    # Two sessions of two files by the test, two outputs each, and one probe.
    assert (rig.blobs.calls["put"], rig.blobs.calls["delete"]) == (4 + 4 + 1, 1)
    assert [info.path async for info in rig.blobs.list("locks")] == []


async def test_of_what_cannot_be_stored_the_oldest_is_dropped(monkeypatch: pytest.MonkeyPatch, rig: Rig) -> None:
    await rig.work()
    job = await rig.job()
    kept = outputs.Outputs(rig.blobs, upload_s=1.0)
    painting = outputs.Painting(files={"edited": (b"x" * 40, "image/jpeg")}, seconds={}, gpu_ms=None)
    monkeypatch.setattr(outputs, "KEPT_BYTES", 100)
    for version in ("1", "2", "3"):
        kept.keep(job, [version], painting)
    assert [kept.kept(job, [version]) is not None for version in ("1", "2", "3", "3")] == [False, True, True, False]


# -- the backoff is the job's


async def test_duplicates_of_a_failed_attempt_wait_for_its_backoff(rig: Rig) -> None:
    rig.engine.on_paint = raising(ReplicaLost("restarting"))
    first = await rig.work("m0")
    assert first.reason == "replica_lost"
    for n in range(1, 5):
        verdict = await rig.work(f"m{n}")
        assert (verdict.action, verdict.reason) == ("defer", "busy")
        assert 0 < verdict.delay_s <= first.delay_s + 1e-5
    assert (rig.engine.painted, (await rig.job()).attempt) == (1, 1)
    rig.clock.advance(first.delay_s)
    rig.engine.on_paint = lambda: None
    assert (await rig.work("m0")).reason == "succeeded"


async def test_backoffs_are_spread(rig: Rig) -> None:
    """So that what failed together does not come again together."""
    rig.engine.on_paint = raising(ReplicaLost("restarting"))
    delays = set()
    for n in range(8):
        await rig.put_session(f"s{n}")
        delays.add((await rig.work(f"m{n}", sessionId=f"s{n}")).delay_s)
    assert len(delays) == 8
    base = rig.settings.work.backoff_s
    assert all(0.8 * base <= delay <= 1.2 * base for delay in delays)


# -- the worst line to fail at


async def test_an_unexpected_error_loses_no_message(rig: Rig) -> None:
    async def bug() -> None:
        raise RuntimeError("a bug of ours")

    rig.jobs.before["update"] = bug
    verdict = await rig.work()
    assert (verdict.action, verdict.reason) == ("defer", "internal_error")
    assert (await rig.work()).reason == "succeeded"


async def test_a_hiccup_of_the_job_store_at_the_last_write_is_waited_out(rig: Rig) -> None:
    async def goes_down_for_a_moment() -> None:
        rig.jobs.is_down = True
        asyncio.get_running_loop().call_later(0.1, setattr, rig.jobs, "is_down", False)

    # The preview is stored first, the edited photo last; then the job is finished.
    async def after_preview() -> None:
        rig.blobs.after["put"] = goes_down_for_a_moment

    async def after_probe() -> None:
        rig.blobs.after["put"] = after_preview

    rig.blobs.after["put"] = after_probe
    assert (await rig.work()).reason == "succeeded"
    assert (rig.engine.painted, (await rig.job()).fence) == (1, 1)


@pytest.mark.slow
async def test_a_failure_that_the_store_cannot_note_is_given_back_when_it_returns(rig: Rig) -> None:
    def down() -> None:
        rig.jobs.is_down = True
        raise StoreUnavailable("the blob store went, and the job store with it")

    rig.engine.on_paint = down
    assert (await rig.work()).action == "defer"
    assert rig.jobs.is_down
    rig.jobs.is_down = False
    async with asyncio.timeout(10):
        while (await rig.job()).status != State.QUEUED:
            await asyncio.sleep(0.01)
    assert (await rig.job()).attempt == 0


async def test_giving_back_goes_on_when_it_is_interrupted(rig: Rig) -> None:
    held = Held()
    rig.engine.on_paint = held
    working = asyncio.create_task(rig.work())
    await asyncio.to_thread(held.entered.wait)
    writing, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> None:
        writing.set()
        await go_on.wait()

    rig.jobs.before["update"] = slowly
    working.cancel()
    held.let_go.set()
    await writing.wait()
    working.cancel()
    go_on.set()
    with suppress(asyncio.CancelledError):
        await working
    async with asyncio.timeout(10):
        while (await rig.job()).status != State.QUEUED:
            await asyncio.sleep(0.01)
    assert (await rig.job()).attempt == 0


class SlowStore:
    """A job store that answers when it is let, and counts who asks at a time."""

    def __init__(self) -> None:
        self.is_down, self.asking, self.most, self.asked = True, 0, 0, 0

    async def update(self, job_id: str, lock_key: str, change: claims.Change) -> None:
        self.asking += 1
        self.most, self.asked = max(self.most, self.asking), self.asked + 1
        await asyncio.sleep(0)
        self.asking -= 1
        if self.is_down:
            raise StoreUnavailable("away")


async def test_claims_without_an_answer_are_given_back_one_at_a_time_and_bounded(rig: Rig) -> None:
    await rig.work()
    job, store = await rig.job(), SlowStore()
    orphans = UnconfirmedClaims(store, at_most=50)  # type: ignore[arg-type]
    for n in range(500):
        orphans.add(job, f"claimer{n}")
    await asyncio.sleep(0.05)
    assert (len(orphans), store.most) == (50, 1)
    assert store.asked < 10, "it backs off"
    store.is_down = False
    async with asyncio.timeout(10):
        while len(orphans):
            await asyncio.sleep(0.01)
    assert store.most == 1
    orphans.close()


# -- memory


async def test_photos_beyond_the_room_are_decoded_again_and_come_out_the_same(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = images.decode_photo

    def counted(data: bytes, *args: Any) -> images.Photo:
        decoded.append(len(data))
        return decode(data, *args)

    monkeypatch.setattr(edit_job.images, "decode_photo", counted)
    assert (await rig.work()).reason == "succeeded"
    roomy = await rig.blob("edited.jpg")
    assert len(decoded) == 1
    limits = rig.settings.limits.model_copy(update={"decoded_pixels": 96 * 80 - 1})
    settings = rig.settings.model_copy(update={"limits": limits})
    narrow = rig.beside()
    narrow.editor._settings, narrow.editor._room_px = settings, limits.decoded_pixels
    assert (await narrow.take(delivery(attributes={"idempotencyKey": "again"}))).reason == "succeeded"
    assert await rig.blob("edited.jpg") == roomy
    assert len(decoded) == 3


async def test_room_is_given_back_however_a_job_ends(rig: Rig) -> None:
    editor = rig.editor
    room = editor._room_px
    rig.engine.on_paint = raising(ReplicaLost("gone"))
    await rig.work()
    assert editor._room_px == room == rig.settings.limits.decoded_pixels
    held = Held()
    rig.engine.on_paint = held
    rig.clock.advance(600)
    working = asyncio.create_task(rig.work())
    await asyncio.to_thread(held.entered.wait)
    assert editor._room_px == room - 96 * 80
    working.cancel()
    held.let_go.set()
    with suppress(asyncio.CancelledError):
        await working
    assert editor._room_px == room


# -- stopping


def test_an_ingress_gives_its_jobs_back_within_a_spot_nodes_notice() -> None:
    assert Work().shutdown_grace_s + 3 <= 10, (
        "of 15 s: its jobs, then what is still to be told, then the stores' answers"
    )
