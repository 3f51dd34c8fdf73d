"""Debian's Chromium, driven by Playwright, and pages served to it on loopback."""

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from .absent import CHROMIUM, absent

#: Root needs the first. The others keep Chromium from asking for anything by itself.
_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For tests that are not async: Playwright's own event loop runs in their thread."""
    chromium = shutil.which("chromium")
    if chromium is None:
        absent(CHROMIUM)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=_ARGS)
        yield launched
        launched.close()


class Watched:
    """What a page asked for and complained of, from its beginning."""

    def __init__(self, page: Page) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    @property
    def fetched(self) -> list[str]:
        """Requests that leave the page."""
        return [url for url in self.requests if not url.startswith("data:")]


@contextmanager
def served(page: bytes, headers: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """The address of `page` on a server of its own, and the paths that were asked of that, as they come."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            for name, value in {"Content-Type": "text/html", "Content-Length": str(len(page)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/report", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
