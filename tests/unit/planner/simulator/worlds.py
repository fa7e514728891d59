"""Small deployments and workloads for tests of the simulator."""

from collections.abc import Sequence

import numpy as np

from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import LatencyModel
from splitserve.planner.deployment import Deployment, Link, Role, WorkerSpec
from splitserve.workload.requests import Prefixes, Requests

LATENCY = LinearLatency(0.01, 5e-5, 5e-5, 3e-8, 1e-9)
FREE = LinearLatency(0.0, 0.0, 0.0)
WIDE = Link(1e15)


def worker(role: Role, latency: LatencyModel = LATENCY, kv_blocks: int = 4000, **others: object) -> WorkerSpec:
    return WorkerSpec(role, latency, kv_blocks, **others)  # type: ignore[arg-type]


def deployment(*workers: WorkerSpec, link: Link = WIDE, layerwise: bool = True) -> Deployment:
    return Deployment(workers, 1000.0, 10, link, link, layerwise)


PREFILL, DECODE, COLOCATED = worker(Role.PREFILL), worker(Role.DECODE), worker(Role.COLOCATED)


def requests(
    arrivals: Sequence[float],
    prompt: int | Sequence[int],
    output: int | Sequence[int],
    prefixes: Prefixes | None = None,
) -> Requests:
    count = len(arrivals)
    columns = [np.broadcast_to(np.asarray(each, dtype=np.int64), count).copy() for each in (prompt, output)]
    return Requests(np.asarray(arrivals, dtype=np.float64), columns[0], columns[1], prefixes)


def poisson(count: int, rate_rps: float, seed: int = 0, prompt: float = 500, output: float = 100) -> Requests:
    """Lognormal lengths around these."""
    random = np.random.default_rng(seed)
    return requests(
        np.cumsum(random.exponential(1 / rate_rps, count)).tolist(),
        np.clip(random.lognormal(np.log(prompt), 0.7, count), 1, 4000).astype(int).tolist(),
        np.clip(random.lognormal(np.log(output), 0.7, count), 1, 2000).astype(int).tolist(),
    )
