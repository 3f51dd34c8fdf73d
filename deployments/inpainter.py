"""A replica of a variant, which edits photos. Audit cells are measured behind jobs."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from serve_app.engine import Engine
from serve_app.engine.painting import painting
from serve_app.engine.trials import measuring
from serve_app.errors import ReplicaTaken
from serve_app.models import EditRequest, Images, Measured, Progress

from .replica import Replica


class Inpainter(Replica[Engine]):
    """Answers `paint` and `measure` with progress and then the result."""

    async def paint(self, request: EditRequest) -> AsyncGenerator[Progress | Images, None]:
        """Progress as it comes, then the Images. Closing the stream stops the engine within one step.

        Raises VariantLoadFailed with the reason; VariantNotReady at once where the GPU failed before; what the engine
        raises.
        """
        events = painting(self._loading.value, request, self._slot, self._out_of_memory)
        async with aclosing(self._streamed(request, events)) as told:
            async for event in told:
                yield event

    async def measure(
        self, request: EditRequest, trials: int, places: int
    ) -> AsyncGenerator[Progress | Measured | ReplicaTaken, None]:
        """As `paint`, for an audit's cell: painted `trials` times, 1 or more, behind all paintings; at last the one
        Measured. Its times and steps are in no metric and in no usage: they are no user's. Where whoever asks is killed
        the cell goes on to its end: Serve notices no caller's death.

        Where as many cells are in flight here as may be (`Slot.audit_cell`), `places` at most, the only item is
        ReplicaTaken, at once. It is not raised, because Serve would log each with its traceback.
        """
        engine = self._loading.value
        cell = measuring(engine, request, self._slot, trials, places, self._out_of_memory)
        try:
            async with aclosing(self._streamed(request, cell)) as events:
                async for event in events:
                    if isinstance(event, Measured):
                        event = replace(event, where={**event.where, **self._here()})
                    yield event
        except ReplicaTaken as e:
            yield e
