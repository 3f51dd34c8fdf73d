"""`fluxfill generate` against a server that a test scripts: what it sends, how it insists, what it leaves."""

import _thread
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from deployments.cli import generate, main, server

Message = tuple[str, str, dict[str, Any]]


def state(number: int, status: str) -> Message:
    return f"{number}.0", "state", {"job_id": "j1", "status": status}


def artifact(number: int) -> Message:
    return f"{number}.0", "artifact", {"item_index": number}


@dataclass
class Api:
    """The job API's answers for one job, j1, of two pictures."""

    url: str = ""
    #: Of each event stream, in turn; the last is cut where another follows.
    streams: list[list[Message]] = field(default_factory=list)
    #: Statuses and problems that come before the first answer to a POST.
    refusals: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    status: str = "succeeded"
    error: tuple[str, str] | None = None
    on_stream: Callable[[], None] = lambda: None
    pictures: int = 2
    posts: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    resumed: list[str | None] = field(default_factory=list)
    canceled: int = 0

    @property
    def job(self) -> dict[str, Any]:
        code, message = self.error or (None, None)
        summary, parameters = {"count": 2, "completed": self.pictures}, {"model_id": "fake"}
        status = "running" if self.streams else self.status
        job = {"id": "j1", "status": status, "summary": summary, "parameters": parameters}
        return {**job, "error_code": code, "error_message": message}

    def artifacts(self) -> dict[str, Any]:
        rows = [{"id": f"j1-{n}", "s3_key": f"a/b/{n}.png", "url": f"{self.url}/{n}"} for n in range(self.pictures)]
        return {"artifacts": rows}


class Handler(BaseHTTPRequestHandler):
    api: Api

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, status: int, body: Any, **headers: str) -> None:
        self.answer(status, json.dumps(body).encode(), **headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        api = self.api
        if self.path.endswith("/cancel"):
            api.canceled += 1
            return self.json(200, {})
        api.posts.append((self.headers["Idempotency-Key"], json.loads(body)))
        api.headers.append(dict(self.headers))
        if api.refusals:
            return self.json(*api.refusals.pop(0), Retry_After="0")
        return self.json(202, {"job": {**api.job, "status": "queued"}})

    def do_GET(self) -> None:
        api = self.api
        if self.path == "/v1/jobs/j1/events":
            api.resumed.append(self.headers["Last-Event-ID"])
            api.on_stream()
            text = "retry: 2000\n\n: ping\n\n" + "".join(
                f"id: {id}\nevent: {name}\ndata: {json.dumps(data)}\n\n" for id, name, data in api.streams.pop(0)
            )
            return self.answer(200, text.encode())
        if self.path == "/healthz":
            return self.json(200, {"status": "ok"})
        if self.path == "/v1/jobs/j1/artifacts":
            return self.json(200, api.artifacts())
        if self.path == "/v1/jobs/j1":
            return self.json(200, api.job)
        assert "Authorization" not in self.headers, "a link needs no key"
        return self.answer(200, f"picture {self.path}".encode())


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    api = Api()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"api": api}))
    api.url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(generate, "RETRY_S", 0.01)
    Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield api
    http.shutdown()
    http.server_close()


@pytest.fixture
def run(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)
    for screen in (generate.out, server.err):
        monkeypatch.setattr(screen, "width", 300)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fluxfill", "generate", "a fox", "--url", api.url, *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        screen = capsys.readouterr()
        return int(ended.value.code or 0), screen.out, screen.err

    return run


Run = Callable[..., tuple[int, str, str]]


def test_pictures_land_in_a_folder_named_after_the_job(api: Api, run: Run) -> None:
    api.streams = [[state(1, "queued"), state(2, "running"), artifact(3), artifact(4), state(5, "succeeded")]]
    status, out, _ = run(
        "--count",
        "2",
        "--steps",
        "4",
        "--guidance",
        "3.5",
        "--model",
        "fake",
        "--seed",
        "0",
        "--lora",
        "a:0.5",
        "--lora",
        "b",
    )
    assert (status, api.resumed) == (0, [None])
    assert [Path("j1", f"{n}.png").read_text() for n in (0, 1)] == ["picture /0", "picture /1"]
    assert "wrote j1/0.png" in out and "wrote j1/1.png" in out
    ((key, body),) = api.posts
    assert key.startswith('"') and key.endswith('"')
    given = {"prompt": "a fox", "count": 2, "steps": 4, "guidance": 3.5, "model_id": "fake", "seed": 0}
    given["loras"] = [{"id": "a", "scale": 0.5}, {"id": "b", "scale": 1.0}]
    assert body == {"type": "generate", **given}
    assert "Authorization" not in api.headers[0]


def test_a_key_comes_from_the_environment_and_a_folder_by_name(
    api: Api, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXFILL_API_KEY", "secret")
    api.streams = [[state(1, "succeeded")]]
    assert run("--out", "mine")[0] == 0
    assert api.headers[0]["Authorization"] == "Bearer secret"
    assert sorted(path.name for path in Path("mine").iterdir()) == ["0.png", "1.png"]


def test_a_stream_that_is_cut_is_resumed_where_it_was(api: Api, run: Run) -> None:
    api.streams = [[state(1, "queued"), state(2, "running")], [artifact(3)], [state(4, "succeeded")]]
    assert run()[0] == 0
    assert api.resumed == [None, "2.0", "3.0"]


def test_an_app_that_is_busy_is_asked_again_for_the_same_job(api: Api, run: Run) -> None:
    busy = {"code": "store_unavailable", "detail": "no database"}
    api.refusals = [(503, busy), (409, {"code": "post_in_flight", "detail": "it is being answered"})]
    api.streams = [[state(1, "succeeded")]]
    assert run()[0] == 0
    assert len(api.posts) == 3 and len({key for key, _ in api.posts}) == 1


@pytest.mark.parametrize("code", ["unauthorized", "invalid_input"])
def test_a_refusal_is_one_line(api: Api, run: Run, code: str) -> None:
    api.refusals = [(422, {"code": code, "detail": "width: [bold]100 is no multiple of 8"})]
    status, _, err = run()
    assert (status, err) == (1, f"{code}: width: [bold]100 is no multiple of 8\n")


def test_a_job_that_fails_says_why_and_leaves_what_it_made(api: Api, run: Run) -> None:
    api.status, api.error, api.pictures = "failed", ("blank_image", "a picture of one colour"), 1
    api.streams = [[artifact(1), state(2, "failed")]]
    status, out, err = run()
    assert (status, err) == (1, "blank_image: a picture of one colour\n")
    assert "wrote j1/0.png" in out


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As a program is that has just started: libraries that other tests load may have changed it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def test_an_interrupt_cancels_the_job(api: Api, run: Run, interruptible: None) -> None:
    api.on_stream = _thread.interrupt_main
    api.streams = [[state(1, "queued")] for _ in range(100)]
    status, _, err = run()
    assert (status, api.canceled) == (130, 1)
    assert err == "canceled: job j1 was interrupted\n"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_an_app_that_is_not_there_is_not_waited_for(
    api: Api, run: Run, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        pytest.fail("it was asked for a job")

    monkeypatch.setattr(generate.Server, "ask", asked)
    monkeypatch.setattr(api, "url", url)
    status, _, err = run()
    assert status == 1 and f"the app does not answer at {url}: " in err
