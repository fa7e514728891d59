"""vLLM's processes on one of several nodes: what a node without an engine of its own runs, and how such ranks end.

vLLM's multi-process executor spans nodes: on node 0 it belongs to the engine, on the others it only starts its ranks,
which meet node 0's at the leader's second port. A rank whose peer is gone may wait for it for ever, so that ours are
killed, not asked.
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import packages_distributions, version

from splitserve import __version__
from splitserve.core.config import KvTransferSettings, NodesSettings, VllmSettings, WorkerConfig
from splitserve.core.errors import ConfigError
from splitserve.core.exposure import is_loopback
from splitserve.core.model import ModelInfo
from splitserve.core.worker import KvMode, StepCost
from splitserve.engine.nodes.follower import FollowerEnd
from splitserve.engine.vllm.arguments import engine_arguments, prepare_environment, ranks_of
from splitserve.kv.bridge import AdapterEnd

OURS_TO_SAY = ("nnodes", "node_rank", "master_addr", "master_port")
_OF_ONE_NODE = {"host", "buffer"}


def check_spread(config: WorkerConfig) -> None:
    """Raises ConfigError naming what keeps the engine from spanning the nodes."""
    engine, nodes = config.engine, config.nodes
    if nodes.count == 1:
        return
    if engine.kind != "vllm":
        raise ConfigError("nodes.count (--nodes)", "a simulated worker is one process; leave nodes out")
    if config.kv_transfer.mode is not KvMode.PUSH:
        raise ConfigError("kv_transfer.mode", "vLLM's stock connector does not pull across a worker's nodes; use push")
    if ranks_of(engine) % nodes.count:
        raise ConfigError(
            "nodes.count (--nodes)",
            f"{nodes.count} nodes can't share {ranks_of(engine)} ranks (engine.tensor_parallel_size "
            f"{engine.tensor_parallel_size} x engine.pipeline_parallel_size {engine.pipeline_parallel_size}) evenly",
        )
    for name in OURS_TO_SAY:
        if name in engine.extra:
            raise ConfigError(f"engine.extra.{name}", "nodes says it (--nodes, --node-rank, --leader); leave it out")
    if engine.extra.get("distributed_executor_backend", "mp") != "mp":
        raise ConfigError(
            "engine.extra.distributed_executor_backend", "splitserve starts each node's ranks with mp; leave it out"
        )
    if int(engine.extra.get("data_parallel_size", 1)) != 1:
        raise ConfigError("engine.extra.data_parallel_size", "is 1 for a worker that spans nodes; run more workers")
    if is_loopback(f"{config.kv_transfer.host}:0") and not is_loopback(f"{nodes.leader}:0"):
        raise ConfigError(
            "kv_transfer.host (--kv-host)",
            f"{config.kv_transfer.host} is not reached by the worker's other nodes; say this machine's own address",
        )


def alike(model: ModelInfo, config: WorkerConfig, step_cost: StepCost | None) -> Mapping[str, str]:
    """What must be the same on every node, by setting."""
    said = {
        "splitserve": __version__,
        "vllm": _version("vllm"),
        "torch": _version("torch"),
        "model": f"{model.name} {model.fingerprint}",
        "nodes.count": str(config.nodes.count),
        "engine.profile": str(step_cost),
    }
    engine = config.engine.model_dump(mode="json", exclude={"profile"})
    transfer = config.kv_transfer.model_dump(mode="json", exclude=_OF_ONE_NODE)
    said |= {f"engine.{name}": str(value) for name, value in engine.items()}
    return said | {f"kv_transfer.{name}": str(value) for name, value in transfer.items()}


@cache
def _version(package: str) -> str:
    """Of whatever distribution holds it: vLLM's builds for other devices have names of their own."""
    return ", ".join(f"{name} {version(name)}" for name in packages_distributions()[package])


class VllmRanks:
    """The ranks of a node that is not the first."""

    def __init__(
        self,
        model: ModelInfo,
        settings: VllmSettings,
        kv: KvTransferSettings,
        nodes: NodesSettings,
        step_cost: StepCost | None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._kv = kv
        self._nodes = nodes
        self._step_cost = step_cost

    def run(self, uuid: str, end: FollowerEnd, on_started: Callable[[], None]) -> str:
        """Starts them, as those of this worker, and returns why they ended. `on_started`: the model is loaded here."""
        prepare_environment(self._kv.host, ranks_of(self._settings), self._nodes.count)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        bridge = AdapterEnd(end.tell)
        try:
            end.listen(bridge.tell)
            on_cpu = current_platform.is_cpu()
            arguments = engine_arguments(
                self._model, self._settings, self._kv, uuid, bridge.address, on_cpu, self._step_cost, self._nodes
            )
            config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT, headless=True)
            executor = MultiprocExecutor(config, monitor_workers=False)
            on_started()
            executor.start_worker_monitor(inline=True)
        except Exception as error:  # whatever vLLM raises: the leader must hear of it
            return f"vLLM could not start: {type(error).__name__}: {error}"
        finally:
            bridge.close()
        return "a process of its ranks ended"

    def stop(self) -> None:
        """`run` returns."""
        end_processes()


def end_processes() -> None:
    """Kills whatever vLLM has started beneath this process."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        try:
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):  # it tidies up after the others
                process.kill()
        except psutil.NoSuchProcess:
            continue
