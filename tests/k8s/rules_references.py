"""Rules between objects: what is named exists, what selects finds something, and the quota has room."""

import re
from collections.abc import Iterator
from typing import Any

from .objects import (
    GPU,
    Object,
    Objects,
    Pod,
    amount,
    at,
    cluster,
    namespace,
    of_kind,
    pods,
    ray_service,
    selects,
    settings,
)

#: What GKE's FUSE sidecar asks for where the pod's annotations say nothing.
SIDECAR = {"cpu": "250m", "memory": "256Mi", "ephemeral-storage": "5Gi"}
ACCOUNT = re.compile(r"[a-z0-9-]+@[a-z0-9-]+\.iam\.gserviceaccount\.com")


# -- selectors


def budgets_select_pods(objects: Objects) -> Iterator[str]:
    yield from _empty(objects, "PodDisruptionBudget", "selector")


def policies_select_pods(objects: Objects) -> Iterator[str]:
    yield from _empty(objects, "NetworkPolicy", "podSelector")


def services_select_pods(objects: Objects) -> Iterator[str]:
    for one in of_kind(objects, "Service"):
        chosen = [pod for pod in _beside(one, objects) if selects({"matchLabels": one["spec"]["selector"]}, pod.labels)]
        if not chosen:
            yield f"{at(one)}: spec.selector: selects no pod"
        for port in one["spec"].get("ports") or ():
            target = port.get("targetPort", port["port"])
            if isinstance(target, str) and any(target not in _port_names(pod) for pod in chosen):
                yield f"{at(one)}: spec.ports: {target} is no port of the pods"


def monitors_scrape_pods(objects: Objects) -> Iterator[str]:
    """Each metrics port of each pod of Ray, and no port that is not there."""
    scraped: set[tuple[str, str]] = set()
    monitors = of_kind(objects, "PodMonitor")
    for one in monitors:
        chosen = [pod for pod in pods(objects) if selects(one["spec"]["selector"], pod.labels)]
        if not chosen:
            yield f"{at(one)}: spec.selector: selects no pod"
        for endpoint in one["spec"]["podMetricsEndpoints"]:
            having = [pod.at for pod in chosen if endpoint["port"] in _port_names(pod)]
            if chosen and not having:
                yield f"{at(one)}: podMetricsEndpoints.port: {endpoint['port']} is no port of the pods"
            scraped |= {(pod, endpoint["port"]) for pod in having}
    for pod in pods(objects):
        for name in sorted(name for name in _port_names(pod) if name.endswith("metrics")):
            if monitors and (pod.at, name) not in scraped:
                yield f"{pod.at}: ports: {name} is scraped by no PodMonitor"


def _empty(objects: Objects, kind: str, field: str) -> Iterator[str]:
    for one in of_kind(objects, kind):
        if not any(selects(one["spec"][field], pod.labels) for pod in _beside(one, objects)):
            yield f"{at(one)}: spec.{field}: selects no pod"


def _beside(one: Object, objects: Objects) -> list[Pod]:
    """Pods in an object's namespace. Labels that KubeRay adds are not among theirs: they name a cluster, and change."""
    return [pod for pod in pods(objects) if pod.namespace == namespace(one)]


def _port_names(pod: Pod) -> set[str]:
    return {port["name"] for port in pod.main.get("ports") or () if "name" in port}


# -- names


def what_is_named_exists(objects: Objects) -> Iterator[str]:
    known = {(one["kind"], one["metadata"]["name"]) for one in objects}
    known |= {("Secret", _target(one)) for one in of_kind(objects, "ExternalSecret")}
    for place, kind, name in _references(objects):
        if (kind, name) not in known:
            yield f"{place}: {kind} {name} is defined nowhere"


def secrets_have_their_keys(objects: Objects) -> Iterator[str]:
    """KubeRay reads the token by the key `auth_token`, and no other."""
    keys = {
        (one["kind"], one["metadata"]["name"]): {*(one.get("data") or ()), *(one.get("stringData") or ())}
        for one in of_kind(objects, "Secret", "ConfigMap")
    }
    token = (cluster(objects).get("authOptions") or {}).get("secretName")
    wanted = [(f"{at(ray_service(objects))}: authOptions", "Secret", token, "auth_token")]
    for place, value in _values_from(objects):
        for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
            if field in value and not value[field].get("optional"):
                wanted.append((place, kind, value[field]["name"], value[field]["key"]))
    for place, kind, name, key in wanted:
        if (kind, name) in keys and key not in keys[kind, name]:
            yield f"{place}: {kind} {name} has no key {key}"


def _target(external: Object) -> str:
    return (external["spec"].get("target") or {}).get("name", external["metadata"]["name"])


def _values_from(objects: Objects) -> Iterator[tuple[str, Object]]:
    for pod in pods(objects):
        for place, container in pod.containers:
            for one in container.get("env") or ():
                if "valueFrom" in one:
                    yield f"{place}: env {one['name']}", one["valueFrom"]
    for service in of_kind(objects, "RayService"):
        options = service["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions") or {}
        password = (options.get("redisPassword") or {}).get("valueFrom")
        if password:
            yield f"{at(service)}: gcsFaultToleranceOptions.redisPassword", password


def _references(objects: Objects) -> Iterator[tuple[str, str, str]]:
    """Where an object is named, its kind, and its name."""
    for place, value in _values_from(objects):
        for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
            if field in value:
                yield place, kind, value[field]["name"]
    for pod in pods(objects):
        yield from _references_of(pod)
    for one in of_kind(objects, "StatefulSet"):
        yield f"{at(one)}: spec.serviceName", "Service", one["spec"]["serviceName"]
    for one in of_kind(objects, "RoleBinding"):
        yield f"{at(one)}: roleRef", one["roleRef"]["kind"], one["roleRef"]["name"]
        for subject in one.get("subjects") or ():
            yield f"{at(one)}: subjects", subject["kind"], subject["name"]
    for service in of_kind(objects, "RayService"):
        yield from _references_of_cluster(service)


def _references_of_cluster(service: Object) -> Iterator[tuple[str, str, str]]:
    config = service["spec"]["rayClusterConfig"]
    if secret := (config.get("authOptions") or {}).get("secretName"):
        yield f"{at(service)}: authOptions.secretName", "Secret", secret
    if address := (config.get("gcsFaultToleranceOptions") or {}).get("redisAddress"):
        host = address.rpartition("//")[2].partition(":")[0].partition(".")[0]
        yield f"{at(service)}: gcsFaultToleranceOptions.redisAddress", "Service", host


def _references_of(pod: Pod) -> Iterator[tuple[str, str, str]]:
    if (account := pod.spec.get("serviceAccountName", "default")) != "default":
        yield f"{pod.at}: serviceAccountName", "ServiceAccount", account
    for one in pod.spec.get("imagePullSecrets") or ():
        yield f"{pod.at}: imagePullSecrets", "Secret", one["name"]
    for volume in pod.volumes:
        for source in (volume, *((volume.get("projected") or {}).get("sources") or ())):
            yield from (
                (f"{pod.at}: volume {volume['name']}", kind, source[field][name])
                for field, kind, name in (
                    ("secret", "Secret", "secretName" if source is volume else "name"),
                    ("configMap", "ConfigMap", "name"),
                    ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
                )
                if field in source
            )
    for place, container in pod.containers:
        for one in container.get("envFrom") or ():
            for field, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
                if field in one:
                    yield f"{place}: envFrom", kind, one[field]["name"]


def users_of_google_have_an_identity(objects: Objects) -> Iterator[str]:
    """Workload Identity: an annotation on the account of each pod that Google is asked by."""
    accounts = {one["metadata"]["name"]: one for one in of_kind(objects, "ServiceAccount")}
    own = settings(objects)
    urls = [own.blobs, own.jobs, own.sessions or "", own.weights.mirror or "", own.messages.url]
    asks_google = own.messages.is_google or any(url.startswith(("firebase:", "firestore:", "gs:")) for url in urls)
    for pod in pods(objects):
        if not (pod.has_fuse or (asks_google and pod.group is not None and not pod.is_head)):
            continue
        account = accounts.get(pod.spec.get("serviceAccountName", "default"), {"metadata": {}})
        annotations: dict[str, Any] = account["metadata"].get("annotations") or {}
        if not ACCOUNT.fullmatch(annotations.get("iam.gke.io/gcp-service-account", "")):
            yield f"{pod.at}: serviceAccountName: the account has no iam.gke.io/gcp-service-account"


# -- the quota


def quota_admits_an_upgrade(objects: Objects) -> Iterator[str]:
    """While the running cluster stands at its largest, the second one starts with its head and each group's least.
    Redis and the Jobs of weights and audits run beside them."""
    for one in of_kind(objects, "ResourceQuota"):
        for name, hard in one["spec"]["hard"].items():
            needed = _needed(name, [pod for pod in pods(objects) if pod.namespace == namespace(one)])
            if needed is not None and amount(hard) < needed:
                yield f"{at(one)}: spec.hard.{name}: {hard} is less than the {needed:g} that an upgrade needs"


def quota_lets_every_container_in(objects: Objects) -> Iterator[str]:
    """A pod is refused where a container does not say how much it takes of the CPU and memory that are limited."""
    ranges = [item for one in of_kind(objects, "LimitRange") for item in one["spec"]["limits"]]
    for one in of_kind(objects, "ResourceQuota"):
        for name in one["spec"]["hard"]:
            kind, resource = _limited(name)
            default = "defaultRequest" if kind == "requests" else "default"
            if resource not in ("cpu", "memory") or any(resource in (item.get(default) or {}) for item in ranges):
                continue
            for pod in _beside(one, objects):
                for place, container in [*pod.containers, *_sidecar(pod)]:
                    if resource not in _stated(container, kind):
                        yield f"{at(one)}: spec.hard.{name}: {place} does not state it and is refused"


def _needed(name: str, running: list[Pod]) -> float | None:
    """What all pods take together of a quota's resource; None: not a matter of pods."""
    if name in ("pods", "count/pods"):
        return sum(map(_copies, running))
    kind, resource = _limited(name)
    if resource not in ("cpu", "memory", "ephemeral-storage", GPU):
        return None
    return sum(_copies(pod) * _asked(pod, kind, resource) for pod in running)


def _limited(name: str) -> tuple[str, str]:
    """`requests.cpu` and plain `cpu` limit the same."""
    kind, _, resource = name.partition(".")
    return (kind, resource) if kind in ("requests", "limits") else ("requests", name)


def _copies(pod: Pod) -> int:
    return pod.most + pod.least if pod.group is not None else pod.most


def _asked(pod: Pod, kind: str, resource: str) -> float:
    """The larger of what its containers take together and what one that runs before them takes alone."""
    together = [*pod.spec["containers"], *pod.added, *(container for _, container in _sidecar(pod))]
    alone = pod.spec.get("initContainers") or ()

    def of(container: Object) -> float:
        return amount(_stated(container, kind).get(resource, 0))

    return max([sum(map(of, together)), *map(of, alone)])


def _stated(container: Object, kind: str) -> Object:
    """A request that is missing is taken from the limit."""
    resources = container.get("resources") or {}
    limits = resources.get("limits") or {}
    return limits if kind == "limits" else {**limits, **(resources.get("requests") or {})}


def _sidecar(pod: Pod) -> list[tuple[str, Object]]:
    """What GKE adds to a pod that mounts a bucket."""
    if not pod.has_fuse:
        return []
    annotations = pod.metadata.get("annotations") or {}
    stated = {
        kind: {name: annotations.get(f"gke-gcsfuse/{name}-{kind[:-1]}") for name in SIDECAR}
        for kind in ("requests", "limits")
    }
    limits = {name: limit for name, limit in stated["limits"].items() if limit not in (None, "0")}
    own = {name: request for name, request in stated["requests"].items() if request is not None}
    resources = {"requests": SIDECAR | limits | own, "limits": limits}
    return [(f"{pod.at}: container gke-gcsfuse-sidecar", {"resources": resources})]
