"""Which keys of the Helm chart's values a plan sets, and their writing. The chart's own schema includes `schema()`.

Keys are in Helm's camelCase; `engine` holds vLLM's options under vLLM's own names, as in a worker's YAML. What a plan
knows nothing of (images, tolerations, storage) is the chart's alone and not here.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from splitserve.core.worker import Pool
from splitserve.planner.cluster import POOLS, engine, engine_of_all
from splitserve.planner.plan import Plan, PoolFigures

GPU_LABEL = "splitserve.io/gpu"

Positive = Annotated[float, Field(gt=0)]
PoolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}$")]


class Values(BaseModel):
    """Base: camelCase keys, and none unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


class ModelValues(Values):
    name: str = Field(description="what is served; where its files are is `model.source`, which a plan does not know")


class SloValues(Values):
    """What the router schedules by, and what alerts compare with."""

    ttft_seconds: Positive
    tpot_seconds: Positive
    attainment: float = Field(gt=0, lt=1)


class ParallelismValues(Values):
    tensor: int = Field(ge=1)
    pipeline: int = Field(ge=1)


class PoolValues(Values):
    """Workers of one shape. A worker is one pod, or a LeaderWorkerSet of `nodesPerWorker` pods."""

    role: Pool = Field(description="what its workers are used for at first; a decode pool alone serves colocated")
    workers: int = Field(ge=0)
    parallelism: ParallelismValues
    nodes_per_worker: int = Field(ge=1, description="above 1 a worker is a LeaderWorkerSet of so many pods")
    resources: dict[str, Any] = Field(description="of one pod, as Kubernetes takes it: GPUs under limits")
    node_selector: dict[str, str] = Field(description=f"the kind of GPU, by the node label {GPU_LABEL}")
    engine: dict[str, Any] = Field(description="vLLM's options, over those of all pools")


class PlacementValues(Values):
    same_node: bool = Field(
        description="put prefill and decode workers on one node, so that KV moves over its NVLink (low affinity)"
    )


class PlannedValues(Values):
    """For people and for `splitserve plan watch`; the chart shows them in its notes."""

    goodput_rps: float
    gpus: int
    workload: str
    splitserve: str


class ChartValues(Values):
    """All that a plan sets."""

    model: ModelValues
    slo: SloValues
    engine: dict[str, Any] = Field(description="vLLM's options of every pool")
    pools: dict[PoolName, PoolValues] = Field(min_length=1)
    placement: PlacementValues
    planned: PlannedValues


def values(plan: Plan) -> ChartValues:
    asked, placement = plan.inputs, plan.chosen.placement
    return ChartValues(
        model=ModelValues(name=asked.model),
        slo=SloValues(ttft_seconds=asked.ttft, tpot_seconds=asked.tpot, attainment=asked.attainment),
        engine=engine_of_all(plan),
        pools=dict(_named(placement.pools)),
        placement=PlacementValues(same_node=placement.affinity == "low" and placement.spans_nodes),
        planned=PlannedValues(
            goodput_rps=plan.chosen.goodput_rps.mean,
            gpus=placement.gpus,
            workload=plan.workload.name,
            splitserve=plan.splitserve,
        ),
    )


def values_yaml(plan: Plan) -> str:
    said = values(plan).model_dump(mode="json", by_alias=True)
    return _HEAD.format(plan.chosen.placement, GPU_LABEL) + yaml.safe_dump(said, sort_keys=False, width=120)


_HEAD = """\
# {}
# Written by `splitserve plan`. Nodes are told apart by the label {}.
"""


def schema() -> dict[str, Any]:
    """JSON schema of `ChartValues`, for the chart's values.schema.json."""
    return ChartValues.model_json_schema(by_alias=True)


def _named(pools: Iterable[PoolFigures]) -> Iterable[tuple[str, PoolValues]]:
    """By role; further pools of a role are numbered from 2."""
    seen: dict[str, int] = {}
    for pool in pools:
        role = POOLS[pool.role]
        nth = seen[role] = seen.get(role, 0) + 1
        yield str(role) + (f"-{nth}" if nth > 1 else ""), _pool(pool)


def _pool(pool: PoolFigures) -> PoolValues:
    """Pipeline stages that sit on several nodes are as many pods, each with its nodes' share of the GPUs."""
    pods = max(len(set(nodes)) for nodes in pool.nodes)
    return PoolValues(
        role=POOLS[pool.role],
        workers=pool.workers,
        parallelism=ParallelismValues(tensor=pool.tp, pipeline=pool.pp),
        nodes_per_worker=pods,
        resources={"limits": {"nvidia.com/gpu": -(-pool.tp * pool.pp // pods)}},
        node_selector={GPU_LABEL: pool.gpu},
        engine={key: value for key, value in engine(pool).items() if not key.endswith("parallel_size")},
    )
