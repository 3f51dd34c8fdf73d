"""What an edit would paint, and what that takes, before it is asked for: nothing is painted and nothing is stored."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, model_validator

from ..models import TINY, Box, Pixels, Variant, steps_run
from ..parameters import EditParameters
from ..settings import Inference, Settings, WindowSettings
from . import estimate, windows
from .cost import SHAPES, forward_flops
from .masks import decode_mask
from .paste import grow, growth_px
from .pictures import load
from .posted import InpaintBody, served_variant


class PlanBody(InpaintBody):
    """An edit, as it would be posted, with its mask and without its photo."""

    @model_validator(mode="after")
    def _one_source(self) -> "PlanBody":
        if not isinstance(self.mask, bytes) or self.image is not None or self.session is not None:
            raise ValueError("give mask, a file, and no photo")
        return self


class WindowView(BaseModel):
    """A part of the photo, in its pixels, and the size in pixels at which the model sees it."""

    x: float
    y: float
    width: float
    height: float
    model_width: int
    model_height: int


class PlanView(BaseModel):
    variant: str
    #: In painting order; none for an empty mask.
    windows: Sequence[WindowView]
    #: Of each window, by steps and strength.
    steps_run: int
    #: Of all steps of all windows, in 10**12 floating point operations; null for a variant that has no such count.
    tflop: float | None
    #: Painting alone, on `card`, which the variant's replica has; null where it is not known.
    seconds: float | None
    card: str | None
    #: Of those seconds, in the currency of the configured price; null where either is not known.
    cost: float | None


def lay_out(
    drawn: Pixels, asked: EditParameters, variant: Variant, settings: WindowSettings
) -> tuple[Pixels, int, windows.Plan | None]:
    """The mask that is painted, by how many pixels it has grown, and its windows: None for an empty one."""
    grown_px = growth_px(drawn, settings.mask_grow if asked.mask_grow is None else asked.mask_grow)
    mask = grow(drawn, grown_px)
    plan = windows.plan(
        mask,
        asked.crop_strategy,
        settings,
        grown_px=grown_px,
        text_tokens=variant.max_prompt_tokens,
        family=variant.family,
    )
    return mask, grown_px, plan


def planned(body: PlanBody, settings: Settings, defaults: Inference, device: str) -> PlanView:
    """`device` is the name of what the variant's replica paints on, or empty.

    Raises UnknownVariant, and what `decode_mask` raises.
    """
    name = served_variant(body, settings, defaults)
    row, asked = settings.variant(name), EditParameters(**(settings.unsaid(defaults, name) | body.explicit()))
    assert isinstance(body.mask, bytes), "the body's own rule"
    size, _ = load(body.mask, "mask", settings.limits, lambda image: image.size)
    mask = decode_mask(body.mask, settings.limits, size, body.mask_polarity)
    _, _, plan = lay_out(mask, asked, row, settings.windows)
    boxes = plan.windows if plan else ()
    runs = steps_run(asked.steps, asked.strength if row.takes_strength else 1.0) if row.counts_steps else 1
    card = next((card for card in estimate.CARDS if card in device.split()), None)
    tflop = seconds = None
    if row.edits_by_transformer and not str(row.file).startswith(TINY):
        shape: dict[str, Any] = {**SHAPES.get(row.family, {}), "text_tokens": row.max_prompt_tokens}
        tflop = runs * sum(forward_flops(box.width, box.height, **shape) for box in boxes) / 1e12
    if card:
        levers = settings.variants[name].optimizations
        each = [
            estimate.seconds(row, estimate.CARDS[card], box.width, box.height, steps=runs, levers=levers)
            for box in boxes
        ]
        seconds = None if None in each else sum(filter(None, each))
    return PlanView(
        variant=name,
        windows=[_shown(box, plan) for box in boxes] if plan else [],
        steps_run=runs,
        tflop=tflop,
        seconds=seconds,
        card=card if seconds is not None else None,
        cost=None if seconds is None else settings.cost(name, seconds),
    )


def _shown(box: Box, plan: windows.Plan) -> WindowView:
    region, content = plan.region, plan.content_size
    across, along = region.width / content[0], region.height / content[1]
    x0, y0 = region.x0 + box.x0 * across, region.y0 + box.y0 * along
    # What lies beyond the photo is padding.
    x1, y1 = min(region.x0 + box.x1 * across, region.x1), min(region.y0 + box.y1 * along, region.y1)
    return WindowView(x=x0, y=y0, width=x1 - x0, height=y1 - y0, model_width=box.width, model_height=box.height)
