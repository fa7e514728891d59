"""Measures attainment at one rate after the other until goodput is known.

One coroutine's: `sweep` awaits one run at a time, and keeps each, whatever comes after. Which run is next is decided in
`search`; how one is made, and where it is saved, is the `measure` that the caller gives.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from splitserve.bench.goodput import Goodput, Judged, Point, goodput_of, judged
from splitserve.bench.run import Run
from splitserve.bench.search import Finished, Options, Wanted, bracket, next_run
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo

Measure = Callable[[float, int], Awaitable[Run]]
"""Sends the requests of a seed at a rate in requests per second, all of them, and gives back their whole run."""

Report = Callable[[str, float], None]
"""Told a sentence after each run, and the share of the work that is probably done."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One run, whole; what was due in its first `warm_up_s` seconds is not judged."""

    rate_rps: float
    seed: int
    run: Run
    warm_up_s: float = 0.0

    @property
    def judged(self) -> Run:
        """Raises ConfigError if the warm-up is all there is."""
        left = self.run.after(self.warm_up_s)
        if not len(left):
            raise ConfigError(
                "warm_up_s",
                f"no request of the run at {self.rate_rps:g} requests/s was due after {self.warm_up_s:g} s: send more "
                "requests, or warm up for less",
            )
        return left

    @property
    def point(self) -> Point:
        left = self.judged
        return Point(self.rate_rps, self.seed, left.timelines, len(self.run) - len(left))

    @property
    def valid(self) -> bool:
        """Whether these are the target's figures, and not the load generator's."""
        return not self.run.overloaded


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """Every run, in the order they were made. `goodput` is of the valid ones, None if there is none. `why` is a
    sentence where the sweep ended before goodput was enclosed, else empty."""

    slo: Slo
    measured: tuple[Measured, ...]
    goodput: Goodput | None
    why: str


async def sweep(
    measure: Measure,
    slo: Slo,
    options: Options | None = None,
    report: Report | None = None,
    known: Sequence[Measured] = (),
) -> Sweep:
    """Runs until goodput lies between two rates within `options.step` of each other, or all `options.rates_rps` are
    measured. Runs that are `known` are not made again, unless the load generator was overloaded in them. It stops early
    when it is, or no rate allowed meets the objectives, or every one does. Raises ConfigError if the warm-up leaves
    nothing or the runs can't tell an objective of `slo`, and what `measure` raises."""
    search = Search(measure, (slo,), options or Options(), known)
    while (wanted := search.wanted()) is not None:
        await search.take(wanted)
        if report is not None:
            report(search.said(), search.share)
    return search.result(slo)


def judged_by(slo: Slo, point: Point) -> Judged:
    """Raises ConfigError if its timelines can't tell an objective."""
    try:
        return judged((point,), slo)[0]
    except ValueError as error:
        raise ConfigError("slo", str(error)) from error


class Search:
    """One system's runs, and what is still missing under any of some SLOs."""

    def __init__(self, measure: Measure, slos: Sequence[Slo], options: Options, known: Sequence[Measured] = ()) -> None:
        self._measure, self._slos, self._options = measure, tuple(slos), options
        self.measured: list[Measured] = []
        self._judged: dict[Slo, list[Judged]] = {slo: [] for slo in self._slos}
        self._left, self._made, self._overloaded = 0, 0, ""
        for one in known:
            if one.valid:
                self._keep(one)

    @property
    def points(self) -> tuple[Point, ...]:
        """Of the valid runs."""
        return tuple(one.point for one in self.measured if one.valid)

    @property
    def share(self) -> float:
        """Of the runs that will probably be made; what was known from before is not counted."""
        next_ = self.wanted()
        left = 0 if next_ is None else next_.left
        return self._made / (self._made + left) if self._made + left else 1.0

    def wanted(self) -> Wanted | None:
        """For the first SLO that still wants one."""
        if self._overloaded:
            return None
        steps = (next_run(self._judged[slo], slo.attainment, self._options) for slo in self._slos)
        return next((step for step in steps if isinstance(step, Wanted)), None)

    async def take(self, wanted: Wanted) -> None:
        run = await self._measure(wanted.rate_rps, wanted.seed)
        self._made += 1
        self._keep(Measured(wanted.rate_rps, wanted.seed, run, self._options.warm_up_s))

    def said(self) -> str:
        """Of the last run, and what is known now, under the first SLO."""
        last, slo = self.measured[-1], self._slos[0]
        if self._overloaded:
            return self._overloaded
        met = self._judged[slo][-1].met
        share = f"{met.mean():.1%} of {len(met)} requests met the objectives"
        return f"{last.rate_rps:g} requests/s (seed {last.seed}): {share}{self._enclosed(slo)}"

    def result(self, slo: Slo) -> Sweep:
        points = self._judged[slo]
        found = goodput_of(points, slo.attainment) if points else None
        return Sweep(slo, tuple(self.measured), found, self._overloaded or self._why(slo))

    def _keep(self, one: Measured) -> None:
        self.measured.append(one)
        if not one.valid:
            self._overloaded = _overload(one)
            return
        for slo, points in self._judged.items():
            points.append(judged_by(slo, one.point))

    def _enclosed(self, slo: Slo) -> str:
        found = bracket(self._judged[slo], slo.attainment)
        if found.met_rps is None:
            return f"; goodput is below {found.missed_rps:g}"
        if found.missed_rps is None:
            return f"; goodput is at least {found.met_rps:g}"
        return f"; goodput is between {found.met_rps:g} and {found.missed_rps:g}"

    def _why(self, slo: Slo) -> str:
        step = next_run(self._judged[slo], slo.attainment, self._options)
        return step.why if isinstance(step, Finished) else "not every run was made"


def _overload(one: Measured) -> str:
    run = one.run
    return (
        f"the load generator was overloaded at {one.rate_rps:g} requests/s (seed {one.seed}): {run.share_late:.1%} of "
        f"the requests were sent more than {run.late_s * 1000:g} ms late, so that run is not judged: give it a core of "
        "its own, or look among lower rates"
    )
