"""google.pubsub.v1's Publisher and Subscriber services over a broker: the wire, and nothing of the rules.

Made of what google-cloud-pubsub ships: its message types on gRPC's generic handlers. Streams, pulls, acknowledges,
publishes and administers topics and subscriptions; other calls answer UNIMPLEMENTED. The app itself pulls; streams are
for others who listen to its topics, by the library's `subscribe`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.pubsub_v1 import types

from .broker import (
    MAX_ACK_DEADLINE_S,
    MIN_ACK_DEADLINE_S,
    Broker,
    BrokerFull,
    Lease,
    Stream,
    Subscription,
    SubscriptionConfig,
)

#: How often leases are looked at, in seconds.
TICK_S = 0.05
#: Messages in one response.
_MOST_AT_ONCE = 100
#: google.protobuf.Empty on the wire.
_EMPTY = b""


@dataclass(frozen=True, slots=True)
class _Call:
    """One method of the service: who answers it, and the messages it takes and returns."""

    answer: Callable[[Any, Any], Awaitable[Any]]
    request: Any
    response: Any

    def handler(self) -> grpc.RpcMethodHandler:
        async def answer(request: Any, context: Any) -> Any:
            with _as_status() as problem:
                return await self.answer(request, context)
            return await context.abort(*problem[0])

        serialize = bytes if self.response is None else self.response.serialize
        return grpc.unary_unary_rpc_method_handler(answer, self.request.deserialize, serialize)


@contextlib.contextmanager
def _as_status() -> Iterator[list[tuple[grpc.StatusCode, str]]]:
    """Swallow what the broker raises; leaves the status to answer in the list."""
    problems: list[tuple[grpc.StatusCode, str]] = []
    try:
        yield problems
    except KeyError as e:
        problems.append((grpc.StatusCode.NOT_FOUND, f"there is no {e.args[0]}"))
    except BrokerFull as e:
        problems.append((grpc.StatusCode.RESOURCE_EXHAUSTED, str(e)))
    except ValueError as e:
        problems.append((grpc.StatusCode.INVALID_ARGUMENT, str(e)))


class Calls:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        #: Set, and replaced, whenever a message may have become due.
        self._due = asyncio.Event()

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        publisher = {
            "CreateTopic": _Call(self.create_topic, types.Topic, types.Topic),
            "GetTopic": _Call(self.get_topic, types.GetTopicRequest, types.Topic),
            "ListTopics": _Call(self.list_topics, types.ListTopicsRequest, types.ListTopicsResponse),
            "DeleteTopic": _Call(self.delete_topic, types.DeleteTopicRequest, None),
            "Publish": _Call(self.publish, types.PublishRequest, types.PublishResponse),
        }
        subscriber = {
            "CreateSubscription": _Call(self.create_subscription, types.Subscription, types.Subscription),
            "GetSubscription": _Call(self.get_subscription, types.GetSubscriptionRequest, types.Subscription),
            "DeleteSubscription": _Call(self.delete_subscription, types.DeleteSubscriptionRequest, None),
            "Pull": _Call(self.pull, types.PullRequest, types.PullResponse),
            "Acknowledge": _Call(self.acknowledge, types.AcknowledgeRequest, None),
            "ModifyAckDeadline": _Call(self.modify_ack_deadline, types.ModifyAckDeadlineRequest, None),
        }
        streaming_pull = grpc.stream_stream_rpc_method_handler(
            self.streaming_pull, types.StreamingPullRequest.deserialize, types.StreamingPullResponse.serialize
        )
        return (
            grpc.method_handlers_generic_handler(
                "google.pubsub.v1.Publisher", {name: call.handler() for name, call in publisher.items()}
            ),
            grpc.method_handlers_generic_handler(
                "google.pubsub.v1.Subscriber",
                {"StreamingPull": streaming_pull, **{name: call.handler() for name, call in subscriber.items()}},
            ),
        )

    async def keep_ticking(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if any([subscription.expire() for subscription in self._broker.subscriptions.values()]):
                self._announce()

    def _announce(self) -> None:
        self._due.set()
        self._due = asyncio.Event()

    async def create_topic(self, request: types.Topic, context: Any) -> types.Topic:
        if request.name in self._broker.topics:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{request.name} exists")
        self._broker.topics.add(request.name)
        return request

    async def get_topic(self, request: types.GetTopicRequest, _context: Any) -> types.Topic:
        if request.topic not in self._broker.topics:
            raise KeyError(request.topic)
        return types.Topic(name=request.topic)

    async def list_topics(self, request: types.ListTopicsRequest, _context: Any) -> types.ListTopicsResponse:
        names = sorted(name for name in self._broker.topics if name.startswith(f"{request.project}/"))
        return types.ListTopicsResponse(topics=[types.Topic(name=name) for name in names])

    async def delete_topic(self, request: types.DeleteTopicRequest, _context: Any) -> bytes:
        self._broker.topics.remove(request.topic)
        return _EMPTY

    async def publish(self, request: types.PublishRequest, _context: Any) -> types.PublishResponse:
        contents = [(message.data, dict(message.attributes)) for message in request.messages]
        ids = self._broker.publish(request.topic, contents)
        self._announce()
        return types.PublishResponse(message_ids=ids)

    async def create_subscription(self, request: types.Subscription, context: Any) -> types.Subscription:
        if request.name in self._broker.subscriptions:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{request.name} exists")
        self._broker.subscribe(_config(request))
        return request

    async def get_subscription(self, request: types.GetSubscriptionRequest, _context: Any) -> types.Subscription:
        config = self._broker.subscriptions[request.subscription].config
        return types.Subscription(
            name=config.name, topic=config.topic, ack_deadline_seconds=config.ack_deadline_s, filter=config.filter
        )

    async def delete_subscription(self, request: types.DeleteSubscriptionRequest, _context: Any) -> bytes:
        del self._broker.subscriptions[request.subscription]
        self._announce()
        return _EMPTY

    async def pull(self, request: types.PullRequest, context: Any) -> types.PullResponse:
        subscription = self._broker.subscriptions[request.subscription]
        if request.max_messages < 1:
            raise ValueError(f"max_messages {request.max_messages}: at least 1")
        # Answer shortly before the client gives up.
        patience_s = 0.0 if request.return_immediately else max(0.0, (context.time_remaining() or 5.0) - 0.2)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while not (leases := subscription.take(request.max_messages, None)):
                    await self._due.wait()
        ack_ids = [lease.ack_id for lease in leases]

        def give_back_unless_taken(context: Any) -> None:
            # The client may have left while the answer was on its way.
            if context.cancelled():
                self._modify(subscription, ack_ids, 0)

        context.add_done_callback(give_back_unless_taken)
        return types.PullResponse(received_messages=_received(subscription, leases))

    async def acknowledge(self, request: types.AcknowledgeRequest, _context: Any) -> bytes:
        self._broker.subscriptions[request.subscription].acknowledge(request.ack_ids)
        self._announce()
        return _EMPTY

    async def modify_ack_deadline(self, request: types.ModifyAckDeadlineRequest, _context: Any) -> bytes:
        self._modify(self._broker.subscriptions[request.subscription], request.ack_ids, request.ack_deadline_seconds)
        return _EMPTY

    def _modify(self, subscription: Subscription, ack_ids: Sequence[str], seconds: int) -> None:
        if not 0 <= seconds <= MAX_ACK_DEADLINE_S:
            raise ValueError(f"ack_deadline_seconds {seconds}: not between 0 and {MAX_ACK_DEADLINE_S}")
        subscription.modify_deadline(ack_ids, seconds)
        self._announce()

    async def streaming_pull(
        self, requests: AsyncIterator[types.StreamingPullRequest], context: Any
    ) -> AsyncIterator[types.StreamingPullResponse]:
        first = await anext(requests, None)
        if first is None:
            return
        with _as_status() as problem:
            subscription = self._broker.subscriptions[first.subscription]
            stream = Stream(
                ack_deadline_s=first.stream_ack_deadline_seconds or subscription.config.ack_deadline_s,
                max_messages=max(0, first.max_outstanding_messages),
                max_bytes=max(0, first.max_outstanding_bytes),
            )
        if problem:
            await context.abort(*problem[0])
        reader = asyncio.create_task(self._read(requests, subscription, stream))
        try:
            # Tells the client that the stream is open.
            yield types.StreamingPullResponse(subscription_properties={})
            async for leases in self._batches(subscription, stream, reader):
                yield types.StreamingPullResponse(received_messages=_received(subscription, leases))
            if subscription.config.name not in self._broker.subscriptions:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"{subscription.config.name} was deleted")
        finally:
            reader.cancel()
            subscription.abandon(stream)
            self._announce()

    async def _read(
        self, requests: AsyncIterator[types.StreamingPullRequest], subscription: Subscription, stream: Stream
    ) -> None:
        async for request in requests:
            stream.ack_deadline_s = request.stream_ack_deadline_seconds or stream.ack_deadline_s
            subscription.acknowledge(request.ack_ids)
            for ack_id, seconds in zip(request.modify_deadline_ack_ids, request.modify_deadline_seconds, strict=True):
                self._modify(subscription, [ack_id], seconds)
            self._announce()

    async def _batches(
        self, subscription: Subscription, stream: Stream, reader: "asyncio.Task[None]"
    ) -> AsyncIterator[list[Lease]]:
        """Until the client has no more to say, or the subscription is deleted."""
        while not reader.done() and subscription.config.name in self._broker.subscriptions:
            if leases := subscription.take(_MOST_AT_ONCE, stream):
                yield leases
                continue
            woken = asyncio.ensure_future(self._due.wait())
            await asyncio.wait({woken, reader}, return_when=asyncio.FIRST_COMPLETED)
            woken.cancel()


def _config(request: types.Subscription) -> SubscriptionConfig:
    """Raises ValueError for what this server does not understand."""
    return SubscriptionConfig(
        name=request.name,
        topic=request.topic,
        ack_deadline_s=request.ack_deadline_seconds or MIN_ACK_DEADLINE_S,
        filter=request.filter,
        dead_letter_topic=request.dead_letter_policy.dead_letter_topic,
        max_delivery_attempts=request.dead_letter_policy.max_delivery_attempts or 5,
        **_backoff(request),
    )


def _backoff(request: types.Subscription) -> dict[str, float]:
    if "retry_policy" not in request:
        return {}
    policy = request.retry_policy
    # Pub/Sub's own defaults.
    shortest_s = policy.minimum_backoff.total_seconds() if policy.minimum_backoff is not None else 10.0
    longest_s = policy.maximum_backoff.total_seconds() if policy.maximum_backoff is not None else 600.0
    return {"min_backoff_s": shortest_s, "max_backoff_s": longest_s}


def _received(subscription: Subscription, leases: Sequence[Lease]) -> list[types.ReceivedMessage]:
    counts_attempts = bool(subscription.config.dead_letter_topic)
    return [
        types.ReceivedMessage(
            ack_id=lease.ack_id,
            message=_wire_message(lease),
            delivery_attempt=lease.queued.attempts if counts_attempts else 0,
        )
        for lease in leases
    ]


def _wire_message(lease: Lease) -> types.PubsubMessage:
    message = lease.queued.message
    return types.PubsubMessage(
        data=message.data,
        attributes=dict(message.attributes),
        message_id=message.id,
        publish_time={"seconds": int(message.published_at), "nanos": int(message.published_at % 1 * 1e9)},
    )
