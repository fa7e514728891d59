"""What it saves that the router knows who has a prompt's beginning cached, simulated.

    python -m benchmarks.prefix_routing                    # 4 and 8 workers: minutes
    python -m benchmarks.prefix_routing --workers 8 --json

Each workload is served twice by the router's own policy, blind and aware, at a rate of so many requests per second and
worker. `shared`: prompts of 400 kinds that begin alike (70% of each), more than one worker's cache holds. `sessions`:
six turns in the mean, each with all that was said before. Fleets are colocated workers or halves of prefill and decode
workers, both scheduled by load alone, and workers of any role scheduled by objectives (TTFT 1 s, TPOT 40 ms). Halves
are asked for as much as they can read, the others for twice and three times that. A step takes 10 ms and 50 µs for each
prompt token and each decode; a worker has KV for 256,000 tokens. The first fifth of the requests is not judged.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from splitserve.core.slo import Slo
from splitserve.latency.linear import LinearLatency
from splitserve.planner.deployment import Deployment, Link, Role, WorkerSpec
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.arrivals import Poisson
from splitserve.workload.lengths import uniform
from splitserve.workload.pairs import Pair
from splitserve.workload.prefixes import Sharing
from splitserve.workload.requests import Requests
from splitserve.workload.sessions import Dialogue, Sessions
from splitserve.workload.synthetic import Synthetic
from splitserve.workload.workload import Workload

LATENCY = LinearLatency(0.01, 5e-5, 5e-5, 3e-9, 1e-8)
SLO = Slo(ttft_s=1.0, tpot_s=0.04)
LINK = Link(25e9)
BLOCKS, BYTES_PER_TOKEN, LAYERS = 16_000, 131_072.0, 32
REQUESTS = 750  # per worker
WARM_UP = 0.2
OUTPUTS = uniform(50, 250)
WORKLOADS: dict[str, tuple[Workload, Sequence[float]]] = {
    "shared": (Synthetic("shared", Pair(uniform(1500, 4500), OUTPUTS), Poisson(), Sharing(0.7, 400)), (1.5, 3.0, 4.4)),
    "sessions": (
        Sessions("sessions", Pair(uniform(300, 1500), OUTPUTS, limit_tokens=16_000), Poisson(), Dialogue(6.0, 8.0)),
        (0.9, 1.9, 2.75),
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """`hits`: share of prompt tokens that were cached. `met`: share of requests within both objectives. `most_read`:
    of all prompts, by the worker that read the most."""

    workload: str
    workers: int
    rate_rps: float
    fleet: str
    aware: bool
    ttft_mean_s: float
    ttft_p90_s: float
    tpot_p90_s: float
    hits: float
    met: float
    most_read: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, action="append", help="repeat for several; default: 4 and 8")
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    found = [
        row
        for workers in args.workers or (4, 8)
        for name in args.workload or WORKLOADS
        for row in rows(name, workers, args.seed)
    ]
    print(json.dumps([asdict(row) for row in found]) if args.json else "\n".join(table(found)))


def rows(name: str, workers: int, seed: int) -> Iterator[Row]:
    drawn_from, rates = WORKLOADS[name]
    for rate in rates:
        served = drawn_from.draw(REQUESTS * workers, rate * workers, seed)
        fleets: dict[str, Slo | None] = (
            {"pools": None} if rate == rates[0] else {"colocated": None, "by objectives": SLO}
        )
        for fleet, slo in fleets.items():
            for aware in (False, True):
                yield _row((name, workers, rate * workers, fleet, aware), served, slo)


def table(found: Sequence[Row]) -> Iterator[str]:
    yield "workload  workers  requests/s  fleet          router  TTFT s: mean    p90  TPOT p90, ms  hits   met  by one"
    for row in found:
        yield (
            f"{row.workload:8}  {row.workers:7}  {row.rate_rps:10.1f}  {row.fleet:13}  {_router(row):6}"
            f"  {row.ttft_mean_s:12.3f}  {row.ttft_p90_s:5.3f}  {row.tpot_p90_s * 1e3:12.1f}  {row.hits:4.0%}"
            f"  {row.met:4.0%}  {row.most_read:6.0%}"
        )


def _router(row: Row) -> str:
    return "aware" if row.aware else "blind"


def _row(of: tuple[str, int, float, str, bool], served: Requests, slo: Slo | None) -> Row:
    _, workers, _, fleet, aware = of
    outcome = simulate(_deployment(fleet, workers), served, slo=slo, prefix_aware=aware)
    later, lines = slice(int(WARM_UP * len(served)), None), outcome.timelines
    readers = np.where(outcome.prefill_worker >= 0, outcome.prefill_worker, outcome.decode_worker)[later]
    ttft_s = lines.ttft_s[later]
    return Row(
        *of,
        ttft_mean_s=float(ttft_s.mean()),
        ttft_p90_s=float(np.quantile(ttft_s, 0.9)),
        tpot_p90_s=float(np.quantile(lines.tpot_s[later], 0.9)),
        hits=float(outcome.cached_tokens[later].sum() / served.prompt_tokens[later].sum()),
        met=float(lines.met(SLO)[later].mean()),
        most_read=float(np.bincount(readers, minlength=workers).max() / len(readers)),
    )


def _deployment(fleet: str, workers: int) -> Deployment:
    half = workers // 2
    roles = [Role.PREFILL] * half + [Role.DECODE] * (workers - half) if fleet == "pools" else [Role.COLOCATED] * workers
    specs = tuple(WorkerSpec(r, LATENCY, BLOCKS, max_batched_tokens=4096, max_model_len=16_384) for r in roles)
    return Deployment(specs, BYTES_PER_TOKEN, LAYERS, LINK, LINK, True)


if __name__ == "__main__":
    main()
