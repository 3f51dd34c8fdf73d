"""Messages from several Pub/Sub subscriptions, by priority, in one pool of places.

Each subscription has a stream of its own, which may have as many messages in hand as there are places, and a few more
where it has lower priorities to go before. With one subscription that is all there is to it. While a higher priority
wants places, a lower one may have only its share in hand; the rest waits with Pub/Sub, for whoever has places.
"""

import asyncio
from collections.abc import Mapping

from ..ports import Handler, SourceStatus
from ..settings import MessagesSettings
from .places import Places
from .pubsub import PubSubSource
from .pubsub_connection import Caller, subscriber_client


class PrioritySource:
    def __init__(self, settings: MessagesSettings, in_flight: int) -> None:
        """At most `in_flight` messages are handled at a time, over all subscriptions."""
        self._client = subscriber_client(settings)
        self._caller = Caller()
        places = Places(in_flight)
        self._sources = {
            name: PubSubSource(settings, name, places, self._client, self._caller) for name in settings.subscriptions
        }

    async def run(self, handle: Handler) -> None:
        async with asyncio.TaskGroup() as group:
            for source in self._sources.values():
                group.create_task(source.run(handle))

    async def close(self, *, grace_s: float) -> None:
        await asyncio.gather(*(source.close(grace_s=grace_s) for source in self._sources.values()))
        # First, so that no call begins on a closed channel.
        self._caller.close()
        await asyncio.to_thread(self._client.close)

    def status(self) -> Mapping[str, SourceStatus]:
        return {name: source.status() for name, source in self._sources.items()}
