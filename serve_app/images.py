"""Bytes to pixels and back."""

import numpy as np
import numpy.typing as npt

#: uint8; `[height, width, 3]` RGB for photos, `[height, width]` for masks.
Pixels = npt.NDArray[np.uint8]
