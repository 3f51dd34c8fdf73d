"""Computed seconds: the formulas' own check is docs/performance.md's roofline; these hold what is made of them."""

from pathlib import Path

import pytest

from serve_app.edit.estimate import CARDS, UNCERTAINTY, seconds
from serve_app.models import BUILT_IN, Variant
from serve_app.settings import Optimizations

EAGER, COMPILED, UNPACKED = Optimizations(), Optimizations(compile=True), Optimizations(unpack=True)


def on_l4(variant: Variant, levers: Optimizations, steps: int) -> tuple[float, float]:
    """Of a small window and of a whole frame."""
    small, frame = (
        seconds(variant, CARDS["L4"], *size, steps=steps, levers=levers) for size in ((512, 384), (1024, 1024))
    )
    assert small is not None and frame is not None
    return small, frame


@pytest.mark.parametrize(
    ("name", "levers", "steps", "text_tokens", "expected"),
    [
        ("Q8_0", EAGER, 28, 512, (14.9, 45.0)),
        ("Q8_0", COMPILED, 28, 512, (11.6, 41.8)),
        ("Q8_0", COMPILED, 28, 256, (9.7, 39.1)),
        ("Q8_0", COMPILED, 28, 128, (8.7, 37.9)),
        ("Q8_0", COMPILED, 8, 512, (3.4, 12.2)),
        ("Q8_0-w8a8", COMPILED, 28, 512, (6.2, 26.5)),
        ("Q8_0-w8a8", COMPILED, 28, 256, (4.9, 24.7)),
        ("Q8_0-w8a8", COMPILED, 8, 512, (1.8, 7.8)),
        ("klein-4B", EAGER, 4, 512, (1.5, 10.4)),
    ],
)
def test_seconds_on_an_l4_are_those_of_an_independent_calculation(
    name: str, levers: Optimizations, steps: int, text_tokens: int, expected: tuple[float, float]
) -> None:
    """Rounded to a tenth there."""
    variant = BUILT_IN[name].model_copy(update={"max_prompt_tokens": text_tokens})
    assert on_l4(variant, levers, steps) == pytest.approx(expected, abs=0.051, rel=0.01)


def test_klein_in_8_bits_and_packed() -> None:
    """By the same calculation; packed weights cost what their packing moves, of fewer weights than FLUX.1's."""
    klein = BUILT_IN["klein-4B"]
    assert on_l4(klein.model_copy(update={"repack": "w8a8"}), COMPILED, 4) == pytest.approx((1.1, 7.9), abs=0.051)
    packed = on_l4(klein.model_copy(update={"file": "flux-2-klein-4b-Q8_0.gguf"}), EAGER, 4)
    assert packed[0] - on_l4(klein, EAGER, 4)[0] == pytest.approx(4 * 3.73e9 * 7.1 / 300e9)


def test_the_document_says_what_shorter_prompts_cost() -> None:
    document = Path("docs/models.md").read_text()
    for name in ("Q8_0", "Q8_0-w8a8"):
        rows = (BUILT_IN[name].model_copy(update={"max_prompt_tokens": tokens}) for tokens in (512, 256, 128))
        costs = " | ".join("{:.1f} / {:.1f} s".format(*on_l4(row, COMPILED, 28)) for row in rows)
        (said,) = (line for line in document.splitlines() if line.startswith(f"| `{name}`") and " / " in line)
        assert said.endswith(f" | {costs} |")


def test_unpacking_costs_what_the_packing_moves() -> None:
    """Eagerly the smallest file takes longest but for Q5_K; once unpacked, all packings take the same."""
    eager = {name: on_l4(BUILT_IN[name], EAGER, 28)[1] for name in ("Q8_0", "Q4_0", "Q5_K_S")}
    assert eager["Q8_0"] < eager["Q4_0"] < eager["Q5_K_S"]
    unpacked = {on_l4(BUILT_IN[name], UNPACKED, 28) for name in eager}
    assert len(unpacked) == 1
    assert unpacked.pop()[1] < on_l4(BUILT_IN["Q4_0"], COMPILED, 28)[1] < eager["Q8_0"]


def test_an_h200_is_faster_than_an_l4_by_no_more_than_its_memory_is() -> None:
    assert 0 < UNCERTAINTY < 1
    for name, variant in BUILT_IN.items():
        at = {card: seconds(variant, CARDS[card], 1024, 1024, steps=28, levers=COMPILED) for card in CARDS}
        if at["L4"] is not None and at["H200"] is not None:
            assert 4 < at["L4"] / at["H200"] < 16, name


@pytest.mark.parametrize(
    ("variant", "levers"),
    [
        (BUILT_IN["telea"], COMPILED),
        (BUILT_IN["tiny-Q8_0"], COMPILED),
        (BUILT_IN["Q8_0-w8a8"], EAGER),
        (BUILT_IN["Q8_0"].model_copy(update={"file": "flux1-fill-dev-Q3_K.gguf"}), COMPILED),
    ],
)
def test_what_cannot_be_counted_has_no_seconds(variant: Variant, levers: Optimizations) -> None:
    assert seconds(variant, CARDS["L4"], 512, 384, steps=28, levers=levers) is None
