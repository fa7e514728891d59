"""Measures what the planner's simulator costs: CPU per simulated request, and memory.

    python -m benchmarks.simulator_speed [--large] [--json]

ShareGPT-like lengths (200 output tokens in the mean), OPT-13B on A100-80G by DistServe's table, half of the workers
prefill (TP 2) and half decode (TP 1), at a rate that keeps them busy. `--large`: 10,000 workers and a million requests.
"""

import argparse
import json
import resource
import time

from splitserve.latency.catalog import costs
from splitserve.latency.gpus import gpu
from splitserve.latency.shape import shape
from splitserve.planner.deployment import Deployment, Link, Role, WorkerSpec
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.named import workload

RUNS = ((2, 10_000), (8, 20_000), (64, 50_000), (1000, 100_000))
LARGE = ((10_000, 1_000_000),)
RATE_RPS = 4.0  # for each pair of workers
BLOCK_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="10,000 workers and a million requests instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args()
    rows = [measure(workers, count) for workers, count in (LARGE if given.large else RUNS)]
    if given.json:
        print(json.dumps(rows))
        return
    print("workers   requests  CPU s  µs per request  events per request  MiB")
    for row in rows:
        print(
            f"{row['workers']:7,} {row['requests']:10,} {row['cpu_s']:6.1f} {row['us_per_request']:15.1f} "
            f"{row['events_per_request']:19.1f} {row['peak_mib']:5.0f}"
        )


def measure(workers: int, count: int) -> dict[str, float]:
    deployed = _deployment(workers)
    requests = workload("sharegpt").draw(count, RATE_RPS * workers / 2, seed=1)
    began = time.process_time()
    outcome = simulate(deployed, requests)
    cpu_s = time.process_time() - began
    return {
        "workers": workers,
        "requests": count,
        "cpu_s": cpu_s,
        "us_per_request": cpu_s / count * 1e6,
        "events_per_request": outcome.events / count,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _deployment(workers: int) -> Deployment:
    link = Link(gpu("a100-80g").link_bytes_per_s)
    prefill, decode = _worker(Role.PREFILL, 2), _worker(Role.DECODE, 1)
    specs = (prefill,) * (workers // 2) + (decode,) * (workers - workers // 2)
    model = shape("opt-13b")
    return Deployment(specs, model.kv_bytes_per_token, model.layers, link, link)


def _worker(role: Role, tp: int) -> WorkerSpec:
    known = costs(shape("opt-13b"), gpu("a100-80g"), tp, 1)
    assert not isinstance(known, str)
    return WorkerSpec(role, known.latency, known.kv_tokens // BLOCK_TOKENS, block_tokens=BLOCK_TOKENS)


if __name__ == "__main__":
    main()
