"""`fluxfill generate`: a job of pictures, posted over HTTP and followed to its end."""

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from serve_app.jobs.record import State

from .screen import Screen
from .server import HERE, RETRY_S, Key, Refused, Server, Url, fail, failures_told

out = Screen()


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the pictures are to show.")],
    model_id: Annotated[
        str | None, typer.Option("--model", help="One of the app's generators; its first by default.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What they are not to show.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, 64 to 2048.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, 64 to 2048.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 100.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 0 to 100.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; the next ones have the next.")] = None,
    count: Annotated[int | None, typer.Option(help="Pictures, 1 to 100.")] = None,
    format: Annotated[str | None, typer.Option(help="png, jpg or webp.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="One that the model has, such as euler.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the pictures; named after the job by default.")
    ] = None,
    loras: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="ID[:SCALE]", help="A registered LoRA: see `fluxfill loras`. May be repeated."),
    ] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Make pictures from a prompt, by a running app. Ctrl-C cancels the job."""
    # All options say what to make, but for three.
    given = {name: value for name, value in context.params.items() if value is not None}
    body = {"type": "generate", **{name: given[name] for name in given.keys() - {"folder", "url", "key"}}}
    if loras:
        body["loras"] = [_lora(text) for text in loras]
    server = Server(url, key)
    with failures_told(url):
        server.check_answers()
        # A request that is sent again is the same job.
        headers = {"Idempotency-Key": f'"{uuid.uuid4().hex}"'}
        job = server.ask("POST", "/v1/jobs", json=body, headers=headers).json()["job"]
        out.print(f"job {job['id']}", highlight=False)
        try:
            job = _follow(server, job, folder or Path(job["id"]))
        except KeyboardInterrupt:
            # One that has just ended cannot be canceled.
            with suppress(Refused):
                server.ask("POST", f"/v1/jobs/{job['id']}/cancel")
            fail("canceled", f"job {job['id']} was interrupted", status=130)
    if job["status"] != State.SUCCEEDED:
        fail(job["error_code"] or job["status"], job["error_message"] or f"the job has {job['status']}")


def _lora(text: str) -> dict[str, Any]:
    lora_id, _, scale = text.partition(":")
    try:
        return {"id": lora_id, "scale": float(scale or 1)}
    except ValueError:
        raise typer.BadParameter(f"{text}: what follows the colon is no number", param_hint="--lora") from None


def _follow(server: Server, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The job once it is over. Its pictures are written into `folder` as they land."""
    path, written = f"/v1/jobs/{job['id']}", dict[str, Path]()
    with Progress(console=out) as bar:
        task = bar.add_task(job["status"], total=1.0)

        def fetch() -> None:
            for one in server.ask("GET", f"{path}/artifacts").json()["artifacts"]:
                if one["id"] not in written:
                    data, to = server.ask("GET", one["url"]).content, folder / Path(one["s3_key"]).name
                    folder.mkdir(parents=True, exist_ok=True)
                    to.write_bytes(data)
                    written[one["id"]] = to

        def told(name: str, data: Mapping[str, Any]) -> None:
            if name == "progress":
                bar.update(task, completed=data["progress"])
            if name in ("artifact", "snapshot"):
                fetch()
            if name in ("state", "snapshot"):
                bar.update(task, description=f"{data['status']} on {job['parameters']['model_id']}")

        while not State(job["status"]).is_final:
            server.follow(f"{path}/events", told)
            job = server.ask("GET", path).json()
            # An app that is stopping ends its streams at once.
            time.sleep(0 if State(job["status"]).is_final else RETRY_S)
        fetch()
    for to in written.values():
        # A path that is broken over lines cannot be copied.
        out.print(f"wrote {to}", highlight=False, soft_wrap=True)
    return job
