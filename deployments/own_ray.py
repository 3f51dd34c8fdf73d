"""A Ray of one's own on this machine: its environment, a port for it, and `serve run` as a child process.

Imports no Ray, which reads its environment when it is first imported.
"""

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from tenacity import RetryError, retry, retry_if_exception_type, retry_if_result, stop_after_delay, wait_fixed

from serve_app.errors import SettingsError

START_S = 120


def free_port() -> int:
    """A loopback port nobody listens on, below the range that outgoing connections are given ports from: one of those
    could be taken again before the server that it is for starts."""
    for port in random.sample(range(20_000, 32_000), 200):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise SettingsError("no free port between 20000 and 32000")


@contextmanager
def serving(config: Path, url: str, log: Path) -> Iterator[None]:
    """`serve run config` in a process group of its own, ready when entered, gone when left.

    Raises SettingsError, with the end of the log, when it does not become ready.
    """
    with log.open("wb") as out:
        app = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(config)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=ray_environment(),
            start_new_session=True,
            # Photos are their owner's alone.
            umask=0o077,
            # Only SIGINT ends `serve run` cleanly, and a process started in the background may have it ignored.
            preexec_fn=_take_interrupts,
        )
    try:
        _wait_ready(app, url, log)
        yield
    finally:
        _stop(app)


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
    @retry(
        stop=stop_after_delay(START_S),
        wait=wait_fixed(0.3),
        retry=retry_if_exception_type(httpx.TransportError) | retry_if_result(lambda ready: not ready),
    )
    def ready() -> bool:
        if app.poll() is not None:
            raise SettingsError(f"the app ended at its start; the end of {log}:\n{_tail(log)}")
        return httpx.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200

    try:
        ready()
    except RetryError:
        raise SettingsError(f"not ready after {START_S} s; the end of {log}:\n{_tail(log)}") from None


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _stop(app: "subprocess.Popen[bytes]") -> None:
    app.send_signal(signal.SIGINT)
    try:
        app.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(app.pid, signal.SIGKILL)
        app.wait()
