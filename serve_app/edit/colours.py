"""The colours that a photo's numbers stand for.

They are kept as they are, with a profile that says what they are, wherever a profile can: a picture named by code
points (ITU-T H.273) or by EXIF gets the profile that it does not bring. Grey, CMYK and HDR pixels become sRGB.
"""

import io
import struct
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from .containers.source import MAX_ICC_BYTES
from .pictures import DAMAGE, Said, in_mode

_Floats = npt.NDArray[np.float64]
#: CIE 1931 x and y of red, green and blue.
_Primaries = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

_BT709, _BT2020, _P3 = 1, 9, 12
#: ITU-T H.273, table 2: the primaries of pictures; BT.709's are sRGB's.
_PRIMARIES: dict[int, _Primaries] = {
    _BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    _BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    _P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_ADOBE_RGB: _Primaries = ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060))
#: H.273, table 3. SDR video's curves are shown as sRGB's, as browsers do.
_PQ, _HLG = 16, 18
_SDR = {1, 2, 6, 13, 14, 15}

#: CIE xy of D65, and XYZ of D50, the white of profiles (ICC.1:2022, 7.2.16).
_D65, _D50 = (0.3127, 0.3290), (0.9642, 1.0, 0.8249)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

#: ICC parametric curves, function type and parameters: IEC 61966-2-1, and Adobe RGB (1998), 4.3.4.2.
_SRGB_CURVE = (3, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
_ADOBE_CURVE = (0, (563 / 256,))

#: cd/m²: the brightest that is told apart, and white as SDR shows it (ITU-R BT.2408, 2.2).
_HDR_PEAK, _SDR_WHITE = 1000.0, 203.0


def to_rgb(image: Image.Image, said: Said) -> tuple[Image.Image, bytes | None]:
    """RGB pixels, and the profile that describes them; None: sRGB, or unknown.

    A PNG's code points win over its profile (PNG, third edition, 4.3). A profile that is damaged, or of other pixels,
    is left out.
    """
    points = said.code_points
    if points is not None and points.primaries in _PRIMARIES:
        if points.transfer in (_PQ, _HLG):
            transform = _to_srgb(_hdr_profile(points.primaries, points.transfer))
            return (transform.apply(in_mode(image, "RGB")) if transform else in_mode(image, "RGB")), None
        if points.transfer in _SDR:
            return in_mode(image, "RGB"), _sdr_profile(points.primaries)
    icc = said.icc or (_adobe_rgb() if said.exif.is_adobe_rgb else None)
    transform = _to_srgb(icc) if icc else None
    if transform is None:
        return in_mode(image, "RGB"), None
    if transform.input_mode == "RGB" and image.mode != "CMYK":
        return in_mode(image, "RGB"), icc
    if transform.input_mode == image.mode:
        return transform.apply(image), None
    return in_mode(image, "RGB"), None


def _to_srgb(icc: bytes) -> ImageCms.ImageCmsTransform | None:
    """From the profile's pixels to sRGB; None where the profile is unusable or of a colour space no file here has.

    Relative colorimetric with black point compensation, as browsers do.
    """
    if len(icc) > MAX_ICC_BYTES:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        return ImageCms.ImageCmsTransform(
            profile,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except DAMAGE:
        return None


@cache
def _sdr_profile(primaries: int) -> bytes | None:
    names = {_P3: "Display P3", _BT2020: "BT.2020"}
    return _profile(names[primaries], _PRIMARIES[primaries], _parametric(*_SRGB_CURVE)) if primaries in names else None


@cache
def _adobe_rgb() -> bytes:
    return _profile("Compatible with Adobe RGB (1998)", _ADOBE_RGB, _parametric(*_ADOBE_CURVE))


@cache
def _hdr_profile(primaries: int, transfer: int) -> bytes:
    signal = np.linspace(0, 1, 4096)
    light = _tone_mapped(_pq_light(signal) if transfer == _PQ else _hlg_light(signal))
    table = np.round(light * 65535).astype(">u2").tobytes()
    return _profile("HDR", _PRIMARIES[primaries], struct.pack(">4s4xI", b"curv", len(signal)) + table)


def _profile(name: str, primaries: _Primaries, curve: bytes) -> bytes:
    """A display profile of three primaries and one curve (ICC.1:2022, 8.4)."""
    text = [struct.pack(">4s4xII2s2sII", b"mluc", 1, 12, b"en", b"US", 2 * len(t), 28) + t.encode("utf-16-be")
            for t in (name, "CC0")]  # fmt: skip
    adapt = _adaptation()
    columns = (adapt @ _to_xyz(primaries)).T
    tags = {
        b"desc": text[0], b"cprt": text[1], b"wtpt": _xyz(_D50), b"chad": _fixed(b"sf32", *adapt.ravel()),
        b"rXYZ": _xyz(columns[0]), b"gXYZ": _xyz(columns[1]), b"bXYZ": _xyz(columns[2]),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    places, body = {}, b""
    for value in dict.fromkeys(tags.values()):
        places[value] = 128 + 4 + 12 * len(tags) + len(body)
        body += value + bytes(-len(value) % 4)
    table = b"".join(struct.pack(">4sII", tag, places[value], len(value)) for tag, value in tags.items())
    head = struct.pack(
        ">I4xI4s4s4s12x4s28x12s48x", 132 + len(table) + len(body), 0x04400000, b"mntr", b"RGB ", b"XYZ ", b"acsp",
        _xyz(_D50)[8:],
    )  # fmt: skip
    return head + struct.pack(">I", len(tags)) + table + body


def _fixed(kind: bytes, *numbers: float) -> bytes:
    """A tag of numbers in units of 1/65536 (ICC.1:2022, 4.6)."""
    return struct.pack(f">4s4x{len(numbers)}i", kind, *(round(number * 65536) for number in numbers))


def _xyz(xyz: tuple[float, ...] | _Floats) -> bytes:
    return _fixed(b"XYZ ", *xyz)


def _parametric(function: int, parameters: tuple[float, ...]) -> bytes:
    return struct.pack(">4s4xH2x", b"para", function) + _fixed(b"", *parameters)[8:]


def _to_xyz(primaries: _Primaries) -> _Floats:
    """From linear RGB, its white being D65 (SMPTE RP 177)."""
    rows = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return rows * np.linalg.solve(rows, _white())


def _adaptation() -> _Floats:
    """From D65 to D50 (ICC.1:2022, E.3)."""
    scale = (_BRADFORD @ _D50) / (_BRADFORD @ _white())
    adapt: _Floats = np.linalg.inv(_BRADFORD) @ (scale[:, None] * _BRADFORD)
    return adapt


def _white() -> _Floats:
    x, y = _D65
    return np.array([x / y, 1, (1 - x - y) / y])


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128


def _pq_light(signal: _Floats) -> _Floats:
    """cd/m² (ITU-R BT.2100, table 4)."""
    power = signal ** (1 / _M2)
    light: _Floats = 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)
    return light


def _pq_signal(light: _Floats | float) -> _Floats:
    power = np.asarray(light / 10_000) ** _M1
    signal: _Floats = ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
    return signal


def _hlg_light(signal: _Floats) -> _Floats:
    """cd/m² of a display with the peak's brightness (ITU-R BT.2100, table 5), each channel by itself."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    light: _Floats = _HDR_PEAK * scene**1.2
    return light


def _tone_mapped(light: _Floats) -> _Floats:
    """Of SDR's white, 0..1: dark and middle tones as they are, bright ones closer together (ITU-R BT.2390, 5.4.1)."""
    peak = _pq_signal(_HDR_PEAK)
    signal, most = np.minimum(_pq_signal(light) / peak, 1), _pq_signal(_SDR_WHITE) / peak
    knee = 1.5 * most - 0.5
    t = np.maximum(signal - knee, 0) / (1 - knee)
    above = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    mapped = np.where(signal < knee, signal, above)
    return np.clip(_pq_light(mapped * peak) / _SDR_WHITE, 0, 1)
