"""What it saves that requests wait in the router: prompts given to a worker as it gets to them, and on arrival.

    python -m benchmarks.late_binding                     # a minute
    python -m benchmarks.late_binding --json

Static pools of simulated workers, the router's own policy, the same requests. Late: a prefill worker is given the
prompts of two steps, and the decode worker is chosen, and its blocks taken, then. Early: both on arrival, as far as the
decode workers have blocks, which is what a router without a queue does. Step times are those of the engine that
`benchmarks.goodput` serves; load is a share of what the prefill workers read.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.goodput.cases import SHAPES
from benchmarks.scheduling import PROFILE, deployment_of, worker_of
from splitserve.latency.model import LatencyModel
from splitserve.latency.profile import read
from splitserve.planner.deployment import Deployment, Role
from splitserve.planner.simulator.outcome import Outcome
from splitserve.planner.simulator.simulate import simulate
from splitserve.routing.admission import decode_blocks
from splitserve.routing.outlook import alone_s
from splitserve.workload.named import workload

PREFILLS, DECODES = 5, 3
BLOCKS, BLOCK_TOKENS = 4096, 16
LOADS = (0.7, 0.9)
ARRIVALS = ("poisson", "gamma:cv=3")
REQUESTS = 3000
EARLY_STEPS = 1_000_000
CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """`waiting_share`: of the decode workers' KV memory, in the mean, what requests hold whose KV is not there yet."""

    arrivals: str
    load: float
    binding: str
    waiting_share: float
    ttft_mean_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    preemptions: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, default=PROFILE, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    found = list(rows(read(args.profile).latency(), args.seed))
    print(json.dumps([asdict(row) for row in found]) if args.json else "\n".join(table(found)))


def rows(latency: LatencyModel, seed: int, requests: int = REQUESTS) -> Iterator[Row]:
    shape = SHAPES["balanced"]
    most_rps = PREFILLS / alone_s(latency, shape.mean_prompt_tokens)
    for arrivals in ARRIVALS:
        for load in LOADS:
            drawn = workload(f"{shape.workload},arrivals={arrivals}").draw(requests, load * most_rps, seed)
            for binding, deployment in deployments(latency).items():
                yield _row(arrivals, load, binding, simulate(deployment, drawn))


def deployments(latency: LatencyModel) -> dict[str, Deployment]:
    prefill, decode = (worker_of(role, latency, CHUNK) for role in (Role.PREFILL, Role.DECODE))
    decode = replace(decode, kv_blocks=BLOCKS, block_tokens=BLOCK_TOKENS, max_sequences=256)
    prefill = replace(prefill, block_tokens=BLOCK_TOKENS)
    at_once = replace(prefill, kv_blocks=EARLY_STEPS, steps_ahead=EARLY_STEPS)
    return {
        "early": deployment_of([at_once] * PREFILLS + [decode] * DECODES),
        "late": deployment_of([prefill] * PREFILLS + [decode] * DECODES),
    }


def _row(arrivals: str, load: float, binding: str, outcome: Outcome) -> Row:
    ttft_s, prompts = outcome.timelines.ttft_s, outcome.timelines.prompt_tokens
    assert prompts is not None
    blocks = np.array([decode_blocks(int(tokens), BLOCK_TOKENS) for tokens in prompts])
    held = float(np.nansum(blocks * (outcome.kv_ready - outcome.bound)))
    return Row(
        arrivals,
        load,
        binding,
        held / (outcome.simulated_s * DECODES * BLOCKS),
        float(ttft_s.mean()),
        float(np.quantile(ttft_s, 0.9)),
        float(np.quantile(ttft_s, 0.99)),
        sum(use.preemptions for use in outcome.workers),
    )


def table(found: Iterable[Row]) -> Iterator[str]:
    yield f"{PREFILLS} prefill and {DECODES} decode workers, {REQUESTS} requests of the balanced shape"
    yield "arrivals    load  bound   decode memory waiting for KV  TTFT mean, s   p90   p99  preemptions"
    for row in found:
        yield (
            f"{row.arrivals:10} {row.load:5.0%}  {row.binding:6} {row.waiting_share:28.1%} {row.ttft_mean_s:13.2f} "
            f"{row.ttft_p90_s:5.2f} {row.ttft_p99_s:5.2f} {row.preemptions:12}"
        )


if __name__ == "__main__":
    main()
