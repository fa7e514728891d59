"""Decode admission by predicted peak memory beside admission by what is held now, simulated near full memory.

    python -m benchmarks.admission                        # seconds
    python -m benchmarks.admission --json

Two colocated workers whose KV memory, not their speed, limits them: the same requests, admitted as a worker does
(`splitserve/routing/peak.py`) and by the blocks that decodes hold at the moment. Step times are those of the engine
that `benchmarks.goodput` serves. Preempted decodes are computed anew, as vLLM does.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.scheduling import PROFILE, deployment_of, worker_of
from splitserve.latency.model import LatencyModel
from splitserve.latency.profile import read
from splitserve.planner.deployment import Role, WorkerSpec
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.named import workload

WORKERS = 2
BLOCK_TOKENS = 16
CASES = ((480, 6.0), (960, 8.5), (960, 9.0), (2000, 11.0))  # blocks of each worker, requests/s
SPREADS = (0.4, 0.8)  # of lengths: sigma of their logarithms
REQUESTS = 1500


@dataclass(frozen=True, slots=True)
class Row:
    """`seconds` until the last of the requests has ended."""

    sigma: float
    blocks: int
    rate_rps: float
    by: str
    preemptions: int
    ttft_p90_s: float
    tpot_p99_s: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, default=PROFILE, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    found = list(rows(read(args.profile).latency(), args.seed))
    print(json.dumps([asdict(row) for row in found]) if args.json else "\n".join(table(found)))


def rows(latency: LatencyModel, seed: int) -> Iterator[Row]:
    worker = replace(worker_of(Role.COLOCATED, latency, 256), block_tokens=BLOCK_TOKENS, max_sequences=256)
    for sigma in SPREADS:
        for blocks, rate_rps in CASES:
            for by_peak in (False, True):
                yield _row(replace(worker, kv_blocks=blocks, admits_by_peak=by_peak), sigma, rate_rps, seed)


def _row(worker: WorkerSpec, sigma: float, rate_rps: float, seed: int) -> Row:
    requests = workload(f"lognormal:prompt=250,output=250,sigma={sigma},limit={worker.max_model_len}")
    outcome = simulate(deployment_of([worker] * WORKERS), requests.draw(REQUESTS, rate_rps, seed))
    lines = outcome.timelines
    return Row(
        sigma,
        worker.kv_blocks,
        rate_rps,
        "peak" if worker.admits_by_peak else "now",
        sum(use.preemptions for use in outcome.workers),
        float(np.quantile(lines.ttft_s, 0.9)),
        float(np.quantile(lines.tpot_s, 0.99)),
        float(lines.last_token.max()),
    )


def table(found: Iterable[Row]) -> Iterator[str]:
    yield f"{WORKERS} workers, {REQUESTS} requests of 250 prompt and 250 output tokens in the mean"
    yield "sigma  blocks  requests/s  admitted by  preemptions  TTFT p90, s  TPOT p99, ms  all ended after, s"
    for row in found:
        yield (
            f"{row.sigma:5} {row.blocks:7} {row.rate_rps:11.1f}  {row.by:11} {row.preemptions:12} "
            f"{row.ttft_p90_s:12.2f} {row.tpot_p99_s * 1000:13.1f} {row.seconds:19.0f}"
        )


if __name__ == "__main__":
    main()
