from dataclasses import replace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from splitserve.planner.deployment import Role
from splitserve.planner.values import ChartValues, schema, values, values_yaml
from tests.unit.planner.fixtures.results import BOTH, judged, plan, pool, with_best


def _written() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(values_yaml(plan()))
    return loaded


def test_what_is_written_is_what_the_keys_allow() -> None:
    assert ChartValues.model_validate(_written()) == values(plan())


def test_keys_are_in_helms_camel_case() -> None:
    assert _written()["slo"] == {"ttftSeconds": 0.4, "tpotSeconds": 0.1, "attainment": 0.9}
    assert _written()["pools"]["prefill"]["nodesPerWorker"] == 1


def test_a_misspelt_key_is_refused() -> None:
    said = _written()
    said["pools"]["prefill"]["replicas"] = 3
    with pytest.raises(ValidationError, match="replicas"):
        ChartValues.model_validate(said)


def test_a_pod_asks_for_its_workers_gpus() -> None:
    assert _written()["pools"]["decode"]["resources"] == {"limits": {"nvidia.com/gpu": 4}}


def test_a_worker_whose_stages_span_nodes_is_several_pods() -> None:
    wide = replace(pool(Role.PREFILL, 8, 2), nodes=((0, 1),))
    made = values(plan(found=with_best(judged(wide, pool(Role.DECODE, 4, node=2), goodput=3.0))))
    assert made.pools["prefill"].nodes_per_worker == 2
    assert made.pools["prefill"].resources == {"limits": {"nvidia.com/gpu": 8}}


def test_stages_on_one_node_are_one_pod() -> None:
    both = replace(pool(Role.PREFILL, 2, 2), nodes=((0, 0),))
    made = values(plan(found=with_best(judged(both, pool(Role.DECODE, 4), goodput=3.0))))
    assert made.pools["prefill"].nodes_per_worker == 1


@pytest.mark.parametrize(("affinity", "node", "same"), [("low", 1, True), ("high", 1, False), ("low", 0, False)])
def test_pools_share_nodes_where_the_plan_needs_it(affinity: str, node: int, same: bool) -> None:
    made = judged(pool(Role.PREFILL, 4), pool(Role.DECODE, 4, node=node), goodput=3.0, affinity=affinity)
    assert values(plan(found=with_best(made))).placement.same_node is same


def test_further_pools_of_a_role_are_numbered() -> None:
    two = with_best(
        judged(pool(Role.PREFILL, 4, kind="h100"), pool(Role.PREFILL, 2), pool(Role.DECODE, 2), goodput=3.0)
    )
    made = values(plan(BOTH, two))
    assert list(made.pools) == ["prefill", "prefill-2", "decode"]
    assert made.pools["prefill"].node_selector == {"splitserve.io/gpu": "h100"}


def test_the_schema_has_every_key_that_is_written_and_allows_no_other() -> None:
    made = schema()
    assert set(made["properties"]) == set(_written())
    assert made["additionalProperties"] is False
    pool_schema = made["$defs"]["PoolValues"]
    assert set(pool_schema["properties"]) == set(_written()["pools"]["decode"])
    assert all("description" in part for part in (pool_schema["properties"]["workers"], made)) is False
    assert pool_schema["properties"]["nodesPerWorker"]["description"]
