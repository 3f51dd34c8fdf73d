"""Generation on the real app: the commands of docs/api.md, and a burst of jobs while processes are killed."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_random

from serve_app import adapters

from . import lora_files
from .rig import jpeg, line_mask, photo, png
from .serving import App

pytestmark = [pytest.mark.serve, pytest.mark.timeout(300)]

DOCUMENT = Path("docs/api.md").read_text()


def test_the_commands_of_the_api_document_run(app: App, tmp_path: Path) -> None:
    """All of them in order, in one shell, as a reader would paste them."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.S)
    assert len(blocks) >= 12 and "API=http://127.0.0.1:8000\n" in blocks[0]
    script = "".join(blocks).replace("http://127.0.0.1:8000", app.http)
    (tmp_path / "photo.jpg").write_bytes(jpeg(photo()))
    (tmp_path / "mask.png").write_bytes(png(line_mask()))
    (tmp_path / "lora.safetensors").write_bytes(lora_files.file(lora_files.layers("sdxl"), "kohya"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (512, 512)
    assert json.loads((tmp_path / "artifacts.json").read_text())["artifacts"][0]["seed"] == 7
    assert "event: artifact" in run.stdout and '"succeeded"' in run.stdout


class Denied(Exception):
    """The app is being replaced: the client asks again."""


class Client:
    """Insists, as a client does that has an Idempotency-Key."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    @retry(stop=stop_after_delay(90), wait=wait_random(0.1, 0.5), retry=retry_if_exception_type(Denied))
    async def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            answer = await self._http.request(method, path, **request)
        except httpx.TransportError as e:
            raise Denied from e
        if answer.status_code >= 500 or answer.headers.get("Retry-After"):
            raise Denied(answer.text)
        return answer

    async def post(self, number: int) -> str:
        body = {"type": "generate", "prompt": f"card {number}", "width": 128, "height": 128, "count": 2, "seed": number}
        answer = await self.ask("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": f'"burst-{number}"'})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job"]["id"])


JOBS, CANCELED, TWICE = 100, range(0, 100, 5), range(1, 100, 5)


async def test_a_burst_with_cancels_duplicates_and_kills_ends_with_exact_counts(app: App) -> None:
    async with httpx.AsyncClient(base_url=app.http, timeout=30) as http:
        client = Client(http)
        ids = await asyncio.gather(*map(client.post, range(JOBS)))
        assert len(set(ids)) == JOBS
        app.kill("Generator-fake")
        app.kill("Ingress")
        again = asyncio.gather(*(client.post(number) for number in TWICE))
        canceled = asyncio.gather(*(client.ask("POST", f"/v1/jobs/{ids[n]}/cancel") for n in CANCELED))
        assert await again == [ids[number] for number in TWICE]
        stopped = {ids[n] for n, answer in zip(CANCELED, await canceled, strict=True) if answer.status_code == 200}
        jobs = await asyncio.gather(*(_ended(client, job_id) for job_id in ids))
    assert Counter(job["status"] for job in jobs) == {"succeeded": JOBS - len(stopped), "canceled": len(stopped)}
    assert {job["id"] for job in jobs if job["status"] == "canceled"} == stopped
    assert all(job["summary"] == {"count": 2, "completed": 2} for job in jobs if job["status"] == "succeeded")
    await _each_picture_is_stored_once(app, jobs)


async def _ended(client: Client, job_id: str) -> Mapping[str, Any]:
    async with asyncio.timeout(180):
        while True:
            job: Mapping[str, Any] = (await client.ask("GET", f"/v1/jobs/{job_id}")).json()
            if job["status"] not in ("queued", "running"):
                return job
            await asyncio.sleep(1)


async def _each_picture_is_stored_once(app: App, jobs: list[Mapping[str, Any]]) -> None:
    blobs = adapters.blob_store(app.settings.blobs, app.settings.public_url)
    store = adapters.job_store(app.settings.jobs)
    for job in jobs:
        folder = f"{app.settings.api.prefix}/jobs/{job['id']}"
        stored = {info.path: info.version async for info in blobs.list(folder)}
        record = await store.get(job["id"])
        assert record is not None
        recorded = {artifact.path: artifact.version for artifact in record.artifacts}
        if job["status"] == "succeeded":
            assert stored == recorded and len(stored) == 2
        else:
            # One that was canceled between its store and its record is stored, and not shown.
            assert recorded.items() <= stored.items() and len(stored) <= 2
        assert [artifact.index for artifact in record.artifacts] == list(range(len(recorded)))
