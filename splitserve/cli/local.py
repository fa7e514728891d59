"""Which processes make up one cluster on this machine, and how each is configured: plain functions, nothing is started.

What the machine has (cores, GPUs, free ports) is an argument.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from splitserve.core.config import (
    ClusterConfig,
    PoolSettings,
    RouterConfig,
    SimSettings,
    VllmSettings,
    WorkerConfig,
    parse,
)
from splitserve.core.errors import ConfigError
from splitserve.core.worker import Pool

EngineKind = VllmSettings | SimSettings

HTTP = "127.0.0.1:8000"  # of `up`, unless cluster.yaml says otherwise; `http: null` for none
_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1"}
# One core an engine: more OpenMP threads than cores cost ten times the step. glibc hands large blocks back to the
# kernel at once unless these say otherwise (bytes).
_ON_CPU = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` and `gpus` are those this process may use; `port_is_free` tells of a TCP port on loopback."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]
    port_is_free: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process: `role` is the splitserve subcommand that runs it."""

    role: str
    name: str
    config: RouterConfig | WorkerConfig
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the command line says over cluster.yaml; None where it says nothing."""

    model: str | None = None
    engine: str | None = None
    prefill: int | None = None
    decode: int | None = None
    listen: str | None = None
    metrics: str | None = None
    insecure: bool | None = None
    http: str | None = None


def cluster_of(said: Mapping[str, Any], over: Overrides, source: str) -> ClusterConfig:
    """What cluster.yaml said, with the options over it. Raises ConfigError naming the key at fault."""
    router = {"listen": over.listen, "metrics": over.metrics, "insecure": over.insecure, "http": over.http}
    pools = {Pool.PREFILL: over.prefill, Pool.DECODE: over.decode}
    given: dict[str, Any] = {
        "model": over.model,
        "engine": {"kind": over.engine} if over.engine else None,
        "router": _given(router) or None,
        "pools": _given(
            {str(pool): {"workers": count} if count is not None else None for pool, count in pools.items()}
        ),
    }
    defaults: dict[str, Any] = {"pools": {str(pool): {} for pool in Pool}}
    return parse(ClusterConfig, merged({**defaults, **said}, _given(given)), source)


def with_http(said: Mapping[str, Any]) -> dict[str, Any]:
    """What cluster.yaml said, and HTTP where it said nothing of it."""
    return merged({"router": {"http": HTTP}}, said)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; where both hold a mapping these are merged, unless it is an engine of another kind."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if _same_thing(below, value) else value
    return result


def _same_thing(under: object, over: object) -> TypeGuard[Mapping[str, Any]]:
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return False
    return over.get("kind") in (None, under.get("kind", "vllm"))


def plan_router(cluster: ClusterConfig, listen: str = "") -> ProcessPlan:
    """The router serves the cluster's model unless its own section names another; `listen` overrides its address."""
    said = cluster.router.model_dump(exclude_unset=True)
    named = {"model": cluster.model, "served_model_name": cluster.served_model_name}
    bound = {"listen": listen} if listen else {}
    return ProcessPlan("router", "router", RouterConfig.model_validate({**named, **said, **bound}))


def plan_workers(cluster: ClusterConfig, router: str, machine: Machine, source: str) -> tuple[ProcessPlan, ...]:
    """Every worker of every pool, joining the router at this address. Raises ConfigError (`source` begins its path)."""
    if not any(pool.workers for pool in cluster.pools.values()):
        raise ConfigError(f"{source}: pools", "no workers; a cluster needs at least one")
    ports = _free_ports(cluster.worker_metrics_port, machine)
    plans: list[ProcessPlan] = []
    for pool, settings in cluster.pools.items():
        template = _worker(cluster, pool, settings, router, machine, source)
        for index in range(settings.workers):
            place = _place(template.engine, settings, machine, index, len(plans))
            name = f"{pool}-{index}"
            own = {"name": name, "metrics": next(ports), "cpu_core": place.core}
            plans.append(ProcessPlan("worker", name, template.model_copy(update=own), place.environment))
    return tuple(plans)


def _worker(
    cluster: ClusterConfig, pool: Pool, settings: PoolSettings, router: str, machine: Machine, source: str
) -> WorkerConfig:
    """What all workers of one pool have in common: the cluster's engine options with the pool's over them."""
    said = {**cluster.engine.model_dump(exclude_unset=True), "kind": cluster.engine.kind, **settings.engine}
    engine = {"dtype": "float32", **said} if said["kind"] == "vllm" and not machine.gpus else said
    common = {
        "pool": pool,
        "model": cluster.model,
        "served_model_name": cluster.served_model_name,
        "routers": [router],
        "engine": engine,
        "kv_transfer": cluster.kv_transfer,
        "router_tls": cluster.router_tls,
        "api_key_file": cluster.api_key_file,
    }
    return parse(WorkerConfig, common, f"{source}: pools.{pool}")


@dataclass(frozen=True, slots=True)
class _Place:
    core: int | None
    environment: Mapping[str, str]


def _place(engine: EngineKind, pool: PoolSettings, machine: Machine, index: int, nth: int) -> _Place:
    """Where the `index`-th worker of its pool, the `nth` of the cluster, computes."""
    if engine.kind == "sim":
        return _Place(None, {})
    if machine.gpus:
        needed = engine.tensor_parallel_size * engine.pipeline_parallel_size
        mine = [machine.gpus[(nth * needed + at) % len(machine.gpus)] for at in range(needed)]
        return _Place(None, {**_OFFLINE, "CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(mine))})
    cores, at = (pool.cpu_cores, index) if pool.cpu_cores else (list(machine.cores), nth)
    return _Place(cores[at % len(cores)], {**_OFFLINE, **_ON_CPU})


def _free_ports(first: int | None, machine: Machine) -> Iterator[str | None]:
    while first is None:
        yield None
    for port in range(first, 65536):
        if machine.port_is_free(port):
            yield f"127.0.0.1:{port}"
    raise ConfigError("worker_metrics_port", f"no free port from {first} upwards")
