"""All cells of a run that are left, wave by wave."""

import asyncio
from collections.abc import Iterable, Sequence

from rich.console import Console

from serve_app.audits import Cell, CellProgress, CellResult
from serve_app.errors import AuditImpossible
from serve_app.jobs import Progress

from .fan_out import FanOut, fan_out
from .painting import Easel
from .record import Record
from .replicas import Replicas
from .settle import Settling
from .waves import Wave

out = Console(highlight=False, markup=False, soft_wrap=True)


class MatrixPainter:
    """Paints into `results`, by name; what is in there at first is not painted again."""

    def __init__(
        self, record: Record, easel: Easel, replicas: Replicas, settling: Settling, results: dict[str, CellResult]
    ) -> None:
        self._record, self._easel, self._results = record, easel, results
        self._replicas, self._settling = replicas, settling
        matrix = easel.request.matrix
        self._total = len(matrix.cells())
        self._left = {name: cell for cell in matrix.cells() if (name := matrix.name(cell)) not in results}

    async def paint(self, waves: Sequence[Wave]) -> None:
        """Where a wave's GPUs do not become free, its cells and those of the waves after it fail."""
        after = ""
        for number, wave in enumerate(waves):
            if wave.waits and (error := await self._freed(after, wave)):
                await self._give_up(waves[number:], error)
                return
            await self._paint_wave(wave)
            after = ", ".join(wave.wanted)

    async def _freed(self, after: str, wave: Wave) -> AuditImpossible | None:
        self._tell(f"waiting for a GPU for {', '.join(wave.wanted)}")
        reading, error = await self._settling.wait(after, wave, self._tell)
        self._record.settled(reading)
        return error

    def _tell(self, stage: str) -> None:
        if stage != self._record.audit.stage:
            self._record.stage(stage)

    async def _paint_wave(self, wave: Wave) -> None:
        self._record.stage(f"painting with {', '.join(wave.wanted)}")
        async with (
            fan_out(self._replicas, wave, self._easel.settings.audit) as fan,
            # No cell raises what is its own: what ends the group ends the run.
            asyncio.TaskGroup() as group,
        ):
            for name, cell in self._of(wave).items():
                group.create_task(self._paint_cell(fan, name, cell))

    def _of(self, wave: Wave) -> dict[str, Cell]:
        return {name: cell for name, cell in self._left.items() if cell.variant in wave.wanted}

    async def _paint_cell(self, fan: FanOut, name: str, cell: Cell) -> None:
        async def on_progress(progress: Progress) -> None:
            self._record.cell(name, CellProgress(status="running", step=progress.step, steps=progress.steps))

        self._note(await self._easel.paint(fan, name, cell, on_progress))

    async def _give_up(self, waves: Sequence[Wave], error: AuditImpossible) -> None:
        for wave in waves:
            for name, cell in self._of(wave).items():
                self._note(await self._easel.failed(name, cell, error))

    def _note(self, result: CellResult) -> None:
        self._results[result.name] = result
        self._record.cell(result.name, progress_of(result))
        self._record.change(**devices(self._results.values()))
        out.print(f"{len(self._results)}/{self._total} {result.name} {_words(result)}")


def progress_of(result: CellResult) -> CellProgress:
    steps = result.cell.steps * len(result.trials) * (result.windows or 1)
    return CellProgress(status=result.status, step=steps, steps=steps, error=result.error)


def devices(results: Iterable[CellResult]) -> dict[str, str]:
    """`gpu` and `sm` of the record: each that painted, once."""
    painted = [result for result in results if result.status == "succeeded"]
    found = {"gpu": sorted({result.gpu for result in painted}), "sm": sorted({result.sm for result in painted})}
    return {name: ", ".join(values) for name, values in found.items() if values}


def _words(result: CellResult) -> str:
    if result.error is not None:
        return f"failed: {result.error.code}: {result.error.message}"
    return f"{result.wall_s:.2f} s (first {result.first_wall_s:.2f} s)"
