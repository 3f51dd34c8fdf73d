"""What a run may be asked for, once: the command line, the Ray job and HTTP take these, by their fields."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from ..errors import InputError
from ..parameters import PROMPTS, AuditRequest, CropStrategy, is_run_id
from ..settings import AuditSettings


class Option(NamedTuple):
    flag: str
    #: Of AuditRequest, of Matrix, or among `RUN`.
    field: str
    help: str
    #: From a word of the command line. Raises ValueError.
    parse: Callable[[str], Any] = str
    metavar: str = "X"
    #: Each time it is given adds a value.
    is_repeated: bool = False
    #: Whether a body over HTTP may have it.
    over_http: bool = True


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Values with commas between them."""
    return lambda text: tuple(kind(part.strip()) for part in text.split(","))


def _variants_or_none(text: str) -> tuple[str, ...]:
    return () if text == "none" else _list_of(str)(text)


def run_id(text: str) -> str:
    if not is_run_id(text):
        raise ValueError(f"{text!r} is not 1 to 64 letters, digits, '-' and '_'")
    return text


#: Which run.
RUN = (
    Option("--user", "user_id", "User id.", metavar="U"),
    Option("--session", "session_id", "Session id: its photo and mask are in the blob store.", metavar="S"),
    Option("--run-id", "run_id", "Id of the new run; audit-{8 hex} by default.", run_id, "RUN"),
    Option("--resume", "resume", "Resume an ended run: paint its missing cells.", run_id, "RUN"),
)
_PROMPT = f"What the filled area should show, or {', '.join(PROMPTS)} for one of these; may be repeated."
#: What it paints, and how.
OPTIONS = (
    Option("--variants", "variants", "Variants.", _list_of(str), "A,B"),
    Option("--guidance", "guidance_scales", "Guidance scales.", _list_of(float), "2,4"),
    Option("--steps", "steps", "Denoising steps.", _list_of(int), "20,28"),
    Option("--seeds", "seeds", "Seeds.", _list_of(int), "0,1"),
    Option("--prompt", "prompts", _PROMPT, is_repeated=True, metavar="P"),
    Option("--crop", "crops", "Crop strategies.", _list_of(CropStrategy), ",".join(CropStrategy)),
    Option("--mask-grow", "mask_grows", "Growths of the mask, shares of the longest side.", _list_of(float), "0,0.01"),
    Option("--reference", "reference", "Variant that pictures are compared with.", metavar="V"),
    Option("--runs", "runs", "Paintings of each cell, the first of them cold.", int, "N"),
    Option("--compile", "compile_variants", "Variants to compile.", _variants_or_none, "A,B|none"),
    Option("--link-hours", "link_hours", "How long the report's links are valid.", float, "H"),
    Option("--price-per-hour", "price_per_hour", "Price of one replica's machine.", float, "X"),
    Option("--gpus", "gpus", "GPUs that the cluster can have.", int, "N", over_http=False),
)


class Asked(NamedTuple):
    """A command line."""

    #: Of AuditRequest and Matrix.
    fields: Mapping[str, Any]
    #: Of the new run; None: one is made.
    run_id: str | None = None
    #: The run to go on with.
    resume: str | None = None

    def request(self, unsaid: AuditSettings) -> AuditRequest:
        """Raises InputError that names the field."""
        try:
            return unsaid.request(self.fields)
        except ValidationError as e:
            first = e.errors()[0]
            raise InputError(f"{'.'.join(map(str, first['loc'])) or 'audit'}: {first['msg']}") from e


def asked(given: Mapping[str, Any]) -> Asked:
    """`given` by the options' fields; what is None was not given. Raises ValueError for what does not go together."""
    names = [option.field for option in (*RUN, *OPTIONS)]
    fields = {name: given[name] for name in names if given.get(name) is not None}
    resume, run = fields.pop("resume", None), fields.pop("run_id", None)
    if resume is None and not {"user_id", "session_id"} <= fields.keys():
        raise ValueError("name --user and --session, or --resume RUN")
    if resume is not None and (fields or run):
        raise ValueError("--resume goes on with a run as it was asked for: name nothing else")
    return Asked(fields, run, resume)
