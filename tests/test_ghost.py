"""What a tight mask leaves of a leash: `benchmarks.ghost` with fewer scenes."""

from benchmarks.ghost import medians
from serve_app.settings import WindowSettings


def test_a_mask_that_grows_leaves_almost_nothing_of_a_leash_and_its_shadow() -> None:
    tight, grown = medians(WindowSettings(mask_grow=0), 4), medians(WindowSettings(), 4)
    assert tight.left > 0.08 and tight.level > 10
    assert grown.left < 0.03 and grown.level < 4
