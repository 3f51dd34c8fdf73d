"""The embedded Pub/Sub server as a deployment of its own, so that it outlives an ingress."""

import asyncio
import logging

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.adapters.pubsub.client import subscription_path
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.errors import BrokerUnavailable, ReplicaLost
from serve_app.jobs.backlog import Reading
from serve_app.settings import MessagesSettings
from serve_app.telemetry import configure_logging

from .remote import typed_errors

log = logging.getLogger(__name__)

#: Between two checks whether the server listens, in seconds.
POLL_S = 1.0
#: How long it may take to answer.
ANSWER_S = 5.0


class PubSub:
    """One replica. Keeps messages in memory, so they are lost with it. If it cannot listen, it says why and retries at
    each call of `status`."""

    def __init__(self, settings: MessagesSettings) -> None:
        configure_logging()
        self._server = EmbeddedPubSub.of(settings)
        self._names = [subscription_path(settings, name) for name in settings.subscriptions]
        self._error = "it has not started yet"
        self.status()

    def status(self) -> str:
        """Why the server does not listen; empty if it does."""
        if self._error:
            try:
                self._server.__enter__()
                self._error = ""
            except BrokerUnavailable as e:
                if self._error != e.message:
                    log.error("%s", e, extra={"action": "pubsub_not_started"})
                self._error = e.message
        return self._error

    def backlog(self) -> Reading:
        """Raises BrokerUnavailable."""
        return self._server.backlog(self._names)

    def __del__(self) -> None:
        self._server.__exit__(None, None, None)


class BrokerBacklog:
    """The embedded server's exact backlog."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._ask = handle.options(method_name="backlog")

    async def read(self) -> Reading:
        try:
            with typed_errors("the embedded Pub/Sub server"):
                reading: Reading = await self._ask.remote()
        except ReplicaLost as e:
            raise BrokerUnavailable(e.message) from e
        return reading


class BrokerWatch:
    """An ingress's view of the embedded server. Nothing may be pulled before `listens`: until then another program's
    server may answer at its address, with other people's messages."""

    def __init__(self, handle: DeploymentHandle | None) -> None:
        """Without a `handle` the broker is not part of the app."""
        self._ask = None if handle is None else handle.options(method_name="status")
        #: Why there are no messages; empty if no problem is known.
        self.error = "" if handle is None else "the embedded Pub/Sub server has not started yet"
        self.listens = asyncio.Event()

    async def run(self) -> None:
        """Check every second, for ever."""
        while True:
            if self._ask is not None:
                try:
                    self.error = await asyncio.wait_for(self._ask.remote(), ANSWER_S)
                except (TimeoutError, RayError, RayServeException) as e:
                    # Its replica is starting, or busy.
                    log.debug(
                        "The embedded Pub/Sub server does not respond: %s", e, extra={"action": "pubsub_no_response"}
                    )
            if not self.error:
                self.listens.set()
            await asyncio.sleep(POLL_S)
