"""The figures of a run: shown, and whether they are as they must be."""

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..context import machine
from . import app

PACKAGES = ("ray", "google-cloud-pubsub", "SQLAlchemy", "psycopg", "obstore", "moto")


def is_passed(figures: Mapping[str, Any]) -> bool:
    """Nothing lost, nothing wrong, nothing twice, and everything accounted for."""
    nothing = all(figures[name] == 0 for name in ("lost", "wrong", "conflicting", "still_running"))
    good = figures["sent"] - figures["poisoned"]
    return nothing and figures["completed"] == good and figures["dead_lettered"] == figures["poisoned"]


def show(figures: Mapping[str, Any]) -> None:
    table = Table("what", "figure", show_header=False, title="passed" if is_passed(figures) else "FAILED")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), json.dumps(value).strip('{}"').replace('"', ""))
    Console().print(table)


def context() -> dict[str, Any]:
    """What a reader of the figures needs beside them."""
    return {
        "replicas": {app.INPAINTER: app.INPAINTERS, app.INGRESS: app.INGRESSES},
        "lease_s": app.LEASE_S,
        "max_attempts": app.MAX_ATTEMPTS,
        **machine(PACKAGES),
    }
