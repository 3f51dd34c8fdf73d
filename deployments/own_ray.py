"""A Ray of one's own on this machine: its environment, a port for it, and `serve run` as a child process.

Imports no Ray, which reads its environment when it is first imported.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from tenacity import RetryError, retry, retry_if_result, stop_after_delay, wait_fixed

from serve_app.errors import SettingsError

START_S = 120
#: A head that is stopped would wait 30 s for what runs on it, unless the given environment says otherwise.
_NO_DRAIN = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}


_GIVEN = set[int]()


def free_port() -> int:
    """A free loopback port that this process was not given before. It lies below the ephemeral range, whose ports an
    outgoing connection could take before the server starts."""
    for port in random.sample(sorted(set(range(20_000, 32_000)) - _GIVEN), 200):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            _GIVEN.add(port)
            return port
    raise SettingsError("no free port between 20000 and 32000")


@dataclass(frozen=True, kw_only=True)
class OwnRay:
    """A running Ray."""

    address: str
    dashboard: str
    #: All processes of Ray descend from this one.
    pid: int


@contextmanager
def own_ray(
    log: Path, environment: Mapping[str, str], *options: str, process_logs: Path | None = None
) -> Iterator[OwnRay]:
    """`ray start --head` with these further options, ready when entered, gone when left. The logs of its processes are
    copied to `process_logs` then.

    Each of its servers has a free port, so that it runs beside another Ray: by default each Ray on a machine gives the
    same port to its job agent, and the second one takes no jobs. What still runs on it when it is left is killed.
    Raises SettingsError, with the end of the log, when it does not start.
    """
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    # A short path: Ray keeps its sockets there.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    command = [_program("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    process = _started([*command, "--disable-usage-stats", *options], {**_NO_DRAIN, **environment}, log)
    try:
        # Written once Ray runs. Jobs are connected to the Ray that it names.
        _wait("Ray", process, (folder / "ray_current_cluster").exists, log)
        yield OwnRay(
            address=f"127.0.0.1:{ports['port']}",
            dashboard=f"http://127.0.0.1:{ports['dashboard-port']}",
            pid=process.pid,
        )
    finally:
        _stop(process, signal.SIGTERM)
        if process_logs:
            for logs in folder.glob("session_2*/logs"):
                shutil.copytree(logs, process_logs, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def serving(config: Path, url: str, log: Path, process_logs: Path | None = None) -> Iterator[None]:
    """`serve run config` on an own Ray, ready when entered, gone when left. `process_logs` as in own_ray.

    Raises SettingsError, with the end of the log, when it does not become ready.
    """
    environment = ray_environment()
    with own_ray(log.with_name("ray.log"), environment, process_logs=process_logs) as ray:
        app = _started([_program("serve"), "run", f"--address={ray.address}", str(config)], environment, log)
        try:
            _wait_ready(app, url, log)
            yield
        finally:
            _stop(app, signal.SIGINT)


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _started(command: list[str], environment: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """In a process group of its own."""
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            # Photos are their owner's alone.
            umask=0o077,
            # Only SIGINT ends `serve run` cleanly, and a process started in the background may have it ignored.
            preexec_fn=_take_interrupts,
        )


def ray_environment() -> dict[str, str]:
    """For a Ray of one's own on this machine: token authentication with a token of this run, loopback only."""
    return {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _take_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_ready(app: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    def ready() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200
        return False

    _wait("the app", app, ready, log)


def _wait(what: str, process: "subprocess.Popen[bytes]", is_ready: Callable[[], bool], log: Path) -> None:
    @retry(stop=stop_after_delay(START_S), wait=wait_fixed(0.3), retry=retry_if_result(lambda ready: not ready))
    def ready() -> bool:
        if process.poll() is not None:
            raise SettingsError(f"{what} exited while it started; the end of {log}:\n{_tail(log)}")
        return is_ready()

    try:
        ready()
    except RetryError:
        raise SettingsError(f"{what} is not ready after {START_S} s; the end of {log}:\n{_tail(log)}") from None


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _stop(process: "subprocess.Popen[bytes]", by: signal.Signals) -> None:
    process.send_signal(by)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
