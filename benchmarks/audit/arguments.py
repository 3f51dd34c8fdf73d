"""What the job is asked to do: on its command line, or in its environment by who launched it."""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from serve_app.audit import options
from serve_app.audit.options import OPTIONS, Asked, Option

#: Set by the launcher: the stored run, which of its attempts this job is, and the app's name.
RUN, ATTEMPT, APP = "FLUXFILL_AUDIT_RUN", "FLUXFILL_AUDIT_ATTEMPT", "FLUXFILL_AUDIT_APP"


class Given(NamedTuple):
    asked: Asked
    #: The app's name in Serve; None: where one runs it needs no name.
    app: str | None = None
    #: The stored run's id and attempt, where the job was launched with one.
    launched: tuple[str, int] | None = None


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Given:
    """Exits where the command line cannot be meant."""
    if not argv and RUN in environment:
        launched = environment[RUN], int(environment[ATTEMPT])
        return Given(Asked({}, resume=launched[0]), environment.get(APP), launched)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit",
        description="Paints a session with every cell of a matrix on the running app's replicas, measures the "
        "pictures, and writes a report beside them. Exit status 0: every cell is painted.",
        epilog="What is left out is as the app's settings say (audit.*).",
    )
    parser.add_argument("--app", help="the app's name in Serve; where one runs it needs no name")
    for option in (*options.RUN, *OPTIONS):
        action, parse = "append" if option.is_repeated else "store", partial(_parsed, option)
        parser.add_argument(
            option.flag, dest=option.field, type=parse, action=action, metavar=option.metavar, help=option.help
        )
    given = vars(parser.parse_args(argv))
    try:
        return Given(options.asked(given), given["app"])
    except ValueError as e:
        parser.error(str(e))


def _parsed(option: Option, text: str) -> object:
    try:
        return option.parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
