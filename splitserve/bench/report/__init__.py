"""The HTML report of runs: one file with its figures as SVG, for light and dark, that loads nothing."""

from collections.abc import Mapping

from splitserve.bench import plots, tables
from splitserve.bench.facts import Facts, in_ms, milliseconds, objectives
from splitserve.bench.findings import Findings
from splitserve.bench.report.tiles import tiles
from splitserve.view.page import page

ABOUT: Mapping[str, str] = {
    "Attainment against rate": (
        "Share of requests within all objectives, with its 95% interval. A diamond is the goodput, the bar on the "
        "target's line its 95% interval; it is read off a curve that only falls, dotted where chance had it rise."
    ),
    "TTFT": "From when a request was due to its first token. One that failed counts, as never.",
    "TPOT": "Mean time per output token after the first.",
    "Gaps between tokens over time": "By when they ended. Tokens that came in one chunk have no gap between them.",
    "Requests over time": "The space between due and sent is the load generator's own delay; between sent and done, "
    "what waits or runs.",
}


def report(findings: Findings) -> str:
    """A complete HTML document. The same findings give the same bytes. Raises ConfigError without matplotlib."""
    values = {
        "findings": findings,
        "title": title(findings),
        "answer": answer(findings),
        "tiles": tiles(findings),
        "charts": [(name, _about(name), plots.svg(draw)) for name, draw in plots.charts(findings).items()],
        "goodput_text": tables.goodput_text,
        "shown_errors": tables.shown_errors,
        "valid_text": tables.valid_text,
        "quotient_name": tables.quotient_name,
        "quotient_text": tables.quotient_text,
        "difference_text": tables.difference_text,
        "facts": [_rows(system.saved[0].facts) for system in findings.systems],
    }
    return page(__package__, values, {"ms": in_ms, "milliseconds": milliseconds, "objectives": objectives})


def title(findings: Findings) -> str:
    kinds = {"run": "Run", "sweep": "Sweep", "comparison": "Comparison"}
    return f"{kinds[findings.kind]}: {' and '.join(system.name for system in findings.systems)}"


def answer(findings: Findings) -> str:
    system = findings.systems[0]
    if findings.kind == "run":
        return tables.run_answer(system, system.figures[0], findings.slo)
    return tables.sweep_answer(system, findings.slo) if findings.kind == "sweep" else tables.comparison_answer(findings)


def _about(name: str) -> str:
    return ABOUT[name.partition(",")[0]]


def _rows(facts: Facts) -> list[tuple[str, str]]:
    """What is known of a system's first run."""
    machine = f"{facts.machine.cores} cores for this process, {facts.machine.cpu}" if facts.machine else ""
    rows = [
        ("command", facts.command),
        ("target", facts.target),
        *((key, said) for key, said in facts.about.items()),
        ("workload", facts.workload),
        *(("", note) for note in facts.workload_notes),
        ("each run", facts.amount),
        ("run for", objectives(facts.slo) if facts.slo else ""),
        ("warm-up", f"{facts.warm_up_s:g} s"),
        ("started", facts.started),
        ("load generator's machine", machine),
        ("versions", f"splitserve {facts.splitserve}, Python {facts.python}" if facts.splitserve else ""),
    ]
    return [(name, said) for name, said in rows if said]
