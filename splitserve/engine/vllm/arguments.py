"""How vLLM is set up: its environment, its EngineArgs, its KV connector. No state."""

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict
from itertools import cycle, islice
from typing import Any, get_args

from splitserve.core.config import KvTransferSettings, NodesSettings, VllmSettings
from splitserve.core.errors import ConfigError
from splitserve.core.model import ModelInfo
from splitserve.core.worker import KvMode, StepCost
from splitserve.engine.vllm.loras import lora_arguments
from splitserve.engine.vllm.sampler_state import CPU_WORKER, GPU_WORKER
from splitserve.kv.host import is_loopback, numeric_host
from splitserve.latency.cost import cost_of
from splitserve.latency.model import LatencyModel

GIB = 1024**3
FIRST_PORT = 20_000
PORTS = 8_000  # below what kernels give to connections
SCHEDULER = "splitserve.engine.vllm.scheduler.scheduler"  # what vLLM calls for one
STEP_COST = "step_cost"  # what our scheduler finds in the connector's configuration
DRAFTERS_WITHOUT_KV = frozenset({"ngram", "ngram_gpu", "suffix"})


def ranks_of(settings: VllmSettings) -> int:
    """Processes that hold a part of the model each."""
    return settings.tensor_parallel_size * settings.pipeline_parallel_size


def step_cost_of(settings: VllmSettings, latency: LatencyModel | None) -> StepCost | None:
    """What our scheduler works by: none without a latency model, or with another scheduler."""
    return cost_of(latency) if latency is not None and "scheduler_cls" not in settings.extra else None


def prepare_environment(host: str, ranks: int, nodes: int = 1) -> None:
    """Settings that vLLM reads from the environment when it is imported. What the user has set stays. `ranks`: on all
    nodes together."""
    defaults = {
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the CPU platform takes the multi-process executor
        "VLLM_HOST_IP": host,
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if is_loopback(host):
        defaults["UCX_NET_DEVICES"] = "lo"  # else UCX listens on every interface
    if _has_no_gpu():
        defaults["TORCHDYNAMO_DISABLE"] = "1"  # else the first logprobs call compiles C++ for 50 s
        if ranks > 1:
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = _one_core_each(
                ranks // nodes
            )  # vLLM's `auto` fails on one NUMA node
    if nodes > 1:
        defaults["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"  # a follower has threads when it starts its ranks
        if interface := _interface_of(host):
            defaults["GLOO_SOCKET_IFNAME"] = interface  # else Gloo listens where the machine's name leads
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "VLLM_NIXL_SIDE_CHANNEL_PORT" not in os.environ:
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_free_port(host))


def side_channel() -> str:
    """Pull mode: where the stock connector listens."""
    host, port = os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"], os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]
    return f"tcp://{host}:{port}"


def engine_arguments(
    model: ModelInfo,
    settings: VllmSettings,
    kv: KvTransferSettings,
    uuid: str,
    bridge: str,
    on_cpu: bool,
    step_cost: StepCost | None = None,
    nodes: NodesSettings | None = None,
) -> dict[str, Any]:
    """vLLM's EngineArgs; what is not set here keeps vLLM's default. `bridge`: where the connector's halves on this node
    find us. With a step cost our scheduler takes the place of vLLM's. Raises ConfigError for adapters that are not
    there, and for a drafter whose KV push would leave behind."""
    if kv.mode is KvMode.PUSH:
        refuse_drafters_with_kv(settings.extra)
    said = settings.model_dump(exclude={"kind", "kv_cache_gib", "extra", "loras", "tool_parser", "profile"})
    arguments = {name: value for name, value in said.items() if value is not None}
    arguments |= {"model": str(model.path), "served_model_name": model.name, "disable_log_stats": True}
    arguments["kv_transfer_config"] = _kv_transfer_config(model, kv, uuid, bridge, step_cost)
    if step_cost is not None:
        arguments["scheduler_cls"] = SCHEDULER
    arguments.setdefault("enforce_eager", on_cpu)
    arguments["worker_cls"] = CPU_WORKER if on_cpu else GPU_WORKER
    if settings.loras:
        arguments |= lora_arguments(settings.loras, _lora_ranks())
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * GIB)
        arguments["distributed_executor_backend"] = "mp" if ranks_of(settings) > 1 else "uni"
    if nodes is not None and nodes.count > 1:
        arguments |= {"nnodes": nodes.count, "node_rank": nodes.rank, "distributed_executor_backend": "mp"}
        arguments |= {"master_addr": nodes.leader, "master_port": nodes.port + 1}
    return with_reasoning(arguments | settings.extra)


def with_reasoning(arguments: dict[str, Any]) -> dict[str, Any]:
    """vLLM takes the parser as an argument of its own, but not beside a mapping that it would belong into."""
    config = arguments.get("structured_outputs_config")
    if not isinstance(config, Mapping) or "reasoning_parser" not in arguments:
        return arguments
    rest = {name: value for name, value in arguments.items() if name != "reasoning_parser"}
    return rest | {"structured_outputs_config": {**config, "reasoning_parser": arguments["reasoning_parser"]}}


def refuse_drafters_with_kv(extra: Mapping[str, Any]) -> None:
    """Raises ConfigError. A drafter that has layers of its own has KV of its own: of a prompt that was read elsewhere
    it would have none, and draft from nothing."""
    config = extra.get("speculative_config")
    said = {name for name in ("spec_method", "spec_model") if extra.get(name)}
    method = config.get("method") if isinstance(config, Mapping) else config
    if said or (config is not None and method not in DRAFTERS_WITHOUT_KV):
        field = f"engine.extra.{min(said) if said else 'speculative_config'}"
        known = ", ".join(sorted(DRAFTERS_WITHOUT_KV))
        sentence = f"push does not move a drafter's own KV: set the method to one that has none ({known})"
        raise ConfigError(field, f"{sentence}, or kv_transfer.mode to pull")


def _lora_ranks() -> tuple[int, ...]:
    from vllm.config.lora import MaxLoRARanks

    return get_args(MaxLoRARanks)


def _kv_transfer_config(
    model: ModelInfo, kv: KvTransferSettings, uuid: str, bridge: str, step_cost: StepCost | None
) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="PushConnector" if kv.mode is KvMode.PUSH else "PullConnector",
        kv_connector_module_path="splitserve.kv.connector",
        kv_role="kv_both",
        engine_id=uuid,
        kv_load_failure_policy="fail",
        kv_connector_extra_config={
            "bridge": bridge,
            "uuid": uuid,
            "fingerprint": model.fingerprint,
            "settings": kv.model_dump(mode="json"),
            **({STEP_COST: asdict(step_cost)} if step_cost is not None else {}),
        },
    )


def _one_core_each(ranks: int) -> str:
    """Ranks share cores where there are more of them."""
    return "|".join(map(str, islice(cycle(sorted(os.sched_getaffinity(0))), ranks)))


def _interface_of(host: str) -> str:
    """The network interface that has this address; "" if none is known to."""
    import psutil

    if is_loopback(host):
        return "lo"
    address = numeric_host(host).strip("[]")
    found = (name for name, has in psutil.net_if_addrs().items() if any(each.address == address for each in has))
    return next(found, "")


def _has_no_gpu() -> bool:
    import torch

    return not torch.cuda.device_count()  # which does not initialise CUDA


def _free_port(host: str) -> int:
    """One that the kernel gives to no connection: taken before vLLM binds it, it would make vLLM wait for ever."""
    first = FIRST_PORT + os.getpid() % PORTS
    ports: list[int] = [*range(first, FIRST_PORT + PORTS), *range(FIRST_PORT, first)]
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise ConfigError("kv_transfer.host", f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free on {host}")
