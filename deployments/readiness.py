"""Which variants and generators can serve, from Serve's status and from replicas that have just been asked."""

import asyncio
import logging
from collections.abc import Mapping

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from serve_app.http.service import VariantReadiness
from serve_app.telemetry import Metrics

from .metrics import RayMetrics

log = logging.getLogger(__name__)

POLL_S = 1.0
#: How long a replica may take to say whether it loaded.
ANSWER_S = 5.0


class VariantWatch:
    """Keeps the state of each variant and generator. A ready one is not asked again, so that it can scale down."""

    def __init__(
        self, handles: Mapping[str, DeploymentHandle], deployments: Mapping[str, str], metrics: Metrics | None = None
    ) -> None:
        self._ask = {name: h.options(method_name="status") for name, h in handles.items()}
        self._deployments = deployments
        self._metrics = metrics or RayMetrics()
        self.states = {name: VariantReadiness(state="starting") for name in handles}
        #: Whether Serve is stopping a replica of the deployment that this runs in, which may be the one here: it waits
        #: for the requests in flight, and kills the replica if they take long.
        self.is_stopping = False

    def doubt(self, name: str) -> None:
        """A replica reported that it cannot paint: ask again."""
        self.states[name] = VariantReadiness(state="starting")

    async def run(self) -> None:
        """Check every second, for ever."""
        here = serve.get_replica_context()
        while True:
            try:
                status = await asyncio.to_thread(serve.status)
                app = status.applications.get(here.app_name)
                overviews = app.deployments if app else {}
                own = overviews.get(here.deployment)
                self.is_stopping = own is None or own.replica_states.get("STOPPING", 0) > 0
                await asyncio.gather(*(self._look(name, overviews.get(d)) for name, d in self._deployments.items()))
            except (RayError, RayServeException) as e:
                log.warning("Could not ask Serve for its status: %s", e, extra={"action": "serve_status_unknown"})
            await asyncio.sleep(POLL_S)

    async def _look(self, name: str, overview: DeploymentStatusOverview | None) -> None:
        state = await self._state(name, overview)
        if state != self.states[name]:
            extra = {"action": "variant_state", "variant": name, "state": state.state}
            log.info(
                "Variant %s is %s", name, f"{state.state}: {state.error}" if state.error else state.state, extra=extra
            )
        self.states[name] = state
        self._metrics.put("fluxfill_variant_ready", float(state.can_serve), variant=name)

    async def _state(self, name: str, overview: DeploymentStatusOverview | None) -> VariantReadiness:
        if overview is None:
            return VariantReadiness(state="starting")
        replicas = {state for state, n in overview.replica_states.items() if n}
        if "RUNNING" in replicas:
            return await self._asked(name)
        if overview.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            return VariantReadiness(state="failed", error=overview.message)
        if not replicas - {"STOPPING"}:
            return VariantReadiness(state="scaled_to_zero")
        # Serve says why a replica waits for long, on what no node has room for; before, that it scales.
        why = overview.message if "taken more than" in overview.message else ""
        return VariantReadiness(state="starting", error=why)

    async def _asked(self, name: str) -> VariantReadiness:
        if self.states[name].state == "ready":
            return self.states[name]
        try:
            error, where = await asyncio.wait_for(self._ask[name].remote(), timeout=ANSWER_S)
        except TimeoutError:
            # Its slots are taken, so it is painting.
            return VariantReadiness(state="ready")
        return VariantReadiness(state="failed" if error else "ready", error=error, where=where)
