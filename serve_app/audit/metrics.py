"""What can be measured of a picture: against the reference variant's, against the photo, and along the seam; and, by
`serve_app.edit.quality`, whether the object is gone.

Each metric is a pure function of `Pictures`, and None where it cannot be had. A new one is a function, a line of
`METRICS`, and a field of `Compared` with its line in `BETTER`. All lengths are photo pixels and do not grow with the
photo, because the feather does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps

import cv2
import numpy as np
import numpy.typing as npt
from skimage.color import deltaE_cie76, rgb2gray, rgb2lab
from skimage.filters import scharr_h, scharr_v
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ..edit import quality
from ..edit.paste import grow
from ..edit.windows import bounding_box, grown
from ..models import Pixels
from .record import Compared

#: PSNR of equal pictures is infinite, which JSON cannot say, and would swallow every mean. One step of one channel in
#: 150,000 pixels is 105 dB.
MAX_PSNR_DB = 100.0
#: SSIM's window is so wide, as Wang et al. have it.
_SSIM_PX = 11
#: The seam's band reaches so far to both sides of where blending happens: a gradient sees its neighbours.
EDGE_PX = 2
#: Width of the bands that the seam is compared with.
BAND_PX = 16
#: One grey level a pixel, of 0..1.
_GREY_LEVEL = 1 / 255


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """A cell's picture and what it is measured against. uint8 of one size, as in `images.Pixels`."""

    picture: Pixels
    photo: Pixels
    #: Not 0 where the photo was edited.
    mask: Pixels
    #: The reference variant's picture; None: there is none, or this is it.
    reference: Pixels | None
    #: As it was pasted with.
    feather_px: int
    #: The mask before it grew; None: it did not.
    drawn: Pixels | None = None

    @cached_property
    def inside(self) -> npt.NDArray[np.bool_]:
        return self.mask > 0

    def around(self, px: int) -> tuple[slice, slice] | None:
        """Index of the mask's box and `px` pixels round it, as far as the photo goes. None for an empty mask."""
        box = bounding_box(self.mask)
        return None if box is None else grown(box, px, self.mask.shape).slices

    @cached_property
    def edit(self) -> quality.Edit | None:
        """None for an empty mask. By the mask that was painted: beyond it are the photo's own surroundings."""
        return quality.cut(self.photo, self.picture, self.mask)

    @cached_property
    def seam(self) -> "Seam | None":
        """None for an empty mask."""
        near = self.around(self.feather_px + EDGE_PX + BAND_PX + 1)
        return None if near is None else Seam(self.picture[near], self.inside[near], self.feather_px)


class Seam:
    """The picture round the mask's edge, in bands by the Euclidean distance from it. The photo's border is no edge."""

    def __init__(self, picture: Pixels, inside: npt.NDArray[np.bool_], feather_px: int) -> None:
        self.picture = picture
        outward, inward = _distance(~inside), _distance(inside)
        blended = feather_px + EDGE_PX
        #: Where the picture and the photo are blended, and `EDGE_PX` to both sides.
        self.band = ((outward > 0) & (outward <= blended)) | ((inward > 0) & (inward <= EDGE_PX))
        #: The `BAND_PX` pixels beyond, which are the photo's own.
        self.outer = (outward > blended) & (outward <= blended + BAND_PX)
        #: The `BAND_PX` pixels within the mask's edge.
        self.inner = (inward > 0) & (inward <= BAND_PX)
        # Without an edge every distance is a very large one.
        self.is_measurable = bool(self.outer.any() and self.inner.any())


def psnr_db(pictures: Pictures) -> float | None:
    """Peak signal-to-noise ratio over the mask's pixels and all channels, in dB, at most `MAX_PSNR_DB`.

    Source: scikit-image's `peak_signal_noise_ratio`, of 10 log10(255² / mean squared error).
    """
    pair = _masked(pictures)
    if pair is None:
        return None
    picture, reference = pair
    if np.array_equal(picture, reference):
        return MAX_PSNR_DB
    return min(float(peak_signal_noise_ratio(reference, picture, data_range=255)), MAX_PSNR_DB)


def ssim(pictures: Pictures) -> float | None:
    """Structural similarity, -1..1, each channel by itself, mean of its map over the mask. None where a side of the
    photo is shorter than its window.

    Source: Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP, 2004,
    as scikit-image's `structural_similarity` computes it: Gaussian window of 11 pixels and sigma 1.5.
    """
    # Twice the window's reach: at the photo's border, where the box grows to one side only, a window must still fit.
    near = pictures.around(_SSIM_PX - 1)
    if pictures.reference is None or near is None or min(pictures.mask.shape) < _SSIM_PX:
        return None
    _, similarity = structural_similarity(
        pictures.reference[near],
        pictures.picture[near],
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(similarity[pictures.inside[near]].mean())


def mae(pictures: Pictures) -> float | None:
    """Mean absolute difference over the mask's pixels and all channels, 0..255. Source: its definition."""
    pair = _masked(pictures)
    return None if pair is None else float(cv2.absdiff(*pair).mean())


def outside_max(pictures: Pictures) -> int:
    """Largest absolute difference to the photo, 0..255, beyond the mask dilated by the feather: `paste` promises 0.
    Also 0 where nothing is beyond it. Source: the definition."""
    difference = cv2.absdiff(pictures.picture, pictures.photo)
    return int(difference[grow(pictures.mask, pictures.feather_px) == 0].max(initial=0))


def seam_gradient_ratio(pictures: Pictures) -> float | None:
    """Mean gradient magnitude of luma along the seam, by that of the photo just beyond it. 1: the seam is as busy as
    what is round it; above, it shows as an edge; below, as a smear. None where the mask has no edge, or nothing lies
    beyond it.

    A mean below one grey level a pixel, which nobody sees, counts as one, so that a clear sky divides nothing by 0.
    Source: the visibility of a seam as a cost in the gradient domain, A. Levin, A. Zomet, S. Peleg and Y. Weiss,
    "Seamless image stitching in the gradient domain", ECCV 2004; as a ratio of bands, this project's. Gradients:
    H. Scharr's operator, as in scikit-image; luma: scikit-image's `rgb2gray`.
    """
    seam = pictures.seam
    if seam is None or not seam.is_measurable:
        return None
    luma = rgb2gray(seam.picture)
    # Halved: scikit-image's operator takes the difference over two pixels.
    gradient = np.hypot(scharr_h(luma), scharr_v(luma)) / 2
    along, beyond = (max(float(gradient[band].mean()), _GREY_LEVEL) for band in (seam.band, seam.outer))
    return along / beyond


def seam_colour_shift(pictures: Pictures) -> float | None:
    """Distance in CIELAB (D65) between the mean colours of a band inside the mask's edge and one beyond the feather;
    about 2.3 is just noticeable. None as in `seam_gradient_ratio`.

    Source: CIE 1976 colour difference, scikit-image's `deltaE_cie76`; of what is noticeable: M. Mahy, L. Van Eycken
    and A. Oosterlinck, "Evaluation of uniform color spaces developed after the adoption of CIELAB and CIELUV", 1994.
    """
    seam = pictures.seam
    if seam is None or not seam.is_measurable:
        return None
    inner, outer = (rgb2lab(seam.picture[band]).mean(axis=0) for band in (seam.inner, seam.outer))
    return float(deltaE_cie76(inner, outer))


def put_back(pictures: Pictures) -> float | None:
    """As an edit is checked: in the mask as it was drawn. Source: `quality.put_back`."""
    edit = quality.cut(pictures.photo, pictures.picture, pictures.mask if pictures.drawn is None else pictures.drawn)
    return None if edit is None else quality.put_back(edit)


def of_edit(measure: Callable[[quality.Edit], float | None]) -> Callable[[Pictures], float | None]:
    @wraps(measure)
    def of(pictures: Pictures) -> float | None:
        return None if pictures.edit is None else measure(pictures.edit)

    return of


@dataclass(frozen=True, slots=True)
class Metric:
    #: The field of `Compared`.
    name: str
    #: Heads its column.
    title: str
    #: Empty where it has none.
    unit: str
    #: Worth showing.
    decimals: int
    measure: Callable[[Pictures], float | None]
    #: What it says, in a line for people.
    words: str


METRICS = (
    Metric("psnr_db", "PSNR", "dB", 1, psnr_db, "Closeness to the reference inside the mask; 100 is equal."),
    Metric("ssim", "SSIM", "", 4, ssim, "Likeness of structure to the reference inside the mask; 1 is equal."),
    Metric("mae", "MAE", "of 255", 2, mae, "Mean difference to the reference inside the mask; 0 is equal."),
    Metric("outside_max", "Outside", "of 255", 0, outside_max, "Largest change where nothing may change; must be 0."),
    Metric(
        "seam_gradient_ratio", "Seam edge", "", 2, seam_gradient_ratio,
        "Gradients along the seam by those beyond it; 1 is unnoticeable, more an edge, less a smear.",
    ),
    Metric(
        "seam_colour_shift", "Seam colour", "ΔE*ab", 1, seam_colour_shift,
        "Colour inside the mask's edge against that outside; about 2.3 is just noticeable.",
    ),
    Metric(
        "put_back", "Put back", "", 2, put_back,
        f"How much of the object is there again; 1 is all, above {quality.PUT_BACK:g} it is suspect.",
    ),
    Metric(
        "contrast", "Contrast", "", 2, of_edit(quality.contrast),
        f"The mask's colour against its surroundings'; above {quality.CONTRAST:g} it stands out.",
    ),
    Metric(
        "busy", "Busy", "", 2, of_edit(quality.busy),
        f"Fine detail inside the mask against its surroundings', |log2|; above {quality.BUSY:g} a smear, or noise.",
    ),
    Metric(
        "cast", "Cast", "ΔE*ab", 1, of_edit(quality.cast),
        f"Colours inside the mask against a smooth fill's; above {quality.CAST:g} another thing, or a cast.",
    ),
)  # fmt: skip


def compare(
    picture: Pixels,
    photo: Pixels,
    mask: Pixels,
    *,
    reference: Pixels | None,
    feather_px: int,
    drawn: Pixels | None = None,
) -> Compared:
    """All of `METRICS`. Pictures are uint8 `[height, width, 3]`, masks `[height, width]`, all the photo's size; `drawn`
    as in `Pictures`.

    Raises ValueError where a size differs.
    """
    for name, other in {"picture": picture, "mask": mask, "drawn": drawn, "reference": reference}.items():
        if other is not None and other.shape[:2] != photo.shape[:2]:
            raise ValueError(f"the {name} is {other.shape[:2]} pixels and the photo {photo.shape[:2]}")
    pictures = Pictures(
        picture=picture, photo=photo, mask=mask, reference=reference, feather_px=feather_px, drawn=drawn
    )
    return Compared.model_validate({metric.name: metric.measure(pictures) for metric in METRICS})


def _masked(pictures: Pictures) -> tuple[Pixels, Pixels] | None:
    """The mask's pixels of the picture and the reference, `[pixels, 3]`; None where there are none."""
    if pictures.reference is None or not pictures.inside.any():
        return None
    return pictures.picture[pictures.inside], pictures.reference[pictures.inside]


def _distance(of: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Of each pixel of `of` to the nearest other one; 0 for those; very large everywhere where there is none."""
    return np.asarray(cv2.distanceTransform(of.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)
