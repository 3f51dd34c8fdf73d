"""From a decoder's numbers to pixels."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BlankImage
from ..models import Pixels


def rounded(image: npt.NDArray[Any]) -> Pixels:
    """Pixels of `[height, width, 3]`, where 0 is black and 1 is white; what lies beyond is clipped.

    Raises BlankImage where some numbers are not finite, and where all pixels have one colour.
    """
    if lost := int(np.count_nonzero(~np.isfinite(image))):
        raise BlankImage(
            f"{lost} of the picture's {image.size} values are not finite numbers: choose another scheduler or a lower "
            "guidance scale; where every picture fails, the model's VAE needs `force_upcast` in its config"
        )
    pixels = np.asarray(np.rint(np.clip(image, 0, 1) * 255), np.uint8)
    if (pixels == pixels[0, 0]).all():
        raise BlankImage(
            f"every pixel of the picture has the colour {tuple(pixels[0, 0].tolist())}: choose another seed, or more "
            "steps; where every picture fails, the weights or the config of the model's VAE are not its own"
        )
    return pixels
