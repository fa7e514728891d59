"""Which processes make up one cluster on this machine, and how each is configured: plain functions, nothing is started.

What the machine has (cores, GPUs, free ports) is an argument.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
_VISIBLE, _UTILIZATION = "CUDA_VISIBLE_DEVICES", "gpu_memory_utilization"
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
    """One process: `role` is the splitserve subcommand that runs it. `gpus`: those that it computes on."""

    role: str
    name: str
    config: RouterConfig | WorkerConfig
    environment: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()


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
    dealt = 0  # GPUs
    for pool, settings in cluster.pools.items():
        template = _worker(cluster, pool, settings, router, machine, source)
        for index in range(settings.workers):
            place = _place(template.engine, settings, machine, index, len(plans), dealt)
            dealt += len(place.gpus)
            name = f"{pool}-{index}"
            own = {"name": name, "metrics": next(ports), "cpu_core": place.core}
            config = template.model_copy(update=own)
            plans.append(ProcessPlan("worker", name, config, place.environment, place.gpus))
    return _sharing(plans)


def waves(plans: Sequence[ProcessPlan]) -> tuple[tuple[ProcessPlan, ...], ...]:
    """In which order they may start: none beside another on one GPU, since vLLM takes for its own whatever memory goes
    while it measures how much is left for KV."""
    rounds: list[list[ProcessPlan]] = []
    for plan in plans:
        mine = set(plan.gpus)
        free = (wave for wave in rounds if all(mine.isdisjoint(other.gpus) for other in wave))
        wave = next(free, None)
        if wave is None:
            rounds.append(wave := [])
        wave.append(plan)
    return tuple(map(tuple, rounds))


def _sharing(plans: Sequence[ProcessPlan]) -> tuple[ProcessPlan, ...]:
    """Workers that share a GPU share its memory too, unless the configuration says how much each takes."""
    users = Counter(gpu for plan in plans for gpu in plan.gpus)
    return tuple(_with_share(plan, max((users[gpu] for gpu in plan.gpus), default=1)) for plan in plans)


def _with_share(plan: ProcessPlan, users: int) -> ProcessPlan:
    config = plan.config
    if users == 1 or not isinstance(config, WorkerConfig) or not isinstance(config.engine, VllmSettings):
        return plan
    if _UTILIZATION in config.engine.model_fields_set or _UTILIZATION in config.engine.extra:
        return plan
    share = {_UTILIZATION: config.engine.gpu_memory_utilization / users}
    engine = config.engine.model_copy(update=share)
    return replace(plan, config=config.model_copy(update={"engine": engine}))


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
    gpus: tuple[str, ...] = ()


def _place(engine: EngineKind, pool: PoolSettings, machine: Machine, index: int, nth: int, dealt: int) -> _Place:
    """Where the `index`-th worker of its pool, the `nth` of the cluster, computes; `dealt`: GPUs of those before."""
    if engine.kind == "sim":
        return _Place(None, pool.environment)
    if machine.gpus:
        needed = engine.tensor_parallel_size * engine.pipeline_parallel_size
        said = pool.environment.get(_VISIBLE)
        gpus = _some(said.split(","), index * needed, needed) if said else _some(machine.gpus, dealt, needed)
        return _Place(None, {**_OFFLINE, **pool.environment, _VISIBLE: ",".join(gpus)}, gpus)
    cores, at = (pool.cpu_cores, index) if pool.cpu_cores else (list(machine.cores), nth)
    return _Place(cores[at % len(cores)], {**_OFFLINE, **_ON_CPU, **pool.environment})


def _some(gpus: Sequence[str], first: int, count: int) -> tuple[str, ...]:
    """From the beginning again after the last, none twice."""
    return tuple(dict.fromkeys(gpus[at % len(gpus)] for at in range(first, first + count)))


def _free_ports(first: int | None, machine: Machine) -> Iterator[str | None]:
    while first is None:
        yield None
    for port in range(first, 65536):
        if machine.port_is_free(port):
            yield f"127.0.0.1:{port}"
    raise ConfigError("worker_metrics_port", f"no free port from {first} upwards")
