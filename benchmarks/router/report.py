"""What `python -m benchmarks.router` prints: tables, notes and the verdict. Decides nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.router.figures import Phase, Record, Spread, best_peer, ratio

WIDTH = 150
NOTES = """\
tokens/s a core: output tokens for a second of CPU of the router's processes (user and system); median (least-most) of
the rounds.  of best: over the better peer's median.  TTFT: median of requests one at a time.
added: over a worker without a router.  RSS: with no stream, and with all of them open.
tokens a message: 1 where each token reaches the client as a message or event of its own.
client: CPU of the load client, of one core; near 1 it holds the router up, and streams are coalesced for its sake."""


@dataclass(frozen=True, slots=True)
class Report:
    setting: Mapping[str, object]
    records: Mapping[str, Record]


def print_report(report: Report, console: Console) -> None:
    console.width = max(WIDTH, console.width)
    for name, value in report.setting.items():
        console.print(f"{name}: {value}", highlight=False)
    console.print(_table("CPU of the router", report, FIGURES))
    console.print(_table("First token of one request, and memory", report, LATENCY))
    console.print(_table("How the loads ran, medians (burst, then paced)", report, CONDITIONS))
    console.print(NOTES, highlight=False)
    console.print(verdict(report), highlight=False)


def verdict(report: Report) -> str:
    """Each of our endpoints beside the better peer."""
    lines = []
    for name, record in report.records.items():
        for phase in (Phase.BURST, Phase.PACED):
            best, times = best_peer(report.records, phase), ratio(record, report.records, phase)
            if record.ours and best is not None and times is not None:
                side = "ahead of" if times >= 1 else "behind"
                lines.append(f"{name}, {phase}: {times:.2f} times the tokens a core of {best[0]}: {side} it.")
    return "\n".join(lines)


def thousands(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.median / 1000:.1f}k ({found.least / 1000:.1f}-{found.most / 1000:.1f})"


def milliseconds(found: Spread | None) -> str:
    return "" if found is None else f"{found.median:.2f} ({found.least:.2f}-{found.most:.2f})"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _memory(record: Record) -> str:
    held = record.memory
    return "" if held is None else f"{held.idle_mib:.0f} → {held.held_mib:.0f} at {held.streams:,}"


def _per_stream(record: Record) -> str:
    return "" if record.memory is None else f"{record.memory.kib_per_stream:.0f}"


def _median(record: Record, phase: Phase, field: str, digits: int) -> str:
    values = sorted(getattr(sample, field) for sample in record.samples.get(phase, ()))
    return f"{values[len(values) // 2]:.{digits}f}" if values else ""


Column = tuple[str, Callable[[Record, Mapping[str, Record]], str]]
FIGURES: tuple[Column, ...] = (
    ("tokens/s a core, burst", lambda record, _: thousands(record.tokens_per_core(Phase.BURST))),
    ("of best", lambda record, all_: _times(ratio(record, all_, Phase.BURST))),
    ("paced", lambda record, _: thousands(record.tokens_per_core(Phase.PACED))),
    ("of best", lambda record, all_: _times(ratio(record, all_, Phase.PACED))),
    ("CPU ms a request, burst", lambda record, _: milliseconds(record.cpu_ms_per_request(Phase.BURST))),
    ("paced", lambda record, _: milliseconds(record.cpu_ms_per_request(Phase.PACED))),
)
LATENCY: tuple[Column, ...] = (
    ("TTFT ms", lambda record, _: milliseconds(record.ttft_ms())),
    ("added ms", lambda record, _: milliseconds(record.added_ttft_ms())),
    ("RSS MiB", lambda record, _: _memory(record)),
    ("KiB a stream", lambda record, _: _per_stream(record)),
)
CONDITIONS: tuple[Column, ...] = tuple(
    (
        f"{title}, {phase}" if title == "wall s" else title,
        lambda record, _, phase=phase, field=field, digits=digits: _median(record, phase, field, digits),  # type: ignore[misc]
    )
    for phase in (Phase.BURST, Phase.PACED)
    for title, field, digits in (
        ("wall s", "wall_s", 1),
        ("router cores", "router_cores", 2),
        ("client cores", "client_cores", 2),
        ("tokens a message", "tokens_per_message", 2),
    )
)


def _table(title: str, report: Report, columns: tuple[Column, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("system", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right")
    for name, record in report.records.items():
        table.add_row(name, *(of(record, report.records) for _, of in columns))
    return table
