"""torch.compile looked at in a process, and on a GPU, of its own: a Ray task."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve_app.audit.record import CompileVerdict
from serve_app.audit.waves import kept_gpus
from serve_app.models import EditRequest
from serve_app.settings import Settings

from .compiling import verdict

#: The report waits for it, and production perhaps for its GPU. FLUX.1's blocks compile in minutes.
LIMIT_S = 1800.0


class RayCompiler:
    """Called with a served variant's name and a request of the matrix."""

    def __init__(self, settings: Settings, gpus: int | None = None) -> None:
        """`gpus`: those that the cluster can have, where it can have more than now; None: `audit.gpus`, if that."""
        self._settings = settings
        self._gpus = settings.audit.gpus if gpus is None else gpus

    async def __call__(self, name: str, request: EditRequest) -> CompileVerdict:
        """Waits `audit.replica_wait_s` at most for what a replica of the variant would take: the variant's own replicas
        may hold the GPU until they are scaled down. What stands in the way is a verdict, too. Cancelling the call ends
        the task."""
        wait_s, needs = self._settings.audit.replica_wait_s, self._needs(name)
        if "GPU" in needs:
            there: float = (await asyncio.to_thread(ray.cluster_resources)).get("GPU", 0)
            if sum(kept_gpus(self._settings).values()) >= max(there, self._gpus or 0):
                return _not_looked_at(name, "other variants keep every GPU (min_replicas)")
        async with _reserved(needs, wait_s) as group:
            if group is None:
                what = " and ".join(f"{amount:g} {resource}" for resource, amount in needs.items())
                return _not_looked_at(name, f"{what} did not become free within {wait_s:g} s")
            try:
                async with asyncio.timeout(LIMIT_S):
                    found: CompileVerdict = await self._start(name, request, group)
            except TimeoutError:
                return _not_looked_at(name, f"it had not ended after {LIMIT_S:g} s")
            except RayError as e:
                why = str(e).strip().rpartition("\n")[2]
                return _not_looked_at(name, f"its process ended: {why}")
            return found

    def _needs(self, name: str) -> dict[str, float]:
        gpus = self._settings.variant(name).num_gpus
        return {"CPU": self._settings.variants[name].num_cpus, **({"GPU": gpus} if gpus else {})}

    def _start(self, name: str, request: EditRequest, group: PlacementGroup) -> Any:
        needs = self._needs(name)
        task = ray.remote(verdict).options(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            # A retry would take as long again, and most likely end the same way.
            max_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )
        return task.remote(name, self._settings, request)


def _not_looked_at(name: str, why: str) -> CompileVerdict:
    return CompileVerdict(variant=name, viable=None, verdict=f"not looked at: {why}")


@asynccontextmanager
async def _reserved(needs: dict[str, float], wait_s: float) -> AsyncIterator[PlacementGroup | None]:
    """The resources, for as long as the context lasts: what runs on them then is killed. None where they do not become
    free in time."""
    group, is_free = placement_group([needs]), False
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await group.ready()
                is_free = True
        yield group if is_free else None
    finally:
        remove_placement_group(group)
