"""Eleven rules, each from a complaint about another chart."""

import math
import re
import textwrap
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from splitserve.telemetry.metrics import RouterMetrics, WorkerMetrics
from tests.chart.tools import CHART, NAMESPACE, Chart, Document, Refused, containers, merged, one, pod_templates
from tests.chart.variants import VARIANTS

MINIMAL, SIMULATED = VARIANTS["minimal"], VARIANTS["simulated"]
WORKLOADS = ("Deployment", "LeaderWorkerSet")
OF_THE_NAMESPACE = {
    *("ConfigMap", "Service", "ServiceAccount", "Deployment", "LeaderWorkerSet", "Pod", "NetworkPolicy"),
    *("PodDisruptionBudget", "HorizontalPodAutoscaler", "ScaledObject", "ServiceMonitor", "PodMonitor"),
    *("PrometheusRule", "Ingress", "GRPCRoute", "Certificate"),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


# 1. A rollout with no spare GPU must not wait for one for ever.
def test_a_rollout_needs_no_spare_gpu(rendered: dict[str, list[Document]]) -> None:
    for each in rendered["secured"]:
        if each["kind"] == "Deployment" and _component(each) == "worker":
            assert each["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    spanning = one(rendered["spanning"], "LeaderWorkerSet", "decode")["spec"]["rolloutStrategy"]
    assert spanning["rollingUpdateConfiguration"] == {"maxSurge": 0, "maxUnavailable": 1}


@every_variant
def test_a_router_goes_when_another_one_serves(rendered: dict[str, list[Document]], name: str) -> None:
    """It has no GPU to wait for, and the last one must not leave its clients without any."""
    strategy = one(rendered[name], "Deployment", "router")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def test_a_pool_may_roll_out_otherwise_than_another(chart: Chart) -> None:
    strategy = {"maxSurge": "50%", "maxUnavailable": 0}
    found = chart.documents(merged(VARIANTS["secured"], {"pools": {"prefill": {"strategy": strategy}}}))
    assert one(found, "Deployment", "prefill")["spec"]["strategy"]["rollingUpdate"] == strategy
    assert one(found, "Deployment", "decode")["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


# 2. The schema refuses no value that Kubernetes takes.
@pytest.mark.parametrize("owner", ["poolDefaults", "router", "gateway"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resources", {"limits": {"example.com/npu": "2", "memory": 1}, "claims": [{"name": "gpu"}]}),
        ("affinity", {"nodeAffinity": {}, "somethingNew": {"in": ["a", "later", "Kubernetes"]}}),
        ("tolerations", [{"operator": "Exists", "tolerationSeconds": 3}]),
        ("topologySpreadConstraints", [{"maxSkew": 1, "minDomains": 2, "matchLabelKeys": ["x"]}]),
        ("nodeSelector", {"a.b/c": "true"}),
        ("extraEnv", [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]),
        ("extraVolumes", [{"name": "v", "csi": {"driver": "d", "volumeAttributes": {"x": "y"}}}]),
    ],
)
def test_what_is_kubernetes_own_is_passed_on_as_it_is(chart: Chart, owner: str, key: str, value: Any) -> None:
    values = merged(MINIMAL, {owner: {key: value}, "gateway": {"enabled": True}} if owner != "gateway" else {})
    values = merged(values, {"gateway": {"enabled": True, **({key: value} if owner == "gateway" else {})}})
    component = {"poolDefaults": "worker"}.get(owner, owner)
    pods = [pod for _, pod in pod_templates(chart.documents(values)) if _component(pod) == component]
    assert pods
    for pod in pods:
        assert _includes(_place_of(pod, key), value)


# 3, that no value is dropped silently, is test_values.py.


# 4. Loading a big model takes as long as it takes.
@every_variant
def test_liveness_waits_for_the_start(rendered: dict[str, list[Document]], name: str) -> None:
    for _, pod in pod_templates(rendered[name]):
        for container in pod["spec"]["containers"]:
            assert ("livenessProbe" in container) == ("startupProbe" in container)


@pytest.mark.parametrize("seconds", [10, 1801, 7200])
def test_a_worker_may_load_its_model_for_as_long_as_is_said(chart: Chart, seconds: int) -> None:
    found = chart.documents(merged(MINIMAL, {"poolDefaults": {"startupTimeoutSeconds": seconds}}))
    deployment = one(found, "Deployment", "decode")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    start, alive = container["startupProbe"], container["livenessProbe"]
    assert start["failureThreshold"] == math.ceil(seconds / start["periodSeconds"])
    assert alive["periodSeconds"] * alive["failureThreshold"] == 60
    assert deployment["spec"]["progressDeadlineSeconds"] > seconds


# 5. No traffic goes to a pod that is not ready.
@every_variant
def test_only_routers_are_found_before_they_are_ready(rendered: dict[str, list[Document]], name: str) -> None:
    early = [each for each in rendered[name] if (each.get("spec") or {}).get("publishNotReadyAddresses")]
    assert [each["metadata"]["name"] for each in early] == ["try-splitserve-routers"]
    assert early[0]["spec"]["clusterIP"] == "None"


@every_variant
def test_whatever_a_service_selects_says_when_it_is_ready(rendered: dict[str, list[Document]], name: str) -> None:
    services = [each["spec"] for each in rendered[name] if each["kind"] == "Service"]
    for service in services:
        chosen = [pod for _, pod in pod_templates(rendered[name]) if _selects(service["selector"], pod)]
        ports = {port["name"] for pod in chosen for port in pod["spec"]["containers"][0].get("ports", [])}
        assert chosen
        assert {port["targetPort"] for port in service["ports"]} <= ports
        leaders = [pod["spec"]["containers"][0] for pod in chosen if pod["spec"]["containers"][0].get("ports")]
        assert all("readinessProbe" in container for container in leaders)


# 6. One owner of the number of workers.
@every_variant
def test_replicas_are_said_by_one_owner(rendered: dict[str, list[Document]], name: str) -> None:
    scalers = [each for each in rendered[name] if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    owned = [
        (
            each["spec"]["scaleTargetRef"]["kind"],
            each["spec"]["scaleTargetRef"]["name"],
            each["spec"]["scaleTargetRef"]["apiVersion"],
        )
        for each in scalers
    ]
    assert len(set(owned)) == len(owned)
    workloads = {
        (each["kind"], each["metadata"]["name"], each["apiVersion"]): each
        for each in rendered[name]
        if each["kind"] in WORKLOADS
    }
    assert set(owned) <= set(workloads)
    for key, each in workloads.items():
        assert ("replicas" in each["spec"]) == (key not in owned)


def test_a_pool_is_scaled_by_what_its_role_runs_short_of(rendered: dict[str, list[Document]]) -> None:
    for pool, metrics in {
        "prefill": {"splitserve_queue_mean_seconds", "splitserve_missed_share"},
        "decode": {"splitserve_pool_kv_use", "splitserve_missed_share"},
        "mixed": {"splitserve_queue_mean_seconds", "splitserve_pool_kv_use", "splitserve_missed_share"},
    }.items():
        hpa = one(rendered["hpa"], "HorizontalPodAutoscaler", pool)["spec"]
        keda = one(rendered["keda"], "ScaledObject", pool)["spec"]
        assert {each["external"]["metric"]["name"] for each in hpa["metrics"]} == metrics
        assert {each["name"] for each in keda["triggers"]} == {each.replace("_", "-") for each in metrics}


def test_routers_are_scaled_by_the_cpu_that_they_ask_for(chart: Chart, rendered: dict[str, list[Document]]) -> None:
    hpa = one(rendered["hpa"], "HorizontalPodAutoscaler", "router")["spec"]
    assert hpa["metrics"] == [
        {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}}
    ]
    scaled = merged(MINIMAL, {"router": {"autoscaling": {"mode": "hpa"}}})
    with pytest.raises(Refused, match=r"router.resources.requests.cpu"):
        chart.documents(scaled)


def test_autoscalers_ask_for_metrics_that_there_are(rendered: dict[str, list[Document]]) -> None:
    registry = CollectorRegistry()
    RouterMetrics(registry)
    WorkerMetrics(registry)
    known = {family.name for family in registry.collect()}
    scalers = [each["spec"] for each in rendered["keda"] if each["kind"] == "ScaledObject"]
    queries = {trigger["metadata"]["query"] for spec in scalers for trigger in spec["triggers"]}
    names = {name for query in queries for name in re.findall(r"(splitserve_\w+){", query)}
    assert len(queries) == 5  # of queues and of misses one, of KV one for each pool
    assert {re.sub("_(sum|count|total)$", "", name) for name in names} <= known


@pytest.mark.parametrize("pool", ["decode", "decode-a100", "mixed"])
def test_a_pool_is_scaled_by_its_own_workers(rendered: dict[str, list[Document]], pool: str) -> None:
    (monitor,) = [each["spec"] for each in rendered["keda"] if each["kind"] == "PodMonitor"]
    triggers = one(rendered["keda"], "ScaledObject", pool)["spec"]["triggers"]
    (query,) = [each["metadata"]["query"] for each in triggers if each["name"] == "splitserve-pool-kv-use"]
    matchers = re.findall(r"\{([^}]*)\}", query)
    assert len(matchers) == 2
    for text in matchers:
        wanted = dict(re.findall(r'(\w+)="([^"]*)"', text))
        assert wanted.pop("namespace") == NAMESPACE
        wanted.pop("state", None)
        scraped = {
            name: {
                re.sub(r"\W", "_", label): pod["metadata"]["labels"].get(label) for label in monitor["podTargetLabels"]
            }
            for name, pod in pod_templates(rendered["keda"])
        }
        meant = [name for name, labels in scraped.items() if wanted.items() <= labels.items()]
        assert meant == [f"Deployment/try-splitserve-{pool}"]


def test_the_readme_has_rules_for_every_metric_that_an_hpa_reads(rendered: dict[str, list[Document]]) -> None:
    readme = (CHART.parent / "README.md").read_text()
    block = re.search(r"(?s)\n    externalRules:\n.*?\n\n", readme)
    assert block is not None
    rules = yaml.safe_load(textwrap.dedent(block[0]))["externalRules"]
    hpas = [each["spec"] for each in rendered["hpa"] if each["kind"] == "HorizontalPodAutoscaler"]
    external = [metric for spec in hpas for metric in spec["metrics"] if metric["type"] == "External"]
    read = {metric["external"]["metric"]["name"] for metric in external}
    assert {rule["name"]["as"] for rule in rules} == read


# 7. No privilege unasked for, and no falling back to TCP.
@every_variant
def test_privileges_are_asked_for_only_for_rdma(rendered: dict[str, list[Document]], name: str) -> None:
    for _, pod in pod_templates(rendered[name]):
        spec = pod["spec"]
        assert not [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
        for container in containers(pod):
            added = container["securityContext"]["capabilities"].get("add")
            computes = name == "rdma" and _component(pod) == "worker" and container["name"] == "worker"
            assert added == (["IPC_LOCK"] if computes else None)
            assert ("rdma/hca" in container.get("resources", {}).get("limits", {})) == computes


@pytest.mark.parametrize(("transport", "has", "lacks"), [("rdma", "rc", "tcp"), ("tcp", "tcp", "rc")])
def test_a_transport_that_is_said_has_no_fallback(chart: Chart, transport: str, has: str, lacks: str) -> None:
    found = chart.documents(merged(MINIMAL, {"kvTransfer": {"transport": transport}}))
    allowed = _environment(one(found, "Deployment", "decode"))["UCX_TLS"].split(",")
    assert has in allowed
    assert lacks not in allowed


def test_ucx_chooses_where_nothing_is_said(rendered: dict[str, list[Document]]) -> None:
    assert not [key for key in _environment(one(rendered["minimal"], "Deployment", "decode")) if key.startswith("UCX")]


# 8. One namespace, no operator, no right to anything.
@every_variant
def test_it_installs_in_one_namespace_without_rights(rendered: dict[str, list[Document]], name: str) -> None:
    assert {each["kind"] for each in rendered[name]} <= OF_THE_NAMESPACE
    for each in rendered[name]:
        assert "namespace" not in each["metadata"]
    for _, pod in pod_templates(rendered[name]):
        assert pod["spec"]["automountServiceAccountToken"] is False


@every_variant
def test_no_image_is_anybody_elses(rendered: dict[str, list[Document]], name: str) -> None:
    images = {container["image"] for _, pod in pod_templates(rendered[name]) for container in containers(pod)}
    assert all(re.fullmatch(r"splitserve/(router|worker):\d+\.\d+\.\d+", image) for image in images)


# 9. Not root, nothing writable but what must be.
@every_variant
def test_containers_run_as_nobody_on_a_read_only_root(rendered: dict[str, list[Document]], name: str) -> None:
    for _, pod in pod_templates(rendered[name]):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] > 0
        assert security["fsGroup"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            home = {each["name"]: each.get("value") for each in container["env"]}["HOME"]
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert {home, "/tmp"} <= writable


@every_variant
def test_what_is_mounted_is_there(rendered: dict[str, list[Document]], name: str) -> None:
    maps = {each["metadata"]["name"] for each in rendered[name] if each["kind"] == "ConfigMap"}
    for _, pod in pod_templates(rendered[name]):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        used = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        assert used == set(volumes)
        assert {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume} <= maps


# 10. The whole of it can be tried on any cluster.
def test_simulated_workers_need_no_gpu_and_no_download(rendered: dict[str, list[Document]]) -> None:
    pods = [pod for _, pod in pod_templates(rendered["simulated"])]
    assert {_component(pod) for pod in pods} == {"router", "gateway", "worker", "test"}
    for pod in pods:
        assert "initContainers" not in pod["spec"]
        for container in containers(pod):
            assert set(container.get("resources", {}).get("limits", {})) <= {"memory", "cpu"}


# 11. What does not compute has no torch and no vLLM.
@every_variant
def test_only_workers_that_compute_have_the_workers_image(rendered: dict[str, list[Document]], name: str) -> None:
    simulated = VARIANTS[name].get("engine", {}).get("kind") == "sim"
    for _, pod in pod_templates(rendered[name]):
        computes = _component(pod) == "worker" and not simulated
        images = {container["image"].partition(":")[0] for container in containers(pod)}
        assert images == {"splitserve/worker" if computes else "splitserve/router"}


# Pieces ---------------------------------------------------------------------------------------------------------------
def _component(each: Document) -> str:
    return str(each["metadata"]["labels"]["app.kubernetes.io/component"])


def _selects(selector: dict[str, str], pod: Document) -> bool:
    labels: dict[str, str] = pod["metadata"]["labels"]
    return selector.items() <= labels.items()


def _environment(workload: Document) -> dict[str, str]:
    container = workload["spec"]["template"]["spec"]["containers"][0]
    return {each["name"]: each.get("value", "") for each in container["env"]}


def _place_of(pod: Document, key: str) -> Any:
    main = pod["spec"]["containers"][0]
    return {"resources": main.get("resources"), "extraEnv": main["env"], "extraVolumes": pod["spec"]["volumes"]}.get(
        key, pod["spec"].get(key)
    )


def _includes(found: Any, said: Any) -> bool:
    if isinstance(said, dict):
        return isinstance(found, dict) and all(_includes(found.get(key), value) for key, value in said.items())
    if isinstance(said, list):
        return isinstance(found, list) and all(any(_includes(each, value) for each in found) for value in said)
    return bool(found == said)
