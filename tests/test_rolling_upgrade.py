"""What happens to jobs when nodes and clusters end while a new app pulls beside the old one, rehearsed: a node is
killed 15 s after its notice, as on spot, and an old cluster is deleted, as an upgrade does.

The old cluster is a Ray of its own, with a head that holds no work and a worker, as KubeRay starts them: SIGTERM makes
each of them drain its node.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray import serve
from tenacity import retry, retry_if_result, stop_after_delay, wait_fixed

from deployments.app import STOP_S, build
from deployments.client import Client
from deployments.own_ray import OwnRay, free_port, own_ray
from serve_app import adapters
from serve_app.jobs.messages import EditMessage
from serve_app.jobs.record import State
from serve_app.settings import Inference, Settings, SubscriptionSettings

from .backends import Broker, Recorder, embedded_broker, until
from .rig import jpeg, line_mask, photo, png
from .serving import sleeper

pytestmark = [pytest.mark.serve, pytest.mark.usefixtures("own_apps"), pytest.mark.timeout(240)]

#: Between two messages, in seconds.
PAUSE_S = 0.4
COMPLETIONS = "session-completed"
OLD_STEPS = 3
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


def settings(folder: Path, broker: Broker, **variants: Any) -> Settings:
    """An app on these stores and this broker."""
    return Settings(
        blobs=f"files:{folder}/blobs",
        jobs=f"sqlite:{folder}/jobs.db",
        messages=broker.settings.model_copy(update={"url": f"pubsub://{broker.settings.url.partition('//')[2]}"}),
        push={"response_timeout_s": 1},
        weights={"cache": f"{folder}/weights"},
        work={"lease_s": 6, "renew_s": 1, "backoff_s": 0.3, "shutdown_grace_s": 1},
        variants=variants,
    )


@dataclass
class Cluster:
    """The old one."""

    ray: OwnRay
    environment: Mapping[str, str]
    folder: Path
    http_port: int

    @contextmanager
    def worker(self, *, drain_s: float) -> "Iterator[subprocess.Popen[bytes]]":
        """A node for the app, which drains for up to `drain_s` when it is sent SIGTERM."""
        environment = {**self.environment, DRAIN: str(drain_s)}
        options = ["--num-cpus=4", "--labels=pool=cpu", f"--dashboard-agent-listen-port={free_port()}"]
        command = ["start", f"--address={self.ray.address}", "--block", "--node-ip-address=127.0.0.1", *options]
        with (self.folder / "worker.log").open("ab") as log:
            node = subprocess.Popen([_program("ray"), *command], env=environment, stdout=log, stderr=log)
        try:
            yield node
        finally:
            _wait_gone(node.pid, kill_after_s=0)
            node.wait()

    def deploy(self, config: Settings) -> None:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(_serve_config(config, self.http_port)))
        deploy = [_program("serve"), "deploy", "-a", self.ray.dashboard, path]
        subprocess.run(deploy, env=self.environment, check=True, capture_output=True)

    @retry(stop=stop_after_delay(90), wait=wait_fixed(0.3), retry=retry_if_result(lambda ready: not ready))
    def wait_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.http_port}/ready", trust_env=False).status_code == 200
        return False


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A head without CPUs, which outlives its workers' drain as in k8s/."""
    # Ray takes loopback for a machine that cannot have a second node.
    more = {DRAIN: "60", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1"}
    environment = {**os.environ, **more}
    with own_ray(folder / "ray.log", environment, "--num-cpus=0") as ray:
        try:
            yield Cluster(ray, environment, folder, free_port())
        finally:
            # It would drain for as long as Serve's controller runs on it.
            _wait_gone(ray.pid, kill_after_s=0)


def _program(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def _wait_gone(pid: int, *, kill_after_s: float) -> bool:
    """Until the process and its descendants have ended, by SIGKILL where it takes longer. Whether it took that."""
    left: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        _, left = psutil.wait_procs([process, *process.children(recursive=True)], timeout=kill_after_s)
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    return bool(left)


def _serve_config(config: Settings, port: int) -> dict[str, Any]:
    """With the ingress kept to its pool, as in k8s/."""
    ingress = {
        "name": "Ingress",
        "ray_actor_options": {"num_cpus": 0.2, "label_selector": {"pool": "cpu"}},
        "user_config": {"variant": "nap", "steps": OLD_STEPS},
    }
    application = {
        "name": "old",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": config.model_dump(mode="json"),
        "deployments": [ingress],
    }
    options = {"host": "127.0.0.1", "port": port}
    return {"proxy_location": "EveryNode", "http_options": options, "applications": [application]}


@pytest.fixture
def broker() -> Iterator[Broker]:
    with embedded_broker(completion_topic=COMPLETIONS) as broker:
        yield broker


class Traffic:
    """A message for a new session every PAUSE_S seconds."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._client, self._photo, self._mask = client, folder / "photo.jpg", folder / "mask.png"
        self._photo.write_bytes(jpeg(photo()))
        self._mask.write_bytes(png(line_mask()))
        #: By id.
        self.jobs: list[str] = []

    async def flow(self) -> None:
        while True:
            message = EditMessage.model_validate({"userId": "u", "sessionId": f"s{len(self.jobs)}"}, by_name=False)
            self.jobs.append((await self._client.submit(message, self._photo, self._mask)).job_id)
            await asyncio.sleep(PAUSE_S)

    async def wait_for(self, count: int) -> None:
        """For so many more messages."""
        target = len(self.jobs) + count
        await until(lambda: len(self.jobs) >= target, 60)


async def test_a_killed_node_and_an_upgrade_lose_no_job_and_do_none_twice(tmp_path: Path, broker: Broker) -> None:
    nap = sleeper(0.5, min_replicas=2, max_replicas=2)
    old, new = settings(tmp_path, broker, nap=nap), settings(tmp_path, broker, nap=nap, other=sleeper(0.5))
    client, completions = Client(new), Recorder()
    traffic = Traffic(client, tmp_path)
    with cluster(tmp_path) as running:
        # Its drain would take longer than a spot node has.
        with running.worker(drain_s=60) as spot:
            await asyncio.to_thread(running.deploy, old)
            await asyncio.to_thread(running.wait_ready)
            flow = asyncio.create_task(traffic.flow())
            await asyncio.to_thread(serve.run, build(new), name="new", route_prefix="/new")
            # The two pull beside each other.
            await traffic.wait_for(10)
            spot.terminate()
            assert await asyncio.to_thread(_wait_gone, spot.pid, kill_after_s=15)
        killed = len(traffic.jobs)
        with running.worker(drain_s=STOP_S + 4) as node:
            await asyncio.to_thread(running.wait_ready)
            both = len(traffic.jobs)
            await traffic.wait_for(10)
            os.kill(running.ray.pid, signal.SIGTERM)
            node.terminate()
            assert not await asyncio.to_thread(_wait_gone, node.pid, kill_after_s=STOP_S + 20)
            await traffic.wait_for(5)
    flow.cancel()
    reader = broker.settings.model_copy(update={"subscriptions": {COMPLETIONS: SubscriptionSettings()}})
    async with Broker(broker.kind, reader).source(completions):
        await until(lambda: {json.loads(body)["jobId"] for body in completions.bodies} == set(traffic.jobs), 60)
    found = [job for job_id in traffic.jobs if (job := await client.get(job_id))]
    assert {job.status for job in found} == {State.SUCCEEDED}
    # By the steps that each app uses where a message says nothing: both have worked, before either end.
    for part in (found[:killed], found[both:]):
        assert {job.parameters.steps for job in part} == {OLD_STEPS, Inference().steps}
    # Nothing was written after a job had succeeded.
    blobs = adapters.blob_store(new.blobs)
    for artifact in (artifact for job in found for artifact in job.artifacts):
        assert (await blobs.head(artifact.path)).version == artifact.version
    told = Counter(json.loads(body)["jobId"] for body in completions.bodies)
    assert {told[job.id] for job in found[killed:]} == {1}
    assert {job.attempt for job in found[both:]} == {1}, "an app that stops gives its attempts back"
    assert max(job.attempt for job in found) == 2, "what was killed used an attempt"
