"""The embedded Pub/Sub server by itself: `python -m benchmarks.embedded_pubsub SETTINGS`, messages settings as JSON.

Listens until it is sent SIGTERM.
"""

import signal
import sys

from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.settings import MessagesSettings
from serve_app.telemetry import configure_logging

if __name__ == "__main__":
    configure_logging()
    # Blocked before the server's threads start, which inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with EmbeddedPubSub.of(MessagesSettings.model_validate_json(sys.argv[1])):
        signal.sigwait({signal.SIGTERM})
