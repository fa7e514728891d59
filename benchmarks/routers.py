"""What several routers cost or gain on one fleet: the goodput of one router beside that of several.

    python -m benchmarks.routers [--routers 4] [--requests 200] [--rounds 3] [--json]

Two prefill and two decode workers with simulated engines (OPT-13B on two A100s, so that engines leave the cores alone),
joined to all routers at once. A request goes to one router of the first only, or to all of them in turn; nothing else
differs, so the two take turns on the same processes. Routers know of each other's requests only what workers report:
when two spend the same room, a worker answers one of them "not now" and it binds anew.

First the rate is doubled until fewer than nine in ten requests are served in time. Then, at rates around that one, both
serve the same requests. Goodput is where attainment falls below 0.9, between the rates on either side.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from splitserve.bench import open_loop
from splitserve.bench.run import Run
from splitserve.bench.targets.router import to_router
from splitserve.cli.cluster import this_machine
from splitserve.cli.local import ProcessPlan, plan_router, plan_workers
from splitserve.cli.supervisor import Event, Supervisor
from splitserve.client import AsyncClient, Retries
from splitserve.core.config import ClusterConfig, RouterConfig, WorkerConfig
from splitserve.core.slo import Slo, attainment
from splitserve.workload.named import workload
from splitserve.workload.workload import Workload

WORKLOAD = "lognormal:prompt=500,output=60,sigma=0.5"
SLO = Slo(ttft_s=0.4, tpot_s=0.04, attainment=0.9)
FIRST_RATE_RPS = 4.0
SHARES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # of the first rate that is too high
VOCABULARY = 1000
START_S = 60.0
SETTLE_S = 1.0
ENGINE = {
    "kind": "sim",
    "latency": {"model": "opt-13b", "gpu": "a100-80g", "tp": 2},
    "total_blocks": 4000,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "max_model_len": 2048,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One system at one rate, over all rounds. Times are seconds; `not_now`: jobs that came back, of each request."""

    routers: int
    rate_rps: float
    attainment: float
    attainments: tuple[float, ...]
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p90_s: float
    not_now: float
    late_share: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """Running. `metrics` are the routers' addresses."""

    one: AsyncClient
    all: AsyncClient
    count: int
    metrics: tuple[str, ...]

    def client(self, routers: int) -> AsyncClient:
        return self.one if routers == 1 else self.all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=200, help="at each rate, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="splitserve-routers-") as directory:
        rows = asyncio.run(_measure(arguments.routers, arguments.requests, arguments.rounds, Path(directory)))
    goodputs = {routers: goodput_rps(rows, routers) for routers in (1, arguments.routers)}
    print(
        json.dumps({"rows": list(map(asdict, rows)), "goodput_rps": goodputs})
        if arguments.json
        else _table(rows, goodputs)
    )


async def _measure(count: int, requests: int, rounds: int, directory: Path) -> list[Row]:
    asked = workload(WORKLOAD)
    async with _fleet(count, directory) as fleet:
        top = await _too_high(fleet, asked, requests // 2)
        rows = []
        for share in SHARES:
            runs: dict[int, list[tuple[Run, float]]] = {1: [], count: []}
            for number in range(rounds):
                for routers in (1, count) if number % 2 == 0 else (count, 1):
                    runs[routers].append(await _run(fleet, routers, asked, requests, share * top, seed=number))
            rows += [_row(routers, share * top, each) for routers, each in runs.items()]
            _say(f"{share * top:.1f} requests/s: " + ", ".join(f"{r.routers}: {r.attainment:.0%}" for r in rows[-2:]))
        return rows


async def _too_high(fleet: Fleet, asked: Workload, requests: int) -> float:
    rate = FIRST_RATE_RPS
    while True:
        run, _ = await _run(fleet, 1, asked, requests, rate, seed=99)
        share = attainment(run.timelines, SLO)
        _say(f"{rate:g} requests/s: {share:.0%}")
        if share < SLO.attainment:
            return rate
        rate *= 1.5


async def _run(
    fleet: Fleet, routers: int, asked: Workload, count: int, rate_rps: float, seed: int
) -> tuple[Run, float]:
    """And how many jobs came back as "not now" meanwhile."""
    drawn = asked.draw(count, rate_rps, seed)
    before = await _not_now(fleet)
    run = await open_loop.run(drawn, to_router(fleet.client(routers), drawn, VOCABULARY, seed))
    await asyncio.sleep(SETTLE_S)
    return run, await _not_now(fleet) - before


def _row(routers: int, rate_rps: float, runs: Sequence[tuple[Run, float]]) -> Row:
    shares = tuple(attainment(run.timelines, SLO) for run, _ in runs)
    ttft = np.concatenate([run.timelines.ttft_s for run, _ in runs])
    tpot = np.concatenate([run.timelines.tpot_s for run, _ in runs])
    return Row(
        routers,
        rate_rps,
        statistics.mean(shares),
        shares,
        float(np.median(ttft)),
        float(np.quantile(ttft, 0.9)),
        float(np.quantile(tpot, 0.9)),
        sum(not_now for _, not_now in runs) / sum(len(run) for run, _ in runs),
        max(run.share_late for run, _ in runs),
    )


def goodput_rps(rows: Sequence[Row], routers: int) -> float:
    """Where attainment falls below the target, on a straight line between rates; the highest rate if it never does, 0
    if it is nowhere met."""
    mine = sorted((row for row in rows if row.routers == routers), key=lambda row: row.rate_rps)
    if mine[0].attainment < SLO.attainment:
        return 0.0
    for low, high in pairwise(mine):
        if high.attainment < SLO.attainment:
            share = (low.attainment - SLO.attainment) / (low.attainment - high.attainment)
            return low.rate_rps + share * (high.rate_rps - low.rate_rps)
    return mine[-1].rate_rps


# The fleet ----------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def _fleet(count: int, directory: Path) -> AsyncIterator[Fleet]:
    cluster = ClusterConfig.model_validate(
        {
            "engine": ENGINE,
            "router": {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0"},
            "pools": {"prefill": {"workers": 2}, "decode": {"workers": 2}},
            "worker_metrics_port": None,
        }
    )
    async with AsyncExitStack() as stack:
        supervisor = await stack.enter_async_context(Supervisor(directory, _on_event, restart=False))
        facts = [await _router(supervisor, cluster, f"router-{number}") for number in range(count)]
        addresses = [each["address"] for each in facts]
        for plan in plan_workers(cluster, addresses[0], this_machine(), "benchmark"):
            assert isinstance(plan.config, WorkerConfig)
            joined = plan.config.model_copy(update={"routers": addresses})
            supervisor.start(ProcessPlan("worker", plan.name, joined, plan.environment))
            await supervisor.ready(plan.name, START_S)
        retries = Retries(most=0)
        one = await stack.enter_async_context(AsyncClient(addresses[0], retries))
        every = await stack.enter_async_context(AsyncClient(",".join(addresses), retries))
        yield Fleet(one, every, count, tuple(each["metrics"] for each in facts))


async def _router(supervisor: Supervisor, cluster: ClusterConfig, name: str) -> dict[str, str]:
    config = plan_router(cluster).config
    assert isinstance(config, RouterConfig)
    supervisor.start(ProcessPlan("router", name, config))
    return dict((await supervisor.ready(name, START_S)).facts)


def _on_event(event: Event) -> None:
    _say(f"{event.name}: {type(event).__name__.lower()}")


async def _not_now(fleet: Fleet) -> float:
    return float(sum(await asyncio.gather(*(asyncio.to_thread(_failed_not_now, at) for at in fleet.metrics))))


def _failed_not_now(address: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    name = 'splitserve_failed_attempts_total{reason="not_now"}'
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


# What is said -------------------------------------------------------------------------------------------------------
def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _table(rows: Sequence[Row], goodputs: dict[int, float]) -> str:
    lines = [
        f"workload {WORKLOAD}; TTFT {SLO.ttft_s:g} s, TPOT {SLO.tpot_s:g} s; 2 prefill and 2 decode workers",
        "",
        "requests/s  routers  attainment (rounds)           TTFT p50/p90, ms  TPOT p90, ms  not now per request",
    ]
    for row in rows:
        rounds = " ".join(f"{share:.0%}" for share in row.attainments)
        late = f"  (sender late: {row.late_share:.0%})" if row.late_share > 0.01 else ""
        lines.append(
            f"{row.rate_rps:10.1f}  {row.routers:7}  {row.attainment:5.0%} ({rounds:<18})"
            f"  {row.ttft_p50_s * 1000:9.0f} / {row.ttft_p90_s * 1000:5.0f}  {row.tpot_p90_s * 1000:12.1f}"
            f"  {row.not_now:8.3f}{late}"
        )
    one, several = goodputs[1], goodputs[max(goodputs)]
    ratio = f"; ratio {several / one:.3f}" if one else ""
    lines.append(f"goodput, requests/s: 1 router {one:.1f}, {max(goodputs)} routers {several:.1f}{ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
