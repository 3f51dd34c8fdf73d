"""The app under test: its settings, its start, and the processes of its replicas."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from deployments.own_ray import free_port, serving
from serve_app.settings import MessagesSettings, Settings

NAME = "chaos"
BUCKET = "chaos"
INGRESS, INPAINTER = "Ingress", "Inpainter-telea"
LEASE_S = 10.0
#: With a kill as often as one starts, one or two are away at any time.
INPAINTERS = 5
INGRESSES = 2
#: A killed replica uses an attempt of each job in its hands: up to two in an inpainter, a dozen in an ingress. In two
#: runs of 500 sessions, with 169 and 179 kills, 8 and 17 jobs needed more than the default of 5, and none more than 8.
MAX_ATTEMPTS = 20


def settings(messages: MessagesSettings, *, postgres: int, s3: int) -> Settings:
    """The app with its stores at these ports: the proxies' for the app, the servers' own for who looks at them."""
    return Settings(
        blobs=f"s3://{BUCKET}?endpoint=http://127.0.0.1:{s3}&region=us-east-1",
        jobs=f"postgresql://postgres@127.0.0.1:{postgres}/postgres",
        messages=messages,
        variants={"telea": {"min_replicas": INPAINTERS, "max_replicas": INPAINTERS, "num_cpus": 0.1, "threads": 1}},
        ingress_replicas=INGRESSES,
        work={
            "lease_s": LEASE_S,
            "renew_s": 3,
            "max_attempts": MAX_ATTEMPTS,
            "backoff_s": 0.5,
            "backoff_max_s": 8,
            "shutdown_grace_s": 2,
        },
    )


@contextmanager
def running(config: Settings, logs: Path) -> Iterator[None]:
    """`serve run`, with every log in `logs`. Raises SettingsError where the app does not become ready."""
    port = free_port()
    shutil.rmtree(logs / "ray", ignore_errors=True)
    path = logs / "serve_config.yaml"
    path.write_text(yaml.safe_dump(_serve_config(config, port)))
    with serving(path, f"http://127.0.0.1:{port}", logs / "serve.log", logs / "ray"):
        yield


def _serve_config(config: Settings, port: int) -> dict[str, Any]:
    application = {
        "name": NAME,
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "autoscaling_policy": {"policy_function": "deployments.scaling:Policy"},
        "args": config.model_dump(mode="json"),
    }
    return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}


def pids(deployment: str, *, serving: bool = False) -> list[int]:
    """Processes of the deployment's replicas, or of those only that have started; only those that this process has
    started, by way of Ray's own."""
    title = f"ray::ServeReplica:{NAME}:{deployment}"
    found = []
    for process in psutil.Process().children(recursive=True):
        # What follows the name in the title is the method that runs.
        name, _, method = _title(process).partition(".")
        if name.rstrip() == title and not (serving and method.startswith(("__init__", "initialize"))):
            found.append(process.pid)
    return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
