"""An audit on a terminal: how far it is, what came of it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from serve_app.audit.record import Audit, CellProgress
from serve_app.parameters import plain

from .screen import Screen

CONFIG = Path("serve_config.yaml")
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The Serve config file of the app.")]
out = Screen()
err = Screen(stderr=True)
#: A path or a link that is broken over lines cannot be copied.
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


class Follower:
    """A bar for the run, and one for each of its variants; plain lines where there is no terminal."""

    def __init__(self, console: Console, bars: Progress | None) -> None:
        self._console, self._bars = console, bars
        self._tasks: dict[str, Any] = {}
        self._told = ""

    def show(self, audit: Audit) -> None:
        if self._bars is not None:
            # After the cells comes the report: a bar that is full stands still.
            rest = int(not audit.status.is_over)
            self._bar(self._bars, "", audit.stage or str(audit.status), list(audit.cells.values()), rest)
            matrix, by_variant = audit.request.matrix, defaultdict(list)
            for cell in matrix.cells():
                by_variant[cell.variant].append(audit.cells.get(matrix.name(cell), CellProgress()))
            for variant, cells in by_variant.items():
                self._bar(self._bars, variant, f"  {variant}", cells)
            return
        done = sum(cell.status in ("succeeded", "failed") for cell in audit.cells.values())
        line = f"{audit.status}: {done}/{len(audit.cells)} cells {audit.stage}".rstrip()
        if line != self._told:
            self._console.print(line, **PLAIN)
            self._told = line

    def _bar(self, bars: Progress, name: str, description: str, cells: Sequence[CellProgress], rest: int = 0) -> None:
        if name not in self._tasks:
            self._tasks[name] = bars.add_task(description, said="")
        failed = sum(cell.status == "failed" for cell in cells)
        succeeded = sum(cell.status == "succeeded" for cell in cells)
        said = f"{succeeded}/{len(cells)}" + (f", {failed} failed" if failed else "")
        done = sum(map(fraction, cells))
        bars.update(self._tasks[name], description=description, completed=done, total=len(cells) + rest, said=said)


@contextmanager
def following(console: Console) -> Iterator[Follower]:
    if not console.is_terminal:
        yield Follower(console, None)
        return
    variant, said = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[said]}")
    with Progress(SpinnerColumn(), variant, BarColumn(), said, TimeElapsedColumn(), console=console) as bars:
        yield Follower(console, bars)


def fraction(cell: CellProgress) -> float:
    """Of the cell's paintings, 0..1."""
    if cell.status in ("succeeded", "failed"):
        return 1.0
    return cell.step / cell.steps if cell.steps else 0.0


def run_table(audit: Audit) -> Table:
    """One run in full. No word of a run's is taken for markup."""
    table = Table("field", "value", title=audit.id, show_header=False)
    request, failed = audit.request, {n: c.error for n, c in audit.cells.items() if c.status == "failed"}
    rows: dict[str, Any] = {
        "status": audit.status,
        "stage": audit.stage or None,
        "session": f"{request.user_id}/{request.session_id}",
        "cells": f"{audit.result_count} of {len(audit.cells)} succeeded",
        **{f"  {name}": f"{e.code}: {e.message}" if e else "failed" for name, e in failed.items()},
        "error": f"{audit.error.code}: {audit.error.message}" if audit.error else None,
        "gpu": audit.gpu and f"{audit.gpu}, {audit.sm}",
        **{f"torch.compile, {verdict.variant}": verdict.verdict for verdict in audit.compile},
        "recommended": recommended(audit),
        "attempt": audit.attempt,
        "created": audit.created_at,
        "finished": audit.finished_at,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(Text(name), Text(str(value)))
    return table


def recommended(audit: Audit) -> str | None:
    found = audit.recommended
    if found is None:
        return None
    return f"{found.variant}, guidance {plain(found.guidance_scale)}, {found.steps} steps"


def list_table(audits: Sequence[Audit]) -> Table:
    table = Table("run, session", "status", "cells", "recommended", "when")
    for audit in audits:
        table.add_row(
            Text(f"{audit.id}\n{audit.request.user_id}/{audit.request.session_id}"),
            audit.status,
            f"{audit.result_count}/{len(audit.cells)}",
            Text(recommended(audit) or ""),
            audit.created_at.astimezone().strftime("%m-%d %H:%M"),
        )
    return table


#: Columns of the results table: key in results.json, title, decimals. All that there is stands in the report.
FIGURES = (
    ("wall_s", "wall s", 2),
    ("gpu_ms", "GPU ms", 0),
    ("psnr_db", "PSNR dB", 1),
    ("ssim", "SSIM", 3),
    ("seam_gradient_ratio", "seam edge", 2),
    ("seam_colour_shift", "seam colour", 1),
    ("outside_max", "outside", 0),
)


def results_table(results: Mapping[str, Any]) -> Table:
    """The cells of results.json, without the figures that none of them has."""
    cells = results.get("cells", [])
    figures = [figure for figure in FIGURES if any(cell.get(figure[0]) is not None for cell in cells)]
    table = Table(Column("cell", no_wrap=True), box=SIMPLE_HEAD, pad_edge=False)
    for _, title, _ in figures:
        table.add_column(title, justify="right")
    for cell in cells:
        values = [f"{value:.{n}f}" if (value := cell.get(key)) is not None else "-" for key, _, n in figures]
        failed = f" {cell['error']['code']}" if cell["error"] else ""
        table.add_row(Text(cell["name"] + failed), *values)
    return table
