"""A card in place of a picture, with what was asked for written on it: for tests, and for clients being developed."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont

from ..errors import NotSupported
from ..models import GenerateRequest, Pixels, Variant
from ..settings import VariantSettings
from .weightless import Weightless
from .weights.fetch import Weights

if TYPE_CHECKING:
    from .lora.adapter import Adapter

_INK = (20, 20, 20)
_MARGIN = 0.04
#: Characters that one line may have.
_MAX_LINE = 500


class Fake(Weightless):
    """Draws cards. The colour depends on the request; a small card shows only the beginning of the text."""

    versions: Mapping[str, str] = {"pillow": PIL.__version__}

    def __init__(self, _variant: Variant, _weights: Weights | None, _served: VariantSettings) -> None: ...

    def adapter(self, file: Path, *, alpha: float | None, max_rank: int) -> "Adapter":
        raise NotSupported("cards are drawn without LoRAs")

    def generate(
        self, request: GenerateRequest, on_step: Callable[[int], None], adapters: "Sequence[Adapter]" = ()
    ) -> Pixels:
        for step in range(1, request.steps + 1):
            on_step(step)
        text = _text(request)
        colour = tuple(160 + byte % 90 for byte in hashlib.sha256(text.encode()).digest()[:3])
        card = Image.new("RGB", (request.width, request.height), colour)
        size_px = max(8, min(card.size) // 20)
        font, margin_px = ImageFont.load_default(size_px), int(min(card.size) * _MARGIN)
        line_px = size_px * 1.4
        lines = _wrapped(text, font, card.width - 2 * margin_px)
        for number, line in zip(range(int((card.height - margin_px) / line_px)), lines, strict=False):
            ImageDraw.Draw(card).text((margin_px, margin_px + number * line_px), line, _INK, font)
        return np.asarray(card, np.uint8)


def _text(request: GenerateRequest) -> str:
    lines = [f"seed {request.seed}", f"{request.width} x {request.height}"]
    scheduler = f", {request.scheduler}" if request.scheduler else ""
    lines.append(f"{request.steps} steps, guidance {request.guidance_scale:g}{scheduler}")
    lines.append(request.prompt)
    if request.negative_prompt:
        lines.append(f"not: {request.negative_prompt}")
    # JSON may hold half of a surrogate pair, which no font and no encoder takes.
    return "\n".join(lines).encode(errors="replace").decode()


def _wrapped(text: str, font: Any, width_px: float) -> Iterator[str]:
    """Its lines, broken at a space where there is one: no longer than `width_px`, but at least one character each."""
    for line in text.splitlines():
        while line:
            ends_px = map(font.getlength, accumulate(line[:_MAX_LINE]))
            fits = max(1, sum(1 for _ in takewhile(lambda px: px <= width_px, ends_px)))
            if fits < len(line) and (space := line.rfind(" ", 0, fits + 1)) > 0:
                fits = space
            yield line[:fits]
            line = line[fits:].lstrip()
