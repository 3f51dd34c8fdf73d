"""Clients of a studio (masuka), written from its shapes as its notebooks write theirs, with plain `requests`, on a real
server behind keys; and the faults of the studio's own server, each named by a test that shows that it is not here."""

import asyncio
import io
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import requests
from PIL import Image

from serve_app import adapters
from serve_app.errors import BlankImage
from serve_app.generate.loras import Lora
from serve_app.jobs.record import Job
from serve_app.models import GENERATIONS, GenerateRequest, LoraFacts
from serve_app.parameters import CropStrategy, EditParameters

from .client_server import in_thread
from .job_servers import Opened
from .rig import Clock, wait_for
from .test_generate import Studio
from .test_job_api import Site

KEY, OTHER, READER = "the-studios-own-key", "another-ones-key", "a-readers-key"
KEYS = f"{KEY}:jobs,{OTHER}:submit+read,{READER}:read"

ASKED = {"prompt": "photo of TOK person in a field", "num_inference_steps": 10, "width": 512, "height": 512}


class Scripted:
    """What the model does before a picture, by its prompt."""

    def __init__(self) -> None:
        self.reached, self.goes_on, self.was_stopped = threading.Event(), threading.Event(), threading.Event()

    async def __call__(self, request: GenerateRequest) -> None:
        if request.prompt == "fog":
            raise BlankImage("every pixel is the same")
        if request.prompt == "slow":
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
        self.model = studio.painter.before = Scripted()

    def change(self, job_id: str, **changes: Any) -> None:
        """Of a job's record, in its store."""

        async def update() -> None:
            job = await self.studio.jobs.get(job_id)
            await self.studio.jobs.update(job_id, job.lock_key, lambda stored, *_: (stored.evolve(**changes),))

        asyncio.run(update())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Behind keys, and `requests` as docs/clients.md has a notebook begin."""
    with in_thread(lambda url: Studio(public_url=url, clock=Clock()), api_keys=KEYS) as (url, studio):
        point(url, monkeypatch)
        yield Server(url, studio)


def point(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("get", "post", "delete"):
        # Put back afterwards, whatever the lines do.
        monkeypatch.setattr(requests, name, getattr(requests, name))
    text = Path("docs/clients.md").read_text()
    lines = re.search(r"## masuka's notebooks\n.*?```python\n(.*?)```", text, re.S)
    assert lines is not None
    exec(lines[1].replace("https://app.example.org", url).replace("the key", KEY), {})


def create(url: str, **asked: Any) -> str:
    """The id of a job."""
    answer = requests.post(f"{url}/api/generate/image", json={**ASKED, **asked})
    assert answer.status_code == 201, answer.text
    created = answer.json()
    assert created.keys() == {"job_id", "status", "task_id"} and created["status"] == "pending"
    return str(created["job_id"])


def wait(url: str, job_id: str) -> Any:
    """As the notebooks poll: until it is completed or failed; no other answer ends it."""
    ends_at = time.monotonic() + 60
    while (answer := requests.get(f"{url}/api/generate/{job_id}")).json()["status"] not in ("completed", "failed"):
        assert answer.json()["status"] == "processing" and time.monotonic() < ends_at
        time.sleep(0.05)
    return answer.json()


def pixels(job: Any) -> list[bytes]:
    """Of a job's pictures: their files also say what they were made with."""
    assert job["status"] == "completed", job
    answers = [requests.get(link) for link in job["output_paths"]]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    return [Image.open(io.BytesIO(answer.content)).tobytes() for answer in answers]


def made(url: str, **asked: Any) -> list[bytes]:
    return pixels(wait(url, create(url, **asked)))


# From the request to the pictures


def test_a_cell_of_the_notebook(server: Server) -> None:
    job_id = create(server.url, num_images=2, negative_prompt="blurry", guidance_scale=3.5, seed=7)
    job = wait(server.url, job_id)
    assert job.keys() == {
        "id", "status", "prompt", "parameters", "output_paths", "error_message", "created_at", "completed_at",
    }  # fmt: skip
    assert (job["id"], job["status"], job["prompt"], job["error_message"]) == (
        job_id,
        "completed",
        ASKED["prompt"],
        None,
    )
    assert datetime.fromisoformat(job["completed_at"]) >= datetime.fromisoformat(job["created_at"])
    paths = job["parameters"].pop("output_paths")
    assert job["parameters"] == {
        "num_images": 2,
        "num_inference_steps": 10,
        "guidance_scale": 3.5,
        "width": 512,
        "height": 512,
        "seed": 7,
        "seeds": [7, 8],
        "model_id": None,
        "lora_weight": None,
    }
    assert [path.endswith(f"_{n}_512x512_{7 + n}.png") for n, path in enumerate(paths)] == [True, True]
    for link in job["output_paths"]:
        answer = requests.get(link)
        picture = Image.open(io.BytesIO(answer.content))
        assert (answer.headers["Content-Type"], picture.format, picture.size) == ("image/png", "PNG", (512, 512))


def test_links_are_signed_anew_at_each_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = create(server.url)
    (first,) = wait(server.url, job_id)["output_paths"]
    moment = time.time() + 5
    monkeypatch.setattr(time, "time", lambda: moment)
    (second,) = wait(server.url, job_id)["output_paths"]
    assert first != second and requests.get(first).content == requests.get(second).content


def test_sides_are_rounded_and_the_real_size_is_recorded(server: Server) -> None:
    for asked, real in ((512, 512), (519, 512), (520, 528), (1000, 1008), (2041, 2048)):
        job = wait(server.url, create(server.url, width=asked))
        assert (job["parameters"]["width"], job["parameters"]["height"]) == (real, 512)
        assert f"_{real}x512_" in job["parameters"]["output_paths"][0]
        assert Image.open(io.BytesIO(requests.get(job["output_paths"][0]).content)).size == (real, 512)


def test_every_generator_makes_the_sides_that_they_are_rounded_to() -> None:
    assert [family for family, takes in GENERATIONS.items() if 16 % takes.multiple_px] == []


def test_a_job_is_processing_until_it_is_completed(server: Server) -> None:
    job_id = create(server.url, prompt="slow", num_images=2)
    assert server.model.reached.wait(30)
    job = requests.get(f"{server.url}/api/generate/{job_id}").json()
    assert (job["status"], job["output_paths"], job["completed_at"]) == ("processing", [], None)
    server.model.goes_on.set()
    assert wait(server.url, job_id)["status"] == "completed"


def test_a_job_that_failed_was_canceled_or_expired_has_failed(server: Server) -> None:
    def failed(job_id: str) -> str:
        job = wait(server.url, job_id)
        assert job["status"] == "failed" and job["completed_at"]
        return str(job["error_message"])

    assert failed(create(server.url, prompt="fog")) == "every pixel is the same"
    canceled = create(server.url, prompt="slow")
    assert server.model.reached.wait(30)
    requests.post(f"{server.url}/v1/jobs/{canceled}/cancel").raise_for_status()
    assert failed(canceled) == "canceled by a user"
    server.model.reached.clear()
    expired = create(server.url, prompt="slow")
    assert server.model.reached.wait(30)
    server.change(expired, deadline=server.studio.clock.now - timedelta(seconds=1))
    assert "deadline" in failed(expired)


# Which generator


async def test_the_first_flux_makes_them_and_takes_no_negative_prompt() -> None:
    site = Site(Studio())
    async with site.http:
        await site.http.post("/api/generate/image", json={**ASKED, "negative_prompt": "dogs"})
        (job,) = await site.studio.jobs.list()
    assert (job.variant, job.parameters.negative_prompt) == ("flux-dev-Q8_0", "")


async def test_without_flux_the_first_generator_makes_them() -> None:
    site = Site(Studio(generators={"sdxl": {"max_count": 2}, "fake": {}}))
    async with site.http:
        await site.http.post("/api/generate/image", json={**ASKED, "negative_prompt": "dogs"})
        (job,) = await site.studio.jobs.list()
        refused = await site.http.post("/api/generate/image", json={**ASKED, "num_images": 3})
    assert (job.variant, job.parameters.negative_prompt) == ("sdxl", "dogs")
    assert (refused.status_code, refused.json()["detail"]) == (
        422,
        "num_images: sdxl makes at most 2 pictures in a job",
    )


async def test_a_lora_goes_to_the_first_generator_of_its_family_that_takes_loras() -> None:
    compiled = {"optimizations": {"compile": True}}
    facts = LoraFacts(
        family="flux", format="diffusers", dtype="F16", rank=4, layers=1, has_alpha=False, alpha_scale=(1, 1)
    )
    lora = Lora(
        id="e3b0c442" + 24 * "0", owner="", name="TOK", version="1", trigger_word="TOK", path="x", blob_version="1",
        sha256=64 * "0", size_bytes=1, alpha=None, facts=facts, created_at=datetime.now(UTC),
    )  # fmt: skip
    answers = []
    for more in ({"flux-dev-Q8_0": {}}, {}):
        site = Site(Studio(generators={"sdxl": {}, "flux-dev-Q4_0": compiled, **more}))
        record = lora.model_dump_json().encode()
        await site.studio.blobs.put(f"loras/e3b0c442/{24 * '0'}.json", record, content_type="application/json")
        async with site.http:
            answers.append(await site.http.post("/api/generate/image", json={**ASKED, "model_id": lora.id}))
            variants = [job.variant for job in await site.studio.jobs.list()]
            assert variants == list(more)
    assert [answer.status_code for answer in answers] == [201, 422]
    assert answers[1].json()["detail"] == "model_id: there is no generator here that takes LoRAs of flux"


async def test_without_a_generator_there_are_none() -> None:
    site = Site(Studio(generators={}))
    async with site.http:
        refused = await site.http.post("/api/generate/image", json=ASKED)
    assert (refused.status_code, refused.json()["detail"]) == (422, "model_id: there is no generator here")


# What is refused


WRONG: list[dict[str, Any]] = [
    {"prompt": ""},
    {"prompt": "x" * 501},
    {"prompt": None},
    {"negative_prompt": "x" * 501},
    {"model_id": "../x"},
    {"lora_weight": 1.1},
    {"lora_weight": -0.1},
    {"num_images": 0},
    {"num_images": 5},
    {"num_inference_steps": 9},
    {"num_inference_steps": 101},
    {"guidance_scale": 0.9},
    {"guidance_scale": 20.1},
    {"width": 511},
    {"height": 2049},
    {"seed": -1},
    {"config": []},
]


def test_a_refusal_names_the_field_in_a_sentence(server: Server) -> None:
    for wrong in WRONG:
        answer = requests.post(f"{server.url}/api/generate/image", json={**ASKED, **wrong})
        assert answer.status_code == 422, wrong
        detail = answer.json()["detail"]
        assert isinstance(detail, str) and detail.startswith(f"{next(iter(wrong))}: ")


def test_what_else_is_sent_has_no_effect(server: Server) -> None:
    first = made(
        server.url, seed=1, config={"sampler": "euler"}, model_id="", lora_weight=None, scheduler="none", x=[1]
    )
    assert first == made(server.url, seed=1, model_id=None)


@pytest.mark.parametrize("path", ["generate/nobody", "models/nobody"])
def test_what_is_not_there_is_not_found(server: Server, path: str) -> None:
    for call in (requests.get, requests.delete):
        answer = call(f"{server.url}/api/{path}")
        assert answer.status_code == 404 and isinstance(answer.json()["detail"], str)


def test_an_unknown_lora_is_not_found(server: Server) -> None:
    answer = requests.post(f"{server.url}/api/generate/image", json={**ASKED, "model_id": "6f7c1b1e-0000"})
    assert (answer.status_code, answer.json()["detail"]) == (404, "there is no model or LoRA 6f7c1b1e-0000")


# Lists


def test_the_list_is_bare_and_newest_first(server: Server) -> None:
    def ids(query: str = "") -> list[str]:
        answer = requests.get(f"{server.url}/api/generate/{query}")
        assert answer.status_code == 200
        return [job["id"] for job in answer.json()]

    assert ids() == []
    created = []
    for _ in range(3):
        server.studio.clock.advance(1)
        created.insert(0, create(server.url))
    assert ids() == created and ids("?limit=2") == created[:2]
    newest = wait(server.url, created[0])
    assert requests.get(f"{server.url}/api/generate/").json()[0] == newest | {"output_paths": ANY}
    assert [job["id"] for job in requests.get(f"{server.url}/api/generate").json()] == created
    assert requests.get(f"{server.url}/api/generate/?limit=0").status_code == 422


def test_jobs_of_pictures_are_in_the_list_whoever_posted_them(server: Server) -> None:
    body = {"type": "generate", "prompt": "a cat", "width": 64, "height": 64, "steps": 2}
    posted = requests.post(f"{server.url}/v1/jobs", json=body).json()["job"]["id"]
    (key_id,) = {job.owner for job in asyncio.run(server.studio.jobs.list())}
    edit = EditParameters(prompt="", guidance_scale=2, steps=2, crop_strategy=CropStrategy.AUTO)
    asyncio.run(server.studio.jobs.create(Job(id="edit", owner=key_id, variant="telea", parameters=edit)))
    (job,) = requests.get(f"{server.url}/api/generate/").json()
    assert (job["id"], job["parameters"]["width"], job["parameters"]["num_inference_steps"]) == (posted, 64, 2)
    assert wait(server.url, posted)["status"] == "completed"
    assert requests.get(f"{server.url}/v1/jobs/{create(server.url)}").json()["type"] == "generate"


def test_the_list_of_models_is_bare(server: Server) -> None:
    for path in ("models/", "models", "models/?model_type=flux_image"):
        answer = requests.get(f"{server.url}/api/{path}")
        assert (answer.status_code, answer.json()) == (200, [])


# Keys


def test_a_key_sees_its_own_jobs_alone(server: Server) -> None:
    job_id = create(server.url)
    headers = {"Authorization": f"Bearer {OTHER}"}
    with requests.Session() as other:
        assert other.get(f"{server.url}/api/generate/", headers=headers).json() == []
        for call in (other.get, other.delete):
            assert call(f"{server.url}/api/generate/{job_id}", headers=headers).status_code == 404
    assert wait(server.url, job_id)["status"] == "completed"


@pytest.mark.parametrize(("key", "status"), [(READER, 403), ("nobodys", 401), (None, 401)])
def test_who_may_not_post_is_told_so(server: Server, key: str | None, status: int) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with requests.Session() as other:
        answer = other.post(f"{server.url}/api/generate/image", json=ASKED, headers=headers)
        assert answer.status_code == status and isinstance(answer.json()["detail"], str)
        deleted = other.delete(f"{server.url}/api/generate/x", headers=headers)
        listed = other.get(f"{server.url}/api/generate/", headers=headers)
        assert (deleted.status_code, listed.status_code) == (status, 200 if key == READER else 401)


# Deleting


def test_deleting_a_job_deletes_its_pictures(server: Server) -> None:
    job_id = create(server.url, num_images=2)
    links = wait(server.url, job_id)["output_paths"]
    answer = requests.delete(f"{server.url}/api/generate/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert requests.get(f"{server.url}/api/generate/{job_id}").status_code == 404
    assert [requests.get(link).status_code for link in links] == [404, 404]


# The faults of the studio's own server


def test_not_here_a_deleted_job_goes_on_and_its_pictures_stay(server: Server) -> None:
    job_id = create(server.url, prompt="slow")
    assert server.model.reached.wait(30)
    assert requests.delete(f"{server.url}/api/generate/{job_id}").status_code == 204
    wait_for(server.model.was_stopped.is_set)
    assert requests.get(f"{server.url}/api/generate/").json() == []
    assert asyncio.run(server.studio.paths()) == []


async def test_not_here_jobs_stay_processing_because_their_parameters_are_not_saved(
    tmp_path: Path, opened: Opened
) -> None:
    """There, a completed job's paths were set in a JSON column that no write followed."""

    def site() -> Site:
        """As another process, which finds what is stored and no more."""
        jobs = opened(adapters.job_store(f"sqlite:{tmp_path / 'jobs.db'}"))
        return Site(Studio(stores=(adapters.blob_store(f"files:{tmp_path / 'blobs'}", ""), jobs)))

    first, other = site(), site()
    async with first.http:
        posted = (await first.http.post("/api/generate/image", json={**ASKED, "num_images": 2})).json()
        await first.studio.notifier.drained()
        assert (await first.studio.work()).reason == "succeeded"
    async with other.http:
        job = await other.get(f"/api/generate/{posted['job_id']}")
    assert job["status"] == "completed" and job["completed_at"]
    assert len(job["parameters"]["output_paths"]) == len(job["output_paths"]) == 2


async def test_not_here_a_completed_job_lacks_a_picture_that_could_not_be_stored() -> None:
    """There, a picture whose upload failed was left out."""
    studio = Studio()
    studio.blobs.only = {"put"}

    async def store_goes_down(request: GenerateRequest) -> None:
        studio.blobs.is_down = len(studio.painter.requests) == 2

    studio.painter.before = store_goes_down
    site = Site(studio)
    async with site.http:
        posted = (await site.http.post("/api/generate/image", json={**ASKED, "num_images": 3})).json()
        await studio.notifier.drained()
        assert (await studio.work()).action == "defer"
        job = await site.get(f"/api/generate/{posted['job_id']}")
        assert (job["status"], len(job["output_paths"])) == ("processing", 1)
        studio.blobs.is_down = False
        studio.clock.advance(60)
        assert (await studio.work()).reason == "succeeded"
        job = await site.get(f"/api/generate/{posted['job_id']}")
    assert (job["status"], len(job["output_paths"])) == ("completed", 3)
