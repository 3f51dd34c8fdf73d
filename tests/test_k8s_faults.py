"""Faults planted in sound manifests: each is caught by one rule, the one that is meant for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .k8s import render, rules, rules_references, schemas
from .k8s.objects import Object, Objects, at

Change = Callable[[Objects], None]
DROP = object()

SERVICE = "RayService/flux-fill"
CLUSTER = ("spec", "rayClusterConfig")
HEAD, CPU, L4 = ("headGroupSpec",), ("workerGroupSpecs", "cpu"), ("workerGroupSpecs", "l4")
POD = ("template", "spec")


def _step(node: Any, key: Any) -> Any:
    """A mapping's value, or a list's item: by its place, or by the name that Kubernetes merges it by."""
    if isinstance(node, dict):
        return node[key]
    if isinstance(key, int):
        return node[key]
    (found,) = [one for one in node if key in (one.get("name"), one.get("groupName"), one.get("mountPath"))]
    return found


def put(where: str, *path: Any, to: Any) -> Change:
    """Set what stands at `path` in the object; DROP removes it, and `-` appends to a list."""

    def change(objects: Objects) -> None:
        (node,) = [one for one in objects if at(one) == where]
        for key in path[:-1]:
            node = _step(node, key)
        key = path[-1]
        if to is DROP and isinstance(node, list):
            node.remove(_step(node, key))
        elif to is DROP:
            del node[key]
        elif isinstance(node, list) and key == "-":
            node.append(to)
        else:
            node[key] = to

    return change


def ray(*path: Any, to: Any) -> Change:
    return put(SERVICE, *CLUSTER, *path, to=to)


def container(group: tuple[str, ...], *path: Any, to: Any) -> Change:
    return ray(*group, *POD, "containers", 0, *path, to=to)


def env(group: tuple[str, ...], name: str, value: str) -> Change:
    """The variable's value; added where there is none."""

    def change(objects: Objects) -> None:
        (service,) = [one for one in objects if at(one) == SERVICE]
        node: Any = service
        for key in (*CLUSTER, *group, *POD, "containers", 0):
            node = _step(node, key)
        node["env"] = [one for one in node.get("env", ()) if one["name"] != name] + [{"name": name, "value": value}]

    return change


def serve(old: str, new: str) -> Change:
    def change(objects: Objects) -> None:
        (service,) = [one for one in objects if at(one) == SERVICE]
        text = service["spec"]["serveConfigV2"]
        assert old in text
        service["spec"]["serveConfigV2"] = text.replace(old, new, 1)

    return change


def without(where: str) -> Change:
    def change(objects: Objects) -> None:
        (one,) = [one for one in objects if at(one) == where]
        objects.remove(one)

    return change


def both(*changes: Change) -> Change:
    def change(objects: Objects) -> None:
        for one in changes:
            one(objects)

    return change


SIDECAR: Object = {
    "name": "sidecar",
    "image": "sidecar:1.0",
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    },
    "resources": {
        "requests": {"cpu": "1m", "memory": "1Mi", "ephemeral-storage": "1Mi"},
        "limits": {"memory": "1Mi"},
    },
}
PAINTER = "      - name: Inpainter-Q8_0\n        ray_actor_options: {num_cpus: 0.2, %s}\n      - name: Ingress"
NETWORK, BUDGET, MONITOR = "NetworkPolicy/ray", "PodDisruptionBudget/cpu", "PodMonitor/flux-fill"
QUOTA = ("ResourceQuota/two-clusters", "spec", "hard")
KUBERAYS_LABEL = {"matchLabels": {"ray.io/node-type": "worker"}}
SUBSCRIPTION, ROLE = "PubSubSubscription/session-processing", "IAMPolicyMember/pubsub-publishes-dead"

FAULTS: list[tuple[str, str, str, Change]] = [
    # What the API server refuses or drops.
    ("an unknown key", "schemas_hold", "autoscaling", ray("autoscaling", to=True)),
    ("an unknown key of a container", "schemas_hold", "resource'", container(L4, "resource", to={})),
    ("an unknown key of metadata", "schemas_hold", "lables", put(NETWORK, "metadata", "lables", to={})),
    ("a number for a text", "schemas_hold", "not of type 'string'", ray(*HEAD, "rayStartParams", "block", to=1)),
    ("an unknown key at Google", "schemas_hold", "ackDeadline'",
     put(SUBSCRIPTION, "spec", "ackDeadline", to=60)),
    # The app's config.
    ("HeadOnly", "serve_config_is_accepted", "must be EveryNode", serve("EveryNode\n", "HeadOnly\n")),
    ("HTTP on 8080", "serve_config_is_accepted", "Ray's metrics", serve("port: 8000", "port: 8080")),
    ("a setting that the app refuses", "serve_config_is_accepted", "max_replica: unknown key",
     serve("max_replicas", "max_replica")),
    ("a deployment that is none", "serve_config_is_accepted", "not one of this app's",
     serve("- name: Ingress", "- name: Ingres")),
    ("a topic that nobody makes", "the_app_finds_what_it_names", "session-done",
     serve("session-completed", "session-done")),
    ("HTTP where KubeRay does not ask", "serve_listens_where_kuberay_asks", "8001", serve("port: 8000", "port: 8001")),
    # Ray's cluster.
    ("a head with work", "head_holds_no_work", "num-cpus: '4'", ray(*HEAD, "rayStartParams", "num-cpus", to="4")),
    ("autoscaler v1", "autoscaler_is_v2", "v1, not v2", ray("autoscalerOptions", "version", to="v1")),
    ("no autoscaler", "autoscaler_is_v2", "no group ever grows", ray("enableInTreeAutoscaling", to=False)),
    ("pods that restart", "ray_pods_never_restart", "group l4: restartPolicy: Always",
     ray(*L4, *POD, "restartPolicy", to="Always")),
    ("an upgrade step by step", "upgrade_makes_a_new_cluster", "IncrementalUpgrade",
     put(SERVICE, "spec", "upgradeStrategy", "type", to="NewClusterWithIncrementalUpgrade")),
    ("a token of each cluster", "one_token_for_both_clusters", "secretName", ray("authOptions", "secretName", to=DROP)),
    ("no token", "one_token_for_both_clusters", "are open", ray("authOptions", "mode", to="disabled")),
    ("a Ray of no version", "one_token_for_both_clusters", "rayVersion", ray("rayVersion", to=DROP)),
    ("GCS without a password", "gcs_survives_the_head", "redisPassword",
     ray("gcsFaultToleranceOptions", "redisPassword", to=DROP)),
    ("a head that is not survived", "gcs_survives_the_head", "redisAddress", ray("gcsFaultToleranceOptions", to=DROP)),
    ("a Redis without a volume", "redis_keeps_its_data", "no persistent volume",
     put("StatefulSet/redis", "spec", "volumeClaimTemplates", to=DROP)),
    ("a Redis that writes nothing down", "redis_keeps_its_data", "appendonly",
     put("StatefulSet/redis", "spec", *POD, "containers", 0, "command", to=["redis-server", "--requirepass", "$(A)"])),
    ("labels in Ray's parameters", "kuberay_accepts_the_groups", "labels",
     ray(*L4, "rayStartParams", "labels", to="a=b")),
    ("resources stated twice", "kuberay_accepts_the_groups", "resources", ray(*HEAD, "resources", to={"CPU": "0"})),
    # Its groups.
    ("L4 by name, from zero", "groups_start_from_zero", "accelerator_type L4",
     serve("      - name: Ingress", PAINTER % "num_gpus: 1, accelerator_type: L4")),
    ("a GPU group without GPUs", "groups_start_from_zero", "Inpainter-Q8_0",
     both(*(container(L4, "resources", kind, "nvidia.com/gpu", to=DROP) for kind in ("requests", "limits")))),
    ("a label that no group has", "groups_start_from_zero", "cpus",
     serve("label_selector: {pool: cpu}", "label_selector: {pool: cpus}")),
    ("an ingress on a GPU node", "gpu_nodes_are_left_to_painting", "group l4: deployment Ingress",
     serve(", label_selector: {pool: cpu}", "")),
    ("a painter without its GPU", "painters_ask_for_their_gpu", "Inpainter-Q8_0",
     serve("      - name: Ingress", PAINTER % "label_selector: {pool: l4}")),
    ("no GPU to spare", "groups_hold_what_serve_asks_for", "of l4: Serve may ask for 7 GPUs",
     both(ray(*L4, "maxReplicas", to=7), serve("nodes: 10", "nodes: 9"))),
    ("too few CPUs", "groups_hold_what_serve_asks_for", "of cpu",
     both(ray(*CPU, "maxReplicas", to=1), serve("nodes: 10", "nodes: 9"))),
    ("a GPU that audits do not know", "settings_know_the_cluster", "audit.gpus: 7, and the models can have 6",
     serve("Q8_0: {max_replicas: 4}", "Q8_0: {max_replicas: 3}")),
    ("a node that the app does not know", "settings_know_the_cluster", "nodes: 9", serve("nodes: 10", "nodes: 9")),
    # Shutdown.
    ("drain longer than grace", "drains_hold", "terminationGracePeriodSeconds: 200 is not above",
     ray(*L4, *POD, "terminationGracePeriodSeconds", to=200)),
    ("drain shorter than painting", "drains_hold", "200 is not above the 240 s that Inpainter-Q8_0",
     env(L4, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "200")),
    ("drain shorter than the ingress", "drains_hold", "95 s that Ingress",
     env(CPU, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "90")),
    ("a head that leaves first", "the_head_leaves_last", "0 is not above the workers' longest, 280",
     env(HEAD, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")),
    ("a head that is killed", "the_head_leaves_last", "30 is not above",
     ray(*HEAD, *POD, "terminationGracePeriodSeconds", to=30)),
    ("an ingress without inpainters", "the_ingress_stops_first", "pulls for 55 s",
     both(env(CPU, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "150"),
          ray(*CPU, *POD, "terminationGracePeriodSeconds", to=180))),
    ("ray stop", "nothing_stops_ray_beforehand", "`ray stop`",
     container(L4, "lifecycle", to={"preStop": {"exec": {"command": ["ray", "stop"]}}})),
    # Ray's pods.
    ("probes by hand", "probes_are_kuberays", "readinessProbe",
     container(CPU, "readinessProbe", to={"tcpSocket": {"port": 8000}})),
    ("a sidecar first", "ray_container_is_first", "the first is sidecar",
     lambda objects: _step_to(objects, L4).insert(0, SIDECAR)),
    ("a metrics port elsewhere", "metrics_ports_have_names", "as-metrics is not 44217",
     container(HEAD, "ports", "as-metrics", "containerPort", to=44218)),
    ("8080 twice", "ports_are_used_once", "8080 is dashboard and metrics",
     container(HEAD, "ports", "dashboard", "containerPort", to=8080)),
    ("an object store without a limit", "memory_is_not_overdrawn", "no sizeLimit",
     ray(*L4, *POD, "volumes", "shared-mem", "emptyDir", "sizeLimit", to=DROP)),
    ("a read-only /tmp", "ray_can_write", "/tmp", container(L4, "volumeMounts", "/tmp", to=DROP)),
    ("an object store on disk", "ray_can_write", "on disk",
     ray(*L4, *POD, "volumes", "shared-mem", "emptyDir", "medium", to=DROP)),
    ("a head that is evicted first", "head_is_evicted_last", "4Gi is not the limit",
     container(HEAD, "resources", "requests", "memory", to="4Gi")),
    ("FUSE without its annotation", "fuse_has_its_annotation", "gke-gcsfuse/volumes",
     ray(*L4, "template", "metadata", "annotations", "gke-gcsfuse/volumes", to=DROP)),
    ("a tainted node", "gpu_pods_find_their_nodes", "tolerations", ray(*L4, *POD, "tolerations", to=DROP)),
    ("another GPU", "gpu_pods_find_their_nodes", "names no L4",
     ray(*L4, *POD, "nodeSelector", "cloud.google.com/gke-accelerator", to="nvidia-tesla-t4")),
    ("no bytecode", "bytecode_is_used", "PYTHONDONTWRITEBYTECODE", env(CPU, "PYTHONDONTWRITEBYTECODE", "1")),
    # Every container.
    ("latest", "images_are_pinned", "flux-fill-serve:latest", container(L4, "image", to="flux-fill-serve:latest")),
    ("no tag", "images_are_pinned", "example.com:5000/redis",
     put("StatefulSet/redis", "spec", *POD, "containers", 0, "image", to="example.com:5000/redis")),
    ("root", "nobody_is_root", "0 is root", ray(*CPU, *POD, "securityContext", "runAsUser", to=0)),
    ("perhaps root", "nobody_is_root", "runAsNonRoot",
     put("Job/audit", "spec", *POD, "securityContext", "runAsNonRoot", to=DROP)),
    ("a writable root", "root_is_read_only", "Job/weights",
     put("Job/weights", "spec", *POD, "containers", 0, "securityContext", "readOnlyRootFilesystem", to=False)),
    ("privileges that grow", "privileges_do_not_grow", "container autoscaler",
     ray("autoscalerOptions", "securityContext", "allowPrivilegeEscalation", to=True)),
    ("a capability", "capabilities_are_dropped", "NET_ADMIN",
     container(L4, "securityContext", "capabilities", "add", to=["NET_ADMIN"])),
    ("no seccomp", "seccomp_is_on", "Unconfined",
     ray(*HEAD, *POD, "securityContext", "seccompProfile", "type", to="Unconfined")),
    ("the node's network", "host_is_left_alone", "hostNetwork", ray(*L4, *POD, "hostNetwork", to=True)),
    ("no memory limit", "resources_are_stated", "limits.memory",
     put("Job/weights", "spec", *POD, "containers", 0, "resources", "limits", "memory", to=DROP)),
    ("no ephemeral storage", "resources_are_stated", "ephemeral-storage",
     container(CPU, "resources", "requests", "ephemeral-storage", to=DROP)),
    ("a secret in plain text", "secrets_stay_in_secrets", "API_KEYS", env(CPU, "API_KEYS", "k" * 20)),
    ("a password in a URL", "secrets_stay_in_secrets", "URL with a password",
     env(CPU, "DATABASE", "postgresql://me:secret@db/jobs")),
    ("a head without its token", "only_the_head_asks_kubernetes", "head: automount",
     put("ServiceAccount/flux-fill-head", "automountServiceAccountToken", to=False)),
    ("workers with a token", "only_the_head_asks_kubernetes", "group l4: automount",
     put("ServiceAccount/flux-fill", "automountServiceAccountToken", to=DROP)),
    # Between objects.
    ("a PDB that selects nothing", "budgets_select_pods", "PodDisruptionBudget/cpu",
     put(BUDGET, "spec", "selector", to=KUBERAYS_LABEL)),
    ("a NetworkPolicy that selects nothing", "policies_select_pods", "NetworkPolicy/ray",
     put(NETWORK, "spec", "podSelector", to=KUBERAYS_LABEL)),
    ("a Service that selects nothing", "services_select_pods", "Service/redis",
     put("Service/redis", "spec", "selector", to={"app": "redis"})),
    ("a PodMonitor that misses a port", "monitors_scrape_pods", "as-metrics is scraped by no",
     put(MONITOR, "spec", "podMetricsEndpoints", 1, to=DROP)),
    ("a PodMonitor of a port that is not there", "monitors_scrape_pods", "rest is no port",
     put(MONITOR, "spec", "podMetricsEndpoints", "-", to={"port": "rest"})),
    ("no such account", "what_is_named_exists", "ServiceAccount flux",
     ray(*HEAD, *POD, "serviceAccountName", to="flux")),
    ("no such Secret", "what_is_named_exists", "Secret hugging-face", without("Secret/hugging-face")),
    ("no such ConfigMap", "what_is_named_exists", "ConfigMap serve-config", without("ConfigMap/serve-config")),
    ("a secret without auth_token", "secrets_have_their_keys", "ray-token has no key auth_token",
     put("Secret/ray-token", "data", to={"token": "x"})),
    ("pods that Google does not know", "users_of_google_have_an_identity", "group l4",
     put("ServiceAccount/flux-fill", "metadata", "annotations", to=DROP)),
    ("a quota that stops an upgrade", "quota_admits_an_upgrade", "requests.cpu: 60 is less than",
     put(*QUOTA, "requests.cpu", to="60")),
    ("a quota without a second GPU", "quota_admits_an_upgrade", "requests.nvidia.com/gpu",
     put(*QUOTA, "requests.nvidia.com/gpu", to="6")),
    ("a quota that refuses a sidecar", "quota_lets_every_container_in", "gke-gcsfuse-sidecar",
     put(*QUOTA, "limits.memory", to="4Ti")),
    # Google's side.
    ("dead letters without the agent's role", "dead_letters_have_the_agents_roles", "lacks roles/pubsub.publisher",
     without(ROLE)),
    ("a subscription that expires", "subscriptions_never_expire", "session-processing:",
     put(SUBSCRIPTION, "spec", "expirationPolicy", to=DROP)),
    ("a topic of no name", "resources_point_at_each_other", "sessions is defined nowhere",
     put(SUBSCRIPTION, "spec", "topicRef", "name", to="sessions")),
    ("an account that may not be acted as", "accounts_are_bound_at_google", "workloadIdentityUser",
     without("IAMPolicyMember/flux-fill-pods")),
    ("weights that cannot be written", "buckets_open_to_who_mounts_them", "Job/weights",
     without("IAMPolicyMember/flux-fill-weights-fills")),
]  # fmt: skip


def _step_to(objects: Objects, group: tuple[str, ...]) -> list[Object]:
    """A group's containers."""
    (node,) = [one for one in objects if at(one) == SERVICE]
    for key in (*CLUSTER, *group, *POD):
        node = _step(node, key)
    containers: list[Object] = node["containers"]
    return containers


@pytest.mark.parametrize(("rule", "words", "change"), [pytest.param(*rest, id=name) for name, *rest in FAULTS])
def test_a_fault_is_caught_by_its_rule_alone(rule: str, words: str, change: Change) -> None:
    if rule == "schemas_hold":
        schemas.need_definitions()
    objects = render.world(Path("k8s/overlays/l4"))
    change(objects)
    broken = rules.broken(objects)
    assert [*broken] == [rule], broken
    assert any(words in sentence for sentence in broken[rule]), broken[rule]


def test_a_spot_nodes_pods_have_fifteen_seconds() -> None:
    objects = render.world(Path("k8s/overlays/l4-spot"))
    ray("workerGroupSpecs", "l4-spot", *POD, "terminationGracePeriodSeconds", to=30)(objects)
    assert rules.broken(objects) == {
        "drains_hold": [f"{SERVICE} group l4-spot: terminationGracePeriodSeconds: 30 is more than a spot node's 15"]
    }


@pytest.mark.parametrize(
    ("name", "enough"),
    [("pods", 6), ("requests.cpu", 12), ("cpu", 12), ("requests.nvidia.com/gpu", 4), ("limits.memory", 9)],
)
def test_an_upgrade_takes_two_heads_and_the_groups_most_and_least(name: str, enough: int) -> None:
    """A head of 1 CPU and an autoscaler of a half; 1 to 3 workers of 2 CPUs, with a sidecar of a quarter."""

    def group(resources: Object, **spec: Any) -> Object:
        own = {"name": "ray-node", "resources": {"requests": resources, "limits": {**resources, "memory": "1"}}}
        return {"template": {"spec": {"containers": [own], **spec}}}

    bucket = {"name": "weights", "csi": {"driver": "gcsfuse.csi.storage.gke.io"}}
    workers = group({"cpu": "2", "nvidia.com/gpu": 1}, volumes=[bucket]) | {"groupName": "l4", "minReplicas": 1}
    cluster = {
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"resources": {"requests": {"cpu": "500m"}, "limits": {"memory": "1500m"}}},
        "headGroupSpec": group({"cpu": 1}),
        "workerGroupSpecs": [workers | {"maxReplicas": 3}],
    }
    service = {"kind": "RayService", "metadata": {"name": "s"}, "spec": {"rayClusterConfig": cluster}}
    quota: Object = {"kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": {name: str(enough)}}}
    assert list(rules_references.quota_admits_an_upgrade([service, quota])) == []
    quota["spec"]["hard"][name] = f"{enough * 1000 - 1}m"
    assert len(list(rules_references.quota_admits_an_upgrade([service, quota]))) == 1


def test_every_rule_catches_a_fault() -> None:
    known = {rule.__name__ for rule in (rules.ACCEPTED, *rules.OF_THE_CLUSTER, *rules.OF_THE_APP)}
    assert known == {rule for _, rule, _, _ in FAULTS}
