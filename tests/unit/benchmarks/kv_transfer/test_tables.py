"""What the KV transfer benchmark prints."""

import io

from rich.console import Console

from benchmarks.kv_transfer.figures import Case, Record, Row, Spread, Timing, row
from benchmarks.kv_transfer.tables import Report, median_and_tail, print_report, verdict


def a_report() -> Report:
    def a_row(system: str, late_s: float, uncovered_s: float | None) -> Row:
        timing = Timing(0.0, 1.0, 1.0 + late_s, 1.1 + late_s, (1, 2), uncovered_s)
        return row(Case(4000, 4), system, Record([timing]), zero, memcpy_gbps=12.5)

    zero = Record([Timing(0.0, None, 1.0, 1.1, (1, 3))])
    rows = [
        a_row("push", -0.02, -0.05),
        a_row("stock pull", 0.06, None),
        a_row("stock push", 0.3, None),
        row(Case(4000, 4), "colocated", zero, zero, memcpy_gbps=12.5),
    ]
    return Report({"machine": "two cores"}, {"push": 1.5, "stock pull": 90.0, "stock push": 80.0}, {"push": 0.01}, rows)


def test_a_tail_without_enough_samples_is_called_a_maximum() -> None:
    assert median_and_tail(Spread(7, 1.25, None, 9.0)) == "1.2 / max 9.0"
    assert median_and_tail(Spread(100, 1.25, 8.0, 9.0)) == "1.2 / 8.0"
    assert median_and_tail(None) == ""


def test_the_verdict_says_where_push_won_and_whose_tokens_differ() -> None:
    lines = verdict(a_report()).splitlines()
    assert "Push hands over before stock pull and stock push in 1 of 1 cases (medians)." in lines
    assert "Uncovered time is at or below zero in 1 of 1 cases (medians)." in lines
    assert "Requests with other tokens than the colocated engine's: 3." in lines


def test_both_tables_show_every_system() -> None:
    out = io.StringIO()
    print_report(a_report(), Console(file=out, width=40))
    text = out.getvalue()
    assert all(text.count(f"│ {system}") == 2 for system in ("push", "stock pull", "stock push", "colocated"))
    assert "-20.0 / max -20.0" in text
