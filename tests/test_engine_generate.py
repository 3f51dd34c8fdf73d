import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from serve_app.engine.fake import Fake
from serve_app.engine.generating import LocalGenerator, generate
from serve_app.errors import Canceled, OutOfMemory
from serve_app.models import GenerateRequest, Pixels, Progress, Variant
from serve_app.settings import VariantSettings


def asked(**changes: Any) -> GenerateRequest:
    """A small picture of two steps."""
    given = {
        "job_id": "job",
        "prompt": "a cat in the snow",
        "width": 64,
        "height": 64,
        "steps": 2,
        "guidance_scale": 5.0,
        "seed": 1,
        **changes,
    }
    return GenerateRequest(**given)


def no_step(step: int) -> None:
    """An on_step that nobody follows."""


class Recorder(Fake):
    """A Fake that calls `on_begin` before each picture."""

    def __init__(self, on_begin: Callable[[], None] = lambda: None) -> None:
        super().__init__(Variant(family="fake"), None, VariantSettings())
        self.begun, self.times_freed = 0, 0
        self._on_begin = on_begin

    def free_memory(self) -> None:
        self.times_freed += 1

    def generate(self, request: GenerateRequest, on_step: Callable[[int], None], adapters: Any = ()) -> Pixels:
        self.begun += 1
        self._on_begin()
        return super().generate(request, on_step)


def test_progress_is_told_before_the_first_step_and_after_each() -> None:
    told: list[Progress] = []
    made = generate(Recorder(), asked(steps=3), told.append)
    assert [(progress.step, progress.steps) for progress in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    (picture,) = made.images
    assert picture.shape == (64, 64, 3)
    assert made.busy_s >= sum(made.stages.values()) > 0
    assert set(made.stages) == {"prepare_s", "denoise_s", "decode_s"}
    assert (made.gpu_ms, made.peak_bytes, made.windows, made.where["compute_capability"]) == (None, None, (), "N/A")


@pytest.mark.parametrize("times", [1, 2])
def test_a_picture_that_runs_out_of_memory_is_begun_again_once(times: int) -> None:
    def fail() -> None:
        if engine.begun <= times:
            raise OutOfMemory("cuda failed: out of memory")

    engine, counted = Recorder(fail), list[str]()
    if times == 1:
        made = generate(engine, asked(), lambda progress: None, lambda: counted.append("once"))
        assert np.array_equal(made.images[0], generate(Recorder(), asked(), lambda progress: None).images[0])
    else:
        with pytest.raises(OutOfMemory):
            generate(engine, asked(), lambda progress: None, lambda: counted.append("once"))
    assert (engine.begun, engine.times_freed, counted) == (2, 1, ["once"])


async def test_a_generator_serves_one_request_after_the_other() -> None:
    model, told = LocalGenerator("fake", Recorder()), list[Progress]()

    async def tell(progress: Progress) -> None:
        told.append(progress)

    first, second = await asyncio.gather(*(model.run(asked(seed=seed), tell) for seed in (1, 2)))
    assert not np.array_equal(first.images[0], second.images[0])
    assert all(progress.steps == 2 for progress in told)
    await model.close()


def test_what_a_step_raises_ends_the_picture() -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise Canceled("the painting was stopped")

    with pytest.raises(Canceled):
        generate(Recorder(), asked(steps=50), stop)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt": "line\nline\r\x00\ud800\U0001f408 שלום ‏‮ 猫" * 100, "negative_prompt": "dog\udfff"},
        {"prompt": "x" * 2000, "width": 2048},
        {"prompt": "", "width": 8, "height": 8, "steps": 100, "seed": 2**63 - 1, "scheduler": "ddim"},
        {"width": 2048, "height": 16},
    ],
)
def test_a_card_takes_any_text_and_size(changes: dict[str, Any]) -> None:
    request = asked(**changes)
    card = Recorder().generate(request, no_step)
    assert (card.shape, card.dtype) == ((request.height, request.width, 3), np.uint8)
    assert np.array_equal(card, Recorder().generate(request, no_step))


def test_what_is_asked_for_is_on_the_card() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"prompt": "a dog"}, {"negative_prompt": "snow"}, {"seed": 2}, {"steps": 3}, {"guidance_scale": 6.0},
        {"scheduler": "ddim"},
    ]  # fmt: skip
    # The ink alone: the colour of the card says nothing that can be read.
    cards = [
        Recorder().generate(asked(width=512, height=512, **change), no_step).max(axis=2) < 100 for change in changes
    ]
    assert all(card.any() for card in cards)
    assert len({card.tobytes() for card in cards}) == len(changes)
