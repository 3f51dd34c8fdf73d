"""`fluxfill models`: what each model costs, under which licence, and whether an audit has judged it."""

import asyncio
from collections.abc import Iterator, Mapping

from rich.table import Column, Table
from rich.text import Text

from serve_app.audit.record import AuditStatus
from serve_app.edit.estimate import CARDS, UNCERTAINTY, seconds
from serve_app.errors import FluxFillError
from serve_app.models import BUILT_IN, TINY, Variant
from serve_app.settings import Inference, Optimizations, Settings

from .audit_screen import CONFIG, PLAIN, ConfigOption
from .screen import Screen

out = Screen()
err = Screen(stderr=True)

#: Width and height in pixels: a small window, and a whole frame.
SIZES = ((512, 384), (1024, 1024))
#: The newest audits, of which it is asked what they judged.
_RUNS = 100
_COMPILED = Optimizations(compile=True)


def models(config: ConfigOption = CONFIG) -> None:
    """List the models, served and known: licence, steps, memory, computed seconds, whether an audit has judged them."""
    from ..app import absolute
    from ..config import load

    settings, inference, judged = None, Inference(), None
    if config != CONFIG or config.exists():
        loaded = load(config)
        settings, inference = absolute(loaded.settings), loaded.inference
        try:
            judged = asyncio.run(_judged(settings))
        except FluxFillError as e:
            err.print(f"what was audited is unknown: {e.code}: {e.message}", **PLAIN)
    numbers = ("steps", "GiB", *(f"{card}, s" for card in CARDS))
    columns = [Column(title, justify="right", no_wrap=True) for title in numbers]
    table = Table(Column("model", no_wrap=True), "licence", *columns, "audited", box=None, pad_edge=False)
    for name, variant in _known(settings).items():
        served = settings.served.get(name) if settings else None
        steps = _steps(variant, inference)
        costs = _costs(variant, steps or 0, served.optimizations if served else _COMPILED)
        memory = "-" if variant.memory_gib is None else f"{variant.memory_gib:.1f}"
        mark = " *" if served else ""
        cells = (name + mark, _licence(variant), str(steps or "-"), memory, *costs, _audited(variant, name, judged))
        table.add_row(*map(Text, cells))
    out.print(table)
    sizes = " | ".join(f"{width}x{height}" for width, height in SIZES)
    out.print(
        "* Served by this config.\n"
        "GiB: on the GPU between jobs; a window of 1024x1024 takes up to 2 more, loading up to 4, CUDA about 0.5.\n"
        f"s: seconds of a window, {sizes}, with every step, compiled unless served otherwise.\n"
        f"Computed, not measured: ±{UNCERTAINTY:.0%} on an L4, less sure on an H200.",
        **PLAIN,
    )


def _known(settings: Settings | None) -> Mapping[str, Variant]:
    """The served ones first."""
    served = {name: settings.variant(name) for name in settings.served} if settings else {}
    return served | {name: variant for name, variant in BUILT_IN.items() if name not in served}


def _steps(variant: Variant, inference: Inference) -> int | None:
    """By default; None where it has none."""
    if variant.generation:
        return variant.generation.defaults.steps
    return (variant.steps or inference.steps) if variant.counts_steps else None


def _costs(variant: Variant, steps: int, levers: Optimizations) -> Iterator[str]:
    """By card: seconds of each size."""
    for card in CARDS.values():
        costs = (seconds(variant, card, *size, steps=steps, levers=levers) for size in SIZES)
        yield " | ".join("   -" if s is None else f"{s:4.1f}" if s >= 1 else f"{s:.2f}" for s in costs)


def _licence(variant: Variant) -> str:
    has_weights = variant.file is not None and not variant.file.startswith(TINY)
    return variant.licence or ("unknown" if has_weights else "-")


def _audited(variant: Variant, name: str, judged: Mapping[str, str] | None) -> str:
    """Audits are of edits."""
    if variant.generation:
        return "-"
    return "unknown" if judged is None else judged.get(name, "no")


async def _judged(settings: Settings) -> Mapping[str, str]:
    """Variant -> the newest of the finished audits that painted a cell with it."""
    from .audit_client import AuditClient

    judged: dict[str, str] = {}
    for audit in await AuditClient(settings).store.list(_RUNS):
        if audit.status in (AuditStatus.SUCCEEDED, AuditStatus.INCOMPLETE):
            matrix, chosen = audit.request.matrix, audit.recommended
            for cell in matrix.cells():
                if audit.cells[matrix.name(cell)].status == "succeeded":
                    is_chosen = chosen is not None and chosen.variant == cell.variant
                    judged.setdefault(cell.variant, f"{audit.id}: recommended" if is_chosen else audit.id)
    return judged
