"""LoRAs on the real app: many users' at once on two replicas, and one that was swapped."""

import asyncio
import io
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve

from deployments.app import model_names
from deployments.replica import open_engine
from serve_app import adapters
from serve_app.engine.generating import LocalGenerator
from serve_app.engine.lora import host
from serve_app.generate.loras import Lora, LoraBody, Loras
from serve_app.jobs.kinds import Caller
from serve_app.models import GenerateRequest, LoraFacts, Pixels, Progress

from . import lora_files
from .serving import APP, App
from .test_generate_serve import Client, _ended

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

MODEL, USERS, JOBS, SEEDS = "tiny-sdxl", 10, 200, 4
#: Of which users a job uses the LoRAs. As many as have no divisor in common with the seeds.
COMBINATIONS: Sequence[Sequence[int]] = [[], *[[user] for user in range(USERS)], [0, 1], [9, 8]]
ASKED: dict[str, Any] = {"prompt": "a cat", "width": 64, "height": 64, "steps": 1}
SCALE = 0.8


class Users:
    """Each with a LoRA; and a generator of this process that paints what they ask for, one at a time."""

    takes_loras = True

    def __init__(self, app: App, http: httpx.AsyncClient, engine: Any) -> None:
        settings = app.settings
        self.client, self.engine = Client(http), engine
        self.jobs, self.blobs = (
            adapters.job_store(settings.jobs),
            adapters.blob_store(settings.blobs, settings.public_url),
        )
        adapter_of = partial(host.fetched, blobs=self.blobs, engine=engine, settings=settings.loras)
        self.generator = LocalGenerator(MODEL, engine, adapter_of)
        self._registry = Loras(blobs=self.blobs, checker=self, settings=settings.loras)

    async def check(self, file: Path, *, alpha: float | None) -> LoraFacts:
        """What is registered here fits, and needs no process of its own."""
        facts: LoraFacts = self.engine.adapter(file, alpha=alpha, max_rank=256).facts
        return facts

    async def register(self, user: int) -> Lora:
        data = lora_files.file(lora_files.layers("sdxl", user, strength=0.5, text_encoders=True), "kohya", alpha=4.0)
        path = f"uploads/{user}.safetensors"
        await self.blobs.put(path, data, content_type="application/octet-stream")
        lora = await self._registry.register(LoraBody(name=f"{user}", blob=path), Caller(id=f"user-{user}"))
        assert isinstance(lora, Lora)
        return lora

    async def post(self, loras: Sequence[Lora], seed: int) -> str:
        used = [{"id": lora.id, "scale": SCALE} for lora in loras]
        body = {"type": "generate", "model_id": MODEL, "seed": seed, "loras": used, **ASKED}
        answer = await self.client.ask("POST", "/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job"]["id"])

    async def ended(self, ids: Sequence[str]) -> None:
        """By one request for all: one for each of them would keep the app busy."""
        open_ids = set(ids)
        while open_ids:
            await asyncio.sleep(1)
            listed = (await self.client.ask("GET", "/v1/jobs", params={"limit": JOBS})).json()["jobs"]
            open_ids = {job["id"] for job in listed if job["status"] in ("queued", "running")} & open_ids

    async def picture(self, job_id: str) -> Pixels:
        job = await self.jobs.get(job_id)
        assert job is not None and job.status == "succeeded", job and job.error
        data, _ = await self.blobs.get(job.artifacts[0].path, max_bytes=10**6)
        return np.asarray(Image.open(io.BytesIO(data)))

    async def alone(self, loras: Sequence[Lora], seed: int) -> Pixels:
        uses = [lora.use(SCALE) for lora in loras]
        request = GenerateRequest(job_id="alone", guidance_scale=7.0, seed=seed, loras=uses, **ASKED)
        return (await self.generator.run(request, _nothing)).images[0]


async def _nothing(progress: Progress) -> None: ...


async def test_two_hundred_jobs_of_ten_users_have_their_own_pictures_and_a_swapped_lora_none(app: App) -> None:
    engine = await asyncio.to_thread(open_engine, MODEL, app.settings)
    async with httpx.AsyncClient(base_url=app.http, timeout=30) as http:
        users = Users(app, http, engine)
        loras = [await users.register(user) for user in range(USERS + 1)]

        def asked(number: int) -> tuple[Sequence[Lora], int]:
            return [loras[user] for user in COMBINATIONS[number % len(COMBINATIONS)]], number % SEEDS

        ids = await asyncio.gather(*(users.post(*asked(number)) for number in range(JOBS)))
        different = range(len(COMBINATIONS) * SEEDS)
        alone = [(await users.alone(*asked(number))).tobytes() for number in different]
        assert len(set(alone)) == len(different)
        await users.ended(ids)
        for number, job_id in enumerate(ids):
            assert (await users.picture(job_id)).tobytes() == alone[number % len(different)], asked(number)
        assert min((await _pictures_by_replica(2)).values()) > 0

        swapped, pids = loras[USERS], app.pids(model_names(app.settings)[MODEL])
        await users.blobs.put(swapped.path, bytes(swapped.size_bytes), content_type="application/octet-stream")
        failed = await _ended(users.client, await users.post([swapped], 0))
        assert (failed["status"], failed["error_code"]) == ("failed", "lora_changed")
        again = await users.post(*asked(1))
        await _ended(users.client, again)
        assert (await users.picture(again)).tobytes() == alone[1]
        assert app.pids(model_names(app.settings)[MODEL]) == pids


async def _pictures_by_replica(replicas: int) -> Counter[int]:
    """How many each has made, by process."""
    describe = serve.get_deployment_handle(f"Generator-{MODEL}", APP).describe
    made = Counter[int]()
    while len(made) < replicas:
        said = await describe.remote()
        made[said["pid"]] = said["usage"]["jobs"]
    return made
