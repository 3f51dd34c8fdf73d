"""Looks at a LoRA's file for `apart`: `python -m serve_app.engine.lora.check`, a JSON object in and one out."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath

from ...errors import LoraRefused, WrongModel
from ...models import LoraFacts, Variant
from ..weights.fetch import base_here
from . import architecture
from .read import look


def check(file: Path, models: Sequence[Variant], *, alpha: float | None, max_rank: int, cache: Path) -> LoraFacts:
    """For the first of the models that it fits. Raises LoraRefused, by its kind; of WrongModel one that says why it
    fits none of them."""
    reasons: dict[tuple[str, Path | None], str] = {}
    for model in models:
        base = base_here(model, cache)
        if (model.family, base) in reasons:
            continue
        try:
            return look(file, model.family, architecture.described(model.family, base), alpha=alpha, max_rank=max_rank)
        except WrongModel as e:
            # Without the folders of this machine.
            reasons[model.family, base] = f"{PurePath(model.base or model.family).name}: {e.message}"
    raise WrongModel("the LoRA fits no model that is served. " + "; ".join(reasons.values()))


def main() -> None:
    # Libraries print, too: stdout holds the answer alone.
    out, sys.stdout = sys.stdout, sys.stderr
    asked = json.load(sys.stdin)
    try:
        facts = check(
            Path(asked["file"]),
            [Variant.model_validate(model) for model in asked["models"]],
            alpha=asked["alpha"],
            max_rank=asked["max_rank"],
            cache=Path(asked["cache"]),
        )
    except LoraRefused as e:
        answer = {"refused": {"code": e.code, "message": e.message}}
    else:
        answer = {"facts": facts.model_dump(mode="json")}
    # At its end Python flushes what `sys.stdout` is by then.
    print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
