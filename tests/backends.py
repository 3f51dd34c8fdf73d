"""Every backend of every port, as fixtures for the contract suites."""

import asyncio
import shutil
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from google.pubsub_v1.services.publisher import PublisherClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber import SubscriberClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.adapters.pubsub.client import subscription_path, topic_path
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.jobs.ports import Delivery, Handler, MessageSource, Publisher, SourceStatus, Verdict
from serve_app.jobs.record import Job
from serve_app.parameters import AuditRequest, CropStrategy, EditParameters
from serve_app.settings import MessagesSettings, SubscriptionSettings

from .absent import PUBSUB, absent

#: A condition that has not come true by then never will; seconds.
PATIENCE_S = 30.0


async def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.01)


def at(second: float) -> datetime:
    """A moment, told by its second."""
    return datetime.fromtimestamp(1_800_000_000 + second, UTC)


def make_job(id: str = "edit-1", **changes: object) -> Job:
    job = Job(
        id=id,
        user_id="u",
        session_id="s",
        lock_key="u/s",
        variant="telea",
        parameters=EditParameters(prompt="p", guidance_scale=30.0, steps=28, crop_strategy=CropStrategy.AUTO),
        seed=1,
        created_at=at(0),
    )
    job = job.evolve(**changes)
    return job.evolve(lock_key=f"{job.user_id}/{job.session_id}" if job.session_id else "")


def make_audit(id: str = "audit-1", **changes: object) -> Job:
    request = AuditRequest(user_id="u", session_id="s")
    job = Job(id=id, user_id="u", session_id="s", lock_key="audit", parameters=request, created_at=at(0))
    return job.evolve(**changes)


def run_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs `script`."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def processes() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`run_python`, whose processes end with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        started.append(run_python(script, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@dataclass
class Broker:
    """A running message broker with the settings' topics and subscriptions."""

    kind: str
    settings: MessagesSettings
    #: Topics of subscriptions whose topic is not the settings', by subscription.
    topics: Mapping[str, str] = field(default_factory=dict)

    @property
    def publisher(self) -> Publisher:
        return adapters.publisher(self.settings)

    async def publish(self, *bodies: bytes, priority: str = "") -> list[str]:
        """To the subscription that the attribute `priority` names, where one is given."""
        publisher = self.publisher
        if priority in self.topics:
            publisher = adapters.publisher(self.settings.model_copy(update={"topic": self.topics[priority]}))
        attributes = {"priority": priority} if priority else {}
        return [await publisher.publish("sessions", body, attributes) for body in bodies]

    @asynccontextmanager
    async def source(self, handle: Handler, in_flight: int = 10) -> AsyncIterator[MessageSource]:
        """A source that delivers to `handle`; closed without grace at the end."""
        source = adapters.message_source(self.settings, in_flight)
        running = asyncio.create_task(source.run(handle))
        try:
            yield source
        finally:
            await source.close(grace_s=0)
            await running


def status_of(source: MessageSource, subscription: str = "session-processing") -> SourceStatus:
    return source.status()[subscription]


class Recorder:
    """A handler that notes what it is given, then answers as `decide` says."""

    def __init__(self, decide: Callable[[Delivery], Awaitable[Verdict]] | None = None) -> None:
        self._decide = decide
        self.deliveries: list[Delivery] = []
        #: On the loop's clock, one for each delivery.
        self.times: list[float] = []

    async def __call__(self, delivery: Delivery) -> Verdict:
        self.deliveries.append(delivery)
        self.times.append(asyncio.get_running_loop().time())
        return await self._decide(delivery) if self._decide else Verdict(action="ack")

    def has_more_than(self, count: int) -> bool:
        return len(self.deliveries) > count

    def has(self, body: bytes) -> bool:
        return body in self.bodies

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.data for delivery in self.deliveries]


#: Named as the value of the attribute that fills each.
PRIORITIES: Mapping[str, SubscriptionSettings] = {
    name: SubscriptionSettings(priority=name, filter=f'attributes.priority = "{name}"')
    for name in ("high", "normal", "low")
}


@contextmanager
def embedded_broker(**messages: Any) -> Iterator[Broker]:
    with EmbeddedPubSub.of(MessagesSettings(url="embedded://127.0.0.1:0", **messages)) as server:
        yield Broker("embedded", MessagesSettings(url=f"embedded://{server.address}", **messages))


@pytest.fixture
def embedded() -> Iterator[Broker]:
    with embedded_broker() as broker:
        yield broker


@pytest.fixture
def embedded_priorities() -> Iterator[Broker]:
    with embedded_broker(subscriptions=PRIORITIES) as broker:
        yield broker


@pytest.fixture
def memory() -> Broker:
    return Broker("memory", MessagesSettings(url=f"memory:{uuid.uuid4().hex}"))


@pytest.fixture(params=["embedded", "memory"])
def completing(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A broker with a completion topic, and a subscription that the settings do not name to read it by."""
    messages = {"completion_topic": "session-completed"}
    if request.param == "memory":
        yield Broker("memory", MessagesSettings(url=f"memory:{uuid.uuid4().hex}", **messages))
        return
    with embedded_broker(**messages) as broker:
        yield broker


@pytest.fixture
def memory_priorities() -> Broker:
    return Broker("memory", MessagesSettings(url=f"memory:{uuid.uuid4().hex}", subscriptions=PRIORITIES))


@pytest.fixture(scope="session")
def emulator_address() -> Iterator[str]:
    """Google's Pub/Sub emulator, in a process of its own."""
    jar = _emulator_jar()
    if jar is None:
        absent(PUBSUB)
    port = free_port()
    command = ["java", "-Xmx256m", "-XX:+UseSerialGC", "-jar", str(jar), "--host=127.0.0.1", f"--port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def emulator(emulator_address: str) -> Broker:
    settings = MessagesSettings(url=f"pubsub://{emulator_address}", project=f"p{uuid.uuid4().hex[:12]}")
    administer(settings)
    return Broker("emulator", settings)


@pytest.fixture
def emulator_priorities(emulator_address: str) -> Broker:
    """It ignores filters, so that each subscription has a topic of its own."""
    settings = MessagesSettings(
        url=f"pubsub://{emulator_address}", project=f"p{uuid.uuid4().hex[:12]}", subscriptions=PRIORITIES
    )
    topics = {name: f"topic-{name}" for name in PRIORITIES}
    administer(settings, topics)
    return Broker("emulator", settings, topics)


@pytest.fixture(params=["embedded", "memory"])
def forgetting_broker(request: pytest.FixtureRequest) -> Broker:
    """Not the emulator, which goes on sending to streams that have ended."""
    made: Broker = request.getfixturevalue(request.param)
    return made


@pytest.fixture(params=["embedded", "memory", pytest.param("emulator", marks=pytest.mark.emulator)])
def broker(request: pytest.FixtureRequest) -> Broker:
    made: Broker = request.getfixturevalue(request.param)
    return made


@pytest.fixture(params=["embedded", "memory", pytest.param("emulator", marks=pytest.mark.emulator)])
def priorities(request: pytest.FixtureRequest) -> Broker:
    """A broker with a subscription of each priority, which `Broker.publish` fills."""
    made: Broker = request.getfixturevalue(f"{request.param}_priorities")
    return made


def administer(settings: MessagesSettings, topics: Mapping[str, str] | None = None) -> None:
    """Make the settings' topics and subscriptions on the server that they name; `topics` as in Broker."""
    topic_of = dict.fromkeys(settings.subscriptions, settings.topic) | dict(topics or {})
    topic_of[settings.dead_letter_subscription] = settings.dead_letter_topic
    with grpc.insecure_channel(urlsplit(settings.url).netloc) as channel:
        publisher = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        for topic in {settings.topic, *topic_of.values()}:
            publisher.create_topic(name=topic_path(settings, topic))
        for name, topic in topic_of.items():
            filter = settings.subscriptions[name].filter if name in settings.subscriptions else ""
            names = {"name": subscription_path(settings, name), "topic": topic_path(settings, topic)}
            subscriber.create_subscription(request={**names, "filter": filter})


def _emulator_jar() -> Path | None:
    gcloud = shutil.which("gcloud")
    if gcloud is None or shutil.which("java") is None:
        return None
    sdk = Path(gcloud).resolve().parent.parent
    return next(iter(sorted(sdk.glob("platform/pubsub-emulator/lib/cloud-pubsub-emulator-*.jar"))), None)
