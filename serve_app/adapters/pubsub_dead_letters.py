"""The dead letters of Google Cloud Pub/Sub, or of the embedded server."""

from collections.abc import Sequence
from typing import Any

from google.api_core.exceptions import DeadlineExceeded, PermissionDenied

from ..errors import BrokerUnavailable
from ..ports import DeadLetter
from ..settings import MessagesSettings
from .pubsub_connection import CALL_TIMEOUT_S, FAILURES, Caller, connect, subscriber_client
from .pubsub_names import subscription_path
from .pubsub_stream import delivery_of

#: How long Google's Pub/Sub may look for letters, in seconds: asked to answer at once, it may say that there are none
#: although there are. Other servers know.
PATIENCE_S = 3.0
#: How long letters are in hand, in seconds.
IN_HAND_S = 60
#: Letters in one pull or one answer.
MOST_AT_ONCE = 100


class PubSubDeadLetters:
    def __init__(self, settings: MessagesSettings) -> None:
        self._client = subscriber_client(settings)
        self._subscription = subscription_path(settings, settings.dead_letter_subscription)
        self._caller = Caller()
        self._is_google = settings.is_google
        self._is_connected = False

    async def pull(self, limit: int) -> Sequence[DeadLetter]:
        if not self._is_connected:
            await connect(self._client.transport.grpc_channel)
            self._is_connected = True
        letters = [
            DeadLetter(delivery=delivery_of(received.message), ack_id=received.ack_id)
            for received in await self._received(min(limit, MOST_AT_ONCE))
        ]
        await self._set_deadline(letters, IN_HAND_S)
        return letters

    async def _received(self, most: int) -> Sequence[Any]:
        try:
            response = await self._call(
                self._client.pull,
                timeout_s=PATIENCE_S if self._is_google else CALL_TIMEOUT_S,
                max_messages=most,
                return_immediately=not self._is_google,
            )
        except BrokerUnavailable as e:
            if not (self._is_google and isinstance(e.__cause__, DeadlineExceeded)):
                raise
            await self._check_answers()
            return ()
        letters: Sequence[Any] = response.received_messages
        return letters

    async def _check_answers(self) -> None:
        """A pull's time is over where there are no letters, and where Pub/Sub answers nobody: tell them apart.

        Raises BrokerUnavailable.
        """
        try:
            await self._call(self._client.get_subscription, timeout_s=PATIENCE_S)
        except BrokerUnavailable as e:
            # An answer as well: the role Pub/Sub Subscriber may pull and may not look.
            if not isinstance(e.__cause__, PermissionDenied):
                raise

    async def acknowledge(self, letters: Sequence[DeadLetter]) -> None:
        for ack_ids in _batches(letters):
            await self._call(self._client.acknowledge, ack_ids=ack_ids)

    async def give_back(self, letters: Sequence[DeadLetter]) -> None:
        await self._set_deadline(letters, 0)

    async def close(self) -> None:
        self._client.close()
        self._caller.close()

    async def _set_deadline(self, letters: Sequence[DeadLetter], seconds: int) -> None:
        for ack_ids in _batches(letters):
            await self._call(self._client.modify_ack_deadline, ack_ids=ack_ids, ack_deadline_seconds=seconds)

    async def _call(self, method: Any, **arguments: Any) -> Any:
        try:
            return await self._caller.call(method, subscription=self._subscription, **arguments)
        except FAILURES as e:
            raise BrokerUnavailable(f"the dead letters in {self._subscription} cannot be reached: {e}") from e


def _batches(letters: Sequence[DeadLetter]) -> list[list[str]]:
    ack_ids = [letter.ack_id for letter in letters]
    return [ack_ids[i : i + MOST_AT_ONCE] for i in range(0, len(ack_ids), MOST_AT_ONCE)]
