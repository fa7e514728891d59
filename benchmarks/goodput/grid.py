"""From points to the answer: each system's goodput in each cell of the grid, and the ratios, with intervals. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.goodput.alone import Alone
from benchmarks.goodput.cases import ATTAINMENT, Cell, rate_rps
from benchmarks.goodput.points import Measured
from benchmarks.goodput.systems import KINDS, SYSTEMS
from splitserve.bench.goodput import Goodput, Judged, Ratio, goodput_of, judged, ratio_of


@dataclass(frozen=True, slots=True)
class Best:
    """A kind's best system in a cell: a colocated one has a `chunk`, others 0."""

    system: str
    chunk: int
    goodput: Goodput


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one cell. `over_colocated` is each kind's ratio over the best colocated system; `over_static` that of the
    adaptive one over the better of colocated and push. A kind without points is missing."""

    cell: Cell
    best: Mapping[str, Best]
    over_colocated: Mapping[str, Ratio]
    over_static: Ratio | None


def answers(points: Sequence[Measured], unit: Alone, cells: Sequence[Cell]) -> tuple[Answer, ...]:
    by_system: dict[str, list[Measured]] = {}
    for point in points:
        by_system.setdefault(point.system, []).append(point)
    return tuple(_answer(by_system, unit, cell) for cell in cells)


def _answer(by_system: Mapping[str, Sequence[Measured]], unit: Alone, cell: Cell) -> Answer:
    columns = {name: _judged(mine, unit, cell) for name, mine in by_system.items() if cell in SYSTEMS[name].cells}
    best = {kind: found for kind in KINDS if (found := _best(columns, kind)) is not None}
    rivals = {kind: columns[found.system] for kind, found in best.items()}
    base = rivals.get("colocated")
    over = {kind: _ratio(mine, base) for kind, mine in rivals.items() if base is not None and kind != "colocated"}
    static = [kind for kind in ("colocated", "push") if kind in best]
    better = max(static, key=lambda kind: best[kind].goodput.rps, default=None)
    adaptive = rivals.get("adaptive")
    return Answer(cell, best, over, _ratio(adaptive, rivals[better]) if adaptive and better else None)


def _judged(points: Sequence[Measured], unit: Alone, cell: Cell) -> tuple[Judged, ...]:
    return judged((point.point(rate_rps(point.step)) for point in points), cell.slo(unit))


def _best(columns: Mapping[str, tuple[Judged, ...]], kind: str) -> Best | None:
    """By goodput; where none of the rates was met, the lowest rate measured says the least of it."""
    of_kind = [
        Best(name, SYSTEMS[name].chunk, goodput_of(mine, ATTAINMENT))
        for name, mine in columns.items()
        if SYSTEMS[name].kind == kind
    ]
    return max(of_kind, key=lambda one: (not one.goodput.at_most, one.goodput.rps), default=None)


def _ratio(over: tuple[Judged, ...], under: tuple[Judged, ...]) -> Ratio:
    """Of the seeds that both were measured with: other requests may be harder."""
    both = {point.seed for point in over} & {point.seed for point in under}
    mine, others = ([point for point in points if point.seed in both] for points in (over, under))
    return ratio_of(mine, others, ATTAINMENT)
