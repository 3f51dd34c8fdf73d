"""Settings that had another name. A config with the old name is refused, with the new one in the error."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

#: New names by old ones; `*` is any variant's name.
RENAMED: Mapping[str, str] = {
    "audit.price_per_hour": "price_per_hour",
    "audit.settle_s": "audit.replica_wait_s",
    "audit.several": "audit.allow_concurrent",
    "push.answer_s": "push.response_timeout_s",
    "variants.*.levers": "variants.*.optimizations",
    "windows.window_tflop": "windows.window_overhead_tflop",
    "work.grace_s": "work.shutdown_grace_s",
    "work.redispatch_s": "work.redispatch_after_s",
    "work.stuck_s": "work.engine_stop_timeout_s",
    "work.upload_s": "work.upload_timeout_s",
}


def refuse_old_names(model: str, given: Any) -> None:
    """Raises ValidationError, titled `model`, with an error at each old name in `given`, the settings as written."""
    errors = [
        InitErrorDetails(type=PydanticCustomError("renamed", "renamed to {new}", {"new": new}), loc=path, input=None)
        for old, new in RENAMED.items()
        for path in _paths(given, old.split("."))
    ]
    if errors:
        raise ValidationError.from_exception_data(model, errors, hide_input=True)


def _paths(given: Any, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every path in `given` that `keys` name."""
    if not keys:
        yield ()
    elif isinstance(given, Mapping):
        for name in given if keys[0] == "*" else given.keys() & {keys[0]}:
            yield from ((name, *path) for path in _paths(given[name], keys[1:]))
