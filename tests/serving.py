"""The real app on a Ray of the test session's own, deployed as an operator deploys it: `serve deploy CONFIG`."""

import base64
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from tenacity import retry, retry_if_result, stop_after_delay, wait_fixed

from deployments.client import Client, Submitted
from deployments.own_ray import free_port
from serve_app.jobs import Job
from serve_app.messages import EditMessage
from serve_app.settings import BUCKETS, Settings
from serve_app.variants import BUILT_IN

from .rig import jpeg, line_mask, photo, png

APP = "fluxfill"


#: Of the test session's app.
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"a key of the tests' own, 32 byte").decode()

#: Seconds from a job's SIGTERM to its SIGKILL: Ray's own 3 are too few on a machine that tests keep busy.
STOP_WAIT_S = 30


def args(folder: Path, port: int, http: int, receiver: int) -> dict[str, Any]:
    """Settings with short leases and waits, a slow variant, and one whose weights are not there."""
    quick = {"upscale_delay_s": 0.1, "num_cpus": 0.1}
    return {
        "blobs": f"files:{folder}/blobs",
        "jobs": f"sqlite:{folder}/jobs.db",
        "messages": {"url": f"embedded://127.0.0.1:{port}", "completion_topic": "session-completed"},
        "webhooks": {"hosts": [f"127.0.0.1:{receiver}"], "allow_http": True},
        "public_url": f"http://127.0.0.1:{http}",
        "variants": {
            "telea": {"min_replicas": 2, "max_replicas": 2, **quick},
            "slow": {"definition": {"family": "pause", "pause_s": 3}, "min_replicas": 1, **quick},
            "endless": {"definition": {"family": "pause", "pause_s": 60}, **quick},
            "broken": {"definition": {"family": "flux-fill", "file": "nowhere.gguf", "base": "tiny:base"}, **quick},
            "tiny-Q4_0": {**quick},
            "tiny-Q8_0": {**quick},
            "batched": {"definition": BUILT_IN["tiny-Q4_0"].model_dump(), "levers": {"max_batch": 4}, **quick},
        },
        # What tests paint is small.
        "windows": {"buckets": [(128, 128), *BUCKETS]},
        "text_encoder": {**quick},
        "weights": {"cache": f"{folder}/weights"},
        "work": {
            "lease_s": 4,
            "renew_s": 1,
            "backoff_s": 0.3,
            "max_attempts": 3,
            "cancel_poll_s": 0.2,
            "grace_s": 1,
        },
    }


@dataclass
class App:
    """The running app, and what its users and operators do."""

    folder: Path
    dashboard: str
    http: str
    raw: dict[str, Any]
    #: Where the app may call a receiver of webhooks.
    receiver_port: int

    @property
    def settings(self) -> Settings:
        return Settings.model_validate(self.raw["applications"][0]["args"])

    @property
    def client(self) -> Client:
        return Client(self.settings)

    def deploy(self, **inference: Any) -> None:
        """`serve deploy`, with these inference defaults."""
        self.raw["applications"][0]["deployments"] = [{"name": "Ingress", "user_config": inference}]
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.raw))
        serve = str(Path(sys.executable).with_name("serve"))
        subprocess.run([serve, "deploy", "-a", self.dashboard, str(path)], check=True, capture_output=True)

    @retry(stop=stop_after_delay(120), wait=wait_fixed(0.3), retry=retry_if_result(lambda ready: not ready))
    def wait_ready(self) -> bool:
        try:
            return httpx.get(f"{self.http}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ready(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.http}/ready").json()
        return answer

    def pids(self, deployment: str) -> set[int]:
        """Processes of the deployment's replicas."""
        title = f"ray::ServeReplica:{APP}:{deployment}"
        # The title is the whole command line; a name that goes on would be another deployment's.
        return {p.pid for p in psutil.process_iter() if _title(p).split(".")[0].rstrip() == title}

    def kill(self, deployment: str) -> None:
        """SIGKILL every replica of the deployment."""
        for pid in self.pids(deployment):
            os.kill(pid, signal.SIGKILL)

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


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def running(
    folder: Path, variants: Mapping[str, Any] | None = None, *, variant: str = "telea", num_gpus: int = 0
) -> Iterator[App]:
    """Start Ray, deploy, wait until the default `variant` can serve; stop everything at the end. `variants` are served
    in place of the usual ones; GPUs are a number that Ray believes."""
    import ray
    from ray import serve

    dashboard, http, receiver = free_port(), free_port(), free_port()
    # Ray's processes inherit it.
    os.environ |= {"WEBHOOK_SECRET": WEBHOOK_SECRET, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    own = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ray.init(
        num_cpus=8,
        num_gpus=num_gpus,
        include_dashboard=True,
        dashboard_port=dashboard,
        log_to_driver=False,
        _temp_dir=own,
    )
    # A job is connected to the cluster that this file names, and without it to any Ray of this machine.
    Path(own, "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
    raw = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": http},
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": args(folder, free_port(), http, receiver) | ({"variants": variants} if variants else {}),
            }
        ],
    }
    app = App(
        folder=folder,
        dashboard=f"http://127.0.0.1:{dashboard}",
        http=f"http://127.0.0.1:{http}",
        raw=raw,
        receiver_port=receiver,
    )
    try:
        app.deploy(variant=variant, steps=12)
        app.wait_ready()
        yield app
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(own, ignore_errors=True)
        del os.environ["WEBHOOK_SECRET"], os.environ["RAY_JOB_STOP_WAIT_TIME_S"]
