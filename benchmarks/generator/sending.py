"""The load generator in a process of its own, as `splitserve bench` runs it.

    python -m benchmarks.generator.sending '{"kind": "grpc", "address": "127.0.0.1:50051", ...}'

Prints what it saw as one JSON line. With `profile` it writes cProfile's figures there instead of being timed.
"""

import cProfile
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import numpy as np
import uvloop

from splitserve.bench import open_loop
from splitserve.bench.run import Ending, Run
from splitserve.bench.targets.openai import open_server
from splitserve.bench.targets.opened import Opened
from splitserve.bench.targets.options import Options
from splitserve.bench.targets.router import asking
from splitserve.cli.process import end_with_parent
from splitserve.client import AsyncClient, Retries
from splitserve.workload.arrivals import Poisson
from splitserve.workload.lengths import fixed
from splitserve.workload.pairs import Pair
from splitserve.workload.requests import Requests
from splitserve.workload.synthetic import Synthetic

VOCABULARY = 32_000
WARM_S = 2.0  # left out: connections are opened, code is read
GRACE_S = 20.0


@dataclass(frozen=True, slots=True)
class Asked:
    """`kind` is grpc or http."""

    kind: str
    address: str
    rate_rps: float
    seconds: float
    prompt_tokens: int
    output_tokens: int
    profile: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """`tokens_per_s` from the warm-up to the last arrival; `cpu_share` of one core over the whole run, and
    `tokens_per_core` per second of CPU. `failed` counts requests that did not end well with all their tokens. Lateness
    is of requests, lag of the event loop. `overload`: why the run is invalid, by its own word."""

    tokens_per_s: float
    cpu_share: float
    tokens_per_core: float
    late_p50_s: float
    late_p99_s: float
    late_max_s: float
    lag_p99_s: float
    failed: int
    overload: str


async def measured(asked: Asked) -> Seen:
    requests = drawn(asked)
    async with opened(asked) as target:
        run = await open_loop.run(requests, target.send(requests), open_loop.Limits(asked.seconds + WARM_S + GRACE_S))
    return seen(run)


def drawn(asked: Asked) -> Requests:
    lengths = Pair(fixed(asked.prompt_tokens), fixed(asked.output_tokens))
    count = round(asked.rate_rps * (asked.seconds + WARM_S))
    return Synthetic("fixed", lengths, Poisson()).draw(count, asked.rate_rps, seed=0)


@asynccontextmanager
async def opened(asked: Asked) -> AsyncIterator[Opened]:
    if asked.kind == "http":
        async with open_server(asked.address, f"http://{asked.address}/v1", Options(vocabulary=VOCABULARY)) as target:
            yield target
        return
    async with AsyncClient(asked.address, Retries(most=0)) as client:
        yield Opened(asked.address, VOCABULARY, asking(client))


def seen(run: Run) -> Seen:
    late, until_s = run.after(WARM_S).lateness_s, float(run.scheduled_s[-1])
    steady = (run.chunks.time_s >= WARM_S) & (run.chunks.time_s < until_s)
    return Seen(
        tokens_per_s=int(run.chunks.tokens[steady].sum()) / (until_s - WARM_S),
        cpu_share=run.cpu_s / float(np.nanmax(run.ended_s)),
        tokens_per_core=int(run.tokens.sum()) / run.cpu_s,
        late_p50_s=float(np.nanquantile(late, 0.5)),
        late_p99_s=float(np.nanquantile(late, 0.99)),
        late_max_s=float(np.nanmax(late)),
        lag_p99_s=run.lag_p99_s,
        failed=len(run) - run.count(Ending.DONE) + run.short,
        overload=run.after(WARM_S).overload,
    )


if __name__ == "__main__":
    said = json.loads(sys.argv[1])
    end_with_parent(int(said.pop("parent")))
    asked = Asked(**said)
    if asked.profile:
        profiler = cProfile.Profile()
        profiler.runcall(uvloop.run, measured(asked))
        profiler.dump_stats(asked.profile)
    else:
        print(json.dumps(asdict(uvloop.run(measured(asked)))), flush=True)
