"""Pictures that are damaged, or made to harm: drawn from one seed, so that each run meets the same ones.

    python -m tests.hostile_pictures write|decode FOLDER

`write` prints how many it made. `decode` holds nothing else in memory; its last line is a JSON object.
"""

import io
import json
import random
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from serve_app.edit.images import decode_photo, unchanged
from serve_app.edit.masks import decode_mask
from serve_app.errors import InputError
from serve_app.settings import Limits

from .pictures import noise

pillow_heif.register_heif_opener()
LIMITS = Limits()
WIDTH, HEIGHT = 96, 64
#: The largest square within the limit on pixels.
LARGEST = (7071, 7071)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
#: What stands where a length, a count or a size is expected.
NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)

Mutation = Callable[[random.Random, bytes, list[bytes]], bytes]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif() -> Image.Exif:
    block = Image.Exif()
    block[ExifTags.Base.Orientation], block[ExifTags.Base.Make] = 6, "Lumen"
    block[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: "2026:05:04 03:02:00"}
    return block


def good() -> dict[str, bytes]:
    """One of each kind, most of them readable."""
    rgb = Image.fromarray(noise(WIDTH, HEIGHT))
    next_frame = [Image.new("RGB", rgb.size, "blue")]
    told = {"exif": exif(), "icc_profile": SRGB}
    grey16 = Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH))
    animated = {"save_all": True, "append_images": next_frame}
    return {
        "jpeg": encoded(rgb, "JPEG", **told),
        "jpeg-progressive": encoded(rgb, "JPEG", progressive=True, **told),
        "jpeg-grey": encoded(rgb.convert("L"), "JPEG", **told),
        "jpeg-cmyk": encoded(rgb.convert("CMYK"), "JPEG", icc_profile=b"junk" * 100),
        "jpeg-pair": encoded(rgb, "MPO", **animated),
        "png": encoded(rgb, "PNG", **told),
        "png-alpha": encoded(rgb.convert("RGBA"), "PNG", **told),
        "png-grey-alpha": encoded(rgb.convert("LA"), "PNG"),
        "png-palette": encoded(rgb.quantize(16), "PNG", transparency=b"\x00\x80"),
        "png-16-bit": encoded(grey16, "PNG"),
        "png-1-bit": encoded(rgb.convert("1"), "PNG"),
        "png-animated": encoded(rgb, "PNG", **animated),
        "webp": encoded(rgb, "WEBP", **told),
        "webp-alpha": encoded(rgb.convert("RGBA"), "WEBP", lossless=True, **told),
        "webp-animated": encoded(rgb, "WEBP", **animated),
        "heic": encoded(rgb, "HEIF", **told),
        "heic-alpha": encoded(rgb.convert("RGBA"), "HEIF"),
        "heic-grid": encoded(rgb.resize((192, 128)), "HEIF", tile_size=64),
        "gif": encoded(rgb, "GIF", **animated),
        "bmp": encoded(rgb, "BMP"),
        "tiff": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "ico": encoded(rgb, "ICO"),
        "ppm": encoded(rgb, "PPM"),
        "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    }


# Damage


def truncated(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20, 100))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flipped_early(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Where the headers are."""
    return flipped(rng, data[:400], others) + data[400:]


def spliced(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    start, end = sorted(rng.choices(range(len(other)), k=2))
    at = rng.randrange(len(data))
    return data[:at] + other[start:end] + data[at + rng.choice((0, end - start)) :]


def repeated(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    start, end = sorted(rng.choices(range(len(data)), k=2))
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def blanked(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    start, end = sorted(rng.choices(range(len(data)), k=2))
    return data[:start] + rng.choice((b"\0", b"\xff")) * (end - start) + data[end:]


def misnumbered(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    """A length, a count or an offset that is wrong, where there is one."""
    at, size = rng.randrange(min(len(data), rng.choice((64, 400, len(data))))), rng.choice((2, 4))
    number = (rng.choice(NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("big", "little")))
    return data[:at] + number + data[at + size :]


#: By how often each is done to each good picture.
DAMAGE: dict[Mutation, int] = {
    truncated: 12, flipped: 16, flipped_early: 16, spliced: 14, repeated: 8, blanked: 8, misnumbered: 18,
}  # fmt: skip


def damaged(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    pictures = good()
    others = list(pictures.values())
    for name, data in pictures.items():
        yield name, data
        for damage, times in DAMAGE.items():
            for i in range(times):
                yield f"{name}-{damage.__name__}-{i}", damage(rng, data, others)


# Lies and bombs


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *, colour: int = 2, depth: int = 8, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG whose checksums are right, whatever it announces (PNG 3rd edition, 11.2)."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deflated(size: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(1_000_000)) for _ in range(size // 1_000_000)), packer.flush()])


def lies(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Headers that announce what does not follow."""
    one = zlib.compress(bytes(4))
    for width in NUMBERS:
        for height in (0, 1, 10_000, 10_001, 0x7FFFFFFF):
            yield f"png-says-{width}x{height}", png(width, height, data=one)
    for colour, depth in ((0, 3), (1, 8), (2, 4), (3, 8), (5, 8), (7, 16), (255, 255)):
        yield f"png-of-colour-{colour}-{depth}", png(4, 4, colour=colour, depth=depth, data=one)
    pictures = good()
    sizes = {
        "jpeg": (struct.pack(">HH", HEIGHT, WIDTH), ">HH"),
        "webp-alpha": (struct.pack("<I", WIDTH - 1 | HEIGHT - 1 << 14), "<HH"),
        "heic": (struct.pack(">II", WIDTH, HEIGHT), ">II"),
        "heic-grid": (struct.pack(">II", 64, 64), ">II"),
    }
    for name, (announced, form) in sizes.items():
        for i in range(30):
            top = 0xFFFF if form.endswith("HH") else 0xFFFFFFFF
            other = struct.pack(form, *(min(rng.choice((*NUMBERS, 9_999, 5_000)), top) for _ in range(2)))
            yield f"{name}-says-other-{i}", pictures[name].replace(announced, other)


def junk(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Metadata of nonsense in pictures that are right, and bytes that are nothing."""
    picture = Image.fromarray(noise(16, 16))
    for i in range(60):
        noise_bytes = rng.randbytes(rng.choice((0, 1, 7, 130, 5_000)))
        yield f"exif-{i}", encoded(picture, rng.choice(("JPEG", "PNG", "WEBP")), exif=b"Exif\0\0II*\0" + noise_bytes)
        profile = flipped(rng, SRGB, []) if i % 2 else SRGB[:36] + b"acsp" + noise_bytes
        yield f"icc-{i}", encoded(picture, rng.choice(("JPEG", "PNG", "WEBP")), icc_profile=profile)
    loop = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x8769, 4, 1, 8, 8)
    yield "exif-that-names-itself", encoded(picture, "JPEG", exif=loop)
    for size in (0, 1, 2, 11, 12, 13, 100, 100_000):
        for filler in (b"\0", b"\xff", b"\xff\xd8", b"RIFF"):
            yield f"{size}-of-{filler.hex()}", (filler * size)[:size]
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\xffWEBPVP8X", b"\0\0\0\x18ftypheic", b"GIF89a")
    for start in starts:
        for i in range(12):
            yield f"{start[:4].hex()}-and-noise-{i}", start + rng.randbytes(rng.choice((3, 50, 3_000)))


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files within every limit, or just over one, that cost as much memory as a file can."""
    clear = (1, 2, 3, 4)
    yield "webp-largest-alpha", encoded(Image.new("RGBA", LARGEST, clear), "WEBP", lossless=True, method=0)
    yield "webp-largest", encoded(Image.new("RGB", LARGEST), "WEBP", method=0, exif=exif())
    yield "png-largest-alpha", encoded(Image.new("RGBA", LARGEST, clear), "PNG", exif=exif())
    yield "png-largest-16-bit", encoded(Image.new("I;16", LARGEST), "PNG", exif=exif())
    cmyk = Image.new("CMYK", LARGEST)
    yield "jpeg-largest-cmyk", encoded(cmyk, "JPEG", progressive=True, subsampling=0, exif=exif())
    yield "png-over", encoded(Image.new("1", (7_072, 7_072)), "PNG")
    yield "png-long", encoded(Image.new("L", (10_000, 1)), "PNG")
    yield "png-too-long", encoded(Image.new("L", (10_001, 1)), "PNG")
    yield "png-more-data-than-pixels", png(8, 8, data=deflated(1_000_000_000))
    yield (
        "png-profile-bomb",
        png(8, 8, data=zlib.compress(bytes(200)), extra=chunk(b"iCCP", b"x\0\0" + deflated(10**9))),
    )
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 50_000_000, zip=True)
    yield "png-text-bomb", encoded(Image.new("L", (8, 8)), "PNG", pnginfo=text)
    scans = encoded(Image.new("RGB", (2_000, 2_000)), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    yield "jpeg-scans", scans[:last] + scans[last:-2] * 5_000 + scans[-2:]
    yield "too-many-bytes", scans + bytes(LIMITS.image_bytes)


def write(folder: Path) -> int:
    """All of them as files; how many."""
    rng, count = random.Random(20260101), 0
    for source in (damaged(rng), lies(rng), junk(rng), bombs()):
        for name, data in source:
            (folder / f"{count:05}-{name}").write_bytes(data)
            count += 1
    return count


# In a process of its own


def peak_bytes() -> int:
    """The most memory this process has had. Linux's `ru_maxrss` would begin with that of whoever started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def outcome(decode: Callable[[], object]) -> str:
    try:
        decode()
    except InputError as e:
        return e.code
    except BaseException as e:  # What else there is, is what the test looks for.
        return f"untyped: {e!r}"
    return "decoded"


def edit_nothing(data: bytes) -> None:
    """What decodes can be written again, and then decodes to the same."""
    photo = decode_photo(data, LIMITS)
    file, kind = unchanged(photo, data)
    if photo.pixels.size < 1_000_000 and kind == photo.content_type:
        assert np.array_equal(decode_photo(file, LIMITS).pixels, photo.pixels)


def decode_all(folder: Path) -> None:
    """Each as photo and as mask. Its name is printed before, for whoever looks into a crash."""
    Image.init()
    before, outcomes = peak_bytes(), Counter[str]()
    untyped: list[str] = []
    largest = ("", before)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        print(path.name, flush=True)
        for decode in (partial(edit_nothing, data), partial(decode_mask, data, LIMITS, (WIDTH, HEIGHT))):
            ended = outcome(decode)
            outcomes[ended] += 1
            if ended.startswith("untyped"):
                untyped.append(f"{path.name}: {ended}")
        largest = max(largest, (path.name, peak_bytes()), key=lambda pair: pair[1])
    report = {"outcomes": outcomes, "untyped": untyped, "grown_bytes": largest[1] - before, "largest": largest[0]}
    print(json.dumps(report))


if __name__ == "__main__":
    _, what, folder = sys.argv
    if what == "write":
        print(write(Path(folder)))
    else:
        decode_all(Path(folder))
