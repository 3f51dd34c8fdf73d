"""Rules for every container: what it may do, what it asks for, what it is told."""

import re
from collections.abc import Iterator
from typing import Any

from .objects import GPU, Object, Objects, Pod, at, group_labels, namespace, of_kind, pods

SECRET = re.compile(r"(TOKEN|PASSWORD|SECRET|API_KEYS?|CREDENTIALS|PRIVATE_KEY)$")
#: A user and a password in a URL, unless it is a variable that Kubernetes fills in.
PASSWORD_IN_URL = re.compile(r"://[^/@\s:]*:(?!\$\()[^/@\s]+@")
#: Written to by Ray, by Python and by libraries.
WRITABLE = ("/tmp", "/dev/shm")


def images_are_pinned(objects: Objects) -> Iterator[str]:
    for pod in pods(objects):
        for place, container in pod.containers:
            image = container["image"]
            tag = image.rpartition("/")[2].partition(":")[2]
            if "@sha256:" not in image and tag in ("", "latest"):
                yield f"{place}: image: {image} names no version"


def nobody_is_root(objects: Objects) -> Iterator[str]:
    for place, context in _contexts(objects):
        if context.get("runAsNonRoot") is not True:
            yield f"{place}: securityContext.runAsNonRoot: is not true"
        if context.get("runAsUser", 10001) == 0 or context.get("runAsGroup", 10001) == 0:
            yield f"{place}: securityContext.runAsUser: 0 is root"


def root_is_read_only(objects: Objects) -> Iterator[str]:
    for place, context in _contexts(objects):
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{place}: securityContext.readOnlyRootFilesystem: is not true"


def privileges_do_not_grow(objects: Objects) -> Iterator[str]:
    for place, context in _contexts(objects):
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{place}: securityContext.allowPrivilegeEscalation: is not false"


def capabilities_are_dropped(objects: Objects) -> Iterator[str]:
    for place, context in _contexts(objects):
        capabilities = context.get("capabilities") or {}
        if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
            yield f"{place}: securityContext.capabilities: {capabilities or 'kept'}, not drop: [ALL]"


def seccomp_is_on(objects: Objects) -> Iterator[str]:
    for place, context in _contexts(objects):
        if (kind := (context.get("seccompProfile") or {}).get("type")) not in ("RuntimeDefault", "Localhost"):
            yield f"{place}: securityContext.seccompProfile: {kind}"


def host_is_left_alone(objects: Objects) -> Iterator[str]:
    for pod in pods(objects):
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(name):
                yield f"{pod.at}: {name}: the node's own"
        for volume in pod.volumes:
            if "hostPath" in volume:
                yield f"{pod.at}: volume {volume['name']}: hostPath: the node's own files"
        for place, container in pod.containers:
            for port in container.get("ports") or ():
                if "hostPort" in port:
                    yield f"{place}: ports: hostPort {port['hostPort']}: no NetworkPolicy holds there"


def _contexts(objects: Objects) -> Iterator[tuple[str, Object]]:
    """Each container's securityContext over its pod's."""
    for pod in pods(objects):
        for place, container in pod.containers:
            yield place, {**(pod.spec.get("securityContext") or {}), **(container.get("securityContext") or {})}


def ray_can_write(objects: Objects) -> Iterator[str]:
    for pod in pods(objects):
        if pod.group is None:
            continue
        empty = {volume["name"]: volume["emptyDir"] for volume in pod.volumes if "emptyDir" in volume}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.main.get("volumeMounts") or ()}
        for path in WRITABLE:
            if mounts.get(path) not in empty:
                yield f"{pod.at}: volumeMounts: {path} is no emptyDir, and the root is read-only"
        if empty.get(mounts.get("/dev/shm"), {"medium": "Memory"}).get("medium") != "Memory":
            yield f"{pod.at}: volume {mounts['/dev/shm']}: medium: the object store would lie on disk"


def resources_are_stated(objects: Objects) -> Iterator[str]:
    for pod in pods(objects):
        for place, container in pod.containers:
            resources = container.get("resources") or {}
            requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
            # The autoscaler writes next to nothing.
            wanted = ("cpu", "memory") if container in pod.added else ("cpu", "memory", "ephemeral-storage")
            for name in wanted:
                if name not in requests:
                    yield f"{place}: resources.requests.{name}: is missing"
            if "memory" not in limits:
                yield f"{place}: resources.limits.memory: is missing"
            if GPU in requests and requests[GPU] != limits.get(GPU):
                yield f"{place}: resources.limits.{GPU}: differs from the request"


def head_is_evicted_last(objects: Objects) -> Iterator[str]:
    """Where the request is below the limit, the head, whose memory grows, is among the first that a node evicts."""
    for pod in pods(objects):
        resources = pod.main.get("resources") or {}
        request, limit = ((resources.get(kind) or {}).get("memory") for kind in ("requests", "limits"))
        if pod.is_head and request != limit:
            yield f"{pod.at}: resources.requests.memory: {request} is not the limit, {limit}"


def ports_are_used_once(objects: Objects) -> Iterator[str]:
    for pod in pods(objects):
        seen: dict[tuple[Any, str], str] = {}
        names: set[str] = set()
        for _, container in pod.containers:
            for port in container.get("ports") or ():
                key = port["containerPort"], port.get("protocol", "TCP")
                if key in seen:
                    yield f"{pod.at}: ports: {key[0]} is {seen[key]} and {port.get('name')}"
                if port.get("name") in names:
                    yield f"{pod.at}: ports: two are called {port['name']}"
                seen[key] = port.get("name", "unnamed")
                names.add(port.get("name", f"unnamed {key}"))


def secrets_stay_in_secrets(objects: Objects) -> Iterator[str]:
    for place, name, text in _plain_text(objects):
        if SECRET.search(name) and text:
            yield f"{place} {name}: a secret in plain text"
        elif PASSWORD_IN_URL.search(text):
            yield f"{place} {name}: a URL with a password in plain text"


def _plain_text(objects: Objects) -> Iterator[tuple[str, str, str]]:
    """Place, name and value of each text that anyone who may list objects can read."""
    for pod in pods(objects):
        for place, container in pod.containers:
            for one in container.get("env") or ():
                yield f"{place}: env", one["name"], one.get("value", "")
            for word in (*(container.get("command") or ()), *(container.get("args") or ())):
                yield place, "args", word
    for one in of_kind(objects, "ConfigMap"):
        for key, text in (one.get("data") or {}).items():
            yield f"{at(one)}: data", key, text
    for one in of_kind(objects, "RayService"):
        yield at(one), "serveConfigV2", one["spec"]["serveConfigV2"]


def only_the_head_asks_kubernetes(objects: Objects) -> Iterator[str]:
    """The autoscaler needs its account's token; others that run a stranger's photo through a decoder must not have
    one."""
    for pod in pods(objects):
        if pod.is_head and not _has_token(pod, objects):
            yield f"{pod.at}: automountServiceAccountToken: is false: the autoscaler can ask for no pod"
        if not pod.is_head and _has_token(pod, objects):
            yield f"{pod.at}: automountServiceAccountToken: is not false"


def _has_token(pod: Pod, objects: Objects) -> bool:
    if "automountServiceAccountToken" in pod.spec:
        return bool(pod.spec["automountServiceAccountToken"])
    name = pod.spec.get("serviceAccountName", "default")
    accounts = [
        one
        for one in of_kind(objects, "ServiceAccount")
        if one["metadata"]["name"] == name and namespace(one) == pod.namespace
    ]
    return all(one.get("automountServiceAccountToken", True) for one in accounts)


def fuse_has_its_annotation(objects: Objects) -> Iterator[str]:
    """Without it no sidecar is injected, and the pod waits for its volume."""
    for pod in pods(objects):
        if pod.has_fuse and (pod.metadata.get("annotations") or {}).get("gke-gcsfuse/volumes") != "true":
            yield f'{pod.at}: metadata.annotations: no gke-gcsfuse/volumes: "true"'


def gpu_pods_find_their_nodes(objects: Objects) -> Iterator[str]:
    for pod in pods(objects):
        selector = pod.spec.get("nodeSelector") or {}
        tolerated = {one.get("key") for one in pod.spec.get("tolerations") or ()}
        if GPU in ((pod.main.get("resources") or {}).get("limits") or {}):
            if GPU not in tolerated:
                yield f"{pod.at}: tolerations: none of {GPU}, which GKE taints GPU nodes with"
            kind = group_labels(pod).get("ray.io/accelerator-type")
            if kind and not selector.get("cloud.google.com/gke-accelerator", "").endswith(f"-{kind.lower()}"):
                yield f"{pod.at}: nodeSelector: cloud.google.com/gke-accelerator names no {kind}, the label"
        elif GPU in tolerated and pod.group is None:
            yield f"{pod.at}: tolerations: {GPU}: it may be placed on a GPU node, which it then keeps awake"
        if pod.is_spot and "cloud.google.com/gke-spot" not in tolerated:
            yield f"{pod.at}: tolerations: none of cloud.google.com/gke-spot"


def bytecode_is_used(objects: Objects) -> Iterator[str]:
    """KubeRay's first container imports Ray on a fifth of a CPU (kuberay#5138)."""
    for pod in pods(objects):
        for place, container in pod.containers:
            if any(one["name"] == "PYTHONDONTWRITEBYTECODE" for one in container.get("env") or ()):
                yield f"{place}: env PYTHONDONTWRITEBYTECODE: the image has bytecode; leave it unset"
