"""Whether torch.compile would pay for a variant, done as `optimizations.compile` does it: one forward, judged."""

import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from deployments.replica import open_engine
from serve_app.audit.record import CompileVerdict
from serve_app.engine import Engine
from serve_app.models import EditRequest
from serve_app.settings import Settings

log = logging.getLogger(__name__)

#: Gain up to which a difference of two medians is taken for noise.
MIN_GAIN = 1.05
#: Largest difference of the outputs, relative to the largest output. Fused kernels round at other places: a block of
#: FLUX.1's width differs by 0.4 to 0.7% in bfloat16, whose own steps are 0.4%.
MAX_DIFFERENCE = 0.05
#: Of an error's text.
_MAX_CHARS = 300
#: Of an absolute path; a URL is none.
_FOLDERS = re.compile(r"(?<![\w/:.])/(?:[\w.+-]+/)*(?=\w)")


def verdict(name: str, settings: Settings, request: EditRequest) -> CompileVerdict:
    """torch.compile against eager for the variant `name`, on the first forward of the request's first window.

    Loads the variant into this process, which should be one of its own with the device that the variant wants, and
    compiles anew. Blocks for as long as that takes. Never raises for what fails: the verdict says so.
    """
    variant = settings.variant(name)
    if not variant.edits_by_transformer:
        return CompileVerdict(variant=name, viable=False, verdict=f"the {variant.family} family has nothing to compile")
    known: dict[str, Any] = {}
    try:
        engine = open_engine(name, _eager(name, settings, request))
        try:
            # As they become known.
            for figures in _measured(engine, request):
                known |= figures
        finally:
            engine.close()
    except Exception as e:
        # The loaders and compilers of torch's world raise anything; all of it is what is in the way.
        what = "torch.compile fails" if known else "it could not be loaded and run"
        extra = {"action": "compile_not_measured", "variant": name}
        log.warning("torch.compile was not measured for %s: %s", name, what, exc_info=e, extra=extra)
        # The first line of what it says, without the machine's folders.
        text = str(e).strip().partition("\n")[0] or type(e).__name__
        known |= {"viable": False, "verdict": f"{what}: {_FOLDERS.sub('', text)[:_MAX_CHARS]}"}
    return CompileVerdict(variant=name, **known)


def _measured(engine: Engine, request: EditRequest) -> Iterator[Mapping[str, Any]]:
    """Fields of a CompileVerdict."""
    # Variants with nothing to compile run without torch.
    from torch._inductor.utils import fresh_cache

    from .forwards import Forward

    forward = Forward(engine, request)  # type: ignore[arg-type]  # of this family
    forward.lap()
    eager_s, expected = forward.lap()
    yield {"eager_s": eager_s}
    explained = forward.explained()
    yield {"graphs": explained.graphs, "breaks": explained.breaks, "break_reasons": explained.reasons}
    # Nothing that was compiled before is used, and nothing is kept. After a failure `fresh_cache` leaves its folder.
    with tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):
        forward.compile()
        first_s, output = forward.lap()
        eager_s, compiled_s = forward.by_turns()
    yield judged(
        eager_s=eager_s,
        compiled_s=compiled_s,
        compile_s=max(0.0, first_s - compiled_s),
        forwards=forward.per_edit,
        difference=(output.double() - expected.double()).abs().max().item(),
        largest=expected.abs().max().item(),
    )


def judged(
    *, eager_s: float, compiled_s: float, compile_s: float, forwards: int, difference: float, largest: float
) -> Mapping[str, Any]:
    """The verdict on compiled blocks, and its figures, as fields of a CompileVerdict.

    `forwards` of an edit, of `eager_s` or `compiled_s` each; `difference` and `largest` are absolute, of the outputs.
    """
    gain, saved_s = eager_s / compiled_s, (eager_s - compiled_s) * forwards
    obstacle = _obstacle(gain, difference, largest)
    return {
        "viable": obstacle is None,
        "verdict": obstacle or "proceed",
        "eager_s": eager_s,
        "compiled_s": compiled_s,
        "gain": gain,
        "compile_s": compile_s,
        "max_difference": difference if math.isfinite(difference) else None,
        "pays_back_after": max(1, math.ceil(compile_s / saved_s)) if saved_s > 0 else None,
    }


def _obstacle(gain: float, difference: float, largest: float) -> str | None:
    if not math.isfinite(difference):
        return "eager or compiled, the output is not finite"
    if difference > MAX_DIFFERENCE * largest:
        relative = difference / largest if largest else math.inf
        return (
            f"the outputs differ by {relative:.1%} of the largest, more than the {MAX_DIFFERENCE:.0%} that rounding may"
        )
    if gain < MIN_GAIN:
        return f"a compiled step is {gain:.2f} times as fast as an eager one; below {MIN_GAIN} that may be noise"
    return None


def _eager(name: str, settings: Settings, request: EditRequest) -> Settings:
    """The variant as served, but for one job, each step computed, nothing compiled; warmed up for the first window."""
    served, box = settings.variants[name], request.windows[0]
    optimizations = served.optimizations.model_copy(update={"compile": False, "step_cache": None})
    variants = {**settings.variants, name: served.model_copy(update={"optimizations": optimizations})}
    windows = settings.windows.model_copy(update={"buckets": ((box.width, box.height),)})
    return settings.model_copy(update={"variants": variants, "windows": windows})
