"""Which engines may span machines, and what their nodes must have in common."""

from typing import Any

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.config import WorkerConfig
from splitserve.core.errors import ConfigError
from splitserve.core.model import ModelInfo
from splitserve.core.worker import StepCost
from splitserve.engine.vllm import arguments
from splitserve.engine.vllm.ranks import alike, check_spread

STEP_COST = StepCost(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, stages=1)
NODES = {"count": 2, "leader": "10.0.0.5"}


def config(rank: int = 0, **said: Any) -> WorkerConfig:
    engine = {"tensor_parallel_size": 2, **said.pop("engine", {})}
    nodes = {**NODES, "rank": rank, **said.pop("nodes", {})}
    transfer = {"host": "10.0.0.6", **said.pop("kv_transfer", {})}
    whole = {"pool": "decode", "nodes": nodes, "engine": engine, "kv_transfer": transfer, **said}
    return WorkerConfig.model_validate(whole)


@pytest.mark.parametrize(
    ("said", "path", "sentence"),
    [
        ({"engine": {"tensor_parallel_size": 3}}, "nodes.count", "2 nodes can't share 3 ranks"),
        ({"engine": {"tensor_parallel_size": 1}}, "nodes.count", "2 nodes can't share 1 ranks"),
        ({"nodes": {"count": 4}, "engine": {"pipeline_parallel_size": 3}}, "nodes.count", "can't share 6 ranks"),
        ({"kv_transfer": {"mode": "pull"}}, "kv_transfer.mode", "use push"),
        ({"kv_transfer": {"host": "127.0.0.1"}}, "kv_transfer.host", "other nodes; say this machine's own address"),
        ({"engine": {"extra": {"nnodes": 2}}}, "engine.extra.nnodes", "leave it out"),
        ({"engine": {"extra": {"distributed_executor_backend": "ray"}}}, "engine.extra.distributed", "leave it out"),
        ({"engine": {"extra": {"data_parallel_size": 2}}}, "engine.extra.data_parallel_size", "run more workers"),
    ],
)
def test_what_can_not_span_machines_is_named(said: dict[str, Any], path: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as raised:
        check_spread(config(**said))
    assert raised.value.path.startswith(path)


def test_a_simulated_worker_is_one_process() -> None:
    simulated = WorkerConfig.model_validate({"pool": "decode", "nodes": NODES, "engine": {"kind": "sim"}})
    with pytest.raises(ConfigError, match="a simulated worker is one process"):
        check_spread(simulated)


def test_what_one_machine_may_have_is_not_looked_at() -> None:
    check_spread(WorkerConfig.model_validate({"pool": "decode", "kv_transfer": {"mode": "pull"}}))
    check_spread(config(nodes={"leader": "127.0.0.1"}, kv_transfer={"host": "127.0.0.2"}))
    check_spread(config(engine={"tensor_parallel_size": 2, "pipeline_parallel_size": 3}))


def test_nodes_have_in_common_all_but_what_is_a_machines_own() -> None:
    model = ModelInfo.read(DEMO_MODEL)

    def of(step_cost: StepCost | None = None, **said: Any) -> dict[str, str]:
        return dict(alike(model, config(**said), step_cost))

    leaders = of()
    own = {"host": "10.0.0.9", "buffer": "host"}
    assert of(rank=1, kv_transfer=own, routers=["10.0.0.9:1"], cpu_core=1, engine={"profile": "here.json"}) == leaders
    for field, other in {
        "engine.max_num_seqs": of(engine={"max_num_seqs": 8}),
        "engine.extra": of(engine={"extra": {"seed": 1}}),
        "engine.tensor_parallel_size": of(engine={"tensor_parallel_size": 4}),
        "engine.profile": of(STEP_COST),
        "kv_transfer.lease_s": of(kv_transfer={"lease_s": 7}),
    }.items():
        assert {name for name in leaders if leaders[name] != other[name]} == {field}


def test_each_node_says_its_place_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_kv_transfer_config", lambda *said: None)  # which imports vLLM
    found = config(rank=1)
    assert found.engine.kind == "vllm"
    model = ModelInfo.read(DEMO_MODEL)
    said = arguments.engine_arguments(
        model, found.engine, found.kv_transfer, "uuid", "ipc://x", True, None, found.nodes
    )
    assert (said["nnodes"], said["node_rank"]) == (2, 1)
    assert (said["master_addr"], said["master_port"]) == ("10.0.0.5", found.nodes.port + 1)
    assert said["distributed_executor_backend"] == "mp"
    alone = arguments.engine_arguments(model, found.engine, found.kv_transfer, "uuid", "ipc://x", True)
    assert not {"nnodes", "node_rank", "master_addr", "master_port"} & set(alone)
