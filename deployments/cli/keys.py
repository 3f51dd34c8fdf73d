"""API keys: `fluxfill keys new`. The key is shown once; the app is given its digest."""

import hashlib
import secrets
from typing import Annotated

import typer
from pydantic import SecretStr

from .screen import Screen

keys_app = typer.Typer(no_args_is_help=True, help="API keys of clients.")
out = Screen()


@keys_app.callback()
def _keys() -> None:
    """Without a callback typer would drop the name of the only command."""


@keys_app.command("new")
def new(
    id: Annotated[str, typer.Argument(help="The client's name: letters, digits, _, . and -.")],
    scope: Annotated[str, typer.Option(help="Scopes, joined by +: submit, read, jobs, audit, admin.")] = "submit+read",
) -> None:
    """Make a key. Prints the key, which is stored nowhere, and below it the entry for API_KEYS."""
    from serve_app.http.auth import DIGEST_ENTRY, ApiKeys

    key = secrets.token_urlsafe(32)
    entry = f"{id}=sha256:{hashlib.sha256(key.encode()).hexdigest()}:{scope}"
    if not DIGEST_ENTRY.fullmatch(entry):
        raise typer.BadParameter("at most 64 letters, digits, _, . and -, and scopes joined by +", param_hint="ID")
    ApiKeys(SecretStr(entry), is_production=True)
    for line in (key, entry):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
