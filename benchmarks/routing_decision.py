"""Measures what one routing decision costs the router, by the size of the fleet.

    python -m benchmarks.routing_decision [--json]

Half of the workers have decodes, and a quarter reads prompts; `static` chooses by the pools they are in, `adaptive` by
the requests' objectives. A decision is what the router does for each request: draw whom to look at, and choose; binding
also promises the jobs to the workers, which works out anew what more requests would mean to them. CPU time of one
thread. Every decision is made again in each of several rounds from the same state, and its least time counts: what
lies above that is the machine's other work. The percentiles and the most are over decisions, not the
first of a new router. Once in `routing/mix.REFRESH` requests one of them works out how many workers are to decode, too.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from random import Random

from splitserve.core.worker import KvFormat, KvMode, Load, Pool, StepCost, WorkerInfo
from splitserve.routing.fleet import Fleet
from splitserve.routing.mix import Mix
from splitserve.routing.policy import choose
from splitserve.routing.promise import Promise
from splitserve.routing.route import AS_IT_IS, Need, Route

FLEETS = (2, 8, 16, 24, 32, 64, 256, 1000, 10_000)
ROUNDS, FIRST, DECISIONS = 9, 130, 300
LIMIT_US = 50.0
KV = KvFormat("print", "bfloat16", 16, 32, 8, 128, 65536, KvMode.PUSH, "nixl")
COST = StepCost(0.006, 0.001, 5e-5, 512.0, 1e-5, 1e-9, 1e-4, 1e-4, 32.0, 5e-5, 1e-8, stages=1)
TPOT_S = 0.03
BLOCKS = 8192


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds of CPU: of the choice, `choose_most` the longest one, and with its jobs' promises. `bound`: share of
    requests that don't wait."""

    policy: str
    workers: int
    choose_p50: float
    choose_p99: float
    choose_most: float
    bind_p50: float
    bind_p99: float
    bound: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args()
    rows = [measure(policy, workers) for policy in ("static", "adaptive") for workers in FLEETS]
    print(json.dumps([asdict(row) for row in rows]) if given.json else "\n".join(table(rows)))


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield "policy    workers   choose, µs: p50    p99   most   and promise: p50    p99   bound at once"
    for row in rows:
        yield (
            f"{row.policy:8} {row.workers:8,} {row.choose_p50:17.1f} {row.choose_p99:6.1f} "
            f"{row.choose_most:6.1f} {row.bind_p50:18.1f} {row.bind_p99:6.1f} {row.bound:13.0%}"
        )
    worst = max(rows, key=lambda row: row.choose_p99)
    kept = "kept" if worst.choose_p99 <= LIMIT_US else "missed"
    yield f"worst: {worst.choose_p99:.1f} µs, {worst.policy}, {worst.workers:,} workers; {LIMIT_US:g} µs {kept}"


def measure(policy: str, workers: int, rounds: int = ROUNDS, decisions: int = DECISIONS) -> Row:
    times = [_round(policy, workers, decisions) for _ in range(rounds)]
    least = [min(of, key=lambda each: each[0] + each[1]) for of in zip(*times, strict=True)]
    chosen = sorted(choosing for choosing, _ in least)
    bound = sorted(choosing + promising for choosing, promising in least if promising)
    return Row(
        policy,
        workers,
        *_percentiles(chosen),
        round(chosen[-1], 1),
        *_percentiles(bound),
        bound=len(bound) / decisions,
    )


def _percentiles(ordered: Sequence[float]) -> tuple[float, float]:
    """p50 and p99."""
    if not ordered:
        return 0.0, 0.0
    return round(ordered[len(ordered) // 2], 1), round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 1)


def _round(policy: str, workers: int, decisions: int) -> list[tuple[float, float]]:
    """Of each decision, microseconds of the choice and of its promises: 0 if the request is to wait."""
    random = Random(1)
    fleet, mix, held, times = _fleet(workers, random), Mix(), deque[Route](), []
    for number in range(FIRST + decisions):
        need = _need(policy, workers, random)
        began = time.thread_time_ns()
        seen, split = fleet.sample(0.0, random, need.wanted), AS_IT_IS
        if need.has_objectives:
            mix.add(need, need.due)
            split = fleet.split(mix, seen, need.tpot_s)
        route = choose(seen, need, 0.0, split)
        chosen = promised = time.thread_time_ns()
        if isinstance(route, Route):
            _promise(fleet, route, f"{number}", need)
            promised = time.thread_time_ns()
            held.append(route)
        times.append(((chosen - began) / 1e3, (promised - chosen) / 1e3))
        while len(held) > workers // 4:
            _end(fleet, held.popleft(), random)
    return times[FIRST:]


def _need(policy: str, workers: int, random: Random) -> Need:
    tokens = random.randrange(100, 3000)
    cached = {f"w{random.randrange(workers)}": tokens // 2 for _ in range(2)} if random.random() < 0.5 else {}
    if policy == "static":
        return Need(tokens, cached=cached)
    return Need(tokens, due=random.uniform(0.05, 2.0), tpot_s=TPOT_S, output_tokens=200, cached=cached)


def _promise(fleet: Fleet, route: Route, job: str, need: Need) -> None:
    fleet.promise(route.decode, f"{job}/d", Promise(Pool.DECODE, need.tokens, waits_for_kv=route.prefill is not None))
    fleet.reads_until(route.reader, route.read_s)
    if route.prefill is not None:
        fleet.promise(route.prefill, f"{job}/p", Promise(Pool.PREFILL, need.tokens))


def _end(fleet: Fleet, route: Route, random: Random) -> None:
    """The workers report anew, and what was promised to them has ended."""
    for uuid in dict.fromkeys((route.decode, route.reader)):
        pool = fleet.worker(uuid).pool
        fleet.leave(uuid)
        _join(fleet, uuid, pool, random)


def _fleet(workers: int, random: Random) -> Fleet:
    fleet = Fleet(silent_after_s=1e9)
    for number in range(workers):
        _join(fleet, f"w{number}", Pool.PREFILL if number % 2 else Pool.DECODE, random)
    return fleet


def _join(fleet: Fleet, name: str, pool: Pool, random: Random) -> None:
    fleet.join(WorkerInfo(name, name, pool, "m", KV, (), BLOCKS, 256, 8192, "sim", step_cost=COST), 0.0)
    decodes = random.randrange(1, 60) if pool is Pool.DECODE else 0
    reading = random.randrange(1, 2000) if random.random() < 0.25 else 0
    fleet.report(name, _load(pool, decodes, reading, random), 0.0)
    if reading:
        fleet.reads_until(name, reading * COST.token_s)


def _load(pool: Pool, decodes: int, reading: int, random: Random) -> Load:
    return Load(
        seen_jobs=0,
        free_blocks=BLOCKS - decodes * 40 - reading // 16,
        free_sequences=255 - decodes,
        prefill_tokens=reading,
        prefill_token_limit=4096,
        parked_limit_blocks=7680,
        running=decodes,
        quarantined_blocks=0,
        pinned_blocks=0,
        pool=pool,
        draining=False,
        produced_tokens=0,
        tpot_s=TPOT_S if decodes else inf,
        slack_s=random.uniform(0.0, 1.0) if decodes else inf,
    )


if __name__ == "__main__":
    main()
