"""OpenAI's Images API, by the unmodified package `openai` on a real server behind keys."""

import asyncio
import base64
import hashlib
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from serve_app.errors import BlankImage, StoreUnavailable
from serve_app.generate.loras import Lora, LoraBody, Loras
from serve_app.http import events
from serve_app.jobs import api as jobs_api
from serve_app.jobs.kinds import Caller
from serve_app.jobs.record import Job, State
from serve_app.models import GenerateRequest
from serve_app.settings import LoraSettings, WindowSettings

from .client_server import in_thread
from .picture_files import chunk
from .pictures import kept
from .rig import jpeg, line_mask, photo, png, wait_for
from .serving import App
from .test_generate import Studio
from .test_loras import Checker
from .test_posted_edits import cut_out

KEY, READER, OTHER = "the-key-of-a-program", "the-key-of-a-reader", "the-key-of-another"
KEYS = f"prog=sha256:{hashlib.sha256(KEY.encode()).hexdigest()}:submit+read,{READER}:read,{OTHER}:submit+read"
PROGRAM = Caller(id="prog", sees_all=False, sees_messages=False)

#: What the package says when it sends a request again.
AGAIN: dict[str, Any] = {"extra_headers": {"x-stainless-retry-count": "1"}}
SMALL: dict[str, Any] = {"size": "64x64", "extra_body": {"steps": 2, "seed": 7}}
PHOTO, MASK, HOLE = png(photo()[..., ::-1]), cut_out(), line_mask() > 0


class Scripted:
    """What the model does before a picture, by its prompt: `fog` fails; `slow` waits, and so does all that begins so,
    but for the first picture of `slow second`."""

    def __init__(self) -> None:
        self.reached, self.goes_on, self.was_stopped = threading.Event(), threading.Event(), threading.Event()

    async def __call__(self, request: GenerateRequest) -> None:
        if request.prompt == "fog":
            raise BlankImage("every pixel is the same")
        if request.prompt.startswith("slow") and (request.prompt, request.seed) != ("slow second", 7):
            self.reached.set()
            try:
                while not self.goes_on.is_set():
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.was_stopped.set()
                raise


class Server:
    def __init__(self, url: str, studio: Studio) -> None:
        self.url, self.studio = url, studio
        self.model = Scripted()

    @property
    def painted(self) -> list[GenerateRequest]:
        requests: list[GenerateRequest] = self.studio.painter.requests
        return requests

    def jobs(self) -> list[Job]:
        """Newest first."""
        found: list[Job] = asyncio.run(self.studio.jobs.list(limit=1000))
        return found

    def left(self) -> bool:
        """Whether the newest job was left without an answer, and nobody came for it since."""
        deadline = self.jobs()[0].deadline
        return deadline is not None and (deadline - datetime.now(UTC)).total_seconds() < jobs_api.LEFT_S


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with in_thread(lambda url: Studio(public_url=url, clock=lambda: datetime.now(UTC)), api_keys=KEYS) as made:
        yield Server(*made)


@pytest.fixture
def server(running: Server) -> Server:
    running.model = running.studio.painter.before = Scripted()
    running.painted.clear()
    return running


def client_of(url: str, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=KEY, **options)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with client_of(server.url) as made:
        yield made


def pixels(data: str | bytes | None) -> Any:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data)).convert("RGB"))


# Pictures from a prompt


def test_the_lines_that_point_a_program_here(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = Path("docs/clients.md").read_text().split("## OpenAI's Images API")[1].split("\n## ")[0]
    pointed, edit = (
        block.replace("https://app.example.org", server.url).replace("the key", KEY)
        for block in re.findall(r"```python\n(.*?)```", text, re.S)
    )
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(PHOTO)
    Path("mask.png").write_bytes(png(line_mask()))
    names: dict[str, Any] = {"open": lambda name, _: io.BytesIO(Path(name).read_bytes())}
    exec(pointed, names)
    assert pixels(names["answer"].data[0].b64_json).shape == (512, 512, 3)
    exec(edit, names)
    assert pixels(names["answer"].data[0].b64_json).shape == (80, 96, 3)
    names["client"].close()
    for line in re.findall(r"export (\w+)=(.*)", text):
        value = line[1].strip('"').replace("https://app.example.org", server.url).replace("the key", KEY)
        monkeypatch.setenv(line[0], value)
    with OpenAI() as client:
        assert client.images.generate(prompt="a cat", **SMALL).data


def test_a_program_as_it_is_written_for_openai(client: OpenAI, server: Server) -> None:
    answer = client.images.generate(
        model="gpt-image-2",
        prompt="a cat",
        n=2,
        size="64x128",
        quality="high",
        style="vivid",
        moderation="low",
        user="u",
        safety_identifier="s",
        background="auto",
    )
    assert answer.data is not None and len(answer.data) == 2
    assert (answer.size, answer.output_format, answer.background) == ("64x128", "png", "opaque")
    assert abs(answer.created - datetime.now(UTC).timestamp()) < 600
    assert answer.usage is not None and answer.usage.total_tokens == 0
    assert answer.usage.input_tokens_details.image_tokens == 0
    assert [pixels(one.b64_json).shape for one in answer.data] == [(128, 64, 3)] * 2
    assert {request.prompt for request in server.painted} == {"a cat"}
    job, seeds = server.jobs()[0], [one.model_extra["seed"] for one in answer.data if one.model_extra]
    assert seeds == [job.seed, job.seed + 1] and job.variant == "sdxl"
    assert all(one.model_extra and one.model_extra["job_id"] == job.id for one in answer.data)
    assert job.deadline is None


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_what_extra_body_gives_is_asked_of_the_model(client: OpenAI, server: Server, format: Any) -> None:
    extra = {"seed": 0, "steps": 3, "guidance": 2.5, "negative_prompt": "dogs"}
    answer = client.images.generate(
        prompt="a cat", model="sdxl", size="64x64", output_format=format, response_format="url", extra_body=extra
    )
    (request,) = server.painted
    assert (request.seed, request.steps, request.guidance_scale, request.negative_prompt) == (0, 3, 2.5, "dogs")
    assert answer.data is not None and answer.data[0].url and answer.data[0].b64_json is None
    assert answer.data[0].model_extra and answer.data[0].model_extra["seed"] == 0
    picture = httpx.get(answer.data[0].url)
    assert picture.headers["content-type"] == f"image/{format}" and pixels(picture.content).shape == (64, 64, 3)
    assert answer.output_format == format


def test_the_pictures_of_a_stream_come_one_by_one(client: OpenAI, server: Server) -> None:
    whole = client.images.generate(prompt="a cat", n=3, **SMALL)
    events = list(client.images.generate(prompt="a cat", n=3, stream=True, partial_images=2, **SMALL))
    assert [event.type for event in events] == ["image_generation.completed"] * 3
    assert whole.data and [event.b64_json for event in events] == [one.b64_json for one in whole.data]
    for event in events:
        assert (event.size, event.output_format, event.usage.total_tokens) == ("64x64", "png", 0)
    assert server.jobs()[0].deadline is None


def test_a_stream_shows_each_picture_when_it_is_there_and_stays_alive_until_the_next(
    client: OpenAI, server: Server
) -> None:
    with client.images.with_streaming_response.generate(prompt="slow second", n=2, stream=True, **SMALL) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith("event: ")) == "event: image_generation.completed"
        assert server.model.reached.wait(30)
        for _ in range(3):
            assert next(line for line in lines if line.startswith(":"))
        server.model.goes_on.set()
        rest = [line for line in lines if line and not line.startswith(":")]
    assert [line[:30] for line in rest][-3::2] == ["event: image_generation.comple", "data: [DONE]"]
    assert len(rest) == 3 or rest[0].startswith("data: ")


async def test_the_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        one, events = await asyncio.gather(
            client.images.generate(prompt="a cat", **SMALL),
            client.images.edit(image=PHOTO, mask=MASK, prompt="grass", stream=True),
        )
        assert one.data and pixels(one.data[0].b64_json).shape == (64, 64, 3)
        (event,) = [event async for event in events]
        assert event.type == "image_edit.completed" and pixels(event.b64_json).shape == (80, 96, 3)


def test_a_lora_by_extra_body_chooses_its_model(client: OpenAI, server: Server) -> None:
    async def register() -> Lora:
        await server.studio.blobs.put("loras-of-mine/cat.safetensors", b"flux cat", content_type="x/y")
        loras = Loras(blobs=server.studio.blobs, checker=Checker(), settings=LoraSettings())
        found = await loras.register(LoraBody(name="cat", blob="loras-of-mine/cat.safetensors"), Caller(id="prog"))
        assert isinstance(found, Lora)
        return found

    lora = asyncio.run(register())
    assert lora.id in [model.id for model in client.models.list()]
    extra = {"loras": [{"id": lora.id, "scale": 0.5}], "steps": 2}
    client.images.generate(model="gpt-image-2", prompt="a cat", size="64x64", extra_body=extra)
    ((used,), job) = server.painted[-1].loras, server.jobs()[0]
    assert (used.sha256, used.scale, job.variant) == (hashlib.sha256(b"flux cat").hexdigest(), 0.5, "flux-dev-Q8_0")
    assert refusal(client, prompt="a cat", extra_body={"loras": [{"id": "none"}]}, status=404).code == "unknown_model"


def test_models(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert models.keys() >= {"telea", "sdxl", "flux-dev-Q8_0"}
    assert all((model.object, type(model.created)) == ("model", int) and model.owned_by for model in models.values())
    assert client.models.retrieve("sdxl") == models["sdxl"]
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("none")
    assert (refused.value.code, refused.value.type) == ("unknown_model", "invalid_request_error")


# Edits


def edited(client: OpenAI, **asked: Any) -> Any:
    answer = client.images.edit(prompt="", **asked)
    assert answer.data is not None and len(answer.data) == 1 and answer.data[0].b64_json
    assert answer.size == "96x80"
    return pixels(answer.data[0].b64_json)


@pytest.fixture
def painted(server: Server) -> Iterator[None]:
    """In black."""
    engine = server.studio.editor._models["telea"]._engine
    engine.fill = 0
    yield
    engine.fill = None


KEPT = kept(line_mask(), WindowSettings())


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize(
    "asked",
    [
        {"image": PHOTO, "mask": MASK, "model": "gpt-image-2", "size": "1024x1024", "input_fidelity": "high"},
        {"image": [PHOTO], "mask": MASK, "model": "dall-e-2", "n": 1},
        {"image": ("photo.png", io.BytesIO(PHOTO), "image/png"), "mask": ("mask.png", MASK), "model": "telea"},
        {"image": cut_out()},
        {"image": PHOTO, "mask": png(line_mask()), "extra_body": {"mask_polarity": "white"}},
        {"image": PHOTO, "mask": png(255 - line_mask()), "extra_body": {"mask_polarity": "black", "seed": 3}},
        {"image": PHOTO, "mask": MASK, "output_format": "webp"},
    ],
    ids=["mask", "list", "files", "own-alpha", "white", "black", "webp"],
)
def test_an_edit_is_exact_outside_the_grown_mask(client: OpenAI, asked: dict[str, Any]) -> None:
    shown = edited(client, **asked)
    assert (shown[KEPT] == photo()[KEPT]).all() and (shown[HOLE] == 0).all()


@pytest.mark.usefixtures("painted")
def test_an_edit_as_a_jpeg_is_what_other_clients_get(client: OpenAI, tmp_path: Path) -> None:
    (file := tmp_path / "photo.jpg").write_bytes(jpeg(photo()))
    shown = edited(client, image=file, mask=MASK, output_format="jpeg")
    assert np.abs(shown[KEPT].astype(int) - photo()[KEPT]).mean() < 2 and (shown[HOLE] < 40).all()


def test_what_an_edit_says(client: OpenAI, server: Server) -> None:
    extra = {"seed": 11, "steps": 3, "guidance": 5, "mask_grow": 0.02}
    answer = client.images.edit(image=PHOTO, mask=MASK, prompt="grass", response_format="url", extra_body=extra)
    job = server.jobs()[0]
    assert answer.data and answer.data[0].url and answer.data[0].model_extra == {"seed": 11, "job_id": job.id}
    asked = {"prompt": "grass", "steps": 3, "guidance_scale": 5.0, "mask_grow": 0.02}
    assert job.parameters.model_dump().items() >= asked.items()
    assert (job.owner, job.variant, job.seed) == ("prog", "telea", 11)
    assert httpx.get(answer.data[0].url).headers["content-type"] == "image/png"
    (event,) = client.images.edit(image=PHOTO, mask=MASK, prompt="grass", stream=True, extra_body=extra)
    assert (event.type, event.size) == ("image_edit.completed", "96x80")
    assert pixels(event.b64_json).shape == (80, 96, 3)


# Errors


def refusal(client: OpenAI, *, status: int = 400, edit: bool = False, **asked: Any) -> Any:
    with pytest.raises(openai.APIStatusError) as refused:
        (client.images.edit if edit else client.images.generate)(**asked)
    error: Any = refused.value
    assert error.status_code == status and error.request_id
    assert error.request_id == error.response.headers["x-request-id"] == error.response.headers["x-correlation-id"]
    assert error.message and error.type == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"n": 0}, "n", ""),
        ({"n": 10**9}, "n", ""),
        ({"n": 5, "model": "flux-dev-Q8_0"}, "n", "n: flux-dev-Q8_0 makes at most 4"),
        ({"size": "100x64"}, "size", "size: 100 is no multiple of 8, as sdxl needs; 96 or 104 is"),
        ({"size": "63x64"}, "size", "64"),
        ({"size": "4096x64"}, "size", "2048"),
        ({"size": "big"}, "size", ""),
        ({"model": "none"}, "model", "model: none is no model; the models are sdxl"),
        ({"model": "telea"}, "model", ""),
        ({"prompt": ""}, "prompt", ""),
        ({"prompt": "a" * 2001}, "prompt", "2000"),
        ({"output_format": "gif"}, "output_format", ""),
        ({"output_compression": 50}, "output_compression", "there is no such field"),
        ({"background": "transparent"}, "background", ""),
        ({"svg": {"model": "m"}}, "svg", ""),
        ({"frame_count": 2}, "frame_count", ""),
        ({"complexity": "low"}, "complexity", ""),
        ({"response_format": "path"}, "response_format", ""),
        ({"partial_images": 4}, "partial_images", ""),
        ({"extra_body": {"seed": -1}}, "seed", ""),
        ({"extra_body": {"steps": "many"}}, "steps", ""),
        ({"extra_body": {"guidance": 1e9}}, "guidance", ""),
        ({"extra_body": {"loras": [{"id": "../x"}]}}, "loras.0.id", ""),
        ({"extra_body": {"negative_prompt": "x"}, "model": "flux-dev-Q8_0"}, "negative_prompt", "takes none"),
        ({"extra_body": {"hue": 1}}, "hue", "there is no such field"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_parameter_is_named(
    client: OpenAI, server: Server, asked: dict[str, Any], param: str, says: str
) -> None:
    before = len(server.jobs())
    error = refusal(client, **{"prompt": "a cat", **asked})
    assert isinstance(error, openai.BadRequestError) and error.param == param and says in error.message
    assert len(server.jobs()) == before and not server.painted


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"mask": png(line_mask())}, "mask", "invalid_image_file"),
        ({"mask": None}, "mask", "invalid_image_file"),
        ({"mask": png(photo(20, 80))[:90]}, "mask", "invalid_image_file"),
        ({"image": b"GIF89a"}, "image", "invalid_image_file"),
        ({"image": b""}, "image", "invalid_image_file"),
        ({"mask": cut_out(), "image": png(photo(300, 80))}, "mask", "invalid_image_file"),
        ({"image": [PHOTO, PHOTO]}, "image", "invalid_request"),
        ({"n": 2}, "n", "invalid_request"),
        ({"model": "sdxl"}, "model", "unknown_variant"),
        ({"extra_body": {"mask_polarity": "red"}}, "mask_polarity", "invalid_request"),
        ({"extra_body": {"negative_prompt": "x"}}, "negative_prompt", "invalid_request"),
        ({"extra_body": {"seed": "7.5"}}, "seed", "invalid_request"),
        ({"extra_body": {"seed": "[" * 50_000}}, "seed", "invalid_request"),
        ({"markup": PHOTO}, "markup", "invalid_request"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_edit_is_named(client: OpenAI, server: Server, asked: dict[str, Any], param: str, code: str) -> None:
    before = len(server.jobs())
    given = {"image": PHOTO, "mask": MASK, "prompt": "grass", **asked}
    error = refusal(client, edit=True, **{name: value for name, value in given.items() if value is not None})
    assert isinstance(error, openai.BadRequestError) and (error.param, error.code) == (param, code)
    assert len(server.jobs()) == before


def test_who_may_not_is_told_so(server: Server) -> None:
    with client_of(server.url) as client:
        error = refusal(client.with_options(api_key="wrong"), status=401, prompt="a cat")
        assert isinstance(error, openai.AuthenticationError) and error.code == "invalid_api_key"
        error = refusal(client.with_options(api_key=READER), status=403, prompt="a cat")
        assert isinstance(error, openai.PermissionDeniedError) and error.code == "forbidden"


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    size = side.to_bytes(4) * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_hostile_edits(server: Server) -> None:
    """They cost nothing, and the next one is served."""
    limits, image = server.studio.settings.limits, ("image", ("p.png", PHOTO))
    many: Any = [(f"f{n}", (None, "x")) for n in range(10_000)]
    files: Any = [(f"f{n}", ("p.png", b"x")) for n in range(100)]
    hostile: list[tuple[Any, int]] = [
        ([image, *many], 400),
        ([image, *files], 400),
        ([("image", ("p.png", bytes(limits.image_bytes + 1)))], 413),
        ([("image", ("p.png", bytes(limits.image_bytes * 2 + 100_000)))], 413),
        ([image, ("prompt", (None, "a" * 70_000))], 400),
        ([image, ("mask", ("m.png", bomb(9_999)))], 413),
        ([("image", ("p.png", bomb(2**31 - 1)))], 413),
        ([("image", (None, "text"))], 400),
        ([image, ("n", (None, "9" * 60_000))], 400),
        ([image, image], 400),
        ([image, ("mask", ("m.png", MASK)), ("mask", ("m.png", MASK))], 400),
        ([image, ("n", ("n.txt", b"\xff\xfe"))], 400),
        ([("prompt", (None, "no image"))], 400),
    ]
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        for parts, status in hostile:
            answer = http.post("/v1/images/edits", files=parts)
            assert answer.status_code == status, (str(parts)[:80], answer.text)
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        for body in (b"--x\r\n", b"", b"--x--", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n'):
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            assert http.post("/v1/images/edits", content=body, headers=headers).status_code == 400
        for content, type, status in (
            (b"{}", "application/json", 415),
            (b"a=b", "application/x-www-form-urlencoded", 415),
            (b"x", "multipart/form-data", 400),
        ):
            answer = http.post("/v1/images/edits", content=content, headers={"Content-Type": type})
            assert answer.status_code == status, (content, answer.text)
        for content, status in ((b"[" * 60_000, 400), (b"[]", 400), (b'{"prompt": NaN}', 400), (b"x" * 10**6, 413)):
            headers = {"Content-Type": "application/json"}
            assert http.post("/v1/images/generations", content=content, headers=headers).status_code == status
    with client_of(server.url) as client:
        assert edited(client, image=PHOTO, mask=MASK).shape == (80, 96, 3)


def test_a_job_that_fails_is_not_asked_for_again(client: OpenAI, server: Server) -> None:
    with pytest.raises(openai.InternalServerError) as refused:
        client.images.generate(prompt="fog", **SMALL)
    assert (refused.value.code, refused.value.type) == ("blank_image", "server_error")
    assert "every pixel is the same" in refused.value.message
    assert len(server.painted) == 1
    with pytest.raises(openai.APIError) as failed:
        list(client.images.generate(prompt="fog", stream=True, **SMALL))
    assert (failed.value.code, failed.value.message) == ("blank_image", "every pixel is the same")
    assert not isinstance(failed.value, openai.APIStatusError) and len(server.painted) == 2


def test_a_job_that_somebody_cancels_is_a_conflict_that_no_retry_cures(client: OpenAI, server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(client.images.generate, prompt="slow", **SMALL)
        assert server.model.reached.wait(30)
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{server.url}/v1/jobs/{server.jobs()[0].id}"
        assert httpx.post(f"{url}/cancel", headers=headers).status_code == 200
        with pytest.raises(openai.ConflictError) as refused:
            waits.result(30)
    assert refused.value.code == "canceled" and len(server.painted) == 1
    # Elsewhere, too.
    over = httpx.post(f"{url}/cancel", headers=headers)
    assert (over.status_code, over.headers["x-should-retry"]) == (409, "false")


# Retries


class Proxy:
    """In front of the server; of the first connections it makes what `faults` says: `drop` closes it, `cut` passes the
    request on and closes it when `when` is set."""

    def __init__(self, url: str, *faults: str) -> None:
        self._to, self._faults = ("127.0.0.1", int(url.rpartition(":")[2])), list(faults)
        self.when = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self.connections += 1
                fault = self._faults.pop(0) if self._faults else ""
                threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: str) -> None:
        with client:
            if fault == "drop":
                return
            with socket.create_connection(self._to) as server, suppress(OSError):
                threads = [threading.Thread(target=_pass, args=ends) for ends in ((client, server), (server, client))]
                for thread in threads:
                    thread.start()
                if fault == "cut" and self.when.wait(60):
                    client.shutdown(socket.SHUT_RDWR)
                    server.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join()

    def close(self) -> None:
        self._socket.close()


def _pass(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def proxied(server: Server, *faults: str, **options: Any) -> Iterator[tuple[OpenAI, Proxy]]:
    proxy = Proxy(server.url, *faults)
    with client_of(proxy.url, **options) as client:
        yield client, proxy
    proxy.close()


def test_a_connection_that_is_dropped_is_made_again(server: Server) -> None:
    with proxied(server, "drop") as (client, proxy):
        assert client.images.generate(prompt="a cat", **SMALL).data
    assert proxy.connections == 2 and len(server.painted) == 1


def test_a_server_that_is_down_for_a_moment_is_asked_again(client: OpenAI, server: Server) -> None:
    async def down() -> None:
        raise StoreUnavailable("for a moment")

    server.studio.jobs.before["create"] = down
    assert client.images.generate(prompt="a cat", **SMALL).data
    assert "create" not in server.studio.jobs.before and len(server.painted) == 1
    server.studio.blobs.before["get"] = down
    assert client.images.generate(prompt="a cat", **SMALL).data
    assert "get" not in server.studio.blobs.before and len(server.painted) == 2, "it was painted, and is fetched again"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["generation", "edit"])
def test_a_request_that_comes_again_attaches_to_its_job(
    server: Server, kind: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first connection is cut while the picture is painted."""
    before, engine = len(server.jobs()), server.studio.editor._models["telea"]._engine
    monkeypatch.setattr(engine, "on_paint", lambda: (server.model.reached.set(), server.model.goes_on.wait(30)))

    def ask(client: OpenAI, **asked: Any) -> Any:
        asked |= {"stream": stream} if stream else {}
        if kind == "edit":
            answer = client.images.edit(image=PHOTO, mask=MASK, prompt="slow", **asked)
        else:
            answer = client.images.generate(prompt="slow", size="64x64", extra_body={"steps": 2}, **asked)
        return [event.b64_json for event in answer] if stream else [one.b64_json for one in answer.data]

    with proxied(server, "cut") as (client, proxy), ThreadPoolExecutor() as pool:
        first = pool.submit(ask, client)
        assert server.model.reached.wait(30)
        if stream:
            # What has begun is not asked for again by the package, but by whoever calls it.
            proxy.when.set()
            with pytest.raises(openai.APIConnectionError):
                first.result(30)
            first = pool.submit(ask, client, **AGAIN)
        proxy.when.set()
        wait_for(lambda: proxy.connections == 2)
        wait_for(lambda: not server.left())
        server.model.goes_on.set()
        assert [pixels(one).shape[2] for one in first.result(30)] == [3]
    (job, *_), painted = server.jobs(), server.painted
    assert len(server.jobs()) == before + 1 and (job.status, job.deadline) == (State.SUCCEEDED, None)
    assert len(painted) == (0 if kind == "edit" else 1)


def test_one_that_comes_again_after_the_end_gets_the_same_pictures(server: Server) -> None:
    asked: dict[str, Any] = {"prompt": "slow and lost", "size": "64x64"}
    with proxied(server, "cut", max_retries=0) as (client, proxy), ThreadPoolExecutor() as pool:
        first = pool.submit(client.images.generate, **asked)
        assert server.model.reached.wait(30)
        proxy.when.set()
        with pytest.raises(openai.APIConnectionError):
            first.result(30)
        server.model.goes_on.set()
        wait_for(lambda: server.jobs()[0].status == State.SUCCEEDED)
        lost = server.jobs()[0]
        for same in (True, False):
            answer = client.images.generate(**asked, **AGAIN)
            assert answer.data and answer.data[0].model_extra
            assert (answer.data[0].model_extra["job_id"] == lost.id) == same
    assert len(server.painted) == 2, "what was answered is no other request's"


def test_only_ones_own_jobs_are_attached_to(server: Server) -> None:
    with proxied(server, "cut", max_retries=0) as (client, proxy), ThreadPoolExecutor() as pool:
        first = pool.submit(client.images.generate, prompt="slow and mine", size="64x64")
        assert server.model.reached.wait(30)
        proxy.when.set()
        with pytest.raises(openai.APIConnectionError):
            first.result(30)
        server.model.goes_on.set()
        mine = server.jobs()[0]
        other = client.with_options(api_key=OTHER)
        answer = other.images.generate(prompt="slow and mine", size="64x64", **AGAIN)
    assert answer.data and answer.data[0].model_extra and answer.data[0].model_extra["job_id"] != mine.id


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_ends_when_its_client_has_left(server: Server, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_api, "LEFT_S", 0.5)
    with proxied(server, "cut", max_retries=0) as (client, proxy), ThreadPoolExecutor() as pool:
        asked = pool.submit(lambda: list(client.images.generate(prompt="slow", stream=stream, **SMALL)))
        assert server.model.reached.wait(30)
        proxy.when.set()
        with pytest.raises(openai.APIConnectionError):
            asked.result(30)
    assert server.model.was_stopped.wait(30)
    wait_for(lambda: server.jobs()[0].status == State.EXPIRED)


def test_a_job_goes_on_for_the_one_who_is_left(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request's connection hangs, and so its client asks again: two wait, and one leaves."""
    monkeypatch.setattr(jobs_api, "LEFT_S", 1e6)
    asked: dict[str, Any] = {"prompt": "slow and shared", "size": "64x64"}
    with (
        client_of(server.url, max_retries=0, timeout=1.5) as hasty,
        client_of(server.url) as client,
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(hasty.images.generate, **asked)
        assert server.model.reached.wait(30)
        second = pool.submit(client.images.generate, **asked, **AGAIN)
        with pytest.raises(openai.APITimeoutError):
            first.result(30)
        server.model.goes_on.set()
        assert second.result(30).data
    assert len(server.painted) == 1 and not server.model.was_stopped.is_set()


def test_a_replica_that_stops_sends_the_client_to_another(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the same one, whose stop was another's."""
    with ThreadPoolExecutor() as pool, client_of(server.url) as client:
        waits = pool.submit(client.images.generate, prompt="slow", size="64x64")
        assert server.model.reached.wait(30)
        process = server.studio.served
        process.is_stopping = True
        wait_for(server.left)
        server.model.goes_on.set()
        assert waits.result(30).data
        process.is_stopping = False
    assert len(server.painted) == 1


def test_more_than_may_wait_are_sent_away_and_come_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them gets another's picture, though all ask the same."""
    monkeypatch.setattr(events, "RETRY_S", 1)
    api = server.studio.settings.api.model_copy(update={"streams_per_key": 2})
    process = server.studio.served
    kept = process.jobs.settings
    process.jobs.settings = kept.model_copy(update={"api": api})
    try:
        with ThreadPoolExecutor() as pool, client_of(server.url, max_retries=4) as client:
            asked = [pool.submit(client.images.generate, prompt="a cat of many", size="64x64") for _ in range(5)]
            answers = [one.result(60) for one in asked]
    finally:
        process.jobs.settings = kept
    ids = [one.data[0].model_extra["job_id"] for one in answers if one.data and one.data[0].model_extra]
    assert len(set(ids)) == 5 == len(server.painted)


@pytest.mark.serve
def test_on_serve(app: App) -> None:
    with client_of(app.http) as client:
        streamed = client.images.generate(prompt="a cat", model="fake", n=2, stream=True, size="64x64")
        assert [pixels(event.b64_json).shape for event in streamed] == [(64, 64, 3)] * 2
        listed = client.models.with_raw_response.list()
        assert listed.request_id == listed.headers["x-correlation-id"], "said once"
        assert (edited(client, image=PHOTO, mask=MASK)[KEPT] == photo()[KEPT]).all()


def test_the_envelope_is_beside_the_problem(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/images/generations", json={}, headers={"Authorization": f"Bearer {KEY}"})
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, body["status"], body["code"], body["details"]) == (
        400,
        400,
        "invalid_request",
        {"field": "prompt"},
    )
    assert body["error"] == {
        "message": body["detail"],
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "invalid_request",
    }
    elsewhere = httpx.post(f"{server.url}/v1/jobs", json={"type": "generate"}, headers={"X-API-Key": KEY})
    assert (elsewhere.status_code, elsewhere.json()["error"]["param"]) == (422, "prompt")
    named = httpx.get(f"{server.url}/v1/models", headers={"X-API-Key": KEY, "X-Request-ID": "order-7"})
    assert named.headers["x-request-id"] == named.headers["x-correlation-id"] == "order-7"
    assert json.loads(named.text)["object"] == "list"
