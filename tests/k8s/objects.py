"""Rendered objects as the rules see them: pods, Ray's groups, and the deployments that Serve puts on them."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from ray import serve

from deployments.app import build
from deployments.config import BUILDER
from serve_app.settings import Settings

Object = dict[str, Any]
Objects = list[Object]

GPU = "nvidia.com/gpu"
FUSE = "gcsfuse.csi.storage.gke.io"
#: What KubeRay gives its autoscaler where autoscalerOptions say nothing.
AUTOSCALER_RESOURCES = {name: {"cpu": "500m", "memory": "512Mi"} for name in ("requests", "limits")}


@dataclass(frozen=True)
class Pod:
    """A pod template, and where it stands."""

    at: str
    namespace: str
    metadata: Object
    spec: Object
    #: Copies at the same time: the least and the most.
    least: int = 1
    most: int = 1
    #: The Ray group; None: not a pod of Ray.
    group: Object | None = None
    is_head: bool = False
    #: Containers that an operator adds.
    added: tuple[Object, ...] = ()

    @property
    def labels(self) -> dict[str, str]:
        return self.metadata.get("labels") or {}

    @property
    def component(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    @property
    def main(self) -> Object:
        """Ray's container, in a pod of Ray; else the first."""
        containers: Objects = self.spec["containers"]
        return next((one for one in containers if one.get("name", "").startswith("ray-")), containers[0])

    @property
    def containers(self) -> Iterator[tuple[str, Object]]:
        """Each container with its place, those that run first included."""
        for one in (*self.spec.get("initContainers", ()), *self.spec["containers"], *self.added):
            yield f"{self.at}: container {one.get('name')}", one

    @property
    def volumes(self) -> Objects:
        return self.spec.get("volumes") or []

    @property
    def has_fuse(self) -> bool:
        return any((volume.get("csi") or {}).get("driver") == FUSE for volume in self.volumes)

    @property
    def is_spot(self) -> bool:
        selector = self.spec.get("nodeSelector") or {}
        return selector.get("cloud.google.com/gke-spot") == "true"

    def env(self, name: str) -> str | None:
        """The value of a variable of the main container."""
        return next((one.get("value") for one in self.main.get("env") or () if one["name"] == name), None)


def of_kind(objects: Objects, *kinds: str) -> Objects:
    return [one for one in objects if one["kind"] in kinds]


def at(one: Object) -> str:
    return f"{one['kind']}/{one['metadata']['name']}"


def namespace(one: Object) -> str:
    return one["metadata"].get("namespace", "default")


def ray_service(objects: Objects) -> Object:
    (service,) = of_kind(objects, "RayService")
    return service


def cluster(objects: Objects) -> Object:
    return ray_service(objects)["spec"]["rayClusterConfig"]


def pods(objects: Objects) -> list[Pod]:
    """Every pod template among the objects: the head and Ray's groups first."""
    found = [pod for service in of_kind(objects, "RayService") for pod in _ray_pods(service)]
    for one in of_kind(objects, "Deployment", "StatefulSet", "DaemonSet", "Job"):
        template, count = one["spec"]["template"], one["spec"].get("replicas", 1)
        place = Pod(at(one), namespace(one), template.get("metadata") or {}, template["spec"], least=count, most=count)
        found.append(place)
    for one in of_kind(objects, "CronJob"):
        template = one["spec"]["jobTemplate"]["spec"]["template"]
        found.append(Pod(at(one), namespace(one), template.get("metadata") or {}, template["spec"]))
    return found


def _ray_pods(service: Object) -> Iterator[Pod]:
    config = service["spec"]["rayClusterConfig"]
    head = config["headGroupSpec"]
    template = head["template"]
    added = (_autoscaler(config),) if config.get("enableInTreeAutoscaling") else ()
    meta = template.get("metadata") or {}
    yield Pod(f"{at(service)} head", namespace(service), meta, template["spec"], group=head, is_head=True, added=added)
    for group in config.get("workerGroupSpecs") or ():
        template = group["template"]
        yield Pod(
            f"{at(service)} group {group['groupName']}",
            namespace(service),
            template.get("metadata") or {},
            template["spec"],
            least=group.get("minReplicas", 0),
            most=group.get("maxReplicas", 2**31),
            group=group,
        )


def _autoscaler(config: Object) -> Object:
    options = config.get("autoscalerOptions") or {}
    image = config["headGroupSpec"]["template"]["spec"]["containers"][0].get("image")
    added = {name: options[name] for name in ("securityContext", "env", "envFrom", "volumeMounts") if name in options}
    resources = options.get("resources") or AUTOSCALER_RESOURCES
    return {"name": "autoscaler", "image": options.get("image", image), "resources": resources, **added}


def workers(objects: Objects) -> list[Pod]:
    return [pod for pod in pods(objects) if pod.group is not None and not pod.is_head]


def ray_pods(objects: Objects) -> list[Pod]:
    return [pod for pod in pods(objects) if pod.group is not None]


def group_labels(pod: Pod) -> dict[str, str]:
    """Ray's labels of a group's nodes: those that the autoscaler knows while the group is at zero."""
    group = pod.group or {}
    return dict(group.get("labels") or {}) | dict(
        pair.split("=", 1) for pair in group.get("rayStartParams", {}).get("labels", "").split(",") if "=" in pair
    )


def gpus(pod: Pod) -> int:
    """GPUs that Ray counts on a node of the group."""
    params = (pod.group or {}).get("rayStartParams") or {}
    limits = pod.main.get("resources", {}).get("limits") or {}
    return int(params.get("num-gpus", limits.get(GPU, 0)))


def cpus(pod: Pod) -> float:
    """CPUs that Ray counts on a node of the group."""
    params = (pod.group or {}).get("rayStartParams") or {}
    resources = pod.main.get("resources") or {}
    own = (resources.get("limits") or {}).get("cpu") or (resources.get("requests") or {}).get("cpu") or 0
    return float(params["num-cpus"]) if "num-cpus" in params else amount(own)


UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}i": 1024**power for power, letter in enumerate("KMGTP", start=1)
}


def amount(quantity: str | int | float) -> float:
    """A Kubernetes quantity as a number: cores, bytes or a count."""
    found = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(quantity))
    if not found or found[2] not in UNITS:
        raise ValueError(f"{quantity!r} is not a quantity")
    return float(found[1]) * UNITS[found[2]]


def selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes matches; an empty one matches everything, none matches nothing."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_meets(one, labels) for one in selector.get("matchExpressions") or ())


def _meets(expression: Object, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or ()
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[expression["operator"]]


# -- Serve


@dataclass(frozen=True)
class Deployment:
    """A deployment of the app as Serve runs it: the code's options, under those of the config."""

    name: str
    num_cpus: float
    num_gpus: float
    label_selector: Mapping[str, str]
    accelerator_type: str | None
    max_replicas: int
    shutdown_s: float
    #: GPUs by the code.
    needs_gpus: float

    def fits(self, pod: Pod) -> bool:
        """Whether the autoscaler can place a replica on a new node of the group."""
        labels = group_labels(pod)
        resources = (pod.group or {}).get("rayStartParams", {}).get("resources", "")
        resources += " ".join((pod.group or {}).get("resources") or {})
        return (
            self.num_gpus <= gpus(pod)
            and self.num_cpus <= cpus(pod)
            and all(_ray_label(wanted, labels.get(key)) for key, wanted in self.label_selector.items())
            and (self.accelerator_type is None or f"accelerator_type:{self.accelerator_type}" in resources)
        )


def _ray_label(wanted: str, value: str | None) -> bool:
    """Ray's label operators: a value, `!value`, `in(a,b)`, `!in(a,b)`."""
    negated, rest = wanted.startswith("!"), wanted.removeprefix("!")
    values = rest.removeprefix("in(").removesuffix(")").split(",") if rest.startswith("in(") else [rest]
    return (value in [one.strip() for one in values]) != negated


def serve_config(objects: Objects) -> Object:
    return yaml.load(ray_service(objects)["spec"]["serveConfigV2"], Loader=yaml.CSafeLoader)


def application(objects: Objects) -> Object:
    (app,) = [one for one in serve_config(objects)["applications"] if one.get("import_path") == BUILDER]
    return app


def settings(objects: Objects) -> Settings:
    return Settings.model_validate(application(objects)["args"])


def deployments(objects: Objects) -> list[Deployment]:
    """Every deployment of the app; raises ValidationError where the app refuses its settings."""
    app = application(objects)
    overrides = {one["name"]: one for one in app.get("deployments") or ()}
    built = _built(json.dumps(app["args"], sort_keys=True))
    return [_deployment(name, one, overrides.get(name) or {}) for name, one in built.items()]


def _deployment(name: str, code: Any, override: Object) -> Deployment:
    own, scaling = code.ray_actor_options, code._deployment_config.autoscaling_config
    # The config's options replace the code's as a whole.
    options = override.get("ray_actor_options", own)
    autoscaling = override.get("autoscaling_config") or (scaling.model_dump() if scaling else {})
    return Deployment(
        name=name,
        num_cpus=options.get("num_cpus", 1),
        num_gpus=options.get("num_gpus") or 0,
        label_selector=options.get("label_selector") or {},
        accelerator_type=options.get("accelerator_type"),
        max_replicas=autoscaling.get("max_replicas") or override.get("num_replicas") or code.num_replicas or 1,
        shutdown_s=override.get("graceful_shutdown_timeout_s", code._deployment_config.graceful_shutdown_timeout_s),
        needs_gpus=own.get("num_gpus") or 0,
    )


@cache
def _built(args: str) -> dict[str, Any]:
    """Serve's deployments by name; the app need not run for that."""
    found: dict[str, Any] = {}

    def visit(part: Any) -> None:
        if isinstance(part, serve.Application):
            found[part._bound_deployment.name] = part._bound_deployment
            visit(part._bound_deployment.init_args)
        elif isinstance(part, Mapping):
            visit(tuple(part.values()))
        elif isinstance(part, tuple):
            for one in part:
                visit(one)

    visit(build(Settings.model_validate_json(args)))
    return found
