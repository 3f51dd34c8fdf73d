"""A server on loopback that answers the real huggingface_hub client as the hub does."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "c" * 40


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str = COMMIT
    #: Bearer token that may see it; None: everybody may.
    token: str | None = None
    #: Whether even that token is refused, because its owner has not accepted the licence.
    gated: bool = False
    #: Whether everybody may see what files there are, as the hub shows of gated repositories.
    listed: bool = False


@dataclass
class HubServer:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    #: `METHOD path` of every request.
    requests: list[str] = field(default_factory=list)

    @property
    def downloads(self) -> list[str]:
        return [
            line.rpartition("/resolve/")[2].partition("/")[2] for line in self.requests if line.startswith("GET /o/")
        ]


@contextmanager
def serve() -> Iterator[HubServer]:
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer_file(with_body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            self._answer_listing()
        else:
            self._answer_file(with_body=True)

    def _answer_listing(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        name, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/?]+).*", self.path).groups()
        listed = self.hub.repos.get(name)
        repo = listed if listed and listed.listed else self._allowed(name, revision)
        if repo is not None:
            siblings = [{"rfilename": file} for file in repo.files]
            body = json.dumps({"id": name, "sha": repo.commit, "siblings": siblings}).encode()
            self._send(200, {"Content-Type": "application/json"}, body)

    def _answer_file(self, *, with_body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        name, revision, file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path).groups()
        repo = self._allowed(name, revision)
        if repo is None:
            return
        if file not in repo.files:
            self._refuse(404, "EntryNotFound")
            return
        content = repo.files[file]
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, {"X-Repo-Commit": repo.commit, "ETag": f'"{etag}"'}, content, with_body=with_body)

    def _allowed(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None:
            self._refuse(404 if bearer else 401, "RepoNotFound")
        elif repo.token is not None and bearer != repo.token:
            self._refuse(401, "GatedRepo" if not bearer else "")
        elif repo.gated:
            self._refuse(403, "GatedRepo")
        elif revision not in ("main", repo.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, b"")

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...
