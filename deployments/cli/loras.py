"""`fluxfill loras`: LoRAs of a running app."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from .screen import Screen
from .server import HERE, Key, Server, Url, err, fail, failures_told

loras_app = typer.Typer(no_args_is_help=True, help="LoRAs of a running app, for `fluxfill generate --lora`.")
out = Screen()

_CHUNK_BYTES = 1 << 20


@loras_app.command()
def add(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A safetensors file.")],
    name: Annotated[str | None, typer.Option(help="Its file's by default.")] = None,
    trigger_word: Annotated[str, typer.Option(help="What a prompt says to show what it was trained on.")] = "",
    alpha: Annotated[float | None, typer.Option(help="For layers that say none; otherwise their rank.")] = None,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Upload a LoRA and register it. Prints its id, and what was found to stderr. Again with the same file and
    options: the same id."""
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    about = {"sha256": sha256, "size_bytes": file.stat().st_size, "trigger_word": trigger_word, "alpha": alpha}
    body, server = {"name": name or file.stem, **about}, Server(url, key)
    with failures_told(url), Progress(console=err) as bar:
        server.check_answers()
        answer = server.ask("POST", "/v1/models", json=body).json()
        if upload := answer["upload"]:
            task = bar.add_task(f"uploading {file.name}", total=file.stat().st_size)
            server.send(upload, lambda: _read(file, bar, task))
            answer = server.ask("POST", "/v1/models", json=body).json()
    if (model := answer["model"]) is None:
        fail("lora_changed", f"{file} changed while it was uploaded")
    lora = model["lora"]
    low, high = lora["alpha_scale"]
    out.print(model["id"], highlight=False)
    scale = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    encoder = "; its text encoder layers have no effect" if lora["text_encoder"] == "ignored" else ""
    of = f"{model['kind']} ({lora['format']})"
    err.print(f"{of}, rank {lora['rank']}, alpha / rank {scale}{encoder}", highlight=False)


def _read(file: Path, bar: Progress, task: TaskID) -> Iterator[bytes]:
    bar.update(task, completed=0)
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            yield chunk
            bar.advance(task, len(chunk))


@loras_app.command("list")
def list_loras(url: Url = HERE, key: Key = None) -> None:
    """The LoRAs of the key, newest first."""
    with failures_told(url):
        models = Server(url, key).ask("GET", "/v1/models").json()["models"]
    table = Table("id", "name", "of", "rank", "trigger word", box=None)
    for model in models:
        if (lora := model["lora"]) is not None:
            table.add_row(model["id"], model["name"], lora["family"], str(lora["rank"]), lora["trigger_word"])
    out.print(table)


@loras_app.command()
def delete(lora_id: Annotated[str, typer.Argument(metavar="ID")], url: Url = HERE, key: Key = None) -> None:
    """Delete a LoRA, and the file that was uploaded for it."""
    with failures_told(url):
        Server(url, key).ask("DELETE", f"/v1/models/{lora_id}")
