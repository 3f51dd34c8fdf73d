"""What `kubectl kustomize` makes of a folder, and the plain files of k8s/secrets."""

import shutil
import subprocess
from copy import deepcopy
from functools import cache
from pathlib import Path

import yaml

from tests.absent import KUBECTL, absent

from .objects import Objects

#: Folders that kustomize renders.
FOLDERS = tuple(sorted(file.parent for file in Path("k8s").rglob("kustomization.yaml")))
OVERLAYS = tuple(folder for folder in FOLDERS if folder.parent.name == "overlays")
#: What stands beside an overlay.
BESIDE = tuple(Path("k8s") / name for name in ("audit", "monitoring", "gcp", "gcp/push"))
SECRETS = tuple(sorted(Path("k8s/secrets").glob("*.yaml")))


def render(folder: Path) -> Objects:
    """A folder's objects, which the caller may change. Without kubectl the test is skipped, or fails in CI."""
    return deepcopy(_rendered(folder))


def world(overlay: Path) -> Objects:
    """All that there is when an overlay serves, an audit runs, and secrets are applied as in the example."""
    return [*(one for folder in (overlay, *BESIDE) for one in render(folder)), *read(Path("k8s/secrets/plain.yaml"))]


def read(file: Path) -> Objects:
    return [one for one in yaml.load_all(file.read_text(), Loader=yaml.CSafeLoader) if one]


@cache
def _rendered(folder: Path) -> Objects:
    if not shutil.which("kubectl"):
        absent(KUBECTL)
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise ValueError(f"kubectl kustomize {folder}: {done.stderr}")
    return [one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one]
