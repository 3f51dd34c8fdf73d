"""A client of another system's job API (dream-forge), written from its shapes as its users write theirs, on a real
server: create, poll until succeeded or failed, list artifacts, download, read logs and progress."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from serve_app.engine.fake import Fake
from serve_app.engine.generating import LocalGenerator
from serve_app.errors import BlankImage
from serve_app.models import GenerateRequest, Images, OnProgress, Variant
from serve_app.settings import VariantSettings

from .client_server import in_thread
from .serving import App
from .test_generate import Studio

# The server


class Cards:
    """The fake engine, which fails at one prompt."""

    is_ready = True

    def __init__(self) -> None:
        self._fake = LocalGenerator("fake", Fake(Variant(family="fake"), None, VariantSettings()))

    async def run(self, request: GenerateRequest, on_progress: OnProgress) -> Images:
        if request.prompt == "fog":
            raise BlankImage("every pixel is the same")
        return await self._fake.run(request, on_progress)


@pytest.fixture(scope="module")
def threaded() -> Iterator[str]:
    def make(url: str) -> Studio:
        studio = Studio(public_url=url)
        studio.painter.run = Cards().run  # type: ignore[method-assign]
        return studio

    with in_thread(make) as (url, _):
        yield url


@pytest.fixture(params=["thread", pytest.param("serve", marks=pytest.mark.serve)])
def base(request: pytest.FixtureRequest) -> str:
    if request.param == "serve":
        app: App = request.getfixturevalue("app")
        return app.http
    url: str = request.getfixturevalue("threaded")
    return url


# The client


class Client:
    """Knows the other system's shapes and nothing of this one."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def open(self, path: str, body: Any = None) -> tuple[int, str, bytes]:
        url = path if path.startswith("http") else self._base + path
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        with self._opener.open(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.open(path)[2])

    def wait_until_ready(self) -> None:
        ends_at = time.monotonic() + 30
        while True:
            try:
                status, _, body = self.open("/readyz")
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < ends_at
                time.sleep(0.05)
            else:
                assert status == 200 and b'"ready"' in body
                return

    def create(self, **body: Any) -> str:
        status, _, answer = self.open("/v1/jobs", {"type": "generate", **body})
        job = json.loads(answer)["job"]
        assert status in (200, 202)
        assert job["status"] == "queued" and job["type"] == "generate" and job["created_at"]
        return str(job["id"])

    def wait(self, job_id: str) -> Any:
        ends_at = time.monotonic() + 60
        while (job := self.get(f"/v1/jobs/{job_id}"))["status"] not in ("succeeded", "failed"):
            assert job["status"] in ("queued", "running") and time.monotonic() < ends_at
            time.sleep(0.05)
        return job

    def log(self, job_id: str, query: str = "") -> list[Any]:
        _, kind, text = self.open(f"/v1/jobs/{job_id}/logs{query}")
        assert kind.startswith("application/x-ndjson")
        return [json.loads(line) for line in text.splitlines()]

    def stream(self, job_id: str) -> list[tuple[str, Any]]:
        _, kind, text = self.open(f"/v1/jobs/{job_id}/progress/stream")
        assert kind.startswith("text/event-stream")
        blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.decode().split("\n\n")]
        return [(block["event"], json.loads(block["data"])) for block in blocks if "data" in block]


@pytest.fixture
def client(base: str) -> Client:
    made = Client(base)
    made.wait_until_ready()
    return made


ASKED = {"prompt": "an old-growth forest at dawn", "width": 64, "height": 64, "steps": 4, "guidance": 7.0}


def test_from_the_request_to_the_pictures(client: Client) -> None:
    job_id = client.create(**ASKED, count=3, format="png", embed_metadata=True, scheduler="euler", engine="sdxl")
    job = client.wait(job_id)
    assert job["status"] == "succeeded" and job["id"] == job_id and job["updated_at"] >= job["created_at"]
    assert job["summary"] == {"count": 3, "completed": 3}
    assert all(stage.keys() == {"name", "status"} for stage in job["steps"])
    assert job["error_code"] is None and job["error_message"] is None
    artifacts = client.get(f"/v1/jobs/{job_id}/artifacts")["artifacts"]
    assert [one["item_index"] for one in artifacts] == [0, 1, 2]
    assert len({one["seed"] for one in artifacts}) == 3
    for one in artifacts:
        assert one.keys() >= {"id", "format", "width", "height", "seed", "item_index", "s3_key", "url", "expires_at"}
        name = f"_{one['item_index']}_64x64_{one['seed']}.png"
        assert one["s3_key"].startswith(f"dreamforge/default/jobs/{job_id}/generate/") and one["s3_key"].endswith(name)
        picture = Image.open(BytesIO(client.open(one["url"])[2]))
        assert (picture.format, picture.size) == ("PNG", (64, 64))


def test_logs_and_progress(client: Client) -> None:
    job_id = client.create(**ASKED, count=2)
    events = client.stream(job_id)
    lines = client.log(job_id, "?tail=100")
    assert client.wait(job_id)["status"] == "succeeded"
    assert {"progress", "log", "artifact"} <= {name for name, _ in events}
    codes = {"step.start", "model.selected", "artifact.written", "step.finish", "job.finish"}
    assert {line["code"] for line in lines} == codes
    assert all(line.keys() >= {"ts", "level", "code", "message", "job_id"} for line in lines)
    assert [data for name, data in events if name == "log"] == lines
    assert len(client.log(job_id, "?tail=1")) == 1
    assert client.log(job_id, f"?since_ts={lines[-1]['ts']}")[-1] == lines[-1]
    progress = client.get(f"/v1/jobs/{job_id}/progress")
    assert progress["progress"] == 1.0 and [one["progress"] for one in progress["items"]] == [1.0, 1.0]
    assert sum(stage["weight"] for stage in progress["stages"]) == 1.0


def test_a_job_that_fails(threaded: str) -> None:
    client = Client(threaded)
    client.wait_until_ready()
    job = client.wait(client.create(**{**ASKED, "prompt": "fog"}))
    assert job["status"] == "failed" and (job["error_code"], bool(job["error_message"])) == ("blank_image", True)
    assert "error" in {line["code"] for line in client.log(job["id"])}
    assert "error" in {name for name, _ in client.stream(job["id"])}


def test_lists_models_and_refusals(client: Client) -> None:
    job_id = client.create(**ASKED)
    client.wait(job_id)
    listed = client.get("/v1/jobs?status=succeeded&limit=200")["jobs"]
    (row,) = [row for row in listed if row["id"] == job_id]
    assert row.keys() >= {"id", "type", "status", "created_at", "updated_at"}
    for row in client.get("/v1/models")["models"]:
        assert row.keys() >= {"id", "name", "kind", "version", "installed", "enabled", "parameters_schema"}
        detail = client.get(f"/v1/models/{row['id']}")
        assert detail.keys() >= {"capabilities", "source_uri", "local_path", "files_json"}
    for refused in ({"count": 101}, {"chain": {"upscale": {"scale": 2}}}, {"prompt": ""}):
        with pytest.raises(urllib.error.HTTPError) as error:
            client.create(**{**ASKED, **refused})
        body = json.loads(error.value.read())
        assert error.value.code == 422 and body.keys() >= {"code", "message", "details", "correlation_id"}
    with pytest.raises(urllib.error.HTTPError) as error:
        client.get("/v1/jobs/nobody")
    assert error.value.code == 404
    error.value.close()
