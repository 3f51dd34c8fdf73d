"""Who talks to whom: every pair of pods and of what surrounds them, by the rendered NetworkPolicies.

`python -m tests.k8s.network` writes the table of docs/deploy.md and docs/images/network.svg.
"""

from collections.abc import Iterator
from pathlib import Path

from .network_picture import Flow, picture
from .objects import Objects, Pod, pods
from .policies import Actor, allowed, granting
from .render import world

OVERLAY = Path("k8s/overlays/l4")
DOCUMENT, PICTURE = Path("docs/deploy.md"), Path("docs/images/network.svg")
BEGIN, END = "<!-- network -->", "<!-- /network -->"

#: Stands for the ports that Ray's processes choose when they start.
ANY_OTHER = 20000
NAMESPACE, WHY = "flux-fill", "fluxfill/why"


def _namespace(name: str, **labels: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name, **labels}


def _pod(name: str, space: str, address: str, **labels: str) -> Actor:
    return Actor(name, (address,), space, labels, _namespace(space))


#: What is not of the manifests. Addresses are examples of where such a thing stands.
OTHERS = (
    _pod("KubeRay's operator", "kuberay-system", "10.4.1.1"),
    _pod("Prometheus", "monitoring", "10.4.1.2"),
    _pod("Google's Prometheus", "gke-gmp-system", "10.4.1.3"),
    Actor("the API's pods", ("10.4.1.4",), "api", {}, _namespace("api") | {"fluxfill/http": "allowed"}),
    _pod("a stranger", "elsewhere", "10.4.1.5"),
    _pod("a stranger beside them", "flux-fill", "10.4.1.6"),
    Actor("kube-dns", ("10.4.1.7",), "kube-system", {"k8s-app": "kube-dns"}, _namespace("kube-system")),
    Actor("the node's DNS cache", ("169.254.20.10",)),
    Actor("the API server", ("10.128.0.2", "172.16.0.2", "192.168.0.2")),
    Actor("Cloud DNS", ("169.254.169.254",)),
    Actor("the metadata server", ("169.254.169.254",)),
    Actor("GKE's metadata server", ("169.254.169.252",)),
    Actor("Google's APIs", ("199.36.153.8", "199.36.153.11")),
    Actor("the internet", ("203.0.113.7", "8.8.8.8")),
)
#: The ports that are asked for: where it matters that some can and others cannot.
PORTS = {
    "head": (8000, 8265, 6379, 10001, 8080, 44217, 44227, ANY_OTHER),
    "cpu": (8000, 8080, ANY_OTHER),
    "gpu": (8000, 8080, ANY_OTHER),
    "redis": (6379, ANY_OTHER),
    "weights": (8000, ANY_OTHER),
    "audit": (8000, ANY_OTHER),
    "kube-dns": (53,),
    "the node's DNS cache": (53,),
    "the API server": (443, 6443),
    "Cloud DNS": (53,),
    "the metadata server": (80,),
    "GKE's metadata server": (987, 988),
    "Google's APIs": (443,),
    "the internet": (80, 443),
}


def actors(objects: Objects) -> dict[str, Actor]:
    """Our own pods by component, and the others."""
    found: dict[str, Actor] = {}
    for number, pod in enumerate(pods(objects), start=1):
        found.setdefault(pod.component, _actor(pod, f"10.4.0.{number}"))
    return found | {one.name: one for one in OTHERS}


def _actor(pod: Pod, address: str) -> Actor:
    ports = {
        (port["name"], port.get("protocol", "TCP")): port["containerPort"]
        for _, container in pod.containers
        for port in container.get("ports") or ()
        if "name" in port
    }
    return Actor(pod.component, (address,), pod.namespace, pod.labels, _namespace(pod.namespace), ports)


def sources(objects: Objects, target: str, port: int, protocol: str = "TCP") -> set[str]:
    """The names of those who may connect to a port: for one outside the namespace, of its pods alone."""
    known = actors(objects)
    ours = {name for name, one in known.items() if one.namespace == NAMESPACE}
    asking = known if target in ours else ours
    return {name for name in asking if name != target and allowed(objects, known[name], known[target], port, protocol)}


def flows(objects: Objects) -> list[Flow]:
    """Everything that the policies allow, of what is asked for, from and to as many as possible at once."""
    known = actors(objects)
    ours = {name for name, one in known.items() if one.namespace == NAMESPACE}
    asked: dict[tuple[str, str, str], set[str]] = {}
    for target, ports in PORTS.items():
        for source in known if target in ours else ours:
            for why, open_ports in _open(objects, known[source], known[target], ports):
                asked.setdefault((target, open_ports, why), set()).add(source)
    merged: dict[tuple[frozenset[str], str, str], list[str]] = {}
    for (target, open_ports, why), callers in asked.items():
        merged.setdefault((frozenset(callers), open_ports, why), []).append(target)
    return [
        Flow(tuple(name for name in known if name in callers), tuple(targets), open_ports, why)
        for (callers, open_ports, why), targets in merged.items()
    ]


def _open(objects: Objects, source: Actor, target: Actor, ports: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Why some ports are open, and which."""
    reasons: dict[str, list[str]] = {}
    for protocol in ("TCP", "UDP") if 53 in ports else ("TCP",):
        for port in ports:
            if allowed(objects, source, target, port, protocol):
                why = granting(objects, source, target, port, protocol)[0]["metadata"]["annotations"][WHY]
                reasons.setdefault(why, []).append(f"{port}" if protocol == "TCP" else f"{port}/{protocol}")
    for why, those in reasons.items():
        yield why, "all" if str(ANY_OTHER) in those else ", ".join(those)


def table(objects: Objects) -> str:
    everyone = {name for name, one in actors(objects).items() if one.namespace == NAMESPACE}
    rows = ["| from | to | ports | why |", "|---|---|---|---|"]
    for one in flows(objects):
        callers = "every pod here" if everyone <= {*one.sources} else ", ".join(one.sources)
        rows.append(f"| {callers} | {', '.join(one.targets)} | {one.ports} | {one.why} |")
    return "\n".join(rows)


def with_table(text: str, objects: Objects) -> str:
    """The document with its table made anew."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{table(objects)}\n\n{END}{after}"


if __name__ == "__main__":
    served = world(OVERLAY)
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(), served))
    PICTURE.write_text(picture(flows(served)))
