"""The one Ray of a test run, and the real app on it, deployed as an operator deploys it: `serve deploy CONFIG`.

Whatever needs Ray shares it: Ray and Serve are started once, and an app is deployed once for all tests that use it.
"""

import base64
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from tenacity import retry, retry_if_result, stop_after_delay, wait_fixed

from deployments.app import inpainter_name
from deployments.audit_job import POOL
from deployments.client import Client, Submitted
from deployments.own_ray import OwnRay, free_port, own_ray
from serve_app.jobs.messages import EditMessage
from serve_app.jobs.record import Job
from serve_app.settings import BUCKETS, Settings

from .rig import jpeg, line_mask, photo, png

APP = "fluxfill"

#: Of inference, as the shared app is deployed.
DEFAULTS = {"variant": "telea", "steps": 12}


#: Of the test session's app.
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"a key of the tests' own, 32 byte").decode()

#: Seconds from a job's SIGTERM to its SIGKILL: Ray's own 3 are too few on a machine that tests keep busy.
STOP_WAIT_S = 30


QUICK = {"upscale_delay_s": 0.1, "num_cpus": 0.1}


def sleeper(pause_s: float, *, num_gpus: int = 0, **scaling: Any) -> dict[str, Any]:
    """A variant that sleeps in place of painting."""
    return {"definition": {"family": "pause", "pause_s": pause_s, "num_gpus": num_gpus}, **QUICK, **scaling}


#: A slow one, one whose weights are not there, and two of which each wants the GPU that Ray believes in.
VARIANTS: Mapping[str, Any] = {
    "telea": {"min_replicas": 2, "max_replicas": 2, **QUICK},
    "slow": sleeper(3, min_replicas=1),
    "endless": sleeper(60),
    "broken": {"definition": {"family": "flux-fill", "file": "nowhere.gguf", "base": "tiny:base"}, **QUICK},
    "tiny-Q4_0": {**QUICK},
    "tiny-Q8_0": {**QUICK},
    "nap": sleeper(0.5, min_replicas=2, max_replicas=2),
    "gpu-a": sleeper(0.1, num_gpus=1, downscale_delay_s=0.1),
    "gpu-b": sleeper(0.1, num_gpus=1, downscale_delay_s=0.1),
}


def args(folder: Path, port: int, http: int, receiver: int) -> dict[str, Any]:
    """Settings with short leases and waits."""
    return {
        "blobs": f"files:{folder}/blobs",
        "jobs": f"sqlite:{folder}/jobs.db",
        "messages": {"url": f"embedded://127.0.0.1:{port}", "completion_topic": "session-completed"},
        "webhooks": {"hosts": [f"127.0.0.1:{receiver}"], "allow_http": True},
        "public_url": f"http://127.0.0.1:{http}",
        "variants": dict(VARIANTS),
        "generators": {
            "fake": {"max_replicas": 2, **QUICK},
            "tiny-sdxl": {"max_replicas": 2, **QUICK},
            "tiny-flux-dev": {**QUICK},
        },
        # What tests paint is small.
        "windows": {"buckets": [(128, 128), *BUCKETS]},
        "text_encoder": {**QUICK},
        "weights": {"cache": f"{folder}/weights"},
        "work": {
            "lease_s": 4,
            "renew_s": 1,
            "backoff_s": 0.3,
            "max_attempts": 3,
            "shutdown_grace_s": 1,
        },
    }


def _soon_stopped(variant: str) -> dict[str, Any]:
    """Its deployment, which Serve looks at often: by default it counts the requests of the last 30 s."""
    often = {"metrics_interval_s": 0.5, "look_back_period_s": 1.0, "upscale_delay_s": 0.1, "downscale_delay_s": 0.1}
    return {"name": inpainter_name(variant), "autoscaling_config": {"min_replicas": 0, "max_replicas": 1, **often}}


@dataclass
class App:
    """The running app, and what its users and operators do."""

    folder: Path
    dashboard: str
    http: str
    raw: dict[str, Any]
    #: Where the app may call a receiver of webhooks.
    receiver_port: int
    #: Every process of Ray's descends from this one.
    ray_pid: int
    is_deployed: bool = False

    @property
    def settings(self) -> Settings:
        return Settings.model_validate(self.raw["applications"][0]["args"])

    @property
    def client(self) -> Client:
        return Client(self.settings)

    def deploy(self, **inference: Any) -> None:
        """`serve deploy`, with these inference defaults."""
        self.is_deployed = True
        ingress = {"name": "Ingress", "user_config": inference}
        self.raw["applications"][0]["deployments"] = [ingress, *(_soon_stopped(name) for name in ("gpu-a", "gpu-b"))]
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.raw))
        serve = str(Path(sys.executable).with_name("serve"))
        subprocess.run([serve, "deploy", "-a", self.dashboard, str(path)], check=True, capture_output=True)

    def ensure(self) -> None:
        """Deployed and ready."""
        if not self.is_deployed:
            self.deploy(**DEFAULTS)
            self.wait_ready()

    def stop(self) -> None:
        """As `serve run` ends when it is interrupted: every replica gives back what it works on."""
        from ray import serve

        self.is_deployed = False
        serve.shutdown()

    @retry(stop=stop_after_delay(120), wait=wait_fixed(0.3), retry=retry_if_result(lambda ready: not ready))
    def wait_ready(self) -> bool:
        try:
            return httpx.get(f"{self.http}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ready(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.http}/ready").json()
        return answer

    def processes(self) -> Iterator[tuple[psutil.Process, list[str]]]:
        """Those of this Ray alone, with their command lines."""
        for process in psutil.Process(self.ray_pid).children(recursive=True):
            with suppress(psutil.Error):
                yield process, process.cmdline()

    def pids(self, deployment: str) -> set[int]:
        """Processes of the deployment's replicas."""
        title = f"ray::ServeReplica:{APP}:{deployment}"
        # The title is the whole command line; a name that goes on would be another deployment's.
        return {p.pid for p, command in self.processes() if " ".join(command).split(".")[0].rstrip() == title}

    def kill(self, deployment: str) -> None:
        """SIGKILL every replica of the deployment."""
        for pid in self.pids(deployment):
            os.kill(pid, signal.SIGKILL)

    @property
    def logs(self) -> Path:
        """Of every process of this Ray; this process must be connected."""
        import ray

        return Path(ray._private.worker._global_node.get_logs_dir_path())

    def photo_files(self) -> tuple[Path, Path]:
        original, mask = self.folder / "photo.jpg", self.folder / "mask.png"
        original.write_bytes(jpeg(photo()))
        mask.write_bytes(png(line_mask()))
        return original, mask

    async def submit(
        self, session: str | None = None, *, attributes: Mapping[str, str] | None = None, **fields: Any
    ) -> str:
        message = EditMessage.model_validate(
            {"userId": "u", "sessionId": session or uuid.uuid4().hex, **fields}, by_name=False
        )
        return (await self.client.submit(message, *self.photo_files(), attributes=attributes)).job_id

    async def finished(self, job_id: str, timeout_s: float = 90) -> Job:
        return await self.client.follow(Submitted(job_id), lambda job: None, timeout_s=timeout_s)


@dataclass(frozen=True)
class TestRay:
    """The Ray of this test run: eight CPUs, and one GPU that it only believes in."""

    __test__ = False

    ray: OwnRay
    #: Where Serve listens.
    port: int

    def start_serve(self) -> None:
        """Nothing where it runs already. This process must be connected."""
        from ray import serve

        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port})


class Collector(ThreadingHTTPServer):
    """Takes spans as an OpenTelemetry collector does, by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Collected)
        #: The service and the spans of each of its messages.
        self.received: list[tuple[str, Span]] = []

    def of_trace(self, trace_id: str) -> list[tuple[str, Span]]:
        return [(service, span) for service, span in self.received if span.trace_id.hex() == trace_id]

    def environment(self, sampler: str) -> dict[str, str]:
        """Of a process whose spans come here, soon."""
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_TRACES_SAMPLER": sampler,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }


class _Collected(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for of_service in sent.resource_spans:
            [name] = (item.value.string_value for item in of_service.resource.attributes if item.key == "service.name")
            self.server.received += [(name, span) for scope in of_service.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with Collector() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def test_ray(tmp_path_factory: pytest.TempPathFactory, firebase_number: int, collector: Collector) -> Iterator[TestRay]:
    environment = {
        **os.environ,
        "WEBHOOK_SECRET": WEBHOOK_SECRET,
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        # For an app whose blobs are Firebase's, and its jobs.
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{firebase_number}",
        # Of messages whose publisher traces them, and of no others.
        **collector.environment("parentbased_always_off"),
    }
    log = tmp_path_factory.mktemp("ray") / "ray.log"
    with own_ray(log, environment, "--num-cpus=8", "--num-gpus=1", f"--labels={POOL}=tests") as ray:
        yield TestRay(ray, free_port())


@pytest.fixture(scope="module")
def connection(test_ray: TestRay) -> Iterator[TestRay]:
    """This process connected to Ray, only for a module: other tests run in it, too."""
    import ray
    from ray.serve import context

    ray.init(address=test_ray.ray.address, log_to_driver=False)
    yield test_ray
    # Handles report their load for ever, by a new Ray where this one is left.
    if client := context._get_global_client(raise_if_no_controller_running=False):
        client.shutdown_cached_handles()
    ray.shutdown()


@pytest.fixture
def own_apps(connection: TestRay) -> Iterator[None]:
    """Apps that a test starts are deleted after it."""
    from ray import serve

    connection.start_serve()
    before = set(serve.status().applications)
    yield
    for name in set(serve.status().applications) - before:
        serve.delete(name)


@pytest.fixture(scope="session")
def deployable_app(test_ray: TestRay, tmp_path_factory: pytest.TempPathFactory) -> App:
    folder, receiver = tmp_path_factory.mktemp("app"), free_port()
    application = {
        "name": APP,
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "autoscaling_policy": {"policy_function": "deployments.scaling:Policy"},
        "args": args(folder, free_port(), test_ray.port, receiver),
    }
    raw = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": test_ray.port},
        "applications": [application],
    }
    return App(
        folder=folder,
        dashboard=test_ray.ray.dashboard,
        http=f"http://127.0.0.1:{test_ray.port}",
        raw=raw,
        receiver_port=receiver,
        ray_pid=test_ray.ray.pid,
    )


@pytest.fixture
def app(connection: TestRay, deployable_app: App) -> App:
    """The app that all tests share, with the same defaults for each of them."""
    connection.start_serve()
    deployable_app.ensure()
    return deployable_app
