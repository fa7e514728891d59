"""Which rates are still worth measuring: for each SLO the two steps that goodput lies between, and no more.

The timelines of one point judge every cell, so a rate that one cell asks for serves the others too. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.goodput.cases import ATTAINMENT, Cell, step_of
from splitserve.bench import search
from splitserve.bench.goodput import Judged

STRIDE = 4  # steps, while no rate is known on one side


@dataclass(frozen=True, slots=True)
class Bracket:
    """Steps that goodput lies between: the highest known to meet the objectives, and the lowest known to miss them."""

    met: int | None
    missed: int | None

    @property
    def closed(self) -> bool:
        return self.met is not None and self.missed is not None and self.missed - self.met <= 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """Steps beyond which nothing is measured."""

    lowest: int
    highest: int


def bracket(judged: Sequence[Judged]) -> Bracket:
    """Of one system under one cell."""
    found = search.bracket(judged, ATTAINMENT)
    return Bracket(*(None if rate is None else step_of(rate) for rate in (found.met_rps, found.missed_rps)))


def next_step(found: Bracket, bounds: Bounds, start: int) -> int | None:
    """The rate to measure next for one cell; None once it is known, or beyond the bounds."""
    if found.closed:
        return None
    if found.met is None and found.missed is None:
        return start
    if found.met is None:
        assert found.missed is not None
        return _within(max(found.missed - STRIDE, bounds.lowest), found.missed)
    if found.missed is None:
        return _within(min(found.met + STRIDE, bounds.highest), found.met)
    return (found.met + found.missed) // 2


def wanted(brackets: Mapping[Cell, Bracket], best: Mapping[Cell, int], bounds: Bounds, start: int) -> list[int]:
    """Steps to measure of one system, the one that most cells ask for first. `best`: of each cell, the step that a
    rival which counts as the same system meets; if this one misses the next, it is not the best there."""
    asked: dict[int, int] = {}
    for cell, found in brackets.items():
        rival = best.get(cell)
        step = next_step(found, bounds, start) if rival is None else _against_rival(found, rival, bounds)
        if step is not None:
            asked[step] = asked.get(step, 0) + 1
    return sorted(asked, key=lambda step: (-asked[step], step))


def _against_rival(found: Bracket, best: int, bounds: Bounds) -> int | None:
    if found.met is not None and found.met > best:
        return next_step(found, bounds, best + 1)
    if found.missed is not None and found.missed <= best + 1:
        return None
    return best + 1 if best < bounds.highest else None


def _within(step: int, already: int) -> int | None:
    return None if step == already else step
