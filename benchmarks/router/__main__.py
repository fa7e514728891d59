"""Compares routers for prefill and decode apart: ours, `vllm-router` and `smg` (both in Rust, from PyPI).

    python -m benchmarks.router [--quick] [--without-peers] > benchmarks/results/router.txt
    python -m benchmarks.router --profile

One machine, one load client. Peers stand before fake vLLM workers over HTTP; ours before real workers with simulated
engines that take the same time, or before fakes as cheap as theirs. Each has one prefill and one decode worker. Systems
take turns, and so many rounds are measured; what is asked before is not counted.

- burst: 64 requests at a time of 100 prompt and 100 output tokens. A decode step makes a token for every stream and
  takes 1 ms, or as long as the router needs to take it: more tokens than most routers pass on with one core. All
  workers are fakes, since one core of a simulated engine makes fewer.
- paced: a decode step takes 10 ms; our workers are real. In both, prompts take no time to read.
- first token: one request at a time; a prompt takes 20 ms to read, a step nothing; all workers are fakes. "added" is
  over a fake HTTP worker that reads the prompt itself and is asked without a router, so it holds the second leg too.
- held: 2,000 open streams, a token a second each; our workers are real.

Fakes write each event by itself, one step for all streams after the other, as an engine does. Token ids are the prompt
wherever a router takes them (smg wants text: the same number of words). Streams of gRPC share a connection, of HTTP
each has one. Our HTTP endpoint is in the router's process, or a gateway's: then both count.
"""

import argparse
import asyncio
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.router.figures import Phase
from benchmarks.router.measure import Size, measure
from benchmarks.router.peers import PEERS, install
from benchmarks.router.processes import Failed
from benchmarks.router.report import Report, print_report
from benchmarks.router.systems import systems
from splitserve.cli.supervisor import StartFailed
from splitserve.core.errors import SplitserveError

QUICK = Size(rounds=2, burst=6, paced=3, first_tokens=40)


def main() -> None:
    arguments = _arguments()
    errors = Console(stderr=True)
    if arguments.profile:
        from benchmarks.router.profile import profile

        profile(arguments.size, (arguments.systems or ["splitserve gRPC"])[0])
        return
    peers = () if arguments.without_peers else PEERS
    if peers:
        install(errors)
    compared = [system for system in systems(peers) if not arguments.systems or system.name in arguments.systems]
    with tempfile.TemporaryDirectory(prefix="splitserve-") as directory, _progress(errors) as show:
        try:
            records = asyncio.run(measure(compared, arguments.size, arguments.phases, Path(directory), show))
        except (Failed, StartFailed, SplitserveError) as error:
            raise SystemExit(str(error)) from error
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    size = arguments.size
    setting = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "burst": f"a step takes {1000 * size.burst_step_s:g} ms at least",
        "load": f"{size.streams} at a time, {size.prompt_tokens} prompt and {size.output_tokens} output tokens, "
        f"{size.rounds} rounds of {size.streams * size.burst} (burst) and {size.streams * size.paced} (paced) requests",
    }
    print_report(Report(setting, records), Console())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.router",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two short rounds, about 2 minutes")
    parser.add_argument("--without-peers", action="store_true", help="our rows only; nothing is installed")
    parser.add_argument("--profile", action="store_true", help="our router alone under cProfile: its hottest functions")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="these rows only, such as 'splitserve gRPC'")
    parser.add_argument("--phases", nargs="+", choices=list(Phase), default=list(Phase), type=Phase, metavar="PHASE")
    for name, what in (
        ("rounds", "of every system in every phase"),
        ("streams", "requests at a time"),
        ("burst", "requests for every stream in a burst round"),
        ("paced", "requests for every stream in a paced round"),
        ("held", "streams held open"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what}; default {getattr(Size(), name)}")
    parser.add_argument("--burst-step-ms", type=float, metavar="MS", help="0: as fast as sockets take it; default 1")
    parsed = parser.parse_args()
    said = {
        name: getattr(parsed, name)
        for name in ("rounds", "streams", "burst", "paced", "held")
        if getattr(parsed, name) is not None
    }
    if any(count < 1 for count in said.values()):
        parser.error("counts must be at least 1")
    parsed.size = replace(QUICK if parsed.quick else Size(), **said)
    if parsed.burst_step_ms is not None:
        parsed.size = replace(parsed.size, burst_step_s=parsed.burst_step_ms / 1000)
    return parsed


def _progress(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


if __name__ == "__main__":
    main()
