"""What is published: sessions whose right picture is known, and poisoned ones whose right error is.

Every good photo has a colour of its own with two black leashes across it, and the mask covers them: the right result
has the photo's colour everywhere. Another session's colour shows whose canvas or photo was mixed in, inside the mask or
outside, and a black pixel that nobody painted.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np

from serve_app.models import Pixels

USER = "chaos"
#: At this size telea paints for some 250 ms.
WIDTH, HEIGHT = 1024, 768
#: As many colours as three digits make.
MOST_SESSIONS = 1000
#: Levels between two digits' colours. JPEG and telea change a flat colour by up to 8.
_STEP = 24
_TOLERANCE = 10
_LEASHES = [np.array(ends, np.int32) for ends in ([(128, 96), (896, 672)], [(896, 96), (128, 672)])]


def message(**fields: Any) -> bytes:
    return json.dumps({"userId": USER, **fields}).encode()


def photo(color: tuple[int, int, int]) -> Pixels:
    """uint8 RGB, `[HEIGHT, WIDTH, 3]`: one colour, and two black leashes."""
    return _lines(np.full((HEIGHT, WIDTH, 3), color, np.uint8), 0, thickness=20)


def _lines(pixels: Pixels, level: int, *, thickness: int) -> Pixels:
    return np.asarray(cv2.polylines(pixels, _LEASHES, False, (level,) * 3, thickness), np.uint8)


def jpeg(pixels: Pixels) -> bytes:
    return cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


@cache
def mask(width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A PNG, white over the leashes and a little more, so that nothing of their rims is left."""
    return cv2.imencode(".png", _lines(np.zeros((height, width), np.uint8), 255, thickness=36))[1].tobytes()


@cache
def grey_photo() -> bytes:
    return jpeg(photo((128, 128, 128)))


def _gif() -> bytes:
    return cv2.imencode(".gif", np.zeros((HEIGHT, WIDTH, 3), np.uint8))[1].tobytes()


def _too_wide() -> bytes:
    return cv2.imencode(".png", np.zeros((1, 10_001, 3), np.uint8))[1].tobytes()


@dataclass(frozen=True, kw_only=True)
class Poison:
    """One way for a session to be wrong; what is not given would be right."""

    name: str
    #: Code of the error it must end with.
    reason: str
    #: The message's data, of a session id.
    data: Callable[[str], bytes] = lambda session: message(sessionId=session)
    #: Contents of `original.jpg` and `mask_auto.png`; None where there is none.
    original: Callable[[], bytes | None] = grey_photo
    mask: Callable[[], bytes | None] = mask


POISONS = (
    Poison(name="the message is no JSON", reason="malformed_message", data=lambda session: f"{{{session}".encode()),
    Poison(name="`..` in an id", reason="malformed_message", data=lambda session: message(sessionId=f"../{session}")),
    Poison(name="no session id", reason="malformed_message", data=lambda session: message(prompt=session)),
    Poison(name="no photo", reason="missing_input", original=lambda: None),
    Poison(name="no mask", reason="missing_input", mask=lambda: None),
    Poison(name="the photo is cut off", reason="invalid_image", original=lambda: grey_photo()[:2000]),
    Poison(name="the photo is a GIF", reason="invalid_image", original=_gif),
    Poison(name="the photo is too wide", reason="image_too_large", original=_too_wide),
    Poison(name="the mask has another shape", reason="mask_mismatch", mask=lambda: mask(HEIGHT, HEIGHT)),
    Poison(
        name="a variant nobody serves",
        reason="unknown_variant",
        data=lambda session: message(sessionId=session, variant="nobody"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Session:
    id: str
    #: Of its message.
    data: bytes
    #: As in Poison.
    original: Callable[[], bytes | None]
    mask: Callable[[], bytes | None]
    #: Colour of a good session's right result.
    color: tuple[int, int, int] | None = None
    #: What is wrong with it; None for a good one.
    poison: Poison | None = None


def plan(count: int, poisoned: int) -> list[Session]:
    """`count` sessions in the order they are published, `poisoned` of them, in turn by each of POISONS."""
    sessions = [_good(number) for number in range(count - poisoned)] + [_bad(number) for number in range(poisoned)]
    random.shuffle(sessions)
    return sessions


def _good(number: int) -> Session:
    id, color = f"good-{number}", color_of(number)
    return Session(id=id, data=message(sessionId=id), original=lambda: jpeg(photo(color)), mask=mask, color=color)


def _bad(number: int) -> Session:
    id, poison = f"bad-{number}", POISONS[number % len(POISONS)]
    return Session(id=id, data=poison.data(id), original=poison.original, mask=poison.mask, poison=poison)


def color_of(number: int) -> tuple[int, int, int]:
    """The decimal digits of `number`, 0..999, as levels of red, green and blue."""
    return 20 + _STEP * (number // 100), 20 + _STEP * (number // 10 % 10), 20 + _STEP * (number % 10)


def has_color(jpeg_bytes: bytes, color: tuple[int, int, int]) -> bool:
    """Whether the picture has `color` everywhere, and the photo's size."""
    pixels = cv2.imdecode(np.frombuffer(jpeg_bytes, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None or pixels.shape != (HEIGHT, WIDTH, 3):
        return False
    return bool((np.abs(pixels[..., ::-1].astype(int) - color) <= _TOLERANCE).all())
