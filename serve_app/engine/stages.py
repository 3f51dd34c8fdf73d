"""How long each stage of a window's painting took."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import numpy as np

STAGES = ("prepare_s", "denoise_s", "decode_s")


def split(began_s: float, steps_s: Sequence[float], ended_s: float) -> dict[str, float]:
    """Seconds of a window's STAGES, from the moments at which it began, each of its steps ended, and it was painted.

    The first step is taken to be as long as the median of the others; what comes before it is preparing. Where there is
    one step, that cannot be told from preparing, and both are denoising; where there is none, everything is.
    """
    steps_s = steps_s or [ended_s]
    step_s = median(after - before for before, after in pairwise(steps_s)) if len(steps_s) > 1 else np.inf
    prepared_s = max(began_s, steps_s[0] - step_s)
    return dict(zip(STAGES, (prepared_s - began_s, steps_s[-1] - prepared_s, ended_s - steps_s[-1]), strict=True))
