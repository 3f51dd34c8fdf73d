"""Who may connect to whom, by Kubernetes' NetworkPolicies.

Source: "Network Policies" in Kubernetes' documentation. Policies add up, and none can take away what another allows. A
pod that no policy of a direction selects is open in that direction. A connection needs leave on both sides; its answers
need none.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from .objects import Object, Objects, namespace, of_kind, selects


@dataclass(frozen=True)
class Actor:
    """A pod, or something outside the cluster."""

    name: str
    #: Any of these may be its address. One of a pod counts in ipBlocks, too, as with some network plugins.
    addresses: tuple[str, ...]
    #: None: outside the cluster.
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    namespace_labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    #: Named container ports.
    ports: Mapping[tuple[str, str], int] = field(default_factory=dict, hash=False)


def allowed(objects: Objects, source: Actor, target: Actor, port: int, protocol: str = "TCP") -> bool:
    """Raises ValueError where it depends on which of its addresses an actor has."""
    found = {
        _leaves(objects, source, target, address, port, protocol)
        and _enters(objects, source, own, target, port, protocol)
        for own in source.addresses
        for address in target.addresses
    }
    if len(found) > 1:
        raise ValueError(f"{source.name} to {target.name}, port {port}: some addresses are allowed, others not")
    return found.pop()


def deciding(objects: Objects, direction: str, pod: Actor) -> Objects:
    """The policies that select a pod for `ingress` or `egress`. Without any, the pod is open."""
    return [
        one
        for one in of_kind(objects, "NetworkPolicy")
        if namespace(one) == pod.namespace
        and selects(one["spec"]["podSelector"], pod.labels)
        and direction.capitalize() in _directions(one["spec"])
    ]


def _directions(spec: Object) -> list[str]:
    default = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]
    return spec.get("policyTypes") or default


def _leaves(objects: Objects, source: Actor, target: Actor, address: str, port: int, protocol: str) -> bool:
    policies = deciding(objects, "egress", source)
    return not policies or any(
        _matches(rule.get("to"), one, target, address) and _opens(rule.get("ports"), target, port, protocol)
        for one in policies
        for rule in one["spec"].get("egress") or ()
    )


def _enters(objects: Objects, source: Actor, address: str, target: Actor, port: int, protocol: str) -> bool:
    policies = deciding(objects, "ingress", target)
    return not policies or any(
        _matches(rule.get("from"), one, source, address) and _opens(rule.get("ports"), target, port, protocol)
        for one in policies
        for rule in one["spec"].get("ingress") or ()
    )


def _matches(peers: Objects | None, policy: Object, other: Actor, address: str) -> bool:
    """A rule without peers is for all."""
    return not peers or any(_is_peer(peer, policy, other, address) for peer in peers)


def _is_peer(peer: Object, policy: Object, other: Actor, address: str) -> bool:
    if block := peer.get("ipBlock"):
        inside = ip_address(address) in ip_network(block["cidr"])
        return inside and not any(ip_address(address) in ip_network(one) for one in block.get("except") or ())
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        is_there = selects(peer["namespaceSelector"], other.namespace_labels)
    else:
        is_there = other.namespace == namespace(policy)
    return is_there and ("podSelector" not in peer or selects(peer["podSelector"], other.labels))


def _opens(ports: Objects | None, target: Actor, port: int, protocol: str) -> bool:
    """A rule without ports is for all."""
    return not ports or any(port in range(*_range(one, target)) for one in ports if _protocol(one) == protocol)


def _range(one: Object, target: Actor) -> tuple[int, int]:
    """First port and the one after the last; none for a name that the target does not have."""
    first = one.get("port")
    if first is None:
        return 0, 65536
    if isinstance(first, str):
        number = target.ports.get((first, _protocol(one)))
        return (number, number + 1) if number else (0, 0)
    return first, one.get("endPort", first) + 1


def _protocol(port: Object) -> str:
    return port.get("protocol", "TCP")


def granting(objects: Objects, source: Actor, target: Actor, port: int, protocol: str = "TCP") -> Objects:
    """The policies that allow a connection: those of the target, or of the source where the target has none."""
    direction, pod = ("ingress", target) if deciding(objects, "ingress", target) else ("egress", source)
    others = [one for one in objects if one not in deciding(objects, direction, pod)]
    return [one for one in deciding(objects, direction, pod) if allowed([*others, one], source, target, port, protocol)]


def idle_peers(objects: Objects, actors: Iterable[Actor]) -> Iterator[str]:
    """Peers of a policy's rules that are none of the actors."""
    for policy in of_kind(objects, "NetworkPolicy"):
        for direction, side in (("ingress", "from"), ("egress", "to")):
            for peer in (peer for rule in policy["spec"].get(direction) or () for peer in rule.get(side) or ()):
                if not any(_is_peer(peer, policy, one, address) for one in actors for address in one.addresses):
                    yield f"NetworkPolicy/{policy['metadata']['name']}: {direction}: {peer}"
