"""This machine is reached directly: a proxy that the environment names is for the network, and knows no loopback."""

import os

#: As every client understands them: Google's, gRPC's, Ray's, object_store's, httpx.
NAMES = ("localhost", "127.0.0.1", "::1")


def bypass_proxies() -> None:
    """Have no client of this process ask a proxy for an address of loopback. They read the environment, each at its
    own time, and some of them take it from nowhere else."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    for variable in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        hosts = [host for host in os.environ.get(variable, given).split(",") if host]
        missing = [name for name in NAMES if name not in hosts]
        # An asterisk means all hosts: to some clients only where it stands alone, to gRPC nowhere.
        if missing and ("*" not in hosts or variable == "no_grpc_proxy"):
            os.environ[variable] = ",".join([*hosts, *missing])
