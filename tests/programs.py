"""Programs in the place of a machine's own: what a script finds on PATH, and how it calls it."""

import shutil
import stat
import sys
from pathlib import Path

#: A PATH without what a developer has in theirs.
SYSTEM = "/usr/bin:/bin"


class Programs:
    """A folder of programs for PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()

    def add(self, name: str, script: str, interpreter: str = "/bin/sh") -> None:
        path = self.folder / name
        path.write_text(f"#!{interpreter}\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def link(self, *names: str) -> None:
        """Programs of this machine, for a PATH that has no others."""
        for name in names:
            found = shutil.which(name)
            assert found is not None, name
            (self.folder / name).symlink_to(found)

    @property
    def path(self) -> str:
        """These before the system's."""
        return f"{self.folder}:{SYSTEM}"


def nvidia_smi(programs: Programs, gpus: str) -> None:
    """One that knows these GPUs: `name, MiB, compute capability, driver` in lines."""
    fields = {"name": 0, "memory.total": 1, "compute_cap": 2, "driver_version": 3}
    script = f"""
import sys
query, units = "", " MiB"
for word in sys.argv[1:]:
    if word.startswith("--query-gpu="):
        query = word.partition("=")[2]
    if "nounits" in word:
        units = ""
for line in {gpus!r}.splitlines():
    row = line.split(", ")
    row[1] += units
    print(", ".join(row[{fields!r}[name]] for name in query.split(",")))
"""
    programs.add("nvidia-smi", script, sys.executable)
