"""The servers, the app, the run, and the figures. See the package's docstring."""

import argparse
import json
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from anyio.from_thread import start_blocking_portal

from deployments.own_ray import free_port
from serve_app.settings import MessagesSettings

from .. import servers
from . import app
from .proxy import Proxy
from .records import make_bucket
from .report import context, is_passed, show
from .run import Run
from .sessions import MOST_SESSIONS, POISONS, plan

POISONED_SHARE = 0.05
#: The server, and the deployments whose replicas are killed.
BROKERS = {
    "embedded": (servers.embedded_pubsub, (app.INPAINTER, app.INGRESS)),
    "google": (servers.google_pubsub, (app.INPAINTER,)),
}


def main() -> None:
    # Both end everything in order; a shell that starts this in the background has it ignore the first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    args = _arguments()
    args.logs.mkdir(parents=True, exist_ok=True)
    figures = rehearse(args) | {"broker": args.broker, **context()}
    show(figures)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))
    sys.exit(0 if is_passed(figures) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill the service's processes while it works, and count what is lost.")
    least = 2 * len(POISONS)
    parser.add_argument("--sessions", type=int, default=500, help=f"{least} to {MOST_SESSIONS}")
    parser.add_argument("--broker", choices=BROKERS, default="embedded")
    parser.add_argument("--limit-s", type=float, default=1800, help="give up after so many seconds")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "chaos-logs")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    args = parser.parse_args()
    if not least <= args.sessions <= MOST_SESSIONS:
        parser.error(f"--sessions must be {least} to {MOST_SESSIONS}")
    return args


def rehearse(args: argparse.Namespace) -> dict[str, Any]:
    """Start everything, run, stop everything; the figures."""
    serve_broker, kill = BROKERS[args.broker]
    # moto takes any key; the app's processes have this one from here.
    os.environ.update(AWS_ACCESS_KEY_ID="chaos", AWS_SECRET_ACCESS_KEY="chaos")
    messages = MessagesSettings(url=f"pubsub://127.0.0.1:{free_port()}")
    with ExitStack() as stack:
        enter = stack.enter_context
        database, s3 = enter(servers.postgres(args.logs)), enter(servers.s3(args.logs))
        enter(serve_broker(messages, args.logs))
        make_bucket(s3)
        # Its event loop runs the proxies and all of the run, beside this thread, which starts and stops the app.
        portal = enter(start_blocking_portal())
        stores = [enter(portal.wrap_async_context_manager(Proxy(port))) for port in (database, s3)]
        enter(app.running(app.settings(messages, postgres=stores[0].port, s3=stores[1].port), args.logs))
        sessions = plan(args.sessions, max(len(POISONS), round(POISONED_SHARE * args.sessions)))
        run = Run(sessions, app.settings(messages, postgres=database, s3=s3), s3_port=s3)
        return portal.call(run.through, kill, stores, args.limit_s)


if __name__ == "__main__":
    main()
