"""What the load generator can do on one core: tokens received per core, and how late it sends, at several rates.

    python -m benchmarks.generator [--kind grpc|http] [--seconds 20] [--json] [--profile grpc.prof]

The generator is a process on one core, as `splitserve bench` runs it, with uvloop; a fake router that costs as little
as possible is another, on another core. Each request has `--output` tokens, which come one at a time in steps of 10 ms,
as from engines; the rate of requests makes the rate of tokens. Lateness is that of sending, against the schedule; lag
is how late the event loop is at 99% of all moments.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.generator.sending import Asked, Seen
from benchmarks.router.processes import child, line

TOKENS_PER_S = (1_000, 5_000, 10_000, 20_000, 40_000)
STEP_S = 0.01
_WITHIN_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("grpc", "http"), action="append", help="more than once; default: both")
    parser.add_argument("--tokens", type=int, action="append", help="a second; more than once for several rates")
    parser.add_argument("--seconds", type=float, default=20.0, help="at each rate")
    parser.add_argument("--prompt", type=int, default=500, help="tokens of each request")
    parser.add_argument("--output", type=int, default=100, help="tokens of each request")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--profile", default="", help="write cProfile's figures of the last rate there; no table")
    args = parser.parse_args()
    kinds, rates = args.kind or ("grpc", "http"), args.tokens or TOKENS_PER_S
    asked = [
        Asked(kind, "", tokens / args.output, args.seconds, args.prompt, args.output, args.profile)
        for kind in kinds
        for tokens in (rates[-1:] if args.profile else rates)
    ]
    before = os.getloadavg()[0]
    rows = asyncio.run(_measure(asked))
    if args.json:
        print(json.dumps({"load_before": before, "rows": [{**asdict(a), **asdict(s)} for a, s in rows]}))
    elif not args.profile:
        print(_table(rows), f"\nload of the machine before: {before:.2f}")


async def _measure(asked: Sequence[Asked]) -> list[tuple[Asked, Seen]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="splitserve-generator-") as scratch:
        for each in asked:
            said = await _one(each, Path(scratch) / "log")
            if said is not None:
                rows.append((each, said))
                print(_row(each, said), file=sys.stderr, flush=True)
    return rows


async def _one(asked: Asked, log: Path) -> Seen | None:
    cores = sorted(os.sched_getaffinity(0))
    async with _fake(asked.kind, cores[-1], log) as port:
        said = {**asdict(asked), "address": f"127.0.0.1:{port}", "parent": os.getpid()}
        command = _pinned(cores[0], "benchmarks.generator.sending", said)
        async with child(command, log) as process:
            if asked.profile:
                await asyncio.wait_for(process.wait(), _WITHIN_S + asked.seconds)
                return None
            return Seen(**json.loads(await line(process, log, _WITHIN_S + asked.seconds)))


@asynccontextmanager
async def _fake(kind: str, core: int, log: Path) -> AsyncIterator[int]:
    said: dict[str, object] = {"step_s": STEP_S, "parent": os.getpid()}
    module = "benchmarks.generator.fake"
    if kind == "http":
        module, said = "benchmarks.router.fake", {**said, "prefill_s": 0.0, "colocated": True}
    async with child(_pinned(core, module, said), log) as process:
        yield int(json.loads(await line(process, log, _WITHIN_S))["port"])


def _pinned(core: int, module: str, said: dict[str, object]) -> tuple[str, ...]:
    return ("taskset", "--cpu-list", str(core), sys.executable, "-m", module, json.dumps(said))


def _table(rows: Sequence[tuple[Asked, Seen]]) -> str:
    head = "kind   tokens/s  core   tokens/s   late, ms              lag, ms  failed  valid"
    units = "       received  used   per core   p50    p99    max     p99"
    return "\n".join([head, units, *(_row(asked, seen) for asked, seen in rows)])


def _row(asked: Asked, seen: Seen) -> str:
    late = " ".join(f"{1e3 * value:6.2f}" for value in (seen.late_p50_s, seen.late_p99_s, seen.late_max_s))
    return (
        f"{asked.kind:6} {seen.tokens_per_s:8,.0f} {seen.cpu_share:5.0%} {seen.tokens_per_core:10,.0f} {late} "
        f"{1e3 * seen.lag_p99_s:8.2f} {seen.failed:7} {seen.overload or 'yes'}"
    )


if __name__ == "__main__":
    main()
