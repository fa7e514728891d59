"""Every values file and every variant renders, in Helm 3 and in Helm 4, to the same documents, and lints."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.chart.tools import CHART, Chart, Document, Refused, helm3_lint, helm3_template, helm4, needs_npm
from tests.chart.variants import VARIANTS

INFORMATION = 1  # Helm 4's severity: an icon is recommended
HELM_3 = ("simulated", "planned", "secured", "spanning-keda", "hpa")  # half a second each


@pytest.mark.parametrize("name", VARIANTS)
def test_no_two_documents_have_one_name(rendered: dict[str, list[Document]], name: str) -> None:
    found = Counter((each["apiVersion"], each["kind"], each["metadata"]["name"]) for each in rendered[name])
    assert found
    assert not [key for key, count in found.items() if count > 1]


@pytest.mark.parametrize("name", VARIANTS)
def test_no_text_is_left_of_a_template(rendered: dict[str, list[Document]], name: str) -> None:
    for each in rendered[name]:
        if each["kind"] != "PrometheusRule" and not each["metadata"]["name"].endswith("-dashboard"):
            assert not [sign for sign in ("{{", "<no value>", "%!") if sign in json.dumps(each)], each


@needs_npm
@pytest.mark.parametrize("name", HELM_3)
def test_helm_3_renders_what_helm_4_does(rendered: dict[str, list[Document]], name: str, tmp_path: Path) -> None:
    assert _by_name(helm3_template(VARIANTS[name], tmp_path)) == _by_name(rendered[name])


@needs_npm
@pytest.mark.parametrize("name", ["simulated", "secured"])
def test_helm_3_lints_it_without_a_warning(name: str, tmp_path: Path) -> None:
    assert "1 chart(s) linted, 0 chart(s) failed" in helm3_lint(VARIANTS[name], tmp_path)


@needs_npm
def test_helm_3_refuses_a_misspelt_key(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="replicsa"):
        helm3_template({**VARIANTS["simulated"], "router": {"replicsa": 3}}, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_helm_4_lints_it_without_a_warning(name: str) -> None:
    said = helm4.lint(str(CHART), values=VARIANTS[name], kube_version="v1.33.0")
    assert said["total_charts_linted"] == 1
    assert not said["errors"]
    assert not [each for each in said["messages"] if each["severity"] > INFORMATION]


@pytest.mark.parametrize("name", VARIANTS)
def test_notes_say_where_clients_go(chart: Chart, name: str) -> None:
    notes = chart.notes(VARIANTS[name])
    assert "try-splitserve.serving.svc:50051" in notes
    assert "/v1" in notes
    assert ("without TLS or a key" in notes) == bool(VARIANTS[name].get("insecure"))


def _by_name(found: list[Document]) -> dict[str, Document]:
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in found}
