"""Who reaches what, by the NetworkPolicies as Kubernetes evaluates them."""

from typing import Any

import pytest

from tests.chart.tools import NAMESPACE, Chart, Document, merged, pod_templates
from tests.chart.variants import VARIANTS

Pod = dict[str, str]  # its labels
STRANGER: Pod = {"app": "stranger"}


class Network:
    """The policies of a rendered chart, and its pods by component."""

    def __init__(self, found: list[Document]) -> None:
        self._policies = [each["spec"] for each in found if each["kind"] == "NetworkPolicy"]
        pods = {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for _, pod in pod_templates(found)}
        self.pods: dict[str, Pod] = {name: pod["metadata"]["labels"] for name, pod in pods.items()}

    def reaches(self, source: Pod, namespace: str, target: str, port: str | int) -> bool:
        """Whether a pod with these labels in this namespace may connect to the component's port."""
        selected = [
            policy
            for policy in self._policies
            if "Ingress" in policy["policyTypes"] and _matches(policy["podSelector"], self.pods[target])
        ]
        return not selected or any(
            _lets_in(rule, source, namespace, port) for policy in selected for rule in policy["ingress"]
        )


def _lets_in(rule: dict[str, Any], source: Pod, namespace: str, port: str | int) -> bool:
    ports = rule.get("ports")
    if ports is not None and port not in [each["port"] for each in ports]:
        return False
    return any(_is(peer, source, namespace) for peer in rule["from"])


def _is(peer: dict[str, Any], source: Pod, namespace: str) -> bool:
    if "namespaceSelector" not in peer and namespace != NAMESPACE:
        return False
    names = {"kubernetes.io/metadata.name": namespace}
    return _matches(peer.get("namespaceSelector", {}), names) and _matches(peer.get("podSelector", {}), source)


def _matches(selector: dict[str, Any], labels: Pod) -> bool:
    assert set(selector) <= {"matchLabels"}
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


@pytest.fixture(scope="module")
def network(rendered: dict[str, list[Document]]) -> Network:
    return Network(rendered["secured"])


def test_only_workers_reach_where_kv_goes(network: Network) -> None:
    worker, router = network.pods["worker"], network.pods["router"]
    assert network.reaches(worker, NAMESPACE, "worker", 34567)
    assert not network.reaches(router, NAMESPACE, "worker", 34567)
    assert not network.reaches(STRANGER, NAMESPACE, "worker", 34567)
    assert not network.reaches(worker, "elsewhere", "worker", 34567)


def test_workers_gateways_and_tests_reach_routers(network: Network) -> None:
    for name in ("worker", "gateway", "test"):
        assert network.reaches(network.pods[name], NAMESPACE, "router", "grpc")
        assert network.reaches(network.pods[name], NAMESPACE, "router", "http")


def test_clients_come_from_the_namespace_and_nowhere_else(network: Network) -> None:
    for target, port in (("router", "grpc"), ("router", "http"), ("gateway", "http")):
        assert network.reaches(STRANGER, NAMESPACE, target, port)
    assert not network.reaches(STRANGER, "elsewhere", "router", "grpc")


def test_metrics_are_reached_from_where_it_is_said(chart: Chart, network: Network) -> None:
    assert network.reaches(STRANGER, "monitoring", "router", "metrics")
    assert network.reaches(STRANGER, "monitoring", "worker", "metrics")
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    narrowed = Network(chart.documents(merged(VARIANTS["secured"], {"networkPolicy": {"monitoring": [peer]}})))
    for target in ("router", "worker"):
        assert narrowed.reaches(STRANGER, "monitoring", target, "metrics")
        assert not narrowed.reaches(STRANGER, "elsewhere", target, "metrics")


def test_egress_is_closed_only_where_rules_are_given(rendered: dict[str, list[Document]]) -> None:
    def closes(name: str) -> list[Document]:
        policies = [each for each in rendered[name] if each["kind"] == "NetworkPolicy"]
        return [each for each in policies if "Egress" in each["spec"]["policyTypes"]]

    assert not closes("secured")
    (policy,) = closes("closed")
    ports = [port for rule in policy["spec"]["egress"] for port in rule.get("ports", [])]
    assert {"port": 53, "protocol": "UDP"} in ports
    assert {"port": 443} in ports
