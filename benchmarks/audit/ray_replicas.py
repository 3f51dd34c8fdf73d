"""The running app's replicas over Serve handles, and the cluster's GPUs: the Replicas port."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import DeploymentStatusOverview
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.app import inpainter_name, text_encoder_name
from deployments.remote import RemoteTrials, typed_errors
from serve_app.audit.replicas import ReplicaCounts
from serve_app.audit.waves import text_encoders
from serve_app.errors import ReplicaLost
from serve_app.models import EditRequest, Measured, OnProgress
from serve_app.settings import Settings

from . import gpu_memory

log = logging.getLogger(__name__)

#: How long a node may take to say what memory is used, in seconds: a worker is started for it.
NVML_S = 60.0
_STARTING = ("STARTING", "UPDATING", "RECOVERING")
_RUNNING = ("RUNNING", "PENDING_MIGRATION")


class RayReplicas:
    """Of one app, in the Ray that this process is connected to."""

    def __init__(self, app: str, settings: Settings) -> None:
        self._app = app
        self._trials = RemoteTrials(
            {name: serve.get_deployment_handle(inpainter_name(name), app) for name in settings.variants}
        )
        self._deployments = {name: inpainter_name(name) for name in settings.variants} | {
            words: text_encoder_name(base) for base, words in text_encoders(settings).items()
        }
        #: By identity, which is the request's own for as long as it is kept here.
        self._put: dict[int, tuple[EditRequest, Any]] = {}

    async def measure(
        self, variant: str, request: EditRequest, on_progress: OnProgress, *, trials: int, places: int
    ) -> Measured:
        # In Ray's object store: megabytes, put there once however often they are refused.
        if id(request) not in self._put:
            self._put[id(request)] = request, ray.put(request)
        _, stored = self._put[id(request)]
        measured = await self._trials.measure(variant, stored, on_progress, trials=trials, places=places)
        # Only now: what failed may be asked for again.
        self._put.pop(id(request), None)
        return measured

    async def counts(self) -> Mapping[str, ReplicaCounts]:
        """Raises ReplicaLost where Serve, or the app, is gone."""
        with typed_errors("Serve's controller"):
            status = await asyncio.to_thread(serve.status)
        if self._app not in status.applications:
            raise ReplicaLost(f"the app {self._app} is gone")
        deployments = status.applications[self._app].deployments
        return {name: _counts(deployments.get(own)) for name, own in self._deployments.items()}

    async def gpus(self) -> int:
        return int((await asyncio.to_thread(ray.cluster_resources)).get("GPU", 0))

    async def memory_used_bytes(self) -> Mapping[str, int]:
        nodes = await asyncio.to_thread(ray.nodes)
        ids = [node["NodeID"] for node in nodes if node["Alive"] and node["Resources"].get("GPU")]
        used = await asyncio.gather(*map(_used_bytes, ids))
        return {
            f"{node}/{index}": size for node, sizes in zip(ids, used, strict=True) for index, size in enumerate(sizes)
        }


async def _used_bytes(node_id: str) -> list[int]:
    """By the GPU's index; none where the node does not say."""
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    asked = ray.remote(gpu_memory.used_bytes).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote()
    try:
        async with asyncio.timeout(NVML_S):
            used: list[int] = await asked
            return used
    except (RayError, TimeoutError) as e:
        extra = {"action": "gpu_memory_unknown"}
        log.warning("A node did not say what GPU memory is used: %s", type(e).__name__, extra=extra)
        return []


def _counts(deployment: DeploymentStatusOverview | None) -> ReplicaCounts:
    states = deployment.replica_states if deployment else {}
    return ReplicaCounts(
        running=sum(states.get(state, 0) for state in _RUNNING),
        starting=sum(states.get(state, 0) for state in _STARTING),
        stopping=states.get("STOPPING", 0),
    )
