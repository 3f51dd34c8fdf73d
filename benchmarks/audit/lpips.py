"""LPIPS, a learned perceptual distance, where its two published files are in the weights cache.

Source: R. Zhang, P. Isola, A. Efros, E. Shechtman and O. Wang, "The unreasonable effectiveness of deep features as a
perceptual metric", CVPR 2018; version 0.1 with AlexNet. The authors' package `lpips` gives the same numbers, and needs
torchvision. Without the files torch is not imported.
"""

from collections.abc import Callable
from pathlib import Path

from serve_app.errors import UnknownWeights
from serve_app.images import Pixels

#: The distance of two pictures, uint8 `[height, width, 3]` of one size: 0 for equal ones, seldom more than 1.
Lpips = Callable[[Pixels, Pixels], float]

#: In `{weights.cache}/lpips/`: torchvision's AlexNet, and the linear heads (`weights/v0.1/alex.pth` of the package).
ALEXNET, HEADS = "alexnet-owt-7be5be79.pth", "alex.pth"


def load(cache: Path) -> Lpips:
    """LPIPS with the weights in the folder `lpips` of `cache`.

    Raises UnknownWeights where a file is not there, and CorruptWeights where one is not what it should be; both say in
    a sentence why LPIPS was not measured.
    """
    folder = cache / "lpips"
    absent = [name for name in (ALEXNET, HEADS) if not (folder / name).is_file()]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise UnknownWeights(f"LPIPS was not measured: {' and '.join(absent)} {verb} not in {folder}")
    from .alexnet import Distance  # torch takes seconds to import

    return Distance.load(folder / ALEXNET, folder / HEADS)
