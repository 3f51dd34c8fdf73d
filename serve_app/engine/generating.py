"""Making the picture of one request: in a thread, stopped within a step. The twin of `painting`, for a Generator."""

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from ..models import GenerateRequest, Images, Pixels, Progress
from . import Generator
from .lora import host
from .painting import Local, in_slot, not_counted, twice_at_most
from .slot import Occupancy, Slot
from .stages import split

if TYPE_CHECKING:
    from .lora.adapter import Adapter

log = logging.getLogger(__name__)


def generate(
    engine: Generator,
    request: GenerateRequest,
    on_step: Callable[[Progress], None],
    on_out_of_memory: Callable[[], None] = not_counted,
    adapters: "Sequence[Adapter]" = (),
) -> Images:
    """The picture. `on_step` gets the progress once before the first step, then after each; what it raises ends the
    work and passes through. A picture that runs out of memory is begun again, once, after `on_out_of_memory` was called
    and the engine has freed what it can. Raises as `Generator.generate` does.
    """
    steps_s: list[float] = []

    def advance(step: int) -> None:
        steps_s.append(time.perf_counter())
        on_step(Progress(step=step, steps=request.steps))

    def make() -> tuple[Pixels, dict[str, float]]:
        steps_s.clear()
        began_s = time.perf_counter()
        picture = engine.generate(request, advance, adapters)
        return picture, split(began_s, steps_s, time.perf_counter())

    # Earlier peaks are not this picture's.
    engine.peak_memory()
    started_s, started_ms = time.perf_counter(), engine.device_ms()
    on_step(Progress(step=0, steps=request.steps))
    picture, stages = twice_at_most(make, engine, on_out_of_memory)
    ended_ms, busy_s = engine.device_ms(), time.perf_counter() - started_s
    peak_bytes, reserved_bytes = engine.peak_memory() or (None, None)
    log.info("Made a picture in %.2f s", busy_s, extra={"action": "generated", "busy_s": round(busy_s, 3)})
    return Images(
        images=[picture],
        busy_s=busy_s,
        gpu_ms=None if started_ms is None or ended_ms is None else ended_ms - started_ms,
        stages=stages,
        peak_bytes=peak_bytes,
        reserved_bytes=reserved_bytes,
        where=engine.describe(),
    )


async def generating(
    engine: Generator,
    request: GenerateRequest,
    slot: Slot,
    on_out_of_memory: Callable[[], None] = not_counted,
    *,
    adapter_of: host.AdapterOf = host.none,
) -> AsyncGenerator[Progress | Images, None]:
    """`generate` as `in_slot` runs it. It counts in the slot's usage. Also raises what `adapter_of` raises."""
    # Before it takes the slot, which others paint in while a LoRA is fetched. What is held here no cache takes away.
    adapters = [await adapter_of(use) for use in request.loras]

    def make(occupancy: Occupancy) -> Images:
        with slot.usage.painting():
            return generate(engine, request, occupancy.report, on_out_of_memory, adapters)

    async with aclosing(in_slot(request, slot, slot.acquire, make)) as events:
        async for event in events:
            yield event


class LocalGenerator(Local[GenerateRequest]):
    """One that makes pictures from prompts. `adapter_of` reads LoRAs for its engine."""

    def __init__(self, name: str, engine: Generator, adapter_of: host.AdapterOf = host.none) -> None:
        super().__init__(name, engine, partial(generating, engine, adapter_of=adapter_of))
