"""What the job is asked to do: on its command line, or in its environment by who launched it."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from serve_app.audits import AuditRequest, Matrix, is_run_id
from serve_app.errors import AuditError
from serve_app.messages import CropStrategy
from serve_app.settings import AuditSettings

#: Set by the launcher: the stored run, which of its attempts this job is, and the app's name.
RUN, ATTEMPT, APP = "FLUXFILL_AUDIT_RUN", "FLUXFILL_AUDIT_ATTEMPT", "FLUXFILL_AUDIT_APP"


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """`launched` is the stored run's id and attempt where the job was launched with one, else None; the other names
    are those of AuditRequest's and Matrix's fields. What is not given is None."""
    parser = _parser()
    if not argv and RUN in environment:
        given = parser.parse_args([f"--resume={environment[RUN]}"])
        given.app, given.launched = environment.get(APP), (environment[RUN], int(environment[ATTEMPT]))
        return given
    given = parser.parse_args(argv)
    given.launched = None
    if given.resume is None and (given.user_id is None or given.session_id is None):
        parser.error("name --user and --session, or --resume RUN")
    if given.resume is not None and asked(given):
        parser.error("--resume takes what the run was asked for, and nothing else")
    return given


def request(given: argparse.Namespace, defaults: AuditSettings) -> AuditRequest:
    """Raises AuditError that names the field."""
    try:
        return defaults.request(asked(given))
    except ValidationError as e:
        first = e.errors()[0]
        raise AuditError(f"{'.'.join(map(str, first['loc'])) or 'audit'}: {first['msg']}") from e


def asked(given: argparse.Namespace) -> dict[str, Any]:
    """The fields of AuditRequest and of Matrix that were given."""
    names = {*AuditRequest.model_fields, *Matrix.model_fields}
    return {name: value for name, value in vars(given).items() if name in names and value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit",
        description="Paints a session with every cell of a matrix on the running app's replicas, measures the "
        "pictures, and writes a report beside them. Exit status 0: every cell is painted.",
        epilog="What is left out is as the app's settings say (audit.*).",
    )
    add = parser.add_argument
    add("--app", help="the app's name in Serve; where one runs it needs no name")
    add("--user", dest="user_id", metavar="U", help="user id")
    add("--session", dest="session_id", metavar="S", help="session id: its photo and mask are in the blob store")
    add("--run-id", type=_run_id, metavar="R", help="of the new run; audit-{8 hex} when left out")
    add("--resume", type=_run_id, metavar="R", help="paint what this run lacks")
    add("--variants", type=_list_of(str), metavar="A,B", help="variants, with commas between them")
    add("--guidance", dest="guidance_scales", type=_list_of(float), metavar="2,4", help="guidance scales")
    add("--steps", type=_list_of(int), metavar="20,28", help="denoising steps")
    add("--seeds", type=_list_of(int), metavar="0,1", help="seeds")
    add("--prompt", dest="prompts", action="append", metavar="P", help="what is to be seen there; may be given again")
    crops = ",".join(CropStrategy)
    add("--crop", dest="crops", type=_list_of(str), metavar=crops, help="how much of the photo the model sees")
    add("--reference", metavar="V", help="the variant that pictures are compared with")
    add("--runs", type=int, metavar="N", help="paintings of each cell, the first of them timed apart")
    add("--compile", dest="compile_variants", type=_variants_or_none, metavar="A,B|none", help="variants to compile")
    add("--link-hours", type=float, metavar="H", help="how long the report's links hold")
    add("--price-per-hour", type=float, metavar="X", help="of one replica's machine")
    add("--gpus", type=int, metavar="N", help="GPUs that the cluster can have")
    return parser


def _run_id(text: str) -> str:
    if not is_run_id(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 64 letters, digits, '-' and '_'")
    return text


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def values(text: str) -> tuple[Any, ...]:
        return tuple(kind(part.strip()) for part in text.split(","))

    return values


def _variants_or_none(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(_list_of(str)(text))
