"""What engines that need no weights, no device and no time to get ready have in common."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any


class Weightless:
    #: As in `Engine.describe`.
    device = platform.machine()
    versions: Mapping[str, str] = {}

    def load(self) -> None: ...

    def warm_up(self, buckets: Sequence[tuple[int, int]]) -> None: ...

    def free_memory(self) -> None: ...

    def close(self) -> None: ...

    def device_ms(self) -> None:
        return None

    def peak_memory(self) -> None:
        return None

    def describe(self) -> Mapping[str, Any]:
        nothing = {"memory_used_bytes": None, "memory_total_bytes": None}
        return {"device": self.device, "compute_capability": "N/A", **nothing, "versions": self.versions}
