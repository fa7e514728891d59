"""One system while it runs: a local cluster with its client, and what its processes cost."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.goodput.model import vocabulary
from benchmarks.router.processes import cpu_s
from splitserve.bench.open_loop import Send
from splitserve.bench.targets.router import to_router
from splitserve.cli.cluster import running
from splitserve.cli.local import merged
from splitserve.cli.supervisor import Ended, Event
from splitserve.client import AsyncClient, Retries
from splitserve.core.config import ClusterConfig
from splitserve.workload.requests import Requests

URGENT = -10  # as nice(2) has it
QUIET_S = 0.5
QUIET_TRIES = 120


@dataclass(frozen=True, slots=True)
class Served:
    """`processes`: pid of the router and of each worker, by name."""

    client: AsyncClient
    vocabulary: int
    processes: Mapping[str, int]

    def send(self, requests: Requests, seed: int, slo_class: str = "") -> Send:
        return to_router(self.client, requests, self.vocabulary, seed, slo_class)

    def cpu_s(self) -> dict[str, float]:
        """CPU time so far, by process; `generator` is this one."""
        spent = {name: cpu_s(pid) for name, pid in self.processes.items()}
        times = os.times()
        return {**spent, "generator": times.user + times.system}

    async def quiet(self) -> None:
        """Until no request is left. Raises TimeoutError if one stays."""
        for _ in range(QUIET_TRIES):
            fleet = await self.client.fleet()
            if not fleet.running_requests and not fleet.waiting_requests:
                return
            await asyncio.sleep(QUIET_S)
        raise TimeoutError("requests of the run before are still running")


@asynccontextmanager
async def serving(model: Path, cluster: Mapping[str, Any], scratch: Path) -> AsyncIterator[Served]:
    """`cluster` as in cluster.yaml; `scratch` is there already. Ports are free ones; what dies is not started again."""
    local = {"router": {"listen": "127.0.0.1:0", "metrics": None}, "worker_metrics_port": None, "restart": False}
    config = ClusterConfig.model_validate(merged({"model": str(model), **local}, cluster))
    async with (
        running(config, "benchmark", scratch, _on_event, drain_s=5.0) as up,
        AsyncClient(up.address, Retries(most=0)) as client,
    ):
        pids = {member.plan.name: member.ready.pid for member in up.members}
        with _urgent(os.getpid()), _urgent(pids["router"]):
            yield Served(client, vocabulary(model), pids)


@contextmanager
def _urgent(pid: int) -> Iterator[None]:
    """The generator and the router share cores with engines that are never idle: they go first, where that is allowed,
    as they would on cores of their own. What they take is in the report."""
    usual = os.getpriority(os.PRIO_PROCESS, pid)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, pid, URGENT)
    yield
    os.setpriority(os.PRIO_PROCESS, pid, usual)


def _on_event(event: Event) -> None:
    if isinstance(event, Ended) and event.code > 0:
        print(f"{event.name} died: {event.how}", file=sys.stderr, flush=True)
