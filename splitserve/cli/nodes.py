"""What `run_worker` adds for a worker that spans machines: its leader waits for the others; they follow it."""

import asyncio
from contextlib import AbstractContextManager, nullcontext

from splitserve.cli.process import stop_signals
from splitserve.core.config import VllmSettings, WorkerConfig
from splitserve.core.exposure import check_leader
from splitserve.core.model import ModelInfo
from splitserve.core.worker import StepCost
from splitserve.engine.nodes.channel import keys_of
from splitserve.engine.nodes.follower import FollowerEnd
from splitserve.engine.nodes.leader import LeaderEnd
from splitserve.engine.vllm.arguments import step_cost_of
from splitserve.engine.vllm.ranks import VllmRanks, alike
from splitserve.latency.profile import read as read_profile
from splitserve.telemetry.health import Probes
from splitserve.worker.follower import Follower, OnStarted


def leader_end(
    config: WorkerConfig, model: ModelInfo, uuid: str, api_key: str | None
) -> AbstractContextManager[LeaderEnd | None]:
    """None for a worker on one machine. Raises ConfigError for strangers that could come in."""
    if config.nodes.count == 1:
        return nullcontext()
    check_leader(config, api_key)
    return LeaderEnd(config.nodes, uuid, alike(model, config, _step_cost(_vllm(config))), keys_of(api_key))


async def all_joined(end: LeaderEnd) -> bool:
    """Whether they came; not if this process is told to end first. Raises ConfigError and EngineError."""
    stop = stop_signals()
    stopped = asyncio.create_task(stop.wait())
    gathered = asyncio.create_task(asyncio.to_thread(end.wait_for_all))
    try:
        await asyncio.wait((stopped, gathered), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            await asyncio.to_thread(end.close)
        return await gathered
    finally:
        stopped.cancel()


async def follow(
    config: WorkerConfig, model: ModelInfo, api_key: str | None, probes: Probes, on_ready: OnStarted
) -> int:
    """Until the worker ends; returns the exit code. Raises ConfigError and EngineError."""
    check_leader(config, api_key)
    engine = _vllm(config)
    step_cost = _step_cost(engine)
    said = alike(model, config, step_cost)
    with FollowerEnd(config.nodes, config.kv_transfer.host, said, keys_of(api_key)) as end:
        follower = Follower(end, VllmRanks(model, engine, config.kv_transfer, config.nodes, step_cost))
        probes.ready = follower.unready
        return await follower.run(on_ready)


def _vllm(config: WorkerConfig) -> VllmSettings:
    assert config.engine.kind == "vllm", "check_spread comes first"
    return config.engine


def _step_cost(engine: VllmSettings) -> StepCost | None:
    return step_cost_of(engine, read_profile(engine.profile).latency() if engine.profile is not None else None)
