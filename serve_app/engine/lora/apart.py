"""Looks at a LoRA's file in a process of its own: an ingress imports no torch, and what a hostile file does to the
process that reads it ends with that process."""

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ... import errors
from ...errors import LoraRefused, Unavailable
from ...models import LoraFacts
from ...settings import Settings

#: Of a file of 2 GB, most goes by in reading it; seconds.
TIMEOUT_S = 120.0
#: What of the environment that process gets: no key of the app's.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS")


class CheckedApart:
    """Raises what `check.check` raises."""

    def __init__(self, settings: Settings) -> None:
        models = [name for name in settings.generators if settings.takes_loras(name)]
        self._asked = {
            "models": [settings.variant(name).model_dump(mode="json") for name in models],
            "max_rank": settings.loras.max_rank,
            "cache": str(settings.weights.cache),
        }

    @property
    def takes_loras(self) -> bool:
        return bool(self._asked["models"])

    async def check(self, file: Path, *, alpha: float | None) -> LoraFacts:
        asked = json.dumps({**self._asked, "file": str(file), "alpha": alpha})
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "serve_app.engine.lora.check",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                out, err = await process.communicate(asked.encode())
        except TimeoutError:
            raise Unavailable(f"the file was not looked at within {TIMEOUT_S:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            last = err.decode(errors="replace").strip().rpartition("\n")[2]
            raise Unavailable(f"the file could not be looked at: {last or process.returncode}")
        answer = json.loads(out)
        if refused := answer.get("refused"):
            raise _kinds()[refused["code"]](refused["message"])
        return LoraFacts.model_validate(answer["facts"])


def _kinds() -> dict[str, type[LoraRefused]]:
    def below(kind: type[LoraRefused]) -> Iterable[type[LoraRefused]]:
        yield kind
        for one in kind.__subclasses__():
            yield from below(one)

    return {kind.code: kind for kind in below(errors.LoraRefused)}
