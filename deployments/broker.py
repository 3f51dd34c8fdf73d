"""The embedded Pub/Sub server as a deployment of its own, so that it outlives an ingress."""

from serve_app.adapters.pubsub_embedded import EmbeddedPubSub
from serve_app.settings import MessagesSettings
from serve_app.telemetry import configure_logging


class PubSub:
    """One replica. Keeps messages in memory: they go with it."""

    def __init__(self, settings: MessagesSettings) -> None:
        configure_logging()
        self._server = EmbeddedPubSub.of(settings)
        self._server.__enter__()

    def __del__(self) -> None:
        self._server.__exit__(None, None, None)
