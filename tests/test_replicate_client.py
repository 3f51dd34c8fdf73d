"""The unmodified package `replicate` on a real server behind keys, told only where it is and its key."""

import asyncio
import hashlib
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import replicate
from PIL import Image
from replicate.exceptions import ModelError, ReplicateError
from replicate.prediction import Prediction

from serve_app.errors import BlankImage
from serve_app.generate.loras import Lora
from serve_app.jobs.record import State
from serve_app.models import GenerateRequest, LoraFacts

from .client_server import in_thread
from .rig import jpeg, line_mask, photo, png
from .serving import App
from .test_generate import Studio

KEY, OTHER, READER = "the-clients-own-key", "another-ones-key", "a-readers-key"
KEYS = f"{KEY}:submit+read,{OTHER}:submit+read,{READER}:read"
SMALL: dict[str, Any] = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 4}
#: As the program's own page shows them: what most programs send.
SDXL = "stability-ai/sdxl:39ed52f2a78e934b3ba6e2a89f5b1c712de7dfea535525255b1aa35c5565e08b"
ClientOf = Callable[[str | None], replicate.Client]
FILL = {"photo.jpg": jpeg(photo()), "mask.png": png(line_mask())}


class Scripted:
    """What the model does before a picture, by its prompt."""

    def __init__(self) -> None:
        self.reached, self.goes_on = threading.Event(), threading.Event()

    async def __call__(self, request: GenerateRequest) -> None:
        if request.prompt == "fog":
            raise BlankImage("every pixel is the same")
        # The second picture of two: the first is half of the work.
        while request.prompt == "slow" and request.seed == 2 and not self.goes_on.is_set():
            self.reached.set()
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Studio]]:
    fill = {"definition": {"family": "flux-fill", "file": "none.gguf", "base": "none"}}

    def make(url: str) -> Studio:
        return Studio(public_url=url, variants={"telea": {}, "fill": fill})

    with in_thread(make, api_keys=KEYS) as running:
        yield running


@pytest.fixture
def model(server: tuple[str, Studio]) -> Scripted:
    server[1].painter.before = scripted = Scripted()
    return scripted


@pytest.fixture
def client_of(server: tuple[str, Studio], model: Scripted) -> Iterator[ClientOf]:
    """By its key."""
    made = list[replicate.Client]()

    def client(key: str | None) -> replicate.Client:
        made.append(replicate.Client(api_token=key, base_url=f"{server[0]}/replicate", trust_env=False))
        made[-1].poll_interval = 0.02
        return made[-1]

    yield client
    for one in made:
        # The package leaves that to the process's end.
        one._client.close()


@pytest.fixture
def client(client_of: ClientOf) -> replicate.Client:
    return client_of(KEY)


def picture(link: str) -> Image.Image:
    answer = httpx.get(link, trust_env=False)
    answer.raise_for_status()
    return Image.open(io.BytesIO(answer.content))


def asked(server: tuple[str, Studio]) -> GenerateRequest:
    """What was painted last."""
    return server[1].painter.requests[-1]


# Programs


def test_run_gives_links_to_the_pictures(client: replicate.Client) -> None:
    given = {**SMALL, "num_outputs": 3, "seed": 7, "output_format": "webp"}
    links = client.run("anyone/sdxl", input=given)
    assert [(picture(link).format, picture(link).size) for link in links] == [("WEBP", (64, 64))] * 3
    assert len({picture(link).tobytes() for link in links}) == 3
    (alone,) = client.run("anyone/sdxl", input={**given, "num_outputs": 1, "seed": 9})
    assert picture(alone).tobytes() == picture(links[2]).tobytes()


def test_a_program_that_makes_no_client_is_told_by_its_environment(
    server: tuple[str, Studio], model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPLICATE_BASE_URL", f"{server[0]}/replicate")
    monkeypatch.setenv("REPLICATE_API_TOKEN", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = replicate.Client()
    assert len(client.run("anyone/sdxl", input=SMALL)) == 1
    client._client.close()


async def test_async_run(client: replicate.Client) -> None:
    (link,) = await client.async_run("anyone/sdxl", input=SMALL)
    await client._async_client.aclose()
    assert link.startswith("http")


def test_run_waits_by_polling_where_it_is_not_to_wait(client: replicate.Client) -> None:
    assert len(client.run("anyone/sdxl", input=SMALL, wait=False)) == 1


def test_an_unchanged_program_of_sdxl_with_its_versions_hash(
    client: replicate.Client, server: tuple[str, Studio]
) -> None:
    given = {**SMALL, "scheduler": "K_EULER", "guidance_scale": 7.5, "negative_prompt": "dogs", "prompt_strength": 0.8}
    given |= {"apply_watermark": False, "high_noise_frac": 0.8, "lora_scale": 0.6, "disable_safety_checker": True}
    assert len(client.run(SDXL, input=given)) == 1
    request = asked(server)
    assert (request.scheduler, request.guidance_scale, request.negative_prompt) == ("euler", 7.5, "dogs")


def test_an_unchanged_program_of_flux_dev(client: replicate.Client, server: tuple[str, Studio]) -> None:
    given = {"prompt": "a cat", "go_fast": True, "guidance": 3, "megapixels": "0.25", "num_outputs": 1}
    given |= {"aspect_ratio": "16:9", "output_format": "webp", "output_quality": 80, "num_inference_steps": 2}
    (link,) = client.run("black-forest-labs/flux-dev", input=given)
    assert picture(link).size == (672, 384)
    assert (asked(server).guidance_scale, asked(server).steps) == (3, 2)
    (prediction,) = [one for one in client.predictions.list() if one.version == "flux-dev-Q8_0"]
    assert prediction.model == "flux-fill-serve/flux-dev-Q8_0" and len(prediction.output) == 1
    assert prediction.input and prediction.input.items() >= {"num_outputs": 1, "width": 672, "guidance": 3}.items()


@pytest.mark.parametrize("strategy", ["base64", "url"])
def test_an_edit_of_files(client: replicate.Client, tmp_path: Path, strategy: Any) -> None:
    """Sent within the input, or first as files, as the package does where it is not told."""
    files = {name: tmp_path / name for name in FILL}
    for name, data in FILL.items():
        files[name].write_bytes(data)
    with files["photo.jpg"].open("rb") as image:
        given = {"image": image, "mask": files["mask.png"], "prompt": "grass", "megapixels": "1", "num_outputs": 1}
        more: Any = {"file_encoding_strategy": strategy} if strategy == "base64" else {}
        (link,) = client.run("black-forest-labs/flux-fill-dev", input=given, **more)
    edited, mask = np.asarray(picture(link).convert("RGB")).astype(int), line_mask() > 0
    assert edited.shape == photo().shape
    assert np.abs(edited - photo())[mask].mean() > 1
    assert "grass" in [one.input["prompt"] for one in client.predictions.list() if one.input and one.version == "fill"]


def test_a_lora_by_its_id_and_scale(client: replicate.Client, server: tuple[str, Studio]) -> None:
    facts = LoraFacts(
        family="flux", format="kohya", dtype="BF16", rank=4, layers=1, has_alpha=True, alpha_scale=(1.0, 1.0)
    )
    lora = Lora(
        **dict.fromkeys(("name", "version", "trigger_word", "path", "blob_version"), "cat"),
        id="c" * 32,
        owner=f"key-{hashlib.sha256(KEY.encode()).hexdigest()[:12]}",
        sha256="0" * 64,
        size_bytes=1,
        alpha=None,
        facts=facts,
        created_at=datetime.now(UTC),
    )
    record = lora.model_dump_json().encode()
    asyncio.run(server[1].blobs.put(f"loras/{'c' * 8}/{'c' * 24}.json", record, content_type="application/json"))
    for given, scale in (({"lora_weights": lora.id, "lora_scale": 0.7}, 0.7), ({"hf_lora": lora.id}, 1.0)):
        assert len(client.run("black-forest-labs/flux-dev-lora", input={**SMALL, **given})) == 1
        assert [(one.id, one.scale) for one in asked(server).loras] == [(lora.id, scale)]
    with pytest.raises(ReplicateError) as refused:
        client.run("black-forest-labs/flux-dev-lora", input={**SMALL, "hf_lora": "none-such"})
    assert refused.value.status == 404


@pytest.mark.serve
def test_on_the_real_app(app: App) -> None:
    client = replicate.Client(api_token="any", base_url=f"{app.http}/replicate", trust_env=False)
    links = client.run("anyone/fake", input={**SMALL, "num_outputs": 2})
    assert [picture(link).size for link in links] == [(64, 64)] * 2
    prediction = client.predictions.create("fake", SMALL)
    prediction.wait()
    assert prediction.status == "succeeded" and prediction.progress and prediction.progress.percentage == 1
    client._client.close()


# Predictions


def test_progress_cancel_and_wait(client: replicate.Client, model: Scripted) -> None:
    prediction = client.predictions.create(
        model="anyone/sdxl", input={**SMALL, "prompt": "slow", "num_outputs": 2, "seed": 1}
    )
    assert prediction.status == "starting"
    assert model.reached.wait(20)
    seen = until(prediction, lambda: prediction.progress is not None and prediction.progress.percentage >= 0.5)
    assert (seen.status, seen.output, seen.completed_at) == ("processing", None, None)
    assert seen.progress is not None and (seen.progress.current, seen.progress.total) == (4, 8)
    seen.cancel()
    assert seen.status == "canceled" and seen.completed_at
    seen.wait()
    seen.cancel()
    assert (seen.status, seen.error) == ("canceled", None)


def test_one_that_goes_on_after_the_wait_says_starting(client: replicate.Client, model: Scripted) -> None:
    """The package takes anything else for the end: it would give no output."""
    given = {**SMALL, "prompt": "slow", "num_outputs": 2, "seed": 1}
    prediction = client.models.predictions.create("anyone/sdxl", input=given, wait=1)
    assert model.reached.is_set() and prediction.status == "starting"
    prediction.reload()
    assert prediction.status == "processing"
    model.goes_on.set()
    prediction.wait()
    assert prediction.status == "succeeded" and len(prediction.output) == 2
    assert prediction.progress == Prediction.Progress(percentage=1.0, current=8, total=8)
    assert prediction.metrics and prediction.metrics["predict_time"] > 0
    assert prediction.created_at and prediction.started_at and prediction.completed_at


def test_one_that_fails(client: replicate.Client) -> None:
    with pytest.raises(ModelError, match="every pixel is the same") as failed:
        client.run("anyone/sdxl", input={**SMALL, "prompt": "fog"})
    assert failed.value.prediction.status == "failed" and failed.value.prediction.output is None


def test_one_that_expired_has_failed(client: replicate.Client, server: tuple[str, Studio], model: Scripted) -> None:
    """The package would wait for ever for the end of a status that it does not know."""
    prediction = client.predictions.create(version="sdxl", input=SMALL)
    prediction.wait()
    change(server[1], prediction.id, status=State.EXPIRED)
    prediction = client.predictions.get(prediction.id)
    assert (prediction.status, prediction.output) == ("failed", None)


def test_lists_in_pages(client_of: ClientOf, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(OTHER)
    made = [client.predictions.create(version="anyone/sdxl", input=SMALL).id for _ in range(3)]
    monkeypatch.setattr("serve_app.http.replicate.PAGE", 2)
    pages = list(replicate.pagination.paginate(client.predictions.list))
    assert [len(page.results) for page in pages] == [2, 1]
    assert {one.id for page in pages for one in page} == set(made)


def test_models_and_versions_say_what_they_take(client: replicate.Client) -> None:
    model = client.models.get("black-forest-labs/flux-dev")
    version = model.latest_version
    assert version is not None and version == client.models.get("anyone", "flux-dev-Q8_0").versions.get(version.id)
    schemas = version.openapi_schema["components"]["schemas"]
    assert {"prompt", "num_outputs", "aspect_ratio"} <= schemas["Input"]["properties"].keys()
    jsonschema.validate(SMALL, schemas["Input"])
    assert len(client.run(version, input=SMALL)) == 1
    assert len(client.run(model, input=SMALL)) == 1
    edits = client.models.get("black-forest-labs/flux-fill-dev").latest_version
    assert edits and set(edits.openapi_schema["components"]["schemas"]["Input"]["required"]) == {"image", "mask"}


# Refusals


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"refine": "expert_ensemble_refiner"}, "refine: there is no such field"),
        ({"image": "data:,"}, "image: there is no such field"),
        ({"prompt": ""}, "prompt: "),
        ({"num_outputs": 101}, "num_outputs: "),
        ({"num_inference_steps": 0}, "num_inference_steps: "),
        ({"guidance_scale": "7"}, "guidance_scale: "),
        ({"scheduler": "PNDM"}, "scheduler: sdxl has euler"),
        ({"width": 65}, "width: 65 is no multiple of 8"),
        ({"aspect_ratio": "1:1"}, "aspect_ratio: give it, or width and height"),
        ({"aspect_ratio": "7:1", "width": None}, "aspect_ratio: "),
        ({"hf_lora": "someone/on-a-hub"}, "hf_lora: "),
    ],
    ids=str,
)
def test_inputs_that_are_refused_are_named(client: replicate.Client, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ReplicateError) as refused:
        client.run("anyone/sdxl", input={**SMALL, **wrong})
    assert refused.value.status == 422 and refused.value.detail and refused.value.detail.startswith(said)


def test_what_is_not_here_is_said(client: replicate.Client) -> None:
    for ref in ("black-forest-labs/flux-schnell", "anyone/sdxl:none-such"):
        with pytest.raises(ReplicateError) as refused:
            client.run(ref, input=SMALL)
        assert refused.value.status == 404 and refused.value.detail and "there are " in refused.value.detail
    for webhook in ("webhook", "webhook_completed"):
        with pytest.raises(ReplicateError, match=f"{webhook}: ") as refused:
            client.predictions.create("sdxl", SMALL, **{webhook: "https://example.org"})  # type: ignore[arg-type]
        assert refused.value.status == 422
    with pytest.raises(ReplicateError, match="num_outputs"):
        client.run("anyone/fill", input={"image": "data:,", "mask": "data:,", "num_outputs": 2})
    with pytest.raises(ReplicateError, match="mask"):
        client.run("anyone/fill", input={"image": "data:,"})


def test_another_key_sees_nothing_of_it(client: replicate.Client, client_of: ClientOf) -> None:
    prediction = client.predictions.create("sdxl", SMALL)
    other = client_of(OTHER)
    for look in (other.predictions.get, other.predictions.cancel):
        with pytest.raises(ReplicateError) as refused:
            look(prediction.id)
        assert refused.value.status == 404
    assert prediction.id not in {one.id for one in other.predictions.list()}
    for key, status in ((None, 401), ("no-key-of-this-app", 401), (READER, 403)):
        with pytest.raises(ReplicateError) as refused:
            client_of(key).predictions.create("sdxl", SMALL)
        assert refused.value.status == status
        with pytest.raises(ReplicateError) as refused:
            client_of(key).files.create(io.BytesIO(b"x"))
        assert refused.value.status == status


def test_links_that_are_https_are_files_to_the_package(
    client: replicate.Client, server: tuple[str, Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over plain HTTP they stay strings, as in the tests above."""

    async def link(path: str, *, expires_s: int) -> str:
        return f"https://bucket.example.org/{path}"

    monkeypatch.setattr(server[1].blobs, "link", link, raising=False)
    (file,) = client.run("anyone/sdxl", input=SMALL)
    assert isinstance(file, replicate.helpers.FileOutput) and re.search(r"\.png$", file.url)


def until(prediction: Prediction, condition: Callable[[], bool]) -> Prediction:
    ends_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends_at, prediction
        time.sleep(0.02)
        prediction.reload()
    return prediction


def change(studio: Studio, job_id: str, **changes: Any) -> None:
    """As the store would have it."""
    asyncio.run(studio.jobs.update(job_id, "", lambda job, _rivals, _now: (job.evolve(**changes),)))
