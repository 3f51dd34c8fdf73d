"""The app under test: its settings, its start, and the processes of its replicas."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # its types are a package of their own

from deployments.own_ray import free_port, ray_environment
from serve_app.settings import MessagesSettings, Settings

NAME = "chaos"
BUCKET = "chaos"
INGRESS, INPAINTER = "Ingress", "Inpainter-telea"
LEASE_S = 10.0
#: Serve finds a dead replica within 10 s and starts another in some 5 s: with a kill every 5 s about three are away.
INPAINTERS = 5
INGRESSES = 2
#: A killed replica uses an attempt of each job in its hands, up to two in an inpainter and a dozen in an ingress. At
#: this rate of killing about one attempt in four ends so: of 500 sessions one would use up the default 5, and with 12
#: one in ten thousand runs loses a job.
MAX_ATTEMPTS = 12


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
            "grace_s": 2,
        },
    )


@contextmanager
def own_ray(logs: Path) -> Iterator[None]:
    """Ray and Serve on this machine, gone at the end, when their logs are copied to `logs/ray`."""
    # moto takes any key. Ray's processes get what is set here.
    os.environ.update(ray_environment(), AWS_ACCESS_KEY_ID="chaos", AWS_SECRET_ACCESS_KEY="chaos")
    import ray
    from ray import serve

    context = ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        session = Path(context.address_info["session_dir"])
        shutil.copytree(session / "logs", logs / "ray", dirs_exist_ok=True)


def deploy(config: Settings) -> None:
    """Returns when every replica runs."""
    from ray import serve

    from deployments.app import build

    serve.run(build(config), name=NAME)


def pids(deployment: str) -> list[int]:
    """Processes of the deployment's replicas; only those that this process has started, by way of Ray's own."""
    title = f"ray::ServeReplica:{NAME}:{deployment}"
    # What follows the name in the title is the method that runs.
    children = psutil.Process().children(recursive=True)
    return [process.pid for process in children if _title(process).split(".")[0].rstrip() == title]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
