"""Goodput of adaptive scheduling beside colocated and static pools, simulated, over the grid of SLOs.

    python -m benchmarks.scheduling                       # 8 workers, all shapes: minutes
    python -m benchmarks.scheduling --workers 64 --shape balanced --json

Every system serves the same requests with the router's own policy: colocated workers with each chunk, pools with each
split, and the adaptive policy with the cell's objectives. The best chunk and the best split of each cell count; for a
large fleet `--static` says which ones to try. Goodput is where attainment crosses its target, between two rates of
which one meets it. Step times are those of the engine that `benchmarks.goodput` serves, as `benchmarks.predicted`
profiles it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.goodput.alone import OUTPUT_TOKENS, Alone
from benchmarks.goodput.cases import ATTAINMENT, LONGEST_TOKENS, SHAPES, TPOT_CELLS, TTFT_TIMES, Cell, Shape
from splitserve.core.slo import Slo, Timelines
from splitserve.latency.model import LatencyModel
from splitserve.latency.profile import read
from splitserve.planner.deployment import Deployment, Link, Role, WorkerSpec
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.named import workload
from splitserve.workload.requests import Requests

PROFILE = Path(__file__).parent / "results" / "goodput" / "profile.json"
CHUNKS = (32, 64, 128, 256, 512, 1024)
SPLITS = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the workers, that read prompts
CHUNK = 1024  # of pools and of the adaptive system
SEQUENCES = 64
BLOCKS, BLOCK_TOKENS = 1024, 128
BYTES_PER_TOKEN, LAYERS = 4096.0, 8
LINK = Link(3e9)
RATE_STEP = 1.05
START_RPS = 1.2  # of one worker
SPAN = 60
REQUESTS = {2: 2000, 8: 3000, 64: 10_000}
MOST_REQUESTS = 60_000
WARM_UP = 0.1  # of the requests: not judged


@dataclass(frozen=True, slots=True)
class System:
    kind: str
    name: str
    deployment: Deployment


@dataclass(frozen=True, slots=True)
class Row:
    """Goodput in requests per second of all workers; `chunk` and `split` are the best static ones."""

    shape: str
    workers: int
    cell: str
    colocated: float
    chunk: str
    pools: float
    split: str
    adaptive: float

    @property
    def over_static(self) -> float:
        return self.adaptive / max(self.colocated, self.pools)


@dataclass(slots=True)
class Runs:
    """What was simulated of one shape; static systems are judged under every cell from the same runs."""

    shape: Shape
    workers: int
    seeds: int
    requests: dict[tuple[int, int], Requests] = field(default_factory=dict)
    lines: dict[tuple[str, int, Slo | None], list[Timelines]] = field(default_factory=dict)

    def attainment(self, system: System, judged_by: Slo, scheduled_by: Slo | None, step: int) -> float:
        of = (system.name, step, scheduled_by)
        if of not in self.lines:
            self.lines[of] = [
                _judged(simulate(system.deployment, self._requests(step, seed), slo=scheduled_by).timelines)
                for seed in range(self.seeds)
            ]
        return float(np.mean([lines.met(judged_by).mean() for lines in self.lines[of]]))

    def _requests(self, step: int, seed: int) -> Requests:
        if (step, seed) not in self.requests:
            count = REQUESTS.get(self.workers, MOST_REQUESTS)
            drawn = workload(self.shape.workload).draw(count, rate_rps(step, self.workers), seed)
            self.requests[step, seed] = drawn
        return self.requests[step, seed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, action="append", help="repeat for several; default: 8")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeat for several; default: all")
    names = [str(cell) for cell in TPOT_CELLS]
    said = 'such as "TTFT 5x, TPOT 2x"; default: all nine'
    parser.add_argument("--cell", choices=names, metavar="CELL", action="append", help=said)
    parser.add_argument("--static", action="append", help='such as "chunk 64" or "4+4", for several; default: all')
    parser.add_argument("--seeds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    latency = read(args.profile).latency()
    for workers in args.workers or (8,):
        there = [system.name for system in static_systems(workers, latency)]
        if unknown := set(args.static or ()) - set(there):
            parser.error(f"--static {min(unknown)!r} is none of {', '.join(there)}")
    cells = [cell for cell in TPOT_CELLS if not args.cell or str(cell) in args.cell]
    found = [
        row
        for workers in args.workers or (8,)
        for name in args.shape or SHAPES
        for row in rows(SHAPES[name], workers, latency, cells, args.seeds, args.static)
    ]
    if args.json:
        print(json.dumps([asdict(row) | {"over_static": row.over_static} for row in found]))
    else:
        print("\n".join(table(found)))


def rows(
    shape: Shape,
    workers: int,
    latency: LatencyModel,
    cells: Sequence[Cell],
    seeds: int = 1,
    names: Sequence[str] | None = None,
) -> Iterator[Row]:
    """`names` of the static systems that are tried; None: of all."""
    unit, runs = unit_of(latency, shape), Runs(shape, workers, seeds)
    static = [system for system in static_systems(workers, latency) if names is None or system.name in names]
    adaptive = adaptive_system(workers, latency)
    for cell in cells:
        row = _row(cell, runs, cell.slo(unit), static, adaptive)
        print(f"{shape.name}, {workers} workers, {cell}: {row.over_static:.2f}", file=sys.stderr)
        yield row


def _row(cell: Cell, runs: Runs, slo: Slo, static: Sequence[System], adaptive: System) -> Row:
    best: dict[str, tuple[float, str]] = {"colocated": (0.0, "-"), "pools": (0.0, "-")}
    for system in static:
        found = _goodput(partial(runs.attainment, system, slo, None), runs.workers), system.name
        best[system.kind] = max(best[system.kind], found)
    rps = _goodput(partial(runs.attainment, adaptive, slo, slo), runs.workers)
    return Row(runs.shape.name, runs.workers, str(cell), *best["colocated"], *best["pools"], rps)


def unit_of(latency: LatencyModel, shape: Shape) -> Alone:
    """What a request alone gets of a worker that reads whole prompts."""
    tokens = shape.mean_prompt_tokens
    one = Requests(np.zeros(1), np.array([tokens]), np.array([OUTPUT_TOKENS]))
    lines = simulate(deployment_of([worker_of(Role.COLOCATED, latency, CHUNK)]), one).timelines
    return Alone(0.0, float(lines.ttft_s[0]) / tokens, float(lines.tpot_s[0]))


def static_systems(workers: int, latency: LatencyModel) -> list[System]:
    found = []
    for chunk in CHUNKS:
        alike = [worker_of(Role.COLOCATED, latency, chunk)] * workers
        found.append(System("colocated", f"chunk {chunk}", deployment_of(alike)))
    for prefills in sorted({max(1, min(workers - 1, round(share * workers))) for share in SPLITS}):
        pools = [worker_of(Role.PREFILL, latency, CHUNK)] * prefills
        pools += [worker_of(Role.DECODE, latency, CHUNK)] * (workers - prefills)
        found.append(System("pools", f"{prefills}+{workers - prefills}", deployment_of(pools)))
    return found


def adaptive_system(workers: int, latency: LatencyModel) -> System:
    return System("adaptive", "adaptive", deployment_of([worker_of(Role.DECODE, latency, CHUNK)] * workers))


def worker_of(role: Role, latency: LatencyModel, chunk: int) -> WorkerSpec:
    return WorkerSpec(
        role,
        latency,
        BLOCKS,
        block_tokens=BLOCK_TOKENS,
        max_sequences=min(SEQUENCES, chunk),
        max_batched_tokens=chunk,
        max_model_len=LONGEST_TOKENS,
        prefix_caching=False,
    )


def deployment_of(workers: Sequence[WorkerSpec]) -> Deployment:
    return Deployment(tuple(workers), BYTES_PER_TOKEN, LAYERS, LINK, LINK)


def _judged(lines: Timelines) -> Timelines:
    rows = slice(int(WARM_UP * len(lines)), None)
    assert lines.prompt_tokens is not None
    return replace(
        lines,
        arrival=lines.arrival[rows],
        first_token=lines.first_token[rows],
        last_token=lines.last_token[rows],
        output_tokens=lines.output_tokens[rows],
        prompt_tokens=lines.prompt_tokens[rows],
    )


def _goodput(attainment: Callable[[int], float], workers: int) -> float:
    """Where attainment crosses the target, on a line between the highest rate of the grid that meets it and the next;
    by bisection. 0 if even the lowest does not."""
    met, missed, step, stride = -SPAN, SPAN, 0, 4
    while missed - met > 1:
        if attainment(step) >= ATTAINMENT:
            met = step
        else:
            missed = step
        if missed == SPAN:
            step = min(met + stride, SPAN - 1)
        elif met == -SPAN:
            step = max(missed - stride, 1 - SPAN)
        else:
            step = (met + missed) // 2
        stride *= 2
    if met == -SPAN:
        return 0.0
    above, below = attainment(met), attainment(missed) if missed < SPAN else 0.0
    return rate_rps(met + (above - ATTAINMENT) / (above - below), workers)


def rate_rps(step: float, workers: int) -> float:
    return float(START_RPS * workers * RATE_STEP**step)


def table(found: Sequence[Row]) -> Iterable[str]:
    grouped: dict[tuple[str, int], list[Row]] = {}
    for row in found:
        grouped.setdefault((row.shape, row.workers), []).append(row)
    for (shape, workers), mine in grouped.items():
        yield f"{shape}, {workers} workers: goodput, requests/s"
        yield "cell                  colocated (chunk)     pools (split)   adaptive  adaptive / better static"
        for number, row in enumerate(mine):
            if number and number % len(TTFT_TIMES) == 0:
                yield ""
            yield (
                f"{row.cell:20} {row.colocated:8.2f} {row.chunk:12} {row.pools:8.2f} {row.split:8} "
                f"{row.adaptive:8.2f}      {row.over_static:.2f}"
            )
        yield ""


if __name__ == "__main__":
    main()
