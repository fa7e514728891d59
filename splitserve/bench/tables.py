"""Findings on a terminal: the answer first, then the figures, then what to be careful of.

It makes rich's renderables and prints nothing.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from splitserve.bench.compare import Pair
from splitserve.bench.facts import in_ms, milliseconds, objectives
from splitserve.bench.findings import Figures, Findings, Quantiles, System
from splitserve.bench.goodput import Goodput, Ratio, Share
from splitserve.bench.percentiles import Quotient
from splitserve.core.slo import Slo
from splitserve.view.table import bullet, table

MOST_ERRORS = 8


def view(findings: Findings, notes: Sequence[str] = ()) -> Group:
    """Of a run, a sweep or a comparison, whichever it is. `notes` come last, such as which files were written."""
    sections = {"run": _run_view, "sweep": _sweep_view, "comparison": _comparison_view}[findings.kind](findings)
    about = dict.fromkeys(note for system in findings.systems for note in system.saved[0].facts.workload_notes)
    return Group(*sections, *(bullet(note, "dim") for note in (*about, *notes)))


def _run_view(findings: Findings) -> Iterator[RenderableType]:
    system, slo = findings.systems[0], findings.slo
    figures = system.figures[0]
    met = figures.attainment.value >= slo.attainment
    yield Text(run_answer(system, figures, slo), style="bold green" if met else "bold yellow")
    yield Text()
    yield times_table(figures, slo)
    yield Text()
    yield traffic_table(figures)
    yield Text()
    yield from (bullet(f"{count} failed: {error}", "yellow") for error, count in shown_errors(figures))
    yield from verdicts(system)


def _sweep_view(findings: Findings) -> Iterator[RenderableType]:
    system = findings.systems[0]
    yield Text(sweep_answer(system, findings.slo), style="bold")
    yield Text()
    yield rates_table(system, findings.slo)
    yield Text()
    yield from verdicts(system)


def _comparison_view(findings: Findings) -> Iterator[RenderableType]:
    yield Text(comparison_answer(findings), style="bold")
    for system in findings.systems:
        yield Text()
        yield Text(_alone(system))
        yield Text()
        yield rates_table(system, findings.slo)
    for pair in findings.pairs:
        yield Text()
        yield Text(f"{pair.a} beside {pair.b}, the same requests: difference in attainment, times as long")
        yield Text()
        yield pair_table(pair)
    yield Text()
    for system in findings.systems:
        yield from verdicts(system)


def run_answer(system: System, figures: Figures, slo: Slo) -> str:
    met = figures.attainment.value >= slo.attainment
    return (
        f"{system.name} at {figures.rate_rps:.3g} requests/s of {system.saved[0].facts.workload}: "
        f"{_share(figures.attainment)} of {figures.requests} requests within {objectives(slo)}, "
        f"{'at least' if met else 'below'} the {slo.attainment:.0%} asked for."
    )


def sweep_answer(system: System, slo: Slo) -> str:
    asked = f"{slo.attainment:.0%} of requests within {objectives(slo)}"
    workload = system.saved[0].facts.workload
    if system.goodput is None:
        return f"{system.name} on {workload}: one rate was run, so no goodput is known; {asked} was asked for."
    count = f"{len(system.figures)} runs of {system.figures[0].requests} requests"
    return f"{system.name} on {workload}: goodput {goodput_text(system.goodput)}, with {asked} ({count})."


def comparison_answer(findings: Findings) -> str:
    asked = f"{findings.slo.attainment:.0%} of requests within {objectives(findings.slo)}"
    ratios = [(pair, pair.ratios[0]) for pair in findings.pairs]
    said = [ratio_text(ratio, pair.a, pair.b) for pair, ratio in ratios if ratio is not None and not ratio.unknown]
    if not said:
        return (
            f"{' and '.join(system.name for system in findings.systems)}: {asked} was asked for; goodputs are unknown."
        )
    return f"{'; '.join(said)}, with {asked}."


def _alone(system: System) -> str:
    if system.goodput is None:
        return f"{system.name}: one rate"
    return f"{system.name}: goodput {goodput_text(system.goodput)}"


def goodput_text(found: Goodput) -> str:
    if found.at_least:
        return f"at least {found.rps:.3g} requests/s (every rate tried met the target)"
    if found.at_most:
        return f"below {found.rps:.3g} requests/s (no rate tried met the target)"
    return f"{found.rps:.3g} requests/s (95% interval {_bounds(found)})"


def ratio_text(found: Ratio, one: str, other: str) -> str:
    if found.at_least or found.at_most:
        bound = "at least" if found.at_least else "at most"
        return f"{one} has {bound} {found.value:.3g} times the goodput of {other}"
    interval = f"95% interval {_bounds(found)}"
    apart = "" if found.low > 1.0 or found.high < 1.0 else ": no difference beyond the interval"
    return f"{one} has {found.value:.3g} times the goodput of {other} ({interval}{apart})"


def _bounds(found: Goodput | Ratio) -> str:
    """An open bound is where the rates that were run end."""
    low, high = "≤ " * found.low_open, "≥ " * found.high_open
    return f"{low}{found.low:.3g} to {high}{found.high:.3g}"


def times_table(figures: Figures, slo: Slo) -> Table:
    """TTFT, TPOT and ITL, with the share of requests within each objective by itself."""
    asked = {"TTFT": milliseconds(slo.ttft_s), "TPOT": milliseconds(slo.tpot_s), "ITL": _itl_objective(slo)}
    if slo.ttft_per_token_s:
        asked["TTFT"] += f" + {milliseconds(slo.ttft_per_token_s)}/token"
    made = table(("",), ("objective", "within", "p50", "p90", "p99"))
    for name, quantiles in (("TTFT", figures.ttft_s), ("TPOT", figures.tpot_s), ("ITL", figures.itl_s)):
        within = figures.within.get(name if name != "ITL" else "ITL p99")
        made.add_row(name, asked[name], "" if within is None else f"{within:.1%}", *_quantiles(quantiles))
    return made


def _itl_objective(slo: Slo) -> str:
    return f"p99 {milliseconds(slo.itl_p99_s)}" if slo.itl_p99_s < float("inf") else ""


def traffic_table(figures: Figures) -> Table:
    made = table(
        (), ("requests", "failed", "asked /s", "served /s", "output tokens/s", "sent late, p50", "sent late, p99")
    )
    late = figures.late_s
    made.add_row(
        _requests(figures),
        str(figures.lost),
        f"{figures.asked_rps:.3g}",
        f"{figures.served_rps:.3g}",
        f"{figures.output_tokens_per_s:,.0f}",
        milliseconds(late.p50),
        milliseconds(late.p99),
    )
    return made


def _requests(figures: Figures) -> str:
    return f"{figures.requests}" + (f" + {figures.warm_up_requests} warm-up" if figures.warm_up_requests else "")


def rates_table(system: System, slo: Slo) -> Table:
    """A row for each run, the slowest rate first; green where the target is met. Times are milliseconds."""
    columns = [column for column in _COLUMNS if column.always or len({column.of(one) for one in system.figures}) > 1]
    made = table((), [column.head for column in columns])
    for one in system.figures:
        made.add_row(*(column.of(one) for column in columns), style=_style(one, slo))
    return made


def pair_table(pair: Pair) -> Table:
    """A row for each rate that both systems were measured at."""
    names = ("TTFT p50", "TTFT p99", "TPOT p99", "ITL p99")
    made = table((), ("requests /s", "attained", *names))
    for rate in pair.rates:
        found = {quotient_name(each): quotient_text(each) for each in rate.quotients}
        made.add_row(
            f"{rate.rate_rps:.3g}", difference_text(rate.differences[0]), *(found.get(name, "-") for name in names)
        )
    return made


def quotient_name(found: Quotient) -> str:
    return f"{found.what} p{100 * found.quantile:g}"


def quotient_text(found: Quotient) -> str:
    """`-` where one of the two never got so far."""
    if not 0.0 < found.value < math.inf:
        return "-"
    return f"{found.value:.2f}x\n{found.low:.2f}-{found.high:.2f}"


def difference_text(found: Share) -> str:
    return f"{100 * found.value:+.0f}%\n{100 * found.low:+.0f} to {100 * found.high:+.0f}"


@dataclass(frozen=True, slots=True)
class _Column:
    """Shown where its rows differ, or `always`."""

    head: str
    of: Callable[[Figures], str]
    always: bool = True


_COLUMNS = (
    _Column("requests /s", lambda one: f"{one.rate_rps:.3g}"),
    _Column("seed", lambda one: str(one.seed), always=False),
    _Column("attained", lambda one: f"{one.attainment.value:.1%}"),
    _Column("95% interval", lambda one: f"{100 * one.attainment.low:.1f}-{one.attainment.high:.1%}"),
    _Column("TTFT p90 ms", lambda one: in_ms(one.ttft_s.p90)),
    _Column("TPOT p90 ms", lambda one: in_ms(one.tpot_s.p90)),
    _Column("ITL p99 ms", lambda one: in_ms(one.itl_s.p99)),
    _Column("tokens /s", lambda one: f"{one.output_tokens_per_s:,.0f}"),
    _Column("failed", lambda one: str(one.lost)),
    _Column("late p99 ms", lambda one: in_ms(one.late_s.p99)),
    _Column("valid", lambda one: "yes" if one.valid else "NO", always=False),
)


def _style(one: Figures, slo: Slo) -> str:
    if not one.valid:
        return "red"
    return "green" if one.attainment.value >= slo.attainment else ""


def verdicts(system: System) -> Iterator[Text]:
    """VALID, or INVALID with the reason, and what else to keep in mind; of several runs, those alone that have it."""
    one = len(system.figures) == 1
    for figures in system.figures:
        which = "" if one else f"{system.name} at {figures.rate_rps:.3g}/s: "
        yield from (bullet(f"{which}INVALID: {reason}", "bold red") for reason in figures.reasons)
        yield from (bullet(f"{which}{note}", "yellow") for note in figures.notes)
    if all(figures.valid for figures in system.figures):
        yield bullet(valid_text(system), "dim")


def valid_text(system: System) -> str:
    """Only for a system whose runs are valid."""
    late_s = max(figures.late_s.p99 for figures in system.figures)
    lag_s = max(figures.lag_p99_s for figures in system.figures)
    cpu = max(figures.cpu_share for figures in system.figures)
    what = "" if len(system.figures) == 1 else f"{system.name}, all {len(system.figures)} runs: "
    kept = f"sent at most {milliseconds(late_s)} late at p99, read at most {milliseconds(lag_s)} late"
    return f"{what}VALID: the load generator kept its schedule ({kept}, {cpu:.0%} of a core)"


def shown_errors(figures: Figures) -> Iterable[tuple[str, int]]:
    """The most frequent, the others as one."""
    shown, rest = figures.errors[:MOST_ERRORS], figures.errors[MOST_ERRORS:]
    return (*shown, *([(f"{len(rest)} other reasons", sum(count for _, count in rest))] if rest else []))


def _share(share: Share) -> str:
    return f"{share.value:.1%} (95% interval {share.low:.1%} to {share.high:.1%})"


def _quantiles(quantiles: Quantiles) -> tuple[str, str, str]:
    return milliseconds(quantiles.p50), milliseconds(quantiles.p90), milliseconds(quantiles.p99)
