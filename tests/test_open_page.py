"""scripts/open_page.py: `make run` opens on the workbench."""

import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from deployments.own_ray import free_port

DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")


class Starting(BaseHTTPRequestHandler):
    """Answers like Serve's proxy: 404 until the app is there."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(404 if self.asked < 3 else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.parametrize("has_display", [True, False])
def test_it_waits_for_the_app_and_opens_the_page_where_there_is_a_display(tmp_path: Path, has_display: bool) -> None:
    port, opened, browser = free_port(), tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in DISPLAYS}
    environment |= {"BROWSER": f"{browser} %s"} if has_display else {}
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "scripts/open_page.py", url]
    Starting.asked = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        # Nobody listens at first.
        time.sleep(0.2)
        server = ThreadingHTTPServer(("127.0.0.1", port), Starting)
        Thread(target=server.serve_forever, daemon=True).start()
        said, _ = process.communicate(timeout=30)
    server.shutdown()
    server.server_close()
    assert process.returncode == 0
    assert url in said
    assert opened.exists() == has_display
    assert not has_display or opened.read_text().strip() == url
