"""`fluxfill audit`: start a run and follow it; list, show, cancel, compare, apply, fetch."""

import asyncio
import inspect
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from serve_app.audit import options as audit_options
from serve_app.audit.options import OPTIONS, RUN, run_id
from serve_app.audit.ports import AuditLauncher
from serve_app.audit.record import Audit, AuditStatus
from serve_app.settings import Settings

from .audit_client import AuditClient
from .audit_releases import apply, compare
from .audit_screen import CONFIG, PLAIN, ConfigOption, err, following, list_table, out, results_table, run_table
from .subcommands import goes_to_subcommand

audit_app = typer.Typer(help="Audits: a matrix of variants and guidance scales on one session, measured and compared.")
audit_app.command()(compare)
audit_app.command()(apply)

ADDRESS = "http://127.0.0.1:8265"
AddressOption = Annotated[str, typer.Option(help="Ray's job server.", envvar="RAY_API_SERVER_ADDRESS")]


RunArgument = Annotated[str, typer.Argument(parser=run_id, metavar="RUN", help="The run's id.")]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of the table, of which it gets the values as `given`, by field. Typer knows a
    command's options by its signature."""
    options = {}
    for option in (*RUN, *OPTIONS):
        # Of a list typer takes no parser.
        parser = None if option.is_repeated else option.parse
        said = typer.Option(option.flag, parser=parser, metavar=option.metavar, help=option.help)
        typed: Any = Annotated[list[str] | None, said] if option.is_repeated else Annotated[Any, said]
        options[option.field] = inspect.Parameter(
            option.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=typed
        )

    @wraps(command)
    def wrapper(context: typer.Context, **values: Any) -> None:
        command(context, {name: values.pop(name) for name in options}, **values)

    context, _, *rest = inspect.signature(command).parameters.values()
    wrapper.__signature__ = inspect.Signature([context, *options.values(), *rest])  # type: ignore[attr-defined]
    return wrapper


@audit_app.callback(invoke_without_command=True)
@with_options
def audit(
    context: typer.Context,
    given: Mapping[str, Any],
    *,
    address: AddressOption = ADDRESS,
    config: ConfigOption = CONFIG,
) -> None:
    """Run the matrix on a session's photo, follow it, say where the report is. Exit status 0: every cell is done."""
    if goes_to_subcommand(context):
        return
    try:
        asked = audit_options.asked(given)
    except ValueError as e:
        raise typer.BadParameter(f"{e}; see fluxfill audit --help") from e
    _take_tokens()
    settings = _settings(config)
    client = AuditClient(settings, _launcher(address, config))
    if asked.resume is None:
        begun = client.runs.start(asked.request(settings.audit), asked.run_id)
    else:
        begun = client.resume(asked.resume)
    _followed(client, begun, config)


def _followed(client: AuditClient, begun: Coroutine[Any, Any, Audit], config: Path) -> None:
    """Follow the run to its end, and say what came of it. The exit status says it, too."""
    options = _options(config)

    async def follow() -> Audit:
        audit = await begun
        out.print(f"run {audit.id}, {len(audit.cells)} cells", highlight=False)
        try:
            with following(out) as follower:
                audit = await client.follow(audit.id, follower.show)
        except asyncio.CancelledError:
            told = f"{audit.id} goes on. Follow it: fluxfill audit show --follow {audit.id}{options}"
            out.print(told, f"Stop it: fluxfill audit cancel {audit.id}{options}", sep="\n", **PLAIN)
            raise
        await _tell(client, audit, options)
        return audit

    try:
        audit = asyncio.run(follow())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if audit.status != AuditStatus.SUCCEEDED:
        err.print(f"go on with it: fluxfill audit --resume {audit.id}{options}", **PLAIN)
        raise typer.Exit(1)


def _options(config: Path) -> str:
    """What further commands on the run need, to be copied."""
    return "" if config == CONFIG else f" -c {config}"


async def _tell(client: AuditClient, audit: Audit, options: str) -> None:
    """The run, its figures, where its report is. A link is for a person who looks, and for no log."""
    report = await client.runs.report(audit)
    if report is not None:
        out.print(results_table(await client.results(audit.id)))
    out.print(run_table(audit))
    if report is not None:
        out.print(f"report: {report.path}; fetch it: fluxfill audit fetch {audit.id} FOLDER{options}", **PLAIN)
        if out.is_terminal:
            out.print(report.url, **PLAIN)


@audit_app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option(help="At most this many.", min=1, max=1000)] = 20, config: ConfigOption = CONFIG
) -> None:
    """List the newest runs."""
    out.print(list_table(asyncio.run(AuditClient(_settings(config)).store.list(limit))))


@audit_app.command()
def show(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the run to its end, with a progress bar.")
    ] = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Show one run: its progress, failures, recommendation and report."""
    client = AuditClient(_settings(config))
    if follow:
        _followed(client, client.store.get(run), config)
    else:
        asyncio.run(_shown(client, run, _options(config)))


async def _shown(client: AuditClient, run: str, options: str) -> None:
    await _tell(client, await client.store.get(run), options)


@audit_app.command()
def cancel(run: RunArgument, address: AddressOption = ADDRESS, config: ConfigOption = CONFIG) -> None:
    """Cancel a run: it stops within a denoising step, or by force after half a minute. Finished cells stay."""
    _take_tokens()
    canceled = asyncio.run(AuditClient(_settings(config), _launcher(address, config)).cancel(run))
    out.print(f"{run} is {canceled.status}", **PLAIN)


@audit_app.command()
def fetch(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(help="Folder for the files.", file_okay=False)],
    config: ConfigOption = CONFIG,
) -> None:
    """Write a run's report and pictures into a folder."""
    for path in asyncio.run(AuditClient(_settings(config)).fetch(run, folder)):
        out.print(f"wrote {path}", **PLAIN)


@audit_app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the report.", file_okay=False)] = Path("out/audit"),
    config: ConfigOption = CONFIG,
) -> None:
    """Start the app, audit four tiny variants at five guidance scales, bring the report here, stop everything."""
    from ..config import load
    from ..own_ray import serving
    from .audit_demo import audited, brought, sample, window_sizes
    from .demo import config_beside

    started = time.monotonic()
    load(config)
    files, own = sample(folder), config_beside(config, folder)
    loaded = load(own)
    sizes = ", ".join(f"{width} x {height}" for width, height in window_sizes(files, loaded.settings))
    out.print(f"a cat with a leash, to be painted in one window of {sizes}", **PLAIN)
    out.print(f"starting the app: serve run {own} (log: {folder / 'serve.log'})", **PLAIN)
    with serving(own, loaded.url, folder / "serve.log"), following(out) as follower:
        audit = asyncio.run(audited(loaded.settings, loaded.url, files, follower))
    written = brought(loaded.settings, audit, folder)
    out.print(results_table(asyncio.run(AuditClient(loaded.settings).results(audit.id))))
    out.print(run_table(audit))
    out.print(f"done in {time.monotonic() - started:.0f} s; the app is stopped. Look at:", **PLAIN)
    for path in sorted(written):
        out.print(f"  {path}", **PLAIN)
    out.print("The tiny-* models have random weights and paint noise: the figures are real, the pictures are not good.")
    out.print("The links of this report led to the app, and are dead now; the pictures lie beside it.")


def _take_tokens() -> None:
    """Ray asks for a token by default, and its clients send theirs in this mode only; read when Ray is imported."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def _launcher(address: str, config: Path) -> AuditLauncher:
    from ..audit_job import RayJobs
    from ..config import load

    return RayJobs(address, app=load(config).app)


def _settings(config: Path) -> Settings:
    from ..app import absolute
    from ..config import load

    return absolute(load(config).settings)
