"""Rules for the RayService: how the cluster is made, and how its drains, groups and ports fit the app."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import permutations, product

from deployments.config import Problem
from deployments.manifests import ServedConfig

from .objects import (
    GPU,
    Objects,
    Pod,
    amount,
    at,
    cluster,
    cpus,
    deployments,
    gpus,
    of_kind,
    pods,
    ray_pods,
    ray_service,
    serve_config,
    settings,
    workers,
)

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
#: What GKE leaves a pod on a spot node.
SPOT_S = 15
METRICS = {"metrics": 8080}
HEAD_METRICS = {**METRICS, "as-metrics": 44217, "dash-metrics": 44227}


def serve_config_is_accepted(objects: Objects) -> Iterator[str]:
    """By the app, and by KubeRay's pods, as `fluxfill check` says."""
    service = ray_service(objects)
    for problem in _problems(service["spec"]["serveConfigV2"]):
        yield f"{at(service)}: serveConfigV2: {'.'.join(map(str, problem.where[4:]))}: {problem.what}"


@cache
def _problems(text: str) -> list[Problem]:
    return ServedConfig(name="", text=text, line=0, is_block=True).problems()


def head_holds_no_work(objects: Objects) -> Iterator[str]:
    (head,) = [pod for pod in pods(objects) if pod.is_head]
    params = cluster(objects)["headGroupSpec"].get("rayStartParams") or {}
    if params.get("num-cpus") != "0":
        yield f"{head.at}: rayStartParams.num-cpus: {params.get('num-cpus')!r} lets replicas onto the head, not '0'"
    if gpus(head):
        yield f"{head.at}: resources.limits.{GPU}: the head needs no GPU"


def autoscaler_is_v2(objects: Objects) -> Iterator[str]:
    """The first autoscaler ends every node when a list of pods times out (ray#58933)."""
    config, service = cluster(objects), at(ray_service(objects))
    if not config.get("enableInTreeAutoscaling"):
        yield f"{service}: rayClusterConfig.enableInTreeAutoscaling: is off: no group ever grows"
    version = (config.get("autoscalerOptions") or {}).get("version")
    if version != "v2":
        yield f"{service}: autoscalerOptions.version: {version}, not v2"


def ray_pods_never_restart(objects: Objects) -> Iterator[str]:
    for pod in ray_pods(objects):
        if (policy := pod.spec.get("restartPolicy", "Never")) != "Never":
            yield f"{pod.at}: restartPolicy: {policy}: KubeRay refuses it with autoscaler v2"


def upgrade_makes_a_new_cluster(objects: Objects) -> Iterator[str]:
    """Where workers pull, shifting traffic step by step means nothing."""
    kind = (ray_service(objects)["spec"].get("upgradeStrategy") or {}).get("type")
    if kind != "NewCluster":
        yield f"{at(ray_service(objects))}: upgradeStrategy.type: {kind}, not NewCluster"


def one_token_for_both_clusters(objects: Objects) -> Iterator[str]:
    """Without a Secret of one's own each cluster has its own, and clients fail at an upgrade."""
    service, config = at(ray_service(objects)), cluster(objects)
    options = config.get("authOptions") or {}
    if options.get("mode") != "token":
        yield f"{service}: authOptions.mode: {options.get('mode')}: the dashboard and the job API are open"
    if not options.get("secretName"):
        yield f"{service}: authOptions.secretName: is missing: each cluster of an upgrade makes a token of its own"
    version = [int(part) for part in re.findall(r"\d+", config.get("rayVersion") or "")]
    if version < [2, 52]:
        yield f"{service}: rayClusterConfig.rayVersion: {config.get('rayVersion')}: token authentication needs 2.52"


def gcs_survives_the_head(objects: Objects) -> Iterator[str]:
    service, options = at(ray_service(objects)), cluster(objects).get("gcsFaultToleranceOptions") or {}
    if not options.get("redisAddress"):
        yield f"{service}: gcsFaultToleranceOptions.redisAddress: is missing: with the head every worker restarts"
    elif not ((options.get("redisPassword") or {}).get("valueFrom") or {}).get("secretKeyRef"):
        yield f"{service}: gcsFaultToleranceOptions.redisPassword: comes from no Secret"
    if "externalStorageNamespace" in options:
        yield f"{service}: gcsFaultToleranceOptions.externalStorageNamespace: an upgrade's clusters would share it"


def redis_keeps_its_data(objects: Objects) -> Iterator[str]:
    for one in of_kind(objects, "StatefulSet", "Deployment"):
        for container in one["spec"]["template"]["spec"]["containers"]:
            if "redis" not in container["image"]:
                continue
            words = " ".join([*container.get("command", ()), *container.get("args", ())])
            volumes = {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates") or ()}
            volumes |= {
                volume["name"]
                for volume in one["spec"]["template"]["spec"].get("volumes") or ()
                if "persistentVolumeClaim" in volume
            }
            if not any(mount["name"] in volumes for mount in container.get("volumeMounts") or ()):
                yield f"{at(one)}: volumeMounts: no persistent volume: a Redis that restarts empty saves no cluster"
            if not re.search(r"appendonly[\s=]+yes", words):
                yield f"{at(one)}: args: no `--appendonly yes`: the last writes are lost"
            if "requirepass" not in words:
                yield f"{at(one)}: args: no `--requirepass`: Redis is open to its clients"


# -- groups


def groups_start_from_zero(objects: Objects) -> Iterator[str]:
    """A deployment that fits no group's declared resources and labels waits for ever."""
    groups = workers(objects)
    for one in deployments(objects):
        if not any(one.fits(group) for group in groups):
            asks = f"{one.num_cpus:g} CPUs, {one.num_gpus:g} GPUs, labels {dict(one.label_selector)}"
            kind = f", accelerator_type {one.accelerator_type}" if one.accelerator_type else ""
            yield f"{at(ray_service(objects))}: deployment {one.name}: asks for {asks}{kind}; no group offers that"


def gpu_nodes_are_left_to_painting(objects: Objects) -> Iterator[str]:
    """An ingress or a text encoder on a GPU node keeps it awake."""
    for group in (group for group in workers(objects) if gpus(group)):
        for one in deployments(objects):
            if not one.needs_gpus and one.fits(group):
                yield f"{group.at}: deployment {one.name}: needs no GPU and may be placed here: label_selector"


def painters_ask_for_their_gpu(objects: Objects) -> Iterator[str]:
    """The config's ray_actor_options replace the code's as a whole."""
    for one in deployments(objects):
        if one.num_gpus < one.needs_gpus:
            place = f"{at(ray_service(objects))}: deployment {one.name}"
            yield f"{place}: ray_actor_options.num_gpus: its {one.needs_gpus:g} is lost"


def groups_hold_what_serve_asks_for(objects: Objects) -> Iterator[str]:
    """At Serve's maximum one node may be broken."""
    asked = deployments(objects)
    for name, wanted, needs, has in (
        ("GPUs", [one for one in asked if one.num_gpus], "num_gpus", gpus),
        ("CPUs", [one for one in asked if not one.num_gpus], "num_cpus", cpus),
    ):
        groups = [group for group in workers(objects) if any(one.fits(group) for one in wanted)]
        total = sum(getattr(one, needs) * one.max_replicas for one in wanted)
        room = sum(has(group) * group.most for group in groups) - max((has(group) for group in groups), default=0)
        if groups and room < total:
            names = ", ".join(group.at.rpartition(" ")[2] for group in groups)
            yield (
                f"{at(ray_service(objects))}: maxReplicas of {names}: Serve may ask for {total:g} {name}, "
                f"and without one node there are {room:g}"
            )


def settings_know_the_cluster(objects: Objects) -> Iterator[str]:
    """The app is told how many nodes and GPUs there can be, as it cannot see those that are not there yet."""
    own, place = settings(objects), f"{at(ray_service(objects))}: serveConfigV2"
    nodes = sum(pod.most for pod in workers(objects))
    painted = sum(one.max_replicas * one.needs_gpus for one in deployments(objects))
    if own.nodes != nodes:
        yield f"{place}: nodes: {own.nodes}, and the groups can have {nodes}"
    if own.audit.gpus not in (None, painted):
        yield f"{place}: audit.gpus: {own.audit.gpus}, and the models can have {painted:g}"


# -- shutdown


def drains_hold(objects: Objects) -> Iterator[str]:
    """Grace above drain above what the deployments on the node take to stop. A spot node has 15 s: there the lease
    brings the job back."""
    for pod in workers(objects):
        grace, drain = pod.spec.get("terminationGracePeriodSeconds", 30), _drain(pod)
        if grace <= drain:
            yield f"{pod.at}: terminationGracePeriodSeconds: {grace} is not above {DRAIN}, {drain:g}"
        if pod.is_spot:
            if grace > SPOT_S:
                yield f"{pod.at}: terminationGracePeriodSeconds: {grace} is more than a spot node's {SPOT_S}"
            continue
        for one in deployments(objects):
            if one.fits(pod) and one.shutdown_s >= drain:
                yield f"{pod.at}: {DRAIN}: {drain:g} is not above the {one.shutdown_s:g} s that {one.name} may take"


def the_head_leaves_last(objects: Objects) -> Iterator[str]:
    """All pods of a deleted cluster get SIGTERM at once, and a worker without a head dies undrained."""
    longest = max((_drain(pod) for pod in workers(objects)), default=0)
    for pod in ray_pods(objects):
        if pod.is_head:
            grace, drain = pod.spec.get("terminationGracePeriodSeconds", 30), _drain(pod)
            if drain <= longest:
                yield f"{pod.at}: {DRAIN}: {drain:g} is not above the workers' longest, {longest:g}"
            if grace <= drain:
                yield f"{pod.at}: terminationGracePeriodSeconds: {grace} is not above {DRAIN}, {drain:g}"


def the_ingress_stops_first(objects: Objects) -> Iterator[str]:
    """Serve stops a replica as long before its node's drain ends as it may take to stop. An ingress that pulls when the
    inpainters, or the generators, are gone holds jobs that the other cluster could do."""
    pods = [pod for pod in workers(objects) if not pod.is_spot]
    asked = deployments(objects)

    def stops_s(pod: Pod, *kinds: str) -> list[float]:
        found = [_drain(pod) - one.shutdown_s for one in asked if one.name.startswith(kinds) and one.fits(pod)]
        return sorted(seconds for seconds in found if seconds > 0)

    for pod, other in permutations(pods, 2):
        for pulls_s, paints_s in product(stops_s(pod, "Ingress"), stops_s(other, "Inpainter", "Generator")[:1]):
            if pulls_s > paints_s:
                yield f"{pod.at}: {DRAIN}: the ingress pulls for {pulls_s:g} s, and {other.at} paints for {paints_s:g}"


def _drain(pod: Pod) -> float:
    return float(pod.env(DRAIN) or 30)


def nothing_stops_ray_beforehand(objects: Objects) -> Iterator[str]:
    """Ray drains on SIGTERM; `ray stop` kills."""
    for pod in ray_pods(objects):
        for place, container in pod.containers:
            stop = (container.get("lifecycle") or {}).get("preStop") or {}
            if "ray stop" in " ".join((stop.get("exec") or {}).get("command") or ()):
                yield f"{place}: lifecycle.preStop: `ray stop` kills the replicas that would drain"


# -- what KubeRay expects of its pods


def probes_are_kuberays(objects: Objects) -> Iterator[str]:
    for pod in ray_pods(objects):
        for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
            if kind in pod.main:
                yield f"{pod.at}: {kind}: KubeRay brings its own, which know head from worker"


def ray_container_is_first(objects: Objects) -> Iterator[str]:
    """KubeRay starts Ray in the first container."""
    for pod in ray_pods(objects):
        first = pod.spec["containers"][0].get("name", "")
        if not first.startswith("ray-"):
            yield f"{pod.at}: containers: the first is {first}, not ray-head or ray-worker"


def metrics_ports_have_names(objects: Objects) -> Iterator[str]:
    """Once a port is named, KubeRay adds no `metrics`; the other two it never adds."""
    for pod in ray_pods(objects):
        declared = {port.get("name"): port["containerPort"] for port in pod.main.get("ports") or ()}
        for name, number in (HEAD_METRICS if pod.is_head else METRICS).items():
            if declared.get(name) != number:
                yield f"{pod.at}: ports: {name} is not {number}"


def kuberay_accepts_the_groups(objects: Objects) -> Iterator[str]:
    """What the operator itself refuses, beside what the rules above name."""
    for pod in ray_pods(objects):
        group = pod.group or {}
        params = group.get("rayStartParams") or {}
        if "labels" in params:
            yield f"{pod.at}: rayStartParams.labels: belongs into the group's labels"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & params.keys():
            yield f"{pod.at}: resources: stated in rayStartParams, too"
        if group.get("suspend"):
            yield f"{pod.at}: suspend: not with the autoscaler"
        for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"):
            if pod.is_head and any(one["name"] == name for one in pod.main.get("env") or ()):
                yield f"{pod.at}: env {name}: KubeRay sets it"


def serve_listens_where_kuberay_asks(objects: Objects) -> Iterator[str]:
    port = (serve_config(objects).get("http_options") or {}).get("port", 8000)
    for pod in workers(objects):
        declared = {one.get("name"): one["containerPort"] for one in pod.main.get("ports") or ()}
        if declared.get("serve", 8000) != port:
            yield f"{pod.at}: ports: serve is {declared.get('serve', 8000)}, and http_options.port {port}"


def memory_is_not_overdrawn(objects: Objects) -> Iterator[str]:
    """Files in memory count against the container's limit."""
    for pod in pods(objects):
        mounted = {mount["name"] for mount in pod.main.get("volumeMounts") or ()}
        limit = (pod.main.get("resources", {}).get("limits") or {}).get("memory")
        for volume in pod.volumes:
            memory = volume.get("emptyDir") or {}
            if memory.get("medium") != "Memory" or volume["name"] not in mounted or limit is None:
                continue
            if "sizeLimit" not in memory:
                yield f"{pod.at}: volume {volume['name']}: no sizeLimit: it may take all of the container's memory"
            elif amount(memory["sizeLimit"]) >= amount(limit):
                yield f"{pod.at}: volume {volume['name']}: sizeLimit {memory['sizeLimit']} leaves nothing of {limit}"
