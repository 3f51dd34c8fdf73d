"""A client of Black Forest Labs' fill endpoint, written from its description as its users write theirs, on a real
server behind keys: post, poll until Ready, download."""

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serve_app.jobs.record import JobError, State
from serve_app.models import Pixels
from serve_app.settings import WindowSettings

from .client_server import in_thread
from .pictures import kept
from .rig import jpeg, line_mask, photo, png
from .test_generate import Studio

KEY, OTHER, READER = "the-clients-own-key", "another-ones-key", "a-readers-key"
KEYS = f"{KEY}:submit+read,{OTHER}:submit+read,{READER}:read"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Studio]]:
    with in_thread(lambda url: Studio(public_url=url), api_keys=KEYS) as running:
        yield running


@pytest.fixture
def client(server: tuple[str, Studio]) -> Iterator["Client"]:
    with httpx.Client(base_url=server[0], headers={"x-key": KEY}, trust_env=False) as http:
        yield Client(http)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def cut_out() -> bytes:
    """The photo, transparent where it is to be filled."""
    out = io.BytesIO()
    Image.fromarray(np.dstack([photo(), 255 - line_mask()])).save(out, "PNG")
    return out.getvalue()


ASKED = {"image": encoded(jpeg(photo())), "mask": encoded(png(line_mask())), "prompt": "grass"}


class Client:
    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def post(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.http.post("/v1/flux-pro-1.0-fill", json=body, headers=headers)

    def fill(self, **body: Any) -> dict[str, Any]:
        task = self.post(body).raise_for_status().json()
        assert task.keys() == {"id", "polling_url"}
        ends_at = time.monotonic() + 20
        while True:
            found: dict[str, Any] = self.http.get(task["polling_url"]).raise_for_status().json()
            assert found["id"] == task["id"] and time.monotonic() < ends_at
            if found["status"] != "Pending":
                return found
            assert found["result"] is None and 0 <= found["progress"] <= 1
            time.sleep(0.02)

    def picture(self, found: dict[str, Any]) -> tuple[str | None, Pixels]:
        """Fetched without the key."""
        answer = httpx.get(found["result"]["sample"], trust_env=False).raise_for_status()
        image = Image.open(io.BytesIO(answer.content))
        return image.format, np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("mask", [True, False], ids=["a-mask", "transparency"])
def test_only_what_is_masked_is_filled(client: Client, format: str, mask: bool) -> None:
    image = (
        {"image": encoded(png(photo()[..., ::-1])), "mask": ASKED["mask"]} if mask else {"image": encoded(cut_out())}
    )
    found = client.fill(**image, prompt="grass", steps=15, guidance=30, seed=7, output_format=format)
    assert (found["status"], found["progress"], found["details"]) == ("Ready", 1, None)
    result = found["result"]
    assert (result["seed"], result["prompt"]) == (7, "grass")
    assert result["duration"] == pytest.approx(result["end_time"] - result["start_time"])
    kind, pixels = client.picture(found)
    outside = kept(line_mask(), WindowSettings())
    assert kind == format.upper() and (pixels[outside] == photo()[outside]).all()
    assert (pixels[line_mask() > 0] != photo()[line_mask() > 0]).any()


def test_what_is_left_out_is_as_the_app_has_it(client: Client, server: tuple[str, Studio]) -> None:
    found = client.fill(image=ASKED["image"], mask=ASKED["mask"], prompt_upsampling=False, safety_tolerance=2)
    assert found["status"] == "Ready" and client.picture(found)[0] == "JPEG"
    job = client.http.get(f"/v1/jobs/{found['id']}").json()
    defaults = server[1].editor._defaults()
    asked = (job["parameters"]["steps"], job["parameters"]["guidance"], job["parameters"]["prompt"])
    assert asked == (defaults.steps, defaults.guidance_scale, defaults.prompt)
    assert job["parameters"]["model_id"] == "telea"


def test_data_uris_too(client: Client) -> None:
    given = {name: f"data:image/png;base64,{ASKED[name]}" for name in ("image", "mask")}
    assert client.fill(**given)["status"] == "Ready"


def test_one_that_fails_says_why(client: Client, server: tuple[str, Studio]) -> None:
    task, why = client.fill(**ASKED)["id"], {"code": "out_of_memory", "message": "the GPU has too little memory"}

    def failed(job: Any, _rivals: Any, _now: Any) -> Any:
        return (job.evolve(status=State.FAILED, error=JobError(**why), artifacts=()),)

    asyncio.run(server[1].jobs.update(task, f"api/{task}", failed))
    found = client.http.get("/v1/get_result", params={"id": task}).json()
    assert (found["status"], found["result"], found["details"]) == ("Error", None, why)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 14}, "steps: "),
        ({"steps": 51}, "steps: "),
        ({"guidance": 1}, "guidance: "),
        ({"output_format": "gif"}, "output_format: "),
        ({"safety_tolerance": 7}, "safety_tolerance: "),
        ({"image": None}, "image: "),
        ({"image": "%"}, "image: not "),
        ({"mask": encoded(b"x")}, "the mask"),
        ({"mask": None}, "the mask has no wholly transparent pixels"),
        ({"image": "https://example.org/photo.png"}, "image: "),
        ({"webhook_url": "https://example.org"}, "webhook_url: there is no such field"),
        ({"finetune_id": "x"}, "finetune_id: there is no such field"),
    ],
    ids=str,
)
def test_what_is_refused_is_named(client: Client, wrong: dict[str, Any], said: str) -> None:
    answer = client.post({**ASKED, **wrong})
    assert answer.status_code == 422 and answer.json()["detail"].startswith(said), answer.text


def test_the_key_and_whose_a_task_is(client: Client) -> None:
    assert client.post(ASKED, **{"x-key": "no-key-of-this-app"}).status_code == 401
    assert client.post(ASKED, **{"x-key": READER}).status_code == 403
    assert client.post(ASKED, **{"X-API-Key": "no-key-of-this-app"}).status_code == 401
    assert client.post(ASKED, **{"X-API-Key": KEY, "x-key": "no-key-of-this-app"}).status_code == 200
    with httpx.Client(base_url=client.http.base_url, trust_env=False) as nobody:
        assert nobody.get("/v1/get_result", params={"id": "x"}).status_code == 401
        bearer = {"Authorization": f"Bearer {KEY}"}
        task = nobody.post("/v1/flux-pro-1.0-fill", json=ASKED, headers=bearer).raise_for_status().json()["id"]
    for key, is_found in ((KEY, True), (READER, False), (OTHER, False)):
        found = client.http.get("/v1/get_result", params={"id": task}, headers={"x-key": key}).raise_for_status().json()
        assert (found["status"] != "Task not found") == is_found
