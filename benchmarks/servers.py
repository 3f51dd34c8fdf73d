"""Servers that a benchmark runs beside the app: each in a process of its own, on loopback, gone when its `with` ends.

Ready when entered; a store yields its port. A missing program is a FileNotFoundError, a server that does not start a
RuntimeError that names its log.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psycopg
from google.pubsub_v1.services.publisher import PublisherClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber import SubscriberClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from deployments.own_ray import free_port
from serve_app.adapters.pubsub.client import subscription_path, topic_path
from serve_app.settings import MessagesSettings

START_S = 60.0
STOP_S = 10.0


class _NotYet(Exception):
    """The server does not answer yet."""


@contextmanager
def postgres(logs: Path) -> Iterator[int]:
    """PostgreSQL with a new, empty database `postgres`, whose user `postgres` needs no password."""
    programs, port = _postgres_programs(), free_port()
    # It refuses to run as root.
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": ()} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        if user:
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"
        initdb: list[str | Path] = [
            programs / "initdb",
            "--auth=trust",
            "--username=postgres",
            "--encoding=UTF8",
            "--no-sync",
            data,
        ]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **user)
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        command = [
            programs / "postgres",
            "-D",
            data,
            "-p",
            port,
            *(f"--{key}={value}" for key, value in options.items()),
        ]
        with _running(command, logs / "postgres.log", stop_by=signal.SIGINT, cwd=folder, **user) as process:
            _wait(process, logs / "postgres.log", lambda: _database_answers(port))
            yield port


@contextmanager
def s3(logs: Path) -> Iterator[int]:
    """moto's S3, in memory."""
    port = free_port()
    command = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", port]
    with _running(command, logs / "s3.log") as process:
        _wait(process, logs / "s3.log", lambda: _port_answers(port))
        yield port


@contextmanager
def embedded_pubsub(settings: MessagesSettings, logs: Path) -> Iterator[None]:
    """The embedded Pub/Sub server at the address of `settings.url`, with the topics and subscriptions in `settings`."""
    command = [sys.executable, "-m", "benchmarks.embedded_pubsub", settings.model_dump_json()]
    with _running(command, logs / "pubsub.log") as process:
        _wait(process, logs / "pubsub.log", lambda: _port_answers(_port(settings)))
        yield


@contextmanager
def google_pubsub(settings: MessagesSettings, logs: Path) -> Iterator[None]:
    """Google's emulator at the address of `settings.url`, with the topics and subscriptions in `settings`."""
    java = ["java", "-Xmx256m", "-XX:+UseSerialGC", "-jar", _emulator_jar()]
    with _running([*java, "--host=127.0.0.1", f"--port={_port(settings)}"], logs / "pubsub.log") as process:
        _wait(process, logs / "pubsub.log", lambda: _port_answers(_port(settings)))
        _make_topics(settings)
        yield


def _make_topics(settings: MessagesSettings) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{_port(settings)}") as channel:
        publisher = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        subscriptions = dict.fromkeys(settings.subscriptions, settings.topic)
        for topic in (settings.topic, settings.dead_letter_topic):
            publisher.create_topic(name=topic_path(settings, topic))
        for name, topic in {**subscriptions, settings.dead_letter_subscription: settings.dead_letter_topic}.items():
            names = {"name": subscription_path(settings, name), "topic": topic_path(settings, topic)}
            subscriber.create_subscription(request={**names, "ack_deadline_seconds": 10})


@contextmanager
def _running(
    command: Sequence[object], log: Path, *, stop_by: int = signal.SIGTERM, **options: Any
) -> "Iterator[subprocess.Popen[bytes]]":
    # A session of its own, so that Ctrl-C reaches the benchmark alone, which then ends the servers in order.
    with log.open("wb") as out:
        words = [str(word) for word in command]
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        yield process
    finally:
        process.send_signal(stop_by)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", log: Path, answers: Callable[[], bool]) -> None:
    def look() -> None:
        if process.poll() is not None:
            raise RuntimeError(f"a server ended at its start; see {log}")
        if not answers():
            raise _NotYet

    try:
        Retrying(retry=retry_if_exception_type(_NotYet), stop=stop_after_delay(START_S), wait=wait_fixed(0.1))(look)
    except RetryError:
        raise RuntimeError(f"a server does not answer after {START_S:g} s; see {log}") from None


def _port_answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _database_answers(port: int) -> bool:
    try:
        psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _port(settings: MessagesSettings) -> int:
    return int(settings.url.rpartition(":")[2])


def _postgres_programs() -> Path:
    """Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    if not folders:
        raise FileNotFoundError("PostgreSQL's initdb is not on this machine")
    return folders[-1]


def _emulator_jar() -> Path:
    gcloud = shutil.which("gcloud")
    if gcloud is None or shutil.which("java") is None:
        raise FileNotFoundError("Google's Pub/Sub emulator needs java and gcloud")
    sdk = Path(gcloud).resolve().parent.parent
    jars = sorted(sdk.glob("platform/pubsub-emulator/lib/cloud-pubsub-emulator-*.jar"))
    if not jars:
        raise FileNotFoundError("gcloud has no component pubsub-emulator")
    return jars[-1]
