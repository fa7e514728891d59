"""Measures the points of one shape that are still missing: round after round, the systems taking turns.

A point is a run of so many requests at one rate. Before and after it a few requests alone say how fast the machine is:
a run on a machine that is slower or faster than when the unit was taken is sent, and judged, as if its clock went so
much slower; one in which the speed itself changed by more than a tenth, or the generator was late, is taken once more.
A system that is told objectives has a class of requests for each speed of the machine.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from benchmarks.goodput import alone as one_alone
from benchmarks.goodput.alone import Alone
from benchmarks.goodput.cases import CELLS, WARM_UP_REQUESTS, Cell, Shape, rate_rps, step_of
from benchmarks.goodput.points import Measured, Points
from benchmarks.goodput.rates import Bounds, Bracket, bracket, wanted
from benchmarks.goodput.served import Served
from benchmarks.goodput.systems import SYSTEMS, System, unit_of
from splitserve.bench import open_loop
from splitserve.bench.goodput import Judged, judged
from splitserve.bench.run import Ending
from splitserve.core.slo import Slo

POINTS_A_VISIT = 3
GRACE_S = 30.0  # after the last arrival; what has not ended by then met no objective
TRIES = 2  # of a point that is in doubt
SPAN = 14  # steps that rates may lie above or below the start: a factor of 3.8

Serve = Callable[[System, Mapping[str, Slo]], AbstractAsyncContextManager[Served]]  # what it is told, by class
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """`requests` of each point, without the warm-up; `until` on time.monotonic: no point is begun after it."""

    requests: int
    until: float
    seeds: int = 3  # at the rates around goodput, and at fixed rates; elsewhere one
    steps: Sequence[int] | None = None  # fixed rates in place of a search
    confirm: bool = False  # no new rates: only further seeds at those that the goodputs found so far lie between
    cells: Collection[Cell] = CELLS  # whose goodputs are looked for


class Campaign:
    """`run` until nothing is missing or time is up; whoever calls it again goes on where it stopped."""

    def __init__(
        self, shape: Shape, systems: Sequence[System], points: Points, serve: Serve, limits: Limits, say: Say
    ) -> None:
        self._shape, self._systems, self._points = shape, systems, points
        self._serve, self._limits, self._say = serve, limits, say
        self.alone, self.measured = points.read()
        start = step_of(shape.start_rps)
        self._start, self._bounds = start, Bounds(start - SPAN, start + SPAN)

    async def run(self) -> bool:
        """Whether all that was wanted is measured."""
        await self._measure_alone()
        if any(system.alone_as not in self.alone for system in self._systems):
            return False
        for number in range(1000):
            turn = in_turn(self._systems if number % 2 == 0 else tuple(reversed(self._systems)))
            missing = [(system, self._missing(system)) for system in turn]
            if not any(steps for _, steps in missing):
                return True
            for system, _ in missing:
                if not await self._visit(system):
                    return False
        raise RuntimeError(f"{self._shape.name}: no end of rates to measure")

    async def _measure_alone(self) -> None:
        """Each system's own, one after the other, before anything else: later they tell the machine's speed."""
        for number, system in enumerate(self._systems):
            if system.alone_as in self.alone or self._late():
                continue
            async with self._serve(system, {}) as served:
                await self._warm_up(served)
                found = await one_alone.measured(served, self._shape.mean_prompt_tokens, 1000 * number)
            self._points.add_alone(system.alone_as, found)
            self.alone[system.alone_as] = found
            ttft_s = found.ttft_of(self._shape.mean_prompt_tokens)
            self._say(f"{system.alone_as} alone: TTFT {ttft_s:.3f} s, TPOT {found.tpot_s * 1000:.1f} ms")

    async def _visit(self, system: System) -> bool:
        """Starts the system if it has points missing, and takes some. False once time is up."""
        steps = self._missing(system)[:POINTS_A_VISIT]
        if not steps:
            return True
        if self._late():
            return False
        async with self._serve(system, self._told(system)) as served:
            await self._warm_up(served)
            for step, seed in steps:
                if self._late():
                    return False
                await self._point(system, served, step, seed)
        return True

    def _told(self, system: System) -> dict[str, Slo]:
        """By class, one for each speed of the machine: multiples of what a request alone gets then."""
        if system.told is None:
            return {}
        unit = unit_of(self.alone)
        return {_class_of(factor): system.told.slo(unit.times(factor)) for factor in one_alone.SPEEDS}

    def _missing(self, system: System) -> list[tuple[int, int]]:
        """Steps and seeds, the most wanted first."""
        done = {(point.step, point.seed) for point in self.measured if point.system == system.name}
        if self._limits.steps is not None:
            of_each = ((step, seed) for seed in range(self._limits.seeds) for step in self._limits.steps)
            return [each for each in of_each if each not in done]
        if self._limits.confirm:
            return self._more_seeds(system, done)
        steps = wanted(self._brackets(system), self._best_of_rivals(system), self._bounds, self._start_of(system))
        found = [(step, 0) for step in steps if (step, 0) not in done]
        return found or self._more_seeds(system, done)

    def _start_of(self, system: System) -> int:
        """Of a system for one cell: where the best of the others is."""
        if system.told is None:
            return self._start
        unit = unit_of(self.alone)
        measured = {point.system for point in self.measured if system.told in SYSTEMS[point.system].cells}
        met = [bracket(self.judged(name, system.told, unit)).met for name in measured]
        return max((step for step in met if step is not None), default=self._start)

    def _more_seeds(self, system: System, done: set[tuple[int, int]]) -> list[tuple[int, int]]:
        """At the rates that a cell's goodput lies between, where the system counts."""
        rivals = self._best_of_rivals(system)
        steps: set[int] = set()
        for cell, found in self._brackets(system).items():
            if found.met is not None and found.met >= rivals.get(cell, found.met):
                steps.update(step for step in (found.met, found.missed) if step is not None)
        return [
            (step, seed) for seed in range(1, self._limits.seeds) for step in sorted(steps) if (step, seed) not in done
        ]

    def _brackets(self, system: System) -> dict[Cell, Bracket]:
        unit = unit_of(self.alone)
        wanted_cells = (cell for cell in system.cells if cell in self._limits.cells)
        return {cell: bracket(self.judged(system.name, cell, unit)) for cell in wanted_cells}

    def _best_of_rivals(self, system: System) -> Mapping[Cell, int]:
        """Of each cell, the highest step that another system of the same kind meets."""
        best: dict[Cell, int] = {}
        for other in self._systems:
            if other.kind == system.kind and other is not system:
                for cell, found in self._brackets(other).items():
                    if found.met is not None:
                        best[cell] = max(best.get(cell, found.met), found.met)
        return best

    def judged(self, system: str, cell: Cell, unit: Alone) -> tuple[Judged, ...]:
        mine = (point for point in self.measured if point.system == system)
        return judged((point.point(rate_rps(point.step)) for point in mine), cell.slo(unit))

    async def _warm_up(self, served: Served) -> None:
        await one_alone.speed(served, self._shape.mean_prompt_tokens, 999, Alone(1.0, 0.0, 1.0))

    async def _point(self, system: System, served: Served, step: int, seed: int) -> None:
        for attempt in range(1, TRIES + 1):
            found = await self._taken(system, served, step, seed)
            if not found.doubt or attempt == TRIES:
                break
            self._say(f"  {found.doubt}: once more")
        self._points.add(found)
        self.measured.append(found)
        self._say(self._line(found))

    async def _taken(self, system: System, served: Served, step: int, seed: int) -> Measured:
        prompt_tokens, own = self._shape.mean_prompt_tokens, self._own(system)
        before = await one_alone.speed(served, prompt_tokens, 10_000 + step, own)
        factor = one_alone.factor_of(before)
        requests = self._shape.requests(rate_rps(step) / factor, self._limits.requests, seed)
        limits = open_loop.Limits(deadline_s=float(requests.arrival_s[-1]) + GRACE_S)
        spent, began = served.cpu_s(), time.monotonic()
        send = served.send(requests, seed, _class_of(factor) if system.told is not None else "")
        run = await open_loop.run(requests, send, limits)
        wall_s = time.monotonic() - began
        used = {name: round(now - spent[name], 2) for name, now in served.cpu_s().items()}
        await served.quiet()
        after = await one_alone.speed(served, prompt_tokens, 20_000 + step, own)
        judged_run = run.only(np.arange(WARM_UP_REQUESTS, len(run)))
        return Measured(
            system=system.name,
            step=step,
            seed=seed,
            timelines=one_alone.as_if(judged_run.timelines, factor),
            slower=round(factor, 3),
            slower_after=round(after / before * factor, 3),
            wall_s=round(wall_s, 2),
            cpu_s=used,
            late_p99_s=round(run.late_p99_s, 4),
            failed=run.count(Ending.FAILED),
            taken=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _own(self, system: System) -> Alone:
        """What a request alone got, at the one machine speed that all points are compared at."""
        own = self.alone[system.alone_as]
        return own.at_speed_of(unit_of(self.alone)) if system.idles else own

    def _late(self) -> bool:
        return time.monotonic() > self._limits.until

    def _line(self, found: Measured) -> str:
        unit = unit_of(self.alone)
        slos = (next(iter(self._systems[0].cells)), *self._systems[0].cells[4:9:4])
        shares = ", ".join(f"{cell}: {found.timelines.met(cell.slo(unit)).mean():.0%}" for cell in slos)
        slower = f"; machine {found.slower:.2f} times as slow" if found.slower != 1.0 else ""
        return f"{found.system} at {rate_rps(found.step):.2f}/s (seed {found.seed}): {shares}{slower}"


def _class_of(factor: float) -> str:
    """Of requests on a machine that many times as slow."""
    return f"slower-{factor:g}"


def in_turn(systems: Sequence[System]) -> list[System]:
    """Kinds alternate: a kind of one system has its turn after every two of a kind of many, of which each needs less
    to be ruled out than the one does to be known."""
    many = [system for system in systems if system.chunk]
    few = [system for system in systems if not system.chunk]
    turn = list(few) if not many else []
    for number, system in enumerate(many):
        turn += few if number % 2 == 0 else []
        turn.append(system)
    return turn
