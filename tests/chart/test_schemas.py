"""What the chart renders is what Kubernetes takes: its own kinds by the schemas of three versions, unknown fields
included; custom resources by their CRDs.

LeaderWorkerSet's CRD has no published validator: its own fields are held to `leaderworkerset.json`, written for this
test after its API reference, and its pods to Kubernetes' schema like everyone's.
"""

import copy
import json
from typing import Any

import pytest

from tests.chart.tools import (
    HERE,
    KUBERNETES,
    Document,
    custom_faults,
    faults,
    jsonschema,
    kubernetes_validate,
    needs_npm,
    one,
    pod_templates,
)
from tests.chart.variants import VARIANTS

FROM_CRDS = ("GRPCRoute", "ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "Certificate")
_GROUP = json.loads((HERE / "leaderworkerset.json").read_text())


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", VARIANTS)
def test_kubernetes_takes_every_document(rendered: dict[str, list[Document]], name: str, version: str) -> None:
    unknown = {each["kind"] for each in rendered[name] if not _is_kubernetes(each, version)}
    assert unknown <= {*FROM_CRDS, "LeaderWorkerSet"}
    said = [faults(each, version) for each in rendered[name] if each["kind"] not in unknown]
    assert not [fault for fault in said if fault]


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_schemas_refuse_what_kubernetes_would(rendered: dict[str, list[Document]], version: str) -> None:
    good = one(rendered["simulated"], "Deployment", "decode")
    misspelt, mistyped = copy.deepcopy(good), copy.deepcopy(good)
    misspelt["spec"]["template"]["spec"]["containers"][0]["enviroment"] = []
    mistyped["spec"]["replicas"] = "two"
    assert not faults(good, version)
    assert faults(misspelt, version)
    assert faults(mistyped, version)


@needs_npm
def test_custom_resources_are_what_their_crds_say(rendered: dict[str, list[Document]]) -> None:
    custom = [each for found in rendered.values() for each in found if each["kind"] in FROM_CRDS]
    assert {each["kind"] for each in custom} == set(FROM_CRDS)
    assert not [fault for fault in custom_faults(custom) if fault]


@needs_npm
def test_crds_refuse_what_their_operators_would(rendered: dict[str, list[Document]]) -> None:
    broken = []
    for kind in FROM_CRDS:
        some = next(each for found in rendered.values() for each in found if each["kind"] == kind)
        broken.append({**some, "spec": {**some["spec"], **_MISTAKES[kind]}})
    assert all(custom_faults(broken))


_MISTAKES: dict[str, dict[str, Any]] = {
    "GRPCRoute": {"hostnames": "one"},
    "ServiceMonitor": {"endpoints": {"port": "metrics"}},
    "PodMonitor": {"selector": None},
    "PrometheusRule": {"groups": [{"rules": []}]},
    "ScaledObject": {"triggers": [{"type": "prometheus"}]},
    "Certificate": {"secretName": 3},
}


def test_leader_worker_sets_are_well_formed(rendered: dict[str, list[Document]]) -> None:
    sets = [each for found in rendered.values() for each in found if each["kind"] == "LeaderWorkerSet"]
    assert sets
    for each in sets:
        jsonschema.validate(each, _GROUP)
        for _, pod in pod_templates([each]):
            for version in KUBERNETES:
                assert not faults(_as_pod(pod), version)


def test_a_misspelt_field_of_a_leader_worker_set_is_refused(rendered: dict[str, list[Document]]) -> None:
    broken = copy.deepcopy(one(rendered["spanning"], "LeaderWorkerSet", "decode"))
    broken["spec"]["leaderWorkerTemplate"]["worker"] = broken["spec"]["leaderWorkerTemplate"].pop("workerTemplate")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, _GROUP)


def _is_kubernetes(document: Document, version: str) -> bool:
    try:
        faults(document, version)
    except kubernetes_validate.SchemaNotFoundError:
        return False
    return True


def _as_pod(template: Document) -> Document:
    metadata = {"name": "one", **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
