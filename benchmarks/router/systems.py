"""What is compared: how each router is started with its workers, where it listens, and which processes are the router.

To add one: a function that yields an `Up`, and a row in `systems`.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks.router.fake import Pace
from benchmarks.router.peers import Peer
from benchmarks.router.processes import answers, child, daemon, free_port, line
from splitserve.cli.cluster import this_machine
from splitserve.cli.local import plan_router, plan_workers
from splitserve.cli.supervisor import Supervisor
from splitserve.core.config import ClusterConfig, RouterConfig

READY_S = 60.0
SPLITSERVE = (sys.executable, "-m", "splitserve")
_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Fleet:
    """What all systems' workers have in common: the time they take, and room for so many streams at once. `simulated`:
    ours are real workers with simulated engines, not fakes as cheap as those of the others."""

    pace: Pace
    simulated: bool
    streams: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Up:
    """A running system: where clients go, and the processes whose CPU and memory count."""

    address: str
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class System:
    """`ours`: not one of those that it is compared with."""

    name: str
    kind: Literal["http", "grpc", "many"]
    text_prompt: bool
    ours: bool
    up: Callable[[Fleet, Path], AbstractAsyncContextManager[Up]]


def systems(peers: Sequence[Peer]) -> list[System]:
    """Those that there are: our HTTP endpoints only where this version has them."""
    ours = [
        System("splitserve gRPC", "grpc", False, True, ours_grpc),
        System("splitserve gRPC, shared call", "many", False, True, ours_grpc),
    ]
    if "http" in RouterConfig.model_fields:
        ours.append(System("splitserve HTTP", "http", False, True, ours_http))
    if has_gateway():
        ours.append(System("splitserve gateway", "http", False, True, ours_gateway))
    return [*ours, *(System(peer.label, "http", peer.text_prompt, False, partial(theirs, peer)) for peer in peers)]


def has_gateway() -> bool:
    """Whether there is a `splitserve gateway`."""
    return subprocess.run([*SPLITSERVE, "gateway", "--help"], capture_output=True, check=False).returncode == 0


# Ours ---------------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def ours_grpc(fleet: Fleet, directory: Path) -> AsyncIterator[Up]:
    async with cluster(fleet, directory) as up:
        yield up


@asynccontextmanager
async def ours_http(fleet: Fleet, directory: Path, program: Sequence[str] = SPLITSERVE) -> AsyncIterator[Up]:
    """Served by the router's own process."""
    http = f"127.0.0.1:{free_port()}"
    async with cluster(fleet, directory, {"http": http}, program) as up:
        await answers(f"http://{http}/health", directory / "router.log", READY_S)
        yield Up(http, up.pids)


@asynccontextmanager
async def ours_gateway(fleet: Fleet, directory: Path) -> AsyncIterator[Up]:
    """A process of its own in front of the router's: both count."""
    http, log = f"127.0.0.1:{free_port()}", directory / "gateway.log"
    async with (
        cluster(fleet, directory) as up,
        daemon([*SPLITSERVE, "gateway", "--router", up.address, "--listen", http], log) as gateway,
    ):
        await answers(f"http://{http}/health", log, READY_S)
        yield Up(http, (*up.pids, gateway))


@asynccontextmanager
async def cluster(
    fleet: Fleet, directory: Path, router: dict[str, object] | None = None, program: Sequence[str] = SPLITSERVE
) -> AsyncIterator[Up]:
    """A real router with two workers. The address is of gRPC."""
    config = cluster_config(fleet, router or {})
    async with Supervisor(directory, lambda event: None, restart=False, program=program) as supervisor:
        supervisor.start(plan_router(config))
        ready = await supervisor.ready("router", READY_S)
        address = ready.facts["address"]
        workers = (
            simulated_workers(supervisor, config, address) if fleet.simulated else fakes(fleet, address, directory)
        )
        async with workers:
            yield Up(address, (ready.pid,))


@asynccontextmanager
async def simulated_workers(supervisor: Supervisor, config: ClusterConfig, router: str) -> AsyncIterator[None]:
    workers = plan_workers(config, router, this_machine(), "benchmark")
    for plan in workers:
        supervisor.start(plan)
    await asyncio.gather(*(supervisor.ready(plan.name, READY_S) for plan in workers))
    yield


@asynccontextmanager
async def fakes(fleet: Fleet, router: str, directory: Path) -> AsyncIterator[None]:
    said, log = json.dumps({**asdict(fleet.pace), "router": router, "parent": os.getpid()}), directory / "workers.log"
    async with child([sys.executable, "-m", "benchmarks.router.fake_workers", said], log) as process:
        await line(process, log, READY_S)
        yield


def cluster_config(fleet: Fleet, router: dict[str, object]) -> ClusterConfig:
    """The prefill worker takes the fleet's time for one prompt alone, the decode worker for one step."""
    blocks = fleet.streams * (-(-(fleet.prompt_tokens + fleet.output_tokens) // _BLOCK_TOKENS) + 1)
    free = {"kind": "sim", "step_s": 0.0, "prefill_token_s": 0.0, "decode_token_s": 0.0, "context_token_s": 0.0}
    room = {"total_blocks": max(4096, 2 * blocks), "max_num_seqs": max(256, 2 * fleet.streams)}
    said = {
        "engine": {**free, **room},
        "router": {"listen": "127.0.0.1:0", "metrics": None, **router},
        "worker_metrics_port": None,
        "restart": False,
        "pools": {
            "prefill": {"workers": 1, "engine": {"prefill_token_s": fleet.pace.prefill_s / fleet.prompt_tokens}},
            "decode": {"workers": 1, "engine": {"step_s": fleet.pace.step_s}},
        },
    }
    return ClusterConfig.model_validate(said)


# Theirs -------------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def theirs(peer: Peer, fleet: Fleet, directory: Path) -> AsyncIterator[Up]:
    """A peer in front of one fake prefill and one fake decode worker."""
    port, log = free_port(), directory / "router.log"
    async with (
        fake(fleet.pace, directory / "prefill-0.log") as prefill,
        fake(fleet.pace, directory / "decode-0.log") as decode,
        daemon(peer.command(f"http://{prefill}", f"http://{decode}", port, free_port()), log) as pid,
    ):
        await answers(f"http://127.0.0.1:{port}/readiness", log, READY_S)
        yield Up(f"127.0.0.1:{port}", (pid,))


@asynccontextmanager
async def fake(pace: Pace, log: Path, colocated: bool = False) -> AsyncIterator[str]:
    """The address of a fake worker. `colocated`: it reads the prompt itself before it streams."""
    said = json.dumps({**asdict(pace), "colocated": colocated, "parent": os.getpid()})
    async with child([sys.executable, "-m", "benchmarks.router.fake", said], log) as process:
        ready = json.loads(await line(process, log, READY_S))
        yield f"127.0.0.1:{ready['port']}"
