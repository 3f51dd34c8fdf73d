"""LPIPS against the same network written a second time, in numpy alone, on random weights."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.audit.lpips import ALEXNET, HEADS, Lpips, load
from serve_app.errors import CorruptWeights, UnknownWeights, WeightsError
from serve_app.images import Pixels

from .pictures import noise

Array = npt.NDArray[np.float64]
#: (channels out, channels in, kernel, stride, padding), and whether pooling comes before.
LAYERS = {
    0: ((64, 3, 11, 4, 2), False),
    3: ((192, 64, 5, 1, 2), True),
    6: ((384, 192, 3, 1, 1), True),
    8: ((256, 384, 3, 1, 1), False),
    10: ((256, 256, 3, 1, 1), False),
}


def random_weights() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    alexnet: dict[str, torch.Tensor] = {"classifier.1.weight": torch.zeros(1)}
    heads: dict[str, torch.Tensor] = {}
    for index, (number, ((out, into, kernel, _, _), _)) in enumerate(LAYERS.items()):
        alexnet[f"features.{number}.weight"] = torch.randn(out, into, kernel, kernel) / (into * kernel**2) ** 0.5
        alexnet[f"features.{number}.bias"] = torch.randn(out) / 10
        heads[f"lin{index}.model.1.weight"] = torch.rand(1, out, 1, 1)
    return alexnet, heads


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("weights")
    (cache / "lpips").mkdir()
    for name, weights in zip((ALEXNET, HEADS), random_weights(), strict=True):
        torch.save(weights, cache / "lpips" / name)
    return cache


@pytest.fixture(scope="module")
def lpips(cache: Path) -> Lpips:
    return load(cache)


def windows(pixels: Array, size: int, stride: int) -> Array:
    """`[channels, rows, columns, size, size]`."""
    return np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(1, 2))[:, ::stride, ::stride]


def by_numpy(picture: Pixels, other: Pixels) -> float:
    alexnet, heads = random_weights()
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    features: list[Array] = [((p / 255 * 2 - 1 - shift) / scale).transpose(2, 0, 1) for p in (picture, other)]
    total = 0.0
    for index, (number, ((_, _, kernel, stride, padding), is_pooled)) in enumerate(LAYERS.items()):
        weight, bias = (alexnet[f"features.{number}.{name}"].double().numpy() for name in ("weight", "bias"))
        for which, pixels in enumerate(features):
            pooled = windows(pixels, 3, 2).max(axis=(3, 4)) if is_pooled else pixels
            padded = np.pad(pooled, ((0, 0), (padding, padding), (padding, padding)))
            answers = np.tensordot(weight, windows(padded, kernel, stride), axes=([1, 2, 3], [0, 3, 4]))
            features[which] = np.maximum(answers + bias[:, None, None], 0)
        a, b = (f / (np.sqrt((f**2).sum(axis=0)) + 1e-10) for f in features)
        head = heads[f"lin{index}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        total += float((head * (a - b) ** 2).sum(axis=0).mean())
    return total


@pytest.mark.parametrize("size", [(64, 64), (97, 70)])
def test_the_network_is_the_one_written_a_second_time(lpips: Lpips, size: tuple[int, int]) -> None:
    picture, other = noise(*size, seed=1), noise(*size, seed=2)
    assert lpips(picture, other) == pytest.approx(by_numpy(picture, other), rel=1e-4)


def test_equal_pictures_are_not_apart(lpips: Lpips) -> None:
    assert lpips(noise(80, 80), noise(80, 80)) == 0


def test_the_distance_is_the_same_both_ways_and_grows(lpips: Lpips) -> None:
    picture = noise(80, 80)
    near, far = picture + np.uint8(2), picture // 2
    assert 0 < lpips(picture, near) < lpips(picture, far)
    assert lpips(picture, far) == lpips(far, picture)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (63, 64)])
def test_the_smallest_boxes_are_scaled_up(lpips: Lpips, size: tuple[int, int]) -> None:
    assert lpips(noise(*size), 255 - noise(*size)) > 0


@pytest.mark.parametrize(
    ("there", "said"), [((), f"{ALEXNET} and {HEADS} are not"), ((ALEXNET,), f"{HEADS} is not"), ((HEADS,), ALEXNET)]
)
def test_absent_files_are_named(tmp_path: Path, there: tuple[str, ...], said: str) -> None:
    (tmp_path / "lpips").mkdir()
    for name in there:
        (tmp_path / "lpips" / name).touch()
    with pytest.raises(UnknownWeights, match=f"LPIPS was not measured: {said}"):
        load(tmp_path)


def test_without_its_files_torch_is_not_imported(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, benchmarks.audit.metrics\n"
        "from benchmarks.audit.lpips import load\n"
        "from serve_app.errors import UnknownWeights\n"
        f"try: load(pathlib.Path({str(tmp_path)!r}))\n"
        "except UnknownWeights: print('torch' in sys.modules)"
    )
    got = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "False"


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noisy(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:2000] = np.random.default_rng(0).bytes(1900)
    path.write_bytes(data)


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path)


@pytest.mark.parametrize("name", [ALEXNET, HEADS])
@pytest.mark.parametrize(
    "damage",
    [
        halved,
        noisy,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"<html>not found</html>"),
        rewritten(lambda weights: list(weights.values())),
        rewritten(lambda weights: weights | {list(weights)[-1]: torch.zeros(3)}),
        rewritten(lambda weights: dict(list(weights.items())[:-1])),
        rewritten(lambda weights: weights | {list(weights)[-1]: "zeros"}),
        rewritten(lambda weights: weights | {list(weights)[-1]: list(weights.values())[-1] * torch.nan}),
    ],
    ids=["halved", "noisy", "empty", "a page", "a list", "another shape", "one less", "no tensor", "not a number"],
)
def test_damaged_files_are_refused(cache: Path, tmp_path: Path, name: str, damage: Callable[[Path], Any]) -> None:
    (tmp_path / "lpips").mkdir()
    for each in (ALEXNET, HEADS):
        (tmp_path / "lpips" / each).write_bytes((cache / "lpips" / each).read_bytes())
    damage(tmp_path / "lpips" / name)
    with pytest.raises(CorruptWeights, match=rf"LPIPS was not measured: .*{name} ") as caught:
        load(tmp_path)
    assert isinstance(caught.value, WeightsError)


class Touching:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_a_pickle_that_runs_code_runs_none(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "lpips").mkdir()
    (tmp_path / "lpips" / ALEXNET).write_bytes((cache / "lpips" / ALEXNET).read_bytes())
    torch.save({"lin0.model.1.weight": Touching(tmp_path / "ran")}, tmp_path / "lpips" / HEADS)
    with pytest.raises(CorruptWeights):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
