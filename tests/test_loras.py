"""LoRAs that clients register, over HTTP: uploaded or blobs of the store, listed, deleted, refused."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

from serve_app.engine.lora.apart import CheckedApart
from serve_app.engine.lora.host import fetched
from serve_app.errors import LoraTooLarge, NotFinite, NotSupported, Unavailable
from serve_app.generate import loras as module
from serve_app.generate.loras import Loras
from serve_app.generate.request import GenerateBody, resolved
from serve_app.http.app import create_app
from serve_app.jobs.kinds import Caller
from serve_app.models import GenerateRequest, LoraFacts
from serve_app.settings import Settings

from .backends import until
from .http_service import Process
from .test_generate import SMALL, Studio

#: Alice and Bob post jobs of their own; Jo sees what came as messages, too, and blobs.
KEYS = "alice:submit+read,bob:submit+read,jo:jobs,admin:admin"
FILE = b"weights of a cat"


class Checker:
    """Refuses a file that begins with `bad`. One that begins with `flux` is a LoRA of FLUX.1."""

    takes_loras = True

    def __init__(self) -> None:
        self.looked_at: list[bytes] = []
        self.before: Callable[[], Awaitable[None]] | None = None

    async def check(self, file: Path, *, alpha: float | None) -> LoraFacts:
        self.looked_at.append(file.read_bytes())
        if self.before is not None:
            await self.before()
        if self.looked_at[-1].startswith(b"bad"):
            raise NotFinite("a number that is none")
        family = "flux" if self.looked_at[-1].startswith(b"flux") else "sdxl"
        scale = (alpha or 16) / 16
        about: Any = {"family": family, "format": "kohya", "dtype": "F16", "layers": 4, "has_alpha": False}
        return LoraFacts(**about, rank=16, alpha_scale=(scale, scale), text_encoder_layers=0)


class Registry:
    """An app, and its clients by their keys."""

    def __init__(self, **loras: Any) -> None:
        self.studio = Studio(loras=loras)
        self.process, self.checker = Process(self.studio), Checker()
        self.process.guard(api_keys=KEYS)
        self.loras = Loras(blobs=self.studio.blobs, checker=self.checker, settings=self.studio.settings.loras)
        self.process.loras = self.studio.kind._loras = self.loras
        self.process.jobs = self.studio.api
        transport = httpx.ASGITransport(create_app(lambda: self.process))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")

    async def ask(self, method: str, path: str, key: str = "alice", **given: Any) -> httpx.Response:
        return await self.http.request(method, path, headers={"X-API-Key": key}, **given)

    async def post(self, body: dict[str, Any], key: str = "alice") -> httpx.Response:
        return await self.ask("POST", "/v1/models", key, json=body)

    async def upload(self, body: dict[str, Any], data: bytes, key: str = "alice") -> None:
        answer = await self.post(body, key)
        assert answer.status_code == 202, answer.text
        assert answer.json()["model"] is None
        upload = answer.json()["upload"]
        url = upload["url"].replace(self.studio.settings.public_url, "")
        sent = await self.http.request(upload["method"], url, headers=upload["headers"], content=data)
        assert sent.status_code == 204, sent.text

    async def registered(self, data: bytes = FILE, key: str = "alice", **more: Any) -> dict[str, Any]:
        body = {**about(data), **more}
        await self.upload(body, data, key)
        answer = await self.post(body, key)
        assert answer.status_code == 201, answer.text
        assert answer.json()["upload"] is None
        model: dict[str, Any] = answer.json()["model"]
        return model

    async def listed(self, key: str = "alice") -> list[str]:
        """The ids of LoRAs."""
        models = (await self.ask("GET", "/v1/models", key)).json()["models"]
        return [model["id"] for model in models if model["lora"] is not None]

    async def paths(self) -> list[str]:
        return [info.path async for info in self.studio.blobs.list("loras")]


def about(data: bytes = FILE, **more: Any) -> dict[str, Any]:
    return {"name": "cat", "sha256": sha256(data).hexdigest(), "size_bytes": len(data), **more}


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("code", "")


@pytest.fixture
def registry() -> Registry:
    return Registry()


# From one end to the other


async def test_it_is_asked_for_uploaded_and_asked_for_again(registry: Registry) -> None:
    model = await registry.registered(trigger_word="ohwx cat", alpha=8)
    lora = model["lora"]
    assert (model["name"], model["kind"], model["state"]) == ("cat", "sdxl-lora", "available")
    assert (lora["sha256"], lora["size_bytes"], lora["trigger_word"]) == (sha256(FILE).hexdigest(), 16, "ohwx cat")
    assert (lora["rank"], lora["alpha"], lora["alpha_scale"], lora["text_encoder"]) == (16, 8.0, [0.5, 0.5], "none")
    again = await registry.post({**about(), "trigger_word": "ohwx cat", "alpha": 8})
    assert (again.status_code, again.json()["model"]) == (201, model)
    assert registry.checker.looked_at == [FILE], "once"
    assert (await registry.ask("GET", f"/v1/models/{model['id']}")).json() == model
    models = (await registry.ask("GET", "/v1/models")).json()["models"]
    assert [one["id"] for one in models] == ["telea", "sdxl", "flux-dev-Q8_0", model["id"]]


async def test_what_is_deleted_is_gone_and_may_come_back(registry: Registry) -> None:
    model = await registry.registered()
    assert len(await registry.paths()) == 2
    assert (await registry.ask("DELETE", f"/v1/models/{model['id']}")).status_code == 204
    assert (await registry.paths(), await registry.listed()) == ([], [])
    for method in ("GET", "DELETE"):
        assert refusal(await registry.ask(method, f"/v1/models/{model['id']}")) == (404, "unknown_model")
    assert (await registry.registered())["id"] == model["id"]


async def test_the_newest_is_listed_first(registry: Registry) -> None:
    ids = [(await registry.registered(name=f"cat {number}"))["id"] for number in range(3)]
    assert await registry.listed() == ids[::-1]


async def test_each_key_has_its_own(registry: Registry) -> None:
    ids = {key: (await registry.registered(key=key))["id"] for key in ("alice", "bob")}
    registry.process.guard()
    ids[""] = (await registry.registered())["id"]
    registry.process.guard(api_keys=KEYS)
    assert len(set(ids.values())) == 3, "of one file"
    assert await registry.listed("alice") == [ids["alice"]]
    assert await registry.listed("jo") == [ids[""]], "as its jobs, what no key has registered"
    assert set(await registry.listed("admin")) == set(ids.values())
    for method in ("GET", "DELETE"):
        assert refusal(await registry.ask(method, f"/v1/models/{ids['bob']}")) == (404, "unknown_model")
    assert (await registry.ask("DELETE", f"/v1/models/{ids['alice']}")).status_code == 204
    assert await registry.listed("bob") == [ids["bob"]]
    assert (await registry.ask("DELETE", f"/v1/models/{ids['bob']}", "admin")).status_code == 204


# What is refused


async def test_a_file_that_is_refused_is_deleted_and_another_may_be_uploaded(registry: Registry) -> None:
    body = about(b"bad weights")
    for _ in range(2):
        await registry.upload(body, b"bad weights")
        assert refusal(await registry.post(body)) == (422, "not_finite")
        assert await registry.paths() == []


async def test_another_file_than_was_said_is_refused(registry: Registry) -> None:
    await registry.upload(about(), FILE[::-1])
    assert refusal(await registry.post(about())) == (422, "lora_changed")
    assert (await registry.paths(), registry.checker.looked_at) == ([], [])


async def test_too_large_a_file_is_refused_before_it_is_uploaded(registry: Registry) -> None:
    answer = await registry.post(about(size_bytes=5_000_000_000))
    assert refusal(answer) == (413, "too_large")
    assert "2000000000" in answer.json()["detail"]


async def test_where_no_model_takes_loras_nothing_is_uploaded(registry: Registry) -> None:
    registry.checker.takes_loras = False
    assert refusal(await registry.post(about())) == (422, "not_supported")


@pytest.mark.parametrize(
    "body",
    [
        {"name": "cat"},
        {"name": "cat", "sha256": "0" * 64},
        about(sha256="0" * 63),
        about(sha256="A" * 64),
        about(size_bytes=0),
        about(size_bytes="16"),
        about(name=""),
        about(name="a\nb"),
        about(name="x" * 129),
        about(name="\ud800"),
        about(alpha=0),
        about(alpha=-1),
        about(alpha=1e400),
        about(blob=""),
        about(scale=1),
    ],
    ids=lambda body: json.dumps(body)[-40:],
)
async def test_a_body_that_says_no_file_is_refused(registry: Registry, body: dict[str, Any]) -> None:
    content, headers = json.dumps(body), {"X-API-Key": "alice", "Content-Type": "application/json"}
    answer = await registry.http.post("/v1/models", content=content, headers=headers)
    assert refusal(answer) in ((422, "invalid_request"), (400, "malformed_message"))


async def test_without_a_key_nothing_is_registered_listed_or_deleted(registry: Registry) -> None:
    registry.process.guard(api_keys="alice:read")
    for method, path in (("POST", "/v1/models"), ("DELETE", "/v1/models/x")):
        given = {"json": about()} if method == "POST" else {}
        assert refusal(await registry.ask(method, path, **given)) == (403, "forbidden")
        assert refusal(await registry.ask(method, path, "nobody", **given)) == (401, "unauthorized")
    assert refusal(await registry.ask("GET", "/v1/models", "nobody")) == (401, "unauthorized")


async def test_a_store_that_is_down_is_unavailable(registry: Registry) -> None:
    model = await registry.registered()
    registry.studio.blobs.is_down = True
    assert refusal(await registry.post(about())) == (503, "store_unavailable")
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{model['id']}"),
        ("DELETE", f"/v1/models/{model['id']}"),
    ):
        assert refusal(await registry.ask(method, path)) == (503, "store_unavailable")
    registry.studio.blobs.is_down = False
    assert await registry.listed() == [model["id"]]


# How many


async def test_a_key_has_no_more_than_it_may() -> None:
    registry = Registry(per_key=2)
    first, _ = [await registry.registered(name=f"cat {number}") for number in range(2)]
    assert refusal(await registry.post(about(name="cat 2"))) == (429, "quota_exceeded")
    assert (await registry.post(about(name="cat 0"))).json()["model"] == first, "not one more"
    await registry.registered(key="bob")
    await registry.ask("DELETE", f"/v1/models/{first['id']}")
    await registry.registered(name="cat 2")


async def test_a_key_has_no_more_than_it_may_when_all_are_registered_at_once() -> None:
    registry = Registry(per_key=2)
    await registry.registered(name="kept")
    bodies = [about(name=f"cat {number}") for number in range(4)]
    # None is there while the links are asked for.
    links = [(await registry.post(body)).json()["upload"]["url"] for body in bodies]
    for link in links:
        await registry.http.put(link.replace(registry.studio.settings.public_url, ""), content=FILE)
    answers = await asyncio.gather(*(registry.post(body) for body in bodies))
    assert sorted(answer.status_code for answer in answers) == [201, 429, 429, 429]
    assert len(await registry.listed()) == 2


async def test_files_that_were_never_registered_make_room() -> None:
    registry = Registry(per_key=3)
    model = await registry.registered(name="kept")
    for number in range(6):
        await registry.upload(about(name=f"left {number}"), FILE)
        assert len(await registry.paths()) <= 2 + 3
    await registry.registered(name="another")
    assert model["id"] in await registry.listed()


async def test_a_file_that_is_being_looked_at_makes_no_room() -> None:
    registry = Registry(per_key=2)
    go = asyncio.Event()

    async def wait() -> None:
        await go.wait()

    registry.checker.before = wait
    for number in range(2):
        await registry.upload(about(name=f"cat {number}"), FILE)
    looked_at = asyncio.create_task(registry.post(about(name="cat 0")))
    await until(lambda: len(registry.checker.looked_at) == 1)
    assert (await registry.post(about(name="cat 2"))).status_code == 202
    go.set()
    model = (await looked_at).json()["model"]
    assert model["files_json"][0] in await registry.paths()


# Blobs of the store


async def test_a_blob_is_registered_where_it_is(registry: Registry) -> None:
    await registry.studio.blobs.put("trained/cat", FILE, content_type="")
    body = {"name": "cat", "blob": "trained/cat"}
    assert refusal(await registry.post(body)) == (403, "forbidden")
    answer = await registry.post(body, "jo")
    assert answer.status_code == 201
    model = answer.json()["model"]
    assert (model["files_json"], model["lora"]["sha256"]) == (["trained/cat"], sha256(FILE).hexdigest())
    assert (await registry.post(body, "jo")).json()["model"] == model
    assert registry.checker.looked_at == [FILE], "once"
    assert (await registry.ask("DELETE", f"/v1/models/{model['id']}", "jo")).status_code == 204
    assert (await registry.studio.blobs.get("trained/cat", max_bytes=99))[0] == FILE, "it is not the LoRA's"
    assert await registry.paths() == []


async def test_a_blob_that_was_written_again_is_looked_at_again(registry: Registry) -> None:
    body = {"name": "cat", "blob": "trained/cat"}
    models = []
    for data in (FILE, b"flux weights"):
        await registry.studio.blobs.put("trained/cat", data, content_type="")
        models.append((await registry.post(body, "jo")).json()["model"])
    assert models[0]["id"] == models[1]["id"] and await registry.listed("jo") == [models[0]["id"]]
    assert [model["kind"] for model in models] == ["sdxl-lora", "flux-lora"]
    assert models[1]["lora"]["sha256"] == sha256(b"flux weights").hexdigest()


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"blob": "trained/dog"}, 404, "missing_input"),
        ({"blob": "../secret"}, 404, "missing_input"),
        ({"blob": "/etc/passwd"}, 404, "missing_input"),
        ({"blob": "trained//cat"}, 404, "missing_input"),
        ({"blob": "trained/c\u0000t"}, 404, "missing_input"),
        ({"size_bytes": 15}, 422, "lora_changed"),
        ({"sha256": "0" * 64}, 422, "lora_changed"),
        ({"blob": "trained/bad"}, 422, "not_finite"),
        ({"blob": "trained/large"}, 413, "too_large"),
    ],
    ids=str,
)
async def test_a_blob_that_is_refused_stays(change: dict[str, Any], status: int, code: str) -> None:
    registry = Registry(file_bytes=20)
    for name, data in (("cat", FILE), ("bad", b"bad weights"), ("large", bytes(21))):
        await registry.studio.blobs.put(f"trained/{name}", data, content_type="")
    answer = await registry.post({"name": "cat", "blob": "trained/cat", **change}, "jo")
    assert refusal(answer) == (status, code)
    assert [info.path async for info in registry.studio.blobs.list("trained")] == [
        "trained/bad",
        "trained/cat",
        "trained/large",
    ]
    assert await registry.paths() == []


# At once, and what changes meanwhile


async def test_two_who_ask_at_once_have_it_looked_at_once(registry: Registry) -> None:
    await registry.upload(about(), FILE)
    answers = await asyncio.gather(*(registry.post(about()) for _ in range(5)))
    assert [answer.status_code for answer in answers] == [201] * 5
    assert len({answer.text for answer in answers}) == 1
    assert registry.checker.looked_at == [FILE]


async def test_a_client_that_leaves_finds_it_registered(registry: Registry) -> None:
    go = asyncio.Event()

    async def wait() -> None:
        await go.wait()

    registry.checker.before = wait
    await registry.upload(about(), FILE)
    left = asyncio.create_task(registry.post(about()))
    await until(lambda: len(registry.checker.looked_at) == 1)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    again = asyncio.create_task(registry.post(about()))
    go.set()
    assert (await again).status_code == 201
    assert registry.checker.looked_at == [FILE]


async def test_so_many_files_are_looked_at_and_no_more_wait(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHECKS", 4)
    go = asyncio.Event()

    async def wait() -> None:
        await go.wait()

    registry.checker.before = wait
    bodies = [about(name=f"cat {number}") for number in range(3)]
    for body in bodies:
        await registry.upload(body, FILE)
    first = [asyncio.create_task(registry.post(body)) for body in bodies[:2]]
    await until(lambda: len(registry.loras._checks) == 2)
    refused = await registry.post(bodies[2])
    assert (refusal(refused), refused.headers["Retry-After"]) == ((503, "unavailable"), "30")
    assert len(registry.checker.looked_at) == 1, "one at a time"
    go.set()
    assert [(await task).status_code for task in first] == [201, 201]
    assert (await registry.post(bodies[2])).status_code == 201


async def test_a_process_that_stops_looks_at_no_file(registry: Registry) -> None:
    registry.checker.before = asyncio.Event().wait  # type: ignore[assignment]
    await registry.upload(about(), FILE)
    asked = asyncio.create_task(registry.post(about()))
    await until(lambda: len(registry.checker.looked_at) == 1)
    await registry.loras.close()
    await asyncio.gather(asked, return_exceptions=True)
    registry.checker.before = None
    assert (await registry.post(about())).status_code == 201


async def test_a_file_that_is_swapped_by_its_link_is_refused_when_it_is_asked_for(registry: Registry) -> None:
    model = await registry.registered()
    (path,) = model["files_json"]
    await registry.studio.blobs.put(path, FILE[::-1], content_type="")
    assert refusal(await registry.post(about())) == (422, "lora_changed")
    await registry.upload(about(), FILE)
    assert (await registry.post(about())).json()["model"]["id"] == model["id"]


async def test_a_file_that_is_gone_is_uploaded_again(registry: Registry) -> None:
    model = await registry.registered()
    await registry.studio.blobs.delete(model["files_json"][0])
    await registry.upload(about(), FILE)
    assert (await registry.post(about())).json()["model"]["lora"] == model["lora"]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"id": "x"}', b"\xff", bytes(200_000)], ids=lambda d: str(d[:9])
)
async def test_a_damaged_record_holds_up_nothing_else(
    registry: Registry, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    models = [await registry.registered(name=name) for name in ("cat", "dog")]
    (record,) = [path for path in await registry.paths() if path.endswith(f"{models[1]['id'][8:]}.json")]
    await registry.studio.blobs.put(record, damage, content_type="")
    assert await registry.listed() == [models[0]["id"]]
    assert f"The record {record} cannot be read" in caplog.text
    assert refusal(await registry.ask("GET", f"/v1/models/{models[1]['id']}")) == (404, "unknown_model")
    again = await registry.post(about(name="dog"))
    assert again.json()["model"]["id"] == models[1]["id"], "it is written anew"
    assert await registry.listed() == [models[1]["id"], models[0]["id"]]


@pytest.mark.parametrize("lora_id", ["x", "a" * 32, "a" * 8 + "/../../x" + "a" * 16, "..", "a" * 64, "telea2"])
async def test_an_id_that_is_none_is_unknown(registry: Registry, lora_id: str) -> None:
    await registry.registered()
    for method in ("GET", "DELETE"):
        answer = await registry.ask(method, f"/v1/models/{lora_id.replace('/', '%2F')}")
        assert answer.status_code in (404, 405, 422)
    assert len(await registry.paths()) == 2


# Jobs


def job(*loras: dict[str, Any]) -> dict[str, Any]:
    return {"type": "generate", "prompt": "a cat", **SMALL, "loras": list(loras)}


async def test_a_job_names_loras_of_its_own_key(registry: Registry) -> None:
    own, other = await registry.registered(alpha=8), await registry.registered(key="bob")
    answer = await registry.ask("POST", "/v1/jobs", json=job({"id": own["id"], "scale": 0.8}))
    assert answer.status_code == 202
    for lora_id in (other["id"], "a" * 32):
        answer = await registry.ask("POST", "/v1/jobs", json=job({"id": own["id"]}, {"id": lora_id}))
        assert refusal(answer) == (404, "unknown_model")
    (stored,) = await registry.studio.jobs.list()
    (use,) = stored.parameters.loras
    assert (use.id, use.sha256, use.scale, use.effective_scale) == (own["id"], own["lora"]["sha256"], 0.8, (0.4, 0.4))


async def test_a_job_is_made_by_a_model_that_its_loras_fit(registry: Registry) -> None:
    sdxl, flux = await registry.registered(), await registry.registered(b"flux weights")
    for lora, model in ((sdxl, "sdxl"), (flux, "flux-dev-Q8_0")):
        answer = await registry.ask("POST", "/v1/jobs", json=job({"id": lora["id"]}))
        assert (answer.status_code, (await registry.studio.jobs.list())[0].variant) == (202, model)
        registry.studio.clock.advance(1)
    for body in (job({"id": sdxl["id"]}, {"id": flux["id"]}), {**job({"id": flux["id"]}), "model_id": "sdxl"}):
        assert refusal(await registry.ask("POST", "/v1/jobs", json=body)) == (422, "wrong_model")
    twice = await registry.ask("POST", "/v1/jobs", json=job({"id": sdxl["id"]}, {"id": sdxl["id"]}))
    assert refusal(twice) == (422, "invalid_input")


async def test_a_picture_says_which_loras_it_was_made_with(registry: Registry) -> None:
    lora = await registry.registered(alpha=8.0)
    await registry.ask("POST", "/v1/jobs", json=job({"id": lora["id"], "scale": 0.5}))
    await registry.studio.notifier.drained()
    await registry.studio.work()
    (made,) = await registry.studio.jobs.list()
    data, _ = await registry.studio.blobs.get(made.artifacts[0].path, max_bytes=10**6)
    said = json.loads(Image.open(io.BytesIO(data)).text["loras"])
    assert said == [{"name": "cat", "sha256": sha256(FILE).hexdigest(), "alpha": 8.0, "scale": 0.5}]


async def test_a_job_is_made_by_the_first_model_that_takes_its_loras(registry: Registry) -> None:
    model = await registry.registered(b"flux weights")
    lora = await registry.loras.get(model["id"], Caller())
    compiled = {"optimizations": {"compile": True}}
    settings = Settings(variants={"telea": {}}, generators={"flux-dev-Q4_0": compiled, "flux-dev-Q8_0": {}})
    body = GenerateBody.model_validate(job({"id": lora.id}))
    assert resolved(body, settings, [lora])[0] == "flux-dev-Q8_0"
    with pytest.raises(NotSupported, match="flux-dev-Q4_0 takes none"):
        resolved(body.model_copy(update={"model_id": "flux-dev-Q4_0"}), settings, [lora])


async def test_the_loras_of_a_job_fit_into_the_memory_of_one(registry: Registry) -> None:
    model = await registry.registered(b"flux weights")
    lora = await registry.loras.get(model["id"], Caller())
    both = [lora, lora.model_copy(update={"id": "another"})]
    body = GenerateBody.model_validate(job(*({"id": one.id} for one in both)))

    def settings(file_bytes: int) -> Settings:
        loras = {"file_bytes": file_bytes}
        return Settings(variants={"telea": {}}, generators={"flux-dev-Q8_0": {}}, loras=loras)

    assert len(resolved(body, settings(2 * lora.size_bytes), both)[1].loras) == 2
    with pytest.raises(LoraTooLarge, match="together"):
        resolved(body, settings(2 * lora.size_bytes - 1), both)


@pytest.mark.parametrize(
    ("code", "swapped"), [("unknown_model", None), ("lora_changed", FILE[::-1]), ("lora_changed", b"x")]
)
async def test_a_job_whose_lora_is_not_the_registered_one_any_more_fails(
    registry: Registry, code: str, swapped: bytes | None
) -> None:
    studio = registry.studio

    async def load(request: GenerateRequest) -> None:
        for use in request.loras:
            await fetched(use, blobs=studio.blobs, engine=AnyAdapter(), settings=studio.settings.loras)

    studio.painter.before = load
    good, bad = await registry.registered(name="good"), await registry.registered(name="bad")
    jobs = {}
    for lora in (bad, good):
        answer = await registry.ask("POST", "/v1/jobs", json=job({"id": lora["id"]}))
        jobs[lora["name"]] = answer.json()["job"]["id"]
    await studio.notifier.drained()
    if swapped is None:
        assert (await registry.ask("DELETE", f"/v1/models/{bad['id']}")).status_code == 204
    else:
        await studio.blobs.put(bad["files_json"][0], swapped, content_type="")
    for message in studio.topics.sessions:
        await studio.worker.work(message)
    views = {name: (await registry.ask("GET", f"/v1/jobs/{job_id}")).json() for name, job_id in jobs.items()}
    assert (views["bad"]["status"], views["bad"]["error_code"]) == ("failed", code)
    assert views["good"]["status"] == "succeeded"


class AnyAdapter:
    def adapter(self, file: Path, **_: Any) -> Any:
        return SimpleNamespace(host_bytes=0)


# Real files, looked at in a process of their own


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> CheckedApart:
    """For the tiny models."""
    generators = {"tiny-sdxl": {}, "tiny-flux-dev": {}}
    weights = {"cache": tmp_path_factory.mktemp("weights")}
    return CheckedApart(Settings(variants={"telea": {}}, generators=generators, weights=weights))


@pytest.fixture
def real(apart: CheckedApart) -> Registry:
    registry = Registry()
    registry.loras._checker = apart
    return registry


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "writer", "text_encoder"), [("sdxl", "kohya", "applied"), ("flux", "ai-toolkit", "ignored")]
)
async def test_a_real_file_is_registered(real: Registry, family: Any, writer: Any, text_encoder: str) -> None:
    from . import lora_files

    file = lora_files.file(lora_files.layers(family, text_encoders=True), writer, alpha=2.0)
    model = await real.registered(file)
    lora = model["lora"]
    assert (model["kind"], lora["format"], lora["rank"], lora["dtype"]) == (f"{family}-lora", writer, 4, "F16")
    assert (lora["has_alpha"], lora["alpha_scale"], lora["text_encoder"]) == (True, [0.5, 0.5], text_encoder)


@pytest.mark.slow
# The others are in test_lora_files.py: each process takes seconds to begin.
@pytest.mark.parametrize("what", ["a pickle", "another model's", "a number that is none"])
async def test_a_real_file_that_is_none_is_refused_with_its_own_error(real: Registry, what: str) -> None:
    from . import lora_files

    data, code = lora_files.bad()[what]
    await real.upload(about(data), data)
    assert refusal(await real.post(about(data))) == (422, code)
    assert await real.paths() == []


@pytest.mark.slow
async def test_who_looks_at_a_file_has_none_of_the_apps_keys(
    apart: CheckedApart, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    # It says how many of its variables hold a secret.
    python.write_text("#!/bin/sh\ncat > /dev/null\nenv | grep -c s3cret >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    for name in ("API_KEYS", "AWS_SECRET_ACCESS_KEY", "WEBHOOK_SECRET", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    with pytest.raises(Unavailable, match="could not be looked at: 0"):
        await apart.check(tmp_path / "file", alpha=None)
