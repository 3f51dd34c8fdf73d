"""An audit over memory stores and real engines in this process, without Ray: counts and memory are scripted."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.adapters.memory import MemoryBlobStore, MemoryJobStore
from serve_app.adapters.stores.sql import SqlJobStore
from serve_app.audit.files import read_cells
from serve_app.audit.record import Audit, CellResult, CompileVerdict
from serve_app.audit.replicas import ReplicaCounts
from serve_app.audit.run import Auditor, Pace
from serve_app.audit.store import AuditStore
from serve_app.blobs import ANY_VERSION, BlobInfo
from serve_app.edit.session import session_path
from serve_app.engine import Engine
from serve_app.engine.slot import Slot
from serve_app.engine.trials import measuring
from serve_app.jobs import lease
from serve_app.jobs.ports import JobStore
from serve_app.jobs.record import Job
from serve_app.models import EditRequest, Measured, OnProgress, PromptEncoder
from serve_app.parameters import AuditRequest, Matrix
from serve_app.settings import Settings

from .rig import SESSION, USER, Clock, Prompts, Scripted, jpeg, line_mask, photo, png

#: Every wait as short as it can be.
QUICK = Pace(
    lease=lease.Pace(cancel_poll_s=0.05, progress_s=0.05),
    write_s=0.02,
    handover_poll_s=0.01,
    again_s=0.01,
    outage_s=0.5,
)


async def until(condition: Callable[[], bool]) -> None:
    """Returns when it is true; the test's own time limit ends it otherwise."""
    while not condition():
        await asyncio.sleep(0.005)


#: Of the cells of a run as `AuditRig.queued` makes it.
NAMES = ["a_gs2", "a_gs4", "b_gs2", "b_gs4"]


class Replica:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.slot = engine, Slot()
        self.in_hand = 0


class LocalReplicas:
    """The Replicas port over engines of this process, as many as a variant has replicas."""

    def __init__(self, engines: Mapping[str, Sequence[Engine]]) -> None:
        self._replicas = {name: [Replica(engine) for engine in own] for name, own in engines.items()}
        self.gpu_count = 0
        #: Raised, one by one, once the engine has begun with a cell of that name; `None` lets one pass.
        self.errors: dict[str, list[Exception]] = {}
        #: Names of the cells that replicas took, in order; `(name, places)` of all that were asked for.
        self.begun: list[str] = []
        self.asked: list[tuple[str, int]] = []
        #: Looks for which a variant's replicas stay when nothing is painted on them any more, and None for ever.
        self.linger: dict[str, int | None] = {}
        self.awake: dict[str, int | None] = {}
        #: Used by nobody here, and by each variant that is awake.
        self.memory_bytes: tuple[int, int] | None = None
        #: What was awake whenever a cell began.
        self.beside: list[tuple[str, frozenset[str]]] = []

    def in_hand(self, variant: str) -> int:
        return sum(replica.in_hand for replica in self._replicas[variant])

    def slot(self, variant: str) -> Slot:
        """The first replica's."""
        return self._replicas[variant][0].slot

    async def measure(
        self, variant: str, request: EditRequest, on_progress: OnProgress, *, trials: int, places: int
    ) -> Measured:
        name = request.job_id.rpartition("/")[2]
        self.asked.append((name, places))
        self.awake[variant] = self.linger.get(variant, 0)
        replica = min(self._replicas[variant], key=lambda one: one.in_hand)
        replica.in_hand += 1
        try:
            cell = measuring(replica.engine, request, replica.slot, trials, places)
            async with aclosing(cell) as events:
                return await self._followed(name, variant, events, on_progress)
        finally:
            replica.in_hand -= 1

    async def _followed(self, name: str, variant: str, events: AsyncIterator[Any], on_progress: OnProgress) -> Measured:
        has_begun = False
        async for event in events:
            if isinstance(event, Measured):
                return event
            if not has_begun:
                has_begun = True
                self.begun.append(name)
                self.beside.append((variant, frozenset(self.awake)))
            if self.errors.get(name):
                raise self.errors[name].pop(0)
            await on_progress(event)
        raise AssertionError("measuring ends with what was measured, or raises")

    async def counts(self) -> Mapping[str, ReplicaCounts]:
        for name in [name for name in self.awake if not self.in_hand(name)]:
            left = self.awake[name]
            if left == 0:
                del self.awake[name]
            elif left is not None:
                self.awake[name] = left - 1
        return {
            name: ReplicaCounts(running=len(own) if name in self.awake else 0) for name, own in self._replicas.items()
        }

    async def gpus(self) -> int:
        return self.gpu_count

    async def memory_used_bytes(self) -> Mapping[str, int]:
        if self.memory_bytes is None:
            return {}
        nobody, each = self.memory_bytes
        return {"node/0": nobody + each * len(self.awake)}


class WatchedBlobs:
    """A blob store that calls `before` with each call's method and path; what that raises, the call raises."""

    def __init__(self, inner: MemoryBlobStore) -> None:
        self._inner = inner
        self.before: Callable[[str, str], None] = lambda method, path: None

    async def head(self, path: str) -> BlobInfo:
        self.before("head", path)
        return await self._inner.head(path)

    async def get(self, path: str, *, max_bytes: int) -> tuple[bytes, BlobInfo]:
        self.before("get", path)
        return await self._inner.get(path, max_bytes=max_bytes)

    async def put(self, path: str, data: bytes, *, content_type: str, if_version: str = ANY_VERSION) -> BlobInfo:
        self.before("put", path)
        return await self._inner.put(path, data, content_type=content_type, if_version=if_version)

    async def delete(self, path: str) -> None:
        self.before("delete", path)
        await self._inner.delete(path)

    async def link(self, path: str, *, expires_s: int) -> str:
        return await self._inner.link(path, expires_s=expires_s)

    async def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        self.before("list", prefix)
        async for info in self._inner.list(prefix):
            yield info


class WatchedJobs:
    """A job store, with `before` as WatchedBlobs has it. The path is the job's id."""

    def __init__(self, inner: JobStore) -> None:
        self._inner = inner
        self.before: Callable[[str, str], None] = lambda method, path: None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.before(name, str(args[0]) if args else "")
            return await method(*args, **kwargs)

        return call


def job_store_at(url: str, clock: Clock) -> JobStore:
    """One whose time is the clock's."""
    return SqlJobStore(url, clock) if url.startswith("sqlite:") else MemoryJobStore(url, clock)


def scripted(*names: str, num_gpus: int = 0, **served: Any) -> dict[str, Any]:
    """Variants for settings whose engines are `Scripted`."""
    return {name: {"definition": {"family": "telea", "num_gpus": num_gpus}, **served} for name in names}


@dataclass
class AuditRig:
    """One job's auditor; `beside()` makes another over the same stores, as a resumed job has it."""

    variants: dict[str, Any] = field(default_factory=lambda: scripted("a", "b"))
    audit: dict[str, Any] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)
    #: Further settings.
    more: dict[str, Any] = field(default_factory=dict)
    engines: Mapping[str, Sequence[Engine]] = field(default_factory=dict)
    prompts: PromptEncoder = field(default_factory=Prompts)
    clock: Clock = field(default_factory=Clock)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    #: Of the job store; one in memory when left out.
    jobs_url: str = ""
    pace: Pace = QUICK

    def __post_init__(self) -> None:
        url = f"memory:{self.name}"
        given = {"variants": self.variants, "audit": self.audit, "work": self.work, **self.more}
        self.settings = Settings(blobs=url, jobs=self.jobs_url or url, **given)
        self.plain = MemoryBlobStore(url, "http://127.0.0.1:8000")
        self.blobs = WatchedBlobs(self.plain)
        self.plain_jobs = job_store_at(self.settings.jobs, self.clock)
        self.jobs = WatchedJobs(self.plain_jobs)
        self.store = AuditStore(self.plain_jobs, self.plain)
        self.scripted = {name: [Scripted()] for name in self.variants if name not in self.engines}
        self.replicas = LocalReplicas({**self.scripted, **self.engines})
        self.compiled: list[tuple[str, EditRequest]] = []
        self.auditor = Auditor(
            job_store=self.jobs,
            blobs=self.blobs,
            replicas=self.replicas,
            prompts=self.prompts,
            settings=self.settings,
            compiler=self._compile,
            clock=self.clock,
            pace=self.pace,
        )

    def beside(self) -> "AuditRig":
        return replace(self)

    async def _compile(self, name: str, request: EditRequest) -> CompileVerdict:
        self.compiled.append((name, request))
        return CompileVerdict(variant=name, viable=False, verdict="nothing to compile")

    async def put_session(self) -> None:
        await self.plain.put(session_path(USER, SESSION, "original.jpg"), jpeg(photo()), content_type="image/jpeg")
        await self.put_mask(png(line_mask()))

    async def put_mask(self, data: bytes) -> None:
        await self.plain.put(session_path(USER, SESSION, "mask_auto.png"), data, content_type="image/png")

    async def queued(self, **fields: Any) -> Audit:
        """A stored run: all variants, two guidance scales, four steps, unless `fields` say otherwise."""
        return await self.store.create(self.request(**fields), "run")

    def request(self, **fields: Any) -> AuditRequest:
        axes = {"variants": tuple(self.variants), "guidance_scales": (2.0, 4.0), "steps": (4,)}
        matrix = Matrix(**{**axes, **fields.pop("matrix", {})})
        return AuditRequest(user_id=USER, session_id=SESSION, matrix=matrix, **fields)

    async def run(self, **fields: Any) -> Audit:
        await self.put_session()
        audit = await self.queued(**fields)
        return await self.auditor.run(audit.id, audit.attempt)

    async def resume(self) -> Audit:
        """By another job, after this one has died."""
        self.clock.advance(3600)
        audit = await self.store.resume("run")
        return await self.auditor.run(audit.id, audit.attempt)

    async def cells(self) -> dict[str, CellResult]:
        return await read_cells(self.plain, "run")

    def stored_job(self) -> Job:
        """Of the run, in a job store in memory."""
        assert isinstance(self.plain_jobs, MemoryJobStore)
        return self.plain_jobs._content.jobs["run"]

    async def paths(self) -> list[str]:
        return [info.path async for info in self.plain.list("audit/run")]
