import math
from dataclasses import replace

import numpy as np
import pytest

from splitserve.bench.findings import Saved, judged
from splitserve.bench.run import Chunks, Run
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo
from tests.unit.bench.saved_runs import SLO, facts, saved, swept


def by_hand(late_s: float = 0.0) -> Saved:
    """Five requests: two tokens at once and one 30 ms later; one token; a slow one; one that failed after its first
    token, one that was never sent."""
    nan, inf = math.nan, math.inf
    scheduled = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    run = Run(
        scheduled_s=scheduled,
        sent_s=np.array([0.0, 1.0, 2.0, 3.0 + late_s, nan]),
        first_token_s=np.array([0.1, 1.2, 2.9, 3.1, inf]),
        last_token_s=np.array([0.13, 1.2, 3.0, 3.1, inf]),
        ended_s=np.array([0.13, 1.2, 3.0, 3.5, nan]),
        prompt_tokens=np.full(5, 10),
        tokens=np.array([3, 1, 2, 1, 0]),
        asked_tokens=np.array([3, 1, 2, 3, 3]),
        ending=np.array([0, 0, 0, 1, 3], dtype=np.int8),
        error=np.array([-1, -1, -1, 0, 1], dtype=np.int32),
        errors=("EngineError: broke", "not sent: 4 requests were in flight"),
        chunks=Chunks(
            np.array([0.1, 0.13, 1.2, 2.9, 3.0, 3.1]), np.array([0, 0, 1, 2, 2, 3]), np.array([2, 1, 1, 1, 1, 1])
        ),
    )
    return Saved(facts(1.0, "hand"), run)


def test_figures_are_those_worked_out_by_hand() -> None:
    figures = judged([by_hand()], SLO).systems[0].figures[0]
    assert figures.attainment.value == pytest.approx(2 / 5)
    assert figures.within == {"TTFT": pytest.approx(2 / 5), "TPOT": pytest.approx(2 / 5)}
    assert [figures.ttft_s.p50, figures.ttft_s.p90] == pytest.approx([0.2, math.inf])
    assert [figures.tpot_s.p50, figures.tpot_s.p90] == pytest.approx([0.1, math.inf])
    assert [figures.itl_s.p50, figures.itl_s.p99] == pytest.approx([0.03, 0.1])
    assert (figures.done, figures.failed, figures.not_sent, figures.lost) == (3, 1, 1, 2)
    assert figures.asked_rps == pytest.approx(1.0)
    assert figures.served_rps == pytest.approx(3 / 3.1)
    assert figures.output_tokens_per_s == pytest.approx(7 / 3.1)
    assert figures.errors == (("EngineError: broke", 1), ("not sent: 4 requests were in flight", 1))
    assert figures.valid


def test_a_generator_that_was_late_makes_the_run_invalid_and_says_why() -> None:
    findings = judged([by_hand(late_s=0.05)], SLO)
    assert not findings.valid
    assert "25.0% of the requests were sent more than 2 ms after" in findings.systems[0].figures[0].reasons[0]


def test_what_was_due_in_the_warm_up_is_not_judged() -> None:
    one = saved(2.0, warm_up_s=5.0)
    figures = judged([one], SLO).systems[0].figures[0]
    early = int((one.run.scheduled_s < 5.0).sum())
    assert early > 0
    assert (figures.warm_up_requests, figures.requests) == (early, 120 - early)


def test_a_run_that_is_all_warm_up_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"warm_up_s: no request .* send more requests"):
        judged([saved(2.0, warm_up_s=1e6)], SLO)


def test_all_or_none_within_is_no_certainty() -> None:
    for slo, value in ((Slo(1e3, 1e3), 1.0), (Slo(1e-9, 1e-9), 0.0)):
        share = judged([saved(0.5, count=20)], slo).systems[0].figures[0].attainment
        assert share.value == value
        assert share.high - share.low == pytest.approx(1 - 0.025 ** (1 / 20))


def test_goodput_needs_two_rates() -> None:
    assert judged([saved(1.0)], SLO).systems[0].goodput is None
    sweep = judged(swept(), SLO)
    assert sweep.kind == "sweep"
    assert sweep.systems[0].goodput is not None
    assert 1.0 < sweep.systems[0].goodput.rps < 4.0


def test_goodput_leaves_invalid_runs_out() -> None:
    runs = swept()
    late = replace(runs[-1].run, sent_s=runs[-1].run.scheduled_s + 1.0)
    bad = Saved(runs[-1].facts, late)
    with_bad, without = judged([*runs[:-1], bad], SLO), judged(runs[:-1], SLO)
    assert with_bad.systems[0].goodput == without.systems[0].goodput
    assert [figures.valid for figures in with_bad.systems[0].figures] == [True, True, True, False]


def test_two_names_are_a_comparison_by_the_same_requests() -> None:
    findings = judged([*swept("fast", slots=6), *swept("slow", slots=3)], SLO)
    (pair,) = findings.pairs
    assert (findings.kind, pair.a, pair.b) == ("comparison", "fast", "slow")
    ratio = pair.ratios[0]
    assert ratio is not None
    assert ratio.value > 1.0
    assert [rate.rate_rps for rate in pair.rates] == [1.0, 2.0, 3.0, 4.0]
