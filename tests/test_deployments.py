"""The composition root and the parts that live in replicas, without a running Ray."""

import asyncio
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray import serve
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, DeploymentStatusTrigger, ReplicaState

from deployments import loading, own_ray, readiness
from deployments.app import absolute, build, deployment_names, text_encoder_name
from deployments.broker import BrokerWatch, PubSub
from deployments.cli import demo
from deployments.config import load
from deployments.ingress import Pushes, check_ray_token
from deployments.loading import Loading
from deployments.readiness import VariantWatch
from deployments.remote import RemoteModel, RemotePrompts, RemoteTrials, typed_errors
from deployments.replica import Status
from deployments.text_encoder import TextEncoder
from serve_app.adapters.memory import MemoryBlobStore
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.edit.paste import grow, growth_px
from serve_app.engine.prompts import PromptCache
from serve_app.errors import (
    FluxFillError,
    GpuLost,
    InferenceTimeout,
    OutOfMemory,
    PaintError,
    ReplicaLost,
    ReplicaTaken,
    Unavailable,
    UnknownVariant,
    VariantLoadFailed,
    VariantNotReady,
)
from serve_app.http.problems import BODIES_AT_ONCE
from serve_app.http.service import VariantReadiness
from serve_app.jobs.ports import Verdict
from serve_app.models import EditRequest, Images, Measured, Progress, Variant
from serve_app.settings import MessagesSettings, Settings, WindowSettings

from .backends import until
from .engine_fixtures import request
from .rig import Counters

CONFIG = Path("serve_config.yaml")


# -- loading


class Weights:
    """Something that loads on its `works_at`-th try."""

    def __init__(self, works_at: int) -> None:
        self._works_at = works_at
        self.tries = 0
        self.is_closed = False
        self.metrics = Counters()

    @property
    def loading(self) -> "Loading[Weights]":
        return Loading("variant v", self.load, Weights.close, self.metrics)

    def load(self) -> "Weights":
        self.tries += 1
        if self.tries < self._works_at:
            raise OSError(f"no file, try {self.tries}")
        return self

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(loading, "LONGEST_WAIT_S", 0.01)


class TextEncoderReplica(TextEncoder):
    """Serve awaits `__del__` when it stops a replica; Python's own garbage collection would not."""

    def __del__(self) -> None:
        self._loading._again.cancel()


class LostEncoder:
    """Text encoders on a GPU that fails when it is first used."""

    used = False

    def encode(self, prompt: str, max_tokens: int) -> bytes:
        assert not self.used, "it was asked again"
        self.used = True
        raise GpuLost("an ECC error")


async def test_what_loads_at_once_is_there_at_once_and_freed_at_the_end() -> None:
    weights = Weights(works_at=1)
    loading = weights.loading
    assert (loading.value, loading.error, weights.tries) == (weights, "", 1)
    await loading.close()
    assert weights.is_closed


async def test_what_does_not_load_says_why() -> None:
    weights = Weights(works_at=2)
    loading = weights.loading
    assert loading.error == "OSError: no file, try 1"
    with pytest.raises(VariantLoadFailed, match=r"^variant v did not load: OSError: no file, try 1$"):
        _ = loading.value
    assert weights.metrics.total("fluxfill_load_failures_total", "variant v", "OSError") == 1
    loading.check_health()
    await loading.close()


@pytest.mark.usefixtures("impatient")
async def test_loading_is_tried_until_it_works_and_then_no_more() -> None:
    weights = Weights(works_at=4)
    loading = weights.loading
    await until(lambda: loading.error == "")
    assert (loading.value, weights.tries) == (weights, 4)
    await until(loading._again.done)
    assert weights.metrics.total("fluxfill_load_failures_total", "variant v", "OSError") == 3
    await loading.close()
    assert (weights.tries, weights.is_closed) == (4, True)


@pytest.mark.usefixtures("impatient")
async def test_a_closed_loading_is_not_tried_again() -> None:
    weights = Weights(works_at=1000)
    loading = weights.loading
    await until(lambda: weights.tries > 2)
    await loading.close()
    await until(loading._again.done)
    assert loading._again.cancelled()
    assert not weights.is_closed


@pytest.mark.usefixtures("impatient")
async def test_a_load_that_ends_after_the_closing_is_freed() -> None:
    weights = Weights(works_at=2)
    begun, go_on = threading.Event(), threading.Event()

    def load() -> Weights:
        if weights.tries == 1:
            begun.set()
            assert go_on.wait(30)
        return weights.load()

    loading = Loading("variant v", load, Weights.close, weights.metrics)
    await until(begun.is_set)
    await loading.close()
    assert not weights.is_closed
    go_on.set()
    await until(lambda: weights.is_closed)


async def test_a_gpu_that_was_lost_while_loading_makes_its_replica_unhealthy() -> None:
    def load() -> None:
        raise GpuLost("an uncorrectable ECC error")

    metrics = Counters()
    loading = Loading("variant v", load, lambda _: None, metrics)
    with pytest.raises(GpuLost, match=r"^an uncorrectable ECC error$"):
        loading.check_health()
    with pytest.raises(VariantNotReady, match="variant v is being replaced: an uncorrectable ECC error"):
        _ = loading.value
    assert metrics.total("fluxfill_load_failures_total", "variant v", "gpu_lost") == 1
    await loading.close()


async def test_what_was_lost_after_loading_is_refused_from_then_on() -> None:
    weights = Weights(works_at=1)
    loading = weights.loading
    assert loading.lose(GpuLost("it fell off the bus"))
    assert not loading.lose(GpuLost("it fell off the bus"))
    with pytest.raises(VariantNotReady, match="off the bus"):
        _ = loading.value
    assert loading.error == "GpuLost: it fell off the bus"
    await loading.close()
    assert not weights.is_closed, "a lost GPU's memory cannot be freed"


async def test_loading_may_run_an_event_loop_of_its_own() -> None:
    async def fetch() -> str:
        return "weights"

    loading = Loading("variant v", lambda: asyncio.run(fetch()), lambda _: None, Counters())
    assert loading.value == "weights"


async def test_a_text_encoder_that_lost_its_gpu_makes_its_replica_unhealthy() -> None:
    metrics, settings = Counters(), Settings(variants={"telea": {}})
    encoder = TextEncoderReplica(Variant(family="flux-fill", base="nowhere"), settings, metrics)
    what = "the text encoder of nowhere"
    assert metrics.total("fluxfill_load_failures_total", what, "unknown_weights") == 1
    with pytest.raises(VariantLoadFailed, match=what):
        await encoder.encode("a cat", 8)
    encoder._loading._value = LostEncoder()
    encoder.check_health()
    with pytest.raises(GpuLost, match="an ECC error"):
        await encoder.encode("a cat", 8)
    with pytest.raises(VariantNotReady, match="an ECC error"):
        await encoder.encode("a cat", 8)
    with pytest.raises(GpuLost, match="an ECC error"):
        encoder.check_health()


class SlowEncoder:
    """Text encoders that take until they are let go."""

    def __init__(self) -> None:
        self.begun, self.let_go = threading.Event(), threading.Event()

    def encode(self, prompt: str, max_tokens: int) -> bytes:
        self.begun.set()
        self.let_go.wait(20)
        return prompt.encode()


async def test_a_prompt_is_limited_from_when_it_is_encoded_and_a_hung_encoder_is_replaced() -> None:
    work = {"inference_timeout_s": 0.1, "engine_stop_timeout_s": 1e-6}
    settings = Settings(variants={"telea": {}}, work=work)
    encoder = TextEncoderReplica(Variant(family="flux-fill", base="nowhere"), settings, Counters())
    encoder._loading._value = slow = SlowEncoder()
    first = asyncio.create_task(encoder.encode("a", 8))
    await asyncio.to_thread(slow.begun.wait)
    waiting = asyncio.create_task(encoder.encode("b", 8))
    with pytest.raises(InferenceTimeout, match=r"longer than 0\.1 s"):
        await first
    with pytest.raises(RuntimeError, match="encoding one prompt"):
        encoder.check_health()
    assert not waiting.done(), "it has waited for longer than the limit, and is not at fault"
    slow.let_go.set()
    assert await waiting == b"b"
    encoder.check_health()


# -- the composition root


def test_folders_are_those_of_the_folder_the_app_is_started_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = {"cache": "w", "lock": "lock.json", "mirror": "files:mirror"}
    settings = absolute(Settings(variants={"telea": {}}, blobs="files:b", jobs="sqlite:j.db", weights=weights))
    assert (settings.blobs, settings.jobs) == (f"files:{tmp_path}/b", f"sqlite:{tmp_path}/j.db")
    assert (settings.weights.cache, settings.weights.lock) == (tmp_path / "w", tmp_path / "lock.json")
    assert settings.weights.mirror == f"files:{tmp_path}/mirror"
    monkeypatch.chdir("/")
    assert absolute(settings) == settings


def test_what_is_no_folder_stays_as_it_is() -> None:
    settings = absolute(Settings(variants={"telea": {}}, blobs="memory:x", jobs="memory:x"))
    assert (settings.blobs, settings.jobs, settings.weights.mirror) == ("memory:x", "memory:x", None)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("black-forest-labs/FLUX.1-Fill-dev", "TextEncoder-FLUX.1-Fill-dev"),
        ("tiny:base", "TextEncoder-tiny-base"),
        ("/weights/my base", "TextEncoder-my-base"),
    ],
)
def test_a_text_encoder_is_called_as_its_base(base: str, name: str) -> None:
    assert text_encoder_name(base) == name


def test_variants_of_one_base_share_a_text_encoder() -> None:
    variants: dict[str, Any] = {"telea": {}, "Q4_0": {}, "Q8_0": {}, "tiny-Q8_0": {}}
    settings = Settings(variants=variants, messages={"url": "pubsub:"}, push={"enabled": False})
    assert deployment_names(settings) == [
        *("Ingress", "Inpainter-telea", "Inpainter-Q4_0", "Inpainter-Q8_0", "Inpainter-tiny-Q8_0"),
        *("TextEncoder-FLUX.1-Fill-dev", "TextEncoder-tiny-base"),
    ]


def built(settings: Settings) -> dict[str, Any]:
    """Every deployment below the ingress, by name."""
    found: dict[str, Any] = {}

    def visit(part: Any) -> None:
        if isinstance(part, serve.Application):
            deployment = part._bound_deployment
            found[deployment.name] = deployment
            visit([*deployment.init_args, *deployment.init_kwargs.values()])
        elif isinstance(part, Mapping):
            visit(list(part.values()))
        elif isinstance(part, list):
            for one in part:
                visit(one)

    visit(build(settings))
    return found


@pytest.mark.slow
def test_the_app_is_made_of_the_deployments_it_says() -> None:
    settings = load(CONFIG).settings
    assert set(built(settings)) == set(deployment_names(settings))
    cloud = settings.model_copy(update={"messages": settings.messages.model_copy(update={"url": "pubsub:"})})
    assert set(built(settings)) - set(built(cloud)) == {"PubSub"}


def test_a_variant_scales_as_its_settings_say() -> None:
    scaling = {"min_replicas": 1, "max_replicas": 9, "target_ongoing_requests": 1.5, "upscale_delay_s": 2.0}
    down = {"downscale_delay_s": 70.0, "downscale_to_zero_delay_s": 900.0}
    q8_0 = built(Settings(variants={"Q8_0": {**scaling, **down, "num_cpus": 3.0}}))["Inpainter-Q8_0"]
    found = q8_0._deployment_config.autoscaling_config
    assert {name: getattr(found, name) for name in (*scaling, *down)} == {**scaling, **down}
    assert q8_0.ray_actor_options == {"num_cpus": 3.0, "num_gpus": 1}
    # The next job's pixels are in the replica when the last one is done, also where an audit's cell is.
    assert q8_0.max_ongoing_requests == 2 + 1
    # A minute for each of the two jobs, and for each painting of the cell before them.
    assert q8_0._deployment_config.graceful_shutdown_timeout_s == 60 * (2 + 2)


def test_a_generator_has_a_deployment_of_its_own_and_may_need_a_text_encoder() -> None:
    generators: dict[str, Any] = {"fake": {"num_cpus": 0.1}, "tiny-flux-dev": {}, "sdxl": {"max_replicas": 3}}
    settings = Settings(variants={"telea": {}}, generators=generators)
    parts = built(settings)
    names = {"Inpainter-telea", "Generator-fake", "Generator-tiny-flux-dev", "Generator-sdxl"}
    assert (
        set(parts) == set(deployment_names(settings)) == {*names, "TextEncoder-tiny-flux-dev-base", "Ingress", "PubSub"}
    )
    assert parts["Generator-fake"].ray_actor_options == {"num_cpus": 0.1, "num_gpus": 0}
    assert parts["Generator-sdxl"].ray_actor_options["num_gpus"] == 1
    assert parts["Generator-sdxl"]._deployment_config.autoscaling_config.max_replicas == 3
    # No audit measures one: a picture being made, and one that waits.
    assert parts["Generator-sdxl"].max_ongoing_requests == 2
    assert parts["Generator-sdxl"]._deployment_config.graceful_shutdown_timeout_s == 60 * 2


def test_what_needs_no_gpu_takes_none_and_sleeps_by_default() -> None:
    parts = built(Settings(variants={"telea": {}, "tiny-Q4_0": {}}))
    for name in ("Inpainter-telea", "Inpainter-tiny-Q4_0", "TextEncoder-tiny-base"):
        assert parts[name].ray_actor_options["num_gpus"] == 0
        assert parts[name]._deployment_config.autoscaling_config.min_replicas == 0
    on_gpu = built(Settings(variants={"Q4_0": {}}, text_encoder={"num_gpus": 1, "max_replicas": 3}))
    encoder = on_gpu["TextEncoder-FLUX.1-Fill-dev"]
    assert encoder.ray_actor_options["num_gpus"] == 1
    assert encoder._deployment_config.autoscaling_config.max_replicas == 3


def test_the_ingress_does_not_autoscale_and_has_time_to_give_its_work_back() -> None:
    parts = built(Settings(variants={"telea": {"max_replicas": 80}}, ingress_replicas=1, work={"shutdown_grace_s": 30}))
    config = parts["Ingress"]._deployment_config
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 1)
    assert config.graceful_shutdown_timeout_s > 30
    # Pushes, bodies that are slow to come, and event streams together leave places for probes.
    assert config.max_ongoing_requests >= 162 + BODIES_AT_ONCE + 100 + 100
    assert config.user_config["variant"] == "telea"


# -- errors that cross Ray


def task_error(cause: Exception) -> RayTaskError:
    """As Ray raises it from a reference: an instance of the cause's class, too, where that can be."""
    error: RayTaskError = RayTaskError("paint", "Traceback ...", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    "cause", [OutOfMemory("no memory", device="cuda:0"), GpuLost("an ECC error"), VariantLoadFailed("no file")]
)
def test_the_applications_own_error_comes_out_of_rays_wrapper(cause: FluxFillError) -> None:
    with pytest.raises(FluxFillError) as caught, typed_errors("the replica"):
        raise task_error(cause)
    assert type(caught.value) is type(cause)
    assert (caught.value.message, caught.value.details) == (cause.message, cause.details)


def test_an_error_of_nobodys_comes_out_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"^size$") as caught, typed_errors("the replica"):
        raise task_error(ValueError("size"))
    assert type(caught.value) is ValueError


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ActorDiedError(), "ActorDiedError: The actor died"),
        (RayServeException("no replica"), "RayServeException: no replica"),
        (RayServeException(), "RayServeException: $"),
        (task_error(ObjectLostError("a" * 56, "127.0.0.1:1", "")), "ObjectLostError: "),
        (task_error(ActorDiedError()), "ActorDiedError: "),
    ],
)
def test_what_ray_itself_raises_is_a_lost_replica(error: Exception, told: str) -> None:
    with pytest.raises(ReplicaLost, match=f"^the replica is gone: {told}") as caught, typed_errors("the replica"):
        raise error
    assert "\n" not in caught.value.message


# -- painting through a handle


@serve.deployment
class Replica:
    """Streams what it is told to."""

    def __init__(self, events: list[Progress | Images | Measured | Exception]) -> None:
        self._events = events

    async def paint(self, request: EditRequest) -> AsyncIterator[Progress | Images | Measured]:
        for event in self._events:
            if isinstance(event, Exception):
                raise event
            yield event

    async def measure(self, request: EditRequest, trials: int, places: int) -> AsyncIterator[Any]:
        assert (trials, places) == (2, 1)
        for event in self._events:
            yield event

    async def status(self) -> Status:
        return Status("", {})


PICTURE = Images(images=[np.zeros((2, 2, 3), np.uint8)], busy_s=1.0)


MEASURED = Measured(canvas=PICTURE.images[0], trials=[], repeats=True, where={}, windows=[])


def handle_of(*events: Progress | Images | Measured | Exception) -> DeploymentHandle:
    return serve.run(Replica.bind(list(events)), _local_testing_mode=True)


async def paint(handle: DeploymentHandle) -> tuple[Images, list[Progress]]:
    progress: list[Progress] = []

    async def note(step: Progress) -> None:
        progress.append(step)

    model = RemoteModel("v", handle, VariantWatch({"v": handle}, {"v": "Inpainter-v"}))
    return await model.run(request(), note), progress


async def test_progress_and_the_picture_come_through_a_handle() -> None:
    steps = [Progress(step=n, steps=2) for n in range(3)]
    painted, progress = await paint(handle_of(*steps, PICTURE))
    assert (painted.busy_s, progress) == (1.0, steps)


async def test_a_stream_without_a_picture_is_an_error() -> None:
    with pytest.raises(PaintError, match="ended without a picture"):
        await paint(handle_of(Progress()))


@pytest.mark.parametrize("gone", [ActorDiedError(), ReplicaLost("it was preempted")])
async def test_a_replica_that_is_lost_before_it_begins_was_only_waited_for(gone: Exception) -> None:
    with pytest.raises(VariantNotReady, match="it had not started the job"):
        await paint(handle_of(gone))
    with pytest.raises(ReplicaLost):
        await paint(handle_of(Progress(), gone))


async def test_a_text_encoder_that_is_lost_was_only_waited_for() -> None:
    class Gone:
        def options(self, *, method_name: str) -> "Gone":
            return self

        async def remote(self, prompt: str, max_tokens: int) -> bytes:
            raise ActorDiedError()

    settings = Settings(variants={"tiny-Q4_0": {}})
    base = str(settings.variant("tiny-Q4_0").base)
    prompts = RemotePrompts({base: Gone()}, PromptCache(MemoryBlobStore("memory:prompts")), settings)
    with pytest.raises(VariantNotReady, match="text encoder"):
        await prompts.encode("tiny-Q4_0", "a cat")


@pytest.mark.parametrize("error", [VariantLoadFailed("variant v did not load"), GpuLost("an ECC error")])
async def test_a_variant_whose_replica_cannot_paint_is_asked_again(error: FluxFillError) -> None:
    handle = handle_of(error)
    watch = VariantWatch({"v": handle}, {"v": "Inpainter-v"})
    watch.states["v"] = VariantReadiness(state="ready")
    model = RemoteModel("v", handle, watch)
    assert model.is_ready
    with pytest.raises(type(error)):
        await model.run(request(), _ignore)
    assert not model.is_ready


async def _ignore(_: Progress) -> None: ...


async def test_a_cell_s_figures_come_through_a_handle_and_a_refusal_is_raised_here() -> None:
    told: list[Progress] = []

    async def note(step: Progress) -> None:
        told.append(step)

    async def measure(variant: str, *events: Progress | Measured | Exception) -> Measured:
        trials = RemoteTrials({"v": handle_of(*events)})
        return await trials.measure(variant, request(), note, trials=2, places=1)

    assert (await measure("v", Progress(step=1, steps=2), MEASURED)).repeats
    assert told == [Progress(step=1, steps=2)]
    with pytest.raises(ReplicaTaken, match=r"^audit cells in flight here: 1$"):
        await measure("v", ReplicaTaken("audit cells in flight here: 1"))
    with pytest.raises(UnknownVariant, match=r"^variant 'w' is not served here; there are v$"):
        await measure("w", MEASURED)


# -- readiness


WHERE = {"replica": "r", "node": "n", "pid": 1}


class Answers:
    """A handle of Ray's whose replica answers `status` so."""

    def __init__(self, *answers: str | Exception | None) -> None:
        #: None never comes; the last one stays.
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))
        self.asked = 0

    def options(self, *, method_name: str) -> "Answers":
        assert method_name == "status"
        return self

    async def remote(self) -> Status:
        self.asked += 1
        answer = next(self._answers)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return Status(str(answer), WHERE)


def overview(
    *replicas: ReplicaState, status: DeploymentStatus = DeploymentStatus.HEALTHY, message: str = ""
) -> DeploymentStatusOverview:
    counts = dict.fromkeys(ReplicaState, 0) | {state: replicas.count(state) for state in replicas}
    return DeploymentStatusOverview(status, DeploymentStatusTrigger.AUTOSCALING, counts, message)


RUNNING, STARTING, STOPPING = ReplicaState.RUNNING, ReplicaState.STARTING, ReplicaState.STOPPING


@pytest.mark.parametrize(
    ("seen", "answer", "state", "error"),
    [
        (None, "", "starting", ""),
        (overview(), "", "scaled_to_zero", ""),
        (overview(STOPPING), "", "scaled_to_zero", ""),
        (overview(STARTING), "", "starting", ""),
        (overview(STARTING, STOPPING), "", "starting", ""),
        (overview(RUNNING), "", "ready", ""),
        (overview(RUNNING, STARTING), "", "ready", ""),
        (overview(RUNNING), "no file", "failed", "no file"),
        (overview(status=DeploymentStatus.DEPLOY_FAILED, message="no such class"), "", "failed", "no such class"),
        (overview(STARTING, status=DeploymentStatus.UNHEALTHY, message="it died"), "", "failed", "it died"),
        (overview(RUNNING, status=DeploymentStatus.UNHEALTHY, message="one died"), "", "ready", ""),
    ],
)
async def test_a_variants_state(seen: DeploymentStatusOverview | None, answer: str, state: str, error: str) -> None:
    metrics = Counters()
    watch = VariantWatch({"v": Answers(answer)}, {"v": "Inpainter-v"}, metrics)
    assert watch.states["v"].state == "starting"
    await watch._look("v", seen)
    where = WHERE if answer or state == "ready" else {}
    assert watch.states["v"] == VariantReadiness(state=state, error=error, where=where)
    assert metrics.values["fluxfill_variant_ready", "v"] == [state in ("ready", "scaled_to_zero")]


async def test_a_ready_variant_is_not_asked_again_so_that_it_may_sleep() -> None:
    answers = Answers("")
    watch = VariantWatch({"v": answers}, {"v": "Inpainter-v"})
    for _ in range(3):
        await watch._look("v", overview(RUNNING))
    assert (watch.states["v"].state, answers.asked) == ("ready", 1)
    await watch._look("v", overview())
    await watch._look("v", overview(RUNNING))
    assert answers.asked == 2


async def test_a_failed_variant_is_asked_until_it_has_loaded() -> None:
    watch = VariantWatch({"v": Answers("no file", "no file", "")}, {"v": "Inpainter-v"})
    states = []
    for _ in range(3):
        await watch._look("v", overview(RUNNING))
        states.append(watch.states["v"].state)
    assert states == ["failed", "failed", "ready"]


async def test_a_ready_variant_in_doubt_is_asked_again() -> None:
    watch = VariantWatch({"v": Answers("", "no file")}, {"v": "Inpainter-v"})
    await watch._look("v", overview(RUNNING))
    watch.doubt("v")
    assert watch.states["v"].state == "starting"
    await watch._look("v", overview(RUNNING))
    assert watch.states["v"] == VariantReadiness(state="failed", error="no file", where=WHERE)


async def test_a_replica_too_busy_to_answer_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "ANSWER_S", 0.01)
    watch = VariantWatch({"v": Answers(None)}, {"v": "Inpainter-v"})
    await watch._look("v", overview(RUNNING))
    assert watch.states["v"].state == "ready"


@pytest.mark.parametrize(
    ("ingresses", "stops"), [([RUNNING], False), ([RUNNING, STOPPING], True), (None, True)], ids=["no", "one", "gone"]
)
async def test_an_ingress_that_stops_is_noticed(
    ingresses: list[ReplicaState] | None, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployments = {"Inpainter-v": overview(), **({} if ingresses is None else {"Ingress": overview(*ingresses)})}
    status = SimpleNamespace(applications={"app": SimpleNamespace(deployments=deployments)})
    monkeypatch.setattr(serve, "status", lambda: status)
    here = SimpleNamespace(app_name="app", deployment="Ingress")
    monkeypatch.setattr(serve, "get_replica_context", lambda: here)
    watch = VariantWatch({"v": Answers("")}, {"v": "Inpainter-v"}, Counters())
    watch.is_stopping = not stops
    watching = asyncio.create_task(watch.run())
    await until(lambda: watch.is_stopping == stops)
    watching.cancel()


# -- the demo


def pixels_of(path: Path) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def test_the_demos_grown_mask_covers_its_leash_and_the_drawn_one_does_not(tmp_path: Path) -> None:
    from skimage import data

    original, mask = demo.draw_leash(tmp_path / "new")
    changed = np.abs(pixels_of(original) - data.cat().astype(np.int16)).max(axis=-1) > 40
    drawn = np.asarray(Image.open(mask))
    assert set(np.unique(drawn)) == {0, 255}
    assert changed.sum() > 1000
    assert changed[drawn == 0].sum() > 100
    assert not changed[grow(drawn, growth_px(drawn, WindowSettings().mask_grow)) == 0].any()
    assert 0.01 < (drawn > 0).mean() < 0.1


def test_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    colours = {"original": (200, 0, 0), "telea": (0, 200, 0), "tiny": (0, 0, 200)}
    pictures = {name: tmp_path / f"{name}.png" for name in colours}
    for name, colour in colours.items():
        Image.new("RGB", (40, 30), colour).save(pictures[name])
    demo.before_after(pictures, tmp_path / "sheet.png")
    sheet = pixels_of(tmp_path / "sheet.png")
    places = [np.argwhere((sheet == colour).all(axis=-1)) for colour in colours.values()]
    assert [len(place) for place in places] == [40 * 30] * 3
    left = [int(place[:, 1].min()) for place in places]
    assert left == sorted(left)
    assert (sheet[: places[0][:, 0].min()] < 128).any(), "no name stands above the pictures"


def test_the_demo_keeps_out_of_a_running_apps_way(tmp_path: Path) -> None:
    mine, theirs = load(demo.config_beside(CONFIG, tmp_path)), load(CONFIG)
    assert mine.port != theirs.port
    assert mine.settings.messages.url != theirs.settings.messages.url
    assert mine.settings.blobs == f"files:{tmp_path}/store/blobs"
    assert mine.settings.jobs == f"sqlite:{tmp_path}/store/jobs.db"
    assert mine.settings.variants == theirs.settings.variants


def test_a_ray_of_ones_own_has_a_token_of_its_own() -> None:
    first, second = own_ray.ray_environment(), own_ray.ray_environment()
    assert first["RAY_AUTH_MODE"] == "token"
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


# -- pushes in hand


@pytest.mark.slow
async def test_a_broker_whose_port_is_taken_says_so_and_starts_when_it_is_free() -> None:
    with EmbeddedPubSub("127.0.0.1", 0) as other:
        settings = MessagesSettings(url=f"embedded://{other.address}")
        handle = serve.run(serve.deployment(PubSub).bind(settings), _local_testing_mode=True)
        watch = BrokerWatch(handle)
        assert "not started" in watch.error
        watching = asyncio.create_task(watch.run())
        await until(lambda: "not started" not in watch.error)
        assert other.address in watch.error and "messages.url" in watch.error
        assert not watch.listens.is_set(), "what another program's server has is not ours to pull"
    await until(watch.listens.is_set)
    assert watch.error == ""
    watching.cancel()


async def test_a_broker_elsewhere_is_not_asked() -> None:
    watch = BrokerWatch(None)
    watching = asyncio.create_task(watch.run())
    await until(watch.listens.is_set)
    assert watch.error == ""
    watching.cancel()


async def test_a_push_goes_on_when_its_sender_hangs_up() -> None:
    go, done = asyncio.Event(), asyncio.Event()

    async def work() -> Verdict:
        await go.wait()
        done.set()
        return Verdict(action="ack")

    pushes = Pushes(1, response_timeout_s=60)
    sender = asyncio.create_task(pushes.run(work()))
    await asyncio.sleep(0)
    sender.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sender
    with pytest.raises(Unavailable, match="1 pushes"):
        await pushes.run(work())
    go.set()
    await done.wait()


async def test_the_end_waits_for_pushes_then_cancels_them() -> None:
    started, canceled = asyncio.Event(), asyncio.Event()

    async def work() -> Verdict:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            canceled.set()
        raise AssertionError("nobody sets it")

    pushes = Pushes(1, response_timeout_s=60)
    sender = asyncio.create_task(pushes.run(work()))
    await started.wait()
    await pushes.end(grace_s=0)
    assert canceled.is_set()
    with pytest.raises(asyncio.CancelledError):
        await sender


async def test_a_push_that_takes_long_is_answered_in_time_and_worked_on() -> None:
    pushes, go_on = Pushes(1, response_timeout_s=0.01), asyncio.Event()
    done: list[str] = []

    async def work() -> Verdict:
        await go_on.wait()
        done.append("stored")
        return Verdict(action="ack")

    verdict = await pushes.run(work())
    assert (verdict.action, verdict.reason, done) == ("defer", "running", [])
    go_on.set()
    await pushes.end(grace_s=10)
    assert done == ["stored"]


@pytest.mark.slow
def test_production_wants_rays_ports_to_ask_for_a_token() -> None:
    check_ray_token()
    # Ray reads its environment once in a process.
    command = [sys.executable, "-c", "from deployments.ingress import check_ray_token; check_ray_token()"]
    ran = subprocess.run(command, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True)
    assert "SettingsError: in production Ray must run with RAY_AUTH_MODE=token" in ran.stderr
