"""The composition root: settings in, a Serve application out."""

import os
import re
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from serve_app.environment import with_environment
from serve_app.http.problems import BODIES_AT_ONCE, UPLOADS_AT_ONCE
from serve_app.models import Variant
from serve_app.parameters import AuditRequest
from serve_app.settings import Inference, Scaling, Settings

from .broker import PubSub
from .generator import Generator
from .ingress import Ingress, http
from .inpainter import Inpainter
from .scaling import INGRESS, REPORT_S
from .text_encoder import TextEncoder

#: Beside those that are painted, one request waits in the replica, so that the GPU never waits for a photo.
READY_PER_REPLICA = 1
#: A slot for an audit cell. `Slot.audit_cell` refuses cells beyond it where jobs want the slots, so that one is free
#: for a job that comes while cells are painted. In a burst a job may take the cell's: each slot more draws one more.
AUDITS_PER_REPLICA = 1
#: Times a cell is painted, unless more is asked for.
PAINTINGS_PER_AUDIT: int = AuditRequest.model_fields["runs"].default
#: Requests to an ingress that hold neither a job nor a body, and follow none.
OTHER_REQUESTS = 100
#: What an ingress takes to stop, beside its grace, when the broker and the stores are down; seconds.
STOP_S = 30


def build(args: Settings) -> serve.Application:
    """The import path of serve_config.yaml: `deployments.app:build`."""
    settings = absolute(with_environment(args, os.environ))
    models = {name: _model(name, settings) for name in settings.served}
    encoders = {base: _text_encoder(base, variant, settings) for base, variant in _bases(settings).items()}
    ingress = serve.deployment(serve.ingress(http)(Ingress)).options(
        name=INGRESS,
        # Serve carries an ingress's reports to the autoscaling policy only where it scales the ingress.
        autoscaling_config=_reporting(settings.ingress_replicas),
        # Probes find a place however many pushes, slow bodies and event streams there are.
        max_ongoing_requests=settings.in_flight()
        + BODIES_AT_ONCE
        + UPLOADS_AT_ONCE
        + settings.api.streams
        + OTHER_REQUESTS,
        ray_actor_options={"num_cpus": 0.2},
        # Serve first waits for the pushes it has sent here, and kills what is not stopped by then.
        graceful_shutdown_timeout_s=settings.push.response_timeout_s + settings.work.shutdown_grace_s + STOP_S,
        user_config=Inference(variant=next(iter(settings.variants))).model_dump(mode="json"),
    )
    broker = serve.deployment(PubSub).options(ray_actor_options={"num_cpus": 0.1}).bind(settings.messages)
    return ingress.bind(
        settings, models, encoders, model_names(settings), broker if settings.messages.is_embedded else None
    )


def _reporting(replicas: int) -> dict[str, Any]:
    """Autoscaling that never scales."""
    return {
        "min_replicas": replicas,
        "max_replicas": replicas,
        "metrics_interval_s": REPORT_S,
        "look_back_period_s": 5 * REPORT_S,
    }


def inpainter_name(variant: str) -> str:
    return f"Inpainter-{variant}"


def model_names(settings: Settings) -> dict[str, str]:
    """The deployment of each variant and generator."""
    inpainters = {name: inpainter_name(name) for name in settings.variants}
    return inpainters | {name: f"Generator-{name}" for name in settings.generators}


def deployment_names(settings: Settings) -> list[str]:
    """Every deployment the app has with these settings."""
    encoders = map(text_encoder_name, _bases(settings))
    broker = ["PubSub"] if settings.messages.is_embedded else []
    return ["Ingress", *model_names(settings).values(), *encoders, *broker]


def absolute(settings: Settings) -> Settings:
    """Relative folders are taken from the folder the app is started in, once, whatever a replica's own is."""

    def anchored(url: str | None) -> str | None:
        scheme, _, path = (url or "").partition(":")
        return f"{scheme}:{Path(path).absolute()}" if scheme in ("files", "sqlite") else url

    stores = {name: anchored(getattr(settings, name)) for name in ("blobs", "jobs", "sessions")}
    weights = settings.weights
    paths = {"cache": weights.cache.absolute(), "lock": weights.lock.absolute(), "mirror": anchored(weights.mirror)}
    return settings.model_copy(update={**stores, "weights": weights.model_copy(update=paths)})


def _bases(settings: Settings) -> dict[str, Variant]:
    """One variant or generator for each base model whose prompts must be encoded."""
    rows = map(settings.variant, settings.served)
    return {str(row.base): row for row in rows if row.takes_prompt}


def text_encoder_name(base: str) -> str:
    """One text encoder for each base model: `TextEncoder-FLUX.1-Fill-dev`."""
    return f"TextEncoder-{re.sub('[^A-Za-z0-9_.-]', '-', base.rpartition('/')[2])}"


def _model(name: str, settings: Settings) -> serve.Application:
    kind, audits = (Generator, 0) if name in settings.generators else (Inpainter, AUDITS_PER_REPLICA)
    options = _scaled(settings.served[name], num_gpus=settings.variant(name).num_gpus, audits=audits)
    return serve.deployment(kind).options(name=model_names(settings)[name], **options).bind(name, settings)


def _text_encoder(base: str, variant: Variant, settings: Settings) -> serve.Application:
    options = _scaled(settings.text_encoder, num_gpus=settings.text_encoder.num_gpus, audits=0)
    return serve.deployment(TextEncoder).options(name=text_encoder_name(base), **options).bind(variant, settings)


def _scaled(scaling: Scaling, *, num_gpus: int, audits: int) -> dict[str, Any]:
    """Deployment options for autoscaling by `scaling`; a replica works on one request, and has slots for so many
    `audits` (their cells) beside it."""
    ongoing = 1 + READY_PER_REPLICA
    ahead = PAINTINGS_PER_AUDIT if audits else 0
    return {
        "max_ongoing_requests": ongoing + audits,
        # Three failures in a row, and a replica whose GPU is lost or whose engine hangs is replaced.
        "health_check_period_s": 2,
        # Scaling down lets the usual paintings end: those in hand, of 38 s each on an L4, and those of the cell that
        # had begun; an audit paints again what is killed. A hung engine keeps its GPU for as long.
        "graceful_shutdown_timeout_s": 60 * (ongoing + ahead),
        # While every replica is full the router asks again after a wait that doubles; by default up to 0.5 s, for
        # which a replica can stand idle.
        "request_router_config": RequestRouterConfig(initial_backoff_s=0.01, max_backoff_s=0.04),
        "ray_actor_options": {"num_cpus": scaling.num_cpus, "num_gpus": num_gpus},
        "autoscaling_config": scaling.model_dump(include=Scaling.model_fields.keys() - {"num_cpus"}),
    }
