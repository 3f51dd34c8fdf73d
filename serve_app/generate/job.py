"""One attempt at a job of pictures: those that are not stored yet, one by one, each stored and recorded as it lands."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .. import tracing
from ..blobs import BlobStore
from ..edit.job import begun_within, encode_within, seed_of
from ..edit.outputs import Outputs, Painting
from ..errors import MalformedMessage, StaleClaim, StoreUnavailable
from ..jobs.kinds import Asked, Attempt, Caller, Result
from ..jobs.record import Artifact, Job, State, Timings
from ..models import GenerateRequest, ImageModel, Images, Progress, PromptEncoder
from ..parameters import CONTENT_TYPES, GenerateParameters, JobType
from ..settings import Settings
from . import pictures
from .loras import Loras
from .request import GenerateBody, resolved

#: Of an artifact.
ROLE = "image"
#: Seeds are below this.
_SEEDS = 2**63

#: By stage, over all pictures.
_Seconds = defaultdict[str, float]


class Generation:
    """The kind of job that makes pictures from a prompt."""

    type: JobType = "generate"
    event = "generate"

    def __init__(
        self,
        *,
        blobs: BlobStore,
        models: Mapping[str, ImageModel[GenerateRequest]],
        prompts: PromptEncoder,
        loras: Loras,
        settings: Settings,
    ) -> None:
        """`models` by name."""
        self._blobs, self._models, self._prompts, self._loras, self._settings = blobs, models, prompts, loras, settings
        self._outputs = Outputs(blobs, upload_s=settings.work.upload_timeout_s)

    def read(self, data: bytes) -> Asked:
        raise MalformedMessage("attributes.jobId: a job of this type is posted first", field="attributes.jobId")

    async def new_job(self, asked: Asked, *, variant: str, idempotency_key: str | None) -> Job:
        raise AssertionError("its messages name stored jobs")

    async def post(self, body: Mapping[str, Any], caller: Caller, *, job_id: str) -> Job:
        asked = GenerateBody.model_validate(body)
        loras = [await self._loras.get(one.id, caller) for one in asked.loras]
        model, parameters = resolved(asked, self._settings, loras)
        seed = seed_of(job_id) if asked.seed is None else asked.seed
        return Job(id=job_id, variant=model, parameters=parameters, seed=seed)

    def inputs(self, job: Job) -> Sequence[str]:
        return ()

    def outputs(self, job: Job) -> Sequence[str]:
        return [self._path(job, index) for index in range(_asked(job).count)]

    async def run(self, job: Job, attempt: Attempt) -> Result:
        """Make what `job` lacks. What an earlier attempt has stored is not made again.

        Raises what the model, the text encoder and the store raise; InferenceTimeout; and what `attempt.confirm`
        raises.
        """
        await self._outputs.check_writable()
        asked, seconds, gpu_ms = _asked(job), _Seconds(float), None
        embeddings = await self._embeddings(job, seconds)
        artifacts = list(job.artifacts)
        stored = {artifact.index for artifact in artifacts}
        for index in range(asked.count):
            if index in stored:
                continue
            request = _request(job, index, embeddings)
            painting = self._outputs.kept(job, [str(index)]) or await self._make(request, job, index, attempt)
            artifacts.append(await self._store(job, request, index, painting, attempt, seconds))
            for stage, spent_s in painting.seconds.items():
                seconds[stage] += spent_s
            gpu_ms = gpu_ms if painting.gpu_ms is None else (gpu_ms or 0.0) + painting.gpu_ms
        return Result(artifacts=tuple(artifacts), timings=Timings(**seconds, gpu_ms=gpu_ms))

    def document(self, job: Job) -> Mapping[str, Any]:
        return {
            "jobId": job.id,
            "status": job.status.value,
            "error": job.error and job.error.model_dump(),
            "artifacts": [{"path": one.path, "index": one.index, "seed": one.seed} for one in job.artifacts],
        }

    async def _embeddings(self, job: Job, seconds: _Seconds) -> bytes | None:
        started = time.perf_counter()
        wait_s = self._settings.work.replica_wait_s
        embeddings = await encode_within(self._prompts, job.variant, _asked(job).prompt, wait_s)
        seconds["prepare_s"] += time.perf_counter() - started
        return embeddings

    async def _make(self, request: GenerateRequest, job: Job, index: int, attempt: Attempt) -> Painting:
        asked, work, started = _asked(job), self._settings.work, time.perf_counter()

        async def all_in_all(progress: Progress) -> None:
            done = index * asked.steps + progress.step
            await attempt.on_progress(Progress(step=done, steps=asked.count * asked.steps))

        run = partial(self._models[job.variant].run, request)
        wait_s = work.replica_wait_s
        made = await begun_within(work.inference_timeout_s, job.variant, run, all_in_all, wait_s=wait_s)
        ended = time.perf_counter()
        encoded = partial(pictures.encode, made.images[0], asked.format, _about(job, request, made))
        with tracing.span("encode"):
            data = await asyncio.get_running_loop().run_in_executor(attempt.pool, encoded)
        seconds = {
            "engine_s": made.busy_s,
            "wait_s": max(0.0, ended - started - made.busy_s),
            "encode_s": time.perf_counter() - ended,
        }
        file = (data, CONTENT_TYPES[asked.format])
        return Painting(files={ROLE: file}, seconds=seconds, gpu_ms=made.gpu_ms)

    async def _store(
        self, job: Job, request: GenerateRequest, index: int, painting: Painting, attempt: Attempt, seconds: _Seconds
    ) -> Artifact:
        started = time.perf_counter()
        path = self._path(job, index)
        try:
            (written,) = await self._outputs.store(painting, {ROLE: path}, {ROLE: ""}, attempt.confirm)
        except StoreUnavailable:
            self._outputs.keep(job, [str(index)], painting)
            raise
        size = {"width": request.width, "height": request.height}
        artifact = written.model_copy(update={"index": index, "seed": request.seed, **size})
        try:
            await attempt.record(artifact)
        except StaleClaim as e:
            if e.details["status"] in (None, State.CANCELED):
                # Perhaps it was deleted, with its pictures, before this one was there.
                await self._blobs.delete(path)
            raise
        seconds["upload_s"] += time.perf_counter() - started
        return artifact

    def _path(self, job: Job, index: int) -> str:
        """The same in every attempt: its time is the job's, not the picture's."""
        asked = _asked(job)
        name = f"{job.created_at:%Y%m%dT%H%M%S}_{index}_{asked.width}x{asked.height}_{_seed(job, index)}"
        return f"{self._settings.api.prefix}/jobs/{job.id}/generate/{name}.{asked.format}"


def _request(job: Job, index: int, embeddings: bytes | None) -> GenerateRequest:
    asked = _asked(job)
    return GenerateRequest(
        job_id=job.id,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        width=asked.width,
        height=asked.height,
        steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        seed=_seed(job, index),
        scheduler=asked.scheduler,
        traceparent=tracing.traceparent(job.traceparent),
        embeddings=embeddings,
        loras=asked.loras,
    )


def _seed(job: Job, index: int) -> int:
    return (job.seed + index) % _SEEDS


def _about(job: Job, request: GenerateRequest, made: Images) -> Mapping[str, Any] | None:
    """What another run needs to make the same picture, and which versions did."""
    asked = _asked(job)
    if not asked.embed_metadata:
        return None
    what = {"prompt", "negative_prompt", "steps", "guidance_scale", "scheduler"}
    said = asked.model_dump(include=what, exclude_none=True)
    if asked.loras:
        which = {"name", "sha256", "alpha", "scale"}
        said["loras"] = [one.model_dump(include=which, exclude_none=True) for one in asked.loras]
    versions = made.where.get("versions", {})
    return {**said, "seed": request.seed, "model": job.variant, "software": "flux-fill-serve", "versions": versions}


def _asked(job: Job) -> GenerateParameters:
    assert isinstance(job.parameters, GenerateParameters), "the worker gives each kind its own jobs"
    return job.parameters
