"""What a reader of a benchmark's figures needs beside them."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions of Python and these packages, and the commit that is checked out."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": commit.stdout.strip(),
    }
