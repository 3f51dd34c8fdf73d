"""Files as pictures: what a decoder makes of them, within the limits, and what they say beside their pixels.

Whatever the bytes are, they end as a picture or as an InputError.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import ImageTooLarge, InvalidImage, OutOfMemory
from ..models import Pixels
from ..settings import Limits
from . import containers
from .containers import exif
from .containers.exif import Exif
from .containers.source import CodePoints, Source

T = TypeVar("T")

What = Literal["photo", "mask"]


# Sizes are checked here, and damaged metadata is dropped: Pillow's warnings of either would be noise on stderr.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


#: What Pillow, its codecs and plugins raise on damaged bytes; warnings, where they are made errors.
DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, Warning, struct.error, zlib.error),
)

_CONTENT_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "HEIF": "image/heic"}

#: By EXIF orientation, how the stored pixels become upright (EXIF 2.32, 4.6.4 A, tag 0x0112).
_UPRIGHT: Mapping[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: lambda pixels: cv2.transpose(pixels),
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}

#: What a JPEG can say (JFIF 1.02).
_MAX_DPI = 65_535

#: Rows of a transparent picture that are flattened at a time.
_STRIP_PX = 256


class Said(NamedTuple):
    """What a file says beside its pixels."""

    icc: bytes | None
    code_points: CodePoints | None
    exif: Exif
    #: Dots per inch, across and down, of the stored pixels; outside EXIF.
    dpi: tuple[float, float] | None
    content_type: str


def load(data: bytes, what: What, limits: Limits, take: Callable[[Image.Image], T]) -> tuple[T, Said]:
    """What `take` makes of the decoded picture, as it is stored, and what the file says.

    The picture goes with it: a WebP decoder alone holds 8 bytes a pixel. Raises InvalidImage, ImageTooLarge;
    OutOfMemory where this process has no memory left for it.
    """
    if not data:
        raise InvalidImage(f"the {what} is empty")
    if len(data) > limits.image_bytes:
        limit = f"{limits.image_bytes:,} (limits.image_bytes)"
        raise ImageTooLarge(f"the {what} has {len(data):,} bytes; the limit is {limit}")
    with _reading(what):
        source = containers.read(data, what) or Source(streams=(data,))
        image, *copies = (_decoded(stream, what, limits) for stream in source.streams)
        if not all(np.array_equal(np.asarray(image), np.asarray(copy)) for copy in copies):
            raise InvalidImage(f"the {what} is damaged: the file ends before its pixels do")
        return take(image), _said(source, image)


def _said(source: Source, image: Image.Image) -> Said:
    # Pillow and its plugins read what `containers` does not.
    icc, nclx = source.icc or image.info.get("icc_profile"), image.info.get("nclx_profile")
    return Said(
        icc=icc,
        code_points=CodePoints(nclx["color_primaries"], nclx["transfer_characteristics"])
        if nclx
        else source.code_points,
        # HEIC: its container says how to turn, the decoder has done it and reset EXIF's tag, which is for information
        # only (ISO/IEC 23008-12).
        exif=exif.parse(source.exif or image.info.get("exif")),
        dpi=_dpi(image),
        content_type=_CONTENT_TYPES[str(image.format)],
    )


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    across, down = image.info.get("dpi", (0, 0))
    return (across, down) if 1 <= across <= _MAX_DPI and 1 <= down <= _MAX_DPI else None


def _decoded(stream: bytes, what: What, limits: Limits) -> Image.Image:
    image = Image.open(io.BytesIO(stream), formats=_formats(stream, what))
    _check_size(image, what, limits)
    image.load()
    # HEIC: what was decoded may differ from what the header announced.
    _check_size(image, what, limits)
    return image


@contextmanager
def _reading(what: What) -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"the {what} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"the {what} is not a JPEG, PNG, WebP or HEIC picture, or its header is damaged") from error
    except MemoryError as error:
        raise OutOfMemory(f"no memory left to decode the {what}") from error
    except DAMAGE as error:
        raise InvalidImage(f"the {what} is damaged: {error}") from error


def _formats(data: bytes, what: What) -> tuple[str, ...]:
    """The formats Pillow may try. HEIC is an extra: `pip install flux-fill-serve[heif]`."""
    try:
        import pillow_heif
    except ImportError:
        if containers.content_type(data) == "image/heic":
            raise InvalidImage(f"the {what} is HEIC, which needs the extra `heif`: flux-fill-serve[heif]") from None
        return "JPEG", "PNG", "WEBP"
    pillow_heif.register_heif_opener()
    return "JPEG", "PNG", "WEBP", "HEIF"


def _check_size(image: Image.Image, what: What, limits: Limits) -> None:
    width, height = image.size
    if max(width, height) > limits.image_side_px:
        limit = f"{limits.image_side_px:,} px a side (limits.image_side_px)"
    elif width * height > limits.image_pixels:
        limit = f"{limits.image_pixels:,} pixels (limits.image_pixels)"
    else:
        return
    raise ImageTooLarge(f"the {what} is {width} x {height}; the limit is {limit}")


class Flat(NamedTuple):
    #: In mode L, RGB or CMYK.
    image: Image.Image
    #: The least and the most opaque that a pixel was, 0..255.
    opacity: tuple[int, int]


def flatten(image: Image.Image, background: str) -> Flat:
    """16-bit grey scaled to 8 bits, palettes looked up, transparency laid on `background`."""
    if image.mode.startswith("I"):
        return Flat(Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)), (255, 255))
    mode = "L" if image.mode in ("1", "L", "LA") else "CMYK" if image.mode == "CMYK" else "RGB"
    if not image.has_transparency_data:
        return Flat(in_mode(image, mode), (255, 255))
    flat, least, most = Image.new(mode, image.size, background), 255, 0
    # In strips: each step of the whole picture would take 4 bytes a pixel more.
    for top in range(0, image.height, _STRIP_PX):
        box = (0, top, image.width, min(top + _STRIP_PX, image.height))
        layer = image.crop(box).convert("LA" if mode == "L" else "RGBA")
        opacity = layer.getchannel("A")
        flat.paste(layer.convert(mode), box, mask=opacity)
        values = np.asarray(opacity)
        least, most = min(least, int(values.min())), max(most, int(values.max()))
    return Flat(flat, (least, most))


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    # `convert` copies even where there is nothing to convert.
    return image if image.mode == mode else image.convert(mode)


def turn(pixels: Pixels, orientation: int) -> Pixels:
    """Upright, and read-only."""
    turned = _UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels
    turned.flags.writeable = False
    return turned
