"""Starting and stopping one local cluster, in order: `up` and `demo` share it.

The router comes first, because workers need its address; it goes first too, so that it can finish its requests on
workers that are still there.
"""

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from splitserve.cli.local import Machine, ProcessPlan, plan_router, plan_workers, waves
from splitserve.cli.supervisor import OnEvent, Ready, Supervisor
from splitserve.core.config import ClusterConfig, RouterConfig

ROUTER_START_S = 60.0
WORKER_START_S = 900.0  # a first vLLM import and a large model's weights
WORKER_STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class Member:
    """One process that is up."""

    plan: ProcessPlan
    ready: Ready


@dataclass(frozen=True, slots=True)
class RunningCluster:
    address: str  # the router's gRPC address
    members: tuple[Member, ...]

    @property
    def http(self) -> str:
        """Where OpenAI's clients find it, as a URL; "" if nowhere."""
        router = self.members[0]
        address, config = router.ready.facts.get("http"), router.plan.config
        scheme = "https" if isinstance(config, RouterConfig) and config.tls is not None else "http"
        return f"{scheme}://{address}" if address else ""

    @property
    def console(self) -> str:
        """The operators' page, as a URL; "" if it is off."""
        config = self.members[0].plan.config
        on = isinstance(config, RouterConfig) and config.console
        return f"{self.http}/console" if self.http and on else ""


@asynccontextmanager
async def running(
    cluster: ClusterConfig, source: str, directory: Path, on_event: OnEvent, drain_s: float
) -> AsyncIterator[RunningCluster]:
    """A cluster that is ready; drained on leaving. Raises StartFailed, or ConfigError beginning with `source`."""
    async with Supervisor(directory, on_event, cluster.restart) as supervisor:
        yield await _start(supervisor, cluster, source)
        await _stop(supervisor, drain_s)


async def _start(supervisor: Supervisor, cluster: ClusterConfig, source: str) -> RunningCluster:
    plan_workers(cluster, cluster.router.listen, this_machine(), source)  # what is wrong with it is said at once
    router = plan_router(cluster)
    supervisor.start(router)
    ready = await supervisor.ready(router.name, ROUTER_START_S)
    address = ready.facts["address"]
    supervisor.configure(plan_router(cluster, address))  # started again, it must be where its workers look for it
    workers = plan_workers(cluster, address, this_machine(), source)
    readies = {router.name: ready}
    for wave in waves(workers):
        readies |= {started.name: started for started in await _started(supervisor, wave)}
    return RunningCluster(address, tuple(Member(plan, readies[plan.name]) for plan in (router, *workers)))


async def _started(supervisor: Supervisor, plans: Sequence[ProcessPlan]) -> list[Ready]:
    for plan in plans:
        supervisor.start(plan)
    return await asyncio.gather(*(supervisor.ready(plan.name, WORKER_START_S) for plan in plans))


async def _stop(supervisor: Supervisor, drain_s: float) -> None:
    await supervisor.drain("router", drain_s)
    await supervisor.drain("worker", WORKER_STOP_S)


def this_machine() -> Machine:
    return Machine(tuple(sorted(os.sched_getaffinity(0))), _gpus(), _port_is_free)


def _gpus() -> tuple[str, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves, else all that have a device file."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return tuple(part for part in said.split(",") if part)
    files = (re.fullmatch(r"nvidia(\d+)", file.name) for file in Path("/dev").glob("nvidia*"))
    return tuple(sorted((match[1] for match in files if match), key=int))


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
