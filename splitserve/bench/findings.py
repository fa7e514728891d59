"""What saved runs say under an SLO: the figures that tables, plots, the report and --json all show.

Attainment and goodput are `core.slo`'s and `goodput`'s; here they are put side by side, run by run, system by system.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from splitserve.bench.compare import Pair, compared
from splitserve.bench.facts import Facts
from splitserve.bench.goodput import Goodput, Point, Share, attainment_interval, goodput_of
from splitserve.bench.run import Ending, Run
from splitserve.bench.sweep import Measured, judged_by
from splitserve.core.slo import Slo, Timelines


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A run with what is known of it."""

    facts: Facts
    run: Run

    @property
    def measured(self) -> Measured:
        return Measured(self.facts.rate_rps, self.facts.seed, self.run, self.facts.warm_up_s)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds; inf where fewer requests than that got so far."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run, without its warm-up, but for how late the load generator was. `within` is the share of requests that
    meet each objective by itself. `asked_rps` is the rate at which requests fell due; `served_rps` and
    `output_tokens_per_s` are over the time from the first that was due to the last token. `errors` are the reasons of
    what failed, the most frequent first. `lag_p99_s` is how late the load generator read what came, `cpu_share` what it
    used of a core. `reasons` say why the run is not valid, `notes` what else to keep in mind."""

    rate_rps: float
    seed: int
    requests: int
    warm_up_requests: int
    attainment: Share
    within: dict[str, float]
    ttft_s: Quantiles
    tpot_s: Quantiles
    itl_s: Quantiles
    asked_rps: float
    served_rps: float
    output_tokens_per_s: float
    done: int
    failed: int
    cut_off: int
    not_sent: int
    errors: tuple[tuple[str, int], ...]
    late_s: Quantiles
    share_late: float
    lag_p99_s: float
    cpu_share: float
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def valid(self) -> bool:
        return not self.reasons

    @property
    def lost(self) -> int:
        """All that did not end well."""
        return self.failed + self.cut_off + self.not_sent


@dataclass(frozen=True, slots=True, eq=False)
class System:
    """One target's runs and their figures, slowest rate first. `goodput` is of the valid ones, None where they are of
    fewer than two rates."""

    name: str
    saved: tuple[Saved, ...]
    figures: tuple[Figures, ...]
    goodput: Goodput | None

    @property
    def points(self) -> tuple[Point, ...]:
        """Of the valid runs."""
        return tuple(each.measured.point for each in self.saved if each.measured.valid)


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """`pairs`: each system beside each that was named after it."""

    slo: Slo
    systems: tuple[System, ...]
    pairs: tuple[Pair, ...]

    @property
    def kind(self) -> str:
        if len(self.systems) > 1:
            return "comparison"
        return "sweep" if len(self.systems[0].saved) > 1 else "run"

    @property
    def valid(self) -> bool:
        return all(figures.valid for system in self.systems for figures in system.figures)


def judged(saved: Iterable[Saved], slo: Slo) -> Findings:
    """Of at least one run; runs of the same name are one system's. Raises ConfigError for an objective that a run can't
    be judged by, and for a run that is all warm-up."""
    named: dict[str, list[Saved]] = {}
    for each in saved:
        named.setdefault(each.facts.name, []).append(each)
    assert named
    systems = tuple(_system(name, ones, slo) for name, ones in named.items())
    pairs = compared({system.name: [each.measured for each in system.saved] for system in systems}, (slo,))
    return Findings(slo, systems, pairs)


def _system(name: str, saved: Iterable[Saved], slo: Slo) -> System:
    ordered = tuple(sorted(saved, key=lambda each: (each.facts.rate_rps, each.facts.seed)))
    each_judged = [(judged_by(slo, each.measured.point), each.measured.valid) for each in ordered]
    found = [point for point, valid in each_judged if valid]
    rates = {point.rate_rps for point in found}
    goodput = goodput_of(found, slo.attainment) if len(rates) > 1 else None
    return System(name, ordered, tuple(figures_of(each, slo) for each in ordered), goodput)


def figures_of(saved: Saved, slo: Slo) -> Figures:
    """Raises ConfigError as `judged`."""
    run, facts = saved.measured.judged, saved.facts
    timelines = run.timelines
    span_s, due_s = _span_s(run), float(np.ptp(run.scheduled_s)) if len(run) else 0.0
    return Figures(
        rate_rps=facts.rate_rps,
        seed=facts.seed,
        requests=len(run),
        warm_up_requests=len(saved.run) - len(run),
        attainment=attainment_interval(timelines, slo),
        within=_within(timelines, slo),
        ttft_s=quantiles(timelines.ttft_s),
        tpot_s=quantiles(timelines.tpot_s),
        itl_s=quantiles(run.chunks.gaps_s()),
        asked_rps=(len(run) - 1) / due_s if due_s else 0.0,
        served_rps=run.count(Ending.DONE) / span_s if span_s else 0.0,
        output_tokens_per_s=int(run.tokens.sum()) / span_s if span_s else 0.0,
        done=run.count(Ending.DONE),
        failed=run.count(Ending.FAILED),
        cut_off=run.count(Ending.CUT_OFF),
        not_sent=run.count(Ending.NOT_SENT),
        errors=_errors(run),
        late_s=quantiles(saved.run.lateness_s[~np.isnan(saved.run.sent_s)]),
        share_late=saved.run.share_late,
        lag_p99_s=saved.run.lag_p99_s,
        cpu_share=_cpu_share(saved.run),
        reasons=tuple(_reasons(saved.run)),
        notes=tuple(_notes(run)),
    )


def _span_s(run: Run) -> float:
    ends = run.last_token_s[np.isfinite(run.last_token_s)]
    return max(0.0, float(ends.max() - run.scheduled_s.min())) if len(ends) else 0.0


def _cpu_share(run: Run) -> float:
    """Of a core, until the last request ended; 0 if none was sent."""
    ends = run.ended_s[~np.isnan(run.ended_s)]
    return run.cpu_s / float(ends.max()) if len(ends) else 0.0


def quantiles(values_s: npt.NDArray[np.float64]) -> Quantiles:
    """No interpolation; zeros of none."""
    if not len(values_s):
        return Quantiles(0.0, 0.0, 0.0)
    return Quantiles(*(float(value) for value in np.quantile(values_s, (0.5, 0.9, 0.99), method="inverted_cdf")))


def _within(timelines: Timelines, slo: Slo) -> dict[str, float]:
    ended = np.isfinite(timelines.last_token)
    alone = {
        "TTFT": replace(slo, tpot_s=math.inf, itl_p99_s=math.inf),
        "TPOT": Slo(math.inf, slo.tpot_s),
    }
    if slo.itl_p99_s < math.inf:
        alone["ITL p99"] = Slo(math.inf, math.inf, itl_p99_s=slo.itl_p99_s)
    return {name: float((ended & timelines.met(one)).mean()) if len(ended) else 1.0 for name, one in alone.items()}


def _errors(run: Run) -> tuple[tuple[str, int], ...]:
    counts = np.bincount(run.error[run.error >= 0], minlength=len(run.errors))
    found = [(run.errors[index], int(counts[index])) for index in np.argsort(-counts, kind="stable") if counts[index]]
    blamed = sum(count for _, count in found)
    silent = len(run) - run.count(Ending.DONE) - blamed
    return (*found, *([("cut off by the end of the run", silent)] if silent > 0 else []))


def _reasons(run: Run) -> Iterable[str]:
    if run.overload:
        yield (
            f"the load generator was overloaded: {run.overload}, so these are this machine's figures, not the "
            "target's; lower --rate, or run the generator on cores of its own"
        )


def _notes(run: Run) -> Iterable[str]:
    if run.short:
        yield f"{run.short} requests ended with more or fewer tokens than asked for: the load was not the one planned"
    if run.chunks.dropped:
        yield f"{run.chunks.dropped} chunks were not kept: gaps between tokens are those of the earlier ones"
