"""Whether an edit took out what it was to take out: four measures that need no weights and no picture of the truth.

Each is a pure function of an `Edit`, and None where it cannot be told. None of them sees whether what was painted is
right for the place. What they find was measured on drawn failures (`benchmarks/quality.py`, with its table in
docs/audit.md), not on a model's pictures.
"""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import numpy.typing as npt

from ..models import Pixels
from ..settings import QualitySettings
from .paste import grow
from .windows import bounding_box, grown

_Floats = npt.NDArray[np.float32]
_Bools = npt.NDArray[np.bool_]

#: Longest side of what is measured: a larger cut is shrunk, so that no photo takes longer than some tens of ms.
MAX_SIDE_PX = 512
#: Surroundings of the mask that are looked at: pixels, and a share of its longest side, so that they are wide enough
#: where the cut is shrunk, too.
_AROUND_PX, _AROUND = 48, 1 / 8
#: Fewer masked pixels say nothing.
_MIN_PX = 40
#: The soft rim of what is taken out, beyond the mask: it would bleed into the fill.
_RIM_PX = 4
#: Radius that a pixel of the fill is made from. With 3 it accuses more good edits, with 8 it takes twice as long.
_FILL_PX = 5
#: Root mean square difference to the fill, in grey levels, below which there is nothing to be seen.
_VISIBLE = 3.0
#: Bands beyond the mask's edge that its inside is compared with: of colours, and of fine detail.
_COLOUR_RING_PX, _DETAIL_RING_PX = (2, 12), (3, 19)
#: Side of the cells that `contrast` looks at, and the pixels of mask and of ring that each must have.
_CELL_PX, _CELL_MASK_PX, _CELL_RING_PX = 32, 40, 80
#: A colour difference that is just noticeable, CIE76. Source: Mahy et al., 1994.
_JUST_NOTICEABLE = 2.3

#: Above which a measure calls an edit suspect. The first lies between the good fills and the faint leashes of the
#: benchmark, which do not meet; the others are 95th percentiles of good fills.
PUT_BACK, CONTRAST, BUSY, CAST = QualitySettings().put_back, 0.82, 0.38, 23.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """A photo and what an edit made of it, cut round the mask. uint8 `[height, width, 3]`."""

    photo: Pixels
    result: Pixels
    #: `[height, width]`. Not empty.
    inside: _Bools

    @cached_property
    def fill(self) -> Pixels | None:
        """The photo with its surroundings continued smoothly into the mask. None where there are no surroundings.
        Source: A. Telea, "An image inpainting technique", J. Graphics Tools 9(1), 2004."""
        hole = grow(self.inside.view(np.uint8), _RIM_PX)
        if hole.all():
            return None
        return np.asarray(cv2.inpaint(self.photo, hole, _FILL_PX, cv2.INPAINT_TELEA), np.uint8)

    @cached_property
    def outward(self) -> _Floats:
        """Pixels from the mask, 0 inside it."""
        return np.asarray(cv2.distanceTransform((~self.inside).view(np.uint8), cv2.DIST_L2, 5), np.float32)

    def ring(self, band: tuple[int, int]) -> _Bools:
        return np.asarray((self.outward > band[0]) & (self.outward <= band[1]))


def cut(photo: Pixels, result: Pixels, mask: npt.NDArray[np.generic]) -> Edit | None:
    """The part that is measured; all of one size, the mask not 0 inside. None for an empty mask.

    For `put_back` give the mask as the user drew it: in one that was grown, the photo's own surroundings would count as
    put back. For the others the one that was painted, whose ring is the photo's own.
    """
    inside = np.asarray(mask != 0)
    box = bounding_box(inside.view(np.uint8))
    if box is None:
        return None
    around_px = max(_AROUND_PX, round(_AROUND * max(box.width, box.height)))
    near = grown(box, around_px, inside.shape).slices
    photo, result, inside = photo[near], result[near], inside[near]
    height, width = inside.shape
    scale = MAX_SIDE_PX / max(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        photo, result = (cv2.resize(of, size, interpolation=cv2.INTER_AREA) for of in (photo, result))
        # Of 10,000 px a side, the most that a photo may have, a pixel that is shrunk among 380 others still counts.
        inside = cv2.resize(inside.view(np.uint8) * np.uint8(255), size, interpolation=cv2.INTER_AREA) > 0
    return Edit(photo=np.ascontiguousarray(photo), result=np.ascontiguousarray(result), inside=inside.copy())


def put_back(edit: Edit) -> float | None:
    """Correlation, inside the mask, of photo minus fill with result minus fill, -1..1: 1 where the object is there
    again, however faint; about 0 where something else is, or nothing.

    None where the mask is too small, has no surroundings, or the photo shows nothing there that a fill would not. A
    result that is its fill, but for less than anyone sees, has put nothing back. Source: Pearson's correlation without
    the means, with a floor; this project's. Limits: what runs through the mask in the photo and in a good fill alike,
    a horizon or a wall's edge, counts as put back; an object that is painted in another colour does not.
    """
    if edit.fill is None or np.count_nonzero(edit.inside) < _MIN_PX:
        return None
    fill = edit.fill[edit.inside].astype(np.float32).ravel()
    was, now = (of[edit.inside].astype(np.float32).ravel() - fill for of in (edit.photo, edit.result))
    floor = _VISIBLE * float(np.sqrt(fill.size))
    was_there, is_there = float(np.linalg.norm(was)), float(np.linalg.norm(now))
    return float(was @ now) / (was_there * max(is_there, floor)) if was_there > floor else None


def contrast(edit: Edit) -> float | None:
    """How far the mask's mean colour is from what its surroundings would continue as, in units of how much those differ
    among themselves plus what is just noticeable: CIELAB, 0 or more; median over cells of 32 px.

    A plane is fitted to the ring's colours in each cell, so that a gradient of the place is no contrast. None where no
    cell has enough of mask and ring: masks wider than a cell are looked at along their edges only. Source: this
    project's. Limits: a mask that follows a real thing's outline, such as a shadow's, has contrast with the truth, too.
    """
    lab, ring = _lab(edit.result), edit.ring(_COLOUR_RING_PX)
    found = []
    height, width = edit.inside.shape
    for top in range(0, height, _CELL_PX):
        for left in range(0, width, _CELL_PX):
            cell = np.s_[top : top + _CELL_PX, left : left + _CELL_PX]
            if edit.inside[cell].sum() >= _CELL_MASK_PX and ring[cell].sum() >= _CELL_RING_PX:
                found.append(_cell_contrast(lab[cell], edit.inside[cell], ring[cell]))
    return float(np.median(found)) if found else None


def busy(edit: Edit) -> float | None:
    """How much finer or smoother the mask is than its ring: |log2| of mean fine detail inside by that in the ring, both
    at least a grey level. 0 is alike, 1 is twice or half.

    None where the mask is too small or has no ring. Source: the Gaussian high-pass, sigma 1.5 px; as a ratio of bands
    this project's. Limits: a busy place beside a plain one counts, too; blur, smear and noise are not told apart.
    """
    ring = edit.ring(_DETAIL_RING_PX)
    if np.count_nonzero(edit.inside) < _MIN_PX or not ring.any():
        return None
    grey = cv2.cvtColor(edit.result, cv2.COLOR_RGB2GRAY).astype(np.float32)
    detail = np.abs(grey - cv2.GaussianBlur(grey, (0, 0), 1.5))
    within, beyond = (float(detail[of].mean()) + 1 for of in (edit.inside, ring))
    return float(abs(np.log2(within / beyond)))


def cast(edit: Edit) -> float | None:
    """The 90th percentile, inside the mask, of the low-pass CIELAB distance between result and fill; about 2.3 is just
    noticeable, but a good fill of a busy place has several times that.

    None where the mask is too small or has no surroundings. Source: CIE 1976 colour difference after a Gaussian of
    sigma 4 px; this project's. Limits: of wide masks the fill is no guess at what belongs there.
    """
    if edit.fill is None or np.count_nonzero(edit.inside) < _MIN_PX:
        return None
    difference = cv2.GaussianBlur(_lab(edit.result) - _lab(edit.fill), (0, 0), 4)
    return float(np.percentile(np.linalg.norm(difference, axis=-1)[edit.inside], 90))


def _cell_contrast(lab: _Floats, inside: _Bools, ring: _Bools) -> float:
    def at(pixels: _Bools) -> _Floats:
        down, across = np.nonzero(pixels)
        return np.stack([np.ones_like(across), across, down], axis=1).astype(np.float32)

    plane, *_ = np.linalg.lstsq(at(ring), lab[ring], rcond=None)
    spread = np.linalg.norm((lab[ring] - at(ring) @ plane).std(axis=0))
    offset = lab[inside].mean(axis=0) - (at(inside) @ plane).mean(axis=0)
    return float(np.linalg.norm(offset) / (_JUST_NOTICEABLE + spread))


def _lab(pixels: Pixels) -> _Floats:
    return np.asarray(cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), np.float32)
