"""NetworkPolicies: exactly the flows there are. What processes listen on is compared in e2e/test_chart_on_ray."""

from __future__ import annotations

import pytest

from tests.deploy.chart import PROFILES, Manifest, PodTemplate, matches, objects, pods

Flow = tuple[str, str, int | None]
"""From a component to a component or to the outside, and the port; None: any."""

RAY = ("ray-head", "worker")
INSIDE: set[Flow] = {
    ("gateway", "worker", 50052),
    ("gateway", "state", 6379),
    ("worker", "state", 6379),
    ("worker", "kv", 6379),
    ("ray-head", "gcs", 6379),
    ("test", "gateway", 50051),
    # Ray's nodes speak on ports that they choose.
    *((one, other, None) for one in RAY for other in RAY),
}
POLICED = [profile for profile in PROFILES if objects(profile, "NetworkPolicy")]


def kind_of(pod: PodTemplate) -> str:
    return "worker" if pod.component.startswith("worker-") else pod.component


def rules(profile: str, pod: PodTemplate, direction: str) -> list[Manifest]:
    """The rules that hold for a pod; that there are any policies for it is another test's matter."""
    chosen = [p["spec"] for p in objects(profile, "NetworkPolicy") if matches(p["spec"]["podSelector"], pod.labels)]
    return [rule for spec in chosen for rule in spec.get(direction, ())]


def allowed_ports(rules: list[Manifest], side: str, other: PodTemplate) -> set[int | None]:
    ports: set[int | None] = set()
    for rule in rules:
        if any("podSelector" in peer and matches(peer["podSelector"], other.labels) for peer in rule[side]):
            ports |= {port["port"] for port in rule["ports"]} if "ports" in rule else {None}
    return ports


@pytest.mark.parametrize("profile", POLICED)
def test_every_pod_is_closed_but_for_what_is_named(profile: str) -> None:
    for pod in pods(profile):
        chosen = [p["spec"] for p in objects(profile, "NetworkPolicy") if matches(p["spec"]["podSelector"], pod.labels)]
        assert {"Ingress", "Egress"} <= {kind for spec in chosen for kind in spec["policyTypes"]}, pod.owner


@pytest.mark.parametrize("profile", POLICED)
def test_between_pods_exactly_the_flows_there_are_may_pass(profile: str) -> None:
    made = pods(profile)
    flows: set[Flow] = set()
    for source in made:
        for target in made:
            out = allowed_ports(rules(profile, source, "egress"), "to", target)
            into = allowed_ports(rules(profile, target, "ingress"), "from", source)
            # The gateways' clients are all pods of the namespace; who has no way out isn't one.
            for port in out | into:
                if (port in out or None in out) and (port in into or None in into):
                    flows.add((kind_of(source), kind_of(target), port))
    kinds = {kind_of(pod) for pod in made}
    expected = {flow for flow in INSIDE if {flow[0], flow[1]} <= kinds}
    # Where all ports are open, single ones are too.
    assert {flow for flow in flows if flow[2] is None or (flow[0], flow[1], None) not in flows} == expected


@pytest.mark.parametrize("profile", POLICED)
def test_every_way_out_is_matched_by_a_way_in(profile: str) -> None:
    made = pods(profile)
    for source in made:
        for rule in rules(profile, source, "egress"):
            for peer in rule["to"]:
                if set(peer) != {"podSelector"}:
                    continue
                targets = [pod for pod in made if matches(peer["podSelector"], pod.labels)]
                assert targets, f"{source.owner}: a way to pods that aren't there"
                for target in targets:
                    into = allowed_ports(rules(profile, target, "ingress"), "from", source)
                    out = {port["port"] for port in rule["ports"]} if "ports" in rule else {None}
                    assert None in into or out <= into, (source.owner, target.owner, out, into)


@pytest.mark.parametrize("profile", POLICED)
def test_ports_that_are_let_in_are_ports_of_the_pod(profile: str) -> None:
    for pod in pods(profile):
        for rule in rules(profile, pod, "ingress"):
            assert {port["port"] for port in rule.get("ports", ())} <= set(pod.ports.values()), pod.owner


@pytest.mark.parametrize("profile", POLICED)
def test_the_ways_to_the_outside_are_few(profile: str) -> None:
    outside: set[tuple[str, int]] = set()
    for pod in pods(profile):
        for rule in rules(profile, pod, "egress"):
            if any("podSelector" not in peer for peer in rule["to"]):
                outside |= {(kind_of(pod), port["port"]) for port in rule["ports"]}
    names = {(kind_of(pod), 53) for pod in pods(profile)}
    assert (
        outside - names
        == {
            "cpu-trial": {("worker", 443)},
            "one-gpu": set(),
            "many-gpus": {("worker", 443), ("worker", 4317), ("gateway", 4317), ("ray-head", 443), ("ray-head", 6443)},
            "external-redis": {
                *(("gateway", 6380), ("worker", 6380), ("ray-head", 6380)),
                *(("worker", 443), ("ray-head", 443), ("ray-head", 6443)),
            },
        }[profile]
    )
