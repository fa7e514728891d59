"""`cluster.yaml` from a plan: what `splitserve up` starts on one machine."""

from pathlib import Path
from typing import Any

import yaml

from splitserve.core.config import DEFAULT_CLASS, ClusterConfig, parse
from splitserve.core.errors import ConfigError
from splitserve.core.worker import Pool
from splitserve.latency.profile import read as read_profile
from splitserve.planner.deployment import Parallelism, Role
from splitserve.planner.plan import Plan, PoolFigures

POOLS = {Role.PREFILL: Pool.PREFILL, Role.DECODE: Pool.DECODE, Role.COLOCATED: Pool.DECODE}


def cluster(plan: Plan) -> ClusterConfig:
    """A decode pool without a prefill pool reads its own prompts: that is how colocated serving is written. The
    router is told the objectives; workers whose steps a profile was measured of, where it is, unless pools do better.

    Raises ConfigError for a placement that one machine of one kind can't hold, and for a profile that can't be read.
    """
    placement = plan.chosen.placement
    if placement.spans_nodes:
        raise ConfigError(
            "placement", "it spans nodes and `splitserve up` starts one machine; use the chart's values (--values)"
        )
    by_pool = {POOLS[pool.role]: pool for pool in placement.pools}
    if len(by_pool) < len(placement.pools):
        raise ConfigError("placement", "two pools have one role; use the chart's values (--values)")
    pools = {str(pool): _pool(plan, by_pool[pool]) if pool in by_pool else {"workers": 0} for pool in Pool}
    said = {"model": plan.inputs.model, "engine": engine_of_all(plan), "router": _router(plan), "pools": pools}
    return parse(ClusterConfig, said, "cluster.yaml")


def cluster_yaml(plan: Plan) -> str:
    """Only what differs from the defaults. Raises as `cluster` does."""
    said = cluster(plan).model_dump(mode="json", exclude_unset=True)
    return _HEAD.format(plan.chosen.placement) + yaml.safe_dump(said, sort_keys=False, width=120)


_HEAD = "# {}\n# Written by `splitserve plan`; start it with: splitserve up cluster.yaml\n"


def engine(pool: PoolFigures) -> dict[str, Any]:
    """One pool's engine options, under vLLM's names."""
    return {
        "tensor_parallel_size": pool.tp,
        "pipeline_parallel_size": pool.pp,
        "max_num_batched_tokens": pool.chunk_tokens,
    }


def engine_of_all(plan: Plan) -> dict[str, Any]:
    """What all pools have in common, under vLLM's names."""
    asked = plan.inputs
    extra = {"quantization": asked.quantization, "kv_cache_dtype": asked.kv_dtype}
    given = {key: value for key, value in extra.items() if value}
    return {
        "kind": "vllm",
        "max_model_len": plan.engine.max_model_len,
        "max_num_seqs": plan.engine.max_sequences,
        "block_size": plan.engine.block_tokens,
        **({"dtype": asked.dtype} if asked.dtype else {}),
        **({"extra": given} if given else {}),
    }


def _router(plan: Plan) -> dict[str, Any]:
    return {"slo_classes": {DEFAULT_CLASS: {"ttft_s": plan.inputs.ttft, "tpot_s": plan.inputs.tpot}}}


def _pool(plan: Plan, pool: PoolFigures) -> dict[str, Any]:
    """Without its profile a worker is used by its pool, whatever the objectives, which are then only judged by."""
    profile = {} if plan.better_by_pools else _profile(plan.inputs.profile, pool.parallelism)
    return {"workers": pool.workers, "engine": engine(pool) | profile}


def _profile(file: Path | None, parallelism: Parallelism) -> dict[str, Any]:
    if file is None:
        return {}
    measured = read_profile(file)
    return {"profile": str(file)} if Parallelism(measured.tp, measured.pp) == parallelism else {}
