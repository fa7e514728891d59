"""The planner's prediction beside the measurement of `benchmarks.goodput`, for the same systems and the same requests.

    python -m benchmarks.predicted              # profiles the engine (5 minutes, kept), then simulates
    python -m benchmarks.predicted --shape balanced --json

The simulator knows the engine's step times (`splitserve profile`) and what a request alone gets, which says what
serving adds to a step and to a TTFT. Nothing that was measured under load goes into it. P99 ITL is not predicted: the
simulator does not make every gap.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.goodput.alone import OUTPUT_TOKENS, Alone
from benchmarks.goodput.campaign import SPAN
from benchmarks.goodput.cases import (
    LONGEST_TOKENS,
    SHAPES,
    TPOT_CELLS,
    TTFT_TIMES,
    WARM_UP_REQUESTS,
    Shape,
    rate_rps,
    step_of,
)
from benchmarks.goodput.grid import Answer, answers
from benchmarks.goodput.model import make_model
from benchmarks.goodput.points import Measured
from benchmarks.goodput.report import points_of
from benchmarks.goodput.systems import MOST_SEQUENCES, SYSTEMS, UNIT, System, engine, unit_of
from benchmarks.side_by_side import profiled
from splitserve.core.slo import Timelines
from splitserve.latency.fit import FittedLatency
from splitserve.latency.profile import Profile
from splitserve.planner.deployment import Deployment, Link, Role, WorkerSpec
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.requests import Requests

RESULTS = Path(__file__).parent / "results" / "goodput"
LINK_BYTES_PER_S = 3e9  # NIXL over shared memory on one machine: benchmarks/results/kv_transfer.txt
KINDS = ("colocated", "push")
MOST_TOKENS = 2048  # profiled in one step
REQUESTS = 200
_CHOICES = {True: "yes", False: "NO", None: "open"}
SEEDS = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One cell: goodput of colocated (with its best chunk) and of push, requests per second, and push over colocated.
    `agrees`: the same one wins, or the measured ratio's interval holds 1; None where the measured ratio is a bound
    from one side that leaves open who wins."""

    cell: str
    colocated_said: float
    colocated_seen: float
    chunk_said: int
    chunk_seen: int
    push_said: float
    push_seen: float
    ratio_said: float
    ratio_seen: float
    ratio_low: float
    ratio_high: float
    agrees: bool | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeat for several; default: all measured")
    parser.add_argument("--points", type=Path, default=RESULTS, help="of benchmarks.goodput; default: %(default)s")
    parser.add_argument("--profile", type=Path, help="kept there, and used if it is; default: in --points")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="splitserve-predicted-") as scratch:
        profile = _profile(args.profile or args.points / "profile.json", Path(scratch))
    found = {}
    for shape in (SHAPES[name] for name in args.shape or SHAPES):
        alone, points = points_of(args.points, shape).read()
        if UNIT in alone and points:
            found[shape.name] = compared(shape, profile, alone, points)
        else:
            print(f"{shape.name}: not measured yet; run python -m benchmarks.goodput", file=sys.stderr)
    if args.json:
        print(json.dumps({name: [asdict(row) for row in rows] for name, rows in found.items()}))
    else:
        print("\n\n".join("\n".join(_table(name, profile, rows)) for name, rows in found.items()))


def _profile(out: Path, scratch: Path) -> Profile:
    settings = {"max_num_batched_tokens": MOST_TOKENS, "max_num_seqs": MOST_SEQUENCES}
    model = "" if out.exists() else str(make_model(scratch / "model"))
    return profiled({"model": model, "engine": {**engine("vllm"), **settings}}, scratch, out, LONGEST_TOKENS)


def compared(shape: Shape, profile: Profile, alone: Mapping[str, Alone], points: Sequence[Measured]) -> tuple[Row, ...]:
    """Every cell of which both kinds are measured."""
    systems = [system for system in SYSTEMS.values() if system.kind in KINDS and system.name in alone]
    said = answers(
        [point for system in systems for point in _simulated(shape, system, profile, alone[system.name])],
        unit_of(alone),
        TPOT_CELLS,
    )
    seen = answers(points, unit_of(alone), TPOT_CELLS)
    return tuple(_row(one, other) for one, other in zip(said, seen, strict=True) if set(KINDS) <= set(other.best))


def _simulated(shape: Shape, system: System, profile: Profile, alone: Alone) -> Iterable[Measured]:
    """At every step of the rate that could be measured."""
    deployment, overhead_s = _as_served(system, profile, alone, shape.mean_prompt_tokens)
    start = step_of(shape.start_rps)
    for step in range(start - SPAN, start + SPAN + 1):
        for seed in range(SEEDS):
            requests = shape.requests(rate_rps(step), REQUESTS, seed)
            lines = _later(simulate(deployment, requests).timelines, overhead_s)
            yield Measured(system.name, step, seed, lines, 1.0, 1.0, 0.0, {}, 0.0, 0, "")


def _as_served(system: System, profile: Profile, alone: Alone, prompt_tokens: int) -> tuple[Deployment, float]:
    """With what serving adds, seen in a request alone: to each step, and to a TTFT besides."""
    latency = profile.latency()
    ttft_s, tpot_s = _alone(_deployment(system, profile, latency), prompt_tokens)
    latency = replace(latency, fixed_s=latency.fixed_s + max(0.0, alone.tpot_s - tpot_s))
    deployment = _deployment(system, profile, latency)
    ttft_s, _ = _alone(deployment, prompt_tokens)
    return deployment, alone.ttft_of(prompt_tokens) - ttft_s


def _alone(deployment: Deployment, prompt_tokens: int) -> tuple[float, float]:
    one = Requests(np.zeros(1), np.array([prompt_tokens]), np.array([OUTPUT_TOKENS]))
    lines = simulate(deployment, one).timelines
    return float(lines.ttft_s[0]), float(lines.tpot_s[0])


def _deployment(system: System, profile: Profile, latency: FittedLatency) -> Deployment:
    settings = profile.settings
    engine_settings = system.settings["engine"]
    worker = WorkerSpec(
        Role.COLOCATED if system.kind == "colocated" else Role.PREFILL,
        latency,
        settings["total_blocks"],
        block_tokens=settings["block_tokens"],
        max_sequences=engine_settings["max_num_seqs"],
        max_batched_tokens=engine_settings["max_num_batched_tokens"],
        max_model_len=settings["max_model_len"],
        prefix_caching=False,
    )
    other = worker if system.kind == "colocated" else replace(worker, role=Role.DECODE)
    link = Link(LINK_BYTES_PER_S)
    return Deployment((worker, other), settings["kv_bytes_per_token"], settings["layers"], link, link)


def _later(lines: Timelines, overhead_s: float) -> Timelines:
    """Without the warm-up's requests."""
    rows = slice(WARM_UP_REQUESTS, None)
    assert lines.prompt_tokens is not None
    return Timelines(
        lines.arrival[rows],
        lines.first_token[rows] + overhead_s,
        lines.last_token[rows] + overhead_s,
        lines.output_tokens[rows],
        lines.prompt_tokens[rows],
    )


def _row(said: Answer, seen: Answer) -> Row:
    expected, found = said.over_colocated["push"], seen.over_colocated["push"]
    tie = found.low <= 1.0 <= found.high
    return Row(
        str(said.cell),
        said.best["colocated"].goodput.rps,
        seen.best["colocated"].goodput.rps,
        said.best["colocated"].chunk,
        seen.best["colocated"].chunk,
        said.best["push"].goodput.rps,
        seen.best["push"].goodput.rps,
        expected.value,
        found.value,
        found.low,
        found.high,
        None if found.leaves_open else tie or (expected.value > 1.0) == (found.value > 1.0),
    )


def _table(name: str, profile: Profile, found: Sequence[Row]) -> Iterable[str]:
    errors = ", ".join(f"{kind} {held.mean:.1%}" for kind, held in profile.latency().held_out)
    yield f"{name}; held-out error of the profile: {errors}"
    yield "                      colocated, req/s          push, req/s    push / colocated"
    yield "cell                  said  chunk  seen  chunk  said  seen     said  seen (95%)           the same choice"
    for number, row in enumerate(found):
        if number % len(TTFT_TIMES) == 0 and number:
            yield ""
        yield (
            f"{row.cell:20} {row.colocated_said:6.2f} {row.chunk_said:5} {row.colocated_seen:6.2f} {row.chunk_seen:5}"
            f"  {row.push_said:5.2f} {row.push_seen:5.2f}    {row.ratio_said:5.2f}  {row.ratio_seen:5.2f} "
            f"({row.ratio_low:.2f}-{row.ratio_high:.2f})".ljust(20)
            + f"  {_CHOICES[row.agrees]}"
        )
    told = [row for row in found if row.agrees is not None]
    agreeing = sum(row.agrees is True for row in told)
    yield f"the same choice in {agreeing} of {len(told)} cells; open: {len(found) - len(told)}"


if __name__ == "__main__":
    main()
