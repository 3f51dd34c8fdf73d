"""Where batches pay: by card, packing, size and levers, from FLUX.1's shapes. Pure arithmetic."""

import pytest
from pydantic import ValidationError

from serve_app.engine import batch_cost
from serve_app.engine.batch_cost import CARDS, overhead_bytes, saved_share, sizes
from serve_app.settings import BUCKETS, Levers
from serve_app.variants import BUILT_IN

L4 = "NVIDIA L4"


@pytest.mark.parametrize(
    ("side", "name", "levers", "pays"),
    [
        # Unpacking takes 205 ms of a step, and a 256² window's arithmetic 188 ms.
        (256, "Q8_0", {}, (2, 4)),
        (512, "Q8_0", {}, (2, 4)),
        (1024, "Q8_0", {}, ()),
        (1024, "Q5_K_S", {}, (2, 4)),
        (512, "Q8_0", {"compile": True}, (4,)),
        (768, "Q8_0", {"compile": True}, ()),
        # What is unpacked already, or never, has nothing to share.
        (256, "Q8_0", {"unpack": True}, ()),
        (256, "Q8_0-w8a8", {}, ()),
    ],
)
def test_what_pays_on_an_l4(side: int, name: str, levers: dict[str, bool], pays: tuple[int, ...]) -> None:
    assert sizes(side, side, BUILT_IN[name], Levers(max_batch=4, **levers), L4) == pays


def test_eager_unpacking_is_what_was_measured() -> None:
    """28 steps on an L4 take 8, 16 and 26 s of it, with all 11.9 billion weights."""
    for name, most_s in (("Q8_0", 8), ("Q4_0", 16.3), ("Q5_K_S", 26.1)):
        moved = overhead_bytes(BUILT_IN[name], Levers(adaln_once=False))
        assert most_s * 0.95 < 28 * moved / (CARDS["L4"].gb_per_s * 1e9) <= most_s


def test_more_windows_save_more_and_larger_ones_less() -> None:
    def saved(width: int, height: int, batch: int) -> float:
        return saved_share(width, height, batch, BUILT_IN["Q8_0"], Levers(), CARDS["L4"])

    for width, height in BUCKETS:
        shares = [saved(width, height, batch) for batch in (1, 2, 4, 8, 16)]
        assert shares[0] == 0 and shares == sorted(shares) and shares[-1] < 1
    by_area = sorted(BUCKETS, key=lambda size: size[0] * size[1])
    assert [saved(*size, 2) for size in by_area] == sorted((saved(*size, 2) for size in by_area), reverse=True)


@pytest.mark.parametrize(("max_batch", "powers"), [(1, ()), (2, (2,)), (3, (2,)), (4, (2, 4))])
def test_batches_are_powers_of_two_up_to_four(max_batch: int, powers: tuple[int, ...]) -> None:
    assert sizes(256, 256, BUILT_IN["tiny-Q4_0"], Levers(max_batch=max_batch), "CPU x86_64") == powers


def test_larger_batches_are_refused() -> None:
    """They would not end in time."""
    with pytest.raises(ValidationError, match="max_batch"):
        Levers(max_batch=5)


@pytest.mark.parametrize(
    ("device", "is_known"),
    [("NVIDIA A100-SXM4-40GB", True), ("NVIDIA H200", True), ("NVIDIA L40S", False), ("NVIDIA B300", False)],
)
def test_a_card_is_known_by_its_whole_name(device: str, is_known: bool) -> None:
    assert batch_cost.is_known(device) is is_known
    assert bool(sizes(256, 256, BUILT_IN["Q5_K_S"], Levers(max_batch=4), device)) is is_known
