import cv2
import numpy as np

from serve_app.engine.pause import Pause
from serve_app.engine.telea import Telea
from serve_app.models import BUILT_IN, Pixels, Variant
from serve_app.settings import VariantSettings

from .engine_fixtures import photo, square_mask, window


def telea(pixels: Pixels, mask: Pixels) -> tuple[Pixels, list[int]]:
    engine = Telea(BUILT_IN["telea"], None, VariantSettings())
    engine.load()
    steps: list[int] = []
    painted = engine.paint(window(pixels=pixels, mask=mask, steps=28, on_step=steps.append))
    return painted, steps


def test_a_leash_over_a_plain_wall_is_gone_with_its_soft_rim() -> None:
    wall = np.full((256, 256, 3), (180, 150, 120), np.uint8)
    leashed, mask = wall.copy(), np.zeros((256, 256), np.uint8)
    cv2.line(leashed, (20, 40), (230, 200), (200, 30, 40), 9, cv2.LINE_AA)
    cv2.line(mask, (20, 40), (230, 200), 255, 9)
    assert np.any(leashed[mask == 0] != wall[mask == 0])
    painted, steps = telea(leashed, mask)
    assert np.abs(painted.astype(int) - wall).max() <= 4
    assert steps == [1]


def test_pixels_well_outside_the_mask_stay() -> None:
    mask = square_mask()
    painted, _ = telea(photo(), mask)
    outside = cv2.dilate(mask, np.ones((9, 9), np.uint8)) == 0
    assert np.array_equal(painted[outside], photo()[outside])


def test_a_mask_over_everything_leaves_the_mean_colour() -> None:
    painted, _ = telea(photo(64, 64), np.full((64, 64), 255, np.uint8))
    assert np.unique(painted.reshape(-1, 3), axis=0).tolist() == [photo(64, 64).mean((0, 1)).astype(int).tolist()]


def test_one_known_pixel_is_enough() -> None:
    pixels, mask = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8)
    pixels[32, 32], mask[32, 32] = 200, 0
    painted, _ = telea(pixels, mask)
    assert np.abs(painted.astype(int) - 200).max() <= 10


def test_the_canvas_given_is_not_written_to() -> None:
    pixels = photo()
    telea(pixels, square_mask())
    assert np.array_equal(pixels, photo())


def test_pause_reports_every_step_and_paints_the_mask_grey() -> None:
    engine = Pause(Variant(family="pause", pause_s=0.0), None, VariantSettings())
    steps: list[int] = []
    painted = engine.paint(window(steps=4, on_step=steps.append))
    assert steps == [1, 2, 3, 4]
    assert (painted[square_mask() == 255] == 127).all()
    assert np.array_equal(painted[square_mask() == 0], photo()[square_mask() == 0])
