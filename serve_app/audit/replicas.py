"""The running app's replicas, as an audit sees them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ..models import EditRequest, Measured, OnProgress


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaCounts:
    """Of one variant or text encoder, at this moment."""

    running: int = 0
    #: Wanted, and not up yet.
    starting: int = 0
    stopping: int = 0

    @property
    def total(self) -> int:
        return self.running + self.starting + self.stopping


class Replicas(Protocol):
    async def measure(
        self, variant: str, request: EditRequest, on_progress: OnProgress, *, trials: int, places: int
    ) -> Measured:
        """Paint the request `trials` times on one replica, behind all paintings that are no audit's. Progress is over
        all trials; none comes before the engine begins with it. Cancelling the call stops the engine within one step.

        Raises ReplicaTaken, at once, where the replica that was asked has `places` audit cells in hand already: ask
        again; otherwise as `ImageModel.run`.
        """

    async def counts(self) -> Mapping[str, ReplicaCounts]:
        """By variant, all that the app serves; and by `waves.text_encoders`' words for them. Asking wakes none."""

    async def gpus(self) -> int:
        """Those that the cluster has now."""

    async def memory_used_bytes(self) -> Mapping[str, int]:
        """By GPU of the cluster, named by its node and its index there. One that cannot be asked is left out."""
