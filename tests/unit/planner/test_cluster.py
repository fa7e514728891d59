from pathlib import Path

import pytest
import yaml

from splitserve.core.config import DEFAULT_CLASS, ClusterConfig, parse
from splitserve.core.errors import ConfigError
from splitserve.core.worker import Pool
from splitserve.latency.profile import Profile
from splitserve.planner.cluster import cluster, cluster_yaml
from splitserve.planner.deployment import Role
from splitserve.planner.plan import IntervalFigures, Plan
from tests.unit.planner.fixtures.results import INPUTS, judged, plan, pool, with_best


def test_up_accepts_what_is_written() -> None:
    read = parse(ClusterConfig, yaml.safe_load(cluster_yaml(plan())), "cluster.yaml")
    assert read == cluster(plan())


def test_each_pool_has_its_workers_and_parallelism() -> None:
    pools = cluster(plan()).pools
    assert {pool: settings.workers for pool, settings in pools.items()} == {Pool.PREFILL: 1, Pool.DECODE: 1}
    assert pools[Pool.PREFILL].engine["tensor_parallel_size"] == 4
    assert pools[Pool.DECODE].engine["pipeline_parallel_size"] == 2


def test_colocated_serving_is_a_decode_pool_alone() -> None:
    made = cluster(plan(found=with_best(judged(pool(Role.COLOCATED, 4, workers=2, chunk=512), goodput=3.0))))
    assert {pool: settings.workers for pool, settings in made.pools.items()} == {Pool.PREFILL: 0, Pool.DECODE: 2}
    assert made.pools[Pool.DECODE].engine["max_num_batched_tokens"] == 512


def test_number_types_reach_the_engine() -> None:
    asked = INPUTS.model_copy(update={"dtype": "bfloat16", "quantization": "fp8", "kv_dtype": "fp8"})
    engine = cluster(plan(asked)).engine
    assert engine.kind == "vllm"
    assert (engine.dtype, engine.max_model_len, engine.max_num_seqs) == ("bfloat16", 2048, 256)
    assert engine.extra == {"quantization": "fp8", "kv_cache_dtype": "fp8"}


def test_a_placement_that_spans_nodes_is_for_the_chart() -> None:
    spread = with_best(judged(pool(Role.PREFILL, 4), pool(Role.DECODE, 4, node=1), goodput=3.0))
    with pytest.raises(ConfigError, match=r"placement: it spans nodes .*--values"):
        cluster(plan(found=spread))


def test_two_pools_of_one_role_are_for_the_chart() -> None:
    two = with_best(judged(pool(Role.PREFILL, 4), pool(Role.PREFILL, 2), pool(Role.DECODE, 2), goodput=3.0))
    with pytest.raises(ConfigError, match=r"two pools have one role"):
        cluster(plan(found=two))


def test_the_router_is_told_the_objectives_that_were_planned_for() -> None:
    told = cluster(plan()).router.slo_classes[DEFAULT_CLASS]
    assert (told.ttft_s, told.tpot_s) == (0.4, 0.1)


def with_profile(file: Path) -> Plan:
    return plan().model_copy(update={"inputs": INPUTS.model_copy(update={"profile": file})})


def test_a_profile_goes_to_the_workers_that_it_was_measured_of(tmp_path: Path) -> None:
    """Of four ranks like the prefill workers; a decode worker has other steps."""
    file = tmp_path / "profile.json"
    Profile("opt-66b", "a100-80g", "vllm", tp=4).write(file)
    pools = cluster(with_profile(file)).pools
    assert pools[Pool.PREFILL].engine["profile"] == str(file)
    assert "profile" not in pools[Pool.DECODE].engine


def test_workers_that_serve_more_by_their_pools_get_no_profile(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    Profile("opt-66b", "a100-80g", "vllm", tp=4).write(file)
    static = with_profile(file).chosen.goodput_rps.mean
    slower = IntervalFigures(mean=0.8 * static, low=0.7 * static, high=0.9 * static)
    pools = cluster(with_profile(file).model_copy(update={"adaptive_rps": slower})).pools
    assert "profile" not in pools[Pool.PREFILL].engine


def test_a_profile_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile\.json"):
        cluster(with_profile(tmp_path / "profile.json"))
