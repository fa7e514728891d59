"""Runs the phases: starts every system once for each, loads them in turn, and asks the kernel what each router used."""

import json
import os
import statistics
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.progress import Progress

from benchmarks.router.fake import Pace
from benchmarks.router.figures import Memory, Phase, Record, Sample, turns
from benchmarks.router.load import LIMIT_S, Load, Seen
from benchmarks.router.processes import child, cpu_s, line, rss_mib
from benchmarks.router.systems import Fleet, System, Up, fake

PACED_STEP_S = 0.01
PREFILL_S = 0.02  # where the first token is timed
HELD_STEP_S = 1.0
WARM_REQUESTS = 2  # for every stream


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked of every system in a round: `burst` and `paced` requests for every stream."""

    rounds: int = 3
    streams: int = 64
    burst: int = 20
    paced: int = 8
    first_tokens: int = 100
    held: int = 2000
    prompt_tokens: int = 100
    output_tokens: int = 100
    burst_step_s: float = 0.001  # faster than any engine: routers are busy all the time


@dataclass(frozen=True, slots=True)
class Plan:
    """One phase: the workers' pace and what each system is asked. `simulated`: ours are no fakes."""

    phase: Phase
    pace: Pace
    simulated: bool
    streams: int
    requests: int
    output_tokens: int
    rounds: int


def plans(size: Size) -> dict[Phase, Plan]:
    """In a burst and where paced, reading a prompt takes the workers no time: what the router costs is asked."""
    many, rounds, tokens = size.streams, size.rounds, size.output_tokens
    paced = Pace(0, PACED_STEP_S)
    return {
        plan.phase: plan
        for plan in (
            Plan(Phase.BURST, Pace(0, size.burst_step_s), False, many, many * size.burst, tokens, rounds),
            Plan(Phase.PACED, paced, True, many, many * size.paced, tokens, rounds),
            Plan(Phase.FIRST_TOKEN, Pace(PREFILL_S, 0), False, 1, size.first_tokens, 2, rounds),
            Plan(Phase.HELD, Pace(0, HELD_STEP_S), True, size.held, size.held, 10 * tokens, 1),
        )
    }


async def measure(
    systems: Sequence[System], size: Size, phases: Sequence[Phase], directory: Path, show: Progress
) -> Mapping[str, Record]:
    """Raises processes.Failed, StartFailed."""
    records = {system.name: Record(system.ours) for system in systems}
    for phase in phases:
        plan = plans(size)[phase]
        own = directory / phase.value.replace(" ", "-")
        task = show.add_task(f"{phase}: starting", total=len(systems) * plan.rounds)
        async with AsyncExitStack() as stack:
            ups = {}
            for system in systems:
                ups[system.name] = await stack.enter_async_context(up(system, plan, size, own))
            bench = _Bench(plan, size, own, ups, {system.name: system for system in systems}, records)
            for name in turns([system.name for system in systems], plan.rounds):
                show.update(task, description=f"{phase}: {name}")
                await bench.run(name)
                show.advance(task)
        show.update(task, description=f"{phase}: done")
    return records


@asynccontextmanager
async def up(system: System, plan: Plan, size: Size, directory: Path) -> AsyncIterator[Up]:
    own = directory / system.name.replace(" ", "-")
    own.mkdir(parents=True)
    async with system.up(fleet_of(plan, size), own) as started:
        yield started


def fleet_of(plan: Plan, size: Size) -> Fleet:
    return Fleet(plan.pace, plan.simulated, plan.streams, size.prompt_tokens, plan.output_tokens)


@dataclass(slots=True)
class _Bench:
    plan: Plan
    size: Size
    directory: Path
    ups: Mapping[str, Up]
    systems: Mapping[str, System]
    records: Mapping[str, Record]

    async def run(self, name: str) -> None:
        system, up, record = self.systems[name], self.ups[name], self.records[name]
        asked = load_of(self.plan, self.size, system, up.address)
        if self.plan.phase is Phase.HELD:
            record.memory = await held(asked, up, self.directory)
            return
        if self.plan.phase is Phase.FIRST_TOKEN:
            record.straight_s.append(await self._straight_s(asked))
        record.add(self.plan.phase, await loaded(asked, up, self.directory))

    async def _straight_s(self, asked: Load) -> float:
        """TTFT of a fake worker that reads the prompt itself, without a router."""
        async with fake(self.plan.pace, self.directory / "colocated.log", colocated=True) as address:
            straight = replace(asked, kind="http", address=address)
            return (await loaded(straight, Up(address, ()), self.directory)).ttft_s


def load_of(plan: Plan, size: Size, system: System, address: str) -> Load:
    return Load(
        kind=system.kind,
        address=address,
        concurrent=plan.streams,
        warm_requests=plan.streams * WARM_REQUESTS,
        requests=plan.requests,
        prompt_tokens=size.prompt_tokens,
        output_tokens=plan.output_tokens,
        text_prompt=system.text_prompt,
        hold=plan.phase is Phase.HELD,
    )


async def loaded(asked: Load, up: Up, directory: Path, counts: Callable[[bool], None] = lambda _: None) -> Sample:
    """One run; what comes before the warm requests are over does not count. `counts` is told when it begins to, and
    when no more. Raises Failed."""
    log = directory / "load.log"
    async with client(asked, log) as process:
        await _expect("warm", process, log)
        counts(True)
        before_s = _cpu_s(up)
        seen = Seen(**json.loads(await _go(process, log)))
        used_s = _cpu_s(up) - before_s
        counts(False)
    return Sample(
        seen.requests,
        seen.tokens,
        seen.messages,
        seen.wall_s,
        used_s,
        seen.client_cpu_s,
        statistics.median(seen.ttft_s),
    )


async def held(asked: Load, up: Up, directory: Path) -> Memory:
    """All streams open, each with its first token and more to come. Raises Failed."""
    log = directory / "load.log"
    idle_mib = sum(map(rss_mib, up.pids))
    async with client(asked, log) as process:
        await _expect("held", process, log)
        return Memory(idle_mib, sum(map(rss_mib, up.pids)), asked.concurrent)


@asynccontextmanager
async def client(asked: Load, log: Path) -> AsyncIterator[Process]:
    said = json.dumps({**asdict(asked), "parent": os.getpid()})
    async with child([sys.executable, "-m", "benchmarks.router.load", said], log) as process:
        yield process


async def _expect(word: str, process: Process, log: Path) -> None:
    said = await line(process, log, LIMIT_S)
    assert said.strip() == word, said


async def _go(process: Process, log: Path) -> str:
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    return await line(process, log, LIMIT_S)


def _cpu_s(up: Up) -> float:
    return sum(map(cpu_s, up.pids))
