"""The studio's clients (see test_studio.py) with LoRAs, whose pictures the real pipeline makes with tiny weights; and
those of its own server's faults that have to do with LoRAs, each named by a test that shows that it is not here."""

import asyncio
import hashlib
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import ANY

import pytest
import requests

from serve_app.adapters.memory import MemoryBlobStore, MemoryJobStore

from .client_server import in_thread
from .test_generate import Studio
from .test_studio import ASKED, KEY, KEYS, OTHER, create, made, pixels, point, wait
from .tiny_studio import TinyStudios

pytestmark = pytest.mark.slow

APP = uuid.uuid4().hex


def flux(tiny_studio: TinyStudios, url: str) -> Studio:
    """FLUX.1 with tiny weights: 256 pixels, 10 steps, whatever is asked for. All are replicas of one app."""
    stores = (MemoryBlobStore(f"memory:{APP}", url), MemoryJobStore(f"memory:{APP}"))
    more = {"generators": {"tiny-sdxl": {}, "tiny-flux-dev": {}}, "api": {"smoke": True}}
    return tiny_studio("tiny-flux-dev", stores=stores, name=APP, public_url=url, **more)


@pytest.fixture(scope="module")
def painting(tiny_studio: TinyStudios) -> Iterator[str]:
    with in_thread(partial(flux, tiny_studio), api_keys=KEYS) as (url, _):
        yield url


@pytest.fixture
def url(painting: str, monkeypatch: pytest.MonkeyPatch) -> str:
    point(painting, monkeypatch)
    return painting


@pytest.fixture(scope="module")
def loras(painting: str) -> tuple[str, str]:
    """The ids of two from the studio's bucket, where all files have the same name."""
    from . import lora_files

    ids = []
    for version in ("1", "2"):
        data = lora_files.file(lora_files.layers("flux", int(version)), "simpletuner")
        path = f"models/session-{version}/session-{version}/flux_lora.safetensors"
        asyncio.run(MemoryBlobStore(f"memory:{APP}").put(path, data, content_type="application/octet-stream"))
        model = register(painting, name="TOK", version=version, trigger_word="TOK", blob=path)["model"]
        ids.append(str(model["id"]))
    return ids[0], ids[1]


def register(url: str, **body: Any) -> Any:
    # Not one of the notebooks' calls.
    answer = requests.request("POST", f"{url}/v1/models", json=body, headers={"X-API-Key": KEY})
    answer.raise_for_status()
    return answer.json()


def test_a_cell_that_paints_with_the_newest_model(url: str, loras: tuple[str, str]) -> None:
    models = requests.get(f"{url}/api/models/").json()
    assert [model["id"] for model in models] == list(reversed(loras))
    model, newest = models[0], loras[1]
    assert model.keys() == {
        "id", "name", "version", "model_type", "trigger_word", "file_size_mb", "model_metadata", "created_at",
        "download_url",
    }  # fmt: skip
    assert (model["id"], model["name"], model["model_type"]) == (newest, "TOK", "flux_image")
    assert (model["trigger_word"], model["file_size_mb"]) == ("TOK", 1)
    file = requests.get(model["download_url"]).content
    assert hashlib.sha256(file).hexdigest() == model["model_metadata"]["sha256"]
    assert requests.get(f"{url}/api/models/{newest}").json() == model | {"download_url": ANY}
    job = wait(url, create(url, model_id=newest, lora_weight=0.5, num_images=2))
    assert (job["status"], len(job["output_paths"])) == ("completed", 2)
    assert (job["parameters"]["model_id"], job["parameters"]["lora_weight"]) == (newest, 0.5)


def test_a_lora_of_sdxl_goes_to_sdxl_and_is_deleted_with_its_file(url: str) -> None:
    from . import lora_files

    data = lora_files.file(lora_files.layers("sdxl", 1), "kohya")
    about = {"name": "a dog", "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    upload = register(url, **about)["upload"]
    requests.request(upload["method"], upload["url"], data=data, headers=upload["headers"]).raise_for_status()
    model = requests.get(f"{url}/api/models/{register(url, **about)['model']['id']}").json()
    assert model["model_type"] == "sdxl_image"
    flux = requests.get(f"{url}/api/models/?model_type=flux_image").json()
    assert [one["id"] for one in requests.get(f"{url}/api/models/?model_type=sdxl_image").json()] == [model["id"]]
    assert model["id"] not in {one["id"] for one in flux}
    job_id = create(url, model_id=model["id"], negative_prompt="dogs")
    parameters = requests.get(f"{url}/v1/jobs/{job_id}").json()["parameters"]
    assert (parameters["model_id"], parameters["negative_prompt"]) == ("tiny-sdxl", "dogs")
    requests.delete(f"{url}/api/generate/{job_id}").raise_for_status()
    with requests.Session() as other:
        headers = {"Authorization": f"Bearer {OTHER}"}
        assert other.get(f"{url}/api/models/", headers=headers).json() == []
        assert other.delete(f"{url}/api/models/{model['id']}", headers=headers).status_code == 404
    answer = requests.delete(f"{url}/api/models/{model['id']}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert requests.get(f"{url}/api/models/{model['id']}").status_code == 404
    assert requests.get(model["download_url"]).status_code == 404
    refused = requests.post(f"{url}/api/generate/image", json={**ASKED, "model_id": model["id"]})
    assert refused.status_code == 404


def test_not_here_the_first_lora_is_served_for_all_because_their_files_have_one_name(
    url: str, loras: tuple[str, str]
) -> None:
    one, other = loras
    first, second = made(url, seed=7, model_id=one), made(url, seed=7, model_id=other)
    assert first != second
    assert made(url, seed=7, model_id=one) == first


def test_not_here_a_request_without_a_lora_has_the_one_of_the_request_before(url: str, loras: tuple[str, str]) -> None:
    base = made(url, seed=7)
    assert made(url, seed=7, model_id=loras[0]) != base
    assert made(url, seed=7) == made(url, seed=7, model_id="") == base


def test_not_here_a_lora_is_added_to_those_of_the_requests_before(
    tiny_studio: TinyStudios, url: str, loras: tuple[str, str]
) -> None:
    """There, one that was unfused stayed loaded."""
    one, other = loras
    with in_thread(partial(flux, tiny_studio), api_keys=KEYS) as (fresh, _), pytest.MonkeyPatch.context() as patch:
        point(fresh, patch)
        alone = made(fresh, seed=7, model_id=other)
    for _ in range(2):
        made(url, seed=7, model_id=one)
        assert made(url, seed=7, model_id=other) == alone


def test_not_here_a_loras_weight_stays_as_it_was_first_used_or_has_no_effect(url: str, loras: tuple[str, str]) -> None:
    model_id, _ = loras
    full, half, none = (made(url, seed=7, model_id=model_id, lora_weight=weight) for weight in (0.8, 0.4, 0))
    assert full != half != none == made(url, seed=7)
    assert made(url, seed=7, model_id=model_id) == full


def test_not_here_image_3_cannot_be_made_again_alone(url: str, loras: tuple[str, str]) -> None:
    """There, one generator of random numbers made them all, one after the other."""
    model_id, _ = loras
    job = wait(url, create(url, num_images=4, model_id=model_id))
    pictures = pixels(job)
    assert len(set(pictures)) == 4
    assert made(url, seed=job["parameters"]["seeds"][2], model_id=model_id) == [pictures[2]]
