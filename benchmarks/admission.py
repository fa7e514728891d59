"""Decode admission by predicted peak memory beside admission by what is held now, near full memory.

    python -m benchmarks.admission                        # simulated: seconds
    python -m benchmarks.admission --engine vllm          # one vLLM engine on one core: ten minutes
    python -m benchmarks.admission --json

Workers whose KV memory, not their speed, limits them: the same requests, admitted as a worker does
(`splitserve/routing/peak.py`) and by the blocks that decodes hold at the moment. Simulated steps take what those of the
engine that `benchmarks.goodput` serves take. Preempted decodes are computed anew, as vLLM does.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

import numpy as np

from benchmarks.engine_queue import ByWhatIsHeld, EngineQueue
from benchmarks.goodput.cases import LONGEST_TOKENS
from benchmarks.goodput.model import make_model, vocabulary
from benchmarks.scheduling import PROFILE, deployment_of, worker_of
from splitserve.cli.build import build_engine, read_model
from splitserve.core.config import VllmSettings, WorkerConfig
from splitserve.core.slo import Timelines
from splitserve.core.worker import Pool
from splitserve.latency.model import LatencyModel
from splitserve.latency.profile import read
from splitserve.planner.deployment import Role, WorkerSpec
from splitserve.planner.simulator.simulate import simulate
from splitserve.routing.admission import Capacity
from splitserve.workload.named import workload
from splitserve.workload.workload import Workload

WORKERS = 2
BLOCK_TOKENS = 16
CASES = ((480, 6.0), (960, 8.5), (960, 9.0), (2000, 11.0))  # blocks of each worker, requests/s
SPREADS = (0.4, 0.8)  # of lengths: sigma of their logarithms
REQUESTS = 1500
LIVE_BLOCKS, LIVE_BLOCK_TOKENS = 192, 32  # of one vLLM engine
LIVE_CASES = ((0.4, 2.6), (0.8, 2.4))  # sigma, requests/s
LIVE_REQUESTS = 240
LIVE_WARM_UP = 40  # requests that tell how long outputs are; they are not judged


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
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    live = args.engine == "vllm"
    found = list(live_rows(args.seed) if live else rows(read(args.profile).latency(), args.seed))
    print(json.dumps([asdict(row) for row in found]) if args.json else "\n".join(table(found, live)))


def rows(latency: LatencyModel, seed: int) -> Iterator[Row]:
    worker = replace(worker_of(Role.COLOCATED, latency, 256), block_tokens=BLOCK_TOKENS, max_sequences=256)
    for sigma in SPREADS:
        for blocks, rate_rps in CASES:
            for by_peak in (False, True):
                yield _row(replace(worker, kv_blocks=blocks, admits_by_peak=by_peak), sigma, rate_rps, seed)


def _row(worker: WorkerSpec, sigma: float, rate_rps: float, seed: int) -> Row:
    requests = _workload(sigma, worker.max_model_len).draw(REQUESTS, rate_rps, seed)
    outcome = simulate(deployment_of([worker] * WORKERS), requests)
    by, preemptions = "peak" if worker.admits_by_peak else "now", sum(use.preemptions for use in outcome.workers)
    return _seen(sigma, worker.kv_blocks, rate_rps, by, preemptions, outcome.timelines)


def live_rows(seed: int) -> Iterator[Row]:
    """One engine serves all of it; the two ways take turns."""
    with tempfile.TemporaryDirectory(prefix="splitserve-admission-") as scratch:
        path = make_model(Path(scratch) / "model")
        settings = VllmSettings(
            dtype="float32",
            max_model_len=LONGEST_TOKENS,
            block_size=LIVE_BLOCK_TOKENS,
            max_num_seqs=128,
            max_num_batched_tokens=256,
            enable_prefix_caching=False,
            extra={"num_gpu_blocks_override": LIVE_BLOCKS},
        )
        core = min(os.sched_getaffinity(0))
        config = WorkerConfig(pool=Pool.DECODE, model=str(path), engine=settings, cpu_core=core)
        engine = build_engine(config, read_model(config.model, config.served_model_name), uuid4().hex)
        with EngineQueue(engine, vocabulary(path)) as queue:
            for sigma, rate_rps in LIVE_CASES:
                for account in (ByWhatIsHeld, Capacity):
                    yield _live_row(queue, account, sigma, rate_rps, seed)


def _live_row(queue: EngineQueue, account: type[Capacity], sigma: float, rate_rps: float, seed: int) -> Row:
    by = "peak" if account is Capacity else "now"
    requests = _workload(sigma, LONGEST_TOKENS).draw(LIVE_REQUESTS, rate_rps, seed)
    lines, preemptions = queue.serve(requests, seed, account, lambda line: print(f"{by}, {line}", file=sys.stderr))
    return _seen(sigma, queue.info.total_blocks, rate_rps, by, preemptions, lines, LIVE_WARM_UP)


def _seen(
    sigma: float, blocks: int, rate_rps: float, by: str, preemptions: int, lines: Timelines, warm_up: int = 0
) -> Row:
    """What came of all but the first `warm_up` requests."""
    return Row(
        sigma,
        blocks,
        rate_rps,
        by,
        preemptions,
        float(np.quantile(lines.ttft_s[warm_up:], 0.9)),
        float(np.quantile(lines.tpot_s[warm_up:], 0.99)),
        float(lines.last_token.max()),
    )


def _workload(sigma: float, longest: int) -> Workload:
    return workload(f"lognormal:prompt=250,output=250,sigma={sigma},limit={longest}")


def table(found: Iterable[Row], live: bool) -> Iterator[str]:
    who = f"one vLLM engine, {LIVE_REQUESTS}" if live else f"{WORKERS} workers, {REQUESTS}"
    yield f"{who} requests of 250 prompt and 250 output tokens in the mean"
    yield "sigma  blocks  requests/s  admitted by  preemptions  TTFT p90, s  TPOT p99, ms  all ended after, s"
    for row in found:
        yield (
            f"{row.sigma:5} {row.blocks:7} {row.rate_rps:11.1f}  {row.by:11} {row.preemptions:12} "
            f"{row.ttft_p90_s:12.2f} {row.tpot_p99_s * 1000:13.1f} {row.seconds:19.0f}"
        )


if __name__ == "__main__":
    main()
