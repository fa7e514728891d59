"""Which processes a cluster is made of."""

from collections.abc import Mapping
from typing import Any

import pytest

from splitserve.cli.local import Machine, Overrides, ProcessPlan, cluster_of, merged, plan_router, plan_workers, waves
from splitserve.core.config import ClientTls, ClusterConfig, RouterConfig, VllmSettings, WorkerConfig
from splitserve.core.errors import ConfigError
from splitserve.core.worker import Pool

TAKEN = {9401, 9403}


def machine(cores: tuple[int, ...] = (0, 1), gpus: tuple[str, ...] = ()) -> Machine:
    return Machine(cores, gpus, lambda port: port not in TAKEN)


def cluster(**said: Any) -> ClusterConfig:
    return cluster_of(said, Overrides(), "cluster.yaml")


def workers(config: ClusterConfig, on: Machine | None = None) -> list[tuple[ProcessPlan, WorkerConfig]]:
    plans = plan_workers(config, "127.0.0.1:7", on or machine(), "cluster.yaml")
    return [(plan, plan.config) for plan in plans if isinstance(plan.config, WorkerConfig)]


def test_without_a_file_there_is_one_worker_in_each_pool() -> None:
    assert [(config.name, config.pool) for _, config in workers(cluster())] == [
        ("prefill-0", Pool.PREFILL),
        ("decode-0", Pool.DECODE),
    ]


def test_every_worker_joins_the_router_and_serves_the_clusters_model() -> None:
    planned = workers(cluster(model="some/model", served_model_name="it", kv_transfer={"lease_s": 3}))
    assert {(config.model, config.served_model_name, tuple(config.routers)) for _, config in planned} == {
        ("some/model", "it", ("127.0.0.1:7",))
    }
    assert {config.kv_transfer.lease_s for _, config in planned} == {3.0}


def test_workers_reach_a_router_with_tls_and_keys_as_the_cluster_says() -> None:
    tls = {"certificate": "a.pem", "key": "a.key"}
    planned = workers(cluster(router={"tls": tls}, router_tls={"ca": "ca.pem"}, api_key_file="fleet.key"))
    assert {config.router_tls for _, config in planned} == {ClientTls(ca="ca.pem")}
    assert {config.api_key_file for _, config in planned} == {"fleet.key"}


def test_insecure_is_said_to_the_router() -> None:
    assert plan_router(cluster_of({}, Overrides(insecure=True), "options")).config == RouterConfig(insecure=True)


def test_taken_metrics_ports_are_skipped() -> None:
    planned = workers(cluster(pools={"decode": {"workers": 3}}))
    assert [config.metrics for _, config in planned] == ["127.0.0.1:9402", "127.0.0.1:9404", "127.0.0.1:9405"]


def test_no_metrics_port_means_no_metrics() -> None:
    assert {config.metrics for _, config in workers(cluster(worker_metrics_port=None))} == {None}


def test_running_out_of_ports_is_said() -> None:
    with pytest.raises(ConfigError, match="no free port from 65535"):
        workers(cluster(worker_metrics_port=65535))


def test_engines_on_a_cpu_take_one_core_each_in_turn() -> None:
    planned = workers(cluster(pools={"prefill": {"workers": 2}, "decode": {"workers": 1}}), machine(cores=(2, 5)))
    assert [config.cpu_core for _, config in planned] == [2, 5, 2]
    assert all(plan.environment["OMP_NUM_THREADS"] == "1" for plan, _ in planned)


def test_a_pools_own_cores_win() -> None:
    pools = {"prefill": {"workers": 2, "cpu_cores": [3]}, "decode": {"workers": 2, "cpu_cores": [4, 5]}}
    assert [config.cpu_core for _, config in workers(cluster(pools=pools))] == [3, 3, 4, 5]


def test_on_a_cpu_the_dtype_is_float32_unless_said() -> None:
    def dtypes(config: ClusterConfig, on: Machine) -> set[str]:
        return {worker.engine.dtype for _, worker in workers(config, on) if isinstance(worker.engine, VllmSettings)}

    assert dtypes(cluster(), machine()) == {"float32"}
    assert dtypes(cluster(engine={"dtype": "bfloat16"}), machine()) == {"bfloat16"}
    assert dtypes(cluster(), machine(gpus=("0",))) == {"auto"}


def test_gpus_are_dealt_out_by_parallelism() -> None:
    pools = {"prefill": {"workers": 1}, "decode": {"workers": 1}}
    planned = workers(cluster(engine={"tensor_parallel_size": 2}, pools=pools), machine(gpus=("0", "1", "2", "3")))
    assert [plan.environment["CUDA_VISIBLE_DEVICES"] for plan, _ in planned] == ["0,1", "2,3"]
    assert [config.cpu_core for _, config in planned] == [None, None]


def test_workers_share_a_gpu_when_there_are_too_few() -> None:
    planned = workers(cluster(), machine(gpus=("7",)))
    assert [plan.environment["CUDA_VISIBLE_DEVICES"] for plan, _ in planned] == ["7", "7"]


def test_pools_of_different_parallelism_get_gpus_of_their_own() -> None:
    pools = {"prefill": {"engine": {"tensor_parallel_size": 2}}, "decode": {"workers": 2}}
    planned = workers(cluster(pools=pools), machine(gpus=("0", "1", "2", "3")))
    assert [plan.environment["CUDA_VISIBLE_DEVICES"] for plan, _ in planned] == ["0,1", "2", "3"]


def shares(config: ClusterConfig, gpus: tuple[str, ...]) -> list[float]:
    engines = [config.engine for _, config in workers(config, machine(gpus=gpus))]
    return [engine.gpu_memory_utilization for engine in engines if isinstance(engine, VllmSettings)]


def test_workers_that_share_a_gpu_share_its_memory_unless_told_how() -> None:
    assert shares(cluster(), ("0",)) == [0.45, 0.45]
    assert shares(cluster(), ("0", "1")) == [0.9, 0.9]
    assert shares(cluster(pools={"prefill": {}, "decode": {"workers": 2}}), ("0", "1")) == [0.45, 0.9, 0.45]
    assert shares(cluster(engine={"gpu_memory_utilization": 0.3}), ("0",)) == [0.3, 0.3]
    said = {"prefill": {"engine": {"gpu_memory_utilization": 0.2}}, "decode": {}}
    assert shares(cluster(pools=said), ("0",)) == [0.2, 0.45]
    assert shares(cluster(engine={"extra": {"gpu_memory_utilization": 0.4}}), ("0",)) == [0.9, 0.9]  # extra wins later


def test_of_the_workers_on_one_gpu_one_starts_after_the_other() -> None:
    def names(config: ClusterConfig, *gpus: str) -> list[list[str]]:
        return [
            [plan.name for plan in wave] for wave in waves([plan for plan, _ in workers(config, machine(gpus=gpus))])
        ]

    assert names(cluster(), "0") == [["prefill-0"], ["decode-0"]]
    assert names(cluster(), "0", "1") == [["prefill-0", "decode-0"]]
    three = cluster(pools={"prefill": {"engine": {"tensor_parallel_size": 2}}, "decode": {"workers": 2}})
    assert names(three, "0", "1", "2") == [["prefill-0", "decode-0"], ["decode-1"]]
    assert names(cluster()) == [["prefill-0", "decode-0"]]


def test_a_pools_environment_lies_over_what_up_sets() -> None:
    own = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "60", "HF_HUB_OFFLINE": "0"}
    pools: dict[str, Any] = {"prefill": {"environment": own}, "decode": {}}
    prefill, decode = (plan.environment for plan, _ in workers(cluster(pools=pools), machine(gpus=("0",))))
    assert (prefill["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"], prefill["HF_HUB_OFFLINE"]) == ("60", "0")
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in decode
    assert decode["HF_HUB_OFFLINE"] == "1"
    pools = {"prefill": {}, "decode": {"environment": {"OMP_NUM_THREADS": "2"}}}
    on_cores = workers(cluster(pools=pools))
    assert [plan.environment["OMP_NUM_THREADS"] for plan, _ in on_cores] == ["1", "2"]


def test_gpus_that_a_pool_names_are_dealt_out_among_its_workers() -> None:
    pools = {"prefill": {"workers": 2, "environment": {"CUDA_VISIBLE_DEVICES": "6,7"}}, "decode": {}}
    planned = workers(cluster(pools=pools), machine(gpus=("0", "1", "2", "3")))
    assert [plan.environment["CUDA_VISIBLE_DEVICES"] for plan, _ in planned] == ["6", "7", "2"]


def test_the_simulated_engine_takes_no_core_and_no_environment() -> None:
    planned = workers(cluster(engine={"kind": "sim"}))
    assert [(config.cpu_core, dict(plan.environment)) for plan, config in planned] == [(None, {}), (None, {})]


def test_a_pools_engine_options_lie_over_the_clusters() -> None:
    pools = {"prefill": {"engine": {"max_num_seqs": 2}}, "decode": {}}
    planned = workers(cluster(engine={"max_num_seqs": 8, "block_size": 32}, pools=pools))
    engines = [config.engine for _, config in planned if isinstance(config.engine, VllmSettings)]
    assert [(engine.max_num_seqs, engine.block_size) for engine in engines] == [(2, 32), (8, 32)]


def test_a_pools_misspelt_engine_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml: pools\.decode: engine\.max_seqs: unknown key"):
        workers(cluster(pools={"decode": {"engine": {"max_seqs": 2}}}))


def test_a_cluster_without_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml: pools: no workers"):
        workers(cluster(pools={"prefill": {"workers": 0}, "decode": {"workers": 0}}))


def test_the_router_serves_the_clusters_model() -> None:
    config = plan_router(cluster(model="m", served_model_name="it", router={"deadline_s": 5})).config
    assert isinstance(config, RouterConfig)
    assert (config.model, config.served_model_name, config.deadline_s) == ("m", "it", 5.0)


def test_a_router_started_again_listens_where_it_did() -> None:
    config = plan_router(cluster(router={"listen": "127.0.0.1:0"}), "127.0.0.1:1234").config
    assert isinstance(config, RouterConfig)
    assert config.listen == "127.0.0.1:1234"


def test_options_win_over_the_file() -> None:
    said = {"model": "a", "router": {"listen": "127.0.0.1:1", "deadline_s": 9}, "pools": {"decode": {"workers": 4}}}
    config = cluster_of(said, Overrides(model="b", listen="127.0.0.1:2", prefill=3), "cluster.yaml")
    assert (config.model, config.router.listen, config.router.deadline_s) == ("b", "127.0.0.1:2", 9.0)
    assert {pool: settings.workers for pool, settings in config.pools.items()} == {Pool.PREFILL: 3, Pool.DECODE: 4}


def test_a_count_of_zero_is_an_option_too() -> None:
    assert cluster_of({}, Overrides(prefill=0), "options").pools[Pool.PREFILL].workers == 0


def test_another_engine_drops_the_options_of_the_files_engine() -> None:
    said = {"engine": {"dtype": "float32"}}
    assert cluster_of(said, Overrides(engine="sim"), "cluster.yaml").engine.kind == "sim"
    assert cluster_of(said, Overrides(engine="vllm"), "cluster.yaml").engine.model_dump()["dtype"] == "float32"


@pytest.mark.parametrize(
    ("under", "over", "result"),
    [
        ({"a": 1}, {}, {"a": 1}),
        ({"a": {"x": 1, "y": 1}}, {"a": {"y": 2}}, {"a": {"x": 1, "y": 2}}),
        ({"a": {"x": 1}}, {"a": 3}, {"a": 3}),
        ({"a": 3}, {"a": {"x": 1}}, {"a": {"x": 1}}),
    ],
)
def test_mappings_merge_and_anything_else_is_replaced(
    under: Mapping[str, Any], over: Mapping[str, Any], result: Mapping[str, Any]
) -> None:
    assert merged(under, over) == result
