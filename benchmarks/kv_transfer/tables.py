"""What `benchmarks/kv_transfer` prints: two tables and the verdict. Decides nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.kv_transfer.figures import ENOUGH_FOR_P99, Row, Spread, faster_cases

WIDTH = 150
NOTES = f"""\
hand-over: the prefill worker's first token to the decode worker's; negative: the decode worker's is out before.
TTFT+, 2nd+: over the colocated engine, per prompt, median.  uncovered: last WRITE done minus prefill's first token.
Stock connectors leave NIXL's progress thread on: it spins, on cores that engines are pinned to.
p99 needs {ENOUGH_FOR_P99} samples; with fewer, "max" says the largest.  n: requests, or gaps of the stream.
GB/s: KV bytes over the time in which NIXL had transfers on their way; stock connectors look once in an engine step
whether they still are.  memcpy: the bytes of one prompt's KV.
ITL of a stream on the decode worker: alone; serving: while requests were served; moving: gaps in which KV moved."""


@dataclass(frozen=True, slots=True)
class Report:
    """`first_contact_ms`: hand-over of each system's very first request. `idle_cores`: CPU burned idle."""

    setting: dict[str, Any]
    first_contact_ms: dict[str, float]
    idle_cores: dict[str, float]
    rows: list[Row]
    trouble: str = ""  # what ended the run early


def print_report(report: Report, console: Console) -> None:
    console.width = max(WIDTH, console.width)
    for name, value in report.setting.items():
        console.print(f"{name}: {value}", highlight=False)
    console.print(_table("Latency, ms", report.rows, LATENCY))
    console.print(_table("KV on its way, and a stream beside it, ms", report.rows, TRANSFER))
    console.print(NOTES, highlight=False)
    console.print(verdict(report), highlight=False)


def verdict(report: Report) -> str:
    first = ", ".join(f"{name} {ms:.1f} ms" for name, ms in report.first_contact_ms.items())
    idle = ", ".join(f"{name} {cores:.2f}" for name, cores in report.idle_cores.items())
    lines = [f"Hand-over of the very first request: {first}.", f"Cores burned while idle: {idle}."]
    stock = [name for name in report.first_contact_ms if name.startswith("stock")]
    if stock and "push" in report.first_contact_ms:
        won, of = faster_cases(report.rows, "push", stock)
        lines.append(f"Push hands over before {' and '.join(stock)} in {won} of {of} cases (medians).")
    uncovered = [row.uncovered_ms for row in report.rows if row.uncovered_ms is not None]
    covered = sum(spread.median <= 0 for spread in uncovered)
    lines.append(f"Uncovered time is at or below zero in {covered} of {len(uncovered)} cases (medians).")
    others = sum(row.other_tokens for row in report.rows)
    lines.append(f"Requests with other tokens than the colocated engine's: {others}.")
    return "\n".join(lines)


def median_and_tail(spread: Spread | None) -> str:
    if spread is None:
        return ""
    tail = f"max {spread.largest:.1f}" if spread.p99 is None else f"{spread.p99:.1f}"
    return f"{spread.median:.1f} / {tail}"


def _median(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.1f}"


def _count(spread: Spread | None) -> str:
    return "" if spread is None else str(spread.n)


Column = tuple[str, Callable[[Row], str]]
LATENCY: tuple[Column, ...] = (
    ("n", lambda row: _count(row.ttft_ms)),
    ("hand-over median / p99", lambda row: median_and_tail(row.handover_ms)),
    ("TTFT median / p99", lambda row: median_and_tail(row.ttft_ms)),
    ("TTFT+", lambda row: _median(row.ttft_over_colocated_ms)),
    ("2nd+", lambda row: _median(row.second_token_over_colocated_ms)),
    ("uncovered median / p99", lambda row: median_and_tail(row.uncovered_ms)),
    ("other tokens", lambda row: str(row.other_tokens or "")),
)
TRANSFER: tuple[Column, ...] = (
    ("GB/s", lambda row: "" if row.gbps is None else f"{row.gbps:.2f}"),
    ("memcpy GB/s", lambda row: f"{row.memcpy_gbps:.2f}"),
    ("ITL alone median / p99", lambda row: median_and_tail(row.itl_alone_ms)),
    ("n", lambda row: _count(row.itl_alone_ms)),
    ("serving median / p99", lambda row: median_and_tail(row.itl_serving_ms)),
    ("n", lambda row: _count(row.itl_serving_ms)),
    ("moving median / p99", lambda row: median_and_tail(row.itl_receiving_ms)),
    ("n", lambda row: _count(row.itl_receiving_ms)),
)


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("prompt", justify="right")
    table.add_column("at once", justify="right")
    table.add_column("system")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for number, row in enumerate(rows):
        case = (row.prompt_tokens, row.concurrent)
        last = number + 1 == len(rows) or case != (rows[number + 1].prompt_tokens, rows[number + 1].concurrent)
        cells = [of(row) for _, of in columns]
        table.add_row(f"{row.prompt_tokens:,}", str(row.concurrent), row.system, *cells, end_section=last)
    return table
