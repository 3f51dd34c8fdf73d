"""What must hold inside the running image, after scripts/image_test.sh has had its photo edited there."""

import os
import shutil
import struct
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from importlib.util import MAGIC_NUMBER, cache_from_source
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

#: Round the mask an edit may change so much: `windows.mask_grow`, a share of the longest side, and then
#: `windows.feather_px` pixels.
MASK_GROW, FEATHER_PX = 0.01, 8


def problems() -> Iterator[str]:
    if (os.getuid(), os.getgid()) != (10001, 10001):
        yield f"runs as {os.getuid()}:{os.getgid()}"
    first = dict(line.split(":", 1) for line in Path("/proc/1/status").read_text().splitlines())
    for field, wanted in (("CapEff", "0000000000000000"), ("NoNewPrivs", "1")):
        if first[field].strip() != wanted:
            yield f"{field} is {first[field].strip()}"
    if os.access("/opt/app", os.W_OK):
        yield "/opt/app can be written to"
    yield from (f"{name} is missing" for name in ("bash", "wget") if not shutil.which(name))
    yield from (f"{name} is there" for name in ("sudo", "gcc", "c++", "uv", "git") if shutil.which(name))
    installed = {distribution.name.lower() for distribution in distributions()}
    yield from (f"{name} is installed" for name in ("pytest", "mypy", "moto", "pip") if name in installed)
    if list(Path("/weights").rglob("*.safetensors")) + list(Path("/weights").rglob("*.gguf")):
        yield "weights are baked in"
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        missing = [str(source) for source in Path(folder).rglob("*.py") if not is_compiled(source)]
        if missing:
            yield f"{len(missing)} modules in {folder} have no bytecode: {', '.join(missing[:5])}"
    for variant in ("telea", "tiny-Q4_0"):
        yield from edit_problems(Path("/tmp/cat"), Path("/tmp") / variant / "edited.jpg")


def is_compiled(source: Path) -> bool:
    """Whether Python takes the bytecode as it is: by unchecked hash (PEP 552), or by time. Templates are none of it."""
    code = Path(cache_from_source(str(source)))
    if code.exists():
        by_hash = struct.pack("<4sL", MAGIC_NUMBER, 1)
        by_time = struct.pack("<4sLL", MAGIC_NUMBER, 0, int(source.stat().st_mtime))
        return code.read_bytes().startswith((by_hash, by_time))
    try:
        compile(source.read_bytes(), source, "exec")
    except (SyntaxError, ValueError):
        return True
    return False


def edit_problems(cat: Path, edited: Path) -> Iterator[str]:
    before, after = (np.asarray(Image.open(path).convert("RGB"), np.int16) for path in (cat / "original.jpg", edited))
    mask = Image.open(cat / "mask.png").convert("L")
    reach_px = round(MASK_GROW * max(mask.size)) + FEATHER_PX
    wide = np.asarray(mask.filter(ImageFilter.MaxFilter(2 * reach_px + 1))) > 0
    change = np.abs(after - before).max(axis=2)
    inside, outside = change[np.asarray(mask) > 0].mean(), np.percentile(change[~wide], 99)
    print(f"{edited}: changed by {inside:.1f} levels inside the mask, by at most {outside:.0f} in 99% outside")
    if inside < 15:
        yield f"{edited} is hardly changed inside the mask"
    # What JPEG does.
    if outside > 6:
        yield f"{edited} is changed further than {reach_px} px from the mask"


found = list(problems())
print("\n".join(found) or "inside: as it should be")
sys.exit(bool(found))
