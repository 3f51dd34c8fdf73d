"""The replica's class, without Ray: what it streams, and how it notices an engine that does not stop."""

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.inpainter import Inpainter
from deployments.replica import open_engine
from serve_app.engine import Engine, Window, families
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.pause import Pause
from serve_app.errors import GpuLost, OutOfMemory, PaintError, ReplicaTaken, VariantLoadFailed, VariantNotReady
from serve_app.models import Box, EditRequest, Images, Measured, Progress
from serve_app.settings import Settings

from .backends import until
from .rig import Counters


def settings(
    work: Mapping[str, float] | None = None, optimizations: Mapping[str, Any] | None = None, **definition: Any
) -> Settings:
    variants = {
        "v": {"definition": {"family": "pause", "pause_s": 0.05, **definition}, "optimizations": optimizations or {}}
    }
    return Settings(variants=variants, work=work or {})


def request(job_id: str = "j") -> EditRequest:
    canvas, mask = np.zeros((32, 32, 3), np.uint8), np.full((32, 32), 255, np.uint8)
    window = Box(x0=0, y0=0, x1=32, y1=32)
    return EditRequest(job_id=job_id, canvas=canvas, mask=mask, windows=[window], steps=4, guidance_scale=1.0, seed=0)


class Replica(Inpainter):
    """Serve awaits `__del__` when it stops a replica; Python's own garbage collection would not."""

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.counters = Counters()
        super().__init__("v", settings, self.counters)
        if engine is not None:
            self._loading._value = engine

    def __del__(self) -> None:
        self._loading._again.cancel()

    def _here(self) -> dict[str, Any]:
        return {"replica": "r", "node": "n", "pid": 1}

    async def events(self, request: EditRequest) -> list[Progress | Images]:
        return [event async for event in self.paint(request)]

    async def cell(
        self, request: EditRequest, trials: int = 2, places: int = 1
    ) -> list[Progress | Measured | ReplicaTaken]:
        return [event async for event in self.measure(request, trials, places)]


class Scripted(Pause):
    """Does `script` in place of painting, and says that it runs on a GPU."""

    def __init__(self, script: Callable[[], None]) -> None:
        super().__init__(settings().variant("v"), None, settings().variants["v"])
        self._script = script

    def paint(self, window: Window) -> Any:
        self._script()
        return window.pixels

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "memory_used_bytes": 11_000_000_000}


class Stubborn(Scripted):
    """Goes on painting, whatever it is told, until the test lets it go."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()
        super().__init__(self._hang)

    def _hang(self) -> None:
        self.entered.set()
        assert self.let_go.wait(30)


async def test_it_streams_progress_and_then_the_picture() -> None:
    events = await Replica(settings()).events(request())
    assert isinstance(events[-1], Images)
    assert events[-1].images[0].mean() == 127
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1] == Progress(step=4, steps=4)
    assert progress == sorted(progress, key=lambda p: p.step)


async def test_a_replica_that_can_paint_says_where() -> None:
    error, where = await Replica(settings()).status()
    assert error == "" and where.pop("device")
    assert where == {"replica": "r", "node": "n", "pid": 1}


async def test_two_jobs_are_painted_one_after_the_other() -> None:
    replica = Replica(settings())
    both = await asyncio.gather(replica.events(request("a")), replica.events(request("b")))
    assert all(isinstance(events[-1], Images) for events in both)
    usage = replica._slot.usage.as_dict()
    assert usage["jobs"] == 2 and 0.1 <= usage["busy_s"] <= usage["wall_s"]


@pytest.mark.parametrize("price", [None, 7200.0])
async def test_seconds_at_the_engine_are_counted_and_paid_for_whatever_they_came_to(price: float | None) -> None:
    priced = settings().model_copy(update={"price_per_hour": price})
    replica = Replica(priced)
    await replica.events(request())
    painted_s = replica.counters.total("fluxfill_gpu_seconds_total", "v")
    assert painted_s == pytest.approx(replica._slot.usage.as_dict()["busy_s"]) and painted_s >= 0.05
    failing = Replica(priced, Scripted(lambda: time.sleep(0.02) or fail_with(PaintError("no"))()))
    with pytest.raises(PaintError):
        await failing.events(request())
    assert failing.counters.total("fluxfill_gpu_seconds_total", "v") >= 0.02
    for one in (replica, failing):
        spent = one.counters.values.get(("fluxfill_cost_total", "v"))
        seconds = one.counters.total("fluxfill_gpu_seconds_total", "v")
        assert spent == (None if price is None else [pytest.approx(2 * seconds)])


async def test_a_variant_that_did_not_load_says_why() -> None:
    replica = Replica(settings(family="flux-fill", file="nowhere.gguf", base="tiny:base"))
    error, where = await replica.status()
    assert "nowhere.gguf" in error and "device" not in where
    assert replica.counters.total("fluxfill_load_failures_total", "variant v", "unknown_weights") == 1
    with pytest.raises(VariantLoadFailed, match=r"nowhere\.gguf"):
        await anext(replica.paint(request()))
    replica.check_health()


async def test_embeddings_of_a_fixed_prompt_are_in_the_apps_blob_store(tiny_klein: TinyWeights, tmp_path: Path) -> None:
    base, file = tiny_klein.folder / "klein-base", tiny_klein.folder / "flux2-klein.safetensors"
    definition = {"family": "flux2-klein", "file": str(file), "base": str(base), "max_prompt_tokens": 64}
    ours = settings(**definition, embeddings="prompts/k.safetensors").model_copy(update={"blobs": f"files:{tmp_path}"})
    without = Replica(ours)
    with pytest.raises(VariantLoadFailed, match=r"UnknownWeights: the blob store has no prompts/k\.safetensors"):
        await anext(without.paint(request()))
    (tmp_path / "prompts").mkdir()
    shutil.copy(tiny_klein.folder / "prompt.safetensors", tmp_path / "prompts" / "k.safetensors")
    error, where = await Replica(ours).status()
    assert error == "" and where["device"]


class Failing(Scripted):
    """Fails at its warm-up, and then perhaps at its end."""

    def __init__(self, at_the_end: Exception | None) -> None:
        super().__init__(lambda: None)
        self._at_the_end, self.closed = at_the_end, 0

    def warm_up(self, buckets: object) -> None:
        raise VariantLoadFailed("the variant's blocks do not compile")

    def close(self) -> None:
        self.closed += 1
        if self._at_the_end is not None:
            raise self._at_the_end


@pytest.mark.parametrize(
    ("at_the_end", "actions"), [(None, []), (PaintError("the GPU failed"), ["engine_not_closed"])], ids=repr
)
def test_an_engine_that_does_not_warm_up_is_closed(
    at_the_end: Exception | None,
    actions: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Failing(at_the_end)
    monkeypatch.setattr(families, "create", lambda *given: engine)
    with pytest.raises(VariantLoadFailed, match="do not compile"):
        open_engine("v", settings())
    assert engine.closed == 1
    assert [vars(record)["action"] for record in caplog.records] == actions


# -- engines that do not stop


async def test_an_engine_that_does_not_stop_makes_the_replica_unhealthy() -> None:
    engine = Stubborn()
    replica = Replica(settings({"engine_stop_timeout_s": 1e-6}), engine)
    painting = asyncio.create_task(anext(_second(replica)))
    await until(engine.entered.is_set)
    replica.check_health()
    painting.cancel()
    await until(lambda: replica._slot.stopping_since is not None)
    with pytest.raises(RuntimeError, match="was told to stop more than 1e-06 s ago"):
        replica.check_health()
    engine.let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await painting
    replica.check_health()


async def test_an_engine_that_paints_for_longer_than_any_worker_waits_makes_the_replica_unhealthy() -> None:
    """The worker that would have told it to stop may be dead."""
    engine = Stubborn()
    replica = Replica(settings({"engine_stop_timeout_s": 1e-6, "inference_timeout_s": 1e-6}), engine)
    replica.check_health()
    painting = asyncio.create_task(replica.events(request()))
    await until(engine.entered.is_set)
    with pytest.raises(RuntimeError, match="began to paint more than"):
        replica.check_health()
    engine.let_go.set()
    assert isinstance((await painting)[-1], Images)
    replica.check_health()


@pytest.mark.slow
async def test_a_deaf_pause_neither_reports_a_step_nor_stops() -> None:
    replica = Replica(settings({"engine_stop_timeout_s": 1e-6}, deaf=True, pause_s=0.5))
    painting = asyncio.create_task(anext(_second(replica)))
    await until(lambda: replica._slot.taken_since is not None)
    painting.cancel()
    await until(lambda: replica._slot.stopping_since is not None)
    with pytest.raises(RuntimeError, match="was told to stop"):
        replica.check_health()
    with pytest.raises(asyncio.CancelledError):
        await painting
    events = await replica.events(request())
    assert {event.step for event in events if isinstance(event, Progress)} <= {0, 4}


async def _second(replica: Inpainter) -> Any:
    """The second event, which the stubborn engine never reports."""
    async with aclosing(replica.paint(request())) as events:
        await anext(events)
        yield await anext(events)


# -- audit cells


async def test_a_cell_streams_progress_over_its_paintings_and_then_what_they_took() -> None:
    replica = Replica(settings())
    events = await replica.cell(request(), trials=3)
    measured = events[-1]
    assert isinstance(measured, Measured) and len(measured.trials) == 3 and measured.repeats
    assert measured.canvas.mean() == 127 and measured.windows == request().windows
    assert {name: measured.where[name] for name in ("replica", "node", "pid")} == {
        "replica": "r",
        "node": "n",
        "pid": 1,
    }
    assert measured.where["compute_capability"] == "N/A"
    assert [event for event in events if isinstance(event, Progress)][-1] == Progress(step=12, steps=12)


async def test_a_cell_leaves_no_figures_among_the_jobs_of_users() -> None:
    replica = Replica(settings(), Scripted(fail_with()))
    assert isinstance((await replica.cell(request()))[-1], Measured)
    assert {name for name, *_ in replica.counters.values} == {"fluxfill_load_seconds"}
    assert replica._slot.usage.as_dict() == {"jobs": 0, "busy_s": 0.0, "wall_s": 0.0}


@pytest.mark.parametrize("places", [1, 2])
async def test_a_replica_takes_so_many_cells_and_refuses_the_next_at_once(places: int) -> None:
    engine = Stubborn()
    replica = Replica(settings(), engine)
    cells = [asyncio.create_task(replica.cell(request(), places=places)) for _ in range(places)]
    await until(lambda: engine.entered.is_set() and replica._slot.audits == places)
    (refusal,) = await replica.cell(request(), places=places)
    assert isinstance(refusal, ReplicaTaken)
    job = asyncio.create_task(replica.events(request()))
    engine.let_go.set()
    assert isinstance((await job)[-1], Images)
    assert all(isinstance(events[-1], Measured) for events in await asyncio.gather(*cells))
    # What has ended has left when its figures are there.
    assert isinstance((await replica.cell(request()))[-1], Measured)


async def test_a_variant_that_did_not_load_measures_nothing() -> None:
    replica = Replica(settings(family="flux-fill", file="nowhere.gguf", base="tiny:base"))
    with pytest.raises(VariantLoadFailed, match=r"nowhere\.gguf"):
        await replica.cell(request())


@pytest.mark.slow
async def test_a_cell_that_is_closed_stops_within_a_step() -> None:
    replica = Replica(settings(pause_s=60))
    async with aclosing(_measure(replica, trials=20)) as events, asyncio.timeout(60):
        await anext(events)
    assert replica._slot.audits == 0 and replica._slot.taken_since is None
    assert not replica._slot.thread._work_queue.qsize()


def _measure(replica: Replica, trials: int) -> AsyncGenerator[Progress | Measured | ReplicaTaken, None]:
    """Of so many steps that each is short."""
    return replica.measure(replace(request(), steps=100), trials, 1)


async def test_a_cell_may_paint_for_as_long_as_each_of_its_paintings_may() -> None:
    """Each counts from its own beginning; the third hangs."""
    hung, seen = threading.Event(), list[float]()

    def hang_at_the_third() -> None:
        seen.append(replica._slot.taken_since or 0.0)
        assert len(seen) < 3 or hung.wait(30)

    replica = Replica(
        settings({"engine_stop_timeout_s": 1e-6, "inference_timeout_s": 0.2}), Scripted(hang_at_the_third)
    )
    cell = asyncio.create_task(replica.cell(request(), trials=3))
    await until(lambda: len(seen) == 3)
    assert seen[0] < seen[1] < seen[2]
    await until(lambda: _is_unhealthy(replica))
    hung.set()
    assert isinstance((await cell)[-1], Measured)
    replica.check_health()


def _is_unhealthy(replica: Replica) -> bool:
    try:
        replica.check_health()
    except RuntimeError as e:
        return "began to paint more than" in str(e)
    return False


async def test_a_cell_that_meets_a_lost_gpu_has_the_replica_replaced() -> None:
    replica = Replica(settings(), Scripted(fail_with(None, GpuLost("an illegal memory access"))))
    with pytest.raises(GpuLost, match="illegal memory access"):
        await replica.cell(request())
    with pytest.raises(VariantNotReady, match="illegal memory access"):
        await replica.cell(request())
    with pytest.raises(GpuLost):
        replica.check_health()
    assert replica.counters.total("fluxfill_gpu_lost_total", "v") == 1


# -- GPUs that fail


def fail_with(*errors: Exception | None) -> Callable[[], None]:
    """Raises one after the other; None raises nothing."""
    left = list(errors)

    def script() -> None:
        if left and (error := left.pop(0)) is not None:
            raise error

    return script


async def test_a_lost_gpu_is_refused_from_then_on_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    lost = GpuLost("cuda failed: CUDA error: an illegal memory access was encountered")
    replica = Replica(settings(), Scripted(fail_with(lost, lost)))
    replica.check_health()
    waiting = [asyncio.create_task(replica.events(request(job_id))) for job_id in ("a", "b")]
    for task in waiting:
        with pytest.raises(GpuLost, match="illegal memory access"):
            await task
    with pytest.raises(VariantNotReady, match="illegal memory access"):
        await replica.events(request("c"))
    with pytest.raises(GpuLost, match="illegal memory access"):
        replica.check_health()
    assert "illegal memory access" in (await replica.status()).error
    assert replica.counters.total("fluxfill_gpu_lost_total", "v") == 1
    assert [vars(record)["action"] for record in caplog.records if record.levelname == "ERROR"] == ["gpu_lost"]


async def test_a_failure_that_may_pass_leaves_the_replica_in_service() -> None:
    replica = Replica(settings(), Scripted(fail_with(PaintError("the GPU failed"))))
    with pytest.raises(PaintError, match="the GPU failed"):
        await replica.events(request())
    replica.check_health()
    assert isinstance((await replica.events(request()))[-1], Images)


async def test_a_painting_without_memory_is_tried_once_more_and_counted() -> None:
    full = OutOfMemory("no memory left")
    replica = Replica(settings(), Scripted(fail_with(full, None, full, full)))
    assert isinstance((await replica.events(request()))[-1], Images)
    assert replica.counters.total("fluxfill_out_of_memory_total", "v") == 1
    with pytest.raises(OutOfMemory, match="no memory left"):
        await replica.events(request())
    assert replica.counters.total("fluxfill_out_of_memory_total", "v") == 2
    replica.check_health()


async def test_a_painting_leaves_its_figures() -> None:
    replica = Replica(settings(), Scripted(fail_with()))
    painted = (await replica.events(request()))[-1]
    assert isinstance(painted, Images)
    assert replica.counters.total("fluxfill_gpu_memory_bytes", "v") == 11_000_000_000
    assert replica.counters.total("fluxfill_steps_per_second", "v") == 4 / painted.busy_s


async def test_steps_per_second_count_what_was_painted() -> None:
    replica = Replica(settings(), Scripted(fail_with()))
    inside = Box(x0=8, y0=8, x1=16, y1=16)
    painted = (await replica.events(replace(request(), windows=[*request().windows, inside])))[-1]
    assert isinstance(painted, Images) and painted.windows == request().windows
    assert replica.counters.total("fluxfill_steps_per_second", "v") == 4 / painted.busy_s


async def test_steps_per_second_count_those_that_a_strength_leaves() -> None:
    replica = Replica(settings(), Scripted(fail_with()))
    painted = (await replica.events(replace(request(), strength=0.3)))[-1]
    assert isinstance(painted, Images)
    assert replica.counters.total("fluxfill_steps_per_second", "v") == 2 / painted.busy_s


async def test_what_has_no_gpu_and_no_steps_leaves_no_figures_of_them() -> None:
    replica = Replica(settings(family="telea"))
    await replica.events(request())
    assert {name for name, *_ in replica.counters.values} == {"fluxfill_load_seconds", "fluxfill_gpu_seconds_total"}
