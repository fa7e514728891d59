"""The files and commands for GPU machines are what splitserve takes, and say what the README says of them."""

import re
from typing import Any

import pytest
import yaml

from splitserve.bench.targets import address
from splitserve.cli.local import Machine, Overrides, ProcessPlan, cluster_of, merged, plan_workers, waves
from splitserve.core.config import KvBuffer, VllmSettings, WorkerConfig, parse, read
from splitserve.core.worker import Pool
from splitserve.workload.named import workload
from tests.unit.benchmarks.commands import ROOT, splitserves, take_splitserve

GPU = ROOT / "benchmarks" / "gpu"
README = (GPU / "README.md").read_text()
COMMANDS = splitserves(README)


def planned(name: str, *gpus: str) -> tuple[ProcessPlan, ...]:
    cluster = cluster_of(read(GPU / name), Overrides(model="demo"), name)
    return plan_workers(cluster, "127.0.0.1:50051", Machine((0, 1), gpus, lambda port: True), name)


def engine_of(plan: ProcessPlan) -> VllmSettings:
    assert isinstance(plan.config, WorkerConfig)
    assert isinstance(plan.config.engine, VllmSettings)
    return plan.config.engine


def worker_commands() -> list[dict[str, str]]:
    """Options of each `splitserve worker`, in the README's order."""
    options = [words[1:] for words in COMMANDS if words[0] == "worker"]
    return [dict(zip((name.removeprefix("--") for name in said[::2]), said[1::2], strict=True)) for said in options]


def file_of(name: str) -> dict[str, Any]:
    """A file of the repository, or what the README's `sed` makes of one."""
    found = re.search(rf"sed '(s/[^']*/)' (\S+) > {re.escape(name)}", README)
    if found is None:
        return read(ROOT / name)
    _, before, after, _ = found[1].split("/")
    text = (ROOT / found[2]).read_text()
    assert text.count(before) == 1
    loaded: dict[str, Any] = yaml.safe_load(text.replace(before, after))
    return loaded


def worker_of(said: dict[str, str]) -> WorkerConfig:
    over = {"pool": said["pool"], "name": said["name"], "routers": [said["router"]]}
    return parse(WorkerConfig, merged(file_of(said["config"]), over), said["config"])


def test_two_workers_share_one_gpu_and_leave_some_of_its_memory() -> None:
    plans = planned("one_gpu.yaml", "0")
    assert [plan.environment["CUDA_VISIBLE_DEVICES"] for plan in plans] == ["0", "0"]
    assert 0.8 < sum(engine_of(plan).gpu_memory_utilization for plan in plans) < 0.95
    assert [len(wave) for wave in waves(plans)] == [1, 1]


def test_two_workers_on_two_gpus_have_one_each_and_start_at_once() -> None:
    plans = planned("two_gpus.yaml", "4", "5")
    assert [plan.environment["CUDA_VISIBLE_DEVICES"] for plan in plans] == ["4", "5"]
    assert [len(wave) for wave in waves(plans)] == [2]


@pytest.mark.parametrize(("name", "gpus"), [("one_gpu.yaml", ("0",)), ("two_gpus.yaml", ("0", "1"))])
def test_what_a_gpu_needs_reaches_the_engines(name: str, gpus: tuple[str, ...]) -> None:
    for plan in planned(name, *gpus):
        assert engine_of(plan).dtype == "bfloat16"
        assert isinstance(plan.config, WorkerConfig)
        assert plan.config.kv_transfer.buffer is KvBuffer.DEVICE


def test_the_pools_that_a_file_offers_in_a_comment_are_valid_too() -> None:
    text = (GPU / "one_gpu.yaml").read_text().replace("# pools:", "pools:").replace("#   ", "  ")
    cluster = cluster_of(yaml.safe_load(text), Overrides(model="demo"), "one_gpu.yaml")
    plans = plan_workers(cluster, "127.0.0.1:50051", Machine((0,), ("0",), lambda port: True), "one_gpu.yaml")
    assert [plan.environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for plan in plans] == ["60", "40"]


def test_on_two_nodes_each_cluster_has_a_worker_on_each_and_its_router() -> None:
    routers = [words[words.index("--listen") + 1] for words in COMMANDS if words[0] == "router"]
    workers = [worker_of(said) for said in worker_commands()]
    split, colocated = ([worker for worker in workers if worker.routers == [router]] for router in routers)
    assert [worker.pool for worker in split] == [Pool.PREFILL, Pool.DECODE]
    assert [worker.pool for worker in colocated] == [Pool.DECODE, Pool.DECODE]
    for cluster in (split, colocated):
        assert [worker.kv_transfer.host for worker in cluster] == ["192.0.2.10", "192.0.2.11"]
    assert {router.rpartition(":")[0] for router in routers} == {"192.0.2.10"}


def test_two_nodes_differ_in_their_address_alone_and_clusters_in_their_chunk() -> None:
    def without(config: WorkerConfig, *names: str) -> dict[str, Any]:
        said = {**config.engine.model_dump(), **config.kv_transfer.model_dump()}
        return {name: value for name, value in said.items() if name not in names}

    a_prefill, b_0, a_decode, b_1 = (worker_of(said) for said in worker_commands())
    assert without(a_prefill, "host") == without(a_decode, "host")
    assert without(b_0, "host") == without(b_1, "host")
    assert without(a_prefill) != without(b_0)
    assert without(a_prefill, "max_num_batched_tokens") == without(b_0, "max_num_batched_tokens")
    engines = [worker.engine for worker in (a_prefill, b_0)]
    assert sum(engine.gpu_memory_utilization for engine in engines if isinstance(engine, VllmSettings)) < 0.95


@pytest.mark.parametrize("words", sorted({tuple(words) for words in COMMANDS}), ids=" ".join)
def test_every_splitserve_command_takes_its_arguments(words: tuple[str, ...]) -> None:
    take_splitserve(list(words))


def test_every_workload_and_every_target_of_a_measurement_can_be_read() -> None:
    measuring = [words for words in COMMANDS if words[0] == "bench"]
    assert [words[1] for words in measuring] == ["run", "sweep", "run", "compare"]
    for words in measuring:
        assert workload(words[words.index("--workload") + 1]).mean_prompt_tokens > 0
        for word in words:
            if "grpc://" in word:
                address.parse(word[word.index("grpc://") :])


def test_every_file_that_a_command_names_is_there() -> None:
    named = set(re.findall(r"\bbenchmarks/gpu/\S+\.yaml", README))
    assert len(named) == 4
    assert not [path for path in named if not (ROOT / path).exists()]
