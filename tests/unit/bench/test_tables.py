from dataclasses import replace

import pytest
from rich.console import Console

from splitserve.bench import tables
from splitserve.bench.findings import Findings, Saved, judged
from splitserve.bench.goodput import Goodput, Ratio
from splitserve.core.slo import Slo
from tests.unit.bench.saved_runs import SLO, saved, swept


def shown(findings: Findings, *notes: str, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(tables.view(findings, notes), highlight=False)
    return captured.get()


def late(one: Saved) -> Saved:
    return replace(one, run=replace(one.run, sent_s=one.run.scheduled_s + 0.5))


def test_a_run_says_its_answer_times_and_verdict() -> None:
    text = shown(judged([saved(1.0)], SLO), "wrote run.jsonl", width=200)
    assert "pd at 1 requests/s of lognormal:prompt=200,output=40,sigma=0.4: 96.7% (95% interval " in text
    assert "of 120 requests within TTFT 400 ms and TPOT 50 ms, at least the 90% asked for." in text
    assert [line.split()[0] for line in text.splitlines() if line[:4] in ("TTFT", "TPOT", "ITL ")] == [
        "TTFT",
        "TPOT",
        "ITL",
    ]
    assert "• VALID: the load generator kept its schedule" in text
    assert text.rstrip().endswith("• wrote run.jsonl")


def test_an_invalid_run_says_so_and_why() -> None:
    text = shown(judged([late(saved(1.0))], SLO), width=300)
    assert "• INVALID: the load generator was overloaded: 100.0% of the requests were sent more than 2 ms" in text
    assert "• VALID" not in text


def test_failures_are_shown_by_their_reason() -> None:
    findings = judged([saved(6.0, patience_s=1.0)], SLO)
    count = findings.systems[0].figures[0].failed
    assert f"• {count} failed: Overloaded: the queue is full" in shown(findings)


def test_rare_reasons_are_put_together() -> None:
    figures = judged([saved(1.0)], SLO).systems[0].figures[0]
    many = replace(figures, errors=tuple((f"error {n}", 20 - n) for n in range(10)))
    assert list(tables.shown_errors(many))[-1] == ("2 other reasons", 23)


def test_a_sweep_has_a_row_for_each_rate_and_the_goodput() -> None:
    findings = judged(swept(), SLO)
    goodput = findings.systems[0].goodput
    assert goodput is not None
    text = shown(findings)
    assert f"goodput {goodput.rps:.3g} requests/s" in text.replace("\n", " ").replace("  ", " ")
    rates = [line.split()[0] for line in text.splitlines() if line.strip()[:1].isdigit() and "%" in line]
    assert rates == ["1", "2", "3", "4"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_no_table_is_cut_at_eighty_columns(seeds: int) -> None:
    runs = [
        saved(rate, name, seed=seed, slots=slots)
        for name, slots in (("pd", 4), ("colocated", 3))
        for rate in (1.0, 3.0)
        for seed in range(seeds)
    ]
    assert "…" not in shown(judged(runs, SLO))
    assert "…" not in shown(judged([saved(4.5, warm_up_s=5)], Slo(0.2, 0.05, 0.9, 0.001, 0.03)))


def test_rows_are_marked_where_only_some_runs_are_valid() -> None:
    runs = swept()
    text = shown(judged([*runs[:3], late(runs[3])], SLO), width=120)
    rows = [line.split()[-1] for line in text.splitlines() if line.strip()[:1].isdigit() and "%" in line]
    assert rows == ["yes", "yes", "yes", "NO"]
    assert "pd at 4/s: INVALID" in text


def test_a_comparison_shows_both_and_their_ratio() -> None:
    text = shown(judged([*swept("fast", slots=6), *swept("slow", slots=3)], SLO), width=200)
    assert "fast has " in text
    assert " times the goodput of slow (95% interval " in text
    assert "fast: goodput " in text
    assert "slow: goodput " in text
    assert "fast beside slow" in text


def test_a_bound_is_not_shown_as_a_figure() -> None:
    assert "at least 8" in tables.goodput_text(Goodput(8.0, 8.0, 8.0, at_least=True))
    assert "below 2" in tables.goodput_text(Goodput(2.0, 2.0, 2.0, at_most=True))
    assert "2 (95%" not in tables.goodput_text(Goodput(2.0, 2.0, 2.0, at_most=True))
    assert "at least 1.5 times" in tables.ratio_text(Ratio(1.5, 1.0, 2.0, at_least=True), "a", "b")
    open_ = tables.goodput_text(Goodput(3.0, 2.0, 4.0, low_open=True, high_open=True))
    assert open_ == "3 requests/s (95% interval ≤ 2 to ≥ 4)"


def test_a_ratio_whose_interval_holds_one_is_no_difference() -> None:
    assert "no difference beyond the interval" in tables.ratio_text(Ratio(1.1, 0.9, 1.3), "a", "b")
    assert "no difference" not in tables.ratio_text(Ratio(1.2, 1.1, 1.3), "a", "b")


def test_one_rate_each_has_no_ratio() -> None:
    text = shown(judged([saved(1.0, "a"), saved(1.0, "b")], SLO), width=200)
    assert "goodputs are unknown" in text
    assert "a beside b" in text
