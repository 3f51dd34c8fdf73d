"""The command line, `fluxfill`: one function or module for each of its commands."""

import asyncio
import uuid
from collections.abc import Coroutine, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from serve_app import adapters
from serve_app.errors import FluxFillError, MalformedMessage, UnknownJob, UnknownVariant
from serve_app.jobs.messages import EditMessage, parse_attributes
from serve_app.jobs.record import Artifact, Job, State
from serve_app.models import BUILT_IN, Variant
from serve_app.parameters import CropStrategy
from serve_app.settings import Settings

from .audits import audit_app
from .dead_letters import deadletters_app
from .generate import generate
from .keys import keys_app
from .loras import loras_app
from .models import models
from .screen import Screen
from .subcommands import goes_to_subcommand

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Remove things from photos with FLUX.1-Fill, and make pictures from prompts.",
)
jobs_app = typer.Typer(help="List, show and cancel jobs.")
weights_app = typer.Typer(no_args_is_help=True, help="Model weights.")
app.add_typer(jobs_app, name="jobs")
app.add_typer(weights_app, name="weights")
app.add_typer(deadletters_app, name="deadletters")
app.add_typer(keys_app, name="keys")
app.add_typer(loras_app, name="loras")
app.add_typer(audit_app, name="audit")
app.command()(generate)
app.command()(models)

out = Screen()
err = Screen(stderr=True)

T = TypeVar("T")

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The Serve config file of the app.")]
CONFIG = Path("serve_config.yaml")


def _version(is_asked: bool) -> None:
    if is_asked:
        out.print(f"flux-fill-serve {version('flux-fill-serve')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    is_asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """The console script. A known error is one red line and exit status 1, not a traceback."""
    try:
        app()
    except FluxFillError as e:
        err.print(Text.assemble((e.code, "red"), f": {e.message}"))
        raise SystemExit(1) from e


def _settings(config: Path) -> Settings:
    from ..app import absolute
    from ..config import load

    return absolute(load(config).settings)


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@app.command()
def submit(
    original: Annotated[Path, typer.Option(help="The photo.", exists=True, dir_okay=False)],
    mask: Annotated[
        Path, typer.Option(help="The mask: white where the photo is to be filled.", exists=True, dir_okay=False)
    ],
    user: Annotated[str, typer.Option(help="User id.")] = "local",
    session: Annotated[str | None, typer.Option(help="Session id; a new one by default.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant to paint with.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the filled area should show.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 0 to 100.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 100.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; derived from the job by default.")] = None,
    crop: Annotated[CropStrategy | None, typer.Option(help="How the photo is cropped for the model.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="0.01 to 1; below 1, painting starts from a filled hole.")
    ] = None,
    grow: Annotated[
        float | None, typer.Option("--mask-grow", help="Growth of the mask, 0 to 0.05 of the longest side.")
    ] = None,
    priority: Annotated[str | None, typer.Option(help="For the subscriptions' filters: high or low.")] = None,
    key: Annotated[
        str | None, typer.Option("--idempotency-key", help="Identifies the edit, in place of the files' versions.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Do the edit again even if it succeeded before.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the result.", file_okay=False)] = Path("out"),
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the result.")] = 900,
    config: ConfigOption = CONFIG,
) -> None:
    """Upload a photo and its mask, publish the message, follow the job, write the result.

    An edit that succeeded before is not done twice: its result is written, unless a later edit of the session has
    replaced it; then the exit status is 1.
    """
    if again and key:
        raise typer.BadParameter("--again makes its own key: leave out --idempotency-key")
    given = {
        "userId": user,
        "sessionId": session or f"cli-{uuid.uuid4().hex[:12]}",
        "variant": variant,
        "prompt": prompt,
        "guidanceScale": guidance,
        "steps": steps,
        "seed": seed,
        "cropStrategy": crop,
        "strength": strength,
        "maskGrow": grow,
    }
    asked = {"priority": priority, "idempotencyKey": f"again-{uuid.uuid4().hex}" if again else key}
    attributes = {name: value for name, value in asked.items() if value is not None}
    parse_attributes(attributes)
    job, files = _run(_submit(_message(given), original, mask, folder, timeout, config, attributes))
    if job.status != State.SUCCEEDED:
        raise typer.Exit(1)
    for path in files:
        out.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _message(given: dict[str, Any]) -> EditMessage:
    try:
        return EditMessage.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as e:
        first = e.errors()[0]
        raise MalformedMessage(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from e


async def _submit(
    message: EditMessage,
    original: Path,
    mask: Path,
    folder: Path,
    timeout_s: float,
    config: Path,
    attributes: Mapping[str, str] | None = None,
) -> tuple[Job, list[Path]]:
    from ..client import Client

    client = Client(_settings(config))
    submitted = await client.submit(message, original, mask, attributes=attributes)
    out.print(f"session {message.user_id}/{message.session_id}, job {submitted.job_id}", highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[steps]}"))
    with Progress(*columns, TimeElapsedColumn(), console=out) as bar:
        task = bar.add_task("waiting", total=1.0, steps="")

        def on_change(job: Job) -> None:
            steps = f"{job.progress.step}/{job.progress.steps}" if job.progress.steps else ""
            done = 1.0 if job.status == State.SUCCEEDED else job.progress.fraction
            bar.update(task, description=f"{job.status} on {job.variant}", completed=done, steps=steps)

        try:
            job = await client.follow(submitted, on_change, timeout_s=timeout_s)
        except TimeoutError:
            err.print(f"no result within {timeout_s:g} s; see: fluxfill jobs show {submitted.job_id}", highlight=False)
            raise typer.Exit(1) from None
    _show(job)
    return job, await client.fetch(job, folder) if job.status == State.SUCCEEDED else []


def _show(job: Job) -> None:
    """One job in full, timings included."""
    table = Table("field", "value", title=job.id, show_header=False)
    timings = {name: f"{value:.3f}" for name, value in job.timings.model_dump(exclude_none=True).items()}
    rows: dict[str, Any] = {
        "status": job.status,
        "session": job.lock_key or None,
        "variant": job.variant,
        **job.parameters.model_dump(mode="json"),
        "seed": job.seed,
        "attempts": job.attempt,
        "progress": f"{job.progress.step}/{job.progress.steps} steps" if job.progress.steps else None,
        **({"error": f"{job.error.code}: {job.error.message}"} if job.error else {}),
        **timings,
        "cost": None if job.cost is None else f"{job.cost:.6f}",
        "quality": job.quality
        and f"{job.quality.verdict}: {job.quality.put_back:.2f} put back, tries: {job.quality.tries}",
        **{_label(artifact): artifact.path for artifact in job.artifacts},
        "created": job.created_at.isoformat(" ", "seconds"),
        "finished": job.finished_at and job.finished_at.isoformat(" ", "seconds"),
    }
    for name, value in rows.items():
        if value is not None:
            # A path must be whole, to be copied.
            table.add_row(Text(name), Text(str(value), overflow="fold"))
    out.print(table)


@jobs_app.callback(invoke_without_command=True)
def jobs(
    context: typer.Context,
    status: Annotated[State | None, typer.Option(help="Only jobs with this status.")] = None,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1, max=1000)] = 20,
    config: ConfigOption = CONFIG,
) -> None:
    """List the newest jobs."""
    if goes_to_subcommand(context):
        return
    from ..client import Client

    # An id must be whole, to be copied; on a terminal of 80 columns the session fits below it only.
    model, status_column = Column("type, model", overflow="fold"), Column("status", no_wrap=True)
    table = Table(Column("job, session", no_wrap=True), model, status_column, "when")
    for job in _run(Client(_settings(config)).list(status=status, limit=limit)):
        state = f"{job.status} {job.progress.fraction:.0%}" if job.status == State.RUNNING else job.status
        why = f"\n{job.error.code}" if job.error else ""
        when = job.created_at.astimezone().strftime("%m-%d %H:%M")
        # One that was posted belongs to no session.
        name = f"{job.id}\n{job.lock_key}" if job.user_id else job.id
        table.add_row(Text(name), Text(f"{job.type}\n{job.variant}"), f"{state}{why}", when)
    out.print(table)


@jobs_app.command("show")
def jobs_show(job_id: str, config: ConfigOption = CONFIG) -> None:
    """Show one job: its parameters, timings and error."""
    _show(_run(_job(job_id, config)))


@jobs_app.command("cancel")
def jobs_cancel(
    job_id: Annotated[str | None, typer.Argument(help="The job's id.")] = None,
    session: Annotated[str | None, typer.Option(help="USER/SESSION: all its jobs and waiting messages.")] = None,
    config: ConfigOption = CONFIG,
) -> None:
    """Cancel a job, or all jobs of a session: waiting ones never start, running ones stop within a step."""
    from ..client import Client

    if (job_id is None) == (session is None):
        raise typer.BadParameter("name a job, or --session USER/SESSION")
    if job_id is not None:
        canceled = [_run(Client(_settings(config)).cancel(job_id))]
    else:
        user_id, _, session_id = str(session).partition("/")
        message = _message({"userId": user_id, "sessionId": session_id})
        canceled = list(_run(Client(_settings(config)).cancel_session(message.user_id, message.session_id)))
    for job in canceled:
        out.print(f"{job.id} {job.status}", highlight=False)
    if not canceled:
        out.print("no job had started; waiting messages will not start", highlight=False)


@jobs_app.command("links")
def jobs_links(
    job_id: str,
    hours: Annotated[float, typer.Option(help="How long the links are valid, up to 168.", min=0.01, max=168)] = 1,
    config: ConfigOption = CONFIG,
) -> None:
    """Print signed links to a job's pictures, for people without credentials."""
    from ..client import Client

    job = _run(_job(job_id, config))
    urls = _run(Client(_settings(config)).links(job, expires_s=round(hours * 3600)))
    for artifact, url in zip(job.artifacts, urls, strict=True):
        # A link that is broken over lines cannot be clicked.
        out.print(f"{_label(artifact)}: {url}", highlight=False, soft_wrap=True)
    if not urls:
        err.print(f"job {job_id} is {job.status} and has no pictures", highlight=False, soft_wrap=True)
        raise typer.Exit(1)


def _label(artifact: Artifact) -> str:
    return artifact.role if artifact.index is None else f"{artifact.role} {artifact.index}"


async def _job(job_id: str, config: Path) -> Job:
    from ..client import Client

    job = await Client(_settings(config)).get(job_id)
    if job is None:
        raise UnknownJob(f"there is no job {job_id}")
    return job


@app.command()
def check(
    file: Annotated[
        Path, typer.Argument(help="A Serve config file, or Kubernetes manifests with a RayService.")
    ] = CONFIG,
) -> None:
    """Validate a config: print its problems with their lines, or what it will run."""
    from ..manifests import check as checked

    problems, found = checked(file)
    for problem in problems:
        err.print(f"{file}: {problem}", highlight=False, markup=False)
    if problems:
        raise typer.Exit(1)
    for settings in found:
        _summary(settings)
    out.print(f"{file} is valid.", highlight=False)


def _summary(settings: Settings) -> None:
    from serve_app.engine.weights import lock

    locked = lock.read(settings.weights.lock)
    table = Table("model", "engine", "replicas", "weights", "pinned")
    for name, served in settings.served.items():
        row = settings.variant(name)
        source = f"{row.repo}/{row.file}" if row.repo else row.file or "none"
        pinned = "" if not row.repo else "yes" if row.revision or row.repo in locked.repos else "NO"
        table.add_row(name, row.family, f"{served.min_replicas}..{served.max_replicas}", source, pinned)
    out.print(table)


@weights_app.command("tiny")
def weights_tiny(
    to: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("var/weights"),
) -> None:
    """Write the tiny random-weight checkpoints, as the tiny-* models do for themselves on first use."""
    from serve_app.engine.weights.fetch import ensure_tiny

    for folder in ensure_tiny(to):
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
            out.print(f"{path}  {path.stat().st_size / 1e6:.1f} MB", highlight=False)


@weights_app.command("embed")
def weights_embed(
    variant: Annotated[str, typer.Argument(help="A variant that has `embeddings`, such as klein-4B.")],
    prompt: Annotated[
        str | None, typer.Option(help="What the model is asked for in every edit; it has its own.")
    ] = None,
    config: ConfigOption = CONFIG,
) -> None:
    """Encode a variant's one prompt into the app's blob store, with its text encoder: 8 GB of memory for klein-4B."""
    settings = _settings(config)
    row = _row(settings, variant)
    if row.embeddings is None:
        raise UnknownVariant(f"{variant} has no fixed prompt: its edits bring their own, or it takes none")
    size = _run(_embed(row, row.embeddings, prompt, settings))
    out.print(f"wrote {row.embeddings}, {size / 1e6:.2f} MB", highlight=False)


async def _embed(row: Variant, path: str, prompt: str | None, settings: Settings) -> int:
    from serve_app.engine.flux2 import prompt as prompts
    from serve_app.engine.weights import fetch

    from ..loading import sources

    base = await fetch.fetch_text_encoders(row, sources(settings))
    data = await asyncio.to_thread(prompts.encode, base, prompt or prompts.PROMPT, row.max_prompt_tokens)
    info = await adapters.blob_store(settings.blobs).put(path, data, content_type="application/octet-stream")
    return info.size


@weights_app.command("pull")
def weights_pull(
    variants: Annotated[
        list[str] | None, typer.Argument(help="Variants and generators; by default all that the config serves.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="Blob store URL of a mirror to fill as well.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Look up revisions and write them to the lock file.")] = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Download weights into the cache, and into a mirror; pin their revisions."""
    settings = _settings(config)
    rows = [_row(settings, name) for name in variants or settings.served]
    if not any(row.repo for row in rows):
        out.print("none of these variants has weights to pull", highlight=False)
    missing = _run(_pull(rows, settings, to, pin))
    for repo, why in missing.items():
        err.print(f"not pinned: {repo}: {why}", highlight=False, markup=False)
    if missing:
        raise typer.Exit(1)


def _row(settings: Settings, name: str) -> Variant:
    if name in settings.served:
        return settings.variant(name)
    if name not in BUILT_IN:
        raise UnknownVariant(f"there is no variant {name}; the built-in ones are {', '.join(BUILT_IN)}")
    return BUILT_IN[name]


async def _pull(rows: list[Variant], settings: Settings, to: str | None, pin: bool) -> Mapping[str, str]:
    """Repositories that could not be pinned, with the reason."""
    from dataclasses import replace

    from serve_app.engine.weights import fetch, lock

    from ..loading import mirror_at, sources

    def on_file(repo: str, file: str, number: int, count: int) -> None:
        out.print(f"{repo}: {number}/{count} {file}", highlight=False)

    # First, because a URL that names no store should not cost hours of downloads.
    mirror = mirror_at(to) if to else None
    where, missing = sources(settings), {}
    if pin:
        pinned = await fetch.pin(rows, where, on_file)
        lock.write(settings.weights.lock, pinned.lock)
        where, missing = replace(where, locked=pinned.lock), dict(pinned.missing)
        out.print(f"wrote {settings.weights.lock}", highlight=False)
    else:
        await fetch.pull(rows, where, on_file)
    if mirror:
        await fetch.push_to_mirror(rows, replace(where, mirror=mirror), on_file)
    return missing


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the pictures.", file_okay=False)] = Path("out/demo"),
    config: ConfigOption = CONFIG,
) -> None:
    """Start the app, edit a photo with two engines through Pub/Sub, write the pictures, stop the app."""
    from ..config import load
    from ..own_ray import serving
    from .demo import before_after, config_beside, draw_leash

    started = datetime.now()
    load(config)
    original, mask = draw_leash(folder)
    own = config_beside(config, folder)
    loaded = load(own)
    pictures = {"original": original}
    out.print(f"starting the app: serve run {own} (log: {folder / 'serve.log'})", highlight=False)
    with serving(own, loaded.url, folder / "serve.log"):
        for variant in ("telea", "tiny-Q4_0"):
            session = f"cat-{uuid.uuid4().hex[:8]}"
            message = _message({"userId": "demo", "sessionId": session, "variant": variant, "steps": 8})
            job, files = _run(_submit(message, original, mask, folder / variant, 180, own))
            if job.status != State.SUCCEEDED:
                raise FluxFillError(f"the {variant} edit {job.status}; see {folder / 'serve.log'}")
            pictures[variant] = files[0]
    before_after(pictures, folder / "before_after.png")
    _where(folder, (datetime.now() - started).total_seconds())


def _where(folder: Path, seconds: float) -> None:
    out.print(f"\ndone in {seconds:.0f} s; the app is stopped. Look at:", highlight=False)
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".jpg") and "store" not in p.parts):
        out.print(f"  {path}", highlight=False)
    out.print("telea is OpenCV's; the tiny-* models have random weights and paint noise: they show the real pipeline.")
    out.print("To try your own photo: make run, and the page at http://127.0.0.1:8000/", highlight=False)
