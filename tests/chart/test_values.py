"""Values: none is dead, none can be misspelt, and the files that are written from others are up to date."""

import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from splitserve.planner.values import GPU_LABEL, ChartValues
from tests.chart.tools import CHART, ROOT, Chart, Refused, merged, one, values_file
from tests.chart.variants import VARIANTS


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("k8s_generate", ROOT / "k8s/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generator()
SCHEMA = generate.Values(yaml.safe_load((ROOT / "k8s/schema.yaml").read_text()))
LEAVES: dict[str, Any] = dict(generate.leaves(SCHEMA.root))
# Those that turn on most come first.
ORDER = tuple(dict.fromkeys(("secured", "keda", "hpa", "cert-manager", "spanning", "rdma", "simulated", *VARIANTS)))
BASE = VARIANTS["secured"]


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def _others(leaf: dict[str, Any]) -> Iterator[Any]:
    """Values that the leaf may have instead of its default."""
    yield from leaf.get("examples", ())
    if "enum" in leaf:
        yield from (each for each in leaf["enum"] if each != leaf["default"])
    elif isinstance(leaf["default"], bool):
        yield not leaf["default"]
        yield leaf["default"]  # where a variant has it the other way round
    elif isinstance(leaf["default"], int | float) and "examples" not in leaf:
        yield leaf["default"] + 1
        yield leaf["default"] / 2
    elif isinstance(leaf["default"], str) and "examples" not in leaf:
        yield leaf["default"] + "x"


@pytest.fixture(scope="module")
def texts(chart: Chart) -> dict[str, dict[str, str]]:
    return {name: chart.texts(values) for name, values in VARIANTS.items()}


@pytest.mark.parametrize("path", LEAVES)
def test_every_value_changes_what_is_rendered(chart: Chart, texts: dict[str, dict[str, str]], path: str) -> None:
    assert any(_changes(chart, texts[name], name, path, value) for name in ORDER for value in _others(LEAVES[path])), (
        f"{path} is a dead key: no other value of it changes anything"
    )


def _changes(chart: Chart, before: dict[str, str], name: str, path: str, value: Any) -> bool:
    try:
        return chart.texts(merged(VARIANTS[name], _nested(path, value))) != before
    except Refused:
        return False


# Misspelt keys --------------------------------------------------------------------------------------------------------
def _objects(node: dict[str, Any], path: str = "") -> Iterator[str]:
    """Every mapping whose keys are ours or splitserve's, which is where a key can be misspelt."""
    yield path
    for name, child in node["properties"].items():
        here = f"{path}.{name}" if path else name
        if "properties" in child:
            yield from _objects(child, here)
        elif "settings" in child:
            yield here
        elif "each" in child:
            yield from _objects(child["each"], f"{here}.decode")


@pytest.mark.parametrize("path", [*_objects(SCHEMA.root)])
def test_a_misspelt_key_is_refused(chart: Chart, path: str) -> None:
    wrong = _nested(f"{path}.replcias" if path else "replcias", 1)
    with pytest.raises(Refused, match="replcias"):
        chart.texts(merged(BASE, wrong))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("router.config.slo_classes.interactive.ttf_s", 1),
        ("router.config.limits.stream", 1),
        ("router.config.deadline_s", "soon"),
        ("pools.decode.role", "decoder"),
        ("pools.decode.workers", -1),
        ("pools.Decode.role", "decode"),
        ("model.source", "s3"),
        ("engine.kind", "trt"),
        ("engine.tensor_parallel_size", 2),
        ("kvTransfer.settings.lease_s", 0),
        ("slo.attainment", 1),
        ("image.digest", "sha256:12"),
    ],
)
def test_a_value_that_splitserve_would_refuse_is_refused(chart: Chart, path: str, value: Any) -> None:
    with pytest.raises(Refused):
        chart.texts(merged(BASE, _nested(path, value)))


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"model": {"name": ""}}, "model.name: say what is served"),
        ({"apiKeys": {"secretName": ""}}, "insecure: routers can be reached"),
        ({"tls": {"mode": "none", "mutual": False}}, "insecure: routers can be reached"),
        ({"tls": {"secretName": ""}}, "tls.secretName"),
        ({"tls": {"mode": "certManager"}}, "tls.certManager.issuerRef"),
        ({"tls": {"mode": "none"}, "insecure": True}, "tls.mutual"),
        ({"model": {"source": "pvc"}}, "model.pvc.claimName"),
        ({"model": {"source": "hostPath"}}, "model.hostPath.path"),
        ({"grpcRoute": {"parentRefs": []}}, "grpcRoute.parentRefs"),
        ({"gateway": {"enabled": False}, "router": {"http": False}}, "ingress.enabled"),
        ({"pools": {"decode": {"nodesPerWorker": 3, "parallelism": {"tensor": 4}}}}, "can't be dealt out to 3 nodes"),
        (
            {"kvTransfer": {"mode": "pull"}, "pools": {"decode": {"nodesPerWorker": 2, "parallelism": {"tensor": 4}}}},
            "does not pull across nodes",
        ),
        ({"pools": {"router": {"role": "decode"}}}, "pools.router: the chart uses this name"),
        ({"poolDefaults": {"autoscaling": {"minWorkers": 9}}}, "more than maxWorkers"),
        ({"poolDefaults": {"strategy": {"maxUnavailable": 0}}}, "no rollout could ever end"),
        (
            {"monitoring": {"prometheusAddress": ""}, "poolDefaults": {"autoscaling": {"mode": "keda"}}},
            "monitoring.prometheusAddress",
        ),
    ],
)
def test_values_that_need_each_other_are_asked_for(chart: Chart, said: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=re.escape(sentence)):
        chart.texts(merged(BASE, said))


def test_all_that_is_wrong_is_said_at_once(chart: Chart) -> None:
    with pytest.raises(Refused, match=r"(?s)model\.name.*insecure"):
        chart.texts({})


# Files ----------------------------------------------------------------------------------------------------------------
def test_what_is_written_from_the_schema_is_up_to_date() -> None:
    for file, text in generate.written().items():
        assert file.read_text() == text, f"{file}: run k8s/generate.py"


def test_every_value_is_explained_and_every_default_is_allowed(chart: Chart) -> None:
    for path, leaf in LEAVES.items():
        assert leaf["description"].endswith("."), path
    defaults = values_file("values.yaml")
    assert {"model", "pools", "router"} <= set(defaults)
    assert chart.texts(merged(defaults, VARIANTS["minimal"])) == chart.texts(VARIANTS["minimal"])


def test_rules_and_dashboard_are_those_of_deploy() -> None:
    for copy, source in generate.COPIES.items():
        assert copy.is_relative_to(CHART)
        assert copy.read_text() == source.read_text(), f"{copy}: run k8s/generate.py"


def test_alerts_compare_with_the_attainment_that_values_say(chart: Chart) -> None:
    found = chart.documents(merged(BASE, {"slo": {"attainment": 0.77}}))
    rules = [rule for group in one(found, "PrometheusRule", "")["spec"]["groups"] for rule in group["rules"]]
    target = [rule for rule in rules if rule.get("record") == "splitserve:attainment_target:ratio"]
    assert [rule["expr"] for rule in target] == ["vector(0.77)"]


def test_the_planned_values_are_what_the_planner_writes() -> None:
    planned = ChartValues.model_validate(values_file("values-h100-70b.yaml"))
    assert all(pool.node_selector == {GPU_LABEL: "h100"} for pool in planned.pools.values())
