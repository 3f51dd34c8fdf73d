"""What a finished run is good for: `fluxfill audit compare` gates a release, `fluxfill audit apply` sets a config."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from .audit_client import AuditClient, read_results
from .audit_screen import CONFIG, PLAIN, ConfigOption, err, out


def compare(
    before: Annotated[str, typer.Argument(metavar="RUN_A", help="The earlier run's id, or its results.json.")],
    after: Annotated[str, typer.Argument(metavar="RUN_B", help="The later run's id, or its results.json.")],
    max_slower_percent: Annotated[float, typer.Option(help="Largest increase in time.", min=0)] = 10.0,
    max_ssim_drop: Annotated[float, typer.Option(help="Largest drop in SSIM.", min=0)] = 0.01,
    max_psnr_drop_db: Annotated[float | None, typer.Option(help="Largest drop in PSNR.", min=0)] = None,
    max_colour_shift_rise: Annotated[float, typer.Option(help="Largest rise along the seam, CIE76.", min=0)] = 2.3,
    max_seam_gradient_rise: Annotated[float, typer.Option(help="Largest rise of |log2 gradient ratio|.", min=0)] = 0.5,
    max_put_back_rise: Annotated[float, typer.Option(help="Largest rise of what is put back.", min=0)] = 0.2,
    allow_different: Annotated[bool, typer.Option(help="GPUs, sessions or references may differ.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show changes within noise, too.")] = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Show what got faster, slower, better or worse, beyond noise. Exit status 1 if a threshold is exceeded."""
    from serve_app.audit import compare

    thresholds = compare.Thresholds(
        max_slower_percent=max_slower_percent,
        max_ssim_drop=max_ssim_drop,
        max_psnr_drop_db=max_psnr_drop_db,
        max_colour_shift_rise=max_colour_shift_rise,
        max_seam_gradient_rise=max_seam_gradient_rise,
        max_put_back_rise=max_put_back_rise,
    )
    earlier, later = _results(before, config), _results(after, config)
    found = compare.compare(earlier, later, thresholds, allow_different=allow_different)
    out.print(compare.table(found, everything=everything))
    for what, names in (("only in the later run", found.added), ("not the same", found.differences)):
        if names:
            out.print(f"{what}: {', '.join(names)}", **PLAIN)
    for failure in found.failures:
        err.print(failure, **PLAIN)
    if not found.passed:
        raise typer.Exit(1)


def apply(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, or its results.json.")],
    to: Annotated[Path, typer.Argument(metavar="CONFIG", help="The Serve config file to change.", dir_okay=False)],
) -> None:
    """Write what a run recommends into a config file's user_config, show the difference, say how to deploy it."""
    from ..config import load
    from . import audit_apply

    results, loaded, differences = _results(run, to), load(to), []
    # Nothing listens there, or it is another kind of app.
    with suppress(httpx.TransportError, ValueError):
        running = httpx.get(f"{loaded.url}/ready", timeout=5, trust_env=False).json()
        differences = audit_apply.drift(loaded, running)
    for difference in differences:
        err.print(f"the running app is not as the file said before: {difference}", **PLAIN)
    applied = audit_apply.apply(results, to)
    out.print(applied.diff, **PLAIN)
    out.print(applied.next_step, **PLAIN)


def _results(run: str, config: Path) -> Mapping[str, Any]:
    # A file needs no store, and no config.
    if Path(run).is_file():
        return read_results(Path(run).read_bytes(), run)
    from ..app import absolute
    from ..config import load

    return asyncio.run(AuditClient(absolute(load(config).settings)).final_results(run))
