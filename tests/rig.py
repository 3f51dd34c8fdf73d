"""A worker over memory stores and real engines, without Ray: what tests of the use case hold in their hands."""

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np

from serve_app.adapters.memory import MemoryBlobStore, MemoryJobStore
from serve_app.blobs import BlobInfo
from serve_app.edit.job import Editor
from serve_app.edit.session import session_path
from serve_app.engine import Window
from serve_app.engine.painting import LocalModel
from serve_app.engine.telea import Telea
from serve_app.errors import (
    BrokerUnavailable,
    CallbackRefused,
    LinkRefused,
    MessageRefused,
    StoreUnavailable,
    WebhookFailed,
)
from serve_app.jobs.lease import Pace
from serve_app.jobs.notifications import Notifier
from serve_app.jobs.ports import Delivery, Verdict
from serve_app.jobs.record import Job
from serve_app.jobs.worker import Worker
from serve_app.models import Pixels, Variant
from serve_app.settings import Inference, Settings, VariantSettings
from serve_app.telemetry import METRICS

USER, SESSION = "u1", "s1"


def jpeg(pixels: Pixels) -> bytes:
    return cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def png(pixels: Pixels) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def photo(width: int = 96, height: int = 80) -> Pixels:
    """Smooth, so that JPEG changes little and inpainting has something to continue."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], axis=-1).astype(np.uint8)


def line_mask(width: int = 96, height: int = 80) -> Pixels:
    return cv2.line(np.zeros((height, width), np.uint8), (20, 10), (60, 60), 255, 5)


class Scripted:
    """An engine that does what a test tells it, step by step; otherwise it paints like `Telea`."""

    def __init__(self) -> None:
        self.on_paint: Callable[[], None] = lambda: None
        #: Called before each step is reported.
        self.on_step: Callable[[int], None] = lambda step: None
        #: What it paints in place of what Telea would; tells one worker's bytes from another's.
        self.fill: int | None = None
        self.painted = 0
        self.steps_done = 0
        self._telea = Telea(Variant(family="telea"), None, VariantSettings(threads=1))

    def load(self) -> None: ...
    def warm_up(self, buckets: object) -> None: ...
    def free_memory(self) -> None: ...
    def close(self) -> None: ...

    def device_ms(self) -> float | None:
        return None

    def peak_memory(self) -> tuple[int, int] | None:
        return None

    def describe(self) -> Mapping[str, Any]:
        return self._telea.describe()

    def paint(self, window: Window) -> Pixels:
        self.painted += 1
        self.on_paint()
        for step in range(1, window.steps_run + 1):
            self.on_step(step)
            self.steps_done += 1
            window.on_step(step)
        inpainted: Pixels = cv2.inpaint(window.pixels, window.mask, 3, cv2.INPAINT_TELEA)
        if self.fill is not None:
            inpainted[window.mask >= 128] = self.fill
        return inpainted


class Held:
    """Holds the engine inside a paint until it is let go."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.let_go.wait(30), "nobody let the engine go"


class Outage:
    """A store or broker in front of the real one that can be switched off. Not a mock: it answers or it is down."""

    def __init__(self, inner: Any, error: type[Exception]) -> None:
        self._inner, self._error = inner, error
        self.is_down = False
        #: Method names that are down; empty means all.
        self.only: set[str] = set()
        #: Awaited, once, before a method of that name runs, or after.
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}
        self.after: dict[str, Callable[[], Awaitable[None]]] = {}
        #: How often each method was called.
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            if self.is_down and (not self.only or name in self.only):
                raise self._error("switched off")
            if name in self.before:
                await self.before.pop(name)()
            result = await method(*args, **kwargs)
            if name in self.after:
                await self.after.pop(name)()
            return result

        return call


class BlobOutage(Outage):
    """Blobs are listed one by one."""

    async def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        if self.is_down and (not self.only or "list" in self.only):
            raise self._error("switched off")
        async for info in self._inner.list(prefix):
            yield info


class Topics:
    """A Publisher that keeps what was published, and takes no more than `max_attributes`, as Pub/Sub takes 100."""

    def __init__(self) -> None:
        self.dead: list[tuple[bytes, dict[str, str]]] = []
        self.sessions: list[Delivery] = []
        self.completed: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.max_attributes = 100

    async def publish(self, topic: str, data: bytes, attributes: Mapping[str, str]) -> str:
        if len(attributes) > self.max_attributes:
            raise MessageRefused(f"{len(attributes)} attributes")
        if topic == "sessions":
            self.sessions.append(Delivery(data=data, attributes=attributes, message_id=uuid.uuid4().hex))
        elif topic == "completed":
            self.completed.append((json.loads(data), dict(attributes)))
        else:
            assert topic == "dead"
            self.dead.append((data, dict(attributes)))
        return uuid.uuid4().hex


class Receivers:
    """Publishers' URLs: those of example.org may be called, and answer while they are up."""

    def __init__(self) -> None:
        self.called: list[Job] = []
        self.is_down = False

    def check(self, url: str) -> None:
        if not url.startswith("https://example.org/"):
            raise CallbackRefused(f"{urlsplit(url).netloc} may not be called")

    async def call(self, job: Job, _event: str, _document: Mapping[str, Any]) -> None:
        self.check(job.callback_url)
        if self.is_down:
            raise WebhookFailed("nobody answers")
        self.called.append(job)


class Linked:
    """What links lead to."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    async def fetch(self, link: str, *, field: str, max_bytes: int) -> bytes:
        if len(self.files.get(link, bytes(max_bytes + 1))) > max_bytes:
            raise LinkRefused(f"{field}: nothing is there, or too much")
        return self.files[link]


class Counters:
    """Metrics that a test reads, and that take nothing but what telemetry.METRICS knows."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = {}

    def _note(self, kind: str, name: str, value: float, labels: Mapping[str, str]) -> None:
        metric = METRICS[name]
        assert (metric.kind, metric.labels) == (kind, tuple(labels)), f"{name} as {kind} with {labels}"
        self.values.setdefault((name, *labels.values()), []).append(value)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        self._note("counter", name, amount, labels)

    def put(self, name: str, value: float, **labels: str) -> None:
        self._note("gauge", name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._note("histogram", name, value, labels)

    def total(self, name: str, *labels: str) -> float:
        return sum(self.values.get((name, *labels), ()))


class Prompts:
    """Telea takes no prompt."""

    async def encode(self, variant: str, prompt: str) -> bytes | None:
        return None


class Clock:
    """A store's time, which a test moves."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


FAST = {
    "lease_s": 1.0,
    "renew_s": 0.2,
    "max_attempts": 3,
    "upload_timeout_s": 0.2,
}
QUICK = Pace(cancel_poll_s=0.05, progress_s=0.05, mirror_s=0.05)


@dataclass
class Rig:
    """One process's worker; `beside()` makes another over the same stores."""

    work_settings: dict[str, Any] = field(default_factory=dict)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    inference: Inference = field(default_factory=lambda: Inference(variant="telea", steps=4))
    clock: Clock = field(default_factory=Clock)
    engine: Scripted = field(default_factory=Scripted)
    pace: Pace = QUICK

    def __post_init__(self) -> None:
        self.settings = Settings(
            variants={
                "telea": {},
                "fill": {
                    "definition": {"family": "flux-fill", "file": "none.gguf", "base": "none"},
                    "max_prompt_tokens": 64,
                },
            },
            blobs=f"memory:{self.name}",
            jobs=f"memory:{self.name}",
            work={**FAST, **self.work_settings},
            messages={"completion_topic": "session-completed"},
        )
        self.blobs = BlobOutage(MemoryBlobStore(self.settings.blobs, "http://app.example.org"), StoreUnavailable)
        self.jobs = Outage(MemoryJobStore(self.settings.jobs, self.clock), StoreUnavailable)
        self.mirror = Outage(MemoryJobStore(self.settings.jobs), StoreUnavailable)
        self.topics = Topics()
        self.broker = Outage(self.topics, BrokerUnavailable)
        self.receivers = Receivers()
        self.linked = Linked()
        self.metrics = Counters()
        #: More than `settings` serve: a test may serve more.
        self.models = {name: LocalModel(name, self.engine) for name in ("telea", "fill", "b", "c")}
        self.editor = Editor(
            blobs=self.blobs,
            models=self.models,
            prompts=Prompts(),
            settings=self.settings,
            defaults=lambda: self.inference,
            links=self.linked,
        )
        self.kinds = [self.editor]
        self.notifier = Notifier(
            kinds=self.kinds,
            job_store=self.jobs,
            mirror=self.mirror,
            publisher=self.broker,
            webhooks=self.receivers,
            settings=self.settings,
            metrics=self.metrics,
            poll_s=0.01,
        )
        self.parts: dict[str, Any] = dict(
            kinds=self.kinds,
            job_store=self.jobs,
            mirror=self.mirror,
            publisher=self.broker,
            notifier=self.notifier,
            webhooks=self.receivers,
            metrics=self.metrics,
            models=self.models,
            settings=self.settings,
            pace=self.pace,
        )
        self.worker = Worker(**self.parts)

    def beside(self) -> "Rig":
        return Rig(self.work_settings, self.name, self.inference, self.clock, pace=self.pace)

    async def put(self, name: str, data: bytes, session: str = SESSION) -> None:
        content_type = "image/png" if name.endswith("png") else "image/jpeg"
        await self.blobs.put(session_path(USER, session, name), data, content_type=content_type)

    async def put_session(self, session: str = SESSION) -> None:
        await self.put("original.jpg", jpeg(photo()), session)
        await self.put("mask_auto.png", png(line_mask()), session)

    async def blob(self, name: str, session: str = SESSION) -> bytes:
        data, _ = await self.blobs.get(session_path(USER, session, name), max_bytes=10**8)
        found: bytes = data
        return found

    async def work(self, message_id: str = "m1", **fields: Any) -> Verdict:
        return await self.take(delivery(message_id, **fields))

    async def take(self, one: Delivery) -> Verdict:
        """Work on it, and wait until others were told of what came of it, or could not be."""
        verdict = await self.worker.work(one)
        await self.notifier.drained()
        return verdict

    async def job(self) -> Job:
        """The only job."""
        (job,) = await self.jobs.list()
        found: Job = job
        return found

    async def document(self, session: str = SESSION) -> Mapping[str, Any]:
        document: Mapping[str, Any] = await self.mirror.read_session(USER, session)
        return document


def delivery(message_id: str = "m1", attributes: Mapping[str, str] | None = None, **fields: Any) -> Delivery:
    body = {"userId": USER, "sessionId": SESSION, **fields}
    return Delivery(data=json.dumps(body).encode(), attributes=attributes or {}, message_id=message_id)


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Raises AssertionError when the condition does not come true in time."""
    deadline = time.monotonic() + timeout_s
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        tick.wait(0.02)
