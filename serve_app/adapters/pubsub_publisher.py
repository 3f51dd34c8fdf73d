"""Messages to Google Cloud Pub/Sub, or to the embedded server."""

from collections.abc import Mapping

from google.api_core.exceptions import InvalidArgument
from google.pubsub_v1 import types

from ..errors import BrokerUnavailable, MessageRefused
from ..ports import Topic
from ..settings import MessagesSettings
from .pubsub_connection import CALL_TIMEOUT_S, FAILURES, Caller, publisher_client
from .pubsub_names import topic_names, topic_path


class PubSubPublisher:
    def __init__(self, settings: MessagesSettings, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """`timeout_s` limits one publication, retries included."""
        self._client = publisher_client(settings)
        self._timeout_s = timeout_s
        self._caller = Caller()
        self._topics = {topic: topic_path(settings, name) for topic, name in topic_names(settings).items()}

    async def publish(self, topic: Topic, data: bytes, attributes: Mapping[str, str]) -> str:
        """Raises ValueError for a topic that the settings do not name."""
        if topic not in self._topics:
            raise ValueError(f"the settings name no topic for {topic!r} messages")
        name = self._topics[topic]
        message = types.PubsubMessage(data=data, attributes=dict(attributes))
        try:
            response = await self._caller.call(
                self._client.publish, timeout_s=self._timeout_s, topic=name, messages=[message]
            )
        except InvalidArgument as e:
            raise MessageRefused(f"{name} does not take the message: {e}", topic=name) from e
        except FAILURES as e:
            raise BrokerUnavailable(f"publishing to {name} failed: {e}", topic=name) from e
        if not response.message_ids:
            raise BrokerUnavailable(f"publishing to {name} failed: the answer has no message id", topic=name)
        message_id: str = response.message_ids[0]
        return message_id
