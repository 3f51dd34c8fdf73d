"""The ingress: pulls messages and answers HTTP, and processes both with one worker."""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from contextvars import Context
from dataclasses import asdict
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from serve_app import adapters, tracing
from serve_app.adapters.blobs.links import LocalLinks
from serve_app.adapters.image_links import ImageLinks
from serve_app.adapters.webhooks import Webhooks
from serve_app.audit.runs import Audits
from serve_app.blobs import BlobInfo
from serve_app.edit.job import Editor
from serve_app.engine.lora.apart import CheckedApart
from serve_app.engine.prompts import PromptCache
from serve_app.errors import InvalidLink, SettingsError, Unavailable
from serve_app.generate.job import Generation
from serve_app.generate.loras import Loras
from serve_app.http.app import create_app
from serve_app.http.auth import Access
from serve_app.http.service import Readiness, VariantReadiness
from serve_app.jobs.api import JobApi
from serve_app.jobs.backlog import BacklogWatch, Report
from serve_app.jobs.lease import retry_unavailable
from serve_app.jobs.notifications import Notifier
from serve_app.jobs.ports import Delivery, Verdict
from serve_app.jobs.worker import Worker
from serve_app.models import EditRequest, GenerateRequest
from serve_app.settings import Inference, Secrets, Settings
from serve_app.telemetry import Metrics, configure_logging

from .audit_job import POOL, RayJobs
from .broker import BrokerBacklog, BrokerWatch
from .metrics import RayMetrics
from .readiness import VariantWatch
from .remote import RemoteModel, RemotePrompts
from .scaling import stats

log = logging.getLogger(__name__)

#: Between two updates of the subscriptions' metrics, in seconds.
SHOW_S = 5.0
#: On shutdown, how long notifications may take, in seconds. Others are sent later, by any ingress.
TELL_GRACE_S = 3.0


def http() -> FastAPI:
    """The routes, over this process's Ingress."""
    return create_app(lambda: serve.get_replica_context().servable_object)


class Pushes:
    """Pushes in flight. Each goes on to its end even if it was answered before, or its sender hangs up, as Pub/Sub does
    before it sends the message again."""

    def __init__(self, limit: int, *, response_timeout_s: float) -> None:
        """A push is answered within `response_timeout_s`: Serve waits for requests before it tells a replica to stop,
        and would kill the replica while it waits."""
        self._limit, self._response_timeout_s = limit, response_timeout_s
        self._tasks: set[asyncio.Task[Verdict]] = set()

    async def run(self, work: Coroutine[Any, Any, Verdict]) -> Verdict:
        """Raises Unavailable while this replica has as many pushes in flight as it can hold."""
        if len(self._tasks) >= self._limit:
            work.close()
            raise Unavailable(f"{self._limit} pushes are in flight already")
        # In its own context: by the context Serve finds the calls that this request made to replicas, and cancels them
        # when the client disconnects.
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        done, _ = await asyncio.wait({task}, timeout=self._response_timeout_s)
        # Pushed again, the message finds its job running or done.
        return task.result() if done else Verdict(action="defer", delay_s=self._response_timeout_s, reason="running")

    async def end(self, *, grace_s: float) -> None:
        """Wait for the pushes in flight, then cancel the rest, which requeues their jobs."""
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)


class Ingress:
    """Starts to pull when it has its inference defaults, which arrive as user_config."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, DeploymentHandle],
        encoders: Mapping[str, DeploymentHandle],
        deployments: Mapping[str, str],
        broker: DeploymentHandle | None,
    ) -> None:
        """`models` and the names of their `deployments` by variant and generator, `encoders` by base model."""
        configure_logging()
        tracing.configure_tracing("fluxfill-ingress")
        self._secrets = Secrets.from_environment()
        self.metrics: Metrics = RayMetrics()
        self.access = Access(settings, self._secrets, host=_http_host())
        if self.access.is_production:
            check_ray_token()
        self.limits = settings.limits
        self._settings = settings
        self._inference: Inference | None = None
        self._defaults_error = ""
        self._watch = VariantWatch(models, deployments, self.metrics)
        self.blobs = adapters.blob_store(settings.blobs, settings.public_url)
        self._links = adapters.local_links(settings)
        self._job_store = adapters.job_store(settings.jobs)
        # An audit's job keeps no GPU node awake: it runs where ingresses may.
        pool = ray.get_runtime_context().get_node_labels().get(POOL)
        launcher = RayJobs(app=serve.get_replica_context().app_name, pool=pool)
        self.audits = Audits(
            blobs=self.blobs,
            job_store=self._job_store,
            launcher=launcher,
            settings=settings,
            is_stopping=lambda: self.is_stopping,
        )
        self._deployments = deployments
        self._broker = BrokerWatch(broker)
        counted = adapters.backlog(settings.messages) if broker is None else BrokerBacklog(broker)
        self._backlog = BacklogWatch(counted, settings.backlog, self.metrics, empty_s=self._empty_s)
        self._source = adapters.message_source(settings.messages, settings.in_flight())
        self._take_up_work(models, encoders)
        self._pulling: asyncio.Task[None] | None = None
        watches = (self._watch.run(), self._broker.run(), self._backlog.run())
        background = (*watches, self._notifier.run(), self._show_subscriptions())
        self._tasks = [asyncio.create_task(work) for work in background]
        self._pushes = Pushes(settings.in_flight(), response_timeout_s=settings.push.response_timeout_s)

    def _take_up_work(self, handles: Mapping[str, DeploymentHandle], encoders: Mapping[str, DeploymentHandle]) -> None:
        """The kinds of job, who is told of their ends, what works on them, and those that are posted."""
        settings = self._settings
        painters, generators = dict[str, RemoteModel[EditRequest]](), dict[str, RemoteModel[GenerateRequest]]()
        for name in settings.variants:
            painters[name] = RemoteModel(name, handles[name], self._watch, "paint")
        for name in settings.generators:
            generators[name] = RemoteModel(name, handles[name], self._watch, "generate")
        prompts = RemotePrompts(encoders, PromptCache(self.blobs), settings)
        self._image_links = ImageLinks(settings)
        for_kinds: dict[str, Any] = {"blobs": self.blobs, "prompts": prompts, "settings": settings}
        editor = Editor(models=painters, defaults=self._defaults, links=self._image_links, **for_kinds)
        self.loras = Loras(blobs=self.blobs, checker=CheckedApart(settings), settings=settings.loras)
        generation = Generation(models=generators, loras=self.loras, **for_kinds)
        self._webhooks = Webhooks(settings.webhooks, self._secrets)
        stored: dict[str, Any] = {"kinds": [editor, generation], "job_store": self._job_store, "settings": settings}
        shared: dict[str, Any] = {
            **stored,
            "mirror": adapters.session_mirror(settings, self._job_store),
            "publisher": adapters.publisher(settings.messages),
            "webhooks": self._webhooks,
            "metrics": self.metrics,
        }
        self._notifier = Notifier(**shared)
        self._worker = Worker(notifier=self._notifier, models={**painters, **generators}, **shared)
        self.jobs = JobApi(blobs=self.blobs, notifier=self._notifier, **stored)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new inference defaults. Jobs that were claimed before keep their values.

        The first defaults must be valid. Later invalid ones are refused and shown in /ready, and the old ones stay: an
        exception here would make Serve stop a working ingress.
        """
        try:
            inference = Inference.model_validate(user_config)
            if inference.variant not in (served := self._settings.variants):
                raise ValueError(f"variant: {inference.variant!r} is not served; there are {list(served)}")
        except ValueError as e:
            if self._inference is None:
                raise
            first = e.errors()[0] if isinstance(e, ValidationError) else None
            self._defaults_error = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(e)
            extra = {"action": "defaults_refused"}
            log.error("Refused new inference defaults, keeping the old ones: %s", e, extra=extra)
            return
        started, self._inference, self._defaults_error = self._inference is not None, inference, ""
        extra = {"action": "defaults_changed", **inference.model_dump(exclude={"prompt"})}
        log.info("Changed the inference defaults", extra=extra)
        if not started:
            self._pulling = asyncio.create_task(self._pull())
            self._tasks.append(self._pulling)

    async def _pull(self) -> None:
        await self._broker.listens.wait()
        if self._settings.messages.is_embedded:
            # Its server may have started with this process, and holds nothing then.
            await retry_unavailable(self._notifier.recall)
        await self._source.run(self._worker.work)

    def _defaults(self) -> Inference:
        assert self._inference is not None, "no message arrives before reconfigure"
        return self._inference

    # -- for the HTTP routes

    async def work(self, delivery: Delivery) -> Verdict:
        return await self._pushes.run(self._worker.work(delivery))

    def readiness(self) -> Readiness:
        default = self._defaults().variant
        no_broker = {"connected": False, "error": self._broker.error} if self._broker.error else {}
        return Readiness(
            ready=self._watch.states[default].can_serve and not no_broker,
            default_variant=default,
            defaults=self._defaults().model_dump(mode="json", exclude={"prompt"}),
            variants={name: self._watch.states[name] for name in self._settings.variants},
            generators={name: self._watch.states[name] for name in self._settings.generators},
            messages={name: asdict(status) | no_broker for name, status in self._source.status().items()},
            defaults_error=self._defaults_error,
        )

    def models(self) -> Mapping[str, VariantReadiness]:
        return self._watch.states

    @property
    def is_stopping(self) -> bool:
        return self._watch.is_stopping

    async def blob(self, token: str) -> tuple[bytes, BlobInfo]:
        path = self._own_links().path_of(token)
        return await self.blobs.get(path, max_bytes=self._settings.limits.stored_bytes)

    def upload_of(self, token: str) -> tuple[str, int]:
        return self._own_links().upload_of(token)

    def _own_links(self) -> LocalLinks:
        if self._links is None:
            raise InvalidLink("this app does not serve its blobs: its links lead to the store")
        return self._links

    # -- for an audit's job, by handle

    async def settings(self) -> Settings:
        """The settings that the app runs with, even if its config file has changed since."""
        return self._settings

    # -- for the autoscaling policy

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What this ingress knows of the messages that wait, for `scaling.Policy`; Serve calls it."""
        recent, backlog = self._worker.recent, self._settings.backlog
        # Before the first message, the default's may be expected.
        mix = recent.mix or ({self._inference.variant: 1.0} if self._inference else {})
        names = self._deployments.items()
        report = Report(
            reading=self._backlog.reading,
            empty_s=self._empty_s(),
            held={deployment: self._worker.in_flight.get(name, 0) for name, deployment in names},
            mix={deployment: mix.get(name, 0.0) for name, deployment in names},
            job_s={deployment: recent.job_s.get(name, backlog.job_s) for name, deployment in names},
            target_drain_s=backlog.target_drain_s,
            trust_s=backlog.trust_s,
            quiet_s=backlog.quiet_s,
        )
        return stats(report)

    def _empty_s(self) -> float:
        return min(status.empty_s for status in self._source.status().values())

    # -- health and shutdown

    async def _show_subscriptions(self) -> None:
        while True:
            for name, status in self._source.status().items():
                self.metrics.put("fluxfill_subscription_connected", float(status.connected), subscription=name)
                self.metrics.put("fluxfill_messages_in_flight", status.held, subscription=name)
            await asyncio.sleep(SHOW_S)

    async def check_health(self) -> None:
        """Serve replaces a replica whose background work has ended."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"a background task ended: {task}")

    async def __del__(self) -> None:
        log.info("Stopping: pulling no more messages, requeueing unfinished jobs", extra={"action": "stopping"})
        grace_s = self._settings.work.shutdown_grace_s
        await asyncio.gather(self._source.close(grace_s=grace_s), self._pushes.end(grace_s=grace_s))
        if self._pulling is not None:
            # Messages of a last pull are nacked, too.
            await asyncio.wait({self._pulling}, timeout=1)
        for task in self._tasks:
            task.cancel()
        self._worker.close()
        await self.audits.close()
        await self.loras.close()
        await self._notifier.close(grace_s=TELL_GRACE_S)
        await self._webhooks.close()
        await self._image_links.close()
        await asyncio.to_thread(tracing.flush)


def _http_host() -> str:
    """The address of Serve's proxies, which may differ from this app's config file: deploying an app on a running Serve
    does not change it. Serve has no public call for it inside a replica."""
    return _get_global_client().http_config.host or ""


def check_ray_token() -> None:
    """Raises SettingsError if Ray's own ports, which run what they are sent, need no token."""
    if not is_token_auth_enabled():
        raise SettingsError("in production Ray must run with RAY_AUTH_MODE=token; see docs/security.md")
