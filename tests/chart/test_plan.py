"""A plan is values: what the planner writes renders and says what the plan says, and the chart knows its every key."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.core import TyperGroup
from typer.testing import CliRunner

from splitserve.cli.main import app
from splitserve.planner.plan import read_plan
from splitserve.planner.values import ChartValues, schema
from tests.chart.test_values import LEAVES
from tests.chart.tools import CHART, KUBERNETES, Chart, faults, one, pod_templates, values_file

QUESTION = (
    *("--model", "opt-13b", "--gpus", "a100-80g:1x2", "--workload", "prompt=256,output=64"),
    *("--effort", "quick", "--seeds", "2"),
)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A plan that is searched now, and the values that come with it."""
    directory = tmp_path_factory.mktemp("plan")
    plan, values = directory / "plan.yaml", directory / "values.yaml"
    done = CliRunner().invoke(app, ["plan", *QUESTION, "--out", str(plan), "--values", str(values)])
    assert done.exit_code == 0, done.output
    return plan, yaml.safe_load(values.read_text())


def test_a_plan_renders_and_validates(chart: Chart, planned: tuple[Path, dict[str, Any]]) -> None:
    plan, values = read_plan(planned[0]), {**planned[1], "insecure": True}
    found = chart.documents(values)
    assert not [fault for each in found for version in KUBERNETES if (fault := faults(each, version))]
    workers = [each for each in found if each["kind"] == "Deployment" and "splitserve.io/pool" in _labels(each)]
    pools = plan.chosen.placement.pools
    assert sorted(each["spec"]["replicas"] for each in workers) == sorted(pool.workers for pool in pools)
    gpus = [_gpus(pod) * each["spec"]["replicas"] for each in workers for _, pod in pod_templates([each])]
    assert sum(gpus) == plan.chosen.placement.gpus


def test_a_plan_brings_its_objectives_to_the_router(chart: Chart, planned: tuple[Path, dict[str, Any]]) -> None:
    found = chart.documents({**planned[1], "insecure": True})
    config = yaml.safe_load(one(found, "ConfigMap", "router")["data"]["router.yaml"])
    asked = read_plan(planned[0]).inputs
    assert config["slo_classes"]["standard"] == {"ttft_s": asked.ttft, "tpot_s": asked.tpot}


def test_the_planned_file_says_a_command_that_there_is() -> None:
    first = (CHART / "values-h100-70b.yaml").read_text().partition("\n")[0]
    _, program, command, *options = shlex.split(first)
    commands = typer.main.get_command(app)
    assert program == "splitserve"
    assert isinstance(commands, TyperGroup)
    with commands.commands[command].make_context(command, options) as context:
        assert context.params["model"] == values_file("values-h100-70b.yaml")["model"]["name"]


def test_the_chart_knows_every_key_that_a_plan_may_set() -> None:
    for name, field in ChartValues.model_fields.items():
        key = field.alias or name
        assert any(path == key or path.startswith(f"{key}.") for path in LEAVES), key
    pool = set(schema()["$defs"]["PoolValues"]["properties"]) - {"role"}
    known = {path.split(".")[1] for path in LEAVES if path.startswith("poolDefaults.")}
    assert pool <= known


def _gpus(pod: dict[str, Any]) -> int:
    return int(pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])


def _labels(each: dict[str, Any]) -> dict[str, str]:
    labels: dict[str, str] = each["metadata"]["labels"]
    return labels
