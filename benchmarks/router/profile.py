"""Our router alone under cProfile, paced and in a burst: its hottest functions, for one of its rows.

cProfile makes Python functions look dearer beside C code than they are; the order is what it tells.
"""

import asyncio
import os
import pstats
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from benchmarks.router.figures import Phase
from benchmarks.router.load import Load
from benchmarks.router.measure import Plan, Size, fleet_of, load_of, loaded, plans
from benchmarks.router.processes import cpu_s_by_thread
from benchmarks.router.systems import SPLITSERVE, Fleet, System, Up, cluster, ours_http, systems

SHOWN = 30
_WRITTEN_WITHIN_S = 10.0
_PROGRAM = (sys.executable, "-m", "benchmarks.router.profiled")


def profile(size: Size, name: str) -> None:
    """`name` is a row's. Prints the CPU of its threads without the profiler, then the functions with most time of their
    own, and with most time below them."""
    for phase in (Phase.PACED, Phase.BURST):
        with tempfile.TemporaryDirectory(prefix="splitserve-") as directory:
            file = Path(directory, "router.prof")
            os.environ["SPLITSERVE_PROFILE"] = str(file)
            asyncio.run(_threads(phase, size, name, Path(directory)))
            asyncio.run(_profile(phase, size, name, Path(directory)))
            for order in ("tottime", "cumulative"):
                print(f"{phase}, by {order}:")
                pstats.Stats(str(file)).strip_dirs().sort_stats(order).print_stats(SHOWN)


async def _threads(phase: Phase, size: Size, name: str, directory: Path) -> None:
    plan = plans(size)[phase]
    async with _router(name, fleet_of(plan, size), directory) as up:
        (router,) = up.pids
        seen: list[dict[str, float]] = []
        sample = await loaded(
            _load(plan, size, name, up), up, directory, lambda _: seen.append(cpu_s_by_thread(router))
        )
        before, after = seen
        print(f"{phase}: {sample.tokens_per_core:,.0f} tokens/s per core; CPU of threads, µs a token:")
        for name in sorted(after):
            print(f"  {name:20} {1e6 * (after[name] - before.get(name, 0.0)) / sample.tokens:6.1f}")


async def _profile(phase: Phase, size: Size, name: str, directory: Path) -> None:
    plan = plans(size)[phase]
    async with _router(name, fleet_of(plan, size), directory, _PROGRAM) as up:
        (router,) = up.pids

        def counts(begins: bool) -> None:
            os.kill(router, signal.SIGUSR1 if begins else signal.SIGUSR2)

        sample = await loaded(_load(plan, size, name, up), up, directory, counts)
        print(f"{phase}: {sample.tokens_per_core:,.0f} tokens/s per core under the profiler")
        deadline = time.monotonic() + _WRITTEN_WITHIN_S
        while not _written(directory / "router.prof") and time.monotonic() < deadline:  # noqa: ASYNC110 - no event tells of another process's state
            await asyncio.sleep(0.1)


def _router(
    name: str, fleet: Fleet, directory: Path, program: Sequence[str] = SPLITSERVE
) -> AbstractAsyncContextManager[Up]:
    return (ours_http if _row(name).up is ours_http else cluster)(fleet, directory, program=program)


def _load(plan: Plan, size: Size, name: str, up: Up) -> Load:
    return load_of(plan, size, _row(name), up.address)


def _row(name: str) -> System:
    return next(row for row in systems(()) if row.name == name)


def _written(file: Path) -> bool:
    """Whether it is there, and whole."""
    try:
        pstats.Stats(str(file))
    except (OSError, EOFError, ValueError, TypeError):
        return False
    return True
