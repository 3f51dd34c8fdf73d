"""The service that routes see, over a real worker: what the tests of the HTTP routes hold in their hands."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr

from serve_app import adapters
from serve_app.audit.runs import Audits
from serve_app.blobs import BlobInfo
from serve_app.engine.lora.apart import CheckedApart
from serve_app.errors import InvalidLink
from serve_app.generate.loras import Loras
from serve_app.http.auth import GOOGLE_JWKS_URL, Access
from serve_app.http.service import Readiness, VariantReadiness, VariantState
from serve_app.jobs.api import JobApi
from serve_app.jobs.ports import Delivery, Verdict
from serve_app.settings import PushSettings, Secrets, Settings
from serve_app.telemetry import Metrics

from .audit_jobs import LocalJobs
from .rig import Rig

#: Tokens of links, in front of the blobs they read.
LINKS = {"good.token": "users/u1/sessions/s1/original.jpg", "odd.token": 'x/a "b"\u00e9;.svg', "gone.token": "x/none"}
LINKS |= {"page.token": "audit/run-1/report.html", "user.token": "users/u1/sessions/s1/audit/run-1/report.html"}
LINKS |= {"deep.token": "audit/run-1/cells/report.html", "above.token": "x/audit/run-1/report.html"}


def long(key: str) -> str:
    """A key, or a list of keys with a space before each name, of the length that production asks for."""
    return re.sub(r"(?<![^ ])(\w)", r"key-of-the-tests-own-\1", key)


def settings(*, is_production: bool = False, **push: Any) -> Settings:
    verified = {"audience": "https://app.example.org/inpaint", "service_account": "pusher@p.iam.gserviceaccount.com"}
    return Settings(
        variants={"telea": {}},
        blobs="memory:routes",
        jobs="memory:routes",
        messages={"url": "pubsub:" if is_production else "memory:routes"},
        push=PushSettings(**({**verified, **push} if is_production else push)),
    )


class Process:
    """A real worker, and readiness, settings and keys that the test sets."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.state: VariantState = "ready"
        self.default = "telea"
        self.messages: dict[str, dict[str, Any]] = {}
        self.metrics: Metrics = rig.metrics
        self.access = Access(settings(), Secrets())
        self.limits = rig.settings.limits
        self.blobs = rig.blobs
        self.worked = 0
        self.jobs = JobApi(
            kinds=rig.kinds, job_store=rig.jobs, blobs=rig.blobs, notifier=rig.notifier, settings=rig.settings
        )
        self.loras = Loras(blobs=rig.blobs, checker=CheckedApart(rig.settings), settings=rig.settings.loras)
        self.audit_jobs = LocalJobs()
        self.is_stopping = False
        self.audits = Audits(
            blobs=rig.blobs,
            job_store=rig.jobs,
            launcher=self.audit_jobs,
            settings=rig.settings,
            is_stopping=lambda: self.is_stopping,
        )

    def guard(self, *, api_keys: str | None = None, jwks_url: str = GOOGLE_JWKS_URL, **changes: Any) -> None:
        keys = None if api_keys is None else SecretStr(api_keys)
        self.access = Access(settings(**changes), Secrets(api_keys=keys), jwks_url=jwks_url)

    async def work(self, delivery: Delivery) -> Verdict:
        self.worked += 1
        return await self.rig.worker.work(delivery)

    def readiness(self) -> Readiness:
        telea = VariantReadiness(state=self.state, error="no such file" if self.state == "failed" else "")
        variants = {"telea": telea, "Q8_0": VariantReadiness(state="starting")}
        is_ready = variants[self.default].can_serve
        return Readiness(ready=is_ready, default_variant=self.default, variants=variants, messages=self.messages)

    def models(self) -> Mapping[str, VariantReadiness]:
        return {name: VariantReadiness(state=self.state) for name in self.rig.settings.served}

    async def blob(self, token: str) -> tuple[bytes, BlobInfo]:
        if token == "broken.token":
            raise RuntimeError("a fault of our own")
        if token not in LINKS:
            raise InvalidLink("the link has expired, or is none of ours")
        found: tuple[bytes, BlobInfo] = await self.rig.blobs.get(LINKS[token], max_bytes=10**6)
        return found

    def upload_of(self, token: str) -> tuple[str, int]:
        links = adapters.local_links(self.rig.settings)
        assert links is not None
        return links.upload_of(token)
