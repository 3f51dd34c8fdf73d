"""The settings that serve_config.yaml fills. Frozen, read once, unknown keys refused.

`Settings` are the app's args: changing them redeploys. `Inference` is the ingress's user_config: changing it takes
effect on the next claimed job. `Secrets` come from the environment; see also `environment`.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator

from .models import BUILT_IN, Variant
from .parameters import (
    MASK_GROW,
    MAX_LINK_HOURS,
    PROMPTS,
    AuditRequest,
    CropStrategy,
    GuidanceScale,
    MaskGrow,
    Matrix,
    Prompt,
    QualityBudget,
    Steps,
    VariantName,
)
from .renamed import refuse_old_names
from .urls import has_password, host_of, is_loopback, overlap


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Inference(_Frozen):
    """What an edit uses where its message says nothing."""

    prompt: Prompt = PROMPTS["plain"]
    #: Denoising steps, on variants that have no `steps` of their own.
    steps: Steps = 28
    #: FLUX.1-Fill's official value.
    guidance_scale: GuidanceScale = 30.0
    #: Nearest to the reference and cheapest to dequantise; wants a GPU.
    variant: str = "Q8_0"
    crop_strategy: CropStrategy = CropStrategy.AUTO


class Scaling(_Frozen):
    """How many replicas a deployment has, and what each of them needs."""

    min_replicas: int = Field(0, ge=0, le=1000)
    max_replicas: int = Field(1, ge=1, le=1000)
    #: Requests in flight per replica that the autoscaler aims at.
    target_ongoing_requests: float = Field(1.0, gt=0, le=100)
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    #: For the last replica; None: the same as `downscale_delay_s`.
    downscale_to_zero_delay_s: float | None = Field(None, ge=0)
    num_cpus: float = Field(0.2, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "Scaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


class FirstBlockCache(_Frozen):
    """A step whose first block changes little takes what the other blocks added from the last step that ran them.
    Source: "First Block Cache" of chengzeyi/ParaAttention."""

    kind: Literal["first_block"] = "first_block"
    #: The other blocks are skipped while what the first block adds has changed by no more than this: mean change,
    #: relative to the mean.
    threshold: float = Field(0.08, gt=0, le=1)


class TaylorSeerCache(_Frozen):
    """Between steps that are computed, the model's output is extrapolated. Source: J. Liu et al., "From Reusing to
    Forecasting: Accelerating Diffusion Models with TaylorSeers", 2025."""

    kind: Literal["taylor_seer"] = "taylor_seer"
    #: One step in this many is computed.
    interval: int = Field(3, ge=2, le=20)
    #: Steps at the start, all of which are computed.
    first_steps: int = Field(3, ge=2, le=100)
    #: Order of the extrapolation: 1 is linear.
    order: int = Field(1, ge=0, le=3)


#: Steps that reuse what an earlier step computed: faster, but not exact.
StepCache = Annotated[FirstBlockCache | TaylorSeerCache, Field(discriminator="kind")]


class Optimizations(_Frozen):
    """Ways to make a flux-fill variant faster; see docs/performance.md."""

    #: Every weight is unpacked once, at load: FLUX.1 in bfloat16 then needs 17 GB more. The output stays the same, bit
    #: for bit.
    unpack: bool = False
    #: torch.compile for each kind of block and each bucket, before the replica is ready.
    compile: bool = False
    step_cache: StepCache | None = None


class VariantSettings(Scaling):
    """One served variant: its scaling, and its definition unless it is built in."""

    definition: Variant | None = None
    #: Price of one of its replicas' machines, in the currency of `Settings.price_per_hour`. None: that price.
    price_per_hour: float | None = Field(None, ge=0)
    #: Threads of a CPU engine. Ray sets OMP_NUM_THREADS=1, which is too few.
    threads: int = Field(2, ge=1, le=256)
    optimizations: Optimizations = Optimizations()
    #: Tokens that its prompts are padded or cut to for T5. None: as its definition says. FLUX.1 attends to the padding,
    #: too: with fewer it is faster, but not exact.
    max_prompt_tokens: int | None = Field(None, ge=1, le=512)


class GeneratorSettings(VariantSettings):
    """One served model that makes pictures from prompts."""

    #: Pictures that one job may ask for.
    max_count: int = Field(100, ge=1, le=100)


class ApiSettings(_Frozen):
    """The job API: `/v1/jobs`."""

    #: Below which the pictures of jobs are stored.
    prefix: str = Field("dreamforge/default", pattern=r"\A[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*\z")
    #: How long links to pictures are valid where the request does not say.
    link_s: int = Field(3600, ge=300, le=86_400)
    #: For smoke tests: overrides every request with 256x256 pixels and 10 steps.
    smoke: bool = False
    #: Requests of one key within a minute, over all ingress replicas.
    requests_per_minute: int = Field(600, ge=1)
    #: Jobs of one key that may be queued or running.
    unfinished_jobs: int = Field(1000, ge=1)
    #: Jobs that one key may post within 24 hours.
    jobs_per_day: int = Field(10_000, ge=1)
    #: Event streams that one ingress replica serves at a time, and those of one key among them.
    streams: int = Field(100, ge=1, le=1000)
    streams_per_key: int = Field(20, ge=1, le=1000)
    #: How long an event stream lasts before its client connects again.
    stream_s: float = Field(60.0, gt=0, le=600)
    #: How long a request waits for its job, where its client waits for the pictures: OpenAI's waits for 600 s.
    wait_s: float = Field(590.0, gt=0, le=3600)
    #: Hosts that images may be fetched from: names, or `host:port` for a port other than the scheme's default.
    link_hosts: tuple[str, ...] = ()
    #: Whether `GET /` answers with the workbench.
    workbench: bool = True


class LoraSettings(_Frozen):
    """LoRAs that clients register for generators."""

    #: Bytes of a file. One of rank 128 for all attention and MLP layers of FLUX.1 has 1.05 GB.
    file_bytes: int = Field(2_000_000_000, ge=1)
    max_rank: int = Field(256, ge=1)
    #: LoRAs that one job may use together.
    per_job: int = Field(4, ge=0, le=16)
    #: LoRAs that one API key may register.
    per_key: int = Field(200, ge=1)
    #: LoRAs that a replica keeps in host memory.
    cached: int = Field(4, ge=1, le=100)


class TextEncoderSettings(Scaling):
    """T5 and CLIP. They run once for each new prompt, so the CPU is the default."""

    num_gpus: int = Field(0, ge=0, le=1)
    threads: int = Field(2, ge=1, le=256)


Priority = Literal["high", "normal", "low"]


class SubscriptionSettings(_Frozen):
    #: `high` is drained first; `low` waits for the others, but is never starved.
    priority: Priority = "normal"
    #: Pub/Sub filter, for the embedded server. Google's subscriptions get theirs when they are created.
    filter: str = Field("", max_length=256)


#: A topic's or a subscription's short name.
ResourceName = Annotated[str, StringConstraints(pattern=r"\A[A-Za-z][A-Za-z0-9._~%+-]{2,254}\z")]


class MessagesSettings(_Frozen):
    """Where messages come from and go to."""

    #: `embedded://127.0.0.1:PORT` runs a Pub/Sub server in the app; `pubsub:` is Google's; `pubsub://HOST:PORT` is
    #: another server without TLS, such as Google's emulator.
    url: str = "embedded://127.0.0.1:8085"
    project: str = Field("local", pattern=r"\A[a-z][a-z0-9:.-]{2,127}\z")
    topic: ResourceName = "session-processing"
    #: Subscriptions to pull from, by name.
    subscriptions: dict[ResourceName, SubscriptionSettings] = Field(
        {"session-processing": SubscriptionSettings()}, min_length=1, max_length=16
    )
    dead_letter_topic: ResourceName = "session-processing-dead"
    #: Keeps the dead letters for `fluxfill deadletters`.
    dead_letter_subscription: ResourceName = "session-processing-dead"
    #: Receives a message for every finished job. None: no such messages are published.
    completion_topic: ResourceName | None = None
    #: Messages in flight in one ingress replica. None: an equal part of what all ingress replicas share, two for each
    #: replica that the variants can have and two for each variant.
    max_in_flight: int | None = Field(None, ge=1, le=1000)

    @model_validator(mode="after")
    def _apart(self) -> "MessagesSettings":
        if self.dead_letter_subscription in self.subscriptions:
            raise ValueError(
                f"dead_letter_subscription: {self.dead_letter_subscription} must not be among the subscriptions"
            )
        topics = [self.topic, self.dead_letter_topic, *([self.completion_topic] if self.completion_topic else [])]
        if len(set(topics)) < len(topics):
            raise ValueError("topic, dead_letter_topic and completion_topic must differ")
        return self

    @property
    def is_embedded(self) -> bool:
        return self.url.startswith("embedded:")

    @property
    def is_google(self) -> bool:
        return self.url == "pubsub:"


class PushSettings(_Frozen):
    """`POST /inpaint`, and who may call it."""

    enabled: bool = True
    #: The audience that Google's OIDC token must name: the push subscription's.
    audience: str | None = None
    #: E-mail address of the push subscription's service account. Tokens are verified when this and `audience` are set.
    service_account: str | None = None
    #: A push whose job takes longer is answered 503 while the job goes on: pushed again, it finds its job running or
    #: done.
    response_timeout_s: float = Field(60.0, gt=0, le=600)

    @property
    def is_verified(self) -> bool:
        return bool(self.audience and self.service_account)

    @property
    def is_open(self) -> bool:
        """Whether anyone who reaches the app may push."""
        return self.enabled and not self.is_verified

    @model_validator(mode="after")
    def _whole(self) -> "PushSettings":
        if bool(self.audience) != bool(self.service_account):
            raise ValueError("set both audience and service_account, or neither: a token is checked for both")
        return self


#: Why an app that strangers can reach does not start.
OPEN_PUSHES = (
    "in production, POST /inpaint needs push.audience and push.service_account to verify tokens; "
    "otherwise set push.enabled to false"
)


class WebhookSettings(_Frozen):
    """Calls to a message's `callbackUrl`. They are signed with WEBHOOK_SECRET; without a secret, or without hosts, a
    message that has a `callbackUrl` is refused."""

    #: Hosts that may be called: names, or `host:port` for a port other than the scheme's default.
    hosts: tuple[str, ...] = ()
    #: Whether plain http is allowed; for receivers on this machine.
    allow_http: bool = False
    timeout_s: float = Field(10.0, gt=0, le=25)
    #: With the waits between the attempts, about a day.
    max_attempts: int = Field(19, ge=1, le=100)
    #: The first wait between two attempts; doubles each time, with jitter, up to three hours.
    backoff_s: float = Field(5.0, gt=0)


class Limits(_Frozen):
    """Larger inputs are refused before they cost anything."""

    image_bytes: int = Field(25_000_000, ge=1)
    image_pixels: int = Field(50_000_000, ge=1)
    image_side_px: int = Field(10_000, ge=1)
    message_bytes: int = Field(64_000, ge=1)
    #: Pixels of decoded photos that an ingress keeps while replicas paint, at 4 bytes each with their masks. Photos
    #: beyond this limit are kept encoded, and decoded once more.
    decoded_pixels: int = Field(200_000_000, ge=0)

    @property
    def stored_bytes(self) -> int:
        """The most bytes that an edited photo can have: at quality 95 it can be larger than its original, and a
        lossless one has up to 3 bytes a pixel, and its metadata."""
        return max(8 * self.image_bytes, 4 * self.image_pixels)


#: (width, height) in pixels of the model's input: few, because each size is compiled and warmed up separately. Over 350
#: random leashes on frames of 1024, 384 x 384, 384 x 512 and 384 x 768 save 8% of the FLOPs over the ten sizes without
#: them but with 512 x 1024, which then saves nothing more.
BUCKETS = (
    (256, 256), (384, 384), (384, 512), (512, 384), (384, 768), (768, 384), (512, 512), (512, 768), (768, 512),
    (768, 768), (768, 1024), (1024, 768), (1024, 1024),
)  # fmt: skip


class WindowSettings(_Frozen):
    """How the windows to paint are planned; see `serve_app.edit.windows`."""

    buckets: tuple[tuple[int, int], ...] = BUCKETS
    #: Pixels of surroundings the model sees round the mask, at working scale.
    context_px: int = Field(64, ge=0, le=512)
    #: How far the mask grows before anything else, as a share of the photo's longest side: a leash's blurred edge and
    #: the shadow that it casts beside it are seldom in its mask, and what is left of them shows. Context shrinks by as
    #: much, to its half at most.
    mask_grow: MaskGrow = MASK_GROW
    #: Width of the blend outside the grown mask, in photo pixels; nothing further out changes.
    feather_px: int = Field(8, ge=0, le=64)
    #: Windows that `original` may use; a mask that needs more is painted at a coarser scale.
    max_windows: int = Field(4, ge=1, le=64)
    #: The most that the windows of `auto` may cost together, in TFLOP of FLUX.1 per step: one of 1024² costs 74.4.
    budget_tflop: float = Field(74.5, gt=0)
    #: The overhead that `auto` adds for each window after the first, in TFLOP per step: time that is not spent on
    #: FLOPs, and a seam. Eager engines unpack all weights in each step of each window, which on an L4 takes as long as
    #: 11 (Q8_0) to 37 (Q5_K_S) TFLOP.
    window_overhead_tflop: float = Field(1.0, ge=0, le=1000)

    @model_validator(mode="after")
    def _sizes(self) -> "WindowSettings":
        if not self.buckets:
            raise ValueError("buckets: at least one size is needed")
        for width, height in self.buckets:
            if width % 16 or height % 16 or not (16 <= width <= 1024 and 16 <= height <= 1024):
                raise ValueError(f"buckets: {width}x{height} is not two multiples of 16 up to 1024")
        return self


class QualitySettings(_Frozen):
    """How edits are checked; see `serve_app.edit.quality`."""

    #: An edit that puts back more of what was to be removed is suspect: a correlation, where 1 is all of it.
    put_back: float = Field(0.45, gt=0, le=1)
    #: How often a suspect edit is painted again, each time with the next seed.
    retries: int = Field(1, ge=0, le=5)


class Work(_Frozen):
    """Leases, retries and timeouts."""

    #: How long a worker may be silent before another one may claim its job.
    lease_s: float = Field(60.0, gt=0)
    #: Between two renewals of a lease.
    renew_s: float = Field(20.0, gt=0)
    max_attempts: int = Field(5, ge=1, le=100)
    #: How long painting, or encoding a prompt, may take from its start.
    inference_timeout_s: float = Field(240.0, gt=0)
    #: How long a job waits for a replica or the text encoder before its message is deferred, so that others can go on.
    replica_wait_s: float = Field(900.0, gt=0)
    #: How long the upload of a painted photo is retried before its message is deferred.
    upload_timeout_s: float = Field(300.0, gt=0)
    #: How long a job may wait in total for weights, a replica, the text encoder or a store before it fails.
    wait_limit_s: float = Field(86_400.0, gt=0)
    #: How long a message is deferred after its first failure; doubles with each attempt, with jitter.
    backoff_s: float = Field(2.0, gt=0)
    #: Pub/Sub defers a message for 600 s at most.
    backoff_max_s: float = Field(600.0, gt=0, le=600)
    #: How long an engine may go on after it was told to stop before its replica is replaced: on an L4, one step of the
    #: largest window takes seconds.
    engine_stop_timeout_s: float = Field(60.0, gt=0)
    #: How long an unfinished job may be silent before its message is published again.
    redispatch_after_s: float = Field(3600.0, gt=0)
    #: On shutdown, how long running jobs may go on before they are requeued. A spot node has 15 s in total.
    shutdown_grace_s: float = Field(5.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "Work":
        if self.renew_s * 2 >= self.lease_s:
            raise ValueError("renew_s must be less than half of lease_s, so that one missed renewal loses nothing")
        return self


class BacklogSettings(_Frozen):
    """How the number of replicas follows the messages that wait; see docs/operations.md."""

    #: Between two readings of the backlog.
    read_every_s: float = Field(5.0, gt=0, le=300)
    #: How soon after its publication the oldest message should be done.
    target_drain_s: float = Field(300.0, gt=0)
    #: An older reading does not count. Cloud Monitoring's are one to four minutes old.
    trust_s: float = Field(300.0, gt=0)
    #: How long pulls that have room must have brought nothing to prove that no message waits.
    quiet_s: float = Field(10.0, gt=0)
    #: How long a replica works on a job, until one has been measured.
    job_s: float = Field(30.0, gt=0)


class AuditSettings(_Frozen):
    """Defaults of an audit's request, and limits of an audit."""

    #: Whether `POST /audit` starts audits.
    enabled: bool = True
    #: Whether an audit may start while another runs on the same app: they disturb each other's timings.
    allow_concurrent: bool = False
    #: Cells in flight over all variants. None: two for each replica that the variants can have, one being painted and
    #: one waiting.
    max_in_flight: int | None = Field(None, ge=1, le=1000)
    matrix: Matrix = Matrix()
    budget: QualityBudget = QualityBudget()
    link_hours: float = Field(72.0, gt=0, le=MAX_LINK_HOURS)
    #: GPUs that the cluster can have. None: those it has when an audit starts; a cluster that adds nodes can have more.
    gpus: int | None = Field(None, ge=0)
    #: How long an audit waits for replicas before it gives a variant up: for the last variant's to stop, and
    #: for one of its own to run.
    replica_wait_s: float = Field(900.0, gt=0)

    def request(self, given: Mapping[str, Any]) -> AuditRequest:
        """`given`, by the names of AuditRequest's and Matrix's fields, and the rest as set here.

        Raises ValidationError for values that are wrong or do not go together.
        """
        axes = {name: value for name, value in given.items() if name in Matrix.model_fields}
        others = {name: value for name, value in given.items() if name not in axes}
        unsaid = self.model_dump(include=set(AuditRequest.model_fields) - {"matrix"})
        return AuditRequest.model_validate({**unsaid, **others, "matrix": {**self.matrix.model_dump(), **axes}})


class WeightsSettings(_Frozen):
    #: Folder in which the hub's files are cached.
    cache: Path = Path("var/weights")
    #: Blob store URL of a mirror that is tried before the hub.
    mirror: str | None = None
    #: Revisions, sizes and hashes, written by `fluxfill weights pull --pin`.
    lock: Path = Path("weights.lock.json")


class Settings(_Frozen):
    """The app's args in serve_config.yaml."""

    # A refused value may be a secret in the wrong place.
    model_config = ConfigDict(hide_input_in_errors=True)

    #: Machines that the app may run on.
    nodes: int = Field(1, ge=1)
    #: Price of one replica's machine, in any one currency. None: costs are not recorded.
    price_per_hour: float | None = Field(None, ge=0)
    #: Blob store URL; see `serve_app.adapters`.
    blobs: str = "files:var/blobs"
    #: Job store URL.
    jobs: str = "sqlite:var/jobs.db"
    #: Job store URL for the session documents. None: they are in the same store as the jobs.
    sessions: str | None = None
    #: Where this app is reached over HTTP from outside: signed links to local blobs begin with it.
    public_url: str = Field("http://127.0.0.1:8000", pattern=r"\Ahttps?://[^\s?#]+\z")
    messages: MessagesSettings = MessagesSettings()
    variants: dict[VariantName, VariantSettings] = Field(min_length=1)
    #: Models that make pictures from prompts; the first is used where a job names none.
    generators: dict[VariantName, GeneratorSettings] = {}
    loras: LoraSettings = LoraSettings()
    api: ApiSettings = ApiSettings()
    ingress_replicas: int = Field(1, ge=1, le=100)
    text_encoder: TextEncoderSettings = TextEncoderSettings()
    push: PushSettings = PushSettings()
    webhooks: WebhookSettings = WebhookSettings()
    limits: Limits = Limits()
    windows: WindowSettings = WindowSettings()
    quality: QualitySettings = QualitySettings()
    work: Work = Work()
    backlog: BacklogSettings = BacklogSettings()
    weights: WeightsSettings = WeightsSettings()
    audit: AuditSettings = AuditSettings()

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, given: Any) -> Any:
        refuse_old_names(cls.__name__, given)
        return given

    @model_validator(mode="after")
    def _known_variants(self) -> "Settings":
        for place, models in (("variants", self.variants), ("generators", self.generators)):
            for name, served in models.items():
                if served.definition is None and name not in BUILT_IN:
                    known = ", ".join(BUILT_IN)
                    raise ValueError(f"{place}.{name}: not built in (those are {known}) and has no definition")
        if both := self.variants.keys() & self.generators.keys():
            raise ValueError(f"generators.{min(both)}: a variant has this name")
        for name in self.served:
            if (self.variant(name).generation is not None) != (name in self.generators):
                here, there = ("generators", "variants") if name in self.generators else ("variants", "generators")
                raise ValueError(f"{here}.{name}: the family {self.variant(name).family} belongs to {there}")
        return self

    @model_validator(mode="after")
    def _one_machine(self) -> "Settings":
        if self.nodes > 1:
            local = {
                "blobs": self.blobs.startswith(("files:", "memory:")),
                "jobs": self.jobs.startswith(("sqlite:", "memory:")),
                "sessions": (self.sessions or "").startswith(("sqlite:", "memory:")),
                "messages.url": self.messages.is_embedded,
            }
            if any(local.values()):
                names = ", ".join(name for name, is_local in local.items() if is_local)
                raise ValueError(f"nodes is {self.nodes}, but {names} works on one machine only")
        return self

    @model_validator(mode="after")
    def _no_passwords(self) -> "Settings":
        urls = {
            "blobs": self.blobs,
            "jobs": self.jobs,
            "sessions": self.sessions,
            "public_url": self.public_url,
            "messages.url": self.messages.url,
            "weights.mirror": self.weights.mirror,
        }
        for name, url in urls.items():
            try:
                is_secret = has_password(url or "")
            except ValueError:
                # Its words quote the URL, and a secret in it.
                raise ValueError(f"{name}: not a URL") from None
            if is_secret:
                # Without the URL, which would be logged.
                raise ValueError(f"{name}: a password does not belong in a config; see docs/configuration.md")
        return self

    @model_validator(mode="after")
    def _weights_apart(self) -> "Settings":
        """Whoever writes to weights runs code in the replicas, and users write to `blobs`."""
        places = {
            "weights.mirror": self.weights.mirror,
            "weights.cache": f"files:{self.weights.cache}",
            "weights.lock": f"files:{self.weights.lock}",
        }
        for name in self.served:
            row = self.variant(name)
            # A hub's names are no folders here, and lie in none of them.
            places |= {f"{name}: {what}": f"files:{what}" for what in (row.file, row.base) if what}
            places |= {f"{name}: {lora.file}": f"files:{lora.file}" for lora in row.loras}
        for name, url in places.items():
            if url and overlap(url, self.blobs):
                raise ValueError(f"{name}: it shares a folder with blobs, where users' photos are written")
        return self

    @model_validator(mode="after")
    def _pushes_are_verified(self) -> "Settings":
        if self.is_production and self.push.is_open:
            raise ValueError(f"push: {OPEN_PUSHES}")
        return self

    @property
    def is_production(self) -> bool:
        """Whether strangers may reach the app by what its settings say: anything but one machine with its own broker
        and an address of its own. `Access` asks for the address that Serve listens on, too."""
        return self.nodes > 1 or self.messages.is_google or not is_loopback(host_of(self.public_url))

    @property
    def sessions_url(self) -> str:
        return self.sessions or self.jobs

    @property
    def served(self) -> Mapping[str, VariantSettings]:
        """Everything that paints: variants and generators."""
        return {**self.variants, **self.generators}

    def variant(self, name: str) -> Variant:
        """The definition of a served variant or generator, as it is served. Raises KeyError for one that is not."""
        row, tokens = self.served[name].definition or BUILT_IN[name], self.served[name].max_prompt_tokens
        return row if tokens is None else row.model_copy(update={"max_prompt_tokens": tokens})

    def unsaid(self, inference: Inference, name: str) -> dict[str, Any]:
        """What an edit on this variant uses where its message says nothing, by the names of EditParameters. The variant
        need not be served."""
        steps = self.variant(name).steps if name in self.served else None
        return inference.model_dump(exclude={"variant"}) | ({} if steps is None else {"steps": steps})

    def price(self, name: str) -> float | None:
        """Of an hour on a replica of a served variant or generator. None: it has no price."""
        own = self.served[name].price_per_hour
        return self.price_per_hour if own is None else own

    def cost(self, name: str, engine_s: float) -> float | None:
        """Of so many seconds on a replica of a served variant or generator. None: it has no price."""
        price = self.price(name)
        return None if price is None else price * engine_s / 3600

    def takes_loras(self, name: str) -> bool:
        """Whether a served generator makes pictures with LoRAs. Compiled blocks would leave them out."""
        takes = self.variant(name).generation
        return takes is not None and takes.takes_loras and not self.served[name].optimizations.compile

    def variant_label(self, name: str) -> str:
        """What metrics call a variant: messages may name any, and each name would be a series for ever."""
        return name if name in self.served else "other"

    def share(self, name: str) -> int:
        """Messages of a served variant in one ingress replica: with the other ingress replicas' enough to keep the
        variant busy, one painted and one ready to be on each of its replicas, and two on their way. Whatever more
        were claimed would wait where priorities do not reach."""
        return math.ceil((2 * self.served[name].max_replicas + 2) / self.ingress_replicas)

    def in_flight(self) -> int:
        """Messages in one ingress replica."""
        return self.messages.max_in_flight or sum(map(self.share, self.served))


class Secrets(_Frozen):
    """What must not stand in a file. Never logged: pydantic shows a SecretStr as asterisks."""

    #: For the hub.
    hf_token: SecretStr | None = None
    #: A service account's JSON, in base64, for those who have no ambient credentials.
    firebase_credentials: SecretStr | None = None
    #: Signs webhooks: `whsec_…`; several, separated by spaces, while one is being replaced.
    webhook_secret: SecretStr | None = None
    #: Keys of the job API's clients, separated by commas.
    api_keys: SecretStr | None = None

    @classmethod
    def from_environment(cls) -> "Secrets":
        values = {name: os.environ.get(name.upper()) for name in cls.model_fields}
        return cls(**{name: SecretStr(value) for name, value in values.items() if value})
