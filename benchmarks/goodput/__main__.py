"""Goodput of colocated and of separated prefill and decode on the same two cores, over a grid of SLOs.

    python -m benchmarks.goodput --smoke            # 4 minutes: does it work, and is it in the right range
    python -m benchmarks.goodput                    # hours: all shapes; stops and goes on as you like
    python -m benchmarks.goodput --shape balanced --minutes 60
    python -m benchmarks.goodput --report           # the tables again, from the points that are there

Systems: two colocated engines with chunked prefill (each of six chunks; the best of each SLO counts), one prefill and
one decode worker with KV pushed layer by layer, the same with vLLM's stock pull. All serve the same requests, the same
router in front of them. Every finished point is kept in --out, and a later run goes on from there.
"""

import argparse
import asyncio
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

from benchmarks.goodput.campaign import Campaign, Limits
from benchmarks.goodput.cases import CELLS, SHAPES, TPOT_CELLS, Shape, step_of
from benchmarks.goodput.model import make_model
from benchmarks.goodput.points import Points
from benchmarks.goodput.report import points_of, written
from benchmarks.goodput.served import Served, serving
from benchmarks.goodput.systems import SYSTEMS, UNIT, USUAL, System, cluster
from splitserve.core.slo import Slo

NAMED_CELLS = {f"{cell.ttft_times}/{cell.tpot_times:g}": cell for cell in TPOT_CELLS}
OUT = Path(__file__).parents[1] / "results" / "goodput"
SMOKE_SYSTEMS, SMOKE_RATES_RPS, SMOKE_REQUESTS = ("push", UNIT, "pull"), (1.0, 3.0), 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeat for several; default: all")
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="repeat for several; default: for CPU cores")
    parser.add_argument(
        "--cell",
        choices=NAMED_CELLS,
        action="append",
        help="TTFT and TPOT objectives, times what a request alone gets; only these cells' goodputs are looked for; "
        "repeat for several; default: all",
    )
    parser.add_argument("--start", type=float, metavar="RPS", help="where to look for rates; default: for one CPU core")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--rate",
        type=float,
        metavar="RPS",
        action="append",
        help="no search: this rate, rounded to a step of 10%%, with each seed; repeat for several",
    )
    parser.add_argument("--requests", type=int, default=100, help="of each point and seed")
    parser.add_argument("--seeds", type=int, default=3, help="at the rates around a goodput, or at each --rate")
    rates.add_argument(
        "--confirm", action="store_true", help="no new rates: only further seeds around the goodputs found so far"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no point after so long")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="finished points, tables and figures; default: %(default)s"
    )
    parser.add_argument("--model", type=Path, help="Hugging Face directory; default: random weights, 11 M parameters")
    parser.add_argument("--machine", type=Path, help="YAML: where workers run and what they need there; see gpu/README")
    parser.add_argument(
        "--profile", type=Path, help="of the engine, as benchmarks.predicted keeps it in --out, for adaptive systems"
    )
    parser.add_argument("--engine", choices=("vllm", "sim"), default="vllm", help="sim: to try the benchmark itself")
    rates.add_argument("--smoke", action="store_true", help="few requests, three systems, two rates; keeps nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not all(0.0 < rps < math.inf for rps in (args.start, *(args.rate or ())) if rps is not None):
        parser.error("--start and --rate are requests per second, above 0")
    shapes = [SHAPES[name] for name in args.shape or (["balanced"] if args.smoke else SHAPES)]
    if args.start:
        shapes = [replace(shape, start_rps=args.start) for shape in shapes]
    with tempfile.TemporaryDirectory(prefix="splitserve-goodput-") as scratch:
        out = Path(scratch) / "points" if args.smoke else args.out
        if not args.report:
            asyncio.run(_measured(args, shapes, out, Path(scratch)))
        print(written(shapes, out))


async def _measured(args: argparse.Namespace, shapes: Sequence[Shape], out: Path, scratch: Path) -> None:
    model = args.model or make_model(scratch / "model")
    chosen = SMOKE_SYSTEMS if args.smoke else args.system or USUAL
    rates = SMOKE_RATES_RPS if args.smoke else args.rate
    limits = Limits(
        requests=SMOKE_REQUESTS if args.smoke else args.requests,
        until=time.monotonic() + args.minutes * 60.0,
        seeds=1 if args.smoke else args.seeds,
        confirm=args.confirm,
        cells=[NAMED_CELLS[name] for name in args.cell] if args.cell else CELLS,
        steps=[step_of(rate) for rate in rates] if rates else None,
    )
    starts = itertools.count()

    def serve(system: System, classes: Mapping[str, Slo]) -> AbstractAsyncContextManager[Served]:
        run = scratch / f"run-{next(starts)}"
        run.mkdir()
        profile = args.profile or out / "profile.json"
        return serving(model, cluster(system, args.engine, args.machine, classes, profile), run)

    for shape in shapes:
        _say(f"{shape.name}: {shape.workload}")
        points = points_of(out, shape)
        done = await Campaign(shape, _with_unit(chosen, points), points, serve, limits, _say).run()
        if not done:
            _say(f"{shape.name}: time is up; run the same command again to go on")


def _with_unit(names: Sequence[str], points: Points) -> tuple[System, ...]:
    """In the order that they take turns in; objectives are multiples of what one of them gives a request alone, which
    must be known."""
    alone, _ = points.read()
    return tuple(SYSTEMS[name] for name in dict.fromkeys((*names, *(() if UNIT in alone else (UNIT,)))))


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
