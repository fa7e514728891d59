"""The few figures that a report shows large."""

from collections.abc import Iterable, Iterator

from splitserve.bench.facts import milliseconds
from splitserve.bench.findings import Figures, Findings, System
from splitserve.bench.plots import typical
from splitserve.core.slo import Slo

Tile = tuple[str, str]  # the figure, and what it is


def tiles(findings: Findings) -> list[Tile]:
    if findings.kind == "run":
        return list(_of_run(findings.systems[0].figures[0], findings.slo))
    goodputs = [tile for system in findings.systems for tile in _of_system(system)]
    return [*_ratios(findings), *goodputs, *(_near_goodput(findings.systems[0]) if findings.kind == "sweep" else ())]


def _of_run(figures: Figures, slo: Slo) -> Iterator[Tile]:
    share = figures.attainment
    yield f"{share.value:.1%}", f"attained ({share.low:.1%} to {share.high:.1%}), asked for {slo.attainment:.0%}"
    yield milliseconds(figures.ttft_s.p90), f"TTFT p90, {figures.within['TTFT']:.1%} within"
    yield milliseconds(figures.tpot_s.p90), f"TPOT p90, {figures.within['TPOT']:.1%} within"
    yield milliseconds(figures.itl_s.p99), "gap between tokens, p99"
    yield f"{figures.output_tokens_per_s:,.0f}", "output tokens/s"
    yield f"{figures.served_rps:.3g}", f"requests/s served, {figures.asked_rps:.3g} asked"
    yield str(figures.lost), f"of {figures.requests} requests failed"


def _of_system(system: System) -> Iterable[Tile]:
    found = system.goodput
    if found is None:
        return ()
    bound = "≥ " if found.at_least else "< " if found.at_most else ""
    interval = "" if bound else f" ({found.low:.3g} to {found.high:.3g})"
    return [(f"{bound}{found.rps:.3g}", f"requests/s goodput{interval}, {system.name}")]


def _near_goodput(system: System) -> Iterator[Tile]:
    """Of the run that the figures show."""
    (shown,) = typical([system])
    figures = system.figures[system.saved.index(shown)]
    at = f"at {figures.rate_rps:.3g} requests/s"
    yield milliseconds(figures.ttft_s.p90), f"TTFT p90 {at}"
    yield milliseconds(figures.tpot_s.p90), f"TPOT p90 {at}"
    yield milliseconds(figures.itl_s.p99), f"gap between tokens, p99 {at}"
    yield f"{figures.output_tokens_per_s:,.0f}", f"output tokens/s {at}"


def _ratios(findings: Findings) -> Iterator[Tile]:
    for pair in findings.pairs:
        found = pair.ratios[0]
        if found is None or found.unknown:
            continue
        bound = "≥ " if found.at_least else "≤ " if found.at_most else ""
        interval = "" if bound else f" ({found.low:.3g} to {found.high:.3g})"
        yield f"{bound}{found.value:.3g}×", f"goodput of {pair.a} over {pair.b}{interval}"
