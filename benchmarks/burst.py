"""A burst of messages for an app whose replicas all sleep: how soon they are there, and that they go again.

The whole app runs on this machine as it would on Google's services: `pubsub:` with a stand-in for Pub/Sub and one for
Cloud Monitoring, whose answers are exact, late, absent or wrong. An engine that sleeps paints, on replicas with a small
share of a CPU. In each scenario one message comes first, so that a request waits in a handle, and then all others.

    python -m benchmarks.burst [--messages 200] [--replicas 8] [--look-back 30] [--out FILE] [--chart FILE]

Prints, last, a JSON object: seconds from the publication until so many replicas are wanted, and run; until all jobs are
done; and until no replica is wanted. The series are those of the chart.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import httpx
import yaml
from google.pubsub_v1 import types
from google.pubsub_v1.services.publisher import PublisherAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport

from deployments.own_ray import OwnRay, free_port, own_ray, ray_environment
from serve_app import adapters
from serve_app.adapters.pubsub.client import Connection, subscription_path, topic_path
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.edit.session import session_path
from serve_app.jobs.messages import EditMessage
from serve_app.jobs.record import State
from serve_app.settings import MessagesSettings, Scaling, Settings

from .context import machine
from .serving import Scenario, session_files

VARIANT = "nap"
APP = "burst"
USER = "bench"
PAUSE_S = 1.0
#: How late the late readings are, in seconds.
LATE_S = 120.0
SAMPLE_S = 0.1
#: A burst takes no longer, in seconds.
LIMIT_S = 300.0

Answers = Literal["exact", "late", "absent", "wrong"]
ANSWERS: tuple[Answers, ...] = ("exact", "late", "absent", "wrong")


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    #: Replicas that the autoscaler wants, and those that run.
    wanted: int
    running: int
    #: Messages that are not acknowledged.
    messages: int


@dataclass
class Site:
    """The running app, its broker, and what Cloud Monitoring answers."""

    settings: Settings
    broker: EmbeddedPubSub
    folder: Path
    answers: Answers = "exact"
    sent: int = 0

    @property
    def waiting(self) -> int:
        return int(self.broker.backlog(self._subscriptions).messages)

    @property
    def _subscriptions(self) -> list[str]:
        return [subscription_path(self.settings.messages, name) for name in self.settings.messages.subscriptions]

    def points(self) -> list[dict[str, Any]]:
        """`timeSeries` of either metric: its values differ only in what nothing here needs."""
        if self.answers == "absent":
            return []
        value, at = self.waiting, time.time()
        if self.answers != "exact":
            value, at = 0, at - (LATE_S if self.answers == "late" else 0.0)
        end = datetime.fromtimestamp(at, UTC).isoformat()
        return [
            {
                "resource": {"labels": {"subscription_id": name}},
                "points": [{"interval": {"endTime": end}, "value": {"int64Value": str(value)}}],
            }
            for name in self.settings.messages.subscriptions
        ]

    async def upload(self, count: int) -> list[bytes]:
        """So many sessions; their messages."""
        store = adapters.blob_store(self.settings.blobs)
        original, mask = session_files(self.folder, Scenario("", PAUSE_S, 512, 512, ""))
        names = [f"s{self.sent + i}" for i in range(count)]
        self.sent += count
        for name in names:
            for role, file, kind in (("original.jpg", original, "jpeg"), ("mask_auto.png", mask, "png")):
                await store.put(session_path(USER, name, role), file.read_bytes(), content_type=f"image/{kind}")
        messages = (EditMessage(userId=USER, sessionId=name) for name in names)
        return [one.model_dump_json(by_alias=True, exclude_none=True).encode() for one in messages]

    async def publish(self, messages: Sequence[bytes]) -> None:
        """In one call."""
        transport = Connection(self.settings.messages).transport(PublisherGrpcAsyncIOTransport)
        sent = [types.PubsubMessage(data=data) for data in messages]
        topic = topic_path(self.settings.messages, self.settings.messages.topic)
        await PublisherAsyncClient(transport=transport).publish(topic=topic, messages=sent)

    async def done(self) -> int:
        store = adapters.job_store(self.settings.jobs)
        return len(await store.list(status=State.SUCCEEDED, limit=self.sent + 1))

    async def burst(self, messages: int, answers: Answers) -> list[Sample]:
        """From no replica, over all jobs done, back to none. Raises TimeoutError."""
        self.answers, samples = answers, list[Sample]()
        first, *others = await self.upload(messages)
        await self.publish([first])
        async with asyncio.timeout(LIMIT_S):
            while not self._look(0.0).wanted:
                await asyncio.sleep(SAMPLE_S)
            await self.publish(others)
            started = time.monotonic()
            while True:
                now = self._look(time.monotonic() - started)
                samples.append(now)
                if not now.wanted and not now.running and not now.messages:
                    break
                await asyncio.sleep(SAMPLE_S)
        if (done := await self.done()) != self.sent:
            raise RuntimeError(f"{done} of {self.sent} jobs are done")
        return samples

    def _look(self, at_s: float) -> Sample:
        from ray.serve.context import _get_global_client

        from deployments.app import inpainter_name

        details = _get_global_client().get_serve_details()["applications"][APP]["deployments"][inpainter_name(VARIANT)]
        running = sum(replica["state"] == "RUNNING" for replica in details["replicas"])
        return Sample(at_s, details["target_num_replicas"] or 0, running, self.waiting)


def settings(folder: Path, replicas: int) -> Settings:
    pause = {"definition": {"family": "pause", "pause_s": PAUSE_S}, "num_cpus": 0.01, "max_replicas": replicas}
    return Settings(
        blobs=f"files:{folder}/blobs",
        jobs=f"sqlite:{folder}/jobs.db",
        messages={"url": "pubsub:"},
        push={"enabled": False},
        variants={VARIANT: {**pause, "downscale_delay_s": 5.0}},
    )


def monitoring(site: Site, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"timeSeries": site.points()}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


@contextmanager
def site(folder: Path, replicas: int, look_back_s: float) -> Iterator[Site]:
    """The app, deployed on a Ray of its own, to which this process is connected."""
    ports = {"PUBSUB_EMULATOR_HOST": free_port(), "MONITORING_EMULATOR_HOST": free_port()}
    os.environ.update(ray_environment() | {name: f"127.0.0.1:{port}" for name, port in ports.items()})
    embedded = MessagesSettings(url=f"embedded://{os.environ['PUBSUB_EMULATOR_HOST']}")
    config = settings(folder, replicas)
    with EmbeddedPubSub.of(embedded) as broker, own_ray(folder / "ray.log", os.environ, "--num-cpus=4") as ray:
        running = Site(config, broker, folder)
        server = monitoring(running, ports["MONITORING_EMULATOR_HOST"])
        Thread(target=server.serve_forever, daemon=True).start()
        deploy(config, ray, folder / "config.yaml", look_back_s)
        with connected(ray):
            yield running
        server.shutdown()


def deploy(config: Settings, ray: OwnRay, path: Path, look_back_s: float) -> None:
    """`serve deploy`. Raises TimeoutError where the app does not get ready."""
    from deployments.app import inpainter_name
    from deployments.config import BUILDER, POLICY

    port = free_port()
    scaling = config.variants[VARIANT].model_dump(include=Scaling.model_fields.keys() - {"num_cpus"})
    autoscaling = {**scaling, "look_back_period_s": look_back_s}
    application = {
        "name": APP,
        "deployments": [{"name": inpainter_name(VARIANT), "autoscaling_config": autoscaling}],
        "import_path": BUILDER,
        "autoscaling_policy": {"policy_function": POLICY},
        "args": config.model_dump(mode="json"),
    }
    http = {"host": "127.0.0.1", "port": port}
    path.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
    serve = str(Path(sys.executable).with_name("serve"))
    subprocess.run([serve, "deploy", "-a", ray.dashboard, str(path)], check=True)
    ends_at = time.monotonic() + LIMIT_S
    while time.monotonic() < ends_at:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise TimeoutError("the app does not get ready")


@contextmanager
def connected(own: OwnRay) -> Iterator[None]:
    import ray
    from ray import serve

    ray.init(address=own.address, log_to_driver=False)
    try:
        yield
        serve.shutdown()
    finally:
        ray.shutdown()


def figures(samples: Sequence[Sample], replicas: int) -> dict[str, Any]:
    def first(holds: Callable[[Sample], bool]) -> float | None:
        return next((round(one.at_s, 1) for one in samples if holds(one)), None)

    return {
        "all_wanted_s": first(lambda one: one.wanted == replicas),
        "all_running_s": first(lambda one: one.running == replicas),
        "all_done_s": first(lambda one: not one.messages),
        "none_wanted_s": first(lambda one: not one.wanted and not one.messages),
        #: What was wanted, one after the other.
        "steps": [wanted for wanted, _ in groupby(one.wanted for one in samples)],
    }


def chart(series: Mapping[Answers, list[Sample]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(series), 1, figsize=(8, 2 * len(series)), sharex=True, layout="constrained")
    for axes, (answers, samples) in zip(rows, series.items(), strict=True):
        at = [one.at_s for one in samples]
        axes.step(at, [one.wanted for one in samples], where="post")
        axes.step(at, [one.running for one in samples], where="post")
        axes.set(ylabel="replicas", title=f"the reading is {answers}")
        queue = axes.twinx()
        (messages,) = queue.plot(at, [one.messages for one in samples], color="gray")
        queue.set(ylabel="messages", ylim=(0, None))
    lines = [*rows[0].get_lines(), messages]
    names = ["replicas wanted", "replicas that run", "messages"]
    figure.legend(lines, names, loc="outside upper center", ncols=3)
    rows[-1].set(xlabel="seconds from the publication")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--look-back", type=float, default=30.0, help="over which Serve averages requests, in seconds")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    series: dict[Answers, list[Sample]] = {}
    with tempfile.TemporaryDirectory() as name, site(Path(name), args.replicas, args.look_back) as running:
        for answers in ANSWERS:
            series[answers] = asyncio.run(running.burst(args.messages, answers))
    found: dict[str, Any] = {answers: figures(samples, args.replicas) for answers, samples in series.items()}
    found |= {
        "messages": args.messages,
        "replicas": args.replicas,
        "look_back_s": args.look_back,
        "pause_s": PAUSE_S,
        **machine(("ray",)),
    }
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    if args.chart:
        chart(series, args.chart)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
