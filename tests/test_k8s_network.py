"""Who may talk to whom in the cluster, pair by pair; the document's table and picture are made of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .k8s import network, render
from .k8s.network import ANY_OTHER
from .k8s.objects import Objects, at
from .k8s.policies import idle_peers

RAY = {"head", "cpu", "gpu"}
PROMETHEUS = {"Prometheus", "Google's Prometheus"}
#: Those that nothing here calls.
CALLERS = PROMETHEUS | {"KubeRay's operator", "the API's pods", "a stranger", "a stranger beside them"}
EVERY_POD = RAY | {"redis", "weights", "audit", "a stranger beside them"}
#: Who may connect to each port that is asked for, and nobody else.
ACCESS: dict[tuple[str, int], set[str]] = {
    # The dashboard and the job API: who has the token runs code.
    ("head", 8265): RAY | {"KubeRay's operator", "audit"},
    ("head", 8000): RAY | {"KubeRay's operator"},
    ("head", 6379): RAY,
    ("head", 10001): RAY,
    ("head", ANY_OTHER): RAY,
    # Metrics ask for no token.
    **{("head", port): RAY | PROMETHEUS for port in (8080, 44217, 44227)},
    **{(pod, 8080): RAY | PROMETHEUS for pod in ("cpu", "gpu")},
    **{(pod, 8000): RAY | {"the API's pods"} for pod in ("cpu", "gpu")},
    **{(pod, ANY_OTHER): RAY for pod in ("cpu", "gpu")},
    ("redis", 6379): {"head"},
    ("redis", ANY_OTHER): set(),
    **{(pod, port): set() for pod in ("weights", "audit") for port in (8000, ANY_OTHER)},
    # Outside.
    **{(name, 53): EVERY_POD for name in ("kube-dns", "the node's DNS cache", "Cloud DNS")},
    **{("the API server", port): {"head"} for port in (443, 6443)},
    ("the metadata server", 80): {"cpu", "gpu", "weights"},
    **{("GKE's metadata server", port): {"cpu", "gpu", "weights"} for port in (987, 988)},
    ("Google's APIs", 443): {"cpu", "gpu", "weights"},
    ("the internet", 443): {"weights"},
    ("the internet", 80): set(),
}


def astray(objects: Objects) -> set[str]:
    """A line for each that may connect and should not, and for each that should and may not."""
    known = network.actors(objects).keys()
    found = set()
    for (target, port), wanted in ACCESS.items():
        if target in known:
            wanted = (wanted & known) - {target}
            having = network.sources(objects, target, port)
            found |= {f"{name} reaches {target}:{port}" for name in having - wanted}
            found |= {f"{name} cannot reach {target}:{port}" for name in wanted - having}
    return found


@pytest.mark.parametrize("overlay", [one for one in render.OVERLAYS if one.name != "minimal"], ids=str)
def test_each_port_is_reached_by_those_who_need_it_and_nobody_else(overlay: Path) -> None:
    assert astray(render.world(overlay)) == set()


def test_a_trial_calls_nobody_outside() -> None:
    unused = {"the API server", "the metadata server", "GKE's metadata server", "Google's APIs", "the API's pods"}
    found = astray(render.world(Path("k8s/overlays/minimal")))
    assert {name for name in unused if any(name in line for line in found)} == unused
    assert {line for line in found if " reaches " in line or not any(name in line for name in unused)} == set()


def test_every_port_and_everybody_is_asked_for() -> None:
    assert {(name, port) for name, ports in network.PORTS.items() for port in ports} == ACCESS.keys()
    assert network.actors(l4()).keys() == {name for name, _ in ACCESS} | CALLERS


def test_no_rule_is_for_somebody_who_is_not_there() -> None:
    assert list(idle_peers(l4(), network.actors(l4()).values())) == []


def l4() -> Objects:
    return render.world(Path("k8s/overlays/l4"))


def policy(name: str, *path: Any, to: Any) -> Callable[[Objects], None]:
    def change(objects: Objects) -> None:
        (node,) = [one["spec"] for one in objects if at(one) == f"NetworkPolicy/{name}"]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to

    return change


def without(name: str) -> Callable[[Objects], None]:
    def change(objects: Objects) -> None:
        (one,) = [one for one in objects if at(one) == f"NetworkPolicy/{name}"]
        objects.remove(one)

    return change


ANYWHERE: dict[str, Any] = {"ipBlock": {"cidr": "0.0.0.0/0"}}
EVERY_NAMESPACE: dict[str, Any] = {"namespaceSelector": {}}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        pytest.param(*rest, id=name)
        for name, *rest in [
            (
                "a dashboard for everyone",
                policy("operator-to-head", "ingress", 0, "from", to=[EVERY_NAMESPACE]),
                "a stranger reaches head:8265",
            ),
            (
                "a job API for the namespace",
                policy("audit-to-head", "ingress", 0, "from", to=[{"podSelector": {}}]),
                "a stranger beside them reaches head:8265",
            ),
            (
                "an operator that may do all",
                policy("operator-to-head", "ingress", 0, "ports", to=[]),
                "KubeRay's operator reaches head:6379",
            ),
            (
                "Redis for workers",
                policy("head-to-redis", "ingress", 0, "from", to=[{"podSelector": {}}]),
                "cpu reaches redis:6379",
            ),
            (
                "Redis for all",
                policy("head-to-redis", "ingress", 0, "from", to=[ANYWHERE]),
                "a stranger reaches redis:6379",
            ),
            (
                "metrics for everyone",
                policy("prometheus-to-ray", "ingress", 0, "from", to=[EVERY_NAMESPACE]),
                "a stranger reaches gpu:8080",
            ),
            (
                "the head's metrics for everyone",
                policy("prometheus-to-head", "ingress", 0, "from", to=[ANYWHERE]),
                "the internet reaches head:44217",
            ),
            (
                "the API's pods on every port",
                policy("http-to-workers", "ingress", 0, "ports", to=[{"port": 8000, "endPort": 9000}]),
                "the API's pods reaches cpu:8080",
            ),
            ("no operator", without("operator-to-head"), "KubeRay's operator cannot reach head:8265"),
            (
                "an operator in another namespace",
                policy("operator-to-head", "ingress", 0, "from", to=[{"podSelector": {}}]),
                "KubeRay's operator cannot reach head:8265",
            ),
            ("no API server", without("head-to-kubernetes"), "head cannot reach the API server:443"),
            (
                "an API server by UDP alone",
                policy("head-to-kubernetes", "egress", 0, "ports", to=[{"port": 443, "protocol": "UDP"}]),
                "head cannot reach the API server:443",
            ),
            ("no DNS", without("dns"), "head cannot reach kube-dns:53"),
            ("nothing within", without("within"), "head cannot reach redis:6379"),
            ("no audits", without("audit-to-head"), "audit cannot reach head:8265"),
            ("no Prometheus", without("prometheus-to-ray"), "Prometheus cannot reach head:8080"),
            ("Ray apart", without("ray"), "cpu cannot reach head:6379"),
            ("open where nothing is said", without("default-deny"), "a stranger reaches weights:8000"),
            (
                "the internet for replicas",
                policy("google-apis", "egress", 0, "to", to=[ANYWHERE]),
                "gpu reaches the internet:443",
            ),
            (
                "an identity for the head",
                policy("google-identity", "podSelector", to={}),
                "head reaches the metadata server:80",
            ),
        ]
    ],
)
def test_a_policy_that_is_wrong_is_noticed(change: Callable[[Objects], None], finding: str) -> None:
    objects = l4()
    change(objects)
    assert finding in astray(objects)


def test_the_table_and_the_picture_in_the_docs_are_made_of_the_policies() -> None:
    text = network.DOCUMENT.read_text()
    assert text == network.with_table(text, l4()), "python -m tests.k8s.network writes it"
    assert network.PICTURE.read_text() == network.picture(network.flows(l4())), "python -m tests.k8s.network draws it"
