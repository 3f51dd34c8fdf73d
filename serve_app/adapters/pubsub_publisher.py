"""Messages to Google Cloud Pub/Sub, or to the embedded server."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from google.api_core.exceptions import InvalidArgument
from google.pubsub_v1 import types

from ..errors import BrokerUnavailable, MessageRefused
from ..ports import Topic
from ..settings import MessagesSettings
from .pubsub_connection import CALL_TIMEOUT_S, FAILURES, RETRY, publisher_client
from .pubsub_names import topic_path


class PubSubPublisher:
    def __init__(self, settings: MessagesSettings, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """`timeout_s` limits one publication, retries included."""
        self._client = publisher_client(settings)
        self._timeout_s = timeout_s
        # Of its own: calls to a broker that is away must not keep the stores' calls waiting for a thread.
        self._callers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="publish")
        self._topics: Mapping[Topic, str] = {
            "sessions": topic_path(settings, settings.topic),
            "dead": topic_path(settings, settings.dead_letter_topic),
        }

    async def publish(self, topic: Topic, data: bytes, attributes: Mapping[str, str]) -> str:
        name = self._topics[topic]
        message = types.PubsubMessage(data=data, attributes=dict(attributes))
        retry = RETRY.with_timeout(self._timeout_s)
        call = partial(self._client.publish, topic=name, messages=[message], retry=retry, timeout=self._timeout_s)
        try:
            response = await asyncio.get_running_loop().run_in_executor(self._callers, call)
        except InvalidArgument as e:
            raise MessageRefused(f"{name} does not take the message: {e}", topic=name) from e
        except FAILURES as e:
            raise BrokerUnavailable(f"publishing to {name} failed: {e}", topic=name) from e
        return response.message_ids[0]
