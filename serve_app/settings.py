"""The settings that serve_config.yaml fills. Frozen, read once, unknown keys refused.

`Settings` are the app's args: changing them redeploys. `Inference` is the ingress's user_config: changing it takes
effect on the next claimed job. `Secrets` come from the environment, and only here is the environment read.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator

from .audits import MAX_LINK_HOURS, AuditRequest, Matrix, QualityBudget
from .messages import CropStrategy, GuidanceScale, Prompt, Steps, VariantName
from .urls import has_password, host_of, is_loopback, overlap
from .variants import BUILT_IN, Variant


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Inference(_Frozen):
    """What an edit uses where its message says nothing."""

    prompt: Prompt = "seamless natural background matching surrounding area, photorealistic, no leash, no rope, no cord"
    #: Denoising steps.
    steps: Steps = 28
    #: FLUX.1-Fill's official value.
    guidance_scale: GuidanceScale = 30.0
    #: Nearest to the reference and cheapest to dequantise; wants a GPU.
    variant: str = "Q8_0"
    crop_strategy: CropStrategy = CropStrategy.AUTO


class Scaling(_Frozen):
    """How many replicas a deployment has, and what each takes."""

    min_replicas: int = Field(0, ge=0, le=1000)
    max_replicas: int = Field(1, ge=1, le=1000)
    #: Jobs in a replica's hands that the autoscaler aims at.
    target_ongoing_requests: float = Field(1.0, gt=0, le=100)
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    #: Of the last replica; None: as `downscale_delay_s`.
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
    #: Mean change of what the first block adds, relative to its mean, up to which the other blocks do not run.
    threshold: float = Field(0.08, gt=0, le=1)


class TaylorSeerCache(_Frozen):
    """Between steps that are computed, the model's output is extrapolated. Source: J. Liu et al., "From Reusing to
    Forecasting: Accelerating Diffusion Models with TaylorSeers", 2025."""

    kind: Literal["taylor_seer"] = "taylor_seer"
    #: Of so many steps one is computed.
    interval: int = Field(3, ge=2, le=20)
    #: Computed at the start, all of them.
    first_steps: int = Field(3, ge=2, le=100)
    #: Of the extrapolation: 1 is linear.
    order: int = Field(1, ge=0, le=3)


#: Steps that reuse what an earlier step computed: faster, and not exact.
StepCache = Annotated[FirstBlockCache | TaylorSeerCache, Field(discriminator="kind")]


class Levers(_Frozen):
    """What makes a flux-fill variant cheaper; see docs/performance.md."""

    #: Every weight is unpacked once, at load: needs 17 GB for FLUX.1 in bfloat16 beside what else is resident. It
    #: changes no bit of the output.
    unpack: bool = False
    #: torch.compile for each kind of block and each bucket, before the replica is ready.
    compile: bool = False
    step_cache: StepCache | None = None


class VariantSettings(Scaling):
    """One served variant: its scaling, and its definition where it is not one of the built-in ones."""

    definition: Variant | None = None
    #: Threads of a CPU engine. Ray sets OMP_NUM_THREADS=1, which is too few.
    threads: int = Field(2, ge=1, le=256)
    levers: Levers = Levers()


class TextEncoderSettings(Scaling):
    """T5 and CLIP. They run once for a prompt that nobody has asked for before, so the CPU is the default."""

    num_gpus: int = Field(0, ge=0, le=1)
    threads: int = Field(2, ge=1, le=256)


Priority = Literal["high", "normal", "low"]


class SubscriptionSettings(_Frozen):
    #: `high` is drained first; `low` waits for the others, but never for ever.
    priority: Priority = "normal"
    #: Pub/Sub filter that the embedded server gives it. Google's subscriptions have theirs from when they were made.
    filter: str = Field("", max_length=256)


#: A topic's or a subscription's short name.
ResourceName = Annotated[str, StringConstraints(pattern=r"\A[A-Za-z][A-Za-z0-9._~%+-]{2,254}\z")]


class MessagesSettings(_Frozen):
    """Where messages come from and go to."""

    #: `embedded://127.0.0.1:PORT` runs a Pub/Sub server in the app; `pubsub:` is Google's; `pubsub://HOST:PORT` is one
    #: that somebody else runs there without TLS, such as Google's emulator.
    url: str = "embedded://127.0.0.1:8085"
    project: str = Field("local", pattern=r"\A[a-z][a-z0-9:.-]{2,127}\z")
    topic: ResourceName = "session-processing"
    #: What is pulled, by name.
    subscriptions: dict[ResourceName, SubscriptionSettings] = Field(
        {"session-processing": SubscriptionSettings()}, min_length=1, max_length=16
    )
    dead_letter_topic: ResourceName = "session-processing-dead"
    #: Keeps the dead letters for `fluxfill deadletters`.
    dead_letter_subscription: ResourceName = "session-processing-dead"
    #: Gets a message for every job that is over. None: nobody is told so.
    completion_topic: ResourceName | None = None
    #: Messages in an ingress replica's hands. None: its part of two for each replica of each variant and two for each
    #: variant, which all ingress replicas share.
    max_in_flight: int | None = Field(None, ge=1, le=1000)

    @model_validator(mode="after")
    def _apart(self) -> "MessagesSettings":
        if self.dead_letter_subscription in self.subscriptions:
            raise ValueError(f"dead_letter_subscription: {self.dead_letter_subscription} is among the subscriptions")
        topics = [self.topic, self.dead_letter_topic, *([self.completion_topic] if self.completion_topic else [])]
        if len(set(topics)) < len(topics):
            raise ValueError("topic, dead_letter_topic and completion_topic must be different ones")
        return self

    @property
    def is_embedded(self) -> bool:
        return self.url.startswith("embedded:")

    @property
    def is_google(self) -> bool:
        return self.url == "pubsub:"


class PushSettings(_Frozen):
    """`POST /inpaint` and who may post there."""

    enabled: bool = True
    #: What Google's OIDC token must be made out for: the push subscription's audience.
    audience: str | None = None
    #: E-mail of the push subscription's service account. With `audience`, tokens are verified.
    service_account: str | None = None
    #: A push that is not done by then is answered 503 and worked on: pushed again, it finds its job running, or done.
    answer_s: float = Field(60.0, gt=0, le=600)

    @property
    def is_verified(self) -> bool:
        return bool(self.audience and self.service_account)

    @property
    def is_open(self) -> bool:
        """Whether everybody who reaches the app may push."""
        return self.enabled and not self.is_verified

    @model_validator(mode="after")
    def _whole(self) -> "PushSettings":
        if bool(self.audience) != bool(self.service_account):
            raise ValueError("audience and service_account go together: a token is checked for both")
        return self


#: Why an app that strangers may reach does not start.
OPEN_PUSHES = (
    "in production, POST /inpaint needs push.audience and push.service_account to verify tokens by; "
    "or set push.enabled to false"
)


class WebhookSettings(_Frozen):
    """Calls to a message's `callbackUrl`. They are signed with WEBHOOK_SECRET; without one, or without hosts, a
    message that has a `callbackUrl` is refused."""

    #: Hosts that may be called: names, or `host:port` for a port other than the scheme's own.
    hosts: tuple[str, ...] = ()
    #: Whether plain http is taken; for receivers on this machine.
    allow_http: bool = False
    timeout_s: float = Field(10.0, gt=0, le=25)
    #: About a day, with the waits between them.
    max_attempts: int = Field(19, ge=1, le=100)
    #: The first wait between two attempts; doubles with each, with jitter, up to three hours.
    backoff_s: float = Field(5.0, gt=0)


class Limits(_Frozen):
    """What is refused before it costs anything."""

    image_bytes: int = Field(25_000_000, ge=1)
    image_pixels: int = Field(50_000_000, ge=1)
    image_side_px: int = Field(10_000, ge=1)
    message_bytes: int = Field(64_000, ge=1)
    #: Pixels of decoded photos that an ingress keeps while replicas paint, at 4 bytes each with their masks. Photos
    #: beyond it are kept encoded and decoded once more.
    decoded_pixels: int = Field(200_000_000, ge=0)

    @property
    def stored_bytes(self) -> int:
        """What an edited photo has at most: one of the largest photo, at quality 95, can be larger than the photo."""
        return 8 * self.image_bytes


#: (width, height) in pixels that the model is given: few, because each size is compiled and warmed by itself. Over 350
#: random leashes on frames of 1024, 384 x 384, 384 x 512 and 384 x 768 save 8% of the FLOPs over the ten sizes without
#: them but with 512 x 1024, which then saves nothing more.
BUCKETS = (
    (256, 256), (384, 384), (384, 512), (512, 384), (384, 768), (768, 384), (512, 512), (512, 768), (768, 512),
    (768, 768), (768, 1024), (1024, 768), (1024, 1024),
)  # fmt: skip


class WindowSettings(_Frozen):
    """How the windows to paint are chosen; see `serve_app.windows`."""

    buckets: tuple[tuple[int, int], ...] = BUCKETS
    #: Pixels of surroundings the model sees round the mask, at working scale.
    context_px: int = Field(64, ge=0, le=512)
    #: Width of the blend outside the mask, in photo pixels; nothing further out changes.
    feather_px: int = Field(8, ge=0, le=64)
    #: Windows that `original` may take; a mask that wants more is painted at a coarser scale.
    max_windows: int = Field(4, ge=1, le=64)
    #: What the windows that `auto` takes may cost together, a step, of FLUX.1: one window of 1024 x 1024 costs 74.4.
    budget_tflop: float = Field(74.5, gt=0)
    #: What `auto` counts for each window after the first, a step, beside its FLOPs: the time that no FLOP takes, and a
    #: seam. Eager engines unpack all weights in each step of each window, as long as 11 (Q8_0) to 37 (Q5_K_S) TFLOP
    #: take on an L4.
    window_tflop: float = Field(1.0, ge=0, le=1000)

    @model_validator(mode="after")
    def _sizes(self) -> "WindowSettings":
        if not self.buckets:
            raise ValueError("buckets: at least one size is needed")
        for width, height in self.buckets:
            if width % 16 or height % 16 or not (16 <= width <= 1024 and 16 <= height <= 1024):
                raise ValueError(f"buckets: {width}x{height} is not two multiples of 16 up to 1024")
        return self


class Work(_Frozen):
    """Leases, retries and limits on time."""

    lease_s: float = Field(60.0, gt=0)
    renew_s: float = Field(20.0, gt=0)
    max_attempts: int = Field(5, ge=1, le=100)
    #: From when an engine begins with a job.
    inference_timeout_s: float = Field(240.0, gt=0)
    #: How long a job waits for a replica or for the text encoder before its message is held back for others' sake.
    replica_wait_s: float = Field(900.0, gt=0)
    #: How long the upload of a painted photo is tried, before its message is held back.
    upload_s: float = Field(300.0, gt=0)
    #: How long a job may wait in all for weights, a replica, the text encoder or a store, before it fails.
    wait_limit_s: float = Field(86_400.0, gt=0)
    #: The first hold-back after a failure; doubles with each attempt, with jitter.
    backoff_s: float = Field(2.0, gt=0)
    #: Pub/Sub holds a message back for 600 s at most.
    backoff_max_s: float = Field(600.0, gt=0, le=600)
    #: How long an engine may go on after it was told to stop, before its replica is replaced: one step of the largest
    #: window takes seconds on an L4.
    stuck_s: float = Field(60.0, gt=0)
    #: How long nothing may be heard of a job that is not over before its message is published again.
    redispatch_s: float = Field(3600.0, gt=0)
    #: On shutdown: how long jobs in hand may go on before they are given back. A spot node has 15 s in all.
    grace_s: float = Field(5.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "Work":
        if self.renew_s * 2 >= self.lease_s:
            raise ValueError("renew_s must be less than half of lease_s, so that one missed renewal loses nothing")
        return self


class AuditSettings(_Frozen):
    """What an audit is where its request says nothing, and what one may take."""

    #: Whether `POST /audit` starts any.
    enabled: bool = True
    #: Whether one may start while another runs on the same app: their timings disturb each other.
    several: bool = False
    #: Cells asked for at once, over all variants. None: two for each replica that they may have, one painted and one
    #: ready.
    max_in_flight: int | None = Field(None, ge=1, le=1000)
    matrix: Matrix = Matrix()
    budget: QualityBudget = QualityBudget()
    link_hours: float = Field(72.0, gt=0, le=MAX_LINK_HOURS)
    #: Of one replica's machine, in any one currency. None: costs are not given.
    price_per_hour: float | None = Field(None, ge=0)
    #: GPUs the cluster can have. None: those it has when an audit starts; a cluster that adds nodes may have more.
    gpus: int | None = Field(None, ge=0)
    #: How long a variant's replicas may take to be gone, and the devices' memory to be free again, before the next one
    #: is given up; and how long an audited variant may have no running replica. Seconds.
    settle_s: float = Field(900.0, gt=0)

    def request(self, given: Mapping[str, Any]) -> AuditRequest:
        """`given`, by the names of AuditRequest's and Matrix's fields, and the rest as set here.

        Raises ValidationError for values that are wrong or do not go together.
        """
        axes = {name: value for name, value in given.items() if name in Matrix.model_fields}
        others = {name: value for name, value in given.items() if name not in axes}
        unsaid = self.model_dump(include=set(AuditRequest.model_fields) - {"matrix"})
        return AuditRequest.model_validate({**unsaid, **others, "matrix": {**self.matrix.model_dump(), **axes}})


class WeightsSettings(_Frozen):
    #: Folder the hub's files are kept in.
    cache: Path = Path("var/weights")
    #: Blob store URL of a mirror that is asked before the hub.
    mirror: str | None = None
    #: Revisions, sizes and hashes, written by `fluxfill weights pull --pin`.
    lock: Path = Path("weights.lock.json")


class Settings(_Frozen):
    """The app's args in serve_config.yaml."""

    # What is refused may be a secret in the wrong place.
    model_config = ConfigDict(hide_input_in_errors=True)

    #: Machines the app may run on.
    nodes: int = Field(1, ge=1)
    #: Blob store URL; see `serve_app.adapters`.
    blobs: str = "files:var/blobs"
    #: Job store URL.
    jobs: str = "sqlite:var/jobs.db"
    #: Where the session documents are: a URL like that of `jobs`. None: beside the jobs.
    sessions: str | None = None
    #: Where this app's own HTTP is reached from outside: signed links to local blobs begin with it.
    public_url: str = Field("http://127.0.0.1:8000", pattern=r"\Ahttps?://[^\s?#]+\z")
    messages: MessagesSettings = MessagesSettings()
    variants: dict[VariantName, VariantSettings] = Field(min_length=1)
    ingress_replicas: int = Field(1, ge=1, le=100)
    text_encoder: TextEncoderSettings = TextEncoderSettings()
    push: PushSettings = PushSettings()
    webhooks: WebhookSettings = WebhookSettings()
    limits: Limits = Limits()
    windows: WindowSettings = WindowSettings()
    work: Work = Work()
    weights: WeightsSettings = WeightsSettings()
    audit: AuditSettings = AuditSettings()

    @model_validator(mode="after")
    def _known_variants(self) -> "Settings":
        for name, served in self.variants.items():
            if served.definition is None and name not in BUILT_IN:
                known = ", ".join(BUILT_IN)
                raise ValueError(f"variants.{name}: not built in (those are {known}) and has no definition")
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
        for name in self.variants:
            row = self.variant(name)
            # A hub's names are no folders here, and lie in none of them.
            places |= {f"variants.{name}: {what}": f"files:{what}" for what in (row.file, row.base) if what}
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

    def variant(self, name: str) -> Variant:
        """The definition of a served variant. Raises KeyError for one that is not served."""
        return self.variants[name].definition or BUILT_IN[name]

    def variant_label(self, name: str) -> str:
        """What metrics call a variant: messages may name any, and each name would be a series for ever."""
        return name if name in self.variants else "other"

    def share(self, name: str) -> int:
        """Messages of a served variant in one ingress replica: with the other ingress replicas' enough to keep the
        variant busy, one painted and one ready to be on each of its replicas, and two on their way. Whatever more
        were claimed would wait where priorities do not reach."""
        return math.ceil((2 * self.variants[name].max_replicas + 2) / self.ingress_replicas)

    def in_flight(self) -> int:
        """Messages in one ingress replica."""
        return self.messages.max_in_flight or sum(map(self.share, self.variants))


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
