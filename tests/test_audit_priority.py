"""Audit cells and paintings on one replica on Ray Serve, with the app's own options: no painting is starved."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from tenacity import retry, retry_if_exception_type, wait_fixed

from deployments.app import build, inpainter_name
from deployments.inpainter import Inpainter
from deployments.readiness import VariantWatch
from deployments.remote import RemoteModel, RemoteTrials
from serve_app.engine import Window
from serve_app.engine.pause import Pause
from serve_app.errors import ReplicaTaken
from serve_app.models import EditRequest, Images, Measured, Pixels, Progress
from serve_app.settings import Settings

from .backends import until
from .engine_fixtures import request

pytestmark = [pytest.mark.serve, pytest.mark.usefixtures("own_apps"), pytest.mark.timeout(120)]

ONE_REPLICA = {"min_replicas": 1, "max_replicas": 1, "num_cpus": 0.1}
SETTINGS = Settings(
    variants={
        "quick": {"definition": {"family": "pause", "pause_s": 0.05}, **ONE_REPLICA},
        "endless": {"definition": {"family": "pause", "pause_s": 600}, **ONE_REPLICA},
    }
)
#: Jobs' seeds; those of cells are smaller.
JOB_SEEDS = range(1_000, 2_000)


class Log:
    """A file: to ask the replica itself would take one of its slots."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, what: str, seed: int) -> None:
        with self._path.open("a") as file:
            file.write(f"{what} {seed}\n")

    def read(self) -> list[tuple[str, int]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [(what, int(seed)) for what, _, seed in (line.partition(" ") for line in lines)]


class Noting(Pause):
    """Notes which windows it begins and ends with."""

    def __init__(self, name: str, log: Log) -> None:
        super().__init__(SETTINGS.variant(name), None, SETTINGS.variants[name])
        self._log = log

    def paint(self, window: Window) -> Pixels:
        self._log.note("begun", window.seed)
        painted = super().paint(window)
        self._log.note("ended", window.seed)
        return painted


class NotingInpainter(Inpainter):
    """Also notes which jobs arrive."""

    def __init__(self, name: str, settings: Settings, log: Log) -> None:
        super().__init__(name, settings)
        self._log, self._loading._value = log, Noting(name, log)

    async def paint(self, request: EditRequest) -> AsyncGenerator[Progress | Images, None]:
        self._log.note("arrived", request.seed)
        async with aclosing(super().paint(request)) as events:
            async for event in events:
                yield event


class Replica:
    """The only one of its variant."""

    def __init__(self, name: str, folder: Path) -> None:
        self.log = Log(folder / "log")
        bound = build(SETTINGS)._bound_deployment.init_args[1][name]._bound_deployment
        deployment = bound.options(func_or_class=NotingInpainter, name=inpainter_name(name))
        handle: DeploymentHandle = serve.run(deployment.bind(name, SETTINGS, self.log), name=name, route_prefix=None)
        self._model = RemoteModel(name, handle, VariantWatch({name: handle}, {name: inpainter_name(name)}))
        self._trials, self._name, self._cell_seeds = RemoteTrials({name: handle}), name, count(1)

    async def logged(self, *events: tuple[str, int]) -> None:
        await until(lambda: set(events) <= set(self.log.read()))

    async def paint(self, seed: int) -> Images:
        return await self._model.run(request(seed=seed, steps=100), nothing)

    async def measure(self, seed: int) -> Measured:
        """The request goes through Ray's object store, as an audit's does."""
        stored = ray.put(replace(request(steps=100), seed=seed))
        return await self._trials.measure(self._name, stored, nothing, trials=2, places=2)

    @asynccontextmanager
    async def audited(self) -> AsyncIterator[None]:
        """Cells keep coming: two are in hand at any time."""
        cells = [asyncio.create_task(self._measure_on()) for _ in range(3)]
        try:
            yield
        finally:
            for one in cells:
                one.cancel()
            ended = await asyncio.gather(*cells, return_exceptions=True)
            assert [type(one) for one in ended] == [asyncio.CancelledError] * 3

    async def _measure_on(self) -> None:
        for seed in self._cell_seeds:
            measured = await self._measure_when_taken(seed)
            assert len(measured.trials) == 2 and measured.where["pid"]

    @retry(retry=retry_if_exception_type(ReplicaTaken), wait=wait_fixed(0.01))
    async def _measure_when_taken(self, seed: int) -> Measured:
        return await self.measure(seed)


async def nothing(progress: Progress) -> None:
    """An on_progress that nobody follows."""


async def canceled(*tasks: "asyncio.Task[Images] | asyncio.Task[Measured]") -> None:
    for one in tasks:
        one.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def paintings_before(log: list[tuple[str, int]], job: int) -> list[int]:
    """Of cells, by their seeds, that ended while the job waited for its turn."""
    waited = log[log.index(("arrived", job)) : log.index(("begun", job))]
    return [seed for what, seed in waited if what == "ended" and seed not in JOB_SEEDS]


async def test_a_job_begins_after_one_painting_of_a_cell_at_most(tmp_path: Path) -> None:
    replica = Replica("quick", tmp_path)
    async with replica.audited():
        await replica.logged(("begun", 3))
        for seed in JOB_SEEDS[:5]:
            await replica.paint(seed)
        together = JOB_SEEDS[5:8]
        await asyncio.gather(*(replica.paint(seed) for seed in together))
        log = replica.log.read()
        # The audit goes on behind them.
        await replica.logged(("ended", max(seed for what, seed in log if seed not in JOB_SEEDS) + 2))
    waits = [paintings_before(log, job) for job in JOB_SEEDS[:8]]
    assert max(map(len, waits)) == 1, log


async def test_a_job_is_taken_in_where_audit_cells_are_as_many_as_may_be(tmp_path: Path) -> None:
    replica = Replica("endless", tmp_path)
    cells = [asyncio.create_task(replica.measure(seed)) for seed in (1, 2)]
    await replica.logged(("begun", 1))
    with pytest.raises(ReplicaTaken):
        await replica.measure(3)
    first, second = JOB_SEEDS[:2]
    jobs = [asyncio.create_task(replica.paint(first))]
    await replica.logged(("arrived", first))
    assert not any(one.done() for one in (*cells, *jobs))
    # Stopped within a step, the cell leaves its place to a job, and its slot to another.
    cells[0].cancel()
    jobs.append(asyncio.create_task(replica.paint(second)))
    await replica.logged(("begun", first), ("arrived", second))
    await canceled(*cells, *jobs)


async def test_a_replica_that_paints_gives_no_cell_the_slot_of_the_next_job(tmp_path: Path) -> None:
    replica = Replica("endless", tmp_path)
    first, second = JOB_SEEDS[:2]
    jobs = [asyncio.create_task(replica.paint(first))]
    await replica.logged(("begun", first))
    cells = [asyncio.create_task(replica.measure(seed)) for seed in (1, 2)]
    (refused,), _ = await asyncio.wait(cells, return_when=asyncio.FIRST_COMPLETED)
    assert isinstance(refused.exception(), ReplicaTaken)
    jobs.append(asyncio.create_task(replica.paint(second)))
    await replica.logged(("arrived", second))
    await canceled(*cells, *jobs)
