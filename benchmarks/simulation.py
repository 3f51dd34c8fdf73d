"""The app in SimPy: messages, ingresses, the replicas of one variant on their nodes, and their number.

The settings are the app's own, and so is its autoscaling policy, `serve_app.jobs.backlog`. The delays, and what happens
without that policy, are Ray Serve's. Not simulated: attempts that fail by themselves, priorities, several variants,
jobs that wait for a replica for longer than `work.replica_wait_s`.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import simpy
from ray.serve._private.constants import RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR
from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _get_cold_start_scale_up_replicas,
    replica_queue_length_autoscaling_policy,
)
from ray.serve.config import AutoscalingConfig

from deployments.scaling import REPORT_S
from serve_app.adapters.pubsub.source import PULL_S
from serve_app.jobs.backlog import Reading, Recent, Replicas, Report, together, wanted
from serve_app.settings import Scaling, Settings

from .burst import Sample

Steps = Generator[simpy.Event, Any, None]
Draw = Callable[[Random], float]
Decide = Callable[["App"], int]

#: Photos that an ingress decodes or encodes at a time: `serve_app.jobs.worker.pixel_pool`.
PIXEL_THREADS = 2
#: Between two samples of Cloud Monitoring, and how late one is seen; seconds.
SAMPLED_S, LATE_S = 60.0, (120.0, 240.0)
#: KEDA's pollingInterval, and the Horizontal Pod Autoscaler's stabilization window, by default; seconds.
POLL_S, STABLE_S = 30.0, 300.0
#: A moment at which the simulation begins, in seconds since 1970: 0 would be no moment to Ray.
BEGINS_AT = 1_800_000_000.0
#: Why a replica is interrupted: its node was lost. Otherwise it is to stop.
_LOST = object()


def log_normal(median: float, p95: float) -> Draw:
    sigma = math.log(p95 / median) / 1.645
    return lambda random: random.lognormvariate(math.log(median), sigma)


def constant(value: float) -> Draw:
    return lambda random: value


def day(random: Random, jobs: int, *, swing: float, bursts: int, burst_share: float, burst_s: float) -> list[float]:
    """When the messages of a day are published, in seconds from its midnight: most of them in a sine with its lowest at
    03:00, `swing` of the mean below it, and a share of all in bursts at random moments."""
    sudden = round(jobs * burst_share)
    moments: list[float] = []
    while len(moments) < jobs - sudden:
        at_s = random.uniform(0, 86_400)
        if random.uniform(0, 1 + swing) < 1 - swing * math.cos(2 * math.pi * (at_s - 3 * 3600) / 86_400):
            moments.append(at_s)
    starts = [random.uniform(0, 86_400 - burst_s) for _ in range(bursts)]
    moments += [starts[i % bursts] + random.uniform(0, burst_s) for i in range(sudden)]
    return sorted(moments)


def steady(random: Random, per_hour: float, hours: float) -> list[float]:
    """Moments of messages that come independently of each other."""
    moments, at_s = list[float](), 0.0
    while (at_s := at_s + random.expovariate(per_hour / 3600)) < hours * 3600:
        moments.append(at_s)
    return moments


@dataclass(eq=False, slots=True)
class Job:
    published_s: float
    engine_s: float
    #: Succeeds with whether it was painted: its replica may be lost.
    painted: simpy.Event | None = None


@dataclass(eq=False, slots=True)
class Replica:
    asked_s: float
    life: simpy.Process | None = None
    job: Job | None = None
    is_running: bool = False
    is_stopping: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the simulation is told. Draws give seconds."""

    settings: Settings
    #: A replica's work on a job.
    job_s: Draw
    #: From the wish for a replica until it runs: on a new node, and on one that stands by.
    start_s: Draw
    warm_start_s: Draw
    #: Of an ingress's pixel thread for each job, before and after painting, and of anything else that takes no thread.
    decode_s: float = 0.0
    encode_s: float = 0.0
    stores_s: float = 0.0
    #: How long a node stands by before it is given up.
    standby_s: float = 300.0
    #: Spot nodes lost an hour, each.
    losses_per_hour: float = 0.0
    #: What Cloud Monitoring says; None: nothing.
    reads: "Callable[[App], Reading | None]" = field(default=lambda app: app.monitored())
    #: Replicas that run from the start.
    running: int = 0
    #: Between two turns of Serve's controller: 0.1 s in truth.
    turn_s: float = 2.0

    @property
    def name(self) -> str:
        return next(iter(self.settings.variants))

    @property
    def scaling(self) -> Scaling:
        return self.settings.variants[self.name]


class LookBack:
    """A deployment's requests as Serve's controller knows them: its handle records and reports them from time to time,
    and their mean counts."""

    def __init__(self, env: simpy.Environment, config: AutoscalingConfig, requests: Callable[[], float]) -> None:
        self._env, self._config, self._requests = env, config, requests
        self._recorded: deque[tuple[float, float]] = deque()
        self._reported: list[tuple[float, float]] = []
        env.process(self._record())
        env.process(self._report())

    def tell(self) -> None:
        """At once, as a handle does whose deployment has no replica."""
        self._recorded.append((self._env.now, self._requests()))
        self._reported = list(self._recorded)[-1:]

    def mean(self) -> float:
        now = self._env.now
        if not self._reported:
            return 0.0
        ends = [at_s for at_s, _ in self._reported[1:]] + [max(now, self._reported[-1][0] + 1e-3)]
        parts = zip(self._reported, ends, strict=True)
        return sum(value * (end - at_s) for (at_s, value), end in parts) / (ends[-1] - self._reported[0][0])

    def _record(self) -> Steps:
        factor = RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR
        every_s = min(factor * self._config.look_back_period_s, self._config.metrics_interval_s)
        while True:
            self._recorded.append((self._env.now, self._requests()))
            while self._recorded[0][0] < self._env.now - self._config.look_back_period_s:
                self._recorded.popleft()
            yield self._env.timeout(every_s)

    def _report(self) -> Steps:
        while True:
            self._reported = list(self._recorded)
            yield self._env.timeout(self._config.metrics_interval_s)


class App:
    """One run. `decide` says how many replicas there should be, each time that Serve's controller turns."""

    def __init__(self, model: Model, decide: Decide, published_s: Sequence[float], seed: int = 0) -> None:
        self.model, self._decide, self.env = model, decide, simpy.Environment()
        self._starts, self._losses, self._samples = Random(f"starts {seed}"), Random(f"losses {seed}"), Random(seed)
        work = Random(f"work {seed}")
        self._jobs = [Job(at_s, model.job_s(work)) for at_s in published_s]
        scaling = model.scaling.model_dump(include=Scaling.model_fields.keys() - {"num_cpus"})
        self.config = AutoscalingConfig(**scaling)
        #: With the broker; the oldest first.
        self._waiting: deque[Job] = deque()
        #: In flight; the oldest first.
        self._held: dict[Job, None] = {}
        self._places = model.settings.in_flight() * model.settings.ingress_replicas
        self._pulled_at = 0.0
        self._threads = simpy.Resource(self.env, PIXEL_THREADS * model.settings.ingress_replicas)
        self._ready: simpy.Store = simpy.Store(self.env)
        self._requests = 0
        self._replicas = [Replica(0.0) for _ in range(model.running)]
        #: Nodes without a replica: since when each was asked for, and until when it stands by.
        self._standby: list[tuple[float, float]] = []
        self.target = model.running
        self.requests = LookBack(self.env, self.config, lambda: self._requests)
        self.state: dict[str, Any] = {}
        self._recent = Recent()
        self._monitored: deque[tuple[float, Reading]] = deque()
        self.reading: Reading | None = None
        self._reported = self._report()
        #: Of jobs, in seconds from publication to the end.
        self.latencies_s: list[float] = []
        #: Of nodes, and of work on jobs; those of the nodes that are gone.
        self.node_s = self.busy_s = self._gone_s = 0.0
        self.lost = self.most_nodes = 0
        self.series: list[Sample] = []

    def run(self, for_s: float, then_s: float = 0.0) -> "App":
        """For so long, which `node_s` counts, and then on, for jobs that are left."""
        for replica in self._replicas:
            self._start(replica, 0.0)
        for work in (self._publish(), self._watch(), self._tell(), self._turn()):
            self.env.process(work)
        self.env.run(for_s)
        self.node_s = self._gone_s + sum(for_s - replica.asked_s for replica in self._replicas)
        self.node_s += sum(min(for_s, until) - asked_s for asked_s, until in self._standby)
        if then_s:
            self.env.run(for_s + then_s)
        self.for_s = for_s
        return self

    @property
    def now(self) -> float:
        """In seconds since 1970."""
        return BEGINS_AT + self.env.now

    @property
    def running(self) -> int:
        return sum(replica.is_running and not replica.is_stopping for replica in self._replicas)

    @property
    def messages(self) -> int:
        return len(self._waiting) + len(self._held)

    # -- the broker and the ingresses

    def _publish(self) -> Steps:
        for job in self._jobs:
            yield self.env.timeout(job.published_s - self.env.now)
            self._deliver(job)

    def _deliver(self, job: Job) -> None:
        self._waiting.append(job)
        self._pull()

    def _pull(self) -> None:
        while self._waiting and len(self._held) < self._places:
            job = self._waiting.popleft()
            self._held[job] = None
            self._pulled_at = self.env.now
            self._recent.message(self.model.name)
            self.env.process(self._work(job))

    def _work(self, job: Job) -> Steps:
        yield from self._on_a_thread(self.model.decode_s)
        job.painted = self.env.event()
        self._requests += 1
        self._ready.put(job)
        if not self.running:
            self.requests.tell()
        is_painted = yield job.painted
        self._requests -= 1
        if is_painted:
            self._recent.job(self.model.name, job.engine_s)
            yield from self._on_a_thread(self.model.encode_s)
            yield self.env.timeout(self.model.stores_s)
            self.latencies_s.append(self.env.now - job.published_s)
        del self._held[job]
        self._pull()
        if not is_painted:
            # Ray may take as long to notice that the node is gone.
            yield self.env.timeout(self.model.settings.work.lease_s)
            self._deliver(job)

    def _on_a_thread(self, seconds: float) -> Iterator[simpy.Event]:
        if seconds:
            with self._threads.request() as thread:
                yield thread
                yield self.env.timeout(seconds)

    # -- the replicas

    def _start(self, replica: Replica, start_s: float) -> None:
        replica.life = self.env.process(self._life(replica, start_s))
        if self.model.losses_per_hour:
            self.env.process(self._lose(replica.life, self._losses.expovariate(self.model.losses_per_hour / 3600)))

    def _life(self, replica: Replica, start_s: float) -> Steps:
        get: Any = None
        try:
            yield self.env.timeout(start_s)
            replica.is_running = True
            while not replica.is_stopping:
                get = self._ready.get()
                replica.job = yield get
                assert replica.job is not None and replica.job.painted is not None
                yield self.env.timeout(replica.job.engine_s)
                self.busy_s += replica.job.engine_s
                replica.job.painted.succeed(True)
                replica.job = None
            is_lost = False
        except simpy.Interrupt as e:
            is_lost = e.cause is _LOST
            if replica.job is not None and replica.job.painted is not None:
                self.lost += 1
                replica.job.painted.succeed(False)
            elif get is not None and get.triggered:
                self._ready.put(get.value)
            elif get is not None:
                get.cancel()
        self._end(replica, stands_by=not is_lost)

    def _lose(self, life: simpy.Process, after_s: float) -> Steps:
        yield self.env.timeout(after_s)
        if life.is_alive:
            life.interrupt(_LOST)

    def _end(self, replica: Replica, *, stands_by: bool) -> None:
        self._replicas.remove(replica)
        if stands_by:
            self._standby.append((replica.asked_s, self.env.now + self.model.standby_s))
        else:
            self._gone_s += self.env.now - replica.asked_s

    def _scale(self) -> None:
        self._gone_s += sum(until - asked_s for asked_s, until in self._standby if until <= self.env.now)
        self._standby = [node for node in self._standby if node[1] > self.env.now]
        kept = [replica for replica in self._replicas if not replica.is_stopping]
        stopped_first = sorted(kept, key=lambda one: (one.is_running, one.job is not None))
        for replica in stopped_first[: max(0, len(kept) - self.target)]:
            replica.is_stopping = True
            if replica.job is None and replica.life is not None:
                replica.life.interrupt()
        for _ in range(min(self.target - len(kept), self.model.scaling.max_replicas - len(self._replicas))):
            node = self._standby.pop() if self._standby else None
            draw = self.model.warm_start_s if node else self.model.start_s
            replica = Replica(node[0] if node else self.env.now)
            self._replicas.append(replica)
            self._start(replica, draw(self._starts))
        self.most_nodes = max(self.most_nodes, len(self._replicas) + len(self._standby))

    # -- what decides

    def _turn(self) -> Steps:
        while True:
            self.target = self._decide(self)
            self._scale()
            self.series.append(Sample(self.env.now, self.target, self.running, self.messages))
            yield self.env.timeout(self.model.turn_s)

    def _watch(self) -> Steps:
        """Cloud Monitoring samples, and an ingress reads."""
        sampled_s = -SAMPLED_S
        while True:
            if self.env.now - sampled_s >= SAMPLED_S:
                sampled_s = self.env.now
                self._monitored.append((self.env.now + self._samples.uniform(*LATE_S), self.exact()))
            self.reading = self.model.reads(self) or self.reading
            yield self.env.timeout(self.model.settings.backlog.read_every_s)

    def exact(self) -> Reading:
        first = [next(iter(jobs)) for jobs in (self._held, self._waiting) if jobs]
        oldest_s = min((job.published_s for job in first), default=self.env.now)
        return Reading(messages=self.messages, oldest_age_s=self.env.now - oldest_s, taken_at=self.now)

    def monitored(self) -> Reading | None:
        """The newest sample that can be seen."""
        found = None
        while self._monitored and self._monitored[0][0] <= self.env.now:
            found = self._monitored.popleft()[1]
        return found

    def _tell(self) -> Steps:
        while True:
            self._reported = self._report()
            yield self.env.timeout(REPORT_S)

    def _report(self) -> Report:
        name, backlog = self.model.name, self.model.settings.backlog
        quiet_s = self.env.now - self._pulled_at
        has_room = not self._waiting and len(self._held) < self._places
        return Report(
            reading=self.reading,
            # The first pull that brings nothing says so when it ends.
            empty_s=quiet_s if has_room and quiet_s >= PULL_S else 0.0,
            held={name: len(self._held)},
            mix=dict(self._recent.mix) or {name: 1.0},
            job_s={name: self._recent.job_s.get(name, backlog.job_s)},
            target_drain_s=backlog.target_drain_s,
            trust_s=backlog.trust_s,
            quiet_s=backlog.quiet_s,
        )

    def report(self) -> Report | None:
        """The ingresses' latest reports together."""
        return together([self._reported])

    def limited(self, number: int) -> int:
        return max(self.model.scaling.min_replicas, min(self.model.scaling.max_replicas, number))

    def context(self) -> Any:
        """Ray's AutoscalingContext, as far as policies look at it here."""
        return SimpleNamespace(
            current_num_replicas=self.running,
            target_num_replicas=self.target,
            total_num_requests=self.requests.mean(),
            policy_state=self.state,
            config=self.config,
        )


# -- fleets: what decides how many replicas there are


def by_policy(app: App) -> int:
    """As `deployments.scaling.Policy` does."""
    ctx = app.context()
    replicas = Replicas(
        name=app.model.name,
        running=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        min=app.model.scaling.min_replicas,
        max=app.model.scaling.max_replicas,
        requests=ctx.total_num_requests,
        target_ongoing=app.config.get_target_ongoing_requests(),
        plain=replica_queue_length_autoscaling_policy(ctx)[0],
    )
    number = wanted(replicas, app.report(), app.now)
    if not replicas.running:
        ctx.target_num_replicas = max(ctx.target_num_replicas, number)
    return _after_delays(app, ctx, number)


def by_serve(app: App) -> int:
    """Serve's own policy: requests in flight alone."""
    ctx = app.context()
    return _after_delays(app, ctx, replica_queue_length_autoscaling_policy(ctx)[0])


def _after_delays(app: App, ctx: Any, number: float) -> int:
    """As Serve's `_apply_app_level_autoscaling_config` does, which has only the real time."""
    decided = _get_cold_start_scale_up_replicas(ctx)
    if decided is None and not ctx.current_num_replicas and number > 0:
        decided = math.ceil(number)
    if decided is None:
        decided, app.state = _apply_delay_logic(
            math.ceil(number), ctx.target_num_replicas, ctx.config, dict(app.state), app.now
        )
    return app.limited(decided)


def fixed(replicas: int) -> Decide:
    return lambda app: replicas


class Polling:
    """A Horizontal Pod Autoscaler that KEDA tells of Cloud Monitoring's metric, with their defaults: as many replicas
    as end what was there minutes ago within the policy's own target; at most twice as many, or four more, every 15 s;
    never fewer than it wanted within the last five minutes."""

    def __init__(self, job_s: float) -> None:
        self._job_s = job_s
        self._wanted: deque[tuple[float, int]] = deque()
        self._next_s = 0.0

    def __call__(self, app: App) -> int:
        now, backlog = app.env.now, app.model.settings.backlog
        if now < self._next_s:
            return app.target
        self._next_s = now + POLL_S
        messages = app.reading.messages if app.reading else 0.0
        self._wanted.append((now, math.ceil(messages * self._job_s / backlog.target_drain_s)))
        while self._wanted[0][0] < now - STABLE_S:
            self._wanted.popleft()
        highest = max(number for _, number in self._wanted)
        # Two of its own turns fit between two polls.
        for _ in range(2):
            highest = min(highest, max(4 * app.target, app.target + 8)) if app.target else min(highest, 1)
        return app.limited(highest)
