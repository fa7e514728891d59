"""Measures what one routing decision costs the router, by the size of the fleet.

    python -m benchmarks.routing_decision [--json]

Half of the workers prefill, half decode, all with room of their own; a decision is what the router does for each
request that it binds: look at the candidates, choose, and promise the jobs to both workers. CPU time, one thread.
"""

import argparse
import json
import statistics
import time
from random import Random

from splitserve.core.worker import KvFormat, KvMode, Load, Pool, WorkerInfo
from splitserve.routing.fleet import Fleet
from splitserve.routing.policy import choose
from splitserve.routing.promise import Promise
from splitserve.routing.route import Need, Route

FLEETS = (2, 8, 64, 256, 1024, 10_000)
ROUNDS, DECISIONS = 9, 400
KV = KvFormat("print", "bfloat16", 16, 32, 8, 128, 65536, KvMode.PUSH, "nixl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args()
    found = {workers: measure(workers) for workers in FLEETS}
    if given.json:
        print(json.dumps(found))
        return
    print("workers  choose, µs  with promises, µs   (medians of rounds)")
    for workers, (choosing, binding) in found.items():
        print(f"{workers:7,}  {choosing:10.1f}  {binding:17.1f}")


def measure(workers: int) -> tuple[float, float]:
    """Microseconds of CPU for a choice alone, and for a choice whose jobs are promised."""
    random, fleet = Random(1), Fleet(silent_after_s=1e9)
    for number in range(workers):
        _join(fleet, f"w{number}", Pool.PREFILL if number % 2 else Pool.DECODE, random)
    need, alone, bound = Need(1000), [], []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(DECISIONS):
            choose(fleet.sample(0.0, random), need)
        middle = time.process_time()
        for number in range(DECISIONS):
            route = choose(fleet.sample(0.0, random), need)
            assert isinstance(route, Route) and route.prefill is not None  # noqa: PT018
            fleet.promise(route.decode, f"{number}/d", Promise(Pool.DECODE, 1000, waits_for_kv=True))
            fleet.promise(route.prefill, f"{number}/p", Promise(Pool.PREFILL, 1000))
            fleet.withdraw(route.decode, f"{number}/d")
            fleet.withdraw(route.prefill, f"{number}/p")
        ended = time.process_time()
        alone.append((middle - began) / DECISIONS * 1e6)
        bound.append((ended - middle) / DECISIONS * 1e6)
    return round(statistics.median(alone), 1), round(statistics.median(bound), 1)


def _join(fleet: Fleet, name: str, pool: Pool, random: Random) -> None:
    fleet.join(WorkerInfo(name, name, pool, "m", KV, (), 8192, 256, 8192, "sim"), 0.0)
    used = random.randrange(4000)
    load = Load(0, 8192 - used, 255 - used // 32, used // 4, 4096, 7680, used // 32, 0, 0, pool, False, 0)
    fleet.report(name, load, 0.0)


if __name__ == "__main__":
    main()
