"""A replica of a generator, which makes pictures from prompts."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from serve_app import engine
from serve_app.engine.generating import generating
from serve_app.models import GenerateRequest, Images, Progress

from .replica import Replica


class Generator(Replica[engine.Generator]):
    """Answers `generate` with progress and then the picture."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Progress | Images, None]:
        """As `Inpainter.paint`."""
        events = generating(self._loading.value, request, self._slot, self._out_of_memory)
        async with aclosing(self._streamed(request, events)) as told:
            async for event in told:
                yield event
