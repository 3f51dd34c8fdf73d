"""The evaluator of NetworkPolicies keeps to what Kubernetes' documentation says of them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .k8s.objects import Object
from .k8s.policies import Actor, allowed

APP = Actor(
    "app", ("10.1.0.1",), "ours", {"app": "a", "tier": "web"}, {"team": "us"}, {("http", "TCP"): 80, ("dns", "UDP"): 53}
)
SISTER = Actor("sister", ("10.1.0.2",), "ours", {"app": "b"}, {"team": "us"})
STRANGER = Actor("stranger", ("10.2.0.1",), "theirs", {"app": "b"}, {"team": "them"})
OUTSIDE = Actor("outside", ("203.0.113.9",))
ACTORS = (APP, SISTER, STRANGER, OUTSIDE)

LABELS = {"matchLabels": {"app": "b"}}
THEIRS = {"matchLabels": {"team": "them"}}
NET = {"cidr": "203.0.113.0/24"}


def policy(selector: Object | None = None, **spec: Any) -> Object:
    found = {"kind": "NetworkPolicy", "metadata": {"name": "p", "namespace": "ours"}, "spec": spec}
    found["spec"]["podSelector"] = selector or {}
    return found


def into(*peers: Object, ports: list[Object] | None = None) -> Object:
    rule: Object = {"from": list(peers)} if peers else {}
    return policy(ingress=[rule | ({"ports": ports} if ports is not None else {})])


def out_to(*peers: Object, ports: list[Object] | None = None) -> Object:
    rule: Object = {"to": list(peers)} if peers else {}
    return policy(policyTypes=["Egress"], egress=[rule | ({"ports": ports} if ports is not None else {})])


@pytest.mark.parametrize(
    ("policies", "sources"),
    [
        pytest.param([], {"sister", "stranger", "outside"}, id="without a policy a pod is open"),
        pytest.param([policy()], set(), id="a policy without rules closes what it selects"),
        pytest.param([policy(ingress=[])], set(), id="an empty list has no rule"),
        pytest.param([into()], {"sister", "stranger", "outside"}, id="an empty rule is for all"),
        pytest.param([policy(LABELS)], {"sister", "stranger", "outside"}, id="a policy for other pods closes nothing"),
        pytest.param([out_to()], {"sister", "stranger", "outside"}, id="a policy for egress closes no ingress"),
        pytest.param([into({"podSelector": {}})], {"sister"}, id="a pod selector looks into the policy's namespace"),
        pytest.param([into({"podSelector": LABELS})], {"sister"}, id="by labels"),
        pytest.param([into({"podSelector": {"matchLabels": {"app": "c"}}})], set(), id="by labels that no pod has"),
        pytest.param([into({"namespaceSelector": {}})], {"sister", "stranger"}, id="every namespace is no address"),
        pytest.param([into({"namespaceSelector": THEIRS})], {"stranger"}, id="a namespace, all its pods"),
        pytest.param(
            [into({"namespaceSelector": THEIRS, "podSelector": {"matchLabels": {"app": "a"}}})],
            set(),
            id="both in one peer: both must match",
        ),
        pytest.param(
            [into({"namespaceSelector": THEIRS}, {"podSelector": LABELS})],
            {"sister", "stranger"},
            id="two peers: either may match",
        ),
        pytest.param([into({"ipBlock": NET})], {"outside"}, id="addresses"),
        pytest.param([into({"ipBlock": NET | {"except": ["203.0.113.8/30"]}})], set(), id="all but some addresses"),
        pytest.param([into({"ipBlock": {"cidr": "10.2.0.0/16"}})], {"stranger"}, id="a pod has an address, too"),
        pytest.param([policy(), into({"podSelector": LABELS})], {"sister"}, id="policies add up"),
        pytest.param(
            [policy({"matchExpressions": [{"key": "tier", "operator": "Exists"}]})],
            set(),
            id="a policy by expressions that hold",
        ),
        pytest.param(
            [policy({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["web"]}]})],
            {"sister", "stranger", "outside"},
            id="a policy by expressions that do not hold",
        ),
        pytest.param(
            [policy(egress=[{}])],
            set(),
            id="with egress rules and no types a policy is for both, ingress without rules",
        ),
    ],
)
def test_who_may_connect_to_a_pod(policies: list[Object], sources: set[str]) -> None:
    assert {one.name for one in ACTORS[1:] if allowed(policies, one, APP, 80)} == sources


@pytest.mark.parametrize(
    ("port", "reached"),
    [
        ({"port": 80}, {(80, "TCP")}),
        ({"port": "http"}, {(80, "TCP")}),
        ({"port": "dns"}, set()),
        ({"port": "dns", "protocol": "UDP"}, {(53, "UDP")}),
        ({"port": "https"}, set()),
        ({"port": 50, "endPort": 80}, {(80, "TCP"), (53, "TCP")}),
        ({"port": 54, "endPort": 79}, set()),
        ({"protocol": "UDP"}, {(80, "UDP"), (53, "UDP")}),
        ({}, {(80, "TCP"), (53, "TCP")}),
    ],
    # A set's own order differs from process to process.
    ids=lambda value: str(value if isinstance(value, dict) else sorted(value)),
)
def test_which_ports_a_rule_opens(port: Object, reached: set[tuple[int, str]]) -> None:
    tried = [(number, protocol) for number in (80, 53) for protocol in ("TCP", "UDP")]
    assert {one for one in tried if allowed([into(ports=[port])], SISTER, APP, *one)} == reached
    assert {one for one in tried if allowed([out_to(ports=[port])], SISTER, APP, *one)} == reached


def test_a_connection_needs_leave_on_both_sides() -> None:
    leaves, enters = out_to({"podSelector": {"matchLabels": {"app": "a"}}}), into({"podSelector": LABELS})
    assert allowed([leaves, enters], SISTER, APP, 80)
    assert not allowed([leaves, policy()], SISTER, APP, 80)
    assert not allowed([policy(policyTypes=["Egress"]), enters], SISTER, APP, 80)
    assert not allowed([leaves, enters], APP, SISTER, 80)


def test_addresses_that_are_treated_differently_are_named() -> None:
    either = Actor("either", ("203.0.113.9", "198.51.100.1"))
    with pytest.raises(ValueError, match="either to app, port 80: some addresses"):
        allowed([into({"ipBlock": NET})], either, APP, 80)


peers = st.sampled_from(
    [{"podSelector": LABELS}, {"podSelector": {}}, {"namespaceSelector": THEIRS}, {"ipBlock": NET}, {"ipBlock": NET}]
)
ports = st.none() | st.lists(st.sampled_from([{"port": 80}, {"port": "http"}, {"port": 90}]), min_size=1)
policies = st.lists(st.lists(peers).flatmap(lambda ps: ports.map(lambda open: into(*ps, ports=open))), min_size=1)


@given(policies, st.sampled_from(ACTORS[1:]), st.sampled_from([80, 90]))
def test_what_several_policies_allow_is_what_one_of_them_allows(all_of: list[Object], source: Actor, port: int) -> None:
    each = [allowed([one], source, APP, port) for one in all_of]
    assert allowed(all_of, source, APP, port) == any(each) == allowed([policy(), *all_of[::-1]], source, APP, port)


@given(policies, st.sampled_from([STRANGER, OUTSIDE]), st.sampled_from([80, 90]))
def test_rules_for_what_enters_keep_nothing_from_leaving(all_of: list[Object], target: Actor, port: int) -> None:
    assert allowed(all_of, APP, target, port)
