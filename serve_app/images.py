"""Bytes to pixels and back.

Decoding gives what a person would see: turned as EXIF says, on white where it was transparent, 8-bit RGB. Whatever
the bytes are, they end as a picture within the limits or as an InputError. Encoding writes JPEG; of the photo's
metadata the ICC profile and the harmless part of the EXIF go with it, and nothing that says where it was taken.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from . import containers
from .containers import exif
from .containers.source import MAX_ICC_BYTES, Source
from .errors import ImageTooLarge, InvalidImage, MaskMismatch, OutOfMemory
from .settings import Limits

#: uint8; `[height, width, 3]` RGB for photos, `[height, width]` for masks.
Pixels = npt.NDArray[np.uint8]

#: A mask's pixel of this value or more is edited.
MASK_THRESHOLD = 128
EDITED_QUALITY = 95
PREVIEW_QUALITY = 85
PREVIEW_SIDE_PX = 512

# Sizes are checked here, and damaged metadata is dropped: Pillow's warnings of either would be noise on stderr.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Photo:
    """A decoded photo, and what is to be written back with it."""

    #: Turned as EXIF says. Read-only.
    pixels: Pixels
    #: The profile that the pixels are in; None: sRGB, or unknown.
    icc: bytes | None
    #: Without place, thumbnail and orientation, as `encode_jpeg` takes it.
    exif: bytes | None
    #: Of the bytes it was decoded from.
    content_type: str
    #: Dots per inch, across and down; of a file that says so outside EXIF.
    dpi: tuple[float, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


def decode_photo(data: bytes, limits: Limits) -> Photo:
    """The photo in JPEG, PNG, WebP or HEIC bytes; of an animation the first frame.

    Transparency is laid on white, the paper that JPEG viewers and printers would show. Grey and CMYK pixels are taken
    to sRGB through their profile where there is a usable one. Raises InvalidImage, ImageTooLarge; OutOfMemory where
    this process has no memory left for it.
    """
    flat, file = _load(data, "photo", limits, background="white")
    rgb, icc = _to_rgb(flat, file.icc)
    del flat
    pixels = _turn(np.asarray(rgb), file.orientation)
    dpi = file.dpi[::-1] if file.dpi and file.orientation > 4 else file.dpi
    return Photo(pixels=pixels, icc=icc, exif=file.exif, content_type=file.content_type, dpi=dpi)


def decode_mask(data: bytes, limits: Limits, photo_size: tuple[int, int]) -> Pixels:
    """The mask in the same kinds of bytes, as 0 (kept) and 255 (edited), `[height, width]` of `photo_size`.

    Edited is what has a luminance (ITU-R BT.601) of MASK_THRESHOLD or more; what is transparent shows black, and is
    kept. A mask of another size whose aspect ratio agrees within 1% is scaled with nearest neighbour. `photo_size` is
    (width, height) after turning. Raises MaskMismatch, and what `decode_photo` raises.
    """
    flat, file = _load(data, "mask", limits, background="black")
    grey = _turn(np.asarray(_in_mode(flat, "L")), file.orientation)
    _check_aspect((grey.shape[1], grey.shape[0]), photo_size)
    if (grey.shape[1], grey.shape[0]) != photo_size:
        grey = cv2.resize(grey, photo_size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(cv2.threshold(grey, MASK_THRESHOLD - 1, 255, cv2.THRESH_BINARY)[1], np.uint8)


def encode_edited(photo: Photo, pixels: Pixels) -> bytes:
    """The edited photo, of any size up to JPEG's 65,535 px a side.

    With full colour resolution: halving it once more would visibly move the colours that the edit leaves alone.
    """
    return encode_jpeg(
        pixels, quality=EDITED_QUALITY, icc=photo.icc, exif=photo.exif, dpi=photo.dpi, subsampling="4:4:4"
    )


def encode_preview(photo: Photo, pixels: Pixels) -> bytes:
    """`pixels` with a longest side of at most PREVIEW_SIDE_PX, never enlarged, without EXIF."""
    height, width = pixels.shape[:2]
    scale = min(1.0, PREVIEW_SIDE_PX / max(width, height))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return encode_jpeg(pixels, quality=PREVIEW_QUALITY, icc=photo.icc, exif=None)


def encode_jpeg(
    pixels: Pixels,
    *,
    quality: int,
    icc: bytes | None,
    exif: bytes | None,
    dpi: tuple[float, float] | None = None,
    subsampling: Literal["4:4:4", "4:2:0"] = "4:2:0",
) -> bytes:
    """A JPEG of `pixels`, `[height, width, 3]`; quality 1..95 as libjpeg counts it."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(
        out, "JPEG", quality=quality, subsampling=subsampling, icc_profile=icc, exif=exif or b"", dpi=dpi or (0, 0)
    )
    return out.getvalue()


_CONTENT_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "HEIF": "image/heic",
}

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

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

#: What Pillow, its codecs and plugins raise on damaged bytes; warnings, where they are made errors.
_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, Warning, struct.error, zlib.error),
)

#: What a JPEG can say (JFIF 1.02).
_MAX_DPI = 65_535

#: Rows of a transparent picture that are flattened at a time.
_STRIP_PX = 256

_What = Literal["photo", "mask"]


class _File(NamedTuple):
    """What a file says beside its pixels. The opened file itself is not kept: a WebP decoder alone holds 8 bytes a
    pixel until it goes."""

    icc: bytes | None
    orientation: int
    exif: bytes | None
    content_type: str
    dpi: tuple[float, float] | None


def _load(data: bytes, what: _What, limits: Limits, *, background: str) -> tuple[Image.Image, _File]:
    """The picture flattened, see `_flatten`, and what its file says."""
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
        # Pillow reads what containers does not.
        said = exif.parse(source.exif or image.info.get("exif"))
        file = _File(
            source.icc or image.info.get("icc_profile"),
            said.orientation,
            said.kept(),
            _CONTENT_TYPES[str(image.format)],
            _dpi(image),
        )
        return _flatten(image, background), file


def _decoded(stream: bytes, what: _What, limits: Limits) -> Image.Image:
    image = Image.open(io.BytesIO(stream), formats=_formats(stream, what))
    _check_size(image, what, limits)
    image.load()
    # HEIC: what was decoded may differ from what the header announced.
    _check_size(image, what, limits)
    return image


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    across, down = image.info.get("dpi", (0, 0))
    return (across, down) if 1 <= across <= _MAX_DPI and 1 <= down <= _MAX_DPI else None


@contextmanager
def _reading(what: _What) -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"the {what} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"the {what} is not a JPEG, PNG, WebP or HEIC picture, or its header is damaged") from error
    except MemoryError as error:
        raise OutOfMemory(f"no memory left to decode the {what}") from error
    except _DAMAGE as error:
        raise InvalidImage(f"the {what} is damaged: {error}") from error


def _formats(data: bytes, what: _What) -> tuple[str, ...]:
    """The formats Pillow may try. HEIC is an extra: `pip install flux-fill-serve[heif]`."""
    try:
        import pillow_heif
    except ImportError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
            raise InvalidImage(f"the {what} is HEIC, which needs the extra `heif`: flux-fill-serve[heif]") from None
        return "JPEG", "PNG", "WEBP"
    pillow_heif.register_heif_opener()
    return "JPEG", "PNG", "WEBP", "HEIF"


def _check_size(image: Image.Image, what: _What, limits: Limits) -> None:
    width, height = image.size
    if max(width, height) > limits.image_side_px:
        limit = f"{limits.image_side_px:,} px a side (limits.image_side_px)"
    elif width * height > limits.image_pixels:
        limit = f"{limits.image_pixels:,} pixels (limits.image_pixels)"
    else:
        return
    raise ImageTooLarge(f"the {what} is {width} x {height}; the limit is {limit}")


def _check_aspect(mask_size: tuple[int, int], photo_size: tuple[int, int]) -> None:
    across, along = mask_size[0] * photo_size[1], mask_size[1] * photo_size[0]
    if abs(across - along) * 100 > along:
        mask, photo = (f"{width} x {height}" for width, height in (mask_size, photo_size))
        raise MaskMismatch(f"the mask is {mask} and the photo {photo}: their aspect ratios differ by more than 1%")


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """In mode L, RGB or CMYK: 16-bit grey scaled to 8 bits, palettes looked up, transparency laid on `background`."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    mode = "L" if image.mode in ("1", "L", "LA") else "CMYK" if image.mode == "CMYK" else "RGB"
    if not image.has_transparency_data:
        return _in_mode(image, mode)
    flat = Image.new(mode, image.size, background)
    # In strips: each step of the whole picture would take 4 bytes a pixel more.
    for top in range(0, image.height, _STRIP_PX):
        box = (0, top, image.width, min(top + _STRIP_PX, image.height))
        layer = image.crop(box).convert("LA" if mode == "L" else "RGBA")
        flat.paste(layer.convert(mode), box, mask=layer.getchannel("A"))
    return flat


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    # `convert` copies even where there is nothing to convert.
    return image if image.mode == mode else image.convert(mode)


def _to_rgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None]:
    """RGB pixels, and the profile that describes them; a profile that is damaged or of other pixels is left out."""
    transform = _to_srgb(icc) if icc else None
    if transform is None:
        return _in_mode(image, "RGB"), None
    if transform.input_mode == "RGB" and image.mode != "CMYK":
        return _in_mode(image, "RGB"), icc
    if transform.input_mode == image.mode:
        return transform.apply(image), None
    return _in_mode(image, "RGB"), None


def _to_srgb(icc: bytes) -> ImageCms.ImageCmsTransform | None:
    """From the profile's pixels to sRGB; None where the profile is unusable or of a colour space no file here has.

    Relative colorimetric with black point compensation, as browsers do.
    """
    if len(icc) > MAX_ICC_BYTES:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        return ImageCms.ImageCmsTransform(
            profile,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except _DAMAGE:
        return None


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    turned = _UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels
    turned.flags.writeable = False
    return turned
